"""Timing: implementations, torch and peers on the same layers in one run, held against limits that the run measures."""
