"""Tasks to learn: endless streams of steps for a batch of samples, with a loss and a score."""

from rtrl._utils.renamed_names import renamed_names
from rtrl.tasks.adding import Adding
from rtrl.tasks.anbn import AnBn
from rtrl.tasks.byte_model import ByteModel
from rtrl.tasks.bytes import ByteStream
from rtrl.tasks.copy import Copy
from rtrl.tasks.digits import Digits
from rtrl.tasks.haystack import Haystack
from rtrl.tasks.protocol import Task, TaskStep, TaskStream
from rtrl.tasks.registry import TASKS, make
from rtrl.tasks.tmaze import TMaze

__all__ = [
    "TASKS",
    "Adding",
    "AnBn",
    "ByteModel",
    "ByteStream",
    "Copy",
    "Digits",
    "Haystack",
    "TMaze",
    "Task",
    "TaskStep",
    "TaskStream",
    "make",
]

__getattr__ = renamed_names(__name__, {"Moment": "TaskStep", "Stream": "TaskStream"})
