"""The oracle against code that nobody here wrote: the mixture-of-experts blocks of transformers, on the CPU."""
