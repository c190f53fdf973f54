"""What is run with the lab: plain Hydra sweeps, claims, notebooks, benchmarks."""
