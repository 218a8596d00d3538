"""The embedded world: coloured shapes, their captions and plans, a renderer, and an exact judge."""
