"""Benchmarks: ``pytest bench/ --benchmark-only``; the measured records lie in bench/results/."""
