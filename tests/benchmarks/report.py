"""``python tests/benchmarks/report.py results.json -o docs/results/performance.md``: what was measured, into the page.

``results.json`` comes from ``pytest --benchmark-only --benchmark-json=results.json tests/benchmarks``. Given several
files, of one machine and one size, the later ones win. What the page cites is stored beside it as
``performance.json``, which is taken as well: then the page is written anew from it, after a bar was changed, say.

Tables go between the markers ``<!-- measured: name -->`` and ``<!-- end: name -->``; all else on the page is left as it
is. Plots are written beside the page.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bars import BARS, CLAIMS, Bar

Cited = dict[str, Any]
"""What a page cites: ``size``, ``threads``, ``machine``, ``load``, ``date``, ``commit``; ``measured``: bar → value and
test; ``series``: plot → numbers; ``facts``: claim → numbers and words; ``others``: test → numbers that no bar
judges."""


class ReportError(ValueError):
    """The results or the page are not what they should be; the message says what to do."""


def cite(results: Mapping[str, Any]) -> Cited:
    """What a page cites of the results of ``pytest-benchmark``.

    Raises:
        ReportError: these are no results, or those of runs of several sizes.
    """
    if "measured" in results:
        return dict(results)
    if "benchmarks" not in results:
        raise ReportError("no results of pytest-benchmark; make them with pytest --benchmark-json=results.json")
    info, commit = results["machine_info"], results["commit_info"]
    cited: Cited = {
        "machine": {
            "processor": info.get("cpu", {}).get("brand_raw") or info.get("machine", "unknown"),
            "processors": info.get("processors"),
            "memory_bytes": info.get("memory_bytes"),
            "system": f"{info.get('system', '')} {info.get('machine', '')}".strip(),
            "versions": {"Python": info.get("python_version"), **info.get("versions", {})},
        },
        "date": results["datetime"][:10],
        "commit": commit.get("id", "unknown")[:12] + " and changes" * bool(commit.get("dirty")),
        "load": info.get("load_before"),
        "measured": {},
        "series": {},
        "facts": {},
        "others": {},
    }
    ours = [test for test in results["benchmarks"] if "measured" in test["extra_info"]]
    for key in ("size", "threads"):
        found = {test["extra_info"][key] for test in ours}
        if len(found) != 1:
            raise ReportError(f"the results must be of one {key}, these are of {sorted(found) or 'none'}")
        cited[key] = found.pop()
    for test in results["benchmarks"]:
        extra = test["extra_info"]
        if "measured" not in extra:
            numbers = {name: value for name, value in extra.items() if isinstance(value, int | float)}
            if numbers:
                cited["others"][test["fullname"]] = numbers
            continue
        unknown = sorted(extra["measured"].keys() - BARS.keys())
        if unknown:
            raise ReportError(f"{test['fullname']} measured {', '.join(unknown)}, for which there is no bar")
        for name, value in extra["measured"].items():
            cited["measured"][name] = {"value": value, "test": test["fullname"]}
        for series in extra["series"]:
            cited["series"][series["name"]] = {**series, "test": test["fullname"]}
        for claim in {name.split(".")[0] for name in extra["measured"]}:
            cited["facts"].setdefault(claim, {}).update(extra["facts"])
    return cited


def merged(parts: Sequence[Cited]) -> Cited:
    """All of them in one; where several have a number, the last one's counts.

    Raises:
        ReportError: they are of several machines or sizes.
    """
    whole = parts[0]
    for part in parts[1:]:
        for key in ("size", "threads", "machine"):
            if part[key] != whole[key]:
                raise ReportError(f"the results are of another {key}: {part[key]} and {whole[key]}")
        joined = {key: {**whole[key], **part[key]} for key in ("measured", "series", "facts", "others")}
        whole = {**whole, **part, **joined}
    return whole


def number(value: float) -> str:
    """Three digits or so: 0.0123, 1.24, 82.3, 131584, 1.2·10⁹."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{mantissa}·10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def verdict(bar: Bar, value: float | None, size: str) -> str:
    if value is None:
        return "not measured"
    holds = bar.holds(value, size)
    if holds is None:
        return "not judged at this size"
    if bar.control:
        return "breaks it, as it must" if holds else "**does not break it**"
    return "holds" if holds else "**does not hold**"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def bars_table(cited: Cited, claim: str) -> str:
    rows = []
    for name, bar in BARS.items():
        if name.split(".")[0] != claim:
            continue
        value = cited["measured"].get(name, {}).get("value")
        bound = bar.bound(cited["size"])
        rows.append(
            [
                f"control: {bar.text}" if bar.control else bar.text,
                "" if bound is None else f"{bar.relation} {number(bound)}{bar.unit}",
                "" if value is None else f"{number(value)}{bar.unit}",
                verdict(bar, value, cited["size"]),
            ]
        )
    return table(["", "bar", "measured", "verdict"], rows)


