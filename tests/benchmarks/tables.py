"""Makes the tables of RESULTS.md anew that come from a record of runs: each from the command above it.

    python -m tests.benchmarks.tables

A command is a line `python -m tests.benchmarks.orderings`, or one of evidence.py with --only-table,
between two fences; its tables are the first lines that begin with | after it. Prose is left alone.
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "RESULTS.md"
COMMAND = re.compile(r"^python (-m tests\.benchmarks\.(?:evidence .*--only-table.*|orderings))$")


def printed_by(command: str) -> list[str]:
    """The lines of what `-m MODULE ...` prints, run from the top of the repository."""
    line = f"'{sys.executable}' {command}"
    shell = ["bash", "-c", line]  # which expands {random,ripu}@0.005
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def remade(text: str) -> str:
    """`text` with what its commands print now in place of their tables.

    Raises ValueError where a command has no table below it before the next one."""
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if COMMAND.match(line)]
    with ThreadPoolExecutor(2) as pool:
        printed = [*pool.map(printed_by, (COMMAND.match(lines[i])[1] for i in places))]
    for place, below, table in reversed([*zip(places, [*places[1:], None], printed, strict=True)]):
        first = next((i for i in range(place, below or len(lines)) if lines[i][:1] == "|"), None)
        if first is None:
            raise ValueError(f"no table stands below: {lines[place]}")
        last = first
        while last < len(lines) and lines[last][:1] in ("|", ""):
            last += 1
        while not lines[last - 1]:
            last -= 1
        lines[first:last] = table
    return "\n".join(lines) + "\n"


def main() -> None:
    RESULTS.write_text(remade(RESULTS.read_text()))


if __name__ == "__main__":
    main()
