"""timm models and image files: model, batches, weights."""
