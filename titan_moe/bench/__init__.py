"""Measurements, by command: ``python -m titan_moe bench``, ``.traffic`` and ``.replay``."""
