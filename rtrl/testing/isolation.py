"""Leaving the caller's process as it is."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Keep the process as it is, its random states, its default dtype and its warnings, whatever a cell or a learner
    does. Inside, one thread: on tensors this small a second one only waits."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (a cell may draw from the old one)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        torch.set_num_threads(1)
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of probing: a number taken of a tensor with a gradient, for example
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
