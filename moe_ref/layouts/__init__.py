"""Layouts of expert weights other than the canonical one, read as views and written back without loss."""
