"""DeepLabV2 and DeepLabV3+ on torchvision's ResNets and MobileNetV2. What is the network?

    from alda.deeplab import build, load_checkpoint, parameter_groups, upsample

Papers: DeepLabV2 (Chen et al., arXiv 1606.00915), DeepLabV3+ (Chen et al., arXiv 1802.02611), and
the networks of RIPU (arXiv 2111.12940), STAL (arXiv 2301.13361) and CRST (arXiv 1908.09822), whose
recorded logits are the tests here.

Which arguments give which official network (all on ResNet-101, 19 classes):

    RIPU V2    DeepLabV2()
    RIPU V3+   DeepLabV3Plus()
    STAL V3+   DeepLabV3Plus(batch_norm="live", stem="deep", multi_grid=(2, 2, 4), aspp="dense", representation=256,
                             auxiliary=True)
    CRST V2    DeepLabV2(caffe=True)

Details that decide whether a network is the official one:

 1. Output stride 8: layer3 and layer4 lose their strides and are dilated by 2 and 4. The convolution that loses its
    stride keeps the dilation before it, so ImageNet weights still see the grid they were trained on (`_dilate`).
 2. V2 sums four dilated 3x3 convolutions that give class logits at once (1606.00915, Fig. 7). There is no softmax, no
    normalisation and no fifth branch.
 3. RIPU's frozen batch norm has no epsilon (models/layers.py). torchvision's FrozenBatchNorm2d gets eps=0.0.
 4. In RIPU's V3+ head the frozen batch norms are new layers: buffers that stay the identity, so the head has in effect
    no normalisation (its convolutions start from He's normal initialisation).
 5. RIPU concatenates (context, detail), STAL (detail, context); image pooling is RIPU's last branch and STAL's first.
 6. STAL's layer4 multiplies its dilations by (2, 2, 4): 4, 8, 16. Its 3x3 stem and CRST's network pool with ceil_mode.
 7. CRST's network comes from Caffe: the stride sits on the first 1x1 convolution of a block, and the first block of a
    dilated layer is dilated like the others.
 8. Every resize is bilinear with align_corners=True.
 9. MobileNetV2 (Sandler et al., arXiv 1801.04381) is in none of the four papers: it is here for small machines. Its last
    three inverted-residual stages are dilated like layer3 and layer4; the 1x1 layer to 1280 features is left out, and the
    separable head is 128 wide instead of 512. Its batch norm has torchvision's epsilon also when frozen: some of its
    ImageNet variances are 0.

Letters: N images, C classes, K features, H x W the images' size, h x w the size of a feature map.

Differences from papers and official code:

 D21. Frozen batch norm has no epsilon in RIPU's code, and in the V3+ head it is the identity:
      reproduced, because the published numbers were made with it. --init none needs live batch
      norm.
 D22. STAL's 3-convolution stem has no torchvision weights: the default network has torchvision's
      stem; what starts from STAL's own checkpoint has stem='deep'. CRST's network pools with
      ceil_mode by recollection, not by a recorded output. Its batch norm is frozen, as its script
      trains unless --is-training is given.
"""

import hashlib
import os
import pickle
import re
import struct
import zipfile
import zlib
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from alda import InputError

# name: how many features its three maps have, at strides 4, 8 and 8
BACKBONES = {
    "resnet18": (64, 256, 512),
    "resnet50": (256, 1024, 2048),
    "resnet101": (256, 1024, 2048),
    "mobilenet_v2": (24, 96, 320),
}
HIDDEN = 256  # features inside STAL's heads
DROPOUT = 0.1  # channel dropout of every V3+ head (RIPU classifier.py; STAL decoder.py)


# -------------------------------------------------------------------------------------------- parts


