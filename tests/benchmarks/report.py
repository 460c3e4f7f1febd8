"""Make a record for ``rtrl report`` of the results of pytest-benchmark.

``python tests/benchmarks/report.py results.json -o docs/results/performance.json``

``results.json`` comes from ``pytest --benchmark-only --benchmark-json=results.json tests/benchmarks``. Records that
were written here are taken as well. Of several files, of one machine and one size, the later ones win.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bars import BARS, CLAIMS

from rtrl.errors import ConfigError
from rtrl.report import ClaimResult, Plot, Record, Series, Table, Verdict, load_record, to_json
from rtrl.report.tables import numbers

Fact = str | float | list[float]


def claim_result(
    claim: str,
    size: str,
    plots: Sequence[Plot] = (),
    *,
    measured: Mapping[str, float | None],
    facts: Mapping[str, Fact],
    tests: Sequence[str],
) -> ClaimResult:
    """Hold what was measured of a claim to its bars.

    Args:
        claim: the name of the claim. size: of the run.
        plots: its curves. measured: name of a bar → number, None where it was not finite.
        facts: what else one must know of the run. tests: the tests that measured it.
    """
    bars = {name: bar for name, bar in BARS.items() if name.split(".")[0] == claim}
    states = {name: bar.reached(measured[name], size) for name, bar in bars.items() if name in measured}
    missed = [name for name, reached in states.items() if reached is False]
    judged = sum(reached is not None for reached in states.values())
    verdict: Verdict = "not measured" if not judged else "does not hold" if missed else "holds"
    conditions = {
        "not measured": f"nothing of this claim was judged at size {size}",
        "does not hold": "; ".join(
            f"{bars[name].shown(measured[name])} {bars[name].text}, where {bars[name].asked(size)} is asked"
            for name in missed
        ),
        "holds": f"{len(bars) - judged} of {len(bars)} bars were not judged" if judged < len(bars) else "",
    }
    rows = [
        [bar.words, bar.asked(size), bar.shown(measured[name]), bar.verdict(states[name])]
        if name in measured
        else [bar.words, bar.asked(size), "", "not measured"]
        for name, bar in bars.items()
    ]
    known = [[name, ", ".join(map(str, fact)) if isinstance(fact, list) else fact] for name, fact in facts.items()]
    commands = sorted({f"- ``pytest --benchmark-only --size={size} {test.split('[')[0]}``" for test in tests})
    return ClaimResult(
        id=claim,
        claimed=CLAIMS[claim],
        result=f"{judged - len(missed)} of {judged} bars reached" if judged else "",
        threshold="every bar",
        verdict=verdict,
        condition=conditions[verdict],
        tables=[
            Table("Bars", ["measurement", "bar", "measured", "verdict"], rows),
            *([Table("The run", ["quantity", "value"], known)] if known else []),
            *(replace(numbers(plot)[0], title=f"{plot.title}, {plot.y_label}") for plot in plots),
        ],
        plots=list(plots),
        data={"measured": dict(measured), "facts": dict(facts), "tests": list(tests)},
        explanation="\n".join(["Measured by", "", *commands]) if commands else "",
    )


def read(results: Mapping[str, Any]) -> Record:
    """The record of what pytest-benchmark wrote.

    Raises:
        ConfigError: these are no results, or those of runs of several sizes.
    """
    if "benchmarks" not in results:
        raise ConfigError("no results of pytest-benchmark; make them with pytest --benchmark-json=results.json")
    tests = {test["fullname"]: test["extra_info"] for test in results["benchmarks"] if "measured" in test["extra_info"]}
    run = {key: {extra[key] for extra in tests.values()} for key in ("size", "threads")}
    for key, found in run.items():
        if len(found) != 1:
            raise ConfigError(f"the results must be of one {key}, these are of {sorted(found) or 'none'}")
    (size,), (threads,) = run["size"], run["threads"]
    parts: dict[str, list[ClaimResult]] = {claim: [] for claim in CLAIMS}
    for name, extra in tests.items():
        unknown = sorted(extra["measured"].keys() - BARS.keys())
        if unknown:
            raise ConfigError(f"{name} measured {', '.join(unknown)}, which has no bar in bars.py")
        plots = [Plot(**{**plot, "series": [Series(**line) for line in plot["series"]]}) for plot in extra["plots"]]
        for claim in {bar.split(".")[0] for bar in extra["measured"]}:
            measured = {bar: value for bar, value in extra["measured"].items() if bar.split(".")[0] == claim}
            parts[claim].append(claim_result(claim, size, plots, measured=measured, facts=extra["facts"], tests=[name]))
    info, commit = results["machine_info"], results["commit_info"]
    return Record(
        created=results["datetime"][:10],
        command=f"pytest --benchmark-only --size={size} tests/benchmarks",
        mode=size,
        seed=0,
        machine={
            "cpu": info.get("cpu", {}).get("brand_raw") or info.get("machine", "unknown"),
            "cores": info.get("processors"),
            "threads": threads,
            "memory_bytes": info.get("memory_bytes"),
            "os": f"{info.get('system', '')} {info.get('machine', '')}".strip(),
            "load_before": info.get("load_before"),
        },
        versions={
            "python": info.get("python_version"),
            **info.get("versions", {}),
            "commit": commit.get("id", "unknown")[:12] + " and changes" * bool(commit.get("dirty")),
        },
        duration_s=None,
        claims=[joined(claim, size, found) for claim, found in parts.items()],
    )


def joined(claim: str, size: str, parts: Sequence[ClaimResult]) -> ClaimResult:
    """One result of several of a claim; where two have a number or a curve, the later one's counts."""
    found: dict[str, dict[str, Any]] = {"measured": {}, "facts": {}, "tests": {}}
    plots: dict[tuple[str, str], Plot] = {}
    for part in parts:
        for key in ("measured", "facts"):
            found[key].update(part.data[key])
        found["tests"].update(dict.fromkeys(part.data["tests"]))
        plots.update({(plot.title, plot.y_label): plot for plot in part.plots})
    return claim_result(
        claim,
        size,
        list(plots.values()),
        measured=found["measured"],
        facts=found["facts"],
        tests=list(found["tests"]),
    )


def merged(records: Sequence[Record]) -> Record:
    """All records in one; where several have a number, the last one's counts.

    Raises:
        ConfigError: they are of several kinds of machine (memory counts in GiB), or sizes.
    """

    def run(record: Record) -> dict[str, Any]:
        machine = {name: value for name, value in record.machine.items() if name != "load_before"}
        machine["memory_bytes"] = round(machine["memory_bytes"] / 2**30)
        return {"size": record.mode, "machine": machine}

    for record in records[1:]:
        for key, value in run(record).items():
            if value != run(records[0])[key]:
                raise ConfigError(f"the results are of another {key}: {value} and {run(records[0])[key]}")
    claims = [
        joined(name, records[-1].mode, [claim for record in records for claim in record.claims if claim.id == name])
        for name in CLAIMS
    ]
    return replace(records[-1], claims=claims)


def load(path: Path) -> Record:
    """A record from either kind of file."""
    content = json.loads(path.read_text())
    return load_record(path) if "claims" in content else read(content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results of pytest-benchmark, or records written here")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the record to write")
    chosen = parser.parse_args(arguments)
    chosen.output.write_text(to_json(merged([load(path) for path in chosen.results])), encoding="utf-8")


if __name__ == "__main__":
    main()
