"""Encoders: matrices as codes with scales, by rounding to nearest; one module for each family of schemes."""
