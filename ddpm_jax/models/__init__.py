"""Networks: anything with `init(key, x_t, t)` and `apply`, whose output at (x_t, t) the process gives a meaning."""
