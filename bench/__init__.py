"""Benchmarks: `pytest bench` from the repository root."""
