"""Tiny cases that are run before any other and tell a mistake of an adapter from one of a kernel."""
