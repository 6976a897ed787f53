"""One LightningModule per stage, checkpoints and strategies."""
