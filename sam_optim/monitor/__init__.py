"""Sharpness while a model trains, against the edge of its stability."""

from sam_optim.monitor.monitor import SharpnessMonitor

__all__ = ["SharpnessMonitor"]
