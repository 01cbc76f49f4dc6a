"""The assembly of the loops: total losses, rates, momentum and decay, against sums and closed forms typed here."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_loop import arguments

from alda import loop

# strategy: its options, and the weights that the papers give the losses of a step
WEIGHTS = {
    "ripu": ({}, {"source": 1, "target": 1, "consistency": 0.1, "negative": 1}),
    "ripu --pseudo": (
        {"pseudo": "cbst", "pseudo_steps": "1", "rules": "code", "pseudo_weight": 0.5},
        {"source": 1, "target": 1, "consistency": 0.1, "negative": 1, "pseudo": 0.5},
    ),
    "stal": ({"contrast_start": 0}, {"supervised": 1, "unlabelled": 1, "contrastive": 0.1}),
    "cbst": ({"rules": "code", "init": "FILE"}, {"cross_entropy": 1}),
}


@pytest.fixture
def watched(monkeypatch):
    """What every step hands to torch: totals that go backward, the optimizer's groups when it steps."""
    totals, groups = [], []
    backward, step = torch.Tensor.backward, torch.optim.SGD.step

    def note_total(self, *args, **kwargs):
        totals.append(self.item())
        return backward(self, *args, **kwargs)

    def note_groups(self, *args, **kwargs):
        groups.append([{k: v for k, v in g.items() if k != "params"} for g in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", note_total)
    monkeypatch.setattr(torch.optim.SGD, "step", note_groups)
    return totals, groups


def run(world, folder, name, **more):
    """A run of 6 steps (by name of WEIGHTS) and the losses of each step as it logged them."""
    options, _ = WEIGHTS[name]
    options = {"query_steps": "0", "rounds": 1, **options, **more}
    strategy = name.split()[0]
    if strategy in ("stal", "cbst"):
        options.pop("query_steps")
    if options.get("init") == "FILE":
        pre = folder / "pre"
        assert loop.main(arguments(world, pre, strategy="source-only", steps=1)) == 0
        options |= {"init": pre / "checkpoints/last.pt", "batch_norm": "live"}
    options = {"steps": 6, "log_every": 1, **options}
    assert loop.main(arguments(world, folder / "out", strategy=strategy, **options)) == 0
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "losses" in line]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_total_is_the_weighted_sum(name, tiny_world, tmp_path, watched):
    totals, _ = watched
    lines = run(tiny_world, tmp_path, name)
    weights = WEIGHTS[name][1]
    for line, total in zip(lines[-6:], totals[-6:], strict=True):
        losses = {k: v for k, v in line["losses"].items() if k not in ("kept", "accuracy")}
        assert set(losses) <= set(weights)
        by_hand = sum(weights[k] * value for k, value in losses.items())
        assert total == pytest.approx(by_hand, rel=1e-5), f"step {line['step']}: {losses}"
    # at the end every term is there: none was left out silently
    assert {k for line in lines for k in line["losses"]} - {"kept", "accuracy"} == set(weights)


def test_cbst_minimises_the_mean_over_all_labelled_pixels_of_the_batch(
    tiny_world, tmp_path, watched, monkeypatch
):
    """CBST's objective against torch's own cross-entropy, on the batch as it was loaded and what the
    network said of it; every round begins without momentum."""
    totals, _ = watched
    batches, logits, momenta = [], [], []
    load, upsample, step = loop.next_batch, loop.deeplab.upsample, torch.optim.SGD.step

    def note_batch(*args):
        batches.append(load(*args))
        return batches[-1]

    def note_logits(*args):
        logits.append(upsample(*args))
        return logits[-1]

    def note_momenta(self, *args, **kwargs):
        momenta.append(len(self.state))
        return step(self, *args, **kwargs)

    run(tiny_world, tmp_path, "cbst", steps=1)  # the start
    start = {"init": tmp_path / "out/checkpoints/last.pt", "batch_norm": "live"}
    monkeypatch.setattr(loop, "next_batch", note_batch)
    monkeypatch.setattr(loop.deeplab, "upsample", note_logits)
    monkeypatch.setattr(torch.optim.SGD, "step", note_momenta)
    totals.clear()
    options = {"steps": 4, "rounds": 2, "rules": "code", "log_every": 1, **start}
    assert loop.main(arguments(tiny_world, tmp_path / "two", strategy="cbst", **options)) == 0
    seen = [x for x in logits if x.requires_grad]
    assert len(totals) == len(seen) == len(batches) == 4
    for total, x, (images, labels, _) in zip(totals, seen, batches, strict=True):
        assert len(x) == len(images) == 2
        by_hand = F.cross_entropy(x.detach(), labels.long(), ignore_index=255)
        assert total == pytest.approx(by_hand.item(), rel=1e-5)
    assert [bool(n) for n in momenta] == [False, True, False, True]


# name: poly's length in steps of a run of 6 (0: the rate is constant within a round), and the weight decay
SCHEDULES = {"ripu": (9, 5e-4), "stal": (6, 1e-4), "cbst": (0, 5e-4)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_are_the_papers(name, tiny_world, tmp_path, watched):
    """After step k: lr poly(k) for the backbone, ten times that for the heads; momentum 0.9."""
    _, groups = watched
    lines = run(tiny_world, tmp_path, name, lr=0.004)
    length, decay = SCHEDULES[name]
    for k, ((backbone, head), line) in enumerate(zip(groups[-6:], lines[-6:], strict=True)):
        rate = 0.004 * (1 - k / length) ** 0.9 if length else 0.004
        assert backbone["lr"] == pytest.approx(rate, rel=1e-12) == line["lr"]
        assert head["lr"] == pytest.approx(10 * rate, rel=1e-12)
        for group in (backbone, head):
            assert group["momentum"] == 0.9 and group["weight_decay"] == decay
            assert not group["nesterov"] and group["dampening"] == 0