def upsample(logits, size):
    """Resize (N,C,h,w) maps, float, to (N,C,*size): bilinear, align_corners=True as in every
    official network."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


def _norm_layer(batch_norm, eps=0.0):
    """What makes a normalisation layer: "frozen" is buffers only, with `eps` (detail 3); "live"
    nn.BatchNorm2d, eps 1e-5."""
    if batch_norm not in ("frozen", "live"):
        raise InputError(f"batch norm is 'frozen' or 'live', not {batch_norm!r}")
    return partial(FrozenNorm, eps=eps) if batch_norm == "frozen" else nn.BatchNorm2d


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d, which returns float32 under autocast; this one returns the dtype
    of its input, as live batch norm does: (N,K,h,w) -> the same shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


def _conv_norm(inputs, outputs, kernel, norm, dilation=1, bias=False):
    """Convolution, normalisation, ReLU at stride 1, size kept."""
    conv = nn.Conv2d(
        inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias
    )
    return nn.Sequential(conv, norm(outputs), nn.ReLU(inplace=True))


class _DepthwiseOnCPU(torch.autograd.Function):
    """The dilated 3x3 convolution within each channel of (N,K,h,w), size kept, with a gradient for
    CPUs: torch's own is 3 to 15 times slower there than one convolution and nine sums."""

    @staticmethod
    def forward(ctx, features, weight, dilation):
        ctx.save_for_backward(features, weight)
        ctx.dilation = dilation
        return _depthwise(features, weight, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (N,K,h,w)
        features, weight = ctx.saved_tensors
        (h, w), d = grad.shape[2:], ctx.dilation
        to_features = _depthwise(grad, weight.to(grad.dtype).flip(2, 3), d)
        to_weight = torch.empty_like(weight)  # (K,1,3,3)
        x, g = features.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)  # (N,K,h,w) -> (N,h,w,K)
        for i, down in enumerate((-d, 0, d)):
            for j, right in enumerate((-d, 0, d)):  # what this weight has seen, and where it went
                seen = x[:, max(0, down) : max(0, h + down), max(0, right) : max(0, w + right)]
                went = g[:, max(0, -down) : max(0, h - down), max(0, -right) : max(0, w - right)]
                to_weight[:, 0, i, j] = (seen * went).sum((0, 1, 2), dtype=weight.dtype)
        return to_features, to_weight, None


def _depthwise(features, weight, dilation):
    return F.conv2d(features, weight, padding=dilation, dilation=dilation, groups=features.shape[1])


class DilatedDepthwise(nn.Conv2d):
    """A 3x3 convolution within each of `channels` channels, size kept, no bias. A plain nn.Conv2d but
    for the speed of its gradient on a CPU, which is equal to rounding."""

    def __init__(self, channels, dilation):
        super().__init__(
            channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False
        )

    def forward(self, features):
        if features.is_cpu and torch.is_grad_enabled():
            return _DepthwiseOnCPU.apply(features, self.weight, self.dilation[0])
        return super().forward(features)


def _separable(inputs, outputs, norm, dilation=1):
    """A 3x3 convolution within each channel, then a 1x1 across channels, each with normalisation
    and ReLU."""
    return nn.Sequential(
        DilatedDepthwise(inputs, dilation),
        norm(inputs),
        nn.ReLU(inplace=True),
        *_conv_norm(inputs, outputs, 1, norm),
    )


def _small_head(inputs, outputs, depth, norm):
    """STAL's classifier, representation (depth 2), auxiliary (depth 1) heads: 3x3 layers with
    dropout, then a 1x1."""
    layers = []
    for k in [inputs, HIDDEN][:depth]:
        layers += [*_conv_norm(k, HIDDEN, 3, norm, bias=True), nn.Dropout2d(DROPOUT)]
    return nn.Sequential(*layers, nn.Conv2d(HIDDEN, outputs, 1))


def _dilate(layer, before, after, grid=None):
    """Trade the stride of a layer (its blocks in order) for dilation, in place; the dilations of
    block i are multiplied by grid[i].

    The 3x3 convolution that had the stride takes the dilation `before`, all later ones `after`.
    This is torchvision's `replace_stride_with_dilation` for Bottleneck blocks, and the same rule
    for BasicBlock, which torchvision refuses.
    """
    dilation = before
    for i, block in enumerate(layer):
        for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
            strided, conv.stride = conv.stride == (2, 2), (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation * (grid[i] if grid else 1),) * 2
                dilation = after if strided else dilation


