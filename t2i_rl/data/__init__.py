"""Training data: prompts, pairs of images and texts, preferences, and the files that hold them."""
