"""Cells with independent rows: exact gradients at the price of a forward and a backward pass.

The cells are plain modules that declare nothing, beside those of ``rtrl.cells``, which declare their rows. The control
is the same learner with ``structure="off"``.
"""

from itertools import product
from typing import Any

from agreement import assert_roughly_equal, check_agreement
from counting import exponent, macs
from measuring import Measurement, curve, one_thread
from problems import DECLARED, ROWS, Problem, layers, plain
from rivals import Ours, Unrolled

from rtrl.profiling.timing import alternate, median_ratio, medians

WIDTH = {kind: 2 if kind.endswith(("LRU", "RTU")) else 1 for kind in (*ROWS, *DECLARED)}


def held(side: Ours) -> int:
    """Bytes held with a full block open."""
    for _ in range(side.learner.block):
        side.learner.backward(side.problem.loss(side.t, side.learner.step(side.problem.x(side.t))))
        side.t += 1
    found = sum(side.learner.retained_bytes().values())
    side.learner.sync()
    return found


def allowed(problem: Problem, width: int, block: int) -> int:
    """Three numbers for each element of a parameter and of its row, and 20 for each step of the block and unit."""
    return 4 * (3 * problem.parameters * width + 20 * block * problem.hidden // width)


def warm(problem: Problem, block: int, **options: Any) -> Ours:
    """After the first block: with the structure that it is to have, or with none."""
    side = Ours(problem, block=block, **options)
    side.advance(block)
    assert (side.learner.structure is None) == ("structure" in options)
    return side


def test_counts_of_independent_rows(measurement: Measurement, benchmark: Any) -> None:
    size, inputs, block = measurement.sizes.rows
    work: dict[str, list[float]] = {"ours": [], "off": []}
    bytes_held: dict[str, list[float]] = {"ours": [], "off": []}
    for kind in (*ROWS, *DECLARED):
        if kind in ROWS:  # tests/cells holds the others to the oracle
            check_agreement(kind)
        problem = plain(kind, size, inputs)
        eager = Unrolled(problem, block)
        limit = allowed(problem, WIDTH[kind], block)
        base = macs(eager, block)
        sides = {"ours": warm(problem, block)}
        if kind in ROWS:
            sides["off"] = warm(problem, block, structure="off")
        for name, side in sides.items():
            work[name].append(macs(side, block) / base)
            bytes_held[name].append(held(side) / limit)
    measured = {
        "rows.macs": max(work["ours"]),
        "rows.macs.control": min(work["off"]),
        "rows.bytes": max(bytes_held["ours"]),
        "rows.bytes.control": min(bytes_held["off"]),
    }
    benchmark.pedantic(sides["ours"].advance, args=(block,), rounds=3)
    measurement.settle(measured, H=size, inputs=inputs, block=block)


def test_growth_of_independent_rows(measurement: Measurement, benchmark: Any) -> None:
    """Over H with inputs = H: P grows with H², and what is done and held with P."""
    sizes, block = measurement.sizes.rows_growth, 16
    found: dict[str, list[float]] = {"rows.growth": [], "rows.growth.bytes": []}
    off: dict[str, list[float]] = {name: [] for name in found}
    curves: dict[str, list[float]] = {}
    for kind in ROWS:
        check_agreement(kind)
        problems = [plain(kind, size) for size in sizes]
        parameters = [problem.parameters for problem in problems]
        for fits, options in ((found, {}), (off, {"structure": "off"})):
            sides = [warm(problem, block, **options) for problem in problems]
            counts = [macs(side, block) for side in sides]
            fits["rows.growth"].append(exponent(parameters, counts))
            fits["rows.growth.bytes"].append(exponent(parameters, [float(held(side)) for side in sides]))
            curves[f"{kind}, {'not looked for' if options else 'found'}"] = counts
    measured = {name: max(values) for name, values in found.items()}
    measured |= {f"{name}.control": min(values) for name, values in off.items()}
    benchmark.pedantic(sides[0].advance, args=(block,), rounds=3)
    measurement.settle(measured, curve("cells with independent rows", "H", sizes, "multiply-adds per step", curves))


def test_two_independent_layers(measurement: Measurement, benchmark: Any) -> None:
    """The lower layer's influence on the upper one is the only part that is not kept row by row."""
    hidden, inputs, block = measurement.sizes.rows_layers
    found = {}
    for name, kind in (("rows.layers", "minGRU + minGRU"), ("rows.layers.control", "feedback")):
        check_agreement(kind)
        problem = layers(kind, hidden, inputs)
        ours = Ours(problem, block=block)
        ours.advance(block)
        off = warm(problem, block, structure="off")
        assert_roughly_equal(ours.gradients(), off.gradients())
        found[name] = held(ours) / held(off)
    benchmark.pedantic(ours.advance, args=(block,), rounds=3)
    measurement.settle(found, layers=f"2 of {hidden}")


def test_times_of_independent_rows(measurement: Measurement, benchmark: Any) -> None:
    measured: dict[str, float] = {}
    bytes_held: list[float] = []
    facts: dict[str, str | float] = {}
    for kind in ROWS:
        check_agreement(kind)
        if not measurement.clock:
            continue
        ratios = []
        for hidden, wide, block in product((128, 512), (False, True), (32, 64)):
            problem = plain(kind, hidden, hidden if wide else 32)
            ours, eager = warm(problem, block), Unrolled(problem, block)
            eager.advance(block)
            assert_roughly_equal(ours.gradients(), eager.gradients())
            with one_thread():
                times = alternate(
                    {"ours": lambda s=ours, n=block: s.advance(n), "eager": lambda s=eager, n=block: s.advance(n)},
                    measurement.sizes.rounds,
                )
            bytes_held.append(held(ours) / allowed(problem, WIDTH[kind], block))
            ratios.append(median_ratio(times["ours"], times["eager"]))
            each = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in medians(times).items())
            facts[f"ms per step, {kind}, H = {hidden}, inputs = {hidden if wide else 32}, block = {block}"] = each
        measured[f"rows.time.{kind}"] = max(ratios)
        measured["rows.bytes.large"] = max(bytes_held)
    ours = warm(plain("minGRU", 16), 16)
    benchmark.pedantic(ours.advance, args=(16,), rounds=3)
    measurement.settle(measured, threads_of_these_times=1, **facts)