class Backbone(nn.Module):
    """A torchvision ResNet without its classifier, output stride 8, torchvision's parameter names.

    name        "resnet101", "resnet50" or "resnet18" (its BasicBlocks get strides and dilations by hand, `_dilate`)
    batch_norm  "frozen": buffers only, no epsilon (RIPU; CRST's network has 1e-5), sensible with loaded weights only;
                "live": nn.BatchNorm2d
    stem        "torchvision": one 7x7 convolution; "deep": STAL's three of 3x3, for which torchvision has no weights
    multi_grid  factors on the dilations of layer4's three blocks (resnet18 has two and uses the first two)
    caffe       True for CRST's network (detail 7)

    `forward(images (N,3,H,W) float) -> (layer1 (N,K1,H/4,W/4), layer3 (N,K3,H/8,W/8), layer4
    (N,K4,H/8,W/8))`, sizes rounded up (one more where a pooling has ceil_mode and H/2 is even);
    `widths` is (K1, K3, K4): (256, 1024, 2048), resnet18 (64, 256, 512). Raises InputError for
    arguments that make no network.
    """

    def __init__(self, name, batch_norm, stem="torchvision", multi_grid=(1, 1, 1), caffe=False):
        super().__init__()
        if stem not in ("torchvision", "deep"):
            raise InputError(f"stem is 'torchvision' or 'deep', not {stem!r}")
        if len(multi_grid) != 3:
            raise InputError(f"multi_grid is three factors, not {multi_grid!r}")
        if name == "resnet18" and (stem == "deep" or caffe):
            raise InputError(
                "stem 'deep' and caffe=True exist on resnet50 and resnet101 only, not on resnet18"
            )
        norm = _norm_layer(batch_norm, eps=1e-5 if caffe else 0.0)
        net = torchvision.models.get_model(name, weights=None, norm_layer=norm)
        if stem == "deep":
            _deepen_stem(net, norm)
        if caffe:
            net.layer2[0].conv1.stride, net.layer2[0].conv2.stride = (2, 2), (1, 1)  # detail 7
        _dilate(net.layer3, before=2 if caffe else 1, after=2)
        _dilate(net.layer4, before=4 if caffe else 2, after=4, grid=multi_grid)
        self.widths = BACKBONES[name]
        self.conv1, self.bn1, self.relu = net.conv1, net.bn1, net.relu
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=stem == "deep" or caffe)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4

    def forward(self, images):
        low = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        middle = self.layer3(self.layer2(low))
        return low, middle, self.layer4(middle)


def _deepen_stem(net, norm):
    """Give a bottleneck ResNet STAL's stem, in place: 3x3 convolutions to 64, 64, 128 features
    instead of one 7x7."""

    def conv(inputs, outputs, kernel, stride=1):
        layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return layer

    first = conv(3, 64, 3, stride=2), norm(64), nn.ReLU(inplace=True)
    second = conv(64, 64, 3), norm(64), nn.ReLU(inplace=True)
    net.conv1, net.bn1 = nn.Sequential(*first, *second, conv(64, 128, 3)), norm(128)
    net.layer1[0].conv1, net.layer1[0].downsample[0] = conv(128, 64, 1), conv(128, 256, 1)


class MobileNetBackbone(nn.Module):
    """torchvision's MobileNetV2 without its classifier, output stride 8, torchvision's parameter names
    (module docstring, detail 9).

    `batch_norm` is "frozen" or "live", with torchvision's epsilon in both. `forward(images (N,3,H,W)
    float) -> ((N,24,H/4,W/4), (N,96,H/8,W/8), (N,320,H/8,W/8))`, sizes rounded up; `widths` is
    (24, 96, 320).
    """

    def __init__(self, batch_norm):
        super().__init__()
        norm = _norm_layer(batch_norm, eps=1e-5)
        self.features = torchvision.models.mobilenet_v2(norm_layer=norm).features[:18]
        _dilate(self.features[7:14], before=1, after=2)
        _dilate(self.features[14:], before=2, after=4)
        for block in self.features[7:]:  # InvertedResidual: 1x1, 3x3 within each channel, 1x1
            fast = DilatedDepthwise(block.conv[1][0].in_channels, block.conv[1][0].dilation[0])
            fast.weight = block.conv[1][0].weight
            block.conv[1][0] = fast
        self.widths = BACKBONES["mobilenet_v2"]

    def forward(self, images):
        low = self.features[:4](images)
        middle = self.features[4:14](low)
        return low, middle, self.features[14:](middle)


