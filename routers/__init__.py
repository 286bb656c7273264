"""Who writes the next reasoning step. Knows text and scores, knows no KV cache.

Step-level routing is lossy by design and lives beside token-level speculation, which is not.
"""
