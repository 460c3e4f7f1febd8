"""Multiply-adds and bytes, counted as they are dispatched."""

from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter

__all__ = ["LiveBytes", "MacCounter"]
