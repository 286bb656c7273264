"""Small networks that draft from the target's hidden states: EAGLE-3, and what is told apart by `formats.py`."""
