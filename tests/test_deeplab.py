"""The networks against the recorded logits of the official code, and every checkpoint layout against official names.

    pytest tests/test_deeplab.py

`golden/model_*.npz` were recorded from the official networks with weights that follow from their names (`recipe`).
"""

import copy
import gzip
import json
import os
import urllib.error
import zlib
from functools import cache

import numpy as np
import pytest
import torch
import torchvision
from torchvision.ops import FrozenBatchNorm2d

from alda import InputError, deeplab
from alda.deeplab import (
    Backbone,
    DeepLabV2,
    DeepLabV3Plus,
    DilatedDepthwise,
    build,
    checkpoint_blocks,
    load_checkpoint,
    parameter_groups,
    upsample,
)
from alda.evaluation import load_run
from alda.run import network_of
from alda.settings import settings_for

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
STAL = dict(
    batch_norm="live",
    stem="deep",
    multi_grid=(2, 2, 4),
    aspp="dense",
    representation=256,
    auxiliary=True,
)
CRST = dict(batch_norm="live", caffe=True)
TOLERANCE = 2e-5  # of the largest logit: measured gaps are near 1e-6, an epsilon of 1e-5 in the batch norm gives 6e-5


@cache
def official(name):
    """[(name, shape)] of an official state dict."""
    with gzip.open(os.path.join(GOLDEN, "state_dict_keys.json.gz"), "rt") as file:
        return [(key, tuple(shape)) for key, shape, _ in json.load(file)[name]]


@cache
def recipe(name, shape):
    """The value of one official entry, a function of its name and shape (shared between tests, so never changed)."""
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if len(shape) >= 2:
        n = n / np.sqrt(n.size / shape[0])
    elif name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif name.endswith("weight"):
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.from_numpy(n.astype(np.float32))


@pytest.fixture(autouse=True, scope="module")
def memory_freed():
    """The weights take 0.5 GB."""
    yield
    recipe.cache_clear()


def weights(name, prefix=""):
    return {prefix + key: recipe(key, shape) for key, shape in official(name)}


def golden(name):
    """The recorded arrays and the input they belong to."""
    arrays = dict(np.load(os.path.join(GOLDEN, f"model_{name}.npz")))
    shape = tuple(int(n) for n in arrays["input_shape"])
    images = np.random.RandomState(zlib.crc32(b"input")).standard_normal(shape).astype(np.float32)
    assert np.array_equal(images.ravel()[:8], arrays["input_first8"])
    return arrays, torch.from_numpy(images)


def loaded(model, tmp_path, content):
    """`model` in eval mode, filled through a real file, and the layout's name."""
    path = tmp_path / "official.pth"
    torch.save(content, path)
    layout = load_checkpoint(model, path)
    path.unlink()  # hundreds of MB
    return model.eval(), layout


def assert_close(got, expected, tolerance=TOLERANCE):
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape, f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
    gap, scale = (got - expected).abs(), expected.abs().max()
    assert gap.max() <= tolerance * scale, (
        f"gap max {gap.max():.3e} mean {gap.mean():.3e}, largest value {scale:.3e}"
    )


def names(network, **arguments):
    """{name: shape} of a network's state dict, built without memory."""
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape) for name, tensor in network(**arguments).state_dict().items()
        }


# -------------------------------------------------------------------------------------------- recorded official outputs


@pytest.mark.parametrize("batch_norm", ["frozen", "live"])
@pytest.mark.parametrize("network", [DeepLabV2, DeepLabV3Plus])
def test_ripu_logits(network, batch_norm, tmp_path):
    tag = {"frozen": "frozenbn", "live": "bn"}[batch_norm]
    key = {DeepLabV2: "v2", DeepLabV3Plus: "v3plus"}[network]
    head = (
        "ripu_classifier_deeplabv2"
        if network is DeepLabV2
        else f"ripu_classifier_deeplabv3plus_{tag}"
    )
    arrays, images = golden(f"ripu_{tag}")
    content = {
        "feature_extractor": weights(f"ripu_feature_extractor_{tag}", "module."),
        "classifier": weights(head, "module."),
        "iteration": 40000,
    }
    model, layout = loaded(network(batch_norm=batch_norm), tmp_path, content)
    assert layout == "ripu"
    with torch.inference_mode():
        low, _, deep = model.backbone(images)
        logits = model(images)
    assert [*low.shape] == [*arrays["low_shape"]] and [*deep.shape] == [*arrays["out_shape"]]
    assert_close(logits, arrays[f"{key}_logits"])
    if batch_norm == "frozen":
        large = upsample(logits, images.shape[2:])
        assert_close(large[:, :, ::4, ::4], arrays[f"{key}_up_sub4"])
        assert np.array_equal(large.argmax(1), arrays[f"{key}_up_argmax"])


