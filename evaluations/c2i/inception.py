"""The Inception network of December 2015, as the TensorFlow evaluator runs it.

Input: uint8 images of any size. Output: pool features (2048), spatial features (2023) and softmax
(1008). All published FIDs use this network, and no other Inception gives the same numbers.
Parameter names are those of torchvision and pytorch-fid. Differences from torchvision's network:
TF1's resize, average pools that do not count the padding, a max pool in the last block, 1008
classes and no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from evaluations.c2i.features import Features
from evaluations.c2i.graphdef import Node, read_graphdef
from utils.checkpoints.weights_file import load_checkpoint, load_strictly
from utils.files import require_file, sha256_file

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7
CLASSES = 1008


@dataclass(frozen=True)
class WeightsFile:
    """A published weights file, identified by its hash."""

    name: str
    size: int
    sha256: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} ({self.size:,} bytes, sha256 {self.sha256}, from {self.source})"


_PTH = (95_628_359, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
PUBLISHED_WEIGHTS = (
    WeightsFile(
        "classify_image_graph_def.pb",
        95_673_916,
        "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
    ),
    WeightsFile(
        "pt_inception-2015-12-05-6726825d.pth",
        *_PTH,
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        *_PTH,
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
)
DOWNLOADED = PUBLISHED_WEIGHTS[1]


class Inception2015(nn.Module):
    """``FeatureNetwork``: images (B, H, W, 3) -> ``Features``. Only for evaluation, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = BlockA(192, pool_features=32)
        self.Mixed_5c = BlockA(256, pool_features=64)
        self.Mixed_5d = BlockA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = BlockC(768, channels_7x7=128)
        self.Mixed_6c = BlockC(768, channels_7x7=160)
        self.Mixed_6d = BlockC(768, channels_7x7=160)
        self.Mixed_6e = BlockC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = BlockE(1280)
        self.Mixed_7c = LastBlockE(2048)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> Features:
        """``images`` (B, H, W, 3) uint8, or float32 in 0-255 -> ``Features`` in float32."""
        x = resize_tf1(images, IMAGE_SIZE)  # (B, 299, 299, 3)
        x = (x - 128) * 0.0078125  # (B, 299, 299, 3) in [-1, 1)
        x = x.permute(0, 3, 1, 2)  # (B, 3, 299, 299), channels last in memory
        x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
        x = self.Conv2d_2b_3x3(x)  # (B, 64, 147, 147)
        x = F.max_pool2d(x, kernel_size=3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
        x = self.Conv2d_4a_3x3(x)  # (B, 192, 71, 71)
        x = F.max_pool2d(x, kernel_size=3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5b(x)  # (B, 256, 35, 35)
        x = self.Mixed_5c(x)  # (B, 288, 35, 35)
        x = self.Mixed_5d(x)  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = self.Mixed_6b(x)  # (B, 768, 17, 17)
        x = self.Mixed_6c(x)  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17), of Mixed_6d.branch1x1
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)  # (B, 2023), height, width, channel
        x = self.Mixed_6e(x)  # (B, 768, 17, 17)
        x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
        x = self.Mixed_7b(x)  # (B, 2048, 8, 8)
        x = self.Mixed_7c(x)  # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))  # (B, 2048)
        logits = pool @ self.fc.weight.T  # (B, 1008); the evaluator leaves the bias out
        return Features(pool, spatial, logits.softmax(dim=1))


class BlockA(InceptionA):
    """Mixed_5b to 5d."""

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)  # (B, 64, 35, 35)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))  # (B, 64, 35, 35)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # (B, 96, 35, 35)
        branch3x3dbl = self.branch3x3dbl_3(branch3x3dbl)  # (B, 96, 35, 35)
        branch_pool = self.branch_pool(_average_pool(x))  # (B, 32 or 64, 35, 35)
        branches = [branch1x1, branch5x5, branch3x3dbl, branch_pool]
        return torch.cat(branches, dim=1)  # (B, 256 or 288, 35, 35)


class BlockC(InceptionC):
    """Mixed_6b to 6e."""

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)  # (B, 192, 17, 17)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))  # (B, 192, 17, 17)
        branch7x7dbl = self.branch7x7dbl_2(self.branch7x7dbl_1(x))  # (B, 128-192, 17, 17)
        branch7x7dbl = self.branch7x7dbl_4(self.branch7x7dbl_3(branch7x7dbl))  # (B, 128-192, ...)
        branch7x7dbl = self.branch7x7dbl_5(branch7x7dbl)  # (B, 192, 17, 17)
        branch_pool = self.branch_pool(_average_pool(x))  # (B, 192, 17, 17)
        branches = [branch1x1, branch7x7, branch7x7dbl, branch_pool]
        return torch.cat(branches, dim=1)  # (B, 768, 17, 17)


