"""Failures of an implementation that its adopter knows, each excused until a day (docs/expectations.md)."""
