"""Evaluates checkpoints on held-out text, and compares base, LoRA, hypernetwork and the controls."""
