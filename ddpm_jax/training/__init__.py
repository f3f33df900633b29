"""Training: the experiment of a config, the compiled step, the loop, checkpoints and logs."""
