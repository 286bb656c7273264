"""A model's forward of a few tokens: linears, layers, stacks of them, threads."""