def series_table(series: Mapping[str, Any]) -> str:
    rows = [
        [number(at), *(number(values[i]) for values in series["values"].values())] for i, at in enumerate(series["at"])
    ]
    return f"{series['title']}, {series['unit']}:\n\n" + table([series["over"], *series["values"]], rows)


def fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    return value if isinstance(value, str) else number(value)


def section(cited: Cited, claim: str) -> str:
    """The table of a claim, the facts of its run, its curves, and the command that measures it again."""
    parts = [bars_table(cited, claim)]
    facts = cited["facts"].get(claim, {})
    if facts:
        parts.append("; ".join(f"{name} = {fact(value)}" for name, value in facts.items()) + ".")
    tests = {entry["test"] for name, entry in cited["measured"].items() if name.split(".")[0] == claim}
    for series in cited["series"].values():
        if series["test"] in tests:
            parts.append(series_table(series))
            parts.append(f"![{series['title']}, {series['unit']}](performance-{series['name']}.svg)")
    commands = sorted({test.split("[")[0] for test in tests})
    parts.append("\n".join(f"    pytest --benchmark-only --size={cited['size']} {command}" for command in commands))
    return "\n\n".join(parts)


def machine(cited: Cited) -> str:
    info = cited["machine"]
    memory = info["memory_bytes"]
    rows = [
        ["processor", f"{info['processor']}, {info['processors']} of them; threads used: {cited['threads']}"],
        ["memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"],
        ["system", info["system"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)],
        ["load before", "unknown" if cited["load"] is None else f"{number(cited['load'])} (0 is a machine to oneself)"],
        ["measured", f"{cited['date']}, commit {cited['commit']}, size `{cited['size']}`"],
    ]
    return table(["", ""], rows)


def others(cited: Cited) -> str:
    """What the benchmarks without a bar here say of themselves."""
    rows = [
        [f"`{test}`", name.replace("_", " "), number(value)]
        for test, numbers in cited["others"].items()
        for name, value in numbers.items()
    ]
    return table(["test", "", "measured"], rows) if rows else "Nothing else was measured."


def render(page: str, cited: Cited) -> str:
    """The page with everything between its markers written anew.

    Raises:
        ReportError: a marker is missing, or stands there twice.
    """
    texts = {"machine": machine(cited), **{claim: section(cited, claim) for claim in CLAIMS}, "others": others(cited)}
    for name, text in texts.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ReportError(f"the page must have {begin} and {end} once each")
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        page = pattern.sub(lambda _, new=f"{begin}\n\n{text}\n\n{end}": new, page)  # type: ignore[misc]
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json, or a page's performance.json")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/performance.md"), help="the page")
    chosen = parser.parse_args(arguments)
    from plots import draw

    cited = merged([cite(json.loads(path.read_text())) for path in chosen.results])
    chosen.output.write_text(render(chosen.output.read_text(), cited))
    chosen.output.with_suffix(".json").write_text(json.dumps(cited, indent=1, ensure_ascii=False) + "\n")
    for old in chosen.output.parent.glob("performance-*.svg"):
        old.unlink()
    for name, series in cited["series"].items():
        draw(series, chosen.output.parent / f"performance-{name}.svg")


if __name__ == "__main__":
    main()
