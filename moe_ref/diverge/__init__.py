"""How implementations of a grouped matrix product drift from the truth as sums grow, and why two of them differ."""
