"""Benchmarks: prompts, a judge, and what fingerprints a number."""
