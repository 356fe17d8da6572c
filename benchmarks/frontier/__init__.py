"""Which SAM is worth its cost: every method tuned on held-out data at the same budget, then compared over seeds."""
