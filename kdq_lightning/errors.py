"""The one exception that the command line turns into a sentence instead of a traceback."""


class UserError(ValueError):
    """Something outside the code is wrong (input, file, option); the message says what, and what to do."""
