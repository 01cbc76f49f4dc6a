"""The three training loops and the command line. How do the parts make a system?

    python -m alda.loop --src gta5 --tgt cityscapes --strategy ripu --root /data
    python -m alda.loop --root toy --strategy ripu                    # the miniature world, minutes on a CPU
    torch.load("runs/.../checkpoints/last.pt", weights_only=True)      # what a run leaves: see alda/run.py

`train_queries` is RIPU, CBDA and the baselines; `train_cbst` is CBST, CBST-SP and ST; `train_stal`
is STAL. RIPU: Xie et al., CVPR 2022, arXiv 2111.12940. CBDA: Schachtsiek, Rossi and Hannagan, arXiv
2311.14146. CBST: Zou et al., ECCV 2018, arXiv 1810.07911. STAL (ILM-ASSL): Guan and Yuan, arXiv
2301.13361.

Axes: N images, C classes, H rows, W columns; a batch is [images (N,3,H,W) float32, labels (N,H,W)
uint8].

Differences from papers and official code:

 D23. Live batch norm sees source and target of RIPU's step in one pass where both have one size, so
      that its running statistics are of the mixture it is tested with; a warning says so where the
      sizes differ (mIoU 32 instead of 40, RESULTS.md). With frozen batch norm one pass or two give
      the same. STAL's labelled and unlabelled images pass apart, as in its code.
 D24. STAL's schedule falls with every step (drop share, start of the contrastive loss), the code's
      with every epoch. Loops go on from the teacher; the code starts each from ImageNet
      (--restart).
 D25. STAL's third loop asks 84 images: 5 % of 2,975 is 148.75, the paper says 150.
 D26. Left out of STAL's code, with --rules code too: a consistency loss on the labelled images
      (teacher's argmax), and its source-free runs. Its lists of 2,000 source images are drawn by
      seed here.
 D27. Source-free RIPU keeps the paper's region radius 1; the official configuration has 9 (--rules
      code).
 D28. CBST: 6 rounds as its README (CRST's script trains 3); patches are mined in the target only,
      and the optimizer begins anew in each round, as in CRST's script. Crops and scales are CRST's,
      the rate is that of the MXNet version (1e-4, over sqrt(2) in each round; CRST's is 5e-5
      throughout). Pseudo-labels are of all target images (CRST: of a list of 505).
"""

import copy
import json
import sys
import time
from bisect import bisect_right
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from alda import IGNORE, InputError, deeplab, run_command, toy
from alda.annotation import (
    Rounds,
    bought_and_pseudo,
    bought_labels,
    ledger,
    pseudo_labels,
    read_map,
)
from alda.datasets import (
    CLASS_SETS,
    PSEUDO,
    TrainingView,
    mix_seed,
    open_dataset,
    truth_inside,
    write_atomic,
)
from alda.distributed import barrier, first_says, is_first, join, leave, rank_and_world, say
from alda.evaluation import describe, evaluate, pick_device, protocol_of, scores_over_steps
from alda.losses import (
    contrastive,
    contrastive_keys,
    cross_entropy,
    local_consistency,
    negative_learning,
)
from alda.oracle import Waiting, collect
from alda.pictures import save_story, widened
from alda.rounds import (
    ask_images,
    ask_pixels,
    check_budget,
    label_target,
    logits_of,
    over_target,
    pseudo_schedule,
    query_schedule,
    source_prior,
    truth_of,
)
from alda.run import (
    STOP,
    TRACES,
    Run,
    Stopped,
    batches,
    leave_nothing,
    locked,
    mixed_batches,
    next_batch,
    one_line_errors,
    prepare,
    remember_data,
    resume_line,
    run_folder,
    transform_of,
)
from alda.selftraining import (
    cbst_rate,
    drop_share,
    mine_patch,
    portion_of_round,
    rare_classes,
    reliable_pseudo_labels,
    update_teacher,
)
from alda.settings import SCHEDULED, SELF_TRAINING, Settings, parse, poly_length, settings_for
from alda.stal import (
    StalState,
    contrast_sets,
    cut,
    draw_others,
    paste,
    plain_logits,
    predicted,
    pseudo_label_health,
    step_generator,
    supervised_loss,
    taught,
    train_mode,
    unlabelled_loss,
    update_teacher_and_buffers,
)


def poly(step: int, steps: int, power: float = 0.9) -> float:
    """The factor of the learning rate before step `step` (from 0), RIPU's and DeepLab's poly."""
    return (1 - step / steps) ** power


# --------------------------------------------------------- queries of pixels: RIPU, CBDA, baselines


