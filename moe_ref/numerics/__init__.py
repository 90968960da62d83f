"""Arithmetic of floating-point formats and accumulators: rounding, bit-level models, error of long sums."""
