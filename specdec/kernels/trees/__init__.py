"""Work on trees: draws, growth, verification, masks, slots of the cache."""
