"""Chooses among drafters, every round."""
