"""Partial-transcript traces for the measurements, recorded and generated; all are synthetic."""

from benchmarks.traces.trace import RECORDED, Partial, Trace, load, plain, questions

__all__ = ["RECORDED", "Partial", "Trace", "load", "plain", "questions"]
