"""alda: active learning for domain-adaptive semantic segmentation. Start with `python -m alda`."""

import os
import sys

# Threads that wait for each other sleep instead of spinning: on a machine that others use too, a small
# step takes half the time. Read when torch is loaded; a value of the user's stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
IGNORE = 255  # the label of a pixel that has none, in every label map of this package


def run_command(main) -> None:
    """Runs `main()` as a program, which ends with the exit status that it returns, after Ctrl-C with
    130. stdout escapes what the terminal has no letters for (a folder's name), as stderr always does:
    no run ends for it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class InputError(Exception):
    """A mistake in what the user gave (a path, a file, an option): one line on stderr, exit status
    2, no traceback."""
