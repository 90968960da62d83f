"""The referee judged itself: real defects seeded as mutants, right variants beside them, and what was caught."""
