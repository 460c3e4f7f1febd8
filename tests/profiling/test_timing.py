"""The sides of a comparison take turns, and the ratio of neighbours does not see what slows both."""

import pytest

from rtrl.profiling import alternate, median_ratio, medians, timing


def test_the_sides_take_turns_and_the_order_is_reversed_every_round() -> None:
    calls: list[str] = []
    seconds = alternate({name: lambda name=name: len(calls.append(name) or "one") for name in "abc"}, 2)
    assert "".join(calls) == "abc" + "abc" + "cba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_times_are_per_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 6.0, 10.0, 11.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert alternate({"three": lambda: 3, "one": lambda: 1}, 1) == {"three": [2.0], "one": [1.0]}


def test_a_ratio_of_neighbours_survives_what_slows_both() -> None:
    slowed = [1.0, 5.0, 2.0]
    assert median_ratio([3 * second for second in slowed], slowed) == 3.0
    assert medians({"a": slowed}) == {"a": 2.0}
    with pytest.raises(ValueError, match="longer"):
        median_ratio([1.0], slowed)
