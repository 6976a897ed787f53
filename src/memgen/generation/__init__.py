"""Sampling, decoding with per-row insertion, and rollouts against an environment."""
