"""The one exception for mistakes that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input: one line that says what is wrong, where, and what to do.

    The command `rlrc` prints it without a traceback and exits with status 2; nodes put it into a
    service's or an action's message.
    """
