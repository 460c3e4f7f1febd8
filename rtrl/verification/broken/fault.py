"""What a break is: one named fault, one sentence about it, and how it is planted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Patch(Protocol):
    """Replaces an attribute of a class or module until the break ends."""

    def __call__(self, owner: Any, name: str, value: Any) -> None:
        """Replace ``owner.name`` by ``value``."""
        ...


@dataclass(frozen=True, slots=True)
class Break:
    """One fault.

    Attributes:
        name: how it is called on the command line and in results.
        fault: what is wrong while it is planted, in one sentence.
        plant: plants it, by replacing attributes of classes and modules.
    """

    name: str
    fault: str
    plant: Callable[[Patch], None]


def break_(name: str) -> Callable[[Callable[[Patch], None]], Break]:
    """Make a function that plants a fault into a break. The first paragraph of its docstring is what is wrong."""

    def decorate(plant: Callable[[Patch], None]) -> Break:
        fault = (plant.__doc__ or "").strip().split("\n\n")[0]
        return Break(name, " ".join(fault.split()), plant)

    return decorate


def original(owner: Any, name: str) -> Any:
    """Return what a break replaces, for the use of what replaces it."""
    return getattr(owner, name)
