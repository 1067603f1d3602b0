"""The exceptions of the package: one base class, each also the fitting builtin."""

from __future__ import annotations

__all__ = [
    "AiojobError",
    "CannotPauseError",
    "EngineError",
    "JobError",
    "LibsslUnavailableError",
    "WaitFdError",
    "WrongThreadError",
]


class AiojobError(Exception):
    """Base class of every error that aiojob itself raises."""


class JobError(AiojobError, RuntimeError):
    """A call that the job, wait context or pool does not allow now; nothing was changed.

    Stands for OpenSSL's ``ASYNC_ERR``.
    """


class WrongThreadError(JobError):
    """A job was resumed on another thread than the one that started it."""


class CannotPauseError(JobError):
    """`await_` was called where nothing can pause: outside a job, or while pausing is blocked."""


class EngineError(AiojobError, RuntimeError):
    """The wait context's status was `WaitStatus.ERR` when its job paused."""


class WaitFdError(AiojobError, OSError):
    """A wait context's file descriptor cannot be watched by the event loop."""


class LibsslUnavailableError(AiojobError, RuntimeError):
    """The libssl that Python's `ssl` module uses cannot be reached as needed; says why."""
