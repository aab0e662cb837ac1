"""What makes both real backbones faster on a GPU and leaves what they compute: BigVGAN's activation
without convolutions, convolutions that keep channels last, blocks that are compiled.

Nothing here is a network: upstream's own modules stay, with their parameters and their names."""

import functools

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
    """Activation1d of BigVGAN, x: (B, C, T) -> (B, C, T): twice the samples, `act` on each, half of
    them again, both filters of 12 taps and padded with the outermost samples.

    Even and odd samples of the doubled signal are kept apart. So each filter is two sums of six
    slices, and no convolution by groups, whose transposed one is slow, moves the tensor. up, down:
    the taps. In float32 at least, whatever x is.
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


def slice_activations(vocoder):
    """Lets every activation of a BigVGAN, version 1 or 2, work by slices. Returns them."""
    found = [module for module in vocoder.modules() if hasattr(module, "downsample")]
    for module in found:
        up = module.upsample.filter.flatten()
        down = module.downsample.lowpass.filter.flatten()
        if (module.up_ratio, module.down_ratio, len(up), len(down)) != (RATIO, RATIO, TAPS, TAPS):
            raise ValueError("a BigVGAN whose filters are not of 12 taps and ratio 2")
        up = (RATIO * up).tolist()
        module.forward = functools.partial(sliced_activation, module.act, up, down.tolist())
    return found


# --------------------------------------------------------------------------------------------------
# Convolutions
# --------------------------------------------------------------------------------------------------


@functools.cache
def channels_last_class(upstreams):
    """Upstream's class of a Conv1d over (B, T, C), computed without turning anything around: a
    two-dimensional convolution of height 1, whose layout of channels last is (B, T, C) itself. One
    of three dimensions cuDNN would turn to channels first and back."""

    class ChannelsLast(upstreams):
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

    ChannelsLast.__name__ = upstreams.__name__
    return ChannelsLast


def keep_channels_last(network, upstreams):
    """Makes every convolution of upstream's class one of `channels_last_class`. Weights keep shape,
    names and values; in memory their channels are last too, as are then gradients and moments."""
    for module in network.modules():
        if type(module) is upstreams:
            module.__class__ = channels_last_class(upstreams)
            weight = module.weight.data
            module.weight.data = weight.transpose(1, 2).contiguous().transpose(1, 2)
