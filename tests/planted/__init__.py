"""Faults that ``tests/faults.py`` plants, by what they are in: each must turn tests red."""
