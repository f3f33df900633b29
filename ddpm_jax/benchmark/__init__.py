"""Measuring samplers, the training step and the data feed, and compiling for TPUs that are not there."""
