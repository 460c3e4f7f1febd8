"""Train any cell on any task with any learner, and go on later exactly where it was left."""

from rtrl.training.cell_factory import CELLS, load_cell, make_cell
from rtrl.training.curve import Curve, Progress, Row
from rtrl.training.evaluation import evaluate
from rtrl.training.learner_factory import LEARNERS, make_learner
from rtrl.training.parameter_file import load_parameters, save_parameters
from rtrl.training.trainer import Trainer
from rtrl.training.whole_run import train

__all__ = [
    "CELLS",
    "LEARNERS",
    "Curve",
    "Progress",
    "Row",
    "Trainer",
    "evaluate",
    "load_cell",
    "load_parameters",
    "make_cell",
    "make_learner",
    "save_parameters",
    "train",
]
