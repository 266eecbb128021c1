"""Benchmarks: each is a `dare-hf bench` and prints one JSON line."""
