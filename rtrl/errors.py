"""The package's exception family: every error a user can cause is an ``RTRLError``, raised before any state changes."""


class RTRLError(Exception):
    """Base of all errors raised on purpose by ``rtrl``."""


class ConfigError(RTRLError, ValueError):
    """A constructor or method argument is out of range or of the wrong kind."""


class ShapeError(RTRLError, ValueError):
    """A tensor has the wrong shape, dtype or device."""


class CellError(RTRLError, ValueError):
    """A cell breaks the contract of a cell: impure, mixing samples, or changing the shape of its state."""


class SparsityError(CellError):
    """A declared ``Sparsity`` is malformed, out of range, or does not cover what the cell really does."""


class AuditError(CellError):
    """A block's derivatives are not those that plain autograd gives for the cell; nothing was delivered."""


class LossError(RTRLError, ValueError):
    """A loss does not belong to this step, or was already given."""


class NonFiniteError(RTRLError, ArithmeticError):
    """NaN or infinity in an input, state, loss or Jacobian; the message names the step and what it was found in."""


class ParameterChangedError(RTRLError, RuntimeError):
    """A parameter changed while the steps of an open block still had to be linearised at its old value."""


class WindowError(RTRLError, IndexError):
    """A range of steps was asked for that the segment tree does not hold."""


class UnknownOperationError(RTRLError, LookupError):
    """An operation ran under a ``MacCounter`` that has no count for it, so that any total would be too small."""


class PerformanceWarning(UserWarning):
    """The result is exact, but a slower path than usual had to be taken."""


class FileError(ConfigError):
    """A file cannot be read, written or locked, or does not contain what was written to it; it is as it was before."""
