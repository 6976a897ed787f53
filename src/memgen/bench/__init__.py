"""Benchmarks of `memgen bench`: cost of latent memory against plain Hugging Face work on the same weights."""
