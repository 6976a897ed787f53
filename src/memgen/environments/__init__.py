"""Tasks: examples, prompts and rewards; text in, text out."""
