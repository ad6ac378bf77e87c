"""Measurements: one command, one table. `python -m benchmarks`, or `make bench`."""
