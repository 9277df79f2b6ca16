"""Measurements. ``python -m titan_moe bench`` runs most; two modules are commands of their own.

They are ``python -m titan_moe.bench.dispatcher_traffic`` and ``python -m titan_moe.bench.replay``.
"""
