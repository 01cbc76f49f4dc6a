"""alda: active learning for domain-adaptive semantic segmentation. Start with `python -m alda`."""

__version__ = "0.1.0"
IGNORE = 255  # the label of a pixel that has none, in every label map of this package


class InputError(Exception):
    """A mistake in what the user gave (a path, a file, an option): one line on stderr, exit status
    2, no traceback."""
