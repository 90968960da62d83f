"""Records: the only bridge between a verification run and what is reported of it. Imports no torch."""
