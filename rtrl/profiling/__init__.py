"""Multiply-adds and bytes, counted as they are dispatched."""

from rtrl.profiling.live_bytes import AliveBytes
from rtrl.profiling.macs import MacCounter

__all__ = ["AliveBytes", "MacCounter"]
