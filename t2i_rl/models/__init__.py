"""Models: what draws, by family; `autoregressive` writes tokens, `diffusion` denoises."""