def test_independent_rows_against_the_switch_off(measurement: Measurement, benchmark: Any) -> None:
    """The dense engine on the same cells, H = 512: seconds for a block."""
    faster, smaller = [], []
    facts: dict[str, str | float] = {}
    for kind in ROWS if measurement.clock else ():
        check_agreement(kind)
        problem = plain(kind, 512, 32)
        with one_thread():
            ours, off = warm(problem, 32), Ours(problem, block=32, structure="off")
            times = alternate({"ours": lambda s=ours: s.advance(32), "off": lambda s=off: s.advance(32)}, 2)
        faster.append(median_ratio(times["off"], times["ours"]))
        bytes_held = held(ours), held(off)
        smaller.append(bytes_held[1] / bytes_held[0])
        facts[f"{kind}, off"] = f"{1e3 * medians(times)['off']:.3g} ms per step, {bytes_held[1] / 1e6:.3g} MB"
        facts[f"{kind}, found"] = f"{1e3 * medians(times)['ours']:.3g} ms per step, {bytes_held[0] / 1e6:.3g} MB"
    measured = {"rows.off.time": min(faster), "rows.off.bytes": min(smaller)} if faster else {}
    ours = warm(plain("minGRU", 16), 16)
    benchmark.pedantic(ours.advance, args=(16,), rounds=3)
    measurement.settle(measured, threads_of_these_times=1, **facts)
