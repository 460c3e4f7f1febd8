"""How many threads a claim is measured with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread: of small tensors a second one only makes the first one wait, at every barrier, for whoever else is on
    its processor; and it makes times scatter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
