"""The project's claims, each measured by a module of its own.

A claim module has a frozen dataclass of settings, a ``measure(settings, progress)`` that returns a result, and prints
nothing. This package, like ``rtrl.testing``, may import the oracles; nothing else in ``rtrl`` does.
"""
