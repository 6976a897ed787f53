"""Continual learning: tasks learnt one after another, by memory and by fine-tuning, and what is left of each."""
