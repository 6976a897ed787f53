"""Latent sources that the weaver is compared with, one file each (docs/comparators.md)."""
