"""The loop, its schedule and the rows that it generates; the engine, which drives it for many callers."""
