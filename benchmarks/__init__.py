"""Measurements: memory, speed and learning against eager PyTorch and other libraries."""

from pathlib import Path

#: Of the checkout.
ROOT = Path(__file__).resolve().parents[1]
