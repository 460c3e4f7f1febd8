"""Check a monoid: an associative product with an identity."""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rtrl._utils.formatting import first_line
from rtrl.errors import ConfigError
from rtrl.testing.check_cell import check_options
from rtrl.testing.compare import RELATIVE
from rtrl.testing.report import Failure, Found, Report

_TRIPLES = 1000  # the number of triples that are drawn where all of them would be more


def equal_up_to_rounding(first: Any, second: Any) -> bool:
    """Whether two values are equal: numbers, tensors and arrays to 1e-10 of the largest entry, in any nesting of
    tuples, lists, mappings and dataclasses; anything else by ``==``."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return equal_up_to_rounding(torch.from_numpy(first), torch.from_numpy(second))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        if (not first.is_floating_point() and not first.is_complex()) or not first.numel():
            return torch.equal(first, second)
        scale = float(torch.maximum(first.abs().max(), second.abs().max()))
        return bool((first - second).abs().max() <= RELATIVE * scale)
    if type(first) is not type(second):
        return False
    if isinstance(first, float | complex):
        return bool(first == second or abs(first - second) <= RELATIVE * max(abs(first), abs(second)))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal_up_to_rounding(first[key], second[key]) for key in first)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return all(equal_up_to_rounding(getattr(first, name), getattr(second, name)) for name in names)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(equal_up_to_rounding, first, second))
    return bool(first == second)


def check_monoid(
    combine: Callable[[Any, Any], Any],
    identity: Any,
    elements: Sequence[Any],
    *,
    equal: Callable[[Any, Any], bool] = equal_up_to_rounding,
    seed: int = 0,
    on_fail: Literal["raise", "return"] = "raise",
) -> Report:
    """Check that a product is associative, that it has this identity, and that it leaves its arguments as they are.

    Equation:
        (a ∘ b) ∘ c = a ∘ (b ∘ c);  1 ∘ a = a ∘ 1 = a

    Args:
        combine: ``combine(first, second)`` returns the product.
        identity: the neutral element, 1.
        elements: some elements, such as those of several steps. All triples of up to ten are tried, a thousand of more.
        equal: ``equal(first, second)``; by default, up to rounding: numbers and tensors to 1e-10 of the largest entry,
            in any nesting of tuples, lists, mappings and dataclasses, and anything else by ``==``.
        seed: of the triples that are drawn.
        on_fail: ``"raise"`` or ``"return"``.

    Returns:
        The report; a note says if no pair of elements distinguishes the order of the factors.

    Raises:
        ConfigError: an argument is of the wrong kind.
        CheckFailed: something failed and ``on_fail`` is ``"raise"``; its ``report`` has all failures.

    Example:
        >>> check_monoid(lambda a, b: a + b, "", ["a", "bc", "d"]).passed
        True
        >>> print(check_monoid(lambda a, b: a - b, 0, [1, 2], on_fail="return").failures[0])
        FAIL identity: identity ∘ a is not a
             a = element 0: found -1, expected 1
    """
    check_options(seed, on_fail)
    for what, function in (("combine", combine), ("equal", equal)):
        if not callable(function):
            raise ConfigError(f"{what} must be a function of two values, got {type(function).__name__}")
    if isinstance(elements, str) or not isinstance(elements, Sequence) or not elements:
        raise ConfigError(f"elements must be a list of elements, at least one, got {elements!r:.80}")
    monoid = _Monoid(combine, identity, elements, equal, seed)
    script = "from rtrl.testing import check_monoid\ncheck_monoid(combine, identity, elements)"
    report = Report(name=getattr(combine, "__name__", type(combine).__name__), seed=seed, script=script)
    add_first_failures(report, {"arguments": monoid.arguments})  # on copies; where it fails, the elements are not safe
    if not report.failures:
        add_first_failures(report, {"identity": monoid.neutral, "associativity": monoid.associative})
    if not report.failures and monoid.commutes():
        report.notes.append("no pair of these elements tells a ∘ b from b ∘ a, so they cannot show an error of order")
    if on_fail == "raise":
        report.raise_for_failures()
    return report


def add_first_failures(report: Report, checks: Mapping[str, Callable[[], Iterator[Found]]]) -> None:
    """Run checks by name, and add the first failure of each to the report."""
    for name, run in checks.items():
        report.checks.append(name)
        try:
            found = next(run(), None)
        except Exception as error:
            found = Found(f"it raised {first_line(error)}")
        if found is not None:
            report.failures.append(Failure(name, *found))


@dataclasses.dataclass(frozen=True)
class _Monoid:
    combine: Callable[[Any, Any], Any]
    identity: Any
    elements: Sequence[Any]
    equal: Callable[[Any, Any], bool]
    seed: int

    def neutral(self) -> Iterator[Found]:
        """The identity on both sides of each element, and of itself."""
        for i, element in [*enumerate(self.elements), ("the identity", self.identity)]:
            where = f"a = {'' if isinstance(i, str) else 'element '}{i}"
            for words, found in (
                ("identity ∘ a is not a", self.combine(self.identity, element)),
                ("a ∘ identity is not a", self.combine(element, self.identity)),
            ):
                if not self.equal(found, element):
                    yield Found(words, None, None, where, f"{found!r:.200}", f"{element!r:.200}")

    def associative(self) -> Iterator[Found]:
        for i, j, k in self._triples():
            a, b, c = (self.elements[index] for index in (i, j, k))
            left, right = self.combine(self.combine(a, b), c), self.combine(a, self.combine(b, c))
            if not self.equal(left, right):
                where = f"a, b, c = elements {i}, {j}, {k}"
                yield Found("(a ∘ b) ∘ c is not a ∘ (b ∘ c)", None, None, where, f"{left!r:.200}", f"{right!r:.200}")

    def arguments(self) -> Iterator[Found]:
        """No product changes its factors."""
        for i in range(len(self.elements)):
            j = (i + 1) % len(self.elements)
            factors = copy.deepcopy((self.elements[i], self.elements[j]))
            kept = copy.deepcopy(factors)
            self.combine(*factors)
            for name, now, before in zip(("first", "second"), factors, kept, strict=True):
                if not self.equal(now, before):
                    where = f"elements {i}, {j}"
                    message = f"combine changes its {name} argument"
                    yield Found(message, None, None, where, f"{now!r:.200}", f"{before!r:.200}")

    def commutes(self) -> bool:
        """Whether the order of the factors makes no difference to any neighbours."""
        pairs = zip(self.elements, [*self.elements[1:], self.elements[0]], strict=True)
        return all(self.equal(self.combine(a, b), self.combine(b, a)) for a, b in pairs)

    def _triples(self) -> Iterator[tuple[int, int, int]]:
        n = len(self.elements)
        if n**3 <= _TRIPLES:
            yield from ((i, j, k) for i in range(n) for j in range(n) for k in range(n))
            return
        draw = random.Random(self.seed)
        yield from ((draw.randrange(n), draw.randrange(n), draw.randrange(n)) for _ in range(_TRIPLES))