def _backbone(name, batch_norm, **trunk):
    """The backbone by its name; `trunk` are the further arguments of a ResNet's. Raises
    InputError."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    if name != "mobilenet_v2":
        return Backbone(name, batch_norm, **trunk)
    if trunk:
        raise InputError(f"mobilenet_v2 has no {', '.join(trunk)}: these are arguments of ResNets")
    return MobileNetBackbone(batch_norm)


class _ImagePool(nn.Module):
    """The image-level branch of an ASPP: the mean over the image, a 1x1 layer, spread over the map
    again."""

    def __init__(self, inputs, outputs, norm):
        super().__init__()
        self.conv = _conv_norm(inputs, outputs, 1, norm)

    def forward(self, features):
        if self.training and len(features) == 1 and isinstance(self.conv[1], nn.BatchNorm2d):
            raise InputError(
                "DeepLabV3+ with live batch norm needs 2 images a batch or more to train (image pooling)"
            )
        pooled = self.conv(features.mean((2, 3), keepdim=True))  # (N,K,h,w) -> (N,K,1,1)
        return pooled.expand(-1, -1, *features.shape[2:])  # (N,K,1,1) -> (N,K,h,w)


class _ASPP(nn.Module):
    """Atrous spatial pyramid pooling (1802.02611): branches on (N,K,h,w), concatenated, then a 3x3
    layer."""

    def __init__(self, branches, width, norm):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.project = _conv_norm(len(branches) * width, width, 3, norm)

    def forward(self, features):
        # (N,5K,h,w) -> (N,K,h,w)
        return self.project(torch.cat([branch(features) for branch in self.branches], dim=1))


class _SumOfBranches(nn.Module):
    """DeepLabV2's classifier: logits = sum_r conv3x3_r(features), dilations r = 6, 12, 18, 24, with
    bias (detail 2)."""

    def __init__(self, inputs, num_classes):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(inputs, num_classes, 3, padding=r, dilation=r) for r in (6, 12, 18, 24)
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)

    def forward(self, features):
        return sum(branch(features) for branch in self.branches)


# ----------------------------------------------------------------------------------------- networks


class DeepLabV2(nn.Module):
    """DeepLabV2: a backbone at output stride 8 and the sum of four dilated classifiers (module
    docstring, detail 2).

    num_classes                  C
    backbone, batch_norm         name and batch_norm of the `Backbone`
    representation               width of a representation head on the classifier's input, 0 for none. STAL: 256, on
                                 V3+; on V2 it is this project's reading, the same head on layer4
    auxiliary                    True adds a classifier on layer3, for training (STAL)
    stem, multi_grid, caffe      handed to the `Backbone`

    `model(images)` takes (N,3,H,W) float (RGB, ImageNet mean and deviation) and gives logits
    (N,C,h,w) at stride 8. `model(images, extras=True)` gives (logits, representation (N,K,h,w) or
    None, auxiliary logits (N,C,h,w) or None). Raises InputError for arguments that make no network.
    """

    def __init__(
        self,
        num_classes=19,
        backbone="resnet101",
        batch_norm="frozen",
        representation=0,
        auxiliary=False,
        **trunk,
    ):
        super().__init__()
        self.backbone = _backbone(backbone, batch_norm, **trunk)
        self.classifier = _SumOfBranches(self.backbone.widths[2], num_classes)
        _add_extras(
            self,
            self.backbone.widths[2],
            num_classes,
            representation,
            auxiliary,
            _norm_layer(batch_norm),
        )
        self.description = f"DeepLabV2 ({backbone}, {num_classes} classes, {batch_norm} batch norm)"

    def forward(self, images, extras=False):
        _, middle, deep = self.backbone(images)
        return _outputs(self, deep, middle, extras)


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+: context from an ASPP on layer4, detail from layer1, a decoder at stride 4.

    aspp  "separable" (RIPU): depthwise separable branches 6/12/18, width 512, 48 detail features, separable decoder;
          "dense" (STAL): 3x3 branches 12/24/36, width 256, 256 detail features, decoder of two 3x3 convolutions.

    The other arguments, `forward` and errors are those of DeepLabV2; logits and representation have
    stride 4, auxiliary logits stride 8. Training with live batch norm on a single image raises
    InputError.
    """

    def __init__(
        self,
        num_classes=19,
        backbone="resnet101",
        batch_norm="frozen",
        aspp="separable",
        representation=0,
        auxiliary=False,
        **trunk,
    ):
        super().__init__()
        if aspp not in ("separable", "dense"):
            raise InputError(f"aspp is 'separable' or 'dense', not {aspp!r}")
        norm = _norm_layer(batch_norm)
        self.backbone = _backbone(backbone, batch_norm, **trunk)
        self.dense = aspp == "dense"
        width = 128 if backbone == "mobilenet_v2" else 512  # of the separable head, detail 9
        if self.dense:
            fused = self._dense_head(num_classes, norm)
        else:
            fused = self._separable_head(num_classes, norm, width)
        _add_extras(self, fused, num_classes, representation, auxiliary, norm)
        self.description = f"DeepLabV3Plus ({backbone}, {num_classes} classes, {batch_norm} batch norm, aspp {aspp})"

    def _separable_head(self, num_classes, norm, width, detail=48):
        """RIPU's head (core/models/classifier.py); returns the number of features its decoder
        reads."""
        low, _, deep = self.backbone.widths
        branches = [
            _conv_norm(deep, width, 1, norm),
            *(_separable(deep, width, norm, r) for r in (6, 12, 18)),
        ]
        self.aspp = _ASPP([*branches, _ImagePool(deep, width, norm)], width, norm)
        self.shortcut = _conv_norm(low, detail, 1, norm)
        decoder = [_separable(width + detail, width, norm), _separable(width, width, norm)]
        self.classifier = nn.Sequential(
            *decoder, nn.Dropout2d(DROPOUT), nn.Conv2d(width, num_classes, 1)
        )
        for part in (self.aspp, self.shortcut, self.classifier):
            for conv in [m for m in part.modules() if isinstance(m, nn.Conv2d)]:
                nn.init.kaiming_normal_(conv.weight)  # detail 4
        return width + detail

    def _dense_head(self, num_classes, norm, width=HIDDEN, detail=256):
        """STAL's head (stal/models/decoder.py); returns the number of features its decoder
        reads."""
        low, _, deep = self.backbone.widths
        branches = [
            _conv_norm(deep, width, 1, norm),
            *(_conv_norm(deep, width, 3, norm, r) for r in (12, 24, 36)),
        ]
        self.aspp = _ASPP([_ImagePool(deep, width, norm), *branches], width, norm)
        self.aspp.project.append(nn.Dropout2d(DROPOUT))
        self.shortcut = _conv_norm(low, detail, 1, norm, bias=True)
        self.classifier = _small_head(width + detail, num_classes, 2, norm)
        return width + detail

    def forward(self, images, extras=False):
        low, middle, deep = self.backbone(images)
        detail = self.shortcut(low)  # (N,48,H/4,W/4) or (N,256,H/4,W/4)
        context = upsample(self.aspp(deep), low.shape[2:])  # (N,K,H/8,W/8) -> (N,K,H/4,W/4)
        # detail 5
        features = torch.cat((detail, context) if self.dense else (context, detail), dim=1)
        return _outputs(self, features, middle, extras)


