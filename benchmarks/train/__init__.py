"""Train an image classifier: one loop, one epoch."""
