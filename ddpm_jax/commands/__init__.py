"""The commands, one module each: `Arguments` that a command line fills in, and `main`, which parses and calls."""
