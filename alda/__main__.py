"""`python -m alda` lists the commands and the version. Where do I start?"""

from alda import __version__

COMMANDS = {
    "loop": "trains one strategy from a source to a target dataset; start with --root toy",
    "evaluation": "score, predict, compare: a network under a named protocol, runs side by side",
    "annotate": "a page on which people answer a run of --oracle files",
    "datasets": "check ROOT: what is found in a folder of datasets, and what is missing",
    "toy": "writes the miniature world: GTA5, SYNTHIA and Cityscapes in their folder layouts",
}


def main() -> None:
    """Prints the commands."""
    print(f"alda {__version__}: active learning for domain-adaptive semantic segmentation\n")
    for name, text in COMMANDS.items():
        print(f"  python -m alda.{name:11s} {text}")
    print("\nEach has --help. First try: python -m alda.loop --root toy --strategy ripu")


if __name__ == "__main__":
    main()
