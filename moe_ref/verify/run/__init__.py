"""A run: finding the subject, starting its processes, asking case by case, resuming."""
