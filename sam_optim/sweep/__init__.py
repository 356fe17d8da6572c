"""Many checkpoints, many measures, resumable."""
