"""Memory was claimed to differ by 0.5 % between T = 100, 500 and 1000; here it must not differ at all, up to 10⁶
steps.

**How it is measured.** A small mixture (3 slots of 4, 4 experts, top-2, float32) runs through a stream with a loss at
every step, in a process that does nothing else, its gradients delivered every eight blocks. Every expert and slot is
laid down once at the beginning. At T = 100, 500, 1000 and 5000 (10⁴, 10⁵ and 10⁶ in the full form), right after a
delivery, two numbers are taken: the bytes the learner holds (``retained_bytes``: influence, tree, open block,
gradients, state; a test holds that count against the tensors alive), and the resident memory of the process. Bytes
must be the same to the last one; the process may not grow by more than 1 % from T = 1000 on.

**Why that is fair.** What is held is counted with the influence and the tree, experts sleep and wake all the time,
and the process would show what the count forgets. A control, a list that keeps every state, would grow by 48 bytes a
step and a Python object each.

**What it leaves open.** Before every slice has been active once, the learner holds less, so a stream that wakes an
expert late sees one step upward then; a learner on a GPU is in *gpu*.
"""

from dataclasses import dataclass

from rtrl._utils.formatting import show_bytes
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.long_run import in_a_fresh_process
from rtrl.verification.harness.problems import Mixture

RSS = 0.01
"""The share by which the process may grow."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model, the moments at which bytes are taken, and the learner's sizes."""

    mixture: Mixture = Mixture("small", 2, 2, 4, 3, 4)  # noqa: RUF009
    moments: tuple[int, ...] = (100, 500, 1000, 5000)
    block: int = 20
    window: int = 8


QUICK = Sizes()
FULL = Sizes(moments=(100, 500, 1000, 10_000, 100_000, 1_000_000))


def judge(held: list[int | None], rss: list[int | None]) -> tuple[Verdict, str, float, list[str]]:
    """The verdict, its condition, the growth of the process, and what fails.

    Args:
        held, rss: bytes at each moment; the process is judged from the third on, when it has warmed up.
    """
    failures = []
    if len(set(held)) != 1:
        failures.append(f"the bytes held change with T: {held}")
    settled = [value for value in rss[2:] if value]
    growth = max(settled) / settled[0] - 1 if len(settled) > 1 else float("nan")
    if growth >= RSS:
        failures.append(f"the process grows by {growth:.1%}")
    if failures:
        return "does not hold", "; ".join(failures), growth, failures
    if growth != growth:
        return "holds when", "the bytes held are what is meant: this system does not tell the process's", growth, []
    return "holds", "", growth, []


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """Bytes over T; ``sizes`` to run less."""
    sizes = sizes or (FULL if settings.full else QUICK)
    progress(f"{max(sizes.moments)} steps", 0, 1)
    found = in_a_fresh_process(sizes.mixture, sizes.moments, sizes.block, sizes.window, settings.seed)
    held, rss = found["held_bytes"], found["rss_bytes"]
    verdict, condition, growth, failures = judge(held, rss)
    numbers = [value for value in held if value is not None]
    at = [float(t) for t in sizes.moments]
    return Finding(
        f"{show_bytes(numbers[-1])} held at every T up to {max(sizes.moments):,}, difference "
        f"{max(numbers) - min(numbers)} bytes; process {growth:+.2%}",
        f"difference 0 bytes; process < {RSS:.0%}",
        verdict,
        condition,
        failures,
        [
            Table(
                "Bytes after T steps",
                ["T", "held", "process"],
                [[t, h, r] for t, h, r in zip(sizes.moments, held, rss, strict=True)],
            )
        ],
        [
            Plot(
                "Bytes held and bytes of the process over T",
                "T, steps",
                "bytes",
                [Series("held by the learner", at, [float(v) for v in numbers])]
                + ([Series("the process", at, [float(v or 0) for v in rss])] if all(rss) else []),
                log_x=True,
                log_y=True,
            )
        ],
        {"held_bytes": held, "rss_bytes": rss, "growth": growth, "moments": list(sizes.moments)},
    )


CLAIM = Claim("memory-constant", "memory at T = 100, 500, 1000 differs by 0.5 %", measure)
