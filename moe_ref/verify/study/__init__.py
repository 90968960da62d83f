"""What the studies of false alarms and of power have in common; both judge with the harness's own measurement."""
