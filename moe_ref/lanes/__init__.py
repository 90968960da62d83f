"""Lanes of continuous integration as data: ci/lanes.yaml, which of them an event runs, running one, generated files."""
