"""What makes the real backbones faster leaves what they compute: beside it upstream's own classes,
with random weights."""

import functools
from collections import Counter

import pytest
import torch
from conftest import a_clip
from test_backbones import beside, frieren, mmaudio, noise  # noqa: F401, fixtures
from torch.utils._python_dispatch import TorchDispatchMode
from upstream_files import BIGVGAN_16K, BIGVGAN_44K, film, mmaudio_modules, write_synchformer

from adapters.scorers import SCORERS
from common import files, load_model, scoring, speed, training

# ruff: noqa: F811, the fixtures
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
    return model.codec()[1] if model.name == "frieren" else model.codec().tod.vocoder


def upstreams_again(vocoder):
    """Takes the slices away."""
    for module in vocoder.modules():
        if hasattr(module, "up_taps"):
            module.__class__ = type(module).__base__


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
        from omegaconf import OmegaConf  # which MMAudio needs, and nothing else

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


# Convolutions
# --------------------------------------------------------------------------------------------------


def twins(mmaudio):
    """Our network as on a GPU, and upstream's own of the same weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        ours = load_model("mmaudio:small_16k", weights=mmaudio.weights)
    return ours, mmaudio.load(mmaudio.weights / mmaudio.file)


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, torch.nn.Conv1d)]


def errors(net, side, features):
    """A loss of both guidance branches, so that every weight has a part in it."""
    a_t, t = noise(2, *side.shape), torch.tensor([0.2, 0.8])
    return net.predict_flow(a_t, t, side.conditions(net, features)).square().mean()


def test_convolutions_that_keep_channels_last_have_upstreams_values_and_gradients(mmaudio):
    model, theirs = twins(mmaudio)
    features = mmaudio.features(2)
    losses = [errors(net, mmaudio, features) for net in (model.net, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, p in model.net.named_parameters():
        if p.grad is not None:
            difference = (p.grad - wanted[name].grad).norm()
            assert difference <= 1e-5 * wanted[name].grad.norm() + 1e-9, name
    assert len(convolutions(model.net)) == len(convolutions(theirs)) > 10
    for ours, upstreams in zip(convolutions(model.net), convolutions(theirs)):
        assert type(ours).__base__ is type(upstreams)


def test_convolutions_stay_upstreams_on_a_cpu(mmaudio):
    model = load_model("mmaudio:small_16k", weights=mmaudio.weights)
    theirs = mmaudio.load(mmaudio.weights / mmaudio.file)
    assert [*map(type, convolutions(model.net))] == [*map(type, convolutions(theirs))]


def test_channels_stay_last_in_weights_gradients_moments_copies_and_a_resumed_training(
    mmaudio,
    tmp_path,
):
    model, _ = twins(mmaudio)
    features = mmaudio.features(1)
    optimizer = torch.optim.AdamW(model.trainable_parameters())

    def step():
        optimizer.zero_grad()
        errors(model.net, mmaudio, features).backward()
        optimizer.step()

    step()
    (tmp_path / "log.jsonl").touch()
    training.save_checkpoint(tmp_path, 1, model, optimizer, {}, "made from")
    step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, _ = twins(mmaudio)
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    training.load_checkpoint(tmp_path / "checkpoint.pt", model, optimizer, {}, 2, "made from")
    step()
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    rounded = training.frozen_copy(model, bf16=True)
    for conv, copied in zip(convolutions(model.net), convolutions(rounded.net), strict=True):
        state = optimizer.state[conv.weight]
        kept = [conv.weight, conv.weight.grad, state["exp_avg"], state["exp_avg_sq"], copied.weight]
        assert all(x.transpose(1, 2).is_contiguous() for x in kept)
        assert copied.weight.dtype == torch.bfloat16


def test_a_policy_file_is_what_upstreams_own_network_would_save(mmaudio, tmp_path):
    model, theirs = twins(mmaudio)
    files.save_pt(tmp_path / "ours.pt", model.policy_state())
    files.save_pt(tmp_path / "theirs.pt", theirs.state_dict())
    read = [torch.load(tmp_path / f"{whose}.pt", weights_only=True) for whose in ("ours", "theirs")]
    assert list(read[0]) == list(read[1])
    for name, value in read[0].items():
        assert torch.equal(value, read[1][name]) and value.stride() == read[1][name].stride(), name
    theirs.load_weights(read[0])


# bf16, and compiled
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_bf16(monkeypatch):
    """Calls a function as it is on a CPU, and under the autocast of a GPU."""

    def both(function, *inputs):
        exact = function(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(training, "in_bf16", lambda device, precision: True)
            return exact, function(*inputs)

    return both


def pictures_and_text(model):
    """Of a film of two pictures for CLIP and one segment for Synchformer: time."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 384, 384), (16, 3, 224, 224)
    drawn = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]
    model.text_features.cache_clear()
    return model.encode(a_clip(caption="a dog barks"), drawn)


def test_features_in_bf16_are_those_of_float32_within_a_percent(mmaudio, in_bf16):
    model = load_model("mmaudio:small_16k", weights=mmaudio.weights)
    exact, rounded = in_bf16(pictures_and_text, model)
    for name in ("clip", "text"):
        off = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert 0 < off < 0.01 and rounded[name].dtype == torch.float32
    assert torch.equal(rounded["sync"], exact["sync"])  # of which DeSync is made


@pytest.mark.parametrize("name", ["mmaudio:small_16k", "mmaudio:small_44k"])
def test_waves_in_bf16_are_those_of_float32_but_for_noise_26_db_below(mmaudio, in_bf16, name):
    """Random weights amplify rounding as no trained vocoder does."""
    model = load_model(name, weights=mmaudio.weights)
    exact, rounded = in_bf16(model.decode, noise(2, *model.latent_shape))
    off = (rounded - exact).norm() / exact.norm()
    assert 0 < off < 0.05 and rounded.dtype == torch.float32


def test_encoders_and_codec_compile_by_block_and_give_the_same(
    mmaudio, frieren, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for side in (mmaudio, frieren):
        plain, compiled = (load_model(side.name, weights=side.weights) for _ in range(2))
        compiled.compiled = True
        latents = noise(1, *plain.latent_shape)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(
            plain.decode(latents), compiled.decode(latents), rtol=0, atol=1e-4
        )
        # 37 activations of six sizes, and MMAudio's VAE.
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == (7 if side is mmaudio else 6)
        if side is mmaudio:
            for name, value in pictures_and_text(plain).items():
                torch.testing.assert_close(value, pictures_and_text(compiled)[name])
    assert "cannot be compiled" not in capsys.readouterr().out
    torch._dynamo.reset()


# What DeSync sees
# --------------------------------------------------------------------------------------------------


def test_mmaudios_encoder_sees_of_a_video_what_synchformer_judges_by(
    mmaudio, tmp_path, monkeypatch, in_bf16
):
    beside(mmaudio.weights, tmp_path, "synchformer_state_dict.pth")
    write_synchformer(tmp_path, monkeypatch)
    model = load_model("mmaudio:small_16k", weights=tmp_path)
    scorer = SCORERS["synchformer"](tmp_path, "cpu")
    clip = a_clip(film(tmp_path / "film.mp4", sound=None))
    *own, frames = model.read(clip, [scorer.frames])
    with torch.inference_mode():
        seen = scorer.embed_video(frames)
    for features in in_bf16(scoring.encode, clip, own, model):
        ours = features["synchformer"]
        assert {part: value.shape for part, value in ours.items()} == scorer.video_shapes
        torch.testing.assert_close(ours["segments"], seen["segments"], rtol=0, atol=1e-6)
