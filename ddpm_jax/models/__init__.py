"""Networks: objects with `init(key, x_t, t)` and `apply`; see `training.experiment.Network`."""
