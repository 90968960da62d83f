"""How implementations of a grouped matrix product drift from the truth as sums grow, what kind of error that is, and why
two of them differ.
"""
