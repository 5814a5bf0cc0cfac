"""Benchmarks of fusedlr; see README.md beside this file."""
