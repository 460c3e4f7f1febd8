"""All claims, in the order in which they are told."""

from importlib import import_module
from importlib.util import find_spec

from rtrl.claims.claim import Claim
from rtrl.errors import ConfigError

MODULES = (
    "gradient_equivalence",
    "anbn_learns",
    "anbn_lr",
    "anbn_speed",
    "haystack_bptt",
    "haystack_rtrl",
    "haystack_long",
    "haystack_speed",
    "memory_table",
    "memory_constant",
    "long_stream",
    "extraction",
    "dormancy",
    "catching_up",
    "read_write",
    "per_step",
    "bptt_limit",
    "toggles",
    "conditioning",
    "patterns",
    "gpu",
    "byte_stream",
)
"""Modules of this package, each with a ``CLAIM``."""


def claims() -> list[Claim]:
    """Every claim, gradient equivalence first: nothing else says much where that does not hold."""
    found: list[Claim] = []
    for name in MODULES:
        where = f"{__package__}.{name}"
        if find_spec(where) is not None:
            found.append(import_module(where).CLAIM)
    return found


def select(only: list[str]) -> list[Claim]:
    """The claims with these ids, in the order of all; all of them if none is named.

    Raises:
        ConfigError: there is no claim of that id; it lists those there are.
    """
    known = claims()
    ids = [claim.id for claim in known]
    for wanted in only:
        if wanted not in ids:
            raise ConfigError(f"there is no claim {wanted!r}; there are: {', '.join(ids)}")
    return [claim for claim in known if not only or claim.id in only]