class BlockE(InceptionE):
    """Mixed_7b."""

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)  # (B, 320, 8, 8)
        h = self.branch3x3_1(x)  # (B, 384, 8, 8)
        branch3x3 = [self.branch3x3_2a(h), self.branch3x3_2b(h)]  # 2 x (B, 384, 8, 8)
        h = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # (B, 384, 8, 8)
        branch3x3dbl = [self.branch3x3dbl_3a(h), self.branch3x3dbl_3b(h)]  # 2 x (B, 384, 8, 8)
        branch_pool = self.branch_pool(self.pool(x))  # (B, 192, 8, 8)
        branches = [branch1x1, *branch3x3, *branch3x3dbl, branch_pool]
        return torch.cat(branches, dim=1)  # (B, 2048, 8, 8)

    def pool(self, x: Tensor) -> Tensor:
        """3x3 pooling before the last branch: (B, C, 8, 8) -> the same."""
        return _average_pool(x)


class LastBlockE(BlockE):
    """Mixed_7c, with a max pool."""

    def pool(self, x: Tensor) -> Tensor:
        """3x3 pooling before the last branch: (B, C, 8, 8) -> the same."""
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def _average_pool(x: Tensor) -> Tensor:
    """3x3 means over the pixels inside the map; padding is not counted."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """TF1's bilinear resize, bit for bit: (B, H, W, C) of any dtype -> float32 (B, size, size, C).

    Output i is at input position i * (H / size), without half-pixel shift or antialiasing; columns
    are interpolated first.
    """
    x = images.float()  # (B, H, W, C)
    low, high, weight = _resize_grid(x.shape[2], size, x.device)
    left, right = x[:, :, low], x[:, :, high]  # (B, H, size, C)
    x = left + (right - left) * weight[:, None]  # (B, H, size, C)
    low, high, weight = _resize_grid(x.shape[1], size, x.device)
    top, bottom = x[:, low], x[:, high]  # (B, size, size, C)
    return top + (bottom - top) * weight[:, None, None]  # (B, size, size, C)


def _resize_grid(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return both neighbours (int64) and the upper one's weight (float32), each (size,)."""
    scale = float(np.float32(length) / np.float32(size))
    position = torch.arange(size, dtype=torch.float32, device=device) * scale
    low = position.floor()
    return low.long(), (low + 1).clamp(max=length - 1).long(), position - low


def load_inception(path: str | Path) -> Inception2015:
    """Load the network from a TensorFlow graph (``.pb``) or pytorch-fid's state dict, on the CPU.

    Raises ``ValueError`` if the file is neither.
    """
    if Path(path).suffix == ".pb":
        try:
            return build_inception(state_of_graph(read_graphdef(Path(path).read_bytes())), path)
        except ValueError as error:
            raise ValueError(
                f"--inception-weights: {path} is not the Inception graph of 2015: {error}"
            ) from error
    return build_inception(load_checkpoint(path, "--inception-weights"), path)


def state_of_graph(nodes: Mapping[str, Node]) -> dict[str, Tensor]:
    """Convert nodes of the 2015 graph to our state dict; ``ValueError`` if a constant is missing.

    A batch norm without ``scale_after_normalization`` ignores its gamma, so gamma becomes 1.
    """
    constants = {name: node.value for name, node in nodes.items() if node.value is not None}
    for name, node in nodes.items():
        scaled = node.switches.get("scale_after_normalization", False)
        if node.op == "BatchNormWithGlobalNormalization" and not scaled:
            shape = np.shape(constants.get(f"{name}/beta", ()))
            constants[f"{name}/gamma"] = np.ones(shape, np.float32)
    try:
        return state_from_tensorflow(constants)
    except KeyError as error:
        raise ValueError(f"it has no constant {error}") from error


def build_inception(state: Mapping[str, Tensor], source: str | Path) -> Inception2015:
    """Build the network, in channels-last format and with batch norms folded into convolutions."""
    network = Inception2015()
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    load_strictly(network, {**counters, **state}, source, "the Inception network of 2015")
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return network.to(memory_format=torch.channels_last)


def find_weights(path: str | Path | None, folder: Path, allow_unknown: bool) -> Path:
    """Return the weights file: ``path``, or a published one in ``folder``; its hash must be known.

    Raises ``ValueError`` naming the expected files with size, hash and source.
    """
    files = " or ".join(map(str, PUBLISHED_WEIGHTS))
    wanted = f"expected {files} in {folder}/ or at --inception-weights"
    if path is None:
        paths = (folder / w.name for w in PUBLISHED_WEIGHTS)
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise ValueError(f"no Inception weights: {wanted}")
    path = require_file(path, "--inception-weights", wanted)
    if allow_unknown:
        return path
    size = path.stat().st_size
    of_size = {w.sha256 for w in PUBLISHED_WEIGHTS if w.size == size}
    if of_size and sha256_file(path) in of_size:
        return path
    how = "sha256" if of_size else "size"
    raise ValueError(
        f"--inception-weights: {path} ({size:,} bytes) is not a published file by its {how}: "
        f"{wanted}; --allow-unknown-weights accepts it"
    )


