"""Benchmarks of samplers, the training step and the data feed, and compilation for TPUs that are not present."""
