"""RESULTS.md says what the record of finished runs says, and differences are paired by hand.

pytest tests/test_evidence.py
"""

import math
from pathlib import Path

import pytest

from tests.benchmarks import evidence, orderings, tables

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "tests/benchmarks/RESULTS.md").read_text()


def test_differences_are_paired_by_seed():
    """By hand: gaps 1, 3, 2 have the mean 2 and the standard error 1 / sqrt(3)."""
    mine, other = {0: 11.0, 1: 23.0, 2: 32.0, 7: 99.0}, {0: 10.0, 1: 20.0, 2: 30.0, 9: 0.0}
    assert evidence.paired(mine, other) == "+2.0 ± 0.6 (+1.0, +3.0, +2.0)"
    assert evidence.paired({0: 1.0}, {0: 2.0}) == evidence.paired(mine, {}) == ""
    assert evidence.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and evidence.spread([1.0]) == "1.0"


@pytest.mark.parametrize(
    "row, against, expected",
    [
        ("ripu@0.005", "random", "random@0.005"),
        ("cbda:both@0.05", "ripu", "ripu@0.05"),
        ("ripu:low-rate:long@0.05", "random", "random:low-rate:long@0.05"),
        ("cbda:both:low-rate:long@0.05", "random", "random:low-rate:long@0.05"),
        ("ripu-pa", "random", "random:pa"),
        ("ripu-pa:low-rate:long", "random", "random:pa:low-rate:long"),
        ("stal:unlabelled:strong@0.05", "stal:supervised", "stal:supervised:strong@0.05"),
        ("stal:unlabelled:light@0.05", "stal:supervised", "stal:supervised@0.05"),
        ("ripu+cbst@0.005", "ripu", "ripu@0.005"),
        ("ripu:teacher:light@0.005", "ripu", "ripu@0.005"),
        ("ripu:low-rate:long@0.05", "full", "full:low-rate:long"),
    ],
)
def test_a_row_is_compared_with_its_own_kind(row, against, expected):
    rows = [row, "random:low-rate:long@0.05", "random:pa", "random:pa:low-rate:long"]
    rows += ["stal:supervised:strong@0.05", "full:low-rate:long"]
    assert evidence.compared_with(row, against, rows) == expected


def test_a_record_keeps_what_it_has(tmp_path):
    """A run that stands there is not written over; one without pseudo-labels or student has neither."""
    run = {"mIoU19": 0.3, "IoU": {"road": 0.5, "train": None}, "budget": {"asked": 7}, "wall_s": 1}
    path = tmp_path / "record.jsonl"
    evidence.add_to_record(path, {"ripu@0.005": {0: run}})
    evidence.add_to_record(path, {"ripu@0.005": {0: {**run, "mIoU19": 0.9}, 1: run}})
    record = evidence.read_record(path)
    assert {key: r["mIoU19"] for key, r in record.items()} == {
        ("ripu@0.005", 0): 0.3,
        ("ripu@0.005", 1): 0.3,
    }
    assert record["ripu@0.005", 0]["IoU"] == run["IoU"] and "student" not in record["ripu@0.005", 0]


@pytest.mark.parametrize(
    "gaps, expected",
    [
        ([], ""),
        ([1.0], ""),
        ([1.0, 3.0], "+2.0 ± 1.0 (2)"),
        ([1.0, 3.0, 2.0], "+2.0 ± 0.6 (3) leans yes"),  # 3.5 errors, of 4.3 that the t-test wants
        ([-1.0, -3.0, -2.0], "-2.0 ± 0.6 (3) leans no"),
        ([1.0, 3.0, 2.0, 1.0, 3.0], "+2.0 ± 0.4 (5) **yes**"),  # 4.5, of 2.8
        ([-1.0, -3.0, -2.0, -1.0, -3.0], "-2.0 ± 0.4 (5) **no**"),
        ([0.0, 3.0, 0.0], "+1.0 ± 1.0 (3) leans yes"),
        ([0.0, -3.0, 0.0], "-1.0 ± 1.0 (3) leans no"),
        ([0.0, 3.0, -1.0], "+0.7 ± 1.2 (3) undecided"),
        ([0.0, -3.0, 1.0], "-0.7 ± 1.2 (3) undecided"),
        ([1.0, 3.0] * 6, "+2.0 ± 0.3 (12) **yes**"),
    ],
)
def test_what_is_read_from_differences(gaps, expected):
    assert orderings.verdict(gaps) == expected


@pytest.mark.parametrize("n", orderings.T_5_PERCENT)
def test_the_t_test(n):
    """Student's density of n - 1 degrees of freedom, integrated between the limits: 95 %."""
    freedom, limit, parts = n - 1, orderings.T_5_PERCENT[n], 20_000
    factor = math.gamma(n / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    middles = (limit * (i + 0.5) / parts for i in range(parts))
    half = sum(factor * (1 + t * t / freedom) ** (-n / 2) for t in middles) * limit / parts
    assert 2 * half == pytest.approx(0.95, abs=1e-4)


def test_orderings_compare_rows_of_one_kind():
    """Seeds that both have, rows of the same variants and budget, second minus first."""
    name = orderings.full_name
    assert name("ripu+cbst@0.05", ":long") == "ripu:long+cbst@0.05"
    assert name("cbda:both@0.05", "") == "cbda:both@0.05" and name("full", ":long") == "full:long"
    assert name("source-only", ":long") == "source-only"
    scores = {"random:long@0.05": (0.10, 0.20, 0.30), "ripu:long@0.05": (0.11, 0.23, 0.32, 0.9)}
    scores |= {"random@0.05": (0.5,), "ripu:long@0.022": (0.6,)}
    runs = {(row, i): {"mIoU19": x} for row, xs in scores.items() for i, x in enumerate(xs)}
    cell = orderings.compare(runs, ":long", "random@0.05", "ripu@0.05")
    assert cell == "+2.0 ± 0.6 (3) leans yes"


def test_tables_of_the_results_are_the_records():
    """Each table below a command in RESULTS.md is what that prints, line by line, minutes and all."""
    was, now = RESULTS.splitlines(), tables.remade(RESULTS).splitlines()
    gone, new = ("\n".join(x for x in a if x not in b) for a, b in ((was, now), (now, was)))
    assert now == was, f"{gone}\nis now\n{new}\n(python -m tests.benchmarks.tables)"


def test_there_are_tables():
    commands = [m[1] for m in map(tables.COMMAND.match, RESULTS.splitlines()) if m]
    assert len(commands) >= 10 and "-m tests.benchmarks.orderings" in commands


def test_a_table_is_made_anew(monkeypatch):
    """By hand: the lines with | change, blank ones between two tables with them; prose stays."""
    monkeypatch.setattr(tables, "printed_by", lambda command: ["| new |", "", f"| {command[-1]} |"])
    command = "python -m tests.benchmarks.evidence --only-table --seeds"
    text = [f"{command} 1", "```", "prose", "| old |", "", "| older |", "| oldest |", "", "prose |"]
    text += [f"{command} 2", "", "| old |"]
    made = [f"{command} 1", "```", "prose", "| new |", "", "| 1 |", "", "prose |"]
    made += [f"{command} 2", "", "| new |", "", "| 2 |"]
    assert tables.remade("\n".join(text)).splitlines() == made
    with pytest.raises(ValueError, match=r"no table stands below: .* 1"):
        tables.remade("\n".join([text[0], "prose", *text[-3:]]))