def test_stal_logits_representation_and_auxiliary(tmp_path):
    arrays, images = golden("stal_deeplabv3plus")
    content = {
        "epoch": 199,
        "model_state": {"module.encoder.conv1.0.weight": torch.zeros(1)},
        "teacher_state": weights("stal_modelbuilder", "module."),
        "best_miou": np.float64(
            0.76
        ),  # as in the official files: not readable with weights_only=True alone
    }
    model = DeepLabV3Plus(**STAL).eval()
    path = tmp_path / "ckpt.pth"
    torch.save(content, path)
    assert load_checkpoint(model, path, which="teacher") == "stal"
    with pytest.raises(InputError, match="mis-shaped"):
        load_checkpoint(model, path, which="model")
    path.unlink()
    with torch.inference_mode():
        low, _, deep = model.backbone(images)
        logits, representation, auxiliary = model(images, extras=True)
    assert [*deep.shape] == [*arrays["enc_shapes"][3]]
    assert_close(low[:, ::16, ::3, ::3], arrays["enc1_sub"])
    assert_close(deep[:, ::64], arrays["enc4_sub"])
    assert_close(logits, arrays["pred"])
    assert_close(auxiliary, arrays["aux"])
    assert_close(representation[:, ::8], arrays["rep_sub"])
    large = upsample(logits, images.shape[2:])
    assert_close(large[:, :, ::4, ::4], arrays["pred_up_sub4"])
    assert np.array_equal(large.argmax(1), arrays["pred_up_argmax"])


@pytest.mark.parametrize("arguments", [CRST, {"caffe": True}])  # live, and frozen as it is trained
def test_crst_logits(arguments, tmp_path):
    arrays, images = golden("crst_deeplabv2")
    model, layout = loaded(DeepLabV2(**arguments), tmp_path, weights("crst_res_deeplab"))
    assert layout == "crst"
    with torch.inference_mode():
        assert_close(model(images), arrays["logits"])


def test_a_network_that_another_program_names_is_not_read(tmp_path):
    path = tmp_path / "theirs.pt"
    torch.save({"model": {"conv.weight": torch.zeros(1)}, "network": "resnet18"}, path)
    network = network_of(settings_for({"strategy": "ripu", "init": str(path)}))
    assert network["backbone"] == "resnet101"  # the settings' own
    with pytest.raises(InputError, match="missing"):
        load_checkpoint(build("deeplabv2", "resnet18", batch_norm="live", init="none"), path)


