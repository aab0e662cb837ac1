"""Makes both real backbones faster on a GPU without changing what they compute: BigVGAN's
activation without convolutions, convolutions that keep channels last, compiled blocks.

No network is defined here: upstream's own modules stay, with their parameters and their names."""

import functools
import importlib.util
import os
import shutil
import threading

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# BigVGAN's activation
# --------------------------------------------------------------------------------------------------

RATIO, TAPS = 2, 12  # of upstream's resampling filters


def polyphase(x, taps, starts):
    """sum_i taps[i] * x[..., starts[i] : starts[i] + T]: a filter whose windows are slices of x."""
    length = x.shape[-1] - max(starts)
    total = taps[0] * x[..., starts[0] : starts[0] + length]
    for tap, start in zip(taps[1:], starts[1:]):
        total = total.add_(x[..., start : start + length], alpha=tap)
    return total


def sliced_activation(act, up, down, x):
    """Activation1d of BigVGAN, x: (B, C, T) -> (B, C, T). It doubles the number of samples, applies
    `act` to each, and halves the number again. Both filters have 12 taps, and their inputs are
    padded with the outermost samples.

    Even and odd samples of the doubled signal are kept apart, so that each filter is two sums of
    six slices. Upstream's grouped convolutions, of which one is transposed, are slow. up, down: the
    taps. Computed in float32 at least, whatever the type of x.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = F.pad(precise, (3, 3), mode="replicate")
    # Sample 2 j of the doubled signal sees x[j - 3 ... j + 2], sample 2 j + 1 x[j - 2 ... j + 3].
    even = act(polyphase(padded[..., :-1], up[1::2], (5, 4, 3, 2, 1, 0)))
    odd = act(polyphase(padded[..., 1:], up[0::2], (5, 4, 3, 2, 1, 0)))
    # Sample j of the result sees the doubled signal's 2 j - 5 ... 2 j + 6.
    first, last = even[..., :1], odd[..., -1:]
    even = torch.cat([first, first, even, last, last, last], dim=-1)
    odd = torch.cat([first, first, first, odd, last, last], dim=-1)
    halved = polyphase(odd, down[0::2], range(6)) + polyphase(even, down[1::2], range(6))
    return halved.to(x.dtype)


@functools.cache
def sliced_class(original):
    """A subclass of upstream's activation that computes by slices."""

    class Sliced(original):
        def forward(self, x):
            return sliced_activation(self.act, self.up_taps, self.down_taps, x)

    return Sliced


def slice_activations(vocoder):
    """Gives every activation of a BigVGAN, version 1 or 2, the class of `sliced_class`; returns
    the activations."""
    found = [module for module in vocoder.modules() if hasattr(module, "downsample")]
    for module in found:
        up = module.upsample.filter.flatten()
        down = module.downsample.lowpass.filter.flatten()
        if (module.up_ratio, module.down_ratio, len(up), len(down)) != (RATIO, RATIO, TAPS, TAPS):
            raise ValueError("a BigVGAN whose filters are not of 12 taps and ratio 2")
        module.up_taps = (RATIO * up).tolist()
        module.down_taps = down.tolist()
        module.__class__ = sliced_class(type(module))
    return found


# --------------------------------------------------------------------------------------------------
# Convolutions
# --------------------------------------------------------------------------------------------------


@functools.cache
def channels_last_class(original):
    """A subclass of upstream's Conv1d over (B, T, C) that computes without transposing in memory.
    It is a two-dimensional convolution of height 1, whose channels-last layout is (B, T, C) itself.
    For a one-dimensional convolution cuDNN would transpose to channels first and back."""

    class ChannelsLast(original):
        def forward(self, x):
            """(B, T, C) -> (B, T', C')."""
            x = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T), channels last in memory
            y = F.conv2d(
                x,
                self.weight.unsqueeze(2),
                self.bias,
                (1, *self.stride),
                (0, *self.padding),
                (1, *self.dilation),
                self.groups,
            )
            return y.squeeze(2).transpose(1, 2)

    ChannelsLast.__name__ = original.__name__
    return ChannelsLast


def keep_channels_last(network, original):
    """Gives every convolution of upstream's class `original` the class of `channels_last_class`.
    Weights keep shape, names and values; in memory their channels are last too, and so are those of
    gradients and moments."""
    for module in network.modules():
        if type(module) is original:
            module.__class__ = channels_last_class(original)
            weight = module.weight.data
            module.weight.data = weight.transpose(1, 2).contiguous().transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Compiling
# --------------------------------------------------------------------------------------------------

ONE_AT_A_TIME = threading.RLock()  # or threads that encode, sample and decode compile at once
MOST_GRAPHS = 64  # of one function, one for each shape and dtype; torch's own limit is 8


def can_compile():
    """The default of --compile: whether there is a GPU, Triton, and the C compiler that it
    needs."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    has_compiler = any(shutil.which(name) for name in compilers)
    return torch.cuda.is_available() and has_compiler and bool(importlib.util.find_spec("triton"))


def compile_blocks(blocks, *callers):
    """Compiles the forward of these modules, each at its first call. Blocks of one class share
    their graphs, so that all of them take as long as one. callers: (owner, name) of the methods
    that call the blocks.

    Where a block cannot be compiled, a line says so, nothing is compiled from then on, and the
    calling method begins again: if it went on half compiled, its result would be rounded
    differently from the next one's. A graph with gradients also rounds differently from one
    without, so that results which must be equal to the bit are computed in the same mode
    (training.compile_both, 06's rollout).
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False)
        block.forward = functools.partial(call_alone, compiled)
    for owner, name in callers:
        setattr(owner, name, functools.partial(call_or_give_up, getattr(owner, name)))


def call_alone(function, *inputs, **named):
    with ONE_AT_A_TIME:
        return function(*inputs, **named)


def call_or_give_up(function, *inputs, **named):
    try:
        return function(*inputs, **named)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        name = type(error).__name__
        print(f"cannot be compiled, so it runs slower, as with --no-compile: {name}: {reason}")
        torch.compiler.set_stance("force_eager")
        return function(*inputs, **named)


def compile_models(*models):
    """Compiles the blocks of models (common.FlowModel) of one class, and tells the models to
    compile encoders and codec when they load them. Copy a model before this, since the compiled
    blocks of a later copy would be the original's; call training.checkpoint_blocks after it."""
    blocks = [block for model in models for block in model.blocks()]
    compile_blocks(blocks, *((model, "predict") for model in models))
    for model in models:
        model.compiled = True