def checkpoint_blocks(model):
    """Activation checkpointing (Chen et al., arXiv 1604.06174), in place: every block of the backbone
    keeps its input alone and is computed again for its gradient. Memory for time; the same outputs and
    gradients.

    The second pass must not move the running statistics of live batch norm again: its momentum is 0
    meanwhile (`num_batches_tracked`, which nothing reads, counts both passes)."""
    kinds = (BasicBlock, Bottleneck, InvertedResidual)
    for block in [m for m in model.backbone.modules() if isinstance(m, kinds)]:
        norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        contexts = partial(_contexts, norms)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _contexts(norms):
    """What the first and the second pass of a checkpointed block run in."""
    return nullcontext(), _still(norms)


@contextmanager
def _still(norms):
    """Inside, the running statistics of these batch norms do not move."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _add_extras(model, features, num_classes, representation, auxiliary, norm):
    """Give a network its representation and auxiliary heads, or None."""
    model.representation = model.auxiliary = None
    if representation:
        model.representation = _small_head(features, representation, 2, norm)
    if auxiliary:
        model.auxiliary = _small_head(model.backbone.widths[1], num_classes, 1, norm)


def _outputs(model, features, middle, extras):
    """Logits alone, or (logits, representation, auxiliary logits) with None for a head that was not
    built."""
    logits = model.classifier(features)
    if not extras:
        return logits
    representation = model.representation(features) if model.representation is not None else None
    return logits, representation, model.auxiliary(middle) if model.auxiliary is not None else None


def build(
    net,
    backbone="resnet101",
    num_classes=19,
    batch_norm="frozen",
    init="imagenet",
    which="model",
    **network,
):
    """A network with its starting weights, on the CPU, in train mode.

    net      "deeplabv2" or "deeplabv3plus"; `network` holds further arguments of DeepLabV2 or DeepLabV3Plus
    init     "imagenet": torchvision's IMAGENET1K_V1 in the backbone, downloaded once; "none": random (live batch norm
             only); else the path of a file for `load_checkpoint`, read with `which`

    Raises InputError: unknown name, random weights under frozen batch norm, ImageNet weights
    neither at hand nor downloadable (the message names the file and its folder), a file that does
    not fit.
    """
    classes = {"deeplabv2": DeepLabV2, "deeplabv3plus": DeepLabV3Plus}
    if net not in classes:
        raise InputError(f"unknown network {net!r}; there are {', '.join(classes)}")
    if init == "none" and batch_norm == "frozen":
        raise InputError(
            "frozen batch norm needs loaded weights: random ones (init 'none') need batch norm 'live'"
        )
    if init == "imagenet" and network.get("stem") == "deep":
        raise InputError(
            "torchvision has no ImageNet weights for stem 'deep': init is 'none' or a file"
        )
    model = classes[net](num_classes, backbone, batch_norm, **network)
    if init == "imagenet":
        _fill(
            model,
            _imagenet_weights(backbone),
            "backbone.",
            f"torchvision's ImageNet weights of {backbone}",
        )
    elif init != "none":
        load_checkpoint(model, init, which)
    return model


def parameter_groups(model, lr, head_factor=10.0):
    """Two groups for torch.optim.SGD: the backbone at `lr`, all heads at head_factor * lr (10 in
    RIPU, STAL and CRST).

    Only parameters that require a gradient. A group's "factor" is its multiple of the base rate,
    for schedules: `group["lr"] = rate(step) * group["factor"]`.
    """
    parts = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[name.startswith("backbone.")].append(parameter)
    groups = [("backbone", parts[True], 1.0), ("head", parts[False], head_factor)]
    return [
        {"name": name, "params": params, "lr": lr * factor, "factor": factor}
        for name, params, factor in groups
    ]


# ------------------------------------------------------------------------------------------ weights

# Official names to ours, as (pattern, replacement) applied in this order; what becomes "" is left
# out.
RIPU_NAMES = (
    (r"^conv2d_list\.", "classifier.branches."),
    (r"^parallel_branches\.", "aspp.branches."),
    (r"^global_branch\.1\.", "aspp.branches.4.conv.0."),
    (r"^global_branch\.2\.", "aspp.branches.4.conv.1."),
    (r"^bottleneck\.", "aspp.project."),
    (r"^decoder\.", "classifier."),
    (r"\.depthwise_conv\.", ".0."),
    (r"\.depthwise_bn\.", ".1."),
    (r"\.pointwise_conv\.", ".3."),
    (r"\.pointwise_bn\.", ".4."),
)
STAL_NAMES = (
    (r"^encoder\.", "backbone."),
    (r"^decoder\.low_conv\.", "shortcut."),
    (r"^decoder\.aspp\.conv1\.1\.", "aspp.branches.0.conv.0."),
    (r"^decoder\.aspp\.conv1\.2\.", "aspp.branches.0.conv.1."),
    *((rf"^decoder\.aspp\.conv{i + 1}\.", f"aspp.branches.{i}.") for i in (1, 2, 3, 4)),
    (r"^decoder\.head\.", "aspp.project."),
    (r"^decoder\.(classifier|representation)\.", r"\1."),
    (r"^auxor\.aux\.", "auxiliary."),
)
CRST_NAMES = (
    (r"^layer5\.conv2d_list\.", "classifier.branches."),
    (r"^(?!classifier\.)", "backbone."),
)
TORCHVISION_NAMES = (
    (r"^(fc|classifier|features\.18)\..*", ""),  # MobileNetV2's last layer, detail 9
    (r"^(?=.)", "backbone."),
)


def _rename(state, names):
    """{our name: tensor} of a state dict with official names; drops a leading "module.", keeps
    unknown names."""
    renamed = {}
    for name, tensor in state.items():
        name = str(name).removeprefix("module.")
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    renamed.pop("", None)
    return renamed


# the arguments of `build` for the files of official code; names and shapes do not tell them all:
# CRST's weights also fit a network with other strides
OFFICIAL_NETWORKS = {
    "stal": {
        "net": "deeplabv3plus",
        "batch_norm": "live",
        "stem": "deep",
        "multi_grid": (2, 2, 4),
        "aspp": "dense",
    },
    "crst": {"net": "deeplabv2", "batch_norm": "frozen", "caffe": True},
}


def network_in(content, path):
    """The arguments of `build` that belong to the weights in `content`, what `read` gave of the file
    `path`: a checkpoint of this package says them, STAL's and CRST's layouts imply them; {} for
    others (RIPU's network is `build`'s default). Raises InputError."""
    layout = layout_of(content, path)
    if layout == "alda":
        said = content.get("network")
        return said if isinstance(said, dict) else {}  # of another program: "resnet18", say
    return OFFICIAL_NETWORKS.get(layout, {})


def load_checkpoint(model, path, which="model"):
    """Fill `model` from a file of as many classes and return the name of the file's layout.

    "alda"         {"model": state dict, "teacher": state dict, ...}, or such a state dict alone
    "ripu"         {"feature_extractor": ..., "classifier": ...}
    "stal"         {"model_state": ..., "teacher_state": ...}
    "crst"         one flat state dict with layer5.conv2d_list
    "torchvision"  one flat state dict of a classification network (own ImageNet file): fills the backbone only

    `which` is "model" or "teacher", for layouts that hold both; a line says that a teacher is left
    out. Names may carry "module.". Only tensors and plain values are unpickled (weights_only=True, and
    NumPy scalars, which official files hold as scores). Strict: raises InputError that lists the
    missing, unexpected and mis-shaped names, and changes nothing, when the file does not fit; only
    `num_batches_tracked` may be missing or too many, so files pass between frozen and live batch norm.
    A representation or auxiliary head of which the file holds nothing stays as it is, one that the
    network has not is left out, and a line says so. A network trained with live batch norm (epsilon
    1e-5) gives slightly other outputs when it is loaded as frozen (no epsilon).
    """
    if which not in ("model", "teacher"):
        raise InputError(f"which is 'model' or 'teacher', not {which!r}")
    content = read(path)
    layout, state = _state_of(content, which, path)
    if which == "model" and {"teacher", "teacher_state"} & content.keys():
        print(f"{path} holds a student and its teacher: the student is taken", flush=True)
    if layout == "torchvision":
        _fill(model, state, "backbone.", f"{path} ({layout} layout)")
        return layout
    own = model.state_dict()
    for head in ("representation.", "auxiliary."):
        built = {name: tensor for name, tensor in own.items() if name.startswith(head)}
        held = [name for name in state if name.startswith(head)]
        if built and not held:
            print(f"{path} holds no {head[:-1]} head: it starts from random weights", flush=True)
            state |= built
        elif held and not built:
            print(f"{path} holds a {head[:-1]} head: it is left out here", flush=True)
            state = {name: tensor for name, tensor in state.items() if name not in held}
    _fill(model, state, "", f"{path} ({layout} layout)")
    return layout


def read(path):
    """The dictionary in a torch file, read without running any code of the file. Raises InputError,
    also where a checksum of the file (CRC-32 of each tensor, which torch writes and does not check)
    says that it was damaged."""
    if not os.path.isfile(path):
        raise InputError(
            f"no file {path}: expected a checkpoint of this package, RIPU, STAL, CRST or torchvision"
        )
    try:
        if damaged := damaged_part(path):
            raise ValueError(f"damaged at {damaged}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        # a NumPy scalar, perhaps: STAL's files hold their best mIoU as one
        except pickle.UnpicklingError:
            scalar = np.float64(0).__reduce__()[0]  # NumPy's own maker of scalars; NumPy 2 moved it
            names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
            kinds = [type(np.dtype(kind)) for kind in ("float32", "float64", "int64")]
            with torch.serialization.safe_globals([*names, np.dtype, *kinds]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        MemoryError,
        AssertionError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    ) as error:
        kind = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise InputError(
            f"{path} is no torch checkpoint of tensors and plain values ({kind}): is it another "
            "file, or damaged?"
        ) from error
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} holds a {type(content).__name__}, expected a dictionary of tensors"
        )
    return content


def damaged_part(path):
    """The name of the first part of a torch file whose checksum is wrong; None where all are right,
    and for a file of the format before torch 1.6, which has none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def backbone_only(init):
    """Whether a start (`init` of `build`) leaves the classifier at random weights: "imagenet", "none", or
    the file of a classification network. Raises InputError."""
    return init in ("imagenet", "none") or layout_of(read(init), init) == "torchvision"


