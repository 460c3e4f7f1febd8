"""A class of ``BlockRTRL`` with a fault, for claims that do not build it the ordinary way yet."""

from typing import Any

from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.verification.breaks import find


def learner_type(broken: str | None) -> type[BlockRTRL]:
    """Return the real learner for None, else a subclass with the fault of this name.

    Raises:
        ConfigError: no break has this name.
    """
    if broken is None:
        return BlockRTRL
    attributes: dict[str, Any] = {}

    def collect(owner: Any, name: str, value: Any) -> None:
        if owner is BlockRTRL:
            attributes[name] = value

    find(broken).plant(collect)

    def make(self: BlockRTRL, *args: Any, **options: Any) -> None:
        BlockRTRL.__init__(self, *args, **{**options, "structure": "off"})

    return type("BrokenLearner", (BlockRTRL,), {"__init__": make, **attributes})
