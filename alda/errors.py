"""The one exception that is meant for people.

from alda.errors import InputError
"""


class InputError(Exception):
    """A mistake in what the user gave (a path, a file, an option): shown as one line on stderr, exit status 2, no traceback."""
