"""Inputs of a case: a pure function of the problem's id, the same bits on every machine."""
