"""What a failing run looks like: every usual fault is computed and compared with what the subject showed."""
