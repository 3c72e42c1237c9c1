"""Kernels behind one interface: `reference.py` is the truth, the others are fast."""
