"""The contract both sides of a comparison satisfy: mathematics, weights, parallelism, cases, words."""
