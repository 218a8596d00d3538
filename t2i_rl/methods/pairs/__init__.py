"""Methods that learn from image-text pairs: SoftREPA, AGSM and their controls."""
