"""Which orderings hold here? The first two tables of RESULTS.md, from the records of evidence.py.

    python -m tests.benchmarks.orderings

`a < b` asks: is b better? A cell is b minus a in points of mIoU, the mean over the seeds that both
have, +- its standard error, n in brackets, and the answer: **yes** or **no** where a paired t-test
gives one (two-sided, p < 0.05: 4.3 standard errors for n = 3, 2.8 for n = 5), `leans yes` or
`leans no` from one standard error on, `undecided` below; of two seeds, none.
"""

from pathlib import Path

from tests.benchmarks.evidence import mean_and_error, read_record, split

HERE = Path(__file__).parent
# what it is called in the table, its record, the variants of its rows
SETTINGS = (
    ("miniature world", "evidence-toy.jsonl", ""),
    ("photographs, 1,000 steps, low rate", "evidence-real-160.jsonl", ":low-rate:long"),
    ("photographs, 2,000 steps, high rate", "evidence-real-160.jsonl", ":twice:long"),
    ("photographs, 2,000 steps, low rate", "evidence-real-160.jsonl", ":twice:low-rate:long"),
)
BUDGETS = ("0.005", "0.01", "0.022", "0.05")
# of Student's t, both sides together 5 %: so many standard errors, by n
T_5_PERCENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
BY_BUDGET = (
    ("random < RIPU", "random", "ripu"),
    ("entropy < RIPU", "entropy", "ripu"),
    ("margin < RIPU", "margin", "ripu"),
    ("RIPU < CBDA", "ripu", "cbda:both"),
    ("RIPU < CBDA's balance alone", "ripu", "cbda:balance"),
    ("RIPU < CBDA's dynamic acquisition alone", "ripu", "cbda:dynamic"),
    ("CBDA's balance < both parts", "cbda:balance", "cbda:both"),
    ("all labels at the same rate < RIPU (published: level)", "full", "ripu"),
    ("(no paper) random < margin", "random", "margin"),
    ("(ours) RIPU < RIPU with CBST's labels", "ripu", "ripu+cbst"),
    ("(ours) random < random with CBST's labels", "random", "random+cbst"),
)
OTHERS = (
    ("random pixels < RIPU's, 40 an image", "random:pa", "ripu-pa"),
    ("start < ST", "source-only", "st"),
    ("start < CBST", "source-only", "cbst"),
    ("start < CBST-SP", "source-only", "cbst-sp"),
    ("ST < CBST", "st", "cbst"),
    ("CBST < CBST-SP", "cbst", "cbst-sp"),
    ("STAL, 5 %: supervised < with L_u", "stal:supervised@0.05", "stal:unlabelled@0.05"),
    ("STAL, 5 %: L_u < with L_c", "stal:unlabelled@0.05", "stal:random@0.05"),
    ("STAL, 5 %: random images < its queries", "stal:random@0.05", "stal@0.05"),
    (
        "(ours) CBDA's balance, 5 % < it with CutMix",
        "cbda:balance@0.05",
        "cbda:balance:teacher:mixed@0.05",
    ),
)


def verdict(gaps: list[float]) -> str:
    """ "+1.0 ± 0.6 (5) leans yes" of differences in points."""
    if len(gaps) < 2:
        return ""
    mean, error = mean_and_error(gaps)
    text = f"{mean:+.1f} ± {error:.1f} ({len(gaps)})"
    if len(gaps) == 2:
        return text
    if abs(mean) < error:
        return f"{text} undecided"
    word = "yes" if mean > 0 else "no"
    limit = T_5_PERCENT[min(len(gaps), max(T_5_PERCENT))]  # of more seeds a little too strict
    sure = abs(mean) > limit * error
    return f"{text} **{word}**" if sure else f"{text} leans {word}"


def full_name(row: str, variants: str) -> str:
    """ "ripu+cbst@0.05", ":long" -> "ripu:long+cbst@0.05"; all start from the same network."""
    if row == "source-only":
        return row
    strategy, own, pseudo, budget = split(row)
    name = ":".join([strategy, *own]) + variants
    return name + (f"+{pseudo}" if pseudo else "") + (f"@{budget}" if budget else "")


def compare(runs: dict, variants: str, first: str, second: str) -> str:
    """The cell of one ordering; `runs` by (row, seed)."""
    rows = [full_name(row, variants) for row in (first, second)]
    a, b = ({seed: r["mIoU19"] for (name, seed), r in runs.items() if name == row} for row in rows)
    return verdict([100 * (b[seed] - a[seed]) for seed in sorted(a.keys() & b.keys())])


def main() -> None:
    records = [read_record(HERE / file) for _, file, _ in SETTINGS]
    print("| ordering | where | 0.5 % | 1 % | 2.2 % | 5 % |\n|---|---|---|---|---|---|")
    for ordering, first, second in BY_BUDGET:
        for runs, (where, _, variants) in zip(records, SETTINGS, strict=True):
            cells = []
            for budget in BUDGETS:
                without = first if first == "full" else f"{first}@{budget}"
                cells.append(compare(runs, variants, without, f"{second}@{budget}"))
            if any(cells):
                print(f"| {ordering} | {where} | {' | '.join(cells)} |")
    print("\n| ordering | miniature world | photographs, 1,000 steps, low rate |\n|---|---|---|")
    for ordering, first, second in OTHERS:
        cells = [
            compare(runs, variants, first, second)
            for runs, (_, _, variants) in zip(records[:2], SETTINGS, strict=False)
        ]
        print(f"| {ordering} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
