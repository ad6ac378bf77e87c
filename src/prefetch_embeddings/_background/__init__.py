"""Threads and time of the package's own: the worker pool, the timer, the fork hook."""
