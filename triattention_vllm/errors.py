"""Every error this package raises, under one base class.

A message says what was found, what is allowed and what to do next.
"""


class TriAttentionError(Exception):
    """Base class of all errors of this package."""


class SettingsError(TriAttentionError, ValueError):
    """A setting is unknown, has a wrong type, is out of range or contradicts another."""


class RequestError(TriAttentionError, ValueError):
    """A request asks for a KV budget that is wrong or that this server does not give.

    key: the extra argument that is at fault.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class StatisticsError(TriAttentionError, ValueError):
    """A statistics file is missing, unreadable, or does not fit the running model."""


class UnsupportedError(TriAttentionError, ValueError):
    """The model, platform or vLLM feature cannot run together with KV compression."""


class SeamError(TriAttentionError, RuntimeError):
    """An attribute of vLLM that this package relies on is not what it was verified to be."""


class RecordingError(TriAttentionError, ValueError):
    """A recording of rounds is missing, is none, or does not have what is asked of it."""


class MetricsError(TriAttentionError, OSError):
    """The files in which an engine counts cannot be made."""


class RoundError(TriAttentionError, RuntimeError):
    """A round would break an invariant of the block rows; nothing has been written."""
