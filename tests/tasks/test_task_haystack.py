"""The haystack: the answer is the symbol after the key, and held-out noise is in no training."""

import pytest
import torch

from rtrl.errors import ConfigError
from rtrl.tasks.haystack import Haystack
from rtrl.tasks.protocol import TaskStream


def episodes(task: Haystack, stream: TaskStream, count: int) -> list[tuple[list[int], int]]:
    """(symbols, answer) of every sample of n rounds."""
    found = []
    moment = next(stream)
    for _ in range(count):
        rows = [moment]
        while not bool((moment := next(stream)).is_first.all()):
            rows.append(moment)
        symbols = torch.stack([m.x for m in rows])
        assert torch.equal(symbols.sum(dim=2), torch.ones(symbols.shape[:2]))
        asked = torch.stack([m.has_target for m in rows])
        assert bool(asked[-1].all()) and int(asked.sum()) == asked.shape[1]  # once, at the last step
        found.extend((row, int(k)) for row, k in zip(symbols.argmax(dim=2).T.tolist(), rows[-1].target, strict=True))
    return found


@pytest.mark.parametrize("task", [Haystack(), Haystack(4, gap=20), Haystack(3, (6, 6))], ids=repr)
@pytest.mark.parametrize("held_out", [False, True])
def test_episodes(task: Haystack, held_out: bool) -> None:
    v = task.values
    bos, key, sep, question = range(v, v + 4)
    lengths, places, answers = set(), set(), []
    for symbols, answer in episodes(task, task.stream(8, seed=2, held_out=held_out), 60):
        at = symbols.index(key)
        assert symbols[0] == bos and symbols[-1] == question and symbols[at + 2] == sep
        assert symbols[at + 1] == answer
        noise = symbols[1:at] + symbols[at + 3 : -1]
        assert all(s < v for s in noise)
        assert len(symbols) - 1 - (at + 2) - 1 >= task.gap
        assert (sum(noise) % v == 0) == held_out
        lengths.add(len(symbols))
        places.add(at)
        answers.append(answer)
    assert lengths == set(range(task.lengths[0], task.lengths[1] + 1))
    assert places == set(range(1, task.lengths[1] - task.gap - 3))
    most = max(answers.count(k) for k in range(v)) / len(answers)
    assert most < task.chance + 0.08  # no answer is better than chance


def test_noise_says_nothing_about_the_answer() -> None:
    task = Haystack(3, (6, 6))  # one noise symbol: of all (noise, k) with noise ≠ 0 each is as likely
    pairs = [(s[-2] if s[-2] < 3 else s[1], k) for s, k in episodes(task, task.stream(64, seed=5), 40)]
    pairs = [p for p in pairs if p[0] < 3]
    counts = [pairs.count((noise, k)) / len(pairs) for noise in (1, 2) for k in range(3)]
    assert sum(counts) == pytest.approx(1)
    assert all(abs(c - 1 / 6) < 0.03 for c in counts)


def test_a_stream_is_taken_up_again_bit_for_bit() -> None:
    task = Haystack(gap=3)
    first, again = task.stream(3, seed=1), task.stream(3, seed=1)
    for _ in range(23):
        next(first)
    again.load_state_dict(first.state_dict())
    for _ in range(30):
        one, other = next(first), next(again)
        assert torch.equal(one.x, other.x) and torch.equal(one.target, other.target)
        assert torch.equal(one.has_target, other.has_target) and torch.equal(one.is_first, other.is_first)


def test_the_first_episodes_are_these_on_every_machine() -> None:
    task = Haystack(4, (8, 9))
    assert episodes(task, task.stream(2, seed=0), 2) == FIRST


@pytest.mark.parametrize("wrong", [{"values": 1}, {"gap": -1}, {"lengths": (5, 8)}, {"lengths": (9, 8)}])
def test_bad_arguments(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Haystack(**wrong)  # type: ignore[arg-type]


def test_dtype_and_levels() -> None:
    task = Haystack(8)
    assert (task.d_in, task.d_out, task.chance, task.measure) == (12, 8, 0.125, "accuracy")
    assert next(task.stream(2, dtype=torch.float64)).x.dtype == torch.float64


FIRST = [
    ([4, 3, 0, 3, 5, 2, 6, 3, 7], 2),
    ([4, 3, 5, 2, 6, 2, 3, 3, 7], 2),
    ([4, 0, 1, 2, 5, 3, 6, 0, 7], 3),
    ([4, 3, 5, 0, 6, 1, 1, 0, 7], 0),
]
