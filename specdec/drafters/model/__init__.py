"""Another model drafts."""
