"""Multiply-adds and bytes, counted as they are dispatched, and times, taken side by side."""

from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter
from rtrl.profiling.timing import alternate, median_ratio, medians, synchronize

__all__ = ["LiveBytes", "MacCounter", "alternate", "median_ratio", "medians", "synchronize"]