def train_queries(s: Settings, out: Path, device: torch.device) -> dict:
    """Trains on the source, asks for target labels round by round, and goes on training on both.
    Returns the result.

    RIPU's algorithm, and with other scores its baselines. `source-only` never sees the target,
    `full` has all its labels from the first step, `--source-free` starts from a source-trained
    network and sees no source image.
    """
    check_source_trained(s)
    source = None if s.source_free else open_dataset(s.src, s.root)
    reads = s.reads_truth  # its labels may be missing where nothing is learnt from them
    target = None if s.strategy == "source-only" else open_dataset(s.tgt, s.root, "train", reads)
    validation = open_dataset(s.tgt, s.root, "val")
    remember_data(out, source=source, target=target, validation=validation)
    schedule = [] if s.strategy in ("source-only", "full") else query_schedule(s)
    if schedule:
        check_budget(s, target)
    pseudo_steps = pseudo_schedule(s, schedule)
    rounds, pseudo = Rounds(out / "rounds"), Rounds(out / "pseudo")
    run = Run(s, out, device)
    if source is not None and target is not None:
        warn_of_two_sizes(s, run)
    teacher = None
    if s.teacher:
        check_no_padding(s, target)
        teacher = copy.deepcopy(run.model).requires_grad_(False)
        run.parts = {"teacher": teacher}
    start = run.resume()
    check_complete(rounds, schedule, start)
    check_complete(pseudo, pseudo_steps, start)
    prior = source_prior(s, source, device) if s.pseudo == "cbst-sp" else None
    source_batches = None if source is None else batches(s, source, start, stream=1, labels_of=None)
    target_batches = None

    for step in range(start, s.steps):
        number, pseudo_number = bisect_right(schedule, step), bisect_right(pseudo_steps, step)
        bought = partial(bought_labels, target, rounds, number)
        if step in schedule:
            note_before(s, run, teacher or run.model, validation, step)
            if first_says(rounds.complete() < number):
                run.save(step)
                ask_pixels(s, run, target, rounds, number)
        if step in pseudo_steps and first_says(pseudo.complete() < pseudo_number):
            run.save(step)
            label_target(s, run, target, pseudo, pseudo_number, s.pseudo, prior, bought)
        if target is not None and step in (start, *schedule, *pseudo_steps):  # labels have changed
            known = bought
            if s.strategy == "full":
                known = None  # the dataset's own labels
            elif pseudo_number:
                known = partial(bought_and_pseudo, target, rounds, number, pseudo, pseudo_number)
            target_batches = batches(s, target, step, stream=2, labels_of=known)

        run.set_rate(poly(step, poly_length(s)))
        source_batch = next_batch(source_batches, device)
        target_batch = next_batch(target_batches, device)
        if s.teacher and number:
            drop, draws = drop_share(step, s.steps, s.drop), step_generator(s, step, device)
            target_batch = taught(s, run, teacher, target_batch, drop, draws)
        losses = []
        run.optimizer.zero_grad(set_to_none=True)
        for source_part, target_part in run.micro_batches(source_batch, target_batch):
            with run.autocast():
                source_logits, target_logits = forward_both(run.forward, source_part, target_part)
            L = losses_of_queries(s, source_part, source_logits, target_part, target_logits)
            # RIPU Eq. (9): L = L_CE(source) + L_CE(target) + alpha_1 L_cr(source) + alpha_2
            # L_nl(target)
            total = (
                L["source"]
                + L["target"]
                + s.consistency * L["consistency"]
                + s.negative * L["negative"]
            )
            # --pseudo and --teacher: ours, in no paper
            total = total + s.pseudo_weight * L["pseudo"] + s.unlabelled * L["unlabelled"]
            (total / s.accumulate).backward()
            losses.append(L)
        run.optimizer.step()
        if s.teacher:
            update_teacher_and_buffers(teacher, run.model, step, s.ema)
        run.log(step + 1, *losses)
        evaluate_and_save(s, run, teacher, validation, step + 1)

    result = {
        **final_scores(s, run, teacher, validation),
        **report(s, run, source, target, rounds),
        **({"cbda": s.cbda} if s.strategy == "cbda" else {}),
        **({"pseudo": s.pseudo, "pseudo_rounds": records_of(pseudo)} if pseudo_steps else {}),
    }
    draw_story(s, run, teacher or run.model, target, rounds, schedule, result)
    return result


def check_source_trained(s: Settings) -> None:
    """Raises InputError where --source-free names what fills the backbone only."""
    if s.source_free and deeplab.backbone_only(s.init):
        raise InputError(
            f"--source-free {s.source_free}: fills the backbone only, expected the checkpoint of a "
            "source-trained network (of --strategy source-only, or an official one)"
        )


