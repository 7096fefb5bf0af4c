"""The one error that a user's mistake raises, so that the command line can show it as one line."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line: it names the file, tensor, knob or argument and says what to do. The
    command line prints it on stderr and exits with code 2; a program can catch it as a
    ``ValueError``.
    """
