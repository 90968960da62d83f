"""How far a right implementation may be off, and which choices it may make; see docs/bounds.md."""
