"""Training methods, each a LightningModule."""