def download_weights(folder: Path) -> None:
    """Download a published file into ``folder`` unless one exists; its hash is checked first."""
    if any((folder / w.name).is_file() for w in PUBLISHED_WEIGHTS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = str(folder / DOWNLOADED.name)
        torch.hub.download_url_to_file(DOWNLOADED.source, file, DOWNLOADED.sha256)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--download: {DOWNLOADED.source} cannot be fetched into {folder}: {error}"
        ) from error


# Convolutions of each block: torchvision's name -> TensorFlow's scope within the block's scope.
# fmt: off
_SCOPES_A = {
    "branch1x1": "conv",
    "branch5x5_1": "tower/conv",
    "branch5x5_2": "tower/conv_1",
    "branch3x3dbl_1": "tower_1/conv",
    "branch3x3dbl_2": "tower_1/conv_1",
    "branch3x3dbl_3": "tower_1/conv_2",
    "branch_pool": "tower_2/conv",
}
_SCOPES_B = {
    "branch3x3": "conv",
    "branch3x3dbl_1": "tower/conv",
    "branch3x3dbl_2": "tower/conv_1",
    "branch3x3dbl_3": "tower/conv_2",
}
_SCOPES_C = {
    "branch1x1": "conv",
    "branch7x7_1": "tower/conv",
    "branch7x7_2": "tower/conv_1",
    "branch7x7_3": "tower/conv_2",
    "branch7x7dbl_1": "tower_1/conv",
    "branch7x7dbl_2": "tower_1/conv_1",
    "branch7x7dbl_3": "tower_1/conv_2",
    "branch7x7dbl_4": "tower_1/conv_3",
    "branch7x7dbl_5": "tower_1/conv_4",
    "branch_pool": "tower_2/conv",
}
_SCOPES_D = {
    "branch3x3_1": "tower/conv",
    "branch3x3_2": "tower/conv_1",
    "branch7x7x3_1": "tower_1/conv",
    "branch7x7x3_2": "tower_1/conv_1",
    "branch7x7x3_3": "tower_1/conv_2",
    "branch7x7x3_4": "tower_1/conv_3",
}
_SCOPES_E = {
    "branch1x1": "conv",
    "branch3x3_1": "tower/conv",
    "branch3x3_2a": "tower/mixed/conv",
    "branch3x3_2b": "tower/mixed/conv_1",
    "branch3x3dbl_1": "tower_1/conv",
    "branch3x3dbl_2": "tower_1/conv_1",
    "branch3x3dbl_3a": "tower_1/mixed/conv",
    "branch3x3dbl_3b": "tower_1/mixed/conv_1",
    "branch_pool": "tower_2/conv",
}
_BLOCKS = {
    "Mixed_5b": ("mixed", _SCOPES_A),
    "Mixed_5c": ("mixed_1", _SCOPES_A),
    "Mixed_5d": ("mixed_2", _SCOPES_A),
    "Mixed_6a": ("mixed_3", _SCOPES_B),
    "Mixed_6b": ("mixed_4", _SCOPES_C),
    "Mixed_6c": ("mixed_5", _SCOPES_C),
    "Mixed_6d": ("mixed_6", _SCOPES_C),
    "Mixed_6e": ("mixed_7", _SCOPES_C),
    "Mixed_7a": ("mixed_8", _SCOPES_D),
    "Mixed_7b": ("mixed_9", _SCOPES_E),
    "Mixed_7c": ("mixed_10", _SCOPES_E),
}
# fmt: on
TENSORFLOW_SCOPES = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_2a_3x3": "conv_1",
    "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
    **{
        f"{block}.{branch}": f"{scope}/{inner}"
        for block, (scope, branches) in _BLOCKS.items()
        for branch, inner in branches.items()
    },
}
# parameter within a convolution's module -> constant within its TensorFlow scope
TENSORFLOW_CONSTANTS = {
    "conv.weight": "conv2d_params",
    "bn.weight": "batchnorm/gamma",
    "bn.bias": "batchnorm/beta",
    "bn.running_mean": "batchnorm/moving_mean",
    "bn.running_var": "batchnorm/moving_variance",
}


def state_from_tensorflow(constants: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert 2015 constants (HWIO kernels, ``softmax/weights`` (2048, 1008)) to our state dict."""
    state = {
        f"{module}.{parameter}": torch.tensor(constants[f"{scope}/{constant}"])
        for module, scope in TENSORFLOW_SCOPES.items()
        for parameter, constant in TENSORFLOW_CONSTANTS.items()
    }
    # HWIO -> OIHW
    state = {k: v.permute(3, 2, 0, 1) if v.ndim == 4 else v for k, v in state.items()}
    state["fc.weight"] = torch.tensor(constants["softmax/weights"]).T
    state["fc.bias"] = torch.tensor(constants["softmax/biases"])
    return state
