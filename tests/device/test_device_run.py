"""The script for a device, tried on the CPU: it runs, and says what it could not measure."""

from pathlib import Path

import pytest
import torch
from device.run import PARTS, main

from rtrl.report import load_record


def test_it_measures_all_parts(tmp_path: Path) -> None:
    code = main(["--device", "cpu", "--size", "small", "-o", str(tmp_path / "device.json")])
    record = load_record(tmp_path / "device.json")
    assert [claim.id for claim in record.claims] == list(PARTS)
    assert record.device == "cpu"
    tests, exactness, memory, speed = record.claims
    assert (tests.verdict, exactness.verdict, speed.verdict) == ("not measured", "holds", "holds when")
    assert (code, memory.verdict) == (0, "holds")
    assert all(isinstance(number, float) for row in speed.tables[0].rows for number in row[1:4])
    assert len(memory.tables[0].rows) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_measured(tmp_path: Path) -> None:
    assert main(["-o", str(tmp_path / "device.json")]) == 0
    record = load_record(tmp_path / "device.json")
    assert {(claim.verdict, claim.condition) for claim in record.claims} == {("not measured", "no device")}


def test_a_wrong_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from device import run

    monkeypatch.setattr(run.oracles, "bptt", lambda cell, *_: {n: p.detach() + 1 for n, p in cell.named_parameters()})
    found = run.exactness(run.Run("cpu", run.SIZES["small"], 60.0))
    assert found.verdict == "does not hold"