def warn_of_two_sizes(s: Settings, run: Run) -> None:
    """A line where live batch norm will see source and target apart (D23)."""
    if run.network["batch_norm"] == "live" and s.source_hw != s.target_hw and not s.crop:
        say(
            f"warning: live batch norm sees --source-size {s.source_size} and --target-size "
            f"{s.target_size} apart, but is tested with statistics of both: give one size for the two"
        )


def check_no_padding(s: Settings, target) -> None:
    """Raises InputError where a crop may reach over its image: --teacher would label what is not
    there."""
    if not s.crop:
        return
    for size in {s.target_hw or sample.size for sample in target.samples}:
        smallest = [round(length * s.scale_range[0]) for length in size]
        if any(a < b for a, b in zip(smallest, s.crop_hw, strict=True)):
            raise InputError(
                f"--teacher labels all that it sees: --crop {s.crop} must fit into images of "
                f"{size[1]}x{size[0]} at the lowest --scale {s.scale_range[0]:g} "
                f"({smallest[1]}x{smallest[0]}); give a smaller --crop or a higher scale"
            )


def forward_both(model, source, target) -> list[torch.Tensor | None]:
    """The logits (N,C,H,W) float32 of the source and the target batch at their labels' sizes; None
    where there is no batch.

    Batches of one size pass together: live batch norm then sees both domains at once.
    """
    given = [batch for batch in (source, target) if batch is not None]
    if len(given) == 2 and source[0].shape == target[0].shape:
        logits = list(model(torch.cat([source[0], target[0]])).chunk(2))
    else:
        logits = [model(batch[0]) for batch in given]
    sizes = [batch[1].shape[-2:] for batch in given]
    logits = [deeplab.upsample(x.float(), size) for x, size in zip(logits, sizes, strict=True)]
    return [None if batch is None else logits.pop(0) for batch in (source, target)]


def losses_of_queries(s: Settings, source, source_logits, target, target_logits) -> dict:
    """The named losses of a step, 0-dim tensors; a term that the run leaves out is the number 0.

    With --pseudo the cross-entropy of the pseudo-labelled pixels is a term of its own, so that many
    guesses do not outweigh few answers; with --teacher its labels are one (STAL's L_u), and `target`
    holds them behind images and labels.
    """
    names = ("source", "consistency", "target", "pseudo", "negative", "unlabelled")
    loss = dict.fromkeys(names, 0.0)
    if source is not None:
        loss["source"] = cross_entropy(source_logits, source[1])
        if s.consistency:
            code = s.rules == "code"
            loss["consistency"] = local_consistency(source_logits, source[1], boundary_only=code)
    if target is not None:
        labels = target[1]
        loss["target"] = cross_entropy(target_logits, labels.masked_fill(labels >= PSEUDO, IGNORE))
        if s.pseudo != "none":
            guessed = (labels >= PSEUDO) & (labels != IGNORE)
            labels = torch.where(guessed, labels - PSEUDO, IGNORE)
            loss["pseudo"] = cross_entropy(target_logits, labels)
        if s.teacher:
            # labels and confidences; none before the first round, and with --unlabelled 0
            by_teacher = target[2:]
            loss["unlabelled"] = target_logits.sum() * 0
            if by_teacher:
                loss["unlabelled"] = unlabelled_loss(s, target_logits, *by_teacher)
        if s.negative:
            loss["negative"] = negative_learning(target_logits.softmax(1))
    return loss


# ------------------------------------------------------------------------------ self-training: CBST


