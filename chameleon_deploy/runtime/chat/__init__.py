"""Conversations: a bundle's chat template, its token ids, and the tool calls in answers."""
