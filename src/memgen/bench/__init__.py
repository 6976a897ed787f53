"""Benchmarks: what memory costs, against plain Hugging Face work on the same weights in the same process."""