def train_cbst(s: Settings, out: Path, device: torch.device) -> dict:
    """CBST, CBST-SP and ST: rounds of pseudo-labels on the whole target set, each trained on with
    some source images.

    Starts from a source-trained network: --init FILE, or one that is trained first in OUT/source,
    from random weights, ImageNet's or a FILE that fills the backbone only.
    The training split of the target is used without its labels; the validation split is only
    scored.
    """
    source = open_dataset(s.src, s.root)
    target = open_dataset(s.tgt, s.root, "train", s.reads_truth)
    validation = open_dataset(s.tgt, s.root, "val")
    remember_data(out, source=source, target=target, validation=validation)
    check_one_size(s)
    chosen = source_counts(s, len(source))
    starts = round_starts(s, [len(target) + n for n in chosen])
    began = time.time()
    if deeplab.backbone_only(s.init):
        s = train_source(s, out, device)
    s = replace(s, steps=starts[-1], poly_steps=0)
    rounds = Rounds(out / "pseudo")
    run = Run(s, out, device)
    run.began = began  # with the source training
    start = run.resume()
    check_complete(rounds, starts[:-1], start)
    prior = None

    for step in range(start, s.steps):
        number = bisect_right(starts, step)
        local = step - starts[number - 1]
        if local == 0:
            note_before(s, run, run.model, validation, step)
            if first_says(rounds.complete() < number):
                run.save(step)
                if s.strategy == "cbst-sp" and prior is None:
                    prior = source_prior(s, source, device)
                label_target(s, run, target, rounds, number, s.strategy, prior)
            run.optimizer.state.clear()  # no momentum from the last round (D28)
        if step == start or local == 0:
            iterator = round_batches(s, source, target, rounds, number, chosen[number - 1], local)

        run.set_rate(cbst_rate(number - 1))
        losses, batch = [], next_batch(iterator, device)
        run.optimizer.zero_grad(set_to_none=True)
        for ((images, labels, _),) in run.micro_batches(batch):
            with run.autocast():
                logits = run.forward(images)
            logits = deeplab.upsample(logits.float(), labels.shape[-2:])
            # CBST, objective: the weights minimise -log p of the source labels and of the
            # pseudo-labels
            loss = cross_entropy(logits, labels)
            (loss / s.accumulate).backward()
            losses.append({"cross_entropy": loss})
        run.optimizer.step()
        run.log(step + 1, *losses)
        evaluate_and_save(s, run, None, validation, step + 1)

    nothing_asked = Rounds(out / "rounds")
    result = {
        **final_scores(s, run, None, validation),
        **report(s, run, source, target, nothing_asked, chosen[-1]),
        "pseudo_rounds": records_of(rounds),
    }
    draw_story(s, run, run.model, target, nothing_asked, starts[:-1], result)
    return result


def source_counts(s: Settings, images: int) -> list[int]:
    """How many of the source `images` each round trains on, rounded down."""
    counts = []
    for n in range(s.rounds):
        share = portion_of_round(n, s.source_portion, s.source_portion_step, s.source_portion_max)
        counts.append(max(1, int(share * images)))
    return counts


def check_one_size(s: Settings) -> None:
    """Raises InputError where source and target images of one batch would have different sizes."""
    if not s.crop and s.source_hw != s.target_hw:
        raise InputError(
            "source and target images share a batch here: give --crop, or equal --source-size and "
            "--target-size"
        )


def round_batches(s: Settings, source, target, rounds: Rounds, number: int, chosen: int, step: int):
    """Batches of round `number` from its step `step` on: all target images with their
    pseudo-labels, `chosen` source images.

    With --crop, windows of the target are placed around the classes that were predicted most rarely
    (--mine); those of the source are random, as in CRST's official script.
    """
    record = rounds.record(number)
    rare = rare_classes([c["predicted"] for c in record["classes"].values()])
    at = partial(mine_patch, rare=rare, chance=s.mine) if s.mine else None
    labels_of = partial(pseudo_labels, target, rounds, number)
    views = [
        TrainingView(source, transform_of(s, 1), mix_seed(s.seed, 6, number)),
        TrainingView(target, transform_of(s, 2, at), mix_seed(s.seed, 7, number), labels_of),
    ]
    order = np.random.default_rng(mix_seed(s.seed, 8, number)).permutation(len(source))
    entries = [(0, int(i)) for i in order[:chosen]] + [(1, i) for i in range(len(target))]
    return mixed_batches(s, views, entries, step, mix_seed(s.seed, 9, number))


