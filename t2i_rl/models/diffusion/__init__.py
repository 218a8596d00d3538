"""Denoisers of diffusers: UNets and transformers, with soft tokens and gradients."""
