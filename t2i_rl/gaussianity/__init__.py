"""Penalties and constraints that hold a latent Gaussian, and what tells whether it is."""
