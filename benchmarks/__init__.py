"""Measurements: memory, speed and learning against eager PyTorch and the field."""
