"""The harness: runs an implementation, measures it against the oracle, judges the numbers, keeps a record."""
