"""What a learner promises, one check each."""

from rtrl.testing.learner_checks.listing import learner_checks, run_check

__all__ = ["learner_checks", "run_check"]
