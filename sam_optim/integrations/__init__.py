"""Training frameworks, one module each: import the module of the framework that you have.

Accelerate, `torch.amp.GradScaler` and loops of your own need none: `SAM` and `Perturbation` go in as they are.
"""
