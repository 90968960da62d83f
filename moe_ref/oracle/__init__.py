"""The oracle: the layer in fp64, one expert at a time, written to be read beside the formula."""
