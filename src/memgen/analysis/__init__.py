"""What the latents hold: analysis of trained memories, ablations and comparisons."""
