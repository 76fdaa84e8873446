"""The version of the package, its only literal."""

__version__ = "0.1.0"
