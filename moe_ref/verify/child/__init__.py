"""The side of a run that holds the implementation: no oracle, no judge, no pickle."""
