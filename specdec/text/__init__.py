"""Text and tokens: prompts, detokenizing up to a stop string, other tokenizers."""
