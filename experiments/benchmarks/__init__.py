"""Measured ratios, each in one run on the same machine: `python -m experiments.benchmarks NAME`."""
