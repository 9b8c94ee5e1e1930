"""Every error that this library raises on purpose.

Each also inherits the built-in that a caller would expect (``ValueError`` for a wrong option, ``RuntimeError`` for a
call at the wrong time, ``TypeError`` for a model of the wrong kind), so existing handlers keep working.
"""


class EMAError(Exception):
    """Base of all errors of this library."""


class EMAConfigError(EMAError, ValueError):
    """An option has a value that is not allowed: the message names the option, its value and what is allowed."""


class EMAStateError(EMAError, RuntimeError):
    """A call came at a moment when it cannot be served, or the model has changed under the average."""


class EMAEngineError(EMAError, TypeError):
    """The target, or the way it is sharded, is not one that an engine knows."""


class CheckpointError(EMAError):
    """A checkpoint or export could not be written or read."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint does not fit the model: lists missing, unexpected and mismatched tensors."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint is damaged: names the file and, where there is one, the tensor."""
