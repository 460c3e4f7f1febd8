"""The list of the checks of a learner, and how one is run."""

from rtrl._utils.formatting import first_line
from rtrl.testing.learner_checks import (
    behaviour,
    call_order,
    gradients,
    mixture,
)  # importing them registers their checks
from rtrl.testing.learner_checks.driver import LearnerFailed, calls_of
from rtrl.testing.learner_checks.registry import CHECKS, NotJudged, Subject
from rtrl.testing.report import Failure
from rtrl.testing.spec import LearnerSpec

_MODULES = [module.__name__ for module in (gradients, call_order, mixture, behaviour)]


def learner_checks() -> list[str]:
    """List the names of all checks of a learner, in the order in which they run.

    Example:
        >>> learner_checks()[:3]
        ['interface', 'dense cell', 'unusual parameters']
    """
    return sorted(CHECKS, key=lambda name: (name != "interface", _MODULES.index(CHECKS[name].__module__)))


def run_check(name: str, spec: LearnerSpec, seed: int) -> list[Failure]:
    """Run the check of this ``name`` on a ``spec`` with a ``seed``, and return one failure of each kind.

    Raises:
        NotJudged: it does not apply.
    """
    failures: dict[str, Failure] = {}
    try:
        for found in CHECKS[name](Subject(spec, seed)):
            failures.setdefault(found.message, Failure(name, *found))
    except LearnerFailed as failed:
        failures.setdefault(str(failed), Failure(name, str(failed), failed.step, traceback=failed.traceback))
    except NotJudged:
        raise
    except Exception as error:  # of the learner, its cell, its mask or its loss; the other checks still run
        failures.setdefault("", Failure(name, f"it raised {first_line(error)}", traceback=calls_of(error)))
    return list(failures.values())