def layout_of(content, path):
    """The name of the layout of a file's content, see `load_checkpoint`. Raises InputError."""
    if "model_state" in content or "teacher_state" in content:
        return "stal"
    modules = {str(name).removeprefix("module.").split(".")[0] for name in content}
    if modules & {"model", "teacher", "backbone"}:
        return "alda"
    if "feature_extractor" in content:
        return "ripu"
    if "layer5" in modules:
        return "crst"
    if modules & {"layer4", "features"}:
        return "torchvision"
    raise InputError(
        f"{path} has an unknown layout; it holds {', '.join(map(str, list(content)[:10]))}"
    )


def _state_of(content, which, path):
    """(layout, {our name: tensor}) of a file's content; see `load_checkpoint` for the layouts."""

    def part(key):
        if not isinstance(content.get(key), dict):
            raise InputError(
                f"{path} holds no {key!r}, only {', '.join(map(str, list(content)[:10]))}"
            )
        return content[key]

    layout = layout_of(content, path)
    if layout == "stal":
        return layout, _rename(part(f"{which}_state"), STAL_NAMES)
    if "model" in content or which == "teacher":
        return layout, _rename(part(which), ())
    if layout == "ripu":
        return layout, _rename({**part("feature_extractor"), **part("classifier")}, RIPU_NAMES)
    names = {"alda": (), "crst": CRST_NAMES, "torchvision": TORCHVISION_NAMES}
    return layout, _rename(content, names[layout])


