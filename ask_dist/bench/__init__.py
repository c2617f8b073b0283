"""Benchmarks: each returns its figures as a dict, so that a command can print or store them."""
