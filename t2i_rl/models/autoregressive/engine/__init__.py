"""Sampling from and scoring with an autoregressive model: cached, batched, chunked."""
