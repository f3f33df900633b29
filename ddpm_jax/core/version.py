"""The version of the package: its only source."""

__version__ = "0.2.0.dev0"
