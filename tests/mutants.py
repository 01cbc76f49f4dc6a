"""Do the tests notice? Small wrong changes to the package, one by one, and which test fails.

    python -m tests.mutants                     # all of them: two hours or more on one core
    python -m tests.mutants --list              # numbers, modules, what each one does wrong
    python -m tests.mutants --module rounds     # those of one module; --only 17,20 some by number
    python -m tests.mutants --only 17 --tests all       # with other tests than those of the table

The package is copied first and changed in the copy only. A mutant of the table below is a line
`module | tests | what it does wrong`, then the exact text that is replaced (`-`; it occurs once in
alda/MODULE.py) and what stands there instead (`+`). The tests are names of TESTS, tried in this
order until one fails. A mutant that none of them notices has SURVIVED: a test is missing, or the
named ones are too few (`--tests all` tells). Every test that is used passes on the copy before.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMES = itertools.count(10**9)  # for `put`
LOOPS = ("teacher_is_the_mean", "restart_begins", "banks_of_a_run")
RUNS = ("very_next_step", "rates_fall", *LOOPS)
FILES = (
    "acquisition", "annotate", "annotation", "assembly", "cbst", "compositions", "datasets", "deeplab",
    "equations", "evaluation", "losses", "mixing", "stal",
)  # fmt: skip
LOOP, GOLDEN = "tests/test_loop.py", "tests/test_golden_steps.py"
QUERIES = f"{LOOP}::test_interrupted_and_resumed_equals_uninterrupted"
PSEUDO = f"{LOOP}::test_pseudo_labels_interrupted_and_resumed"
STAL = f"{LOOP}::test_stal_interrupted_and_resumed"
SHORT = "schedule or images_due or regions_due or poly_equals or loss_of_their_own or mistakes"
PEOPLE = "problem or missing or kill or edited or changed or shape or polygons or another_image"
# name: the arguments of pytest
TESTS = {
    **{name: [f"tests/test_{name}.py"] for name in FILES},
    "parts": ["tests/test_compositions.py", "-k", " and ".join(f"not {name}" for name in RUNS)],
    "next-step": ["tests/test_compositions.py", "-k", "very_next_step"],
    "rates": ["tests/test_compositions.py", "-k", "rates_fall"],
    "loops": ["tests/test_compositions.py", "-k", " or ".join(LOOPS)],
    "schedules": [LOOP, "-k", SHORT],
    "score": [f"{LOOP}::test_score_takes_the_settings_of_the_run"],
    "source-free": [f"{LOOP}::test_source_free_sees_no_source_image"],
    "seed": [f"{LOOP}::test_the_seed_decides_and_the_workers_do_not"],
    "pixel-run": [f"{LOOP}::test_pixel_queries_of_cbda_with_every_switch_turned"],
    **{name: [f"{QUERIES}[{name}]"] for name in ("source-only", "full", "random", "ripu", "cbda")},
    "v3plus": [f"{QUERIES}[ripu deeplabv3plus]"],
    **{f"run-{name}": [f"{PSEUDO}[{name}]"] for name in ("st", "cbst", "cbst-sp")},
    "pseudo": [f"{PSEUDO}[cbda cbst]"],
    "pseudo-sp": [f"{PSEUDO}[random cbst-sp]"],
    "run-stal": [f"{STAL}[default]"],
    "stal-code": [f"{STAL}[restart, code]"],
    "processes-losses": ["tests/test_processes.py", "-k", "mean_over"],
    "processes-cbda": ["tests/test_processes.py", "-k", "two_processes and cbda"],
    "processes-parts": ["tests/test_processes.py", "-k", "in_parts"],
    "stal-teacher": ["tests/test_stal.py", "-k", "taught or with_a_teacher"],
    "oracle": ["tests/test_oracle.py", "-k", PEOPLE],
    "unlabelled": ["tests/test_oracle.py::test_a_target_without_labels_needs_no_oracle[cbst]"],
    "golden-ripu": [f"{GOLDEN}::test_ripu_steps_equal_the_recorded_ones[v2]"],
    "golden-stal": [f"{GOLDEN}::test_stal_steps_equal_the_recorded_ones[B]"],
    "all": ["tests"],
}

TABLE = r"""
annotation | parts | the oracle answers every pixel of the image
-asked.cpu(), dataset.labels(index)
+torch.ones_like(asked.cpu()), dataset.labels(index)
annotation | annotation parts | the oracle is asked for the whole image, the ledger counts the picks
-answers = oracle(asked)
+answers = oracle(torch.ones_like(asked))
annotation | annotation parts | what the last round asked is not seen
-        for number in range(1, self._upto(upto) + 1):
-            mask |=
+        for number in range(1, self._upto(upto)):
+            mask |=
annotation | annotation parts | the labels of the last round are never read
-        for number in range(1, self._upto(upto) + 1):
-            answers =
+        for number in range(1, self._upto(upto)):
+            answers =
annotation | annotation parts | all complete rounds are read, whatever `upto` says
-return self.complete() if upto is None else upto
+return self.complete()
annotation | annotation parts next-step | a round's answers replace those of earlier rounds
-union = torch.where(answers != IGNORE, answers, union)
+union = answers
annotation | annotation parts | asked pixels without a truth are counted as labelled
-labelled = int((answers != IGNORE).sum())
+labelled = int(asked.sum())
annotation | annotation | `trained` counts pixels before resizing
-cells = resize_labels(answers, training_size, keep_labels) != IGNORE
+cells = answers != IGNORE
annotation | annotation | `trained` forgets --keep-labels
-resize_labels(answers, training_size, keep_labels)
+resize_labels(answers, training_size)
annotation | parts | a pseudo-label beats a bought label
-return torch.where(bought != IGNORE, bought, guessed)
+return torch.where(guessed != IGNORE, guessed, bought)
annotation | parts | pseudo-labels pass for bought labels
-guessed + PSEUDO, IGNORE)
+guessed, IGNORE)
annotation | annotation | an interrupted round counts as complete
-        if kind is None:
-            complete_folder
+        if True:
+            complete_folder
annotation | annotation | what an interrupted round left is mixed into the next try
-    shutil.rmtree(work, ignore_errors=True)
-    try:
-        for part in parts:
-            (work / part).mkdir(parents=True)
+    try:
+        for part in parts:
+            (work / part).mkdir(parents=True, exist_ok=True)
annotation | annotation | an image asked in two rounds is counted twice
-len({image for r in records for image in r["images"]})
+sum(len(r["images"]) for r in records)
annotation | annotation parts | the class entropy is of asked pixels, not of labelled ones
-.double() / max(1, total["labelled"])
+.double() / max(1, total["asked"])
oracle | oracle | a polygon holds the pixels that it touches
-np.ceil(x - 0.5)
+np.ceil(x - 1)
oracle | oracle | rows and columns of a polygon change places
-(x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
+(y0, x0), (y1, x1) = points.T, np.roll(points, -1, axis=0).T
oracle | oracle | earlier shapes lie over later ones
-enumerate(content["shapes"], 1)
+enumerate(content["shapes"][::-1], 1)
oracle | oracle | asked pixels in no shape count as answered
-np.full(size, IGNORE if whole else NO_ANSWER, np.uint8)
+np.full(size, IGNORE, np.uint8)
oracle | oracle | wrong answers are left out without a word
-    if not s.accept_partial:
-        refuse
+    if False:
+        refuse
oracle | oracle | the first problem ends the check
-        problems += given.problems
+        problems = problems or given.problems[:1]
oracle | oracle | of two answers the first is taken
-    if len(given) > 1:
+    if False:
oracle | oracle | a shape of no class is left out, what lies below it counts
-        labels[mask] = NO_ANSWER if value is None else value
+        labels[mask] = labels[mask] if value is None else value
oracle | oracle | a picture of another size is cut
-    if tuple(labels.shape) != size:
+    if False:
oracle | oracle | the open round is not put away
-            os.replace(folder, aside)
+            pass
oracle | oracle | a changed question is asked all the same
-    content = checked_bytes(path, record["files"][f"queries/{image_id}.png"])
+    content = path.read_bytes()
oracle | oracle | what was not asked is merged
-labels = torch.where(asked, labels, torch.tensor(IGNORE, dtype=torch.uint8))
+labels = labels
oracle | oracle | "unknown" is road
-        return IGNORE
+        return 0
annotate | annotate | every name of this machine may be asked for
-if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", host):
+if False:
annotate | annotate | every token will do
-if not secrets.compare_digest(self.path[: len(own)].encode(), own.encode()):
+if False:
annotate | annotate | other machines may ask
-super().__init__(("127.0.0.1", port), Handler)
+super().__init__(("", port), Handler)
annotate | annotate | the last of two tabs wins
-        if picks[pick] != was:
+        if False:
annotate | annotate | two tabs write at once
-        with self.lock:
-            state = self.state(index)
+        with threading.Lock():
+            state = self.state(index)
annotate | annotate | the page overwrites the answers of other programs
-            if state["elsewhere"]:
+            if False:
annotate | annotate | a first answer is a correction
-any(old is not None and old != new for
+any(old != new for
annotate | annotate | rows and columns of a pick change places
-return [(r, c) for r in rows for c in cols]
+return [(c, r) for r in rows for c in cols]
annotate | annotate | a break counts as work
-min(max(float(value), 0.0), LONGEST)
+float(value)
annotate | annotate | an answer is told to be saved before it is
-            self.write(index, state)
+            pass
datasets | datasets | an unread label decides whether its image is there
-        if not reads_labels and not _fits(label, size):
+        if False:
datasets | datasets | an unread label changes the fingerprint
-label = sample.label if self.reads_labels else None
+label = sample.label
datasets | datasets | JPEGs are found in small letters only
-folder.glob(pattern) if path.suffix.lower() in PICTURES]
+folder.glob(pattern) if path.suffix in PICTURES]
rounds | unlabelled | pseudo-labels are judged by labels that must be there
-target.samples[index].id, target.truth(index)
+target.samples[index].id, target.labels(index)
rounds | schedules | RIPU asks from the first step on
-else (0.25, 0.45)
+else (0.0, 0.45)
rounds | schedules | source-free runs ask as late as the others
-(0, 8 / 30) if s.source_free
+(0, 0.45) if s.source_free
rounds | schedules | pseudo-labels are renewed from the first query on
-first = queries[-1]
+first = queries[0]
rounds | schedules | RIPU's 40 pixels are for all images together
-return s.pixels * len(sizes)
+return s.pixels
rounds | schedules parts | the official formula asks 40 pixels an image, not 105
-s.pixels / s.rounds / seen * h * w
+s.pixels / s.rounds
rounds | schedules parts | the budget is checked per round, not over all rounds
-(budget - asked_before) // area
+budget // area
rounds | schedules | a round rounds its share down
-min(math.ceil(budget / s.rounds / area),
+min(math.floor(budget / s.rounds / area),
rounds | schedules parts | the first round may spend everything
-min(math.ceil(budget / s.rounds / area),
+min(math.ceil(budget / area),
rounds | schedules parts | a region is taken for (k+1)^2 pixels
-(2 * s.radius + 1) ** 2
+(s.radius + 1) ** 2
rounds | schedules parts | a pixel pick is taken for a region
-area = 1 if s.unit == "pixel" else (
+area = (
rounds | parts | CBDA forgets what earlier rounds spent
-count = regions_due(whole, s, sum(record["asked"] for record in records))
+count = regions_due(whole, s, 0)
rounds | parts ripu | an image's budget forgets what earlier rounds spent
-s, int(before.sum()))
+s, 0)
rounds | parts | the balance is relative to what was asked so far, not to the budget
-acquisition.class_weights(counts, whole)
+acquisition.class_weights(counts, max(1, sum(r["asked"] for r in records)))
rounds | parts | a class of weight 0 is still asked
-return score.masked_fill((weights == 0).to(score.device)[prediction.long()], -math.inf)
+return score
rounds | parts cbda | `both` does not balance
-cbda in ("balance", "both")
+cbda == "balance"
settings | parts cbda | `both` has no common budget
-self.cbda in ("dynamic", "both")
+self.cbda == "dynamic"
rounds | parts | CBDA's common budget is dealt out equally to the images
-due = count
+due = count // len(target)
rounds | parts cbda | ties with the lowest score that can still win are left out
-score < pool.floor
+score <= pool.floor
rounds | parts | centres asked in earlier rounds block nothing
-acquisition.dilate(before.to(run.device), s.radius) if number > 1 else None
+None
rounds | parts | later rounds may overlap the regions of earlier ones
-acquisition.dilate(before.to(run.device), s.radius)
+before.to(run.device)
rounds | parts | a pick blocks k, not 2k
-block_radius = s.radius if s.unit == "pixel" else 2 * s.radius
+block_radius = s.radius
rounds | parts | a pixel pick blocks 2k, not k
-block_radius = s.radius if s.unit == "pixel" else 2 * s.radius
+block_radius = 2 * s.radius
rounds | parts pixel-run | a pixel pick asks its whole region
-paint_radius = 0 if s.unit == "pixel" else s.radius
+paint_radius = s.radius
rounds | parts | --rules code and --rules paper swap their tie-breaks
-    if s.rules == "code":
-        return None
+    if s.rules != "code":
+        return None
rounds | parts | every round draws ties alike
-, mix_seed(s.seed, 4, number, index)
+, mix_seed(s.seed, 4, index)
rounds | parts random | the strategy random asks the same places of every image
-seed = mix_seed(s.seed, 3, number, index)
+seed = mix_seed(s.seed, 3, number)
rounds | parts | ties of regions look at the centre's uncertainty only
-radius, seed = 0 if s.unit == "pixel" else s.radius,
+radius, seed = 0,
rounds | parts ripu | the target is scored and pseudo-labelled in train mode
-    model.eval()
-    images = load(
+    images = load(
rounds | parts ripu | after a query the network stays in eval mode
-model.train(training)
+pass
rounds | parts ripu | queries see the target at its full size, not at --target-size
-network_logits(model, images, s.target_hw, device)
+network_logits(model, images, tuple(images.shape[-2:]), device)
rounds | parts | --label-scale is ignored
-int(length * s.label_scale)
+length
rounds | parts | --label-flip is ignored
-size, device, s.label_flip)
+size, device, False)
rounds | parts | the portion never grows
-portion_of_round(number - 1,
+portion_of_round(0,
rounds | parts | the portion is one round ahead
-portion_of_round(number - 1,
+portion_of_round(number,
rounds | parts | ST has a threshold for each class, as CBST
-balanced=kind != "st"
+balanced=True
rounds | parts | CBST-SP labels without the prior
-cbst_pseudo_labels(prob, thresholds, at_size(prior, prob), s.rules)
+cbst_pseudo_labels(prob, thresholds, None, s.rules)
rounds | parts | CBST-SP ranks without the prior
-histogram.add(prob, at_size(prior, prob))
+histogram.add(prob)
rounds | parts cbst | pseudo-labels follow --rules paper always
-at_size(prior, prob), s.rules)
+at_size(prior, prob))
rounds | parts pseudo | bought pixels are pseudo-labelled
-labels.masked_fill(bought(index) != IGNORE, IGNORE)
+labels
rounds | parts | the LEAST uncertain images are asked
-key=lambda i: -score[i])[: quotas[group]]
+key=lambda i: score[i])[: quotas[group]]
rounds | parts | the quotas of the groups are ignored
-    return chosen, quotas
+    return sorted(left, key=lambda i: -score[i])[:count], quotas
rounds | parts run-stal | quotas follow all images of a group, not the remaining ones
-sizes = {group: len(members) for group, members in groups.items()}
+sizes = {g: sum(x.group == g for x in target.samples) for g in groups}
rounds | parts run-stal | the first loop asks by uncertainty
-if number > 1 and s.image_queries == "uncertainty":
+if s.image_queries == "uncertainty":
rounds | parts | the second loop asks at random
-if number > 1 and s.image_queries == "uncertainty":
+if number > 2 and s.image_queries == "uncertainty":
rounds | parts run-stal | images that are labelled already are asked again
-enumerate(target.samples) if sample.id not in taken]
+enumerate(target.samples)]
rounds | parts run-stal | the student scores the images
-logits_of, teacher, share(left))
+logits_of, run.model, share(left))
stal | loops | the second loop starts from the student
-self.run.fresh_model() if self.s.restart else self.teacher
+self.run.fresh_model() if self.s.restart else self.run.model
stal | loops | --restart is ignored
-self.run.fresh_model() if self.s.restart else self.teacher
+self.teacher
stal | loops | with --restart the teacher stays
-        self.teacher.load_state_dict(begin.state_dict())
+        pass
stal | loops | SGD's momentum goes over into the next loop
-self.run.optimizer.state.clear()
+pass
stal | loops run-stal | images that are labelled now can still be cut from
-self.images.share.zero_()
+pass
stal | loops run-stal | the next loop mixes in what the last one drew
-        self.partners.reset()
-        if self.s.restart:
+        if self.s.restart:
stal | loops stal-code | --restart keeps the memory bank
-self.bank.count.zero_()
+pass
stal | loops stal-code | --restart keeps the confidences
-self.confidence.value.zero_()
+pass
stal | loops run-stal | a checkpoint lacks the image bank
-("teacher", "confidence", "images", "partners", "bank")
+("teacher", "confidence", "partners", "bank")
stal | loops run-stal | a checkpoint lacks what was drawn to be mixed in
-("teacher", "confidence", "images", "partners", "bank")
+("teacher", "confidence", "images", "bank")
stal | parts stal | --auxiliary is no weight
-return loss + s.auxiliary * extra
+return loss + extra
stal | parts assembly golden-stal | the auxiliary head's loss is left out
-return loss + s.auxiliary * extra
+return loss
stal | parts assembly | the main head has no hard pixels
-    loss = ohem_cross_entropy(logits, labels, s.ohem_threshold, s.ohem_pixels)
+    loss = ohem_cross_entropy(logits, labels, 1.0, s.ohem_pixels)
stal | parts | the paper's loss is weighted by confidence, too
-gamma = 2.0 if s.rules == "code" else 0.0
+gamma = 2.0 if s.rules == "code" else 1.0
stal | parts mixing golden-stal | --class-keep looks at the teacher's prediction
-keep_by_class(logits.argmax(1), state
+keep_by_class(prob.argmax(1), state
stal | stal | --class-keep keeps the confident classes
-return u >= (1 - rate)[prediction.long()]
+return u >= rate[prediction.long()]
stal | parts stal assembly golden-stal | negatives of labelled pixels as if unlabelled
-*masks, labelled=len(labels))
+*masks, labelled=0)
stal | parts mixing stal loops | a crop's padding is counted in the contrastive percentiles
-contrastive_masks(labels, pseudo, uncertainty, size, counts=inside)
+contrastive_masks(labels, pseudo, uncertainty, size)
stal | stal | reliable and unreliable pixels change places
-for s in (share, 1 - share))
+for s in (1 - share, share))
stal | parts | pseudo-labels come from a teacher in train mode
-    teacher.eval()
-    with run.autocast():
+    with run.autocast():
stal | parts mixing | the teacher stays in eval mode
-    teacher.train()
-    return
+    return
stal | parts loops golden-stal | the teacher's features come from eval mode
-logits, features, _ = teacher(images, extras=True)
+logits, features, _ = teacher.eval()(images, extras=True)
stal | mixing | CutMix cuts the images but not the logits
-cutmix(images, others.images, boxes), cutmix(own, other, boxes)
+cutmix(images, others.images, boxes), own
stal | mixing | CutMix cuts the logits but not the images
-mixed = cutmix(images, others.images, boxes), cutmix(own
+mixed = images, cutmix(own
stal | mixing | CutMix leaves the truth
-return *mixed, cutmix(truth, others.truth, boxes)
+return *mixed, truth
stal | mixing | CutMix's box comes from the own prediction
-prediction = other.argmax(1)
+prediction = own.argmax(1)
stal | stal mixing | the box keeps the own image, the rest is the other's
-inside[:, None], other, own)
+inside[:, None], own, other)
stal | stal mixing | pasted pixels keep their old labels
-return images, torch.where(pasted, other_labels, labels)
+return images, labels
stal | mixing | every image of a batch is pasted over
-u[: len(images)] >= 0.5
+u[: len(images)] >= 1.0
stal | mixing stal parts | terrain is not pasted, but vegetation
-if c not in (0, 1, 2, 8, 10))
+if c not in (0, 1, 2, 9, 10))
stal | mixing | one class is drawn to be pasted, not three
-PASTED = 3
+PASTED = 1
stal | stal mixing | confident classes are drawn more often
-return ((1 - confidence).clamp(min=0) ** power).softmax(0)
+return (confidence.clamp(min=0) ** power).softmax(0)
stal | mixing stal | copy-paste draws with the power of CutMix
-class_chances(confidence[allowed], power=0.5)
+class_chances(confidence[allowed])
stal | stal | absent classes are pulled to confidence 0
-self.value = torch.where(number > 0, now, self.value)
+self.value = now
stal | stal loops | confidences follow ten times as fast
-momentum: float = 0.999
+momentum: float = 0.99
stal | mixing stal | an image is drawn whatever it holds
-nth(holds | ~holds.any(), u[1])
+nth(torch.ones_like(holds), u[1])
stal | mixing run-stal | a mixed-in image is augmented alike in every step
-(step * self.batch + n, *row)
+(n, *row)
stal | mixing | pixels without truth of a mixed-in image count as padding
-seed, partial(truth_inside, target))
+seed)
stal | mixing loops run-stal | every step has the same random numbers
-mix_seed(s.seed, 20, step, rank_and_world()[0])
+mix_seed(s.seed, 20, rank_and_world()[0])
stal | mixing | what a crop adds is a class in the image bank
-.argmax(1).masked_fill(truth == IGNORE, IGNORE)
+.argmax(1)
loop | run-stal | the student's scores are reported
-teachers = evaluate(teacher, validation,
+teachers = evaluate(run.model, validation,
loop | schedules | poly has the power 1
-power: float = 0.9
+power: float = 1.0
loop | next-step | bought labels are read from the next checkpoint on
-step in (start, *schedule, *pseudo_steps)
+(step == start or step % s.checkpoint_every == 0)
loop | next-step | the last round's labels are not trained on
-bought = partial(bought_labels, target, rounds, number)
+bought = partial(bought_labels, target, rounds, max(0, number - 1))
loop | full assembly | `full` sees no label of the target
-known = None  # the dataset's own labels
+known = bought
loop | source-only assembly | source-only passes target images, too
-target = None if s.strategy == "source-only" else open_dataset
+target = open_dataset
loop | source-free | source-free runs train on the source
-source = None if s.source_free else open_dataset
+source = open_dataset
loop | pseudo | pseudo-labels replace the bought labels
-known = partial(bought_and_pseudo, target, rounds, number, pseudo, pseudo_number)
+known = partial(bought_and_pseudo, target, rounds, 0, pseudo, pseudo_number)
loop | pseudo assembly parts | the first pseudo-labels are kept
-known = partial(bought_and_pseudo, target, rounds, number, pseudo, pseudo_number)
+known = partial(bought_and_pseudo, target, rounds, number, pseudo, 1)
loop | pseudo-sp | --pseudo cbst-sp has no prior
-s.pseudo, prior, bought)
+s.pseudo, None, bought)
loop | assembly | the decay of RIPU ends with the run
-run.set_rate(poly(step, poly_length(s)))
+run.set_rate(poly(step, s.steps))
loop | assembly | RIPU's rate is constant
-run.set_rate(poly(step, poly_length(s)))
+run.set_rate(1.0)
loop | assembly | the rate is one step ahead
-run.set_rate(poly(step, poly_length(s)))
+run.set_rate(poly(step + 1, poly_length(s)))
loop | assembly | --consistency is no weight
-s.consistency * L["consistency"]
+L["consistency"]
loop | assembly | consistency and negative learning swap their weights
-                + s.consistency * L["consistency"]
-                + s.negative * L["negative"]
+                + s.negative * L["consistency"]
+                + s.consistency * L["negative"]
loop | assembly | negative learning is left out
-            + s.negative * L["negative"]
+
loop | assembly | --pseudo-weight is no weight
-s.pseudo_weight * L["pseudo"]
+L["pseudo"]
loop | golden-ripu | gradients of RIPU's steps add up
-        run.optimizer.zero_grad(set_to_none=True)
-        for source_part
+        for source_part
loop | assembly | CBST's loss weighs three times as much
-loss = cross_entropy(logits, labels)
+loss = 3 * cross_entropy(logits, labels)
loop | assembly | momentum is kept over CBST's rounds
-run.optimizer.state.clear()  # no momentum from the last round (D28)
+pass
loop | assembly rates run-cbst | gradients of CBST's steps add up
-        run.optimizer.zero_grad(set_to_none=True)
-        for ((images
+        for ((images
loop | golden-stal | gradients of STAL's steps add up
-        run.optimizer.zero_grad(set_to_none=True)
-        total.backward()
-        run.optimizer.step()
-        update_teacher
+        total.backward()
+        run.optimizer.step()
+        update_teacher
loop | parts golden-ripu | source and target logits change places
-else logits.pop(0) for batch
+else logits.pop() for batch
loop | parts golden-ripu | source and target pass apart although their sizes agree
-if len(given) == 2 and source[0].shape == target[0].shape:
+if False:
loop | parts | the source loss is on target labels
-cross_entropy(source_logits, source[1])
+cross_entropy(source_logits, (target or source)[1])
loop | parts | negative learning is on the source
-negative_learning(target_logits.softmax(1))
+negative_learning((target_logits if source is None else source_logits).softmax(1))
loop | parts | consistency is on the target
-local_consistency(source_logits, source[1], boundary_only=code)
+local_consistency(source_logits if target is None else target_logits, source[1], code)
loop | parts golden-ripu | consistency is at boundaries under --rules paper
-boundary_only=code)
+boundary_only=not code)
loop | schedules | the loss of bought labels holds the pseudo-labels, too
-labels.masked_fill(labels >= PSEUDO, IGNORE)
+torch.where((labels >= PSEUDO) & (labels != IGNORE), labels - PSEUDO, labels)
loop | ripu | a resumed run reads the source from the beginning
-batches(s, source, start, stream=1
+batches(s, source, 0, stream=1
loop | ripu next-step | each round begins the target from the beginning
-batches(s, target, step, stream=2
+batches(s, target, 0, stream=2
loop | ripu score | the last step is not saved
-if step % s.checkpoint_every == 0 or step == s.steps:
+if step % s.checkpoint_every == 0:
loop | rates | CBST's rate stays
-cbst_rate(number - 1)
+cbst_rate(0)
loop | rates | CBST's rate falls in the first round already
-cbst_rate(number - 1)
+cbst_rate(number)
loop | parts | CBST's source share does not grow
-portion_of_round(n, s
+portion_of_round(0, s
loop | rates run-cbst | CBST trains on the first round's number of source images
-number, chosen[number - 1], local)
+number, chosen[0], local)
loop | parts rates run-cbst | CBST trains on the first round's pseudo-labels
-labels_of = partial(pseudo_labels, target, rounds, number)
+labels_of = partial(pseudo_labels, target, rounds, 1)
loop | parts run-cbst | CBST trains on the target's truth
-mix_seed(s.seed, 7, number), labels_of)
+mix_seed(s.seed, 7, number))
loop | parts | patches are mined in the source
-transform_of(s, 1), mix_seed(s.seed, 6, number)
+transform_of(s, 1, at), mix_seed(s.seed, 6, number)
loop | run-st run-cbst-sp | ST runs as CBST
-number, s.strategy, prior)
+number, "cbst-sp" if s.strategy == "cbst-sp" else "cbst", prior)
loop | equations run-cbst-sp | the priors of CBST-SP are those of the target's truth
-                    prior = source_prior(s, source, device)
-                label_target
+                    prior = source_prior(s, target, device)
+                label_target
loop | run-cbst rates | CBST starts from the weights before the source training
-return replace(s, init=str(last))
+return s
loop | run-cbst equations | the source training of CBST sees the target's labels
-        strategy="source-only",
-        steps=
+        strategy="full",
+        steps=
loop | schedules parts | an epoch leaves out what fills no batch
-[-(-s.epochs * n // s.batch) for n in images]
+[s.epochs * n // s.batch for n in images]
loop | loops | the second loop goes on without a beginning
-            if number > 1:
-                state.begin_loop()
+            if number > 2:
+                state.begin_loop()
loop | loops | the teacher is never updated
-update_teacher(state.teacher, run.model, local, s.ema)
+pass
loop | loops golden-stal | the teacher's largest decay is 0.9
-update_teacher(state.teacher, run.model, local, s.ema)
+update_teacher(state.teacher, run.model, local, min(s.ema, 0.9))
loop | loops | the teacher's decay is a step ahead
-update_teacher(state.teacher, run.model, local, s.ema)
+update_teacher(state.teacher, run.model, local + 1, s.ema)
loop | loops | the teacher's decay counts the steps of all loops
-update_teacher(state.teacher, run.model, local, s.ema)
+update_teacher(state.teacher, run.model, step, s.ema)
loop | loops | the teacher follows the student of the step before
-        run.optimizer.step()
-        update_teacher(state.teacher, run.model, local, s.ema)
+        update_teacher(state.teacher, run.model, local, s.ema)
+        run.optimizer.step()
loop | loops golden-stal | pseudo-labels come from the student
-plain_logits(run, state.teacher, plain, others)
+plain_logits(run, run.model, plain, others)
loop | loops | confidences are not updated
-state.confidence.update(logits.detach().softmax(1), labels)
+pass
loop | loops | the image bank is not updated
-state.images.update(index, predicted(weak, truth))
+pass
loop | loops | the memory bank is not updated
-bank.add(*contrastive_keys(teacher_features, sets[2], bank.most))
+pass
loop | loops golden-stal | the memory bank takes reliable pixels
-contrastive_keys(teacher_features, sets[2], bank
+contrastive_keys(teacher_features, sets[0], bank
loop | loops golden-stal | the memory bank takes the student's features
-contrastive_keys(teacher_features, sets[2], bank
+contrastive_keys(features.detach(), sets[2], bank
loop | loops | contrast begins at once
-if local / length >= s.contrast_start:
+if local >= 0:
loop | loops | contrast never begins
-if local / length >= s.contrast_start:
+if local / length > 1:
loop | loops | --contrast-start is a share of all loops
-if local / length >= s.contrast_start:
+if step / s.steps >= s.contrast_start:
loop | loops assembly golden-stal | the share without pseudo-label stays
-drop_share(local, length, s.drop)
+drop_share(0, length, s.drop)
loop | loops assembly golden-stal | the share without pseudo-label falls over all loops
-drop_share(local, length, s.drop)
+drop_share(step, s.steps, s.drop)
loop | loops mixing assembly | a crop's padding is pseudo-labelled
-reliable_pseudo_labels(prob, drop, s.rules, inside)
+reliable_pseudo_labels(prob, drop, s.rules)
loop | loops assembly mixing golden-stal | the student sees the unlabelled images without CutMix
-logits, student_mixed, _ = run.forward(mixed, extras=True)
+logits, student_mixed, _ = run.forward(plain, extras=True)
loop | loops assembly mixing golden-stal | the teacher sees the unlabelled images without CutMix
-_, teacher_mixed = train_mode(state.teacher, mixed)
+_, teacher_mixed = train_mode(state.teacher, plain)
loop | loops assembly mixing golden-stal | the teacher sees the labelled images without pasting
-teacher_logits, teacher_features = train_mode(state.teacher, images)
+teacher_logits, teacher_features = train_mode(state.teacher, batch[0])
loop | loops assembly mixing | pasted classes are drawn without confidences
-images, labels = paste(batch, other, state.confidence.value, generator)
+images, labels = paste(batch, other, state.confidence.value * 0, generator)
loop | assembly | lambda_u and lambda_c change places
-s.unlabelled * L["unlabelled"] + s.contrast * L["contrastive"]
+s.contrast * L["unlabelled"] + s.unlabelled * L["contrastive"]
loop | assembly | the contrastive loss is left out
-s.unlabelled * L["unlabelled"] + s.contrast * L["contrastive"]
+s.unlabelled * L["unlabelled"]
loop | assembly loops | STAL's rate falls over all loops
-run.set_rate(poly(local, length))
+run.set_rate(poly(step, s.steps))
loop | assembly | STAL's rate is constant
-run.set_rate(poly(local, length))
+run.set_rate(1.0)
loop | loops run-stal | every loop asks as many images as the first
-rounds, number, counts[number - 1])
+rounds, number, counts[0])
loop | loops run-stal | the student chooses the images
-ask_images(s, run, state.teacher, target
+ask_images(s, run, run.model, target
loop | parts loops run-stal | a loop is labelled with the last round's images only
-rows = [row for n in range(1, number + 1) for row in rounds.record(n)["images"].items()]
+rows = [row for n in range(number, number + 1) for row in rounds.record(n)["images"].items()]
loop | parts | labelled target images have no label
-bought, truth = partial(bought_labels, target, rounds, number),
+bought, truth = partial(bought_labels, target, rounds, number - 1),
loop | parts | labelled images are unlabelled, too
-enumerate(target.samples) if sample.id not in answered]
+enumerate(target.samples)]
loop | parts | asked images are not repeated
-repeated = [known[i % len(known)] for i in range(length)]
+repeated = known
loop | parts | pasted images have the scale of the others
-TrainingView(source, transform_of(s, 1, scale=small), seeds[3])
+TrainingView(source, transform_of(s, 1), seeds[3])
loop | schedules | STAL's loops share the budget equally
-    if s.rounds == 3:
-        shares =
+    if s.rounds == 0:
+        shares =
loop | parts run-stal | --source-images takes the first ones
-sorted(order[: s.source_images or len(source)])
+range(min(len(source), s.source_images or len(source)))
loop | run-stal | the first loop's scores are reported
-last = dict(scores[-1])
+last = dict(scores[0])
run | ripu | a resumed run's sampler counts steps, not images
-    sampler.position = step * s.batch
-    transform
+    sampler.position = step
+    transform
run | run-stal | a resumed loop's sampler counts steps, not images
-    sampler.position = step * s.batch
-    return endless
+    sampler.position = step
+    return endless
run | ripu parts assembly | source images are resized to the target's size
-size=s.source_hw if stream == 1 else s.target_hw,
+size=s.target_hw,
run | parts ripu pixel-run | --keep-labels is ignored in training
-keep_labels=stream == 2 and s.keep_labels,
+keep_labels=False,
run | parts loops | --flip is ignored
-flip=s.flip,
+flip=False,
run | parts | STAL's scales are uniform
-halves=s.strategy == "stal",
+halves=False,
run | parts run-cbst | mined patches are ignored
-crop_at=crop_at,
+crop_at=None,
run | ripu parts assembly | class-balanced sampling is ignored
-if stream == 1 and s.source_sampling == "balanced":
+if False:
run | next-step | the whole truth of the target is trained on
-mix_seed(s.seed, stream, 1), labels_of, cache)
+mix_seed(s.seed, stream, 1), None, cache)
run | assembly | the heads have the backbone's rate
-self.s.lr * group["factor"] * factor
+self.s.lr * factor
run | assembly | no momentum
-momentum=s.momentum,
+momentum=0.0,
run | assembly | no weight decay
-weight_decay=s.weight_decay,
+weight_decay=0.0,
run | v3plus | a resumed run draws other dropout
-torch.set_rng_state(own["random"])
+pass
run | ripu | a resumed run has no momentum
-self.load_optimizer(state["optimizer"])
+pass
run | ripu | a resumed run begins one step late
-say(f"resumed from step {step}")
-        return step
+say(f"resumed from step {step}")
+        return step + 1
run | run-stal | a resumed run begins with a new teacher and empty banks
-part.load_state_dict(own[name])
+pass
run | run-stal | a resumed run has lost the scores of earlier loops
-self.scores, self.before = state["scores"], state["before"]
+self.before = state["before"]
run | ripu | a checkpoint lacks the losses since the last line of the log
-"history": [row.cpu() for row in self.history],
+"history": [],
run | ripu | on resume the line of the checkpoint's step is lost
-["step"] <= step
+["step"] < step
run | seed parts | the first weights do not depend on --seed
-mix_seed(self.s.seed, 0))
-        model
+mix_seed(0, 0))
+        model
run | pixel-run parts | --precision bfloat16 is ignored
-enabled=self.half
+enabled=False
run | source-free parts assembly | batch norm is live whatever the network starts from
-start.get("batch_norm", "live" if live else "frozen")
+start.get("batch_norm", "live")
run | assembly loops run-stal | STAL has no auxiliary head
-"auxiliary": s.auxiliary > 0}
+"auxiliary": False}
run | stal-code loops | STAL's network has no multi-grid
-network["multi_grid"] = (2, 2, 4)
+network["multi_grid"] = (1, 1, 1)
run | assembly ripu | the log shows the last step's losses, not their mean
-values.mean(0).tolist()
+values[-1].tolist()
settings | schedules assembly | negative learning weighs 0.1
-    negative: float = option(
-        1.0,
+    negative: float = option(
+        0.1,
settings | assembly | consistency weighs 1
-    consistency: float = option(
-        0.1,
+    consistency: float = option(
+        1.0,
settings | schedules full assembly | `full` trains with RIPU's losses
-"full": {"consistency": 0.0, "negative": 0.0},
+"full": {},
settings | schedules source-only assembly | source-only trains with RIPU's consistency
-"source-only": {"lr": 5e-4, "steps": 20_000, "consistency": 0.0, "negative": 0.0},
+"source-only": {"lr": 5e-4, "steps": 20_000},
settings | schedules | pixel queries of RIPU have radius 1
-"radius": 32, "pixels": 40
+"radius": 1, "pixels": 40
settings | schedules parts | CBDA's budget is RIPU's
-"net": "deeplabv3plus", "budget": 0.05}
+"net": "deeplabv3plus"}
settings | parts | the decay of source-free runs is as long in steps as the others'
-published = SOURCE_FREE["steps"] if s.source_free else Settings.steps
+published = Settings.steps
settings | schedules parts | the presets beat what is given
-{**merged, **given}
+{**given, **merged}
settings | parts rates | CBST's rate is RIPU's
-    "lr": 1e-4,
-    "rounds": 6,
+    "rounds": 6,
settings | parts rates | the portion grows to everything
-    portion_max: float = option(
-        0.5,
+    portion_max: float = option(
+        1.0,
settings | parts | STAL is tested on whole images
-"protocol": "sliding",
+"protocol": "whole",
settings | parts assembly | STAL's batch norm is that of --init
-        "batch_norm": "live",
-        "epochs": 200,
+        "epochs": 200,
settings | parts | STAL has RIPU's head
-"head": "stal",
+"head": "ripu",
settings | parts | hard pixels of STAL are those below 0.9
-    ohem_threshold: float = option(
-        0.7,
+    ohem_threshold: float = option(
+        0.9,
settings | parts schedules | the source is sampled uniformly
-        "balanced",
-        "schedule",
+        "uniform",
+        "schedule",
evaluation | evaluation | images are scored in train mode
-    model.eval()
-    matrix =
+    matrix =
evaluation | evaluation source-only | after a score the network stays in eval mode
-    model.train(training)
-    if not all_reduce
+    if not all_reduce
evaluation | evaluation | the test size is ignored
-size = protocol.size or tuple(images.shape[-2:])
+size = tuple(images.shape[-2:])
evaluation | evaluation parts | --test-size is ignored
-s.test_hw or (s.target_hw if s.protocol == "ripu" else None)
+s.target_hw if s.protocol == "ripu" else None
evaluation | evaluation | the mirror image's prediction is not mirrored back
-return logits.flip(-1) if mirror else logits
+return logits
evaluation | evaluation | no test with the mirror image
-size, device, protocol.flip)
+size, device, False)
evaluation | evaluation | windows average probabilities
-logits = deeplab.upsample(model(x[place]).float(), (window, window))
+logits = deeplab.upsample(model(x[place]).float().softmax(1), (window, window))
evaluation | evaluation | windows are added up, not averaged
-return (total / hits)[
+return total[
evaluation | evaluation | classes that are only predicted count
-present = matrix.sum(1) > 0
+present = union > 0
evaluation | evaluation | IoU is recall
-union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
+union = matrix.sum(1)
evaluation | evaluation | the confusion matrix is transposed
-labels[valid].long() * num_classes + prediction[valid].long()
+prediction[valid].long() * num_classes + labels[valid].long()
evaluation | evaluation | absent classes count as 0
-kept = kept[~kept.isnan()]
+kept = kept.nan_to_num(0)
evaluation | evaluation | mIoU16 and mIoU13 are over all classes
-kept = iou(counted)[list(members)]
+kept = iou(counted)[: len(members)]
evaluation | evaluation | the last image is not scored
-own = share(range(len(dataset)))
+own = share(range(len(dataset) - 1))
evaluation | run-stal evaluation | the student of a STAL run is scored
-("teacher" if "network" in content and "teacher" in content else "model")
+"model"
evaluation | evaluation | exported predictions are train ids
-prediction, name = to_label_ids(prediction), f"{sample.id}_pred_labelIds.png"
+name = f"{sample.id}_pred_labelIds.png"
acquisition | acquisition | impurity plus uncertainty
-return impurity * uncertainty, impurity, uncertainty
+return impurity + uncertainty, impurity, uncertainty
acquisition | acquisition | regions at the border are divided by the whole square
-return box_sum(values.float(), k) / region_area(values.shape, k, values.device)
+return box_sum(values, k) / (2 * k + 1) ** 2
acquisition | parts | of equal scores the least uncertain wins
-*(-ties[::-1, chosen])
+*ties[::-1, chosen]
acquisition | parts | the last tie-break decides first
-*(-ties[::-1, chosen])
+*(-ties[:, chosen])
acquisition | acquisition | CBDA's weights never reach 0
-(1 - counts / share.clamp(min=1e-12)).clamp(min=0)
+1 / (1 + counts / share.clamp(min=1e-12))
acquisition | acquisition | pixel queries have the region's uncertainty
-k) * entropies
+k) * region_uncertainty(entropies, k)
acquisition | acquisition parts | the sure pixels have the largest margin score
-region_mean(1 - (best.select(-3, 0) - best.select(-3, 1)), k)
+region_mean(best.select(-3, 0) - best.select(-3, 1), k)
acquisition | acquisition parts | pixel picks of the baseline entropy have a region's score
-entropy_score(logits, 0 if unit == "pixel" else k),
+entropy_score(logits, k),
acquisition | acquisition parts | pixel picks have the region's score and regions the pixel's
-if unit == "pixel" else ripu_score(logits, k)[0]
+if unit == "region" else ripu_score(logits, k)[0]
acquisition | stal | an image is as uncertain as its most uncertain pixel
-pixel_entropy(prob).mean((-2, -1))
+pixel_entropy(prob).amax((-2, -1))
acquisition | stal | missing images go to the smallest remainders
-key=lambda group: -shares[group][1]
+key=lambda group: shares[group][1]
losses | losses | the mean is over all pixels, labelled or not
-return total / mean_count(labels != IGNORE)
+return total / labels.numel()
losses | losses | negative learning looks at likely classes
-unlikely = prob.detach() < threshold
+unlikely = prob.detach() > threshold
losses | losses | consistency is a squared distance
-(prob - mean).abs().sum(1)
+(prob - mean).pow(2).sum(1)
losses | stal | no more than the hardest pixels are kept
-.values.clamp(min=threshold)
+.values.clamp(max=threshold)
losses | stal | the unlabelled loss is not thinned
-else (labels != IGNORE) & keep
+else labels != IGNORE
losses | stal | a full memory bank is never overwritten in order
-self.pointer = (self.pointer + filled) % self.sizes
+self.pointer = self.pointer % self.sizes
losses | stal | unlabelled negatives are likely classes
-unlikely = (rank >= low_rank) & (rank < high_rank)
+unlikely = rank < low_rank
losses | stal | anchors may be unsure
-members & (chance > threshold),
+members,
losses | stal | similarities are multiplied by the temperature
-to_negatives], 1) / temperature
+to_negatives], 1) * temperature
selftraining | cbst | the threshold leaves out the portion
-rank = (portion * counts
+rank = ((1 - portion) * counts
selftraining | cbst | the paper's rule labels pixels at the threshold
-weighted > 1 if rules == "paper"
+weighted >= 1 if rules == "paper"
selftraining | stal | the share without pseudo-label grows
-return start * (1 - epoch / epochs)
+return start * epoch / epochs
selftraining | stal | nearly everything is dropped
-percentile(uncertainty, 1 - drop, counts)
+percentile(uncertainty, drop, counts)
selftraining | stal | the teacher has the same decay from the first step on
-keep = min(1 - 1 / (step + 1), decay)
+keep = decay
selftraining | stal | teacher and student change their weights
-torch._foreach_add_(own, new, alpha=1 - keep)
+torch._foreach_add_(own, new, alpha=keep)
selftraining | cbst | the commonest classes are mined
-counts.argsort(stable=True)
+counts.argsort(stable=True, descending=True)
selftraining | cbst | priors say how frequent a class is
-prior = frequency / frequency.sum((1, 2), keepdim=True).clamp(min=1e-12)
+prior = frequency
datasets | datasets | Cityscapes' table: wall and fence change places
-    Class("wall", (102, 102, 156), 12, 21),
-    Class("fence", (190, 153, 153), 13, 5),
+    Class("wall", (102, 102, 156), 13, 21),
+    Class("fence", (190, 153, 153), 12, 5),
datasets | datasets parts | SYNTHIA's table: traffic light and traffic sign change places
-    Class("traffic light", (250, 170, 30), 19, 15),
-    Class("traffic sign", (220, 220, 0), 20, 9),
+    Class("traffic light", (250, 170, 30), 19, 9),
+    Class("traffic sign", (220, 220, 0), 20, 15),
datasets | datasets | GTA5's labels: person and rider change places
-        return read_label(sample.label, self.space)
+        table = torch.arange(256).to(torch.uint8)
+        table[[11, 12]] = table[[12, 11]]
+        labels = read_label(sample.label, self.space)
+        return table[labels.long()] if self.name == "gta5" else labels
datasets | datasets | Cityscapes' labels: person and rider change places
-        return read_label(sample.label, self.space)
+        table = torch.arange(256).to(torch.uint8)
+        table[[11, 12]] = table[[12, 11]]
+        labels = read_label(sample.label, self.space)
+        return table[labels.long()] if self.name == "cityscapes" else labels
datasets | datasets | ACDC's labels: person and rider change places
-        return read_label(sample.label, self.space)
+        table = torch.arange(256).to(torch.uint8)
+        table[[11, 12]] = table[[12, 11]]
+        labels = read_label(sample.label, self.space)
+        return table[labels.long()] if self.name == "acdc" else labels
datasets | datasets | SYNTHIA's classes are read from the channel of instances
-ids = raw[0].numpy()
+ids = raw[1].numpy()
datasets | datasets | a crop pads labels with road
-pad(labels, sides, value=IGNORE)
+pad(labels, sides, value=0)
datasets | datasets | labels are resized bilinearly
-F.InterpolationMode.NEAREST_EXACT
+F.InterpolationMode.BILINEAR
datasets | datasets | labels are read at a cell's corner
-F.InterpolationMode.NEAREST_EXACT
+F.InterpolationMode.NEAREST
datasets | datasets | the image is mirrored, its labels are not
-image, labels = image.flip(-1), labels.flip(-1)
+image = image.flip(-1)
datasets | datasets | the image is scaled, its labels are not
-labels = resize_labels(labels, (height, width), self.keep_labels)
+labels = resize_labels(labels, tuple(self.size or labels.shape), self.keep_labels)
datasets | datasets parts | scales are drawn uniformly, not half of them below 1
-if self.halves and low < 1 < high:
+if False:
datasets | datasets evaluation parts | colours in the order BGR
-F.to_dtype(image, torch.float32, scale=True)
+F.to_dtype(image.flip(-3), torch.float32, scale=True)
datasets | datasets evaluation | images are resized by nearest neighbour
-F.InterpolationMode.BICUBIC, antialias=True
+F.InterpolationMode.NEAREST
datasets | datasets | every pass has the same order
-rng = np.random.default_rng([self.seed, number])
+rng = np.random.default_rng([self.seed])
datasets | datasets | common classes are sampled more often
-weight = there / np.log(
+weight = there * np.log(
datasets | datasets | pseudo-labels hide bought labels that fall into their cell
-(small >= PSEUDO) & (bought != IGNORE)
+(small == IGNORE) & (bought != IGNORE)
deeplab | assembly deeplab | the heads have the backbone's rate
-head_factor=10.0
+head_factor=1.0
deeplab | deeplab | maps are resized without align_corners
-mode="bilinear", align_corners=True
+mode="bilinear", align_corners=False
deeplab | deeplab | frozen batch norm has an epsilon
-partial(FrozenNorm, eps=eps)
+partial(FrozenNorm, eps=1e-5)
deeplab | deeplab | STAL's head reads context before detail
-(detail, context) if self.dense else (context, detail)
+(context, detail)
deeplab | deeplab | layer4 is dilated by 2
-before=4 if caffe else 2, after=4, grid
+before=4 if caffe else 2, after=2, grid
deeplab | deeplab | the fast gradient reads the weights unturned
-weight.to(grad.dtype).flip(2, 3)
+weight.to(grad.dtype)
deeplab | deeplab | the fast gradient of the weights is turned
-to_weight[:, 0, i, j] =
+to_weight[:, 0, 2 - i, j] =
deeplab | deeplab | dropout of 0.5
-DROPOUT = 0.1
+DROPOUT = 0.5
losses | processes-losses | each process divides by its own count
-return total / mean_count(labels != IGNORE)
+return total / (labels != IGNORE).sum().clamp(min=1)
rounds | processes-cbda | each process has a histogram of its own
-    histogram.add_up()
+    pass
rounds | processes-cbda | every process scores all images
-own, lost = share(range(len(target))), "; nothing was asked"
+own, lost = range(len(target)), "; nothing was asked"
run | processes-parts | the parts of a step are not averaged
-torch.stack(rows).mean(0)
+torch.stack(rows).sum(0)
loop | processes-parts | each part of a step counts whole
-(loss / s.accumulate).backward()
+loss.backward()
stal | stal-teacher | bought pixels get a pseudo-label, too
-reliable_pseudo_labels(prob, drop, s.rules, labels == IGNORE)
+reliable_pseudo_labels(prob, drop, s.rules)
stal | stal-teacher | labels are not mixed with their images
-[cutmix(x, x.roll(1, 0), boxes) for x in given]
+[cutmix(images, images.roll(1, 0), boxes), *given[1:]]
stal | stal-teacher | the teacher keeps its first running statistics
-        own.copy_(new)
+        pass
acquisition | acquisition | why a place was asked is read at another row
-    rows, cols = (places[:, None] + steps for places in at)  # (n,2k+1)
+    rows, cols = (at[0][:, None] + steps for places in at)  # (n,2k+1)
datasets | datasets | a cached image is another one
-        return torch.from_numpy(self.images[index].copy())
+        return torch.from_numpy(self.images[index - 1].copy())
deeplab | deeplab | running statistics move twice in checkpointed blocks
-        norm.momentum = 0.0
+        pass
"""


class Mutant(NamedTuple):
    """A wrong change and the tests that should notice it."""

    module: str
    tests: list[str]  # names of TESTS
    what: str
    old: str
    new: str


def mutants(table: str) -> list[Mutant]:
    """The rows of the table."""
    rows = []
    for block in re.split(r"\n(?=\w+ \| )", table.strip("\n")):
        head, *lines = block.split("\n")
        module, tests, what = head.split(" | ")
        old, new = ("\n".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")
        rows.append(Mutant(module, tests.split(), what, old, new))
    return rows


def changed(mutant: Mutant, folder: Path) -> str:
    """The text of its module with the change."""
    text = (folder / "alda" / f"{mutant.module}.py").read_text()
    if (times := text.count(mutant.old)) != 1:
        raise SystemExit(
            f"{mutant.module}: {mutant.what}: the text occurs {times} times:\n{mutant.old}"
        )
    text = text.replace(mutant.old, mutant.new)
    compile(text, f"{mutant.module}: {mutant.what}", "exec")
    return text


def copy_of_package() -> Path:
    """A copy of the package and its tests in a temporary folder."""
    work = Path(tempfile.mkdtemp(prefix="mutants-")).resolve()
    for part in ("alda", "tests"):
        shutil.copytree(ROOT / part, work / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, work / part)
    return work


def put(path: Path, text: str) -> None:
    """Writes a module, with a time of its own: what Python has compiled of it before is stale."""
    path.write_text(text)
    seconds = next(TIMES)
    os.utime(path, (seconds, seconds))


def pytest_in(work: Path, arguments: list[str]) -> None:
    """In a process of its own: runs pytest in the copy and ends the process with its status."""
    os.setsid()
    printed = os.open(work / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.chdir(work)
    os.environ["PYTHONPATH"] = sys.path[0] = str(work)
    status = 99
    try:
        import pytest

        import alda

        if Path(alda.__file__).parent == work / "alda":
            status = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_tests(work: Path, name: str, limit: float) -> tuple[str, str]:
    """How the tests `name` of TESTS end in the copy: "passed", the name of the test that failed,
    "TIMEOUT" or "BROKEN" (no test could run); and the last lines that pytest printed."""
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={work / 'tmp'}"]
    child = os.fork()  # torch is imported already: most of a short test's time
    if child == 0:
        pytest_in(work, [*options, *TESTS[name]])
    end, done = time.time() + limit, (0, 0)
    try:
        while not done[0] and time.time() < end:
            time.sleep(0.05)
            done = os.waitpid(child, os.WNOHANG)
    finally:
        if not done[0]:  # it and the processes that it started
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not done[0]:
        return "TIMEOUT", ""
    text, status = (work / "printed.txt").read_text(), os.waitstatus_to_exitcode(done[1])
    tail = "\n".join(text.splitlines()[-15:])
    if status == 0:
        return "passed", tail
    failed = re.search(r"^(?:FAILED|ERROR) tests/(test_\w+\.py::.*?)(?: - .*)?$", text, re.M)
    return (failed[1] if failed and status == 1 else "BROKEN"), tail


def check_unchanged(work: Path, names: list[str], limit: float) -> None:
    """Stops where a test fails without any change, or does not test the copy."""
    for name in names:
        end, tail = run_tests(work, name, limit)
        if end != "passed":
            raise SystemExit(f"without any change the tests {name!r} end with {end}:\n{tail}")


def try_mutant(work: Path, mutant: Mutant, names: list[str], limit: float) -> str:
    """Which test fails of it, or "SURVIVED"."""
    path = work / "alda" / f"{mutant.module}.py"
    original = path.read_text()
    put(path, changed(mutant, work))
    try:
        for name in names:
            end, tail = run_tests(work, name, limit)
            if end == "BROKEN":
                print(tail)
            if end != "passed":
                return end
        return "SURVIVED"
    finally:
        put(path, original)


def chosen_rows(args: argparse.Namespace) -> dict[int, Mutant]:
    """The mutants to make, by number."""
    rows = dict(enumerate(mutants(TABLE), 1))
    for mutant in rows.values():
        changed(mutant, ROOT)
        if unknown := set(mutant.tests) - set(TESTS):
            raise SystemExit(f"{mutant.what}: no tests are named {unknown}")
    if args.module:
        rows = {n: mutant for n, mutant in rows.items() if mutant.module == args.module}
    if args.only:
        spans = [part.split("-") for part in args.only.split(",")]
        wanted = {n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)}
        rows = {n: mutant for n, mutant in rows.items() if n in wanted}
    return rows


def table_of(rows: dict[int, Mutant], ends: dict[int, str]) -> str:
    """'module | made | surviving', a line a module and their sum; a timeout is no notice."""
    lines = ["module | made | surviving"]
    for module in [*dict.fromkeys(mutant.module for mutant in rows.values()), "all"]:
        made = [n for n, mutant in rows.items() if module in (mutant.module, "all")]
        lines.append(f"{module} | {len(made)} | {sum('::' not in ends[n] for n in made)}")
    return "\n".join(lines)


def make_all(rows: dict[int, Mutant], tests: dict[int, list[str]], limit: float) -> dict:
    """{number: how it ended} of the mutants, each tried with its `tests`; prints a line each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torchvision  # noqa: F401  (once for all the processes that run tests)

    work, ends, good = copy_of_package(), {}, set()
    try:
        for n, mutant in rows.items():
            check_unchanged(work, [name for name in tests[n] if name not in good], limit)
            good |= set(tests[n])
            began = time.time()
            ends[n] = try_mutant(work, mutant, tests[n], limit)
            seconds = f"{time.time() - began:.0f} s"
            print(f"{n:3d} {mutant.module} | {mutant.what} | {ends[n]} | {seconds}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ends


def main() -> int:
    """The command line; the exit status is 1 where a mutant survived."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Do the tests notice?"
    )
    parser.add_argument("--module", help="only mutants of alda/MODULE.py")
    parser.add_argument("--only", help="only these numbers, 17 or 17,20 or 17-30")
    parser.add_argument("--tests", help="these tests, not the table's: 'parts' or 'parts,cbst'")
    parser.add_argument("--timeout", type=float, default=180, help="seconds a run of tests [180]")
    parser.add_argument("--list", action="store_true", help="show the table and stop")
    args = parser.parse_args()
    rows = chosen_rows(args)
    if args.list:
        for n, mutant in rows.items():
            print(f"{n:3d} {mutant.module} | {mutant.what} | {' '.join(mutant.tests)}")
        return 0
    tests = {n: args.tests.split(",") if args.tests else m.tests for n, m in rows.items()}
    ends = make_all(rows, tests, args.timeout)
    print(table_of(rows, ends))
    return int(any("::" not in end for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
