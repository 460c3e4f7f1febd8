"""aⁿbⁿ: strings are what they say they are, and held-out n are in no training."""

import pytest
import torch

from rtrl.errors import ConfigError
from rtrl.tasks.anbn import AnBn
from rtrl.tasks.protocol import TaskStep, TaskStream


def episodes(stream: TaskStream, count: int) -> list[list[TaskStep]]:
    found: list[list[TaskStep]] = []
    while True:
        moment = next(stream)
        if bool(moment.is_first.all()):
            if len(found) == count:
                return found
            found.append([])
        assert bool(moment.is_first.all()) or not bool(moment.is_first.any())
        found[-1].append(moment)


def strings(episode: list[TaskStep]) -> list[tuple[str, int]]:
    """The string of every sample and the class asked of it."""
    found = []
    for b in range(len(episode[0].x)):
        symbols = ["".join(s for s, on in zip("ab", m.x[b].tolist(), strict=True) if on) for m in episode]
        ends = [t for t, m in enumerate(episode) if bool(m.has_target[b])]
        assert len(ends) == 1
        text = "".join(symbols)
        assert ends[0] == len(text) - 1  # the answer is asked at the last symbol
        found.append((text, int(episode[ends[0]].target[b])))
    return found


@pytest.mark.parametrize("held_out", [False, True])
def test_strings_and_answers(held_out: bool) -> None:
    task = AnBn(slack=2)
    seen, accepted, total = set(), 0, 0
    for episode in episodes(task.stream(16, seed=3, held_out=held_out), 60):
        for text, answer in strings(episode):
            n, m = text.count("a"), text.count("b")
            assert text == "a" * n + "b" * m
            assert answer == (n == m) and abs(n - m) <= 2
            seen.add(n)
            accepted, total = accepted + answer, total + 1
    assert seen == set(task.held_out_n if held_out else task.train_n)
    assert abs(accepted / total - task.chance) < 0.1


def test_a_stream_is_taken_up_again_bit_for_bit() -> None:
    task = AnBn()
    first, again = task.stream(3, seed=1), task.stream(3, seed=1)
    for _ in range(17):
        next(first)
    again.load_state_dict(first.state_dict())
    for _ in range(30):
        for one, other in zip(_parts(next(first)), _parts(next(again)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("slack", [1, 3])
def test_chance_is_the_best_answer_to_the_last_symbol(slack: int) -> None:
    task = AnBn(slack=slack)
    # A string without b, of one of two signs and in half of the strings, is rejected with certainty.
    ends_in_a = [sum(least >= n for least in range(1, slack + 1)) / slack / 4 for n in task.train_n]
    assert task.chance == pytest.approx(0.5 + sum(ends_in_a) / len(ends_in_a))
    known = [text for episode in episodes(task.stream(32, seed=4), 40) for text in strings(episode)]
    measured = sum((answer == 1) == text.endswith("b") for text, answer in known) / len(known)
    assert measured == pytest.approx(task.chance, abs=0.04)


def test_seeds_and_parts_differ() -> None:
    task = AnBn()

    def start(**changes: object) -> list[list[float]]:
        stream = task.stream(8, **{"seed": 0, **changes})  # type: ignore[arg-type]
        return [next(stream).x.flatten().tolist() for _ in range(40)]

    assert start() == start()
    assert start() != start(seed=1)
    assert start() != start(held_out=True)


def test_the_first_strings_are_these_on_every_machine() -> None:
    texts = [text for episode in episodes(AnBn().stream(2, seed=0), 3) for text, _ in strings(episode)]
    assert texts == FIRST


def test_loss_and_score_count_the_samples_asked() -> None:
    task = AnBn()
    y = torch.tensor([[0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    moment = TaskStep(
        torch.zeros(3, 2), torch.tensor([1, 0, 1]), torch.tensor([True, True, False]), torch.zeros(3).bool()
    )
    assert task.score(y, moment) == (1.0, 2)
    right, wrong = (-torch.log_softmax(torch.tensor([0.0, 2.0]), 0)).flip(0)
    assert task.loss(y, moment) is not None
    torch.testing.assert_close(task.loss(y, moment), (right + wrong) / 3)
    nobody = TaskStep(moment.x, moment.target, torch.zeros(3).bool(), moment.is_first)
    assert task.loss(y, nobody) is None and task.score(y, nobody) == (0.0, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train_n": [3, 4], "held_out_n": [4]}, "both"),
        ({"train_n": []}, "train_n"),
        ({"held_out_n": [0]}, "held_out_n"),
        ({"slack": 0}, "slack"),
    ],
)
def test_bad_arguments(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AnBn(**wrong)  # type: ignore[arg-type]


def test_bad_streams_and_states() -> None:
    stream = AnBn().stream(2)
    with pytest.raises(ConfigError, match="batch_size"):
        AnBn().stream(0)
    with pytest.raises(ConfigError, match="seed"):
        AnBn().stream(1, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="slack=2"):
        stream.load_state_dict(AnBn(slack=2).stream(2).state_dict())
    with pytest.raises(ConfigError, match="missing"):
        stream.load_state_dict({"round": 1})


def _parts(moment: TaskStep) -> list[torch.Tensor]:
    return [moment.x, moment.target, moment.has_target, moment.is_first]


FIRST = ["aaabbb", "aaaabbbb", "aabb", "aaaabb", "aabb", "aabbbb"]
