"""What a step and a measure cost."""
