"""A second implementation of the layer, in NumPy and plain Python, that shares no line with the oracle."""
