"""Benchmarks: throughput against the limit that the same process measures."""
