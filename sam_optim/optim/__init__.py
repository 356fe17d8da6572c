"""All that happens inside `optimizer.step(...)`."""
