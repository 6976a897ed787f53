"""Question/answer tasks graded by their final answer."""
