"""Layers of released checkpoints, read from safetensors files under the names they are published with."""
