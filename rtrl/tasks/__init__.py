"""Streams to learn from: every task gives one (input, target) pair a step, for a batch of samples."""

from rtrl.tasks.bytes import ByteStream

__all__ = ["ByteStream"]
