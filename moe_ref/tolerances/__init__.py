"""tolerances.yaml: every number a verdict depends on, read strictly."""