def test_an_official_file_brings_its_network(tmp_path, capsys):
    """--init, `evaluation score` and what goes on from there: strides, stem and batch norm are the
    file's, which names and shapes do not show."""
    path = tmp_path / "official.pth"
    arrays, images = golden("crst_deeplabv2")
    torch.save(weights("crst_res_deeplab"), path)
    network = network_of(settings_for({"strategy": "cbst", "init": str(path)}))
    for model in (build(**network, init=path).eval(), load_run(path, "cpu")):
        with torch.inference_mode():
            assert_close(model(images), arrays["logits"])
    torch.save({"model": {}, "network": network}, path)
    assert network["batch_norm"] == "frozen"  # its script trains in eval mode, statistics as loaded
    assert network_of(settings_for({"strategy": "cbst", "init": str(path)})) == network
    live = {"strategy": "cbst", "init": str(path), "batch_norm": "live"}
    assert network_of(settings_for(live)) == {**network, "batch_norm": "live"}

    arrays, images = golden("stal_deeplabv3plus")
    torch.save({"model_state": weights("stal_modelbuilder", "module.")}, path)
    network = network_of(settings_for({"strategy": "stal", "init": str(path)}))
    for model in (build(**network, init=path).eval(), load_run(path, "cpu")):
        with torch.inference_mode():
            assert_close(model(images), arrays["pred"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{path} holds a {x} head: it is left out here" for x in ("representation", "auxiliary")
    ]
    path.unlink()


@pytest.mark.parametrize(
    ("network", "arguments", "parts", "table"),
    [
        (DeepLabV2, {}, ["feature_extractor_frozenbn", "classifier_deeplabv2"], "RIPU_NAMES"),
        (
            DeepLabV3Plus,
            {},
            ["feature_extractor_frozenbn", "classifier_deeplabv3plus_frozenbn"],
            "RIPU_NAMES",
        ),
        (
            DeepLabV2,
            {"batch_norm": "live"},
            ["feature_extractor_bn", "classifier_deeplabv2"],
            "RIPU_NAMES",
        ),
        (
            DeepLabV3Plus,
            {"batch_norm": "live"},
            ["feature_extractor_bn", "classifier_deeplabv3plus_bn"],
            "RIPU_NAMES",
        ),
        (DeepLabV3Plus, STAL, ["stal_modelbuilder"], "STAL_NAMES"),
        (DeepLabV2, CRST, ["crst_res_deeplab"], "CRST_NAMES"),
    ],
)
def test_every_official_name_is_consumed_and_every_entry_of_ours_filled(
    network, arguments, parts, table
):
    entries = [
        entry for part in parts for entry in official(part if len(parts) == 1 else f"ripu_{part}")
    ]
    renamed = deeplab._rename(dict(entries), getattr(deeplab, table))
    assert len(renamed) == len(entries)  # no two official names became one
    assert renamed == names(network, **arguments)


# ----------------------------------------------------------------------------------------------------------- structure


WIDTHS = {"resnet18": (64, 256, 512), "resnet50": (256, 1024, 2048), "mobilenet_v2": (24, 96, 320)}


@pytest.mark.parametrize("backbone", WIDTHS)
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (50, 70)])
def test_strides_and_shapes(backbone, size):
    eighth, quarter = [-(-n // 8) for n in size], [-(-n // 4) for n in size]
    low, middle, deep = WIDTHS[backbone]
    images = torch.zeros(2, 3, *size, device="meta")
    with torch.device("meta"):
        v2 = DeepLabV2(7, backbone, "live", representation=16, auxiliary=True)
        v3 = DeepLabV3Plus(7, backbone, "live", representation=16, auxiliary=True)
        dense = DeepLabV3Plus(7, backbone, "live", aspp="dense")
    features = v2.backbone(images)
    assert [f.shape[1] for f in features] == [low, middle, deep] == list(v2.backbone.widths)
    assert [list(f.shape[2:]) for f in features] == [quarter, eighth, eighth]
    shapes = [list(output.shape) for output in v2(images, extras=True)]
    assert shapes == [[2, 7, *eighth], [2, 16, *eighth], [2, 7, *eighth]]
    shapes = [list(output.shape) for output in v3(images, extras=True)]
    assert shapes == [[2, 7, *quarter], [2, 16, *quarter], [2, 7, *eighth]]
    logits, representation, auxiliary = dense(images, extras=True)
    assert list(logits.shape) == [2, 7, *quarter] and representation is None and auxiliary is None
    assert list(dense(images).shape) == [2, 7, *quarter]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_dilation_computes_the_original_resnet_on_a_finer_grid(backbone):
    """Every 4th position of the dilated layer4 is the original stride-32 layer4: ImageNet weights keep their sense."""
    torch.manual_seed(0)
    original = torchvision.models.get_model(backbone, weights=None).eval()
    dilated = Backbone(backbone, "live").eval()
    state = {
        name: value for name, value in original.state_dict().items() if not name.startswith("fc.")
    }
    dilated.load_state_dict(state)
    images = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        x = original.maxpool(original.relu(original.bn1(original.conv1(images))))
        low = original.layer1(x)
        middle = original.layer3(original.layer2(low))
        got = dilated(images)
        assert_close(got[0], low)
        assert_close(got[1][:, :, ::2, ::2], middle)
        assert_close(got[2][:, :, ::4, ::4], original.layer4(middle))


@pytest.mark.parametrize("batch_norm", ["live", "frozen"])
def test_mobilenet_is_torchvisions_on_a_finer_grid(tmp_path, batch_norm):
    """torchvision's own file fills it, and every 4th position of its last map is torchvision's last
    stage at stride 32; so is every 2nd of the middle map at stride 16. Its variances may be 0."""
    torch.manual_seed(0)
    original = torchvision.models.mobilenet_v2(weights=None).eval()
    for module in original.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 1.5)
    original.features[5].conv[1][1].running_var[:2] = 1e-44
    path = tmp_path / "mobilenet_v2.pth"
    torch.save(original.state_dict(), path)
    model = build("deeplabv3plus", "mobilenet_v2", 5, batch_norm, str(path)).eval()
    images = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        low, middle, deep = model.backbone(images)
        assert_close(low, original.features[:4](images))
        assert_close(middle[:, :, ::2, ::2], original.features[:14](images))
        assert_close(deep[:, :, ::4, ::4], original.features[:18](images))
        assert model(images).isfinite().all()


def test_deeper_stem_and_caffe_pool_with_ceil_mode():
    images = torch.zeros(1, 3, 64, 64, device="meta")
    with torch.device("meta"):
        sizes = [
            Backbone("resnet50", "live", **arguments)(images)[0].shape[2]
            for arguments in ({}, {"stem": "deep"}, {"caffe": True})
        ]
    assert sizes == [16, 17, 17]


def test_v2_is_the_sum_of_its_four_branches_and_upsample_keeps_corners():
    torch.manual_seed(0)
    model = DeepLabV2(5, "resnet18", "live").eval()
    assert [branch.dilation for branch in model.classifier.branches] == [
        (6, 6),
        (12, 12),
        (18, 18),
        (24, 24),
    ]
    features = torch.randn(1, 512, 9, 13)
    with torch.inference_mode():
        parts = torch.stack([branch(features) for branch in model.classifier.branches])
        assert_close(model.classifier(features), parts.sum(0))
    logits = torch.randn(1, 5, 9, 13)
    large = upsample(logits, (65, 97))
    assert_close(large[:, :, ::8, ::8], logits)


@pytest.mark.parametrize("dilation, size", [(1, (5, 7)), (2, (9, 8)), (4, (8, 16)), (18, (8, 16))])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_dilated_depthwise_is_torchs_convolution(dilation, size, kind):
    """Output and both gradients, also where the dilation reaches over the whole map; in bfloat16, under
    autocast as runs have it, within that precision's step of float64."""
    ours = DilatedDepthwise(6, dilation)
    plain = torch.nn.Conv2d(6, 6, 3, padding=dilation, dilation=dilation, groups=6, bias=False)
    plain.load_state_dict(ours.state_dict())  # the same names
    plain, half = plain.double(), kind == torch.bfloat16
    ours = ours if half else ours.double()
    x, grad = (torch.randn(2, 6, *size).to(kind) for _ in range(2))
    found = []
    for conv, like in ((ours, kind), (plain, torch.float64)):
        features = x.detach().to(like).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half and conv is ours):
            out = conv(features)
        out.backward(grad.to(like))
        assert features.grad.dtype == like and conv.weight.grad.dtype == conv.weight.dtype
        found.append((out.detach(), features.grad, conv.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine.double(), theirs, 0.01 if half else 1e-14)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_checkpointed_blocks_give_the_same_bits(backbone):
    """Loss, gradients and the running statistics of live batch norm, which the second pass must not
    move again; the blocks are computed twice, and a copy has blocks of its own."""
    images = torch.randn(2, 3, 33, 49, generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = DeepLabV2(5, backbone, "live")
        if checkpointed:
            checkpoint_blocks(model)
            assert "forward" in vars(copy.deepcopy(model).backbone.get_submodule(BLOCKS[backbone]))
        calls = []
        model.backbone.get_submodule(BLOCKS[backbone] + FIRST[backbone]).register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        loss = model(images).logsumexp(1).mean()
        loss.backward()
        assert len(calls) == 1 + checkpointed
        buffers = [b for n, b in model.named_buffers() if not n.endswith("num_batches_tracked")]
        found.append([loss, *(p.grad for p in model.parameters()), *buffers])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


BLOCKS = {"resnet18": "layer3.0", "mobilenet_v2": "features.9"}
FIRST = {"resnet18": ".conv1", "mobilenet_v2": ".conv.0"}


def test_frozen_batch_norm_has_no_parameters_and_never_changes():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 33, 33)
    model = DeepLabV2(5, "resnet18", "frozen").train()
    trained = {name for name, _ in model.named_parameters()}
    assert not [name for name in trained if ".bn" in name or "downsample.1" in name]
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert len(before) == 4 * 20
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-6), momentum=0.9)
    model(images).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert torch.equal(model.train()(images), model.eval()(images))
    head = DeepLabV3Plus(5, "resnet18", "frozen").aspp.project[1]
    features = torch.randn(1, 512, 3, 3)
    assert torch.equal(head(features), features)  # R14: a new frozen layer is exactly the identity


