"""Interleaved reasoning for generation (IRG, arXiv 2509.06945): think, draw, look, reflect, draw better."""
