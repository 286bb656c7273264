"""Work on trees: draws, verification, masks, slots of the cache."""