def test_frozen_batch_norm_keeps_the_type_under_autocast():
    """What is kept for the gradient is bfloat16; in float32 it is torchvision's, bit for bit."""
    torch.manual_seed(0)
    x, kept = torch.randn(2, 8, 5, 5), []
    ours, theirs = DeepLabV2(5, "resnet18", "frozen").backbone.bn1, FrozenBatchNorm2d(64, eps=0.0)
    for name, value in ours.named_buffers():
        value.uniform_(0.5, 1.5)
        getattr(theirs, name).copy_(value)
    conv = torch.nn.Conv2d(8, 64, 3)
    assert torch.equal(ours(conv(x)), theirs(conv(x)))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        out = ours(conv(x)).relu()
        expected = theirs(conv(x)).relu()
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected.to(torch.bfloat16))


def test_live_batch_norm_trains():
    model = DeepLabV2(5, "resnet18", "live").train()
    before = model.backbone.bn1.running_mean.clone()
    model(torch.randn(2, 3, 33, 33))
    assert not torch.equal(model.backbone.bn1.running_mean, before)
    with pytest.raises(InputError, match="2 images"):
        DeepLabV3Plus(5, "resnet18", "live").train()(torch.randn(1, 3, 33, 33))


def test_parameter_groups_cover_every_trainable_parameter_once():
    model = DeepLabV3Plus(5, "resnet18", "live", representation=8, auxiliary=True)
    model.backbone.conv1.weight.requires_grad_(False)
    backbone, head = parameter_groups(model, 1e-3)
    assert (backbone["lr"], head["lr"], backbone["factor"], head["factor"]) == (
        1e-3,
        1e-2,
        1.0,
        10.0,
    )
    grouped = [id(p) for group in (backbone, head) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in backbone["params"]} < {id(p) for p in model.backbone.parameters()}
    assert id(model.auxiliary[0].weight) in {id(p) for p in head["params"]}
    torch.optim.SGD([backbone, head], lr=1e-3)


