"""Measures a bundle against its PyTorch reference and other engines, in one interleaved run."""
