"""Interrupted runs and how they go on."""
