"""`python -m alda` lists the commands and the version. Where do I start?"""

import sys

from alda import __version__

COMMANDS = {
    "loop": "trains one strategy from a source to a target dataset; start with --root toy",
    "evaluation": "score, predict, compare: a network under a named protocol, runs side by side",
    "annotate": "a page on which people answer a run of --oracle files",
    "datasets": "check ROOT: what is found in a folder of datasets, and what is missing",
    "toy": "writes the miniature world: GTA5, SYNTHIA and Cityscapes in their folder layouts",
}


def main() -> int:
    """Prints the commands; the exit status is 2 where something else was asked for."""
    print(f"alda {__version__}: active learning for domain-adaptive semantic segmentation\n")
    for name, text in COMMANDS.items():
        print(f"  python -m alda.{name:11s} {text}")
    print("\nEach has --help. First try: python -m alda.loop --root toy --strategy ripu")
    asked = [word for word in sys.argv[1:] if word not in ("-h", "--help", "--version")]
    if asked:
        name = asked[0] if asked[0] in COMMANDS else next(iter(COMMANDS))
        print(f"error: this only lists the commands: python -m alda.{name} is one", file=sys.stderr)
    return 2 if asked else 0


if __name__ == "__main__":
    sys.exit(main())