def round_starts(s: Settings, images: list[int]) -> list[int]:
    """The steps at which each round begins, and the end: --epochs passes over so many `images`, or
    equal parts of --steps."""
    if not s.epochs:
        if s.steps < len(images):
            raise InputError(f"--steps {s.steps} is too short for --rounds {len(images)}")
        return [s.steps * number // len(images) for number in range(len(images) + 1)]
    return [0, *np.cumsum([-(-s.epochs * n // s.batch) for n in images]).tolist()]


def train_source(s: Settings, out: Path, device: torch.device) -> Settings:
    """Trains `source-only` in OUT/source, or goes on with it; returns the settings that start from
    its network."""
    default = settings_for({"strategy": "source-only", "root": s.root})
    kept = ("lr", "source_sampling", "consistency", "negative")
    own = replace(
        s,
        strategy="source-only",
        steps=s.source_steps or default.steps,
        epochs=0,
        poly_steps=0,
        eval_every=0,
        cache="",
        out=str(out / "source"),
        **{name: getattr(default, name) for name in kept},
    )
    last, written = out / "source/checkpoints/last.pt", out / "source/result.json"
    if first_says(not written.is_file()):
        say(f"source-only: {own.steps} steps in {out / 'source'}")
        with ready_folder(own, out / "source") if is_first() else nullcontext():
            result = train_queries(own, run_folder(own), device)
        if is_first():
            result = {"strategy": "source-only", "toy": toy.is_toy(s.root), **result}
            write_atomic(written, json.dumps(result, indent=1))
        say(f"source-only: mIoU19 {100 * result['mIoU19']:.2f}")
        barrier()
    return replace(s, init=str(last))


# ----------------------------------------------------- self-training with whole-image queries: STAL


def train_stal(s: Settings, out: Path, device: torch.device) -> dict:
    """STAL (ILM-ASSL): mean-teacher self-training, in loops that each begin by asking for whole
    images. Returns the result, the teacher's.

    Loop 1 asks for random images spread over the groups, later loops for those that the teacher is
    least sure of. An epoch is a pass over the unlabelled images. Labelled and unlabelled images pass
    apart: live batch norm never normalises them together. Every part can be left out: see --help-all.
    """
    source = open_dataset(s.src, s.root)
    target = open_dataset(s.tgt, s.root, "train", s.reads_truth)
    validation = open_dataset(s.tgt, s.root, "val")
    remember_data(out, source=source, target=target, validation=validation)
    check_one_size(s)
    draw_source_images(s, source)
    counts = images_due(s, len(target))
    starts = round_starts(s, [len(target) - asked for asked in np.cumsum(counts).tolist()])
    s = replace(s, steps=starts[-1], poly_steps=0)
    rounds, run = Rounds(out / "rounds"), Run(s, out, device)
    state = StalState(s, run, target)
    run.parts = state.parts()
    start = run.resume()
    check_complete(rounds, starts[:-1], start)

    for step in range(start, s.steps):
        number = bisect_right(starts, step)
        local, length = step - starts[number - 1], starts[number] - starts[number - 1]
        if local == 0:
            note_before(s, run, state.teacher, validation, step)
            ask_images(s, run, state.teacher, target, rounds, number, counts[number - 1])
            if number > 1:
                state.begin_loop()
        if step == start or local == 0:
            labelled, pasted, unlabelled = loop_batches(s, source, target, rounds, number, local)

        run.set_rate(poly(local, length))
        generator, bank = step_generator(s, step, device), state.bank
        others = draw_others(s, state, step, generator)
        batch, other = next_batch(labelled, device), next_batch(pasted, device)
        images, labels = paste(batch, other, state.confidence.value, generator)
        L, health = dict.fromkeys(("supervised", "unlabelled", "contrastive"), 0.0), {}
        with run.autocast():  # passes 1 and 2: student and teacher, in train mode, labelled images
            logits, features, auxiliary = run.forward(images, extras=True)
            teacher_logits, teacher_features = train_mode(state.teacher, images)
        logits = deeplab.upsample(logits.float(), labels.shape[-2:])
        L["supervised"] = supervised_loss(s, logits, auxiliary, labels)
        state.confidence.update(logits.detach().softmax(1), labels)
        if unlabelled is not None:
            plain, truth, index = next_batch(unlabelled, device)
            weak = plain_logits(run, state.teacher, plain, others)  # pass 3: teacher in EVAL mode
            state.images.update(index, predicted(weak, truth))
            mixed, weak, truth = cut(plain, weak, truth, others, generator)
            with run.autocast():  # passes 4 and 5: teacher and student, in train mode, mixed images
                _, teacher_mixed = train_mode(state.teacher, mixed)
                logits, student_mixed, _ = run.forward(mixed, extras=True)
            prob, inside = weak.softmax(1), truth != IGNORE
            drop = drop_share(local, length, s.drop)
            pseudo = reliable_pseudo_labels(prob, drop, s.rules, inside)
            health = pseudo_label_health(pseudo, truth, inside, target.labelled)
            if s.unlabelled:
                sure = prob.amax(1)
                L["unlabelled"] = unlabelled_loss(s, logits, pseudo, sure, state, generator)
            if s.contrast:
                features = torch.cat([features, student_mixed])
                teacher_features = torch.cat([teacher_features, teacher_mixed])
                size = features.shape[-2:]
                sets = contrast_sets(labels, teacher_logits, pseudo, weak, inside, size)
                L["contrastive"] = features.float().sum() * 0  # torchrun wants all gradients
                if local / length >= s.contrast_start:
                    bank.add(*contrastive_keys(teacher_features, sets[2], bank.most))
                    L["contrastive"] = contrastive(
                        features, teacher_features, sets, bank, generator=generator
                    )
        # STAL Eq. (1): L = L_s + lambda_u L_u + lambda_c L_c
        total = L["supervised"] + s.unlabelled * L["unlabelled"] + s.contrast * L["contrastive"]
        run.optimizer.zero_grad(set_to_none=True)
        total.backward()
        run.optimizer.step()
        update_teacher(state.teacher, run.model, local, s.ema)
        run.log(step + 1, {**L, **health}, more=state.for_the_log)
        if step + 1 == starts[number]:
            run.scores.append(score_loop(s, run, state.teacher, target, rounds, validation, number))
            run.write_metrics({"step": step + 1, **run.scores[-1]})
        if (step + 1) % s.checkpoint_every == 0 or step + 1 == starts[number]:
            run.save(step + 1)
        run.stop_if_asked(step + 1)
    result = {**result_of_loops(run.scores), **report(s, run, source, target, rounds)}
    draw_story(s, run, state.teacher, target, rounds, starts[:-1], result)
    return result


def draw_source_images(s: Settings, source) -> None:
    """Cuts the source to --source-images of its images, drawn by the seed, in their order (0:
    all)."""
    order = np.random.default_rng(mix_seed(s.seed, 8)).permutation(len(source))
    source.samples = [source.samples[i] for i in sorted(order[: s.source_images or len(source)])]


def score_loop(
    s: Settings, run: Run, teacher, target, rounds: Rounds, validation, number: int
) -> dict:
    """The scores of teacher and student at the end of loop `number`, and what was asked so far (a loop
    that is trained again, after a checkpoint was lost, may find a later round)."""
    asked = ledger(records_of(rounds)[:number])
    share = asked["asked"] / target.pixels
    scores = final_scores(s, run, teacher, validation)
    return {"loop": number, "asked_images": asked["images"], "share": share, **scores}


def images_due(s: Settings, images: int) -> list[int]:
    """How many whole images each loop asks: 20 %, 44 % and 100 % of --budget in three loops, as
    STAL's 1, 2.2 and 5 %.

    Other numbers of loops share the budget equally. Raises InputError where a loop would ask for
    none or none would be left.
    """
    shares = [(n + 1) / s.rounds for n in range(s.rounds)]
    if s.rounds == 3:
        shares = [0.2, 0.44, 1.0]
    ends = [max(1, round(s.budget * share * images)) for share in shares]
    counts = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
    if min(counts) < 1 or ends[-1] >= images:
        raise InputError(
            f"--budget {s.budget} of {images} target images in {s.rounds} loops asks {counts} images: "
            "every loop needs one or more, and some must stay unlabelled"
        )
    return counts


def loop_batches(s: Settings, source, target, rounds: Rounds, number: int, step: int):
    """(labelled, pasted, unlabelled) batches of loop `number` from its step `step` on; None for
    those that no loss reads.

    Labelled: all source images and the target images with labels, these repeated to as many as stay
    unlabelled (2,975 - n of Cityscapes), as in STAL's configurations; each once where fewer do.
    Pasted: images of the same list, at a scale of their own (0.1 to 2), to copy classes from.
    Unlabelled: the other target images, whose truth comes along for the log's accuracy and to know
    what is padding.
    """
    rows = [row for n in range(1, number + 1) for row in rounds.record(n)["images"].items()]
    answered = {image for image, row in rows if row["labelled"]}  # not all: --accept-partial
    known = [i for i, sample in enumerate(target.samples) if sample.id in answered]
    unknown = [i for i, sample in enumerate(target.samples) if sample.id not in answered]
    bought, truth = partial(bought_labels, target, rounds, number), partial(truth_inside, target)
    seeds = [mix_seed(s.seed, stream, number) for stream in (21, 22, 23, 26, 27)]
    small = (0.1, 2.0)
    views = [
        TrainingView(source, transform_of(s, 1), seeds[0]),
        TrainingView(target, transform_of(s, 2), seeds[1], bought),
        TrainingView(target, transform_of(s, 2), seeds[2], truth),
        TrainingView(source, transform_of(s, 1, scale=small), seeds[3]),
        TrainingView(target, transform_of(s, 2, scale=small), seeds[4], bought),
    ]
    length = max(len(known), len(unknown)) if known else 0
    repeated = [known[i % len(known)] for i in range(length)]
    entries = [(0, i) for i in range(len(source))] + [(1, i) for i in repeated]
    labelled = mixed_batches(s, views, entries, step, mix_seed(s.seed, 24, number))
    pasted = unlabelled = None
    if s.copy_paste:
        entries = [(view + 3, i) for view, i in entries]
        pasted = mixed_batches(s, views, entries, step, mix_seed(s.seed, 28, number))
    if s.unlabelled or s.contrast:
        entries = [(2, i) for i in unknown]
        unlabelled = mixed_batches(s, views, entries, step, mix_seed(s.seed, 25, number))
    return labelled, pasted, unlabelled


def result_of_loops(scores: list[dict]) -> dict:
    """What result.json says: the scores of the last loop, and those of each loop in short."""
    keys = ("loop", "asked_images", "share", "mIoU19")
    loops = []
    for line in scores:
        loops.append({key: line[key] for key in keys})
        loops[-1]["student mIoU19"] = line["student"]["mIoU19"]
    last = dict(scores[-1])
    for key in keys[:3]:
        del last[key]
    return {**last, "loops": loops}


# ----------------------------------------------------------------------------- what the loops share


def evaluate_and_save(s: Settings, run: Run, teacher, validation, step: int) -> None:
    """The end of a step: `final_scores` in the log every --eval-every steps, a checkpoint every
    --checkpoint-every steps, and the end of the run where a signal asks for it."""
    if s.eval_every and step % s.eval_every == 0:
        run.write_metrics({"step": step, **final_scores(s, run, teacher, validation)})
    if step % s.checkpoint_every == 0 or step == s.steps:
        run.save(step)
    run.stop_if_asked(step)


def records_of(rounds: Rounds) -> list[dict]:
    """The round.json of every complete round."""
    return [rounds.record(number + 1) for number in range(rounds.complete())]


def check_complete(rounds: Rounds, schedule: list[int], start: int) -> None:
    """Raises InputError where a round that was made before step `start` is missing on disk, or a
    file of a round is not what it was."""
    rounds.verify()
    if rounds.complete() < sum(step < start for step in schedule):
        raise InputError(
            f"{rounds.folder}: rounds made before step {start} are missing; restore them or use another --out"
        )


def final_scores(s: Settings, run: Run, teacher, validation) -> dict:
    """The network's scores; where there is a mean teacher the teacher's, and under "student" the
    network's."""
    scores = evaluate(run.model, validation, protocol_of(s), run.device, s.workers)
    if teacher is None:
        return scores
    teachers = evaluate(teacher, validation, protocol_of(s), run.device, s.workers)
    return {**teachers, "student": scores}


def report(s: Settings, run: Run, source, target, rounds: Rounds, source_images=None) -> dict:
    """What result.json says beside the scores: the ledger, its share of all target pixels, steps, images
    trained on, seconds, and the score before the first round."""
    budget = ledger(records_of(rounds))
    share = budget["asked"] / target.pixels if target else 0.0
    if source_images is None:
        source_images = len(source) if source else 0
    return {
        "budget": {**budget, "share": 1.0 if s.strategy == "full" else share},
        "steps": s.steps,
        "source_images": source_images,
        "target_images": len(target) if target else 0,
        "wall_s": run.wall_s(),
        **({"before": run.before} if run.before else {}),
    }


def note_before(s: Settings, run: Run, model, validation, step: int) -> None:
    """Scores the network before the first round, once in a run: what the labels are to be measured by."""
    if run.before is None:
        scores = evaluate(model, validation, protocol_of(s), run.device, s.workers)
        run.before = {"step": step, **{f"mIoU{n}": scores[f"mIoU{n}"] for n in CLASS_SETS}}


def draw_story(
    s: Settings, run: Run, model, target, rounds: Rounds, schedule, result: dict
) -> None:
    """pictures/summary.png: the first target image, of stal the first that was asked, with the picks
    of all rounds, first and last prediction, answers, truth, what was labelled, mIoU over the steps."""
    if run.rank or not s.pictures or target is None:
        return
    index, numbers = 0, range(1, rounds.complete() + 1)
    if s.strategy == "stal":  # whole images: one that was asked
        asked = rounds.record(1)["images"]
        index = next(i for i, sample in enumerate(target.samples) if sample.id in asked)
    sample = target.samples[index]
    _, image, logits = next(over_target(s, run, target, logits_of, model, [index]))
    panels, masks = {}, []
    first = run.out / "pictures/round-01" / f"{sample.id}_prediction.png"
    if first.is_file():
        panels["prediction before the first round"] = read_map(first, sample.size, IGNORE)
    panels["prediction at the end"] = logits.argmax(0).to(torch.uint8).cpu()
    for number in numbers:
        earlier = rounds.asked(sample.id, sample.size, number - 1)
        masks.append(rounds.asked(sample.id, sample.size, number) & ~earlier)
    if masks:
        panels["all answers"] = widened(rounds.labels(sample.id, sample.size))
    panels |= truth_of(target, index)
    points = scores_over_steps(run.out, result)
    classes = result["budget"]["classes"]
    save_story(image, masks, panels, classes, points, schedule, run.out / "pictures/summary.png")


# ------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """The command line (see the top of this file); returns the exit status: 0 done, 2 bad usage or
    input, 3 waiting for people, 143 after SIGTERM or SIGUSR1. Ctrl-C ends the process with status
    130, after the line that resumes; callers that give `argv` get the KeyboardInterrupt."""
    out = None
    try:
        with ExitStack() as held:
            s = parse(argv)
            device = join(pick_device(s.device))
            check_shares(s)
            if s.threads:
                torch.set_num_threads(s.threads)
            out = run_folder(s)
            held.enter_context(STOP.listening())
            if is_first():
                held.enter_context(ready_folder(s, out))
                collect(s, out)
            with one_line_errors():  # the first may have refused
                barrier()
            run_strategy(s, out, device)
            leave()
        return 0
    except (InputError, FloatingPointError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # the last line: above it stands the traceback of a loading process
        text = lines[-1].removeprefix("alda.InputError: ")
        print(f"error: {text}", file=sys.stderr)
        return 2
    except Waiting as wait:
        print(f"waiting: {wait}; then {resume_line(out)} goes on", file=sys.stderr)
        return 3
    except (Stopped, KeyboardInterrupt) as stop:
        # what the checkpoints and rounds hold is kept, see run.Stop
        kept = out is not None and (out / "config.json").is_file()
        print(f"stopped{': ' + resume_line(out) + ' goes on' if kept else ''}", file=sys.stderr)
        if isinstance(stop, Stopped):
            return 143
        if argv is None:
            raise SystemExit(130) from None
        raise


def check_shares(s: Settings) -> None:
    """Raises InputError where --batch cannot be shared by all processes in --accumulate parts, or
    leaves --teacher's CutMix nothing to mix."""
    processes, parts = rank_and_world()[1], s.parts
    if s.batch % (processes * parts):
        raise InputError(
            f"--batch {s.batch} cannot be shared by {processes} processes in --accumulate "
            f"{parts} parts: give a multiple of {processes * parts}"
        )
    if s.teacher and s.cutmix and s.batch == processes:
        raise InputError(
            "--teacher mixes the images that a process has (CutMix), and each has one of "
            f"--batch {s.batch}: give --batch {2 * processes}, or --no-cutmix"
        )


@contextmanager
def ready_folder(s: Settings, out: Path):
    """Holds the lock of the run's folder, and makes its config.json; a run that fails before it has
    written anything else takes that away again, and the folder where it made it."""
    with locked(out) as made:
        new = not (out / "config.json").exists()
        try:
            if s.root == "toy":
                toy.ensure("toy")
            prepare(s, out)
            yield
        except (InputError, FloatingPointError, OSError):
            if new and not any((out / part).exists() for part in TRACES):
                (out / "config.json").unlink(missing_ok=True)
                leave_nothing(out, made)
            raise


def run_strategy(s: Settings, out: Path, device: torch.device) -> None:
    """Runs the strategy's loop; the first process writes result.json and prints the scores."""
    rank, world = rank_and_world()
    mark = "TOY " * toy.is_toy(s.root)
    epochs = s.epochs and s.strategy not in SCHEDULED
    length = f"{s.epochs} epochs a round" if epochs else f"{s.steps} steps"
    where = f"{device}" if world == 1 else f"{world} processes ({device.type})"
    say(f"{mark}{s.strategy}: {s.src} -> {s.tgt}, {length} on {where}, run folder {out}")
    if world > 1 and device.type == "cpu":
        say("batch norm is not synchronised on CPUs: each process normalises its own images")
    loops = {"stal": train_stal, **dict.fromkeys(SELF_TRAINING, train_cbst)}
    train = loops.get(s.strategy, train_queries)
    with one_line_errors():
        result = {"strategy": s.strategy, "toy": toy.is_toy(s.root), **train(s, out, device)}
    if rank == 0:
        write_atomic(out / "result.json", json.dumps(result, indent=1))
        which = "last checkpoint" + (", teacher" if "student" in result else "")
        images = f"{result['images']} validation images"
        print(f"{mark}{s.strategy}, {which}, {images}\n{describe(result)}")
        if "before" in result:
            before, after = (f"{100 * x['mIoU19']:.2f}" for x in (result["before"], result))
            print(f"mIoU19 before the first round {before} -> at the end {after}")
        story = out / "pictures/summary.png"
        print(f"run folder {out}" + f", its story {story}" * story.is_file())
    barrier()


if __name__ == "__main__":
    run_command(main)