# --------------------------------------------------------------------------------------------------- build and loading


def test_build_none_needs_live_batch_norm():
    with pytest.raises(InputError, match="frozen batch norm needs loaded weights"):
        build("deeplabv2", "resnet18", 19, "frozen", "none")
    torch.manual_seed(0)
    model = build("deeplabv3plus", "resnet18", 16, "live", "none", aspp="dense", auxiliary=True)
    assert isinstance(model, DeepLabV3Plus) and model.training and model.auxiliary is not None
    assert model.eval()(torch.zeros(1, 3, 33, 33)).shape == (1, 16, 9, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(net="unet"), "unknown network 'unet'"),
        (dict(net="deeplabv2", backbone="vgg"), "unknown backbone 'vgg'"),
        (dict(net="deeplabv2", batch_norm="sync"), "'frozen' or 'live'"),
        (
            dict(net="deeplabv2", stem="wide", init="none", batch_norm="live"),
            "'torchvision' or 'deep'",
        ),
        (dict(net="deeplabv2", stem="deep"), "no ImageNet weights for stem 'deep'"),
        (dict(net="deeplabv2", backbone="resnet18", caffe=True), "not on resnet18"),
        (dict(net="deeplabv2", multi_grid=(2, 4)), "three factors"),
        (dict(net="deeplabv2", backbone="mobilenet_v2", multi_grid=(2, 2, 4)), "has no multi_grid"),
        (dict(net="deeplabv3plus", aspp="wide"), "'separable' or 'dense'"),
        (dict(net="deeplabv2", backbone="resnet18", init="/nowhere.pth"), "no file /nowhere.pth"),
    ],
)
def test_build_refuses_what_does_not_exist(arguments, message):
    with pytest.raises(InputError, match=message):
        build(**arguments)


def test_imagenet_weights_fill_the_backbone_or_name_the_missing_file(monkeypatch):
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(
        torchvision.models.ResNet18_Weights, "get_state_dict", lambda *_, **__: dict(state)
    )
    model = build("deeplabv2", "resnet18", init="imagenet")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(InputError) as error:
        build("deeplabv2", "resnet18", init="imagenet")
    message = str(error.value)
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    assert (
        "resnet18-f37072fd.pth" in message
        and folder in message
        and "no route" in message
        and "\n" not in message
    )


