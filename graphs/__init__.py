"""What is computed: torch modules of model families, the four stages, and the cache policies."""
