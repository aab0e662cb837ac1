"""What makes the real backbones faster leaves what they compute: upstream's own classes, with random
weights, beside ours."""

from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf
from test_backbones import frieren, mmaudio  # noqa: F401, fixtures
from torch.utils._python_dispatch import TorchDispatchMode
from upstream_files import BIGVGAN_16K, BIGVGAN_44K, mmaudio_modules

from common import load_model, speed

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("no_network")]


class Operations(TorchDispatchMode):
    """Counts operations, views left out, and the bytes of what they read and write."""

    VIEWS = ("view", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute")
    VIEWS += ("detach", "alias", "t.", "_unsafe_view", "split", "unbind", "as_strided", "is_")

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if not name.startswith(self.VIEWS):
            self.counts[name] += 1
            for value in torch.utils._pytree.tree_leaves([args, kwargs, result]):
                if isinstance(value, torch.Tensor):
                    self.bytes += value.numel() * value.element_size()
        return result


# The vocoder
# --------------------------------------------------------------------------------------------------


def vocoder_of(model):
    """Upstream's vocoder as our codec runs it."""
    return model.codec(model.device)[1] if model.name == "frieren" else model.codec().tod.vocoder


def upstreams_again(vocoder):
    """Takes the slices away."""
    for module in vocoder.modules():
        vars(module).pop("forward", None)


@pytest.mark.parametrize("name", ["mmaudio:small_16k", "mmaudio:small_44k", "frieren"])
def test_waves_of_the_sliced_activation_are_upstreams(request, name):
    """In float64 to the last digits. Random weights amplify float32's rounding, so that upstream's
    own waves are further from the exact ones than these tests could allow: ours are as near."""
    side = request.getfixturevalue(name.partition(":")[0])
    vocoder = vocoder_of(load_model(name, weights=side.weights))
    mels = torch.randn(2, 128 if "44k" in name else 80, 100)
    with torch.inference_mode():
        with Operations() as counted:
            waves = vocoder(mels)
        exact = vocoder.double()(mels.double())
        upstreams_again(vocoder)
        exact_of_upstream = vocoder(mels.double())
        of_upstream = vocoder.float()(mels)
    torch.testing.assert_close(exact, exact_of_upstream, rtol=0, atol=1e-12)
    ours, theirs = ((x - exact).square().mean().sqrt() for x in (waves, of_upstream))
    assert ours < 1.5 * theirs < 1e-4 * exact.std()
    # Six layers of the vocoder itself are transposed; no convolution is by groups.
    convolutions = counted.counts["conv_transpose1d.default"], counted.counts["conv1d.default"]
    assert convolutions == (6, 38)


@pytest.mark.parametrize("version", [1, 2])
def test_waves_of_fresh_weights_are_upstreams_within_1e_6_in_float32(version):
    code = mmaudio_modules()
    torch.manual_seed(0)
    if version == 1:
        vocoder = code.bigvgan.BigVGANVocoder(OmegaConf.create(BIGVGAN_16K))
    else:
        vocoder = code.bigvgan_v2.BigVGAN(code.bigvgan_v2.AttrDict(BIGVGAN_44K))
    mels = torch.randn(2, vocoder.h.num_mels, 100)
    with torch.inference_mode():
        theirs = vocoder(mels)
        assert len(speed.slice_activations(vocoder)) == 37
        ours = vocoder(mels)
    assert theirs.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_vocoder_with_other_filters_is_refused():
    code = mmaudio_modules()
    vocoder = code.bigvgan_v2.BigVGAN(code.bigvgan_v2.AttrDict(BIGVGAN_44K))
    vocoder.activation_post.upsample.filter = torch.ones(1, 1, 16)
    with pytest.raises(ValueError, match="12 taps"):
        speed.slice_activations(vocoder)
