"""Counts a backbone's memory without a GPU, for the tables in adapters/: live bytes of fake tensors.

    UPSTREAM_DIR=<folder of the clones> PYTHONPATH=. python tests/account.py mmaudio:large_44k frieren

Fake tensors have shapes and no data. What CUDA's autocast raises to float32, and the CPU's does not, is raised here.
Counted is every storage that an operator returns, in steps of 512 bytes, until it dies; not counted: workspaces inside
kernels, the allocator's gaps, the CUDA context. Prints GiB per row of a forward: kept for the backward pass (with
adapters, which keep a little more), the same with gradient checkpointing, at work without gradients.
"""

import contextlib
import functools
import importlib
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import adapters.frieren
import adapters.mmaudio
import common

BACKBONES = adapters.frieren, adapters.mmaudio

RAISED = ("layer_norm", "group_norm", "softmax", "log_softmax", "pow", "exp", "log", "rsqrt", "reciprocal", "sum")
RAISED += ("prod", "cumsum", "cosine_similarity", "interpolate")  # of CUDA's list


def raised(plain):
    @functools.wraps(plain)
    def call(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            up = lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x  # noqa: E731
            args, kwargs = tree_map(up, args), tree_map(up, kwargs)
        return plain(*args, **kwargs)

    return call


class Live(TorchDispatchMode):
    """While it is on: live and peak, bytes of the storages made since."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = -(-tensor.untyped_storage().nbytes() // 512) * 512
                self.live += self.sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self.gone, key)
        return out

    def gone(self, key):
        self.live -= self.sizes.pop(key, 0)


def peak(model, rows, train):
    """Bytes of one forward of so many rows and, in training, its backward pass, beyond weights and their gradients."""
    for p in model.trainable_parameters() if train else ():
        p.grad = torch.zeros_like(p)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Live(known) as live, torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
        features = {key: torch.randn(rows, *shape) for key, shape in model.feature_shapes.items()}
        u = model(torch.randn(rows, *model.latent_shape), torch.rand(rows), features)
        if train:
            u.float().square().mean().backward()
    return live.peak


def account(name):
    """(row, recomputed, sampled) of common.Memory in GiB, for mmaudio:<variant> or frieren."""
    import peft

    still = lambda self, *_, **__: self  # noqa: E731, fake parameters cannot be moved
    here = lambda weights, file: Path(weights) / file  # noqa: E731, no file is read
    vae = adapters.frieren.upstream_classes().vae if name == "frieren" else None
    patches = [patch.object(module, "weight_file", here) for module in (adapters.frieren, adapters.mmaudio)]
    patches += [patch.object(module.ADAPTER, "load_policy", lambda self, path: ({}, vae)) for module in BACKBONES]
    patches += [patch.object(nn.Module, "to", still)]
    patches += [patch.object(peft.tuners.tuners_utils.BaseTunerLayer, "_move_adapter_to_device_of_base_layer", still)]
    patches += [patch.object(F, function, raised(getattr(F, function))) for function in RAISED if hasattr(F, function)]
    for place in (torch, torch.Tensor):
        patches += [patch.object(place, f, raised(getattr(place, f))) for f in RAISED if hasattr(place, f)]
    counted = []
    with contextlib.ExitStack() as stack:
        for one in (*patches, FakeTensorMode(allow_non_fake_inputs=True)):
            stack.enter_context(one)
        family, _, variant = name.partition(":")
        for train, checkpointing in ((True, False), (True, True), (False, False)):
            model = importlib.import_module(common.ADAPTERS[family]).ADAPTER(variant, None, Path("weights")).eval()
            model.requires_grad_(False)
            if train:
                model.add_lora(16, seed=0)
            if checkpointing:
                model.checkpoint_blocks()
            few, many = (peak(model, rows, train) for rows in (4, 8))
            counted.append((many - few) / 4 / 2**30)
    return tuple(counted)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, *(f"{gib:.4f}" for gib in account(name)), flush=True)
