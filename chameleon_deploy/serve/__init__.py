"""The HTTP server: OpenAI-style completions, scores and operations, from one loaded bundle."""
