"""SGD, SAM and ASAM on real digits with noisy labels: train, measure, and write one page."""
