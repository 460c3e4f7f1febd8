"""The mutation score of the last run, without the mutants that ``equivalent.toml`` lists as no change at all.

Fails below 90 %, where a mutant was not run, and where the list is stale: a listed mutant that no longer exists or that
a test kills after all.
"""

import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import orig_function_and_class_names_from_key

NEEDED = 90.0
MODULES = (
    "_influence/transition",
    "_influence/segment_tree",
    "_influence/store",
    "_engine/linearizer",
    "_engine/autograd",
    "_engine/contract",
    "learners/block_rtrl",
    "learners/carried",
    "_engine/step",
    "_engine/losses",
)
DEAD = ("killed", "timeout")  # a mutant that never ends is noticed, too
Key = tuple[str, str, str]  # function, the lines before, the lines after


def key_of(module: str, name: str) -> Key:
    """What names a mutant for longer than its number does."""
    function, owner = orig_function_and_class_names_from_key(name)
    lines = get_diff_for_mutant(name, path=f"rtrl/{module}.py").splitlines()[2:]
    old, new = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return ".".join(filter(None, (Path(module).name, owner, function))), old, new


def verdicts(module: str) -> dict[str, str]:
    """Mutant → what became of it."""
    data = SourceFileMutationData(path=f"rtrl/{module}.py")
    data.load()
    return {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}


def main() -> int:
    listed = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text())
    reasons: dict[Key, str] = {(f, a, b): kind for kind, own in listed.items() for f, a, b in own["mutants"]}
    seen: defaultdict[Key, set[str]] = defaultdict(set)
    total: Counter[str] = Counter()
    by_reason: Counter[str] = Counter()
    left: list[str] = []
    print(f"{'module':14}{'killed':>9}{'timeout':>9}{'survived':>10}{'not run':>9}{'equivalent':>12}{'score':>9}")
    for module in MODULES:
        count: Counter[str] = Counter()
        for name, verdict in verdicts(module).items():
            key = key_of(module, name)
            if key in reasons:
                assert key is not None
                seen[key].add(verdict)
            if verdict in DEAD:
                count[verdict] += 1
            elif verdict == "not checked":
                count["not run"] += 1
            elif key in reasons:
                count["equivalent"] += 1
                by_reason[reasons[key]] += 1
            else:
                count["survived"] += 1
                left.append(f"{name} ({verdict})\n    - {key[1]}\n    + {key[2]}" if key else name)
        print(row(module, count))
        total += count
    print(row("all", total))
    print(*(f"\nequivalent, {kind}: {n} ({listed[kind]['why']})" for kind, n in by_reason.items()), sep="")
    if "--survivors" in sys.argv:
        print("", *left, sep="\n")
    stale = [key for key in reasons if seen[key] <= set(DEAD)]
    for key in stale:
        print(f"stale: {key} {'is killed' if seen[key] else 'is no mutant'}")
    if not total or total["not run"]:
        print("mutants have not been run: python tests/mutants/run.py run")
        return 1
    return int(bool(stale) or score(total) < NEEDED)


def score(count: Counter[str]) -> float:
    dead = sum(count[verdict] for verdict in DEAD)
    return 100.0 * dead / max(dead + count["survived"], 1)


def row(name: str, count: Counter[str]) -> str:
    own = [count[kind] for kind in ("killed", "timeout", "survived", "not run", "equivalent")]
    return "{:14}{:9}{:9}{:10}{:9}{:12}{:8.1f} %".format(name, *own, score(count))


if __name__ == "__main__":
    sys.exit(main())
