"""Every numbered equation is one line of the package, which its strategy really runs, and has a test.

The number stands in a comment directly above that line: `# RIPU Eq. (3): ...`, or, where the paper's
numbers were not at hand, `# CBST, thresholds: ...`.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_loop import arguments

from alda import loop

PACKAGE = Path(loop.__file__).parent
TESTS = Path(__file__).parent
MARK = re.compile(r"^\s*# (?:(RIPU|STAL) Eq\. \((\d)\)|(CBST|CBDA), ([a-z -]+)): ")

# (paper, number or name): the function that holds the line, a strategy that runs it, the test that checks it
EQUATIONS = {
    ("RIPU", "1"): ("region_impurity", "ripu", "test_ripu_score_equals_a_slow_loop"),
    ("RIPU", "2"): ("region_impurity", "ripu", "test_ripu_score_equals_a_slow_loop"),
    ("RIPU", "3"): ("region_impurity", "ripu", "test_ripu_score_equals_the_recorded_official_one"),
    ("RIPU", "4"): (
        "region_uncertainty",
        "ripu",
        "test_ripu_score_equals_the_recorded_official_one",
    ),
    ("RIPU", "5"): ("ripu_score", "ripu", "test_ripu_score_equals_the_recorded_official_one"),
    ("RIPU", "6"): (
        "cross_entropy",
        "ripu",
        "test_cross_entropy_is_torchs_mean_over_labelled_pixels",
    ),
    ("RIPU", "7"): (
        "local_consistency",
        "ripu",
        "test_local_consistency_equals_the_recorded_official_one",
    ),
    ("RIPU", "8"): (
        "negative_learning",
        "ripu",
        "test_negative_learning_equals_the_recorded_official_one",
    ),
    ("RIPU", "9"): ("train_queries", "ripu", "test_the_total_is_the_weighted_sum"),
    ("STAL", "1"): ("train_stal", "stal", "test_the_total_is_the_weighted_sum"),
    ("STAL", "2"): ("ohem_cross_entropy", "stal", "test_ohem_equals_the_recorded_official_one"),
    ("STAL", "3"): (
        "weighted_consistency",
        "stal",
        "test_weighted_consistency_equals_the_recorded_one_but_for_ignored_pixels",
    ),
    ("STAL", "4"): (
        "class_contrast",
        "stal",
        "test_the_contrastive_loss_equals_the_recorded_one_where_all_classes_are_present",
    ),
    ("STAL", "5"): (
        "reliable_pseudo_labels",
        "stal",
        "test_pseudo_labels_by_the_codes_rule_and_masks_equal_the_recorded_ones",
    ),
    ("STAL", "6"): (
        "reliable_pseudo_labels",
        "stal",
        "test_pseudo_labels_by_the_codes_rule_and_masks_equal_the_recorded_ones",
    ),
    ("STAL", "7"): (
        "drop_share",
        "stal",
        "test_pseudo_labels_by_the_codes_rule_and_masks_equal_the_recorded_ones",
    ),
    ("STAL", "8"): ("image_uncertainty", "stal", "test_image_scores_equal_the_recorded_ones"),
    ("CBST", "objective"): ("train_cbst", "cbst-sp", "test_the_total_is_the_weighted_sum"),
    ("CBST", "thresholds"): (
        "thresholds",
        "cbst-sp",
        "test_thresholds_equal_the_recorded_ones_of_crst",
    ),
    ("CBST", "pseudo-labels"): (
        "cbst_pseudo_labels",
        "cbst-sp",
        "test_pseudo_labels_equal_the_recorded_ones_of_crst",
    ),
    ("CBST", "spatial priors"): (
        "_best_class",
        "cbst-sp",
        "test_thresholds_and_labels_equal_the_recorded_ones_of_cbst_with_and_without_prior",
    ),
    ("CBDA", "class balance"): ("class_weights", "cbda", "test_class_weights_one_can_do_by_hand"),
    ("CBDA", "dynamic acquisition"): (
        "select",
        "cbda",
        "test_global_budget_equals_the_greedy_on_the_stacked_tensor",
    ),
}


def marked_lines() -> list[tuple[tuple[str, str], str, int]]:
    """(equation, file, number of the line below its comment) of every mark in the package."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            if mark := MARK.match(line):
                below = i + 1
                while lines[below].lstrip().startswith("#"):
                    below += 1
                key = (mark[1] or mark[3], mark[2] or mark[4])
                found.append((key, str(path), below + 1))
    return found


def test_every_equation_stands_above_one_line():
    assert Counter(key for key, _, _ in marked_lines()) == Counter(list(EQUATIONS))


def test_every_equation_has_a_test():
    text = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    for key, (_, _, test) in EQUATIONS.items():
        assert f"def {test}(" in text, f"{key}: no test named {test}"


def lines_run(files: set[str], words: list[str]) -> dict[tuple[str, int], str]:
    """{(file, line): function} of all lines in `files` that a run of the command line executes."""
    seen = {}

    def each_line(frame, event, _):
        seen[frame.f_code.co_filename, frame.f_lineno] = frame.f_code.co_name
        return each_line

    def each_call(frame, event, _):
        return each_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(each_call)
    try:
        assert loop.main(words) == 0
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.parametrize("strategy", ["ripu", "cbda", "stal", "cbst-sp"])
def test_a_run_executes_its_equations(strategy, tiny_world, tmp_path):
    marks = {key: (file, line) for key, file, line in marked_lines()}
    options = {"ohem_threshold": 0.7, "contrast_start": 0} if strategy == "stal" else {}
    words = arguments(tiny_world, tmp_path, strategy=strategy, steps=6, **options)
    seen = lines_run({file for file, _ in marks.values()}, words)
    for key, (function, runs_it, _) in EQUATIONS.items():
        if runs_it == strategy:
            assert seen.get(marks[key]) == function, (
                f"{key}: line {marks[key]} is not run by {strategy}"
            )
