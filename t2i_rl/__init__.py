"""t2i_rl: post-training of text-to-image models, with numbers that can be trusted."""

__version__ = "0.1.0"
