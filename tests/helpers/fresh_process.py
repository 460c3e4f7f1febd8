"""Fresh processes that have PyTorch already: one process imports it, and forks itself for every run.

Nothing else is imported before the code runs, so that it shows what the code itself loads. A run costs some
milliseconds where a new interpreter takes more than a second to import PyTorch.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_SERVER = """
import json, os, sys, warnings
import torch
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
for number, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
os.chdir(job["cwd"])
sys.path[1:1] = job["paths"]
sys.argv[1:] = job["arguments"]
if job["strict"]:
    warnings.simplefilter("error")
exec(compile(job["code"], "<fresh process>", "exec"), {"__name__": "__main__"})
"""


@cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(lambda: (server.stdin.close(), server.wait()))
    return server


def run(
    code: str, *arguments: str, cwd: Path | None = None, paths: Sequence[Path] = (), strict: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run code as ``python -c code arguments`` would be.

    Args:
        code: the program; its modules are found in ``cwd`` first.
        arguments: the rest of ``sys.argv``.
        cwd: where it runs.
        paths: where modules are looked for next.
        strict: whether a warning is an error, as with ``-W error``.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        said = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        job = {"code": code, "arguments": arguments, "cwd": str(cwd or os.getcwd()), "strict": strict, **said}
        server.stdin.write(json.dumps({**job, "paths": [str(path) for path in paths]}) + "\n")
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(Path(path).read_text() for path in said.values()))
