"""Fuzz what reads files: ``python tests/reliability/fuzz.py --inputs 1000000`` (``tox -e fuzz``).

Guided by coverage where atheris is installed; else the inputs are mutations of those before, drawn at random.
"""

import argparse
import importlib
import importlib.util
import os
import random
import sys
import time

SHARES = {"sparsity": 0.5, "results": 0.25, "log": 0.15, "checkpoint": 0.1}  # of all inputs


def guided(name: str, inputs: int, seed: int) -> None:
    """Fuzz a target with atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["rtrl.report", "rtrl.training.logs", "rtrl._utils", "rtrl.cells.protocol"]
    ):
        targets = importlib.import_module("reliability.fuzz_targets")
    arguments = [sys.argv[0], f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=64", "-print_final_stats=1"]
    atheris.Setup([*arguments, "-rss_limit_mb=4096", "-timeout=20", "-verbosity=0"], targets.TARGETS[name])
    atheris.Fuzz()


def drawn(name: str, inputs: int, seed: int) -> None:
    """Fuzz a target with random inputs."""
    targets = importlib.import_module("reliability.fuzz_targets")
    draws, target, data = random.Random(seed), targets.TARGETS[name], b""
    for _ in range(inputs):
        if not data or draws.random() < 0.3:
            data = draws.randbytes(draws.randrange(64))
        else:
            place = draws.randrange(len(data))
            data = data[:place] + draws.randbytes(1) + data[place + 1 :]
        try:
            target(data)
        except BaseException:
            print(f"{name} fails for {data!r}", flush=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=10**6, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=SHARES, help="this one alone, with all of the inputs")
    parser.add_argument("--drawn", action="store_true", help="without atheris")
    chosen = parser.parse_args()
    if chosen.target is not None:
        with_atheris = not chosen.drawn and importlib.util.find_spec("atheris") is not None
        (guided if with_atheris else drawn)(chosen.target, chosen.inputs, chosen.seed)
        return
    failed = []
    for name, share in SHARES.items():
        inputs, started = round(share * chosen.inputs), time.perf_counter()
        command = [sys.executable, __file__, "--target", name, "--inputs", str(inputs), "--seed", str(chosen.seed)]
        child = os.spawnv(os.P_WAIT, sys.executable, [*command, *(["--drawn"] if chosen.drawn else [])])
        print(f"{name}: {inputs} inputs, exit code {child}, {time.perf_counter() - started:.0f} s", flush=True)
        failed += [name] if child else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
