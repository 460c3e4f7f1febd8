"""All claims, in the order in which they are told."""

from importlib import import_module

from rtrl._utils import validation
from rtrl.verification.claim import Claim

MODULES = (
    "gradients.equivalence",
    "learning.anbn_learns",
    "learning.anbn_lr",
    "speed.anbn_speed",
    "learning.haystack_bptt",
    "learning.haystack_rtrl",
    "learning.haystack_long",
    "speed.haystack_speed",
    "memory.memory_table",
    "memory.memory_constant",
    "memory.long_stream",
    "model.extraction",
    "speed.dormancy",
    "speed.catch_up",
    "speed.read_write",
    "speed.per_step",
    "memory.bptt_limit",
    "gradients.toggles",
    "gradients.conditioning",
    "model.patterns",
    "memory.gpu",
    "learning.byte_stream",
)
"""Modules of this package, each with a ``CLAIM``."""


def claims() -> list[Claim]:
    """Every claim, gradient equivalence first: nothing else says much where that does not hold."""
    return [import_module(f"{__package__}.{name}").CLAIM for name in MODULES]


def select(only: list[str]) -> list[Claim]:
    """The claims with these ids, in the order of all; all of them if none is named.

    Raises:
        ConfigError: there is no claim of that id; it lists those there are.
    """
    known = claims()
    ids = [claim.id for claim in known]
    for wanted in only:
        validation.known("claim", wanted, ids)
    return [claim for claim in known if not only or claim.id in only]
