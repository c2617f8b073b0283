"""The one exception for mistakes that a user can mend, and its kind for disks."""

from __future__ import annotations


class InputError(ValueError):
    """A configuration, data or file problem that the user can mend.

    The message is one line: the value, the limit and the remedy. The command line prints it and exits with 2.
    """


class DiskError(InputError):
    """A disk that is full or can't be written."""
