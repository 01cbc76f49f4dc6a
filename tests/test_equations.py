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

REGION = "test_ripu_score_equals_the_recorded_official_one"
LABELS = "test_pseudo_labels_by_the_codes_rule_and_masks_equal_the_recorded_ones"
STEPS = "test_ripu_steps_equal_the_recorded_ones"
EPS = "7e-6: the code's logs have + 1e-6"
# (paper, number or name): the function that holds the line, a strategy that runs it, the test that
# checks it, and the largest gap to the recorded official output that the test prints
EQUATIONS = {
    ("RIPU", "1"): (
        "acquisition.region_impurity",
        "ripu",
        "test_ripu_score_equals_a_slow_loop",
        "exact",
    ),
    ("RIPU", "2"): (
        "acquisition.region_impurity",
        "ripu",
        "test_ripu_score_equals_a_slow_loop",
        "exact",
    ),
    ("RIPU", "3"): ("acquisition.region_impurity", "ripu", REGION, EPS),
    ("RIPU", "4"): ("acquisition.region_uncertainty", "ripu", REGION, EPS),
    ("RIPU", "5"): ("acquisition.ripu_score", "ripu", REGION, EPS),
    ("RIPU", "6"): ("losses.cross_entropy", "ripu", STEPS, "1e-8"),
    ("RIPU", "7"): (
        "losses.local_consistency",
        "ripu",
        "test_local_consistency_equals_the_recorded_official_one",
        "exact",
    ),
    ("RIPU", "8"): (
        "losses.negative_learning",
        "ripu",
        "test_negative_learning_equals_the_recorded_official_one",
        "1e-6: the code's log has + 1e-6",
    ),
    ("RIPU", "9"): ("loop.train_queries", "ripu", STEPS, "1e-8"),
    ("STAL", "1"): ("loop.train_stal", "stal", "test_stal_steps_equal_the_recorded_ones", "1e-14"),
    ("STAL", "2"): (
        "losses.ohem_cross_entropy",
        "stal",
        "test_ohem_equals_the_recorded_official_one",
        "2e-7",
    ),
    ("STAL", "3"): (
        "losses.weighted_consistency",
        "stal",
        "test_weighted_consistency_equals_the_recorded_one_but_for_ignored_pixels",
        "5e-7, but for D14",
    ),
    ("STAL", "4"): (
        "losses.class_contrast",
        "stal",
        "test_the_contrastive_loss_equals_the_recorded_one_where_all_classes_are_present",
        "2e-7, given the code's negatives (D15)",
    ),
    ("STAL", "5"): ("selftraining.reliable_pseudo_labels", "stal", LABELS, "1e-6"),
    ("STAL", "6"): ("selftraining.reliable_pseudo_labels", "stal", LABELS, "exact"),
    ("STAL", "7"): ("selftraining.drop_share", "stal", LABELS, "exact"),
    ("STAL", "8"): (
        "acquisition.image_uncertainty",
        "stal",
        "test_image_scores_equal_the_recorded_ones",
        EPS,
    ),
    ("CBST", "objective"): (
        "loop.train_cbst",
        "cbst-sp",
        "test_cbst_minimises_the_mean_over_all_labelled_pixels_of_the_batch",
        "no recording of a step",
    ),
    ("CBST", "thresholds"): (
        "selftraining.thresholds",
        "cbst-sp",
        "test_thresholds_equal_the_recorded_ones_of_crst",
        "1.3e-5",
    ),
    ("CBST", "pseudo-labels"): (
        "selftraining.cbst_pseudo_labels",
        "cbst-sp",
        "test_pseudo_labels_equal_the_recorded_ones_of_crst",
        "exact",
    ),
    ("CBST", "spatial priors"): (
        "selftraining._best_class",
        "cbst-sp",
        "test_thresholds_and_labels_equal_the_recorded_ones_of_cbst_with_and_without_prior",
        "exact",
    ),
    ("CBDA", "class balance"): (
        "acquisition.class_weights",
        "cbda",
        "test_class_weights_one_can_do_by_hand",
        "no public code",
    ),
    ("CBDA", "dynamic acquisition"): (
        "acquisition.select",
        "cbda",
        "test_global_budget_equals_the_greedy_on_the_stacked_tensor",
        "no public code",
    ),
}


def table() -> str:
    """The README's index of equations."""
    homes = {}
    for path in sorted(TESTS.glob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.M):
            homes[name] = path.stem
    rows = ["| equation | line in | test in | gap |", "|---|---|---|---|"]
    previous = None
    for (paper, number), (function, _, test, gap) in EQUATIONS.items():
        place = f"`{function}` | `{homes[test]}` | {gap} |"
        if place == previous:
            rows[-1] = rows[-1].replace(" |", f", {number} |", 1)
        else:
            rows.append(f"| {paper} ({number}) | {place}".replace("(", "", 1).replace(")", "", 1))
        previous = place
    return "\n".join(rows)


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


def test_the_readmes_index_is_this_table():
    readme = (TESTS.parent / "README.md").read_text()
    found = re.search(r"<!-- equations -->\n(.*?)\n<!-- end -->", readme, flags=re.S)
    assert found and found[1] == table(), f"put this into README.md:\n{table()}"


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
    for key, (function, runs_it, _, _) in EQUATIONS.items():
        if runs_it == strategy:
            module, name = function.split(".")
            assert Path(marks[key][0]).stem == module
            assert seen.get(marks[key]) == name, (
                f"{key}: line {marks[key]} is not run by {strategy}"
            )
