"""The one exception that means "the user's input is wrong", and help with names that are nearly right."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a configuration key, a file, a row, a model that doesn't fit.

    The message is one line that says what (which key, or file and row) is wrong and what would be
    right. The command line prints it without a traceback and exits with status 2.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
