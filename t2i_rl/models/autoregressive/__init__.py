"""Autoregressive unified models: text and image tokens of one network."""
