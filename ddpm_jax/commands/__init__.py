"""The commands: their command lines in `arguments.py`, and one module each with `main`, which is given what was parsed."""
