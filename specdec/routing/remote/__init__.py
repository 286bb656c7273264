"""Writers that are endpoints."""
