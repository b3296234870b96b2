"""The one exception that is the user's to fix."""

from __future__ import annotations


class UserError(ValueError):
    """Input is at fault: the message is one sentence that names the file, the place and the fix.

    The command line prints the message on stderr, without a traceback, and exits with code 1.
    """
