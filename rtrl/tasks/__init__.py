"""Streams to learn from: every task gives one (input, target) pair a step, for a batch of samples."""

from rtrl.tasks.anbn import AnBn
from rtrl.tasks.bytes import ByteStream
from rtrl.tasks.haystack import Haystack

__all__ = ["AnBn", "ByteStream", "Haystack"]
