"""The commands, one module each: `Arguments`, the command line's options, and `main`, which parses and runs."""
