"""A pretended GPU: tensors that say `cuda:0`, hold CPU values, and refuse to be mixed with CPU
tensors as CUDA's would.

    with pretended_gpu() as syncs:
        call("05", run)
    assert not [place for place in syncs if place.startswith("05_train_flow_dpo.py train_step")]

`syncs` counts by source line where the host would wait for the device: values read, copies to the
CPU, and copies to the device that are not `non_blocking` or not from pinned memory. Seen is each
call of a torch function, not what that function does within; kernels, speed, memory and rounding
are the CPU's.

A context manager, not a process of its own: devices are met in `__torch_function__`, above autograd
and C++, to which these are ordinary CPU tensors. So no call reaches CUDA, beside a real GPU
neither, nothing below Python could remember one, and what is patched are a dozen attributes, put
back at the end. A process would cost an import of torch for each test, and hand back text.
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # noqa: F401, what optimizers import at their first use would ask the GPU for its properties
import torch.utils.checkpoint
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode

from common import speed

CUDA = torch.device("cuda", 0)
UNSEEN = (str(Path(torch.__file__).parent), __file__)  # a sync is counted where these were called
READS = {"item", "tolist", "nonzero", "argwhere", "equal", "allclose", "masked_select", "unique"}
READS |= {"bincount", "__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__"}
READS |= {"__contains__"}
FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor"}
CPU_ONLY = {"numpy", "__array__", "__dlpack__"}
STRICT = {"cat", "stack", "matmul", "mm", "bmm", "linear", "embedding", "gather"}  # of scalars too
STRICT |= {"index_select"}
SYNCS = Counter()


class Gpu(torch.Tensor):
    device = property(lambda self: CUDA)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    # Tensor's own would recompute checkpointed blocks with our eyes shut
    def backward(self, *args, **kwargs):
        torch.autograd.backward(self, *args, **kwargs)

    def __deepcopy__(self, memo):
        new = relabel(relabel(self, torch.Tensor).detach().clone(), Gpu)
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        return memo.setdefault(id(self), new)

    def __reduce_ex__(self, protocol):
        return relabel(self, torch.Tensor).detach().__reduce_ex__(protocol)


class Device(TorchFunctionMode):
    """What CPU tensors and factories do with `cuda` as a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def relabel(x, label):
    with torch._C.DisableTorchFunction():
        return x.as_subclass(label)


def leaves(x):
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, (list, tuple)) else [x]


def wait(what):
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(UNSEEN):
        frame = frame.f_back
    file, function = Path(frame.f_code.co_filename), frame.f_code.co_qualname
    SYNCS[f"{file.name} {function.partition('.<locals>')[0]} {frame.f_lineno}: {what}"] += 1


def move(x, func, args, kwargs):
    """x.to(...), x.cpu(), x.cuda()."""
    rest = {key: value for key, value in kwargs.items() if key != "copy"}
    if func.__name__ != "to":
        device, dtype, at_once = torch.device(func.__name__), None, rest.get("non_blocking")
    elif args and isinstance(args[0], torch.Tensor):
        device, dtype, at_once = args[0].device, args[0].dtype, rest.get("non_blocking")
    else:
        device, dtype, at_once, _ = torch._C._nn._parse_to(*args, **rest)
    here = isinstance(x, Gpu)
    there = here if device is None else device.type == "cuda"
    if not here and not there:
        return func(x, *args, **kwargs)
    if here == there and dtype in (None, x.dtype) and not kwargs.get("copy"):
        return x
    if here != there and not (there and at_once and getattr(x, "pinned", False)):
        wait("to the device" if there else "to the CPU")
    moved = relabel(x, torch.Tensor).to(dtype or x.dtype, copy=True)
    return relabel(moved, Gpu if there else torch.Tensor)


