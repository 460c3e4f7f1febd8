"""Keep the global state of the caller's process."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_global_state(seed: int) -> Iterator[None]:
    """Restore random states, default dtype, number of threads and warning filters after a cell or a
    learner has run. Inside, PyTorch uses one thread: on tensors this small a second one only waits."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (a cell may draw from the legacy generator)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        torch.set_num_threads(1)
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # such as one for a number taken from a tensor with a gradient
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
