"""What the benchmark, the models and the demo have in common."""
