"""All claims, in the order in which they are shown."""

from importlib import import_module
from typing import Any

from rtrl._utils import validation
from rtrl.verification.claim import Claim

_CLAIMS = (
    "gradients.equivalence.measure",
    "learning.anbn_learns.measure",
    "learning.anbn_lr.measure",
    "speed.sparse_vs_full.anbn",
    "learning.haystack_bptt.measure",
    "learning.haystack_rtrl.measure",
    "learning.haystack_long.measure",
    "speed.sparse_vs_full.haystack",
    "memory.memory_table.measure",
    "memory.memory_constant.measure",
    "memory.long_stream.measure",
    "model.extraction.measure",
    "speed.dormancy.measure",
    "speed.catch_up.measure",
    "speed.read_write.measure",
    "speed.per_step.measure",
    "speed.crossover.measure",
    "memory.bptt_limit.measure",
    "gradients.toggles.measure",
    "gradients.conditioning.measure",
    "model.patterns.measure",
    "memory.gpu.measure",
    "learning.byte_stream.measure",
    "rivals.balancing.measure",
    "thesis.sparse_stream.measure",
    "rivals.equal_memory.measure",
)
"""Modules of this package, each with the name of its claim."""


def claims() -> list[Claim[Any, Any]]:
    """Return every claim, gradient equivalence first: without it the others mean little."""
    places = [place.rpartition(".") for place in _CLAIMS]
    return [getattr(import_module(f"{__package__}.{module}"), name) for module, _, name in places]


def select(only: list[str]) -> list[Claim[Any, Any]]:
    """Return the claims whose ids are in ``only``, in the order of all; every claim if it is empty.

    Raises:
        ConfigError: an id is unknown; the message lists the known ones.
    """
    known = claims()
    for name in only:
        validation.known("claim", name, [claim.id for claim in known])
    return [claim for claim in known if not only or claim.id in only]
