"""Which cases run when: axes, a pairwise cover of them, pinned cases, tiers. Imports no torch."""
