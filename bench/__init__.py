"""Benchmarks: what is measured and how, see docs/bench.md."""
