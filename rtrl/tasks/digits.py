"""Handwritten digits, read row by row or pixel by pixel."""

from typing import Any

import torch
from torch import Tensor

from rtrl._utils import validation
from rtrl.errors import ConfigError
from rtrl.tasks._episodes import Episode, EpisodeTask, draw_integers

_EVERY = 5  # each fifth image is held out


class Digits(EpisodeTask):
    """Read an image of a handwritten digit from top to bottom, and answer after it which digit it is.

    The images are the 1797 of 8 × 8 pixels that scikit-learn ships (``sklearn.datasets.load_digits``). By rows, x is a
    row of 8 pixels in 0 … 1 and an episode has 9 steps; by pixels, x is one pixel and an episode has 65. The target is
    at the last step, whose x = 0: an answer that ignores the past knows nothing about the image. Images are drawn with
    replacement, one for each sample, and do not depend on the batch size.

    Every fifth image is held out. Other images by its writer are used in training.

    Args:
        by: "row" or "pixel".

    Attributes:
        chance: the share of the most frequent digit among the training images, about 0.1.
        solved: 0.9.

    Raises:
        ConfigError: ``by`` is neither, or scikit-learn is not installed.

    Source:
        E. Alpaydin and C. Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository;
        pixel by pixel as in Le, Jaitly and Hinton (2015), "A Simple Way to Initialize Recurrent Networks of Rectified
        Linear Units", section 4.2.

    Example:
        >>> next(Digits(by="row").stream(batch_size=4)).x.shape
        torch.Size([4, 8])
    """

    name = "digits"
    d_out, solved = 10, 0.9

    def __init__(self, by: str = "row") -> None:
        self.by = validation.choice("by", by, ("row", "pixel"))
        images, labels = _load()
        self.d_in = 8 if by == "row" else 1
        held_out = torch.arange(len(labels)) % _EVERY == _EVERY - 1
        frames = images.reshape(len(images), -1, self.d_in)
        self._parts = {part: (frames[held_out == part], labels[held_out == part]) for part in (False, True)}
        shares = self._parts[False][1].bincount().double() / len(self._parts[False][1])
        self.chance = float(shares.max())

    def draw(self, batch_size: int, held_out: bool, generator: torch.Generator) -> Episode:
        frames, labels = self._parts[held_out]
        chosen = draw_integers(0, len(labels) - 1, (batch_size,), generator)
        shown = frames[chosen].transpose(0, 1)
        x = torch.cat([shown, torch.zeros_like(shown[:1])])
        has_target = torch.zeros(len(x), batch_size, dtype=torch.bool)
        has_target[-1] = True
        return Episode(x, labels[chosen].expand(len(x), -1), has_target)

    def __repr__(self) -> str:
        return f"Digits(by={self.by!r})"


def _load() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in 0 … 1, sixteenths, and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the task 'digits' reads its images from scikit-learn, which cannot be imported "
            f"({error}); pip install 'rtrl[tasks]'"
        ) from error
    data: Any = load_digits()
    with torch.device("cpu"):
        return torch.tensor(data.data, dtype=torch.float64) / 16, torch.tensor(data.target, dtype=torch.int64)