def run(func, args, kwargs):
    """One call of a torch function: refused, or counted, as CUDA would; then done by the CPU."""
    name = getattr(func, "__name__", "")
    if name in ("to", "cpu", "cuda"):
        return move(args[0], func, args[1:], kwargs)
    if name == "pin_memory":
        pinned = args[0].clone()
        pinned.pinned = True
        return pinned
    # Module.to asks whether a parameter can stay the object it is
    if name == "_has_compatible_shallow_copy_type":
        return isinstance(args[0], Gpu) == isinstance(args[1], Gpu)
    found, device = leaves((args, kwargs)), kwargs.get("device")
    made = device is not None and torch.device(device).type == "cuda"
    gpu = [x for x in found if isinstance(x, Gpu)]
    if not (gpu or made) or name == "__deepcopy__":  # of a CPU tensor, beside ours in its memo
        return func(*args, **kwargs)
    others = [x for x in found if isinstance(x, torch.Tensor) and not isinstance(x, Gpu)]
    # within backward(), autograd hands its gradients on without label
    if torch._C._current_graph_task_id() == -1:
        check(name, args, others)
    if any(isinstance(x, torch.Generator) for x in found) or (gpu and name in CPU_ONLY):
        raise TypeError(f"{name}: of a CUDA tensor, or by a CPU generator on a CUDA device")
    reads = (gpu and name in READS) or (made and name in FROM_HOST)
    if reads or (name == "where" and len(found) == 1):
        wait(name)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **(kwargs | {"device": "cpu"} if made else kwargs))
    return torch._tensor._convert(result, Gpu) if made or device is None else result


def check(name, args, others):
    """Whether CUDA would do this with tensors of the CPU among them."""
    if name in ("copy_", "as_tensor"):
        return wait(name) if others else None
    if name in ("__getitem__", "__setitem__"):
        index = [x for x in leaves(args[1]) if isinstance(x, torch.Tensor)]
        values = args[2:] if index else ()
        others = [x for x in others if x is args[0] or (x.dim() and any(x is y for y in values))]
        if any(x.dtype == torch.bool or not isinstance(x, Gpu) for x in index):
            wait(name)  # its size is read, or it is copied
    elif name not in STRICT:
        others = [x for x in others if x.dim()]
    if others:
        shapes = ", ".join(str(tuple(x.shape)) for x in others)
        what = f"expected all tensors to be on the same device, but {shapes} is on the CPU"
        raise RuntimeError(f"{name}: {what}")


@contextmanager
def pretended_gpu():
    submit, autocast = ThreadPoolExecutor.submit, torch.autocast.__init__
    group = clip_grad._group_tensors_by_device_and_dtype
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # stages set them

    def seen(function, *args, **kwargs):
        with Device():
            return function(*args, **kwargs)

    def on_cpu(self, device_type, dtype=None, *args, **kwargs):
        autocast(self, "cpu", torch.bfloat16 if device_type == "cuda" else dtype, *args, **kwargs)

    def labelled(tensors, *args):
        device, groups = tensors[0][0].device, group(tensors, *args)
        return {(device, dtype): found for (_, dtype), found in groups.items()}

    def submit_seen(self, *args, **kwargs):
        return submit(self, seen, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, Device():
        said = dict(is_available=True, device_count=1, current_device=0, max_memory_allocated=0)
        said |= dict(is_current_stream_capturing=False, reset_peak_memory_stats=None)
        said |= dict(empty_cache=None, set_device=None, synchronize=None)
        said["get_device_properties"] = SimpleNamespace(total_memory=80 * 2**30)
        for name, value in said.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(torch.autocast, "__init__", on_cpu)
        patch.setattr(speed, "can_compile", lambda: False)  # what only looks like a GPU's tensors
        patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", labelled)
        # A block's inputs reach its recomputation without label, and would be called changed.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        patch.setitem(checks, "default", lambda x: None)
        patch.setattr(ThreadPoolExecutor, "submit", submit_seen)
        SYNCS.clear()
        try:
            yield SYNCS
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