def test_own_layout_round_trip(tmp_path, capsys):
    torch.manual_seed(0)
    student, teacher, model = (DeepLabV2(5, "resnet18", "live", representation=8) for _ in range(3))
    student.backbone.bn1.num_batches_tracked += 3
    path = tmp_path / "last.pt"
    torch.save({"model": student.state_dict(), "teacher": teacher.state_dict(), "step": 7}, path)
    for which, saved in (("model", student), ("teacher", teacher)):
        assert load_checkpoint(model, path, which) == "alda"
        said = "holds a student and its teacher: the student is taken"
        assert (said in capsys.readouterr().out) == (which == "model")
        assert all(
            torch.equal(value, saved.state_dict()[name])
            for name, value in model.state_dict().items()
        )
    torch.save({f"module.{name}": value for name, value in student.state_dict().items()}, path)
    assert load_checkpoint(model, str(path)) == "alda"
    assert torch.equal(model.classifier.branches[3].bias, student.classifier.branches[3].bias)
    # live to frozen: counters are dropped
    frozen = build("deeplabv2", "resnet18", 5, "frozen", path, representation=8)
    assert torch.equal(frozen.backbone.bn1.weight, student.backbone.bn1.weight)
    torch.save({"model": frozen.state_dict()}, path)
    assert load_checkpoint(model, path) == "alda"  # frozen to live: counters stay
    with pytest.raises(InputError, match="holds no 'teacher'"):
        load_checkpoint(model, path, "teacher")
    with pytest.raises(InputError, match="which is"):
        load_checkpoint(model, path, "best")


def test_torchvision_file_fills_the_backbone_only(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "resnet18.pth"
    original = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(original, path)
    model = DeepLabV2(5, "resnet18", "frozen")
    head = model.classifier.branches[0].weight.clone()
    assert load_checkpoint(model, path) == "torchvision"
    assert torch.equal(model.backbone.layer1[0].conv1.weight, original["layer1.0.conv1.weight"])
    assert torch.equal(model.classifier.branches[0].weight, head)
    with pytest.raises(
        InputError, match=r"unexpected: backbone\.layer1\.0\.conv1|missing: backbone\."
    ):
        load_checkpoint(DeepLabV2(5, "resnet50", "frozen"), path)


def test_a_file_that_does_not_fit_is_listed_and_changes_nothing(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "bad.pt"
    model = DeepLabV2(5, "resnet18", "live")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state = {name: value for name, value in state.items() if "layer3" not in name}
    state["classifier.branches.0.bias"] = torch.zeros(19)
    state["surprise"] = torch.zeros(1)
    state["backbone.conv1.weight"] = "text"
    torch.save({"model": state}, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(model, path)
    message = str(error.value)
    missing = [name for name in before if "layer3" in name and "tracked" not in name]
    for text in (
        f"{len(missing)} missing: {', '.join(missing[:10])}, ...;",
        "1 unexpected: surprise;",
        "2 mis-shaped: backbone.conv1.weight None not ([64, 3, 7, 7])",
        "classifier.branches.0.bias ([19]) not ([5])",
        "DeepLabV2 (resnet18, 5 classes, live batch norm)",
        str(path),
    ):
        assert text in message, message
    assert missing[10] not in message and "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("alda-was-here",)


def test_files_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = DeepLabV2(5, "resnet18", "live")
    (tmp_path / "noise.pt").write_bytes(b"this is not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": Malicious()}, "malicious.pt")
    torch.save([torch.zeros(1)], "list.pt")
    torch.save({"epoch": 3}, "other.pt")
    torch.save({"feature_extractor": {}}, "half.pt")
    for name, message in {
        "noise.pt": "no torch checkpoint",
        "empty.pt": "no torch checkpoint",
        "malicious.pt": "no torch checkpoint",
        "list.pt": "holds a list",
        "other.pt": "unknown layout; it holds epoch",
        "half.pt": "holds no 'classifier'",
        "absent.pt": "no file absent.pt",
    }.items():
        with pytest.raises(InputError, match=message):
            load_checkpoint(model, name)
    assert not os.path.exists("alda-was-here")


def test_heads_that_a_file_lacks_start_at_random_and_say_so(tmp_path, capsys):
    """STAL from a source-trained network: only whole extra heads may be missing."""
    plain = build("deeplabv3plus", "resnet18", batch_norm="live", init="none")
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pt")
    network = {
        "batch_norm": "live",
        "init": str(tmp_path / "plain.pt"),
        "representation": 256,
        "auxiliary": True,
    }
    model = build("deeplabv3plus", "resnet18", **network)
    assert torch.equal(model.backbone.conv1.weight, plain.backbone.conv1.weight)
    out = capsys.readouterr().out
    assert "holds no representation head" in out and "holds no auxiliary head" in out
    state = model.state_dict()
    del state["representation.0.weight"]
    torch.save({"model": state}, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=r"1 missing: representation\.0\.weight"):
        build("deeplabv3plus", "resnet18", **{**network, "init": str(tmp_path / "broken.pt")})