def _fill(model, state, prefix, source):
    """Load `state` into all entries of `model` named `prefix`..., or raise InputError and change
    nothing."""
    own = model.state_dict()
    wanted = {name: tensor.shape for name, tensor in own.items() if name.startswith(prefix)}
    found = {name: getattr(tensor, "shape", None) for name, tensor in state.items()}
    both = [name for name in found if name in wanted]
    problems = {
        "missing": [n for n in wanted if n not in found and not n.endswith("num_batches_tracked")],
        "unexpected": [
            n for n in found if n not in wanted and not n.endswith("num_batches_tracked")
        ],
        "mis-shaped": [f"{n} {found[n]} not {wanted[n]}" for n in both if found[n] != wanted[n]],
    }
    if any(problems.values()):
        text = [
            f"{len(n)} {kind}: {', '.join(n[:10])}{', ...' * (len(n) > 10)}"
            for kind, n in problems.items()
            if n
        ]
        text = "; ".join(text).replace("torch.Size", "")
        raise InputError(
            f"{source} does not fit {model.description}, expected {len(wanted)} tensors: {text}"
        )
    model.load_state_dict({**own, **{name: state[name] for name in both}})


def _imagenet_weights(backbone):
    """torchvision's IMAGENET1K_V1 state dict in our names, without the 1000-class layer, from torch
    hub's folder. Reads tensors only; a file there that is not torchvision's raises InputError."""
    weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    name = os.path.basename(weights.url)
    check_sum(os.path.join(folder, name), name.rpartition("-")[2].removesuffix(".pth"))
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            f"no ImageNet weights of {backbone} ({' '.join(str(error).split())[:160]}): download "
            f"{weights.url} elsewhere and put the file {name} into {folder}; or start from another "
            "file or, random, from init 'none'"
        ) from error
    return _rename(state, TORCHVISION_NAMES)


def check_sum(path, sha256):
    """Raises InputError where the file `path` is there and its sum does not begin with `sha256`."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if not found.startswith(sha256):
        raise InputError(
            f"{path}: is not torchvision's file (its sha256 begins with {found[:8]}, not {sha256}); "
            "remove it, it is downloaded again"
        )
