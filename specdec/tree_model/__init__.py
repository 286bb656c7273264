"""A Hugging Face causal LM that forwards token trees: its cache, its masks, its layers."""
