"""A layer that rounds exactly where its contract says, in any order of summation, and the same with a planted fault."""
