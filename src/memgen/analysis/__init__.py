"""What a checkpoint's latent memory is and does: `memgen analyze`."""
