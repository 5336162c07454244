"""Benchmarks: `python -m benchmarks.NAME` prints a table and can write JSON and a plot."""
