"""What a cell promises, one check each."""

from rtrl.testing.cell_checks.core import cell_checks, run_checks

__all__ = ["cell_checks", "run_checks"]
