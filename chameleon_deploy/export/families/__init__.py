"""The families of base models: one module builds the graph of each."""
