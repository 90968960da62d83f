"""Implementations to judge the judge with: right ones, wrong ones and misbehaving ones, in plain torch."""
