"""The error tree. Both extension modules raise these classes, one for each kind in C++."""

from __future__ import annotations


class Error(RuntimeError):
    """Root of everything that Meshloom raises: `[where] who, given, expected`."""

    where: str = ""
    """The public call that failed, for example `comm.all_to_all`."""
    location: str = ""
    """`file:line` of the throw in the C++ sources."""


class InvalidArgument(Error, ValueError):
    """The caller's mistake; nothing happened."""


class NotSupported(Error):
    """A valid request for something that is not built."""


class PlanError(Error):
    """A plan breaks a contract; names slot, unit, rank and sample."""


class CommError(Error):
    """The transport failed; the group is unusable."""


class Timeout(Error, TimeoutError):
    """A wait ran past its limit; the group is aborted."""


class DataError(Error):
    """Unreadable or invalid data."""


class IoError(Error):
    """The file system said no."""
