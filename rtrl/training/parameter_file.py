"""The parameters of a cell alone, in a file of safetensors, for other programs and other runs."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtrl._utils.formatting import first_line
from rtrl._utils.whole_files import LockedFile, reason
from rtrl.errors import ConfigError, FileError
from rtrl.training.saved_trainer import check_cell_values


def save_parameters(cell: nn.Module, path: Path) -> None:
    """Write the parameters and buffers of a cell to a file of safetensors, which is replaced as a whole.

    Args:
        cell: the cell.
        path: the file; a symbolic link is followed. The file that is there is kept as ``NAME.previous``.

    Raises:
        ConfigError: the package safetensors is not installed, or has no such dtype.
        FileError: the file cannot be written. It is as it was.
    """
    library = _library()
    values = {name: value.detach().cpu().contiguous().clone() for name, value in cell.state_dict().items()}
    try:
        data = library.save(values)
    except Exception as error:
        raise ConfigError(f"the cell cannot be written as safetensors: {first_line(error)}") from error
    with LockedFile(Path(path)) as file:
        file.write(lambda opened: opened.write(data))


def load_parameters(cell: nn.Module, path: Path) -> None:
    """Read the parameters and buffers of a cell from a file of safetensors. The file runs no code.

    Args:
        cell: a cell with parameters of the names, shapes and dtypes that the file has.
        path: the file.

    Raises:
        ConfigError: the package safetensors is not installed, or the file has other parameters. Nothing has changed.
        FileError: the file cannot be read, or is not of this kind.
    """
    library = _library()
    try:
        values = library.load(Path(path).read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # what a damaged file raises depends on the damage
        raise FileError(f"{path} is damaged, or not a file of safetensors: {first_line(error)}") from error
    check_cell_values(values, cell)
    with torch.no_grad():
        cell.load_state_dict(values)


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            f"files of parameters need the package safetensors ({error}); pip install 'rtrl[safetensors]'"
        ) from error
    return safetensors.torch
