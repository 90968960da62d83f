"""What a subject showed, compared with the oracle and brought down to plain numbers."""
