"""Proves a bundle equal to its PyTorch reference: the numeric gates, the checks, and the command."""
