"""The mixture-of-experts blocks of transformers as implementations, with each of its experts backends."""
