"""What is kept in the user's cache, and who may have written it. Knows nothing of torch."""
