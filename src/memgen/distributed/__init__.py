"""Ranks: collectives and DeepSpeed's ZeRO."""
