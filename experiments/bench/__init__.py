"""Benchmarks: commands to run by hand, side by side in one process. None is a test."""
