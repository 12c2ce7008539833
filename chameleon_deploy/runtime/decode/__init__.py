"""The decoder of the CPU: sessions, key-value memory, slots, scorers."""
