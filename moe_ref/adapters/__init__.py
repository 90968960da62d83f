"""Implementations that no one here wrote, behind the contract's API.

A module is imported only when its implementation is asked for, and imports its library then; the list of all of them,
`catalogue.py`, imports none.
"""
