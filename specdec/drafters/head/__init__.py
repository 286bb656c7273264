"""Small networks that draft from the target's hidden states: EAGLE-3, P-EAGLE, DFlash, DSpark, MTP, jumps."""
