"""The one exception that means "the user's input is wrong"."""


class InputError(ValueError):
    """Bad input: a configuration key, a file, a row, a model that doesn't fit.

    The message is one line that says what (which key, or file and row) is wrong and what would be
    right. The command line prints it without a traceback and exits with status 2.
    """
