"""Bytes alive at once: storages, each counted once, from when it is made until it is gone."""

import torch

from rtrl.profiling.live_bytes import LiveBytes, peak_of


def test_views_and_what_was_there_before_count_nothing() -> None:
    before = torch.ones(100)
    with LiveBytes() as live:
        part = before[10:20]
        before.add_(1.0)
        new = torch.zeros(8, dtype=torch.float64)
        views = [new[:4], new.view(2, 4), *new.split(2)]
        assert live.now == live.peak == 64
        part.mul_(2.0)
        assert live.now == 64
    assert len(views) == 6


def test_what_is_gone_is_not_alive_and_stays_in_the_peak() -> None:
    with LiveBytes() as live:
        first = torch.zeros(10, dtype=torch.float64)
        view = first[:1]
        del first
        assert live.now == 80, "a view keeps its storage"
        del view
        assert live.now == 0
        second = torch.zeros(4, dtype=torch.float64)
        assert (live.now, live.peak) == (32, 80)
    del second


def test_all_results_of_an_operation_count() -> None:
    values = torch.arange(6.0)
    with LiveBytes() as live:
        top = values.topk(2)  # two float32 and two int64
        assert live.now == 2 * 4 + 2 * 8
    del top
    assert peak_of(lambda: values.double() + 1.0) == 2 * 6 * 8
