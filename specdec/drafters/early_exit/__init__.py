"""The target's own lower layers draft."""
