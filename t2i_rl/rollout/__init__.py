"""Sampling from and scoring with an autoregressive text-to-image model."""
