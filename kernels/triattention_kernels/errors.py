"""The errors of this package."""


class ArgumentError(ValueError):
    """An argument of a kernel has a wrong shape, dtype, device or layout; nothing was written."""
