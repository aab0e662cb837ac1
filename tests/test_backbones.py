"""The backbones' adapters against upstream's own code: same tensors in, same numbers out.

    UPSTREAM_DIR=<folder of the clones> python -m pytest tests/test_backbones.py -k "not frieren"

No real weights are needed: upstream's own classes, at tiny size and true sequence lengths, write
every file in upstream's form, and its own loaders, sampler and generation code read them back. Of
Frieren's imports Lightning is stood in for; torchdyn's solver too, by its Euler loop, step for
step, but for one test with the real one.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import os
import pickle
import shutil
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from conftest import Malicious, a_clip, said, shell, stopped
from upstream_files import (
    BIGVGAN_16K,
    EulerOnly,
    bursts,
    film,
    frieren_model,
    frieren_modules,
    frieren_root,
    frieren_script,
    mmaudio_frames,
    mmaudio_generate,
    mmaudio_modules,
    save_lightning,
    weights_row,
    write_cavp,
    write_frieren,
    write_mmaudio,
)

import common
from adapters.frieren import Frieren, upstream_classes
from adapters.mmaudio import CLIP, VOCODER
from common import SkipClip, files, flow_error, interpolate, load_model, speed, training

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("no_network")]
FULL_SIZE = dict(dit_config=Frieren.dit_config, vae_config=Frieren.vae_config)
# 1000 k / 25 for k = 0 ... 24, with upstream's three float32 truncations.
NAT_MEL = "script/data_preprocess/NAT_mel.py"
UPSTREAM_25 = [40 * k - (k in (5, 9, 10)) for k in range(25)]


def noise(rows, length, channels, seed=0):
    return torch.randn(rows, length, channels, generator=torch.Generator().manual_seed(seed))


class MMAudioSide:
    """Upstream's side of MMAudio, in the paper's time, sign and layout."""

    name, file, shape, blocks = "mmaudio:small_16k", "mmaudio_small_16k.pth", (250, 20), 3
    kinds = 3  # of blocks: joint, joint and last, of the latents alone
    # The last joint block hands on its latents alone: the queries of its video and text tokens are
    # never read.
    unread = {f"net.joint_blocks.1.{part}_block.attn.q_norm.weight" for part in ("clip", "text")}
    frozen = {f"net.{name}" for name in ("empty_clip_feat", "empty_sync_feat", "empty_string_feat")}
    frozen |= {"net.latent_mean", "net.latent_std"}

    def __init__(self, weights, patch):
        write_mmaudio(weights, patch)
        self.weights = weights
        self.flow = mmaudio_modules().flow_matching.FlowMatching(0, "euler", 25)
        self.net = self.load(weights / self.file)
        self.names = {f"net.{name}" for name in self.net.state_dict()}  # the velocity network's own

    def load(self, path, variant="small_16k"):
        net = mmaudio_modules().networks.get_my_mmaudio(variant).eval()
        net.load_weights(torch.load(path, weights_only=True))
        return net

    def features(self, rows, seed=0):
        """What encode returns: CLIP's outputs have norm 1, Synchformer's have not."""
        clip, text = (F.normalize(noise(rows, length, 1024, seed), dim=-1) for length in (64, 77))
        return {"clip": clip, "sync": noise(rows, 192, 768, seed), "text": text}

    def conditions(self, net, features):
        return net.preprocess_conditions(features["clip"], features["sync"], features["text"])

    def velocity(self, net, a_t, t, features, guidance=1.0):
        if guidance == 1.0:
            return -net.predict_flow(a_t, 1 - t, self.conditions(net, features))
        null = net.get_empty_conditions(len(a_t))
        return -net.ode_wrapper(1 - t[0], a_t, self.conditions(net, features), null, guidance)

    def loss(self, a_0, eps, t, features):
        x_t = self.flow.get_conditional_flow(x0=eps, x1=a_0, t=1 - t)
        v = self.net.predict_flow(x_t, 1 - t, self.conditions(self.net, features))
        return self.flow.loss(v, x0=eps, x1=a_0).mean().item()

    def sampled(self, features, variant):
        """A model of ours, and upstream's noise and latents."""
        net = self.load(self.weights / f"mmaudio_{variant}.pth", variant)
        start, null = noise(2, net.latent_seq_len, net.latent_dim, 11), net.get_empty_conditions(2)
        full = self.conditions(net, features)
        model = load_model(f"mmaudio:{variant}", weights=self.weights)
        flow = lambda t, x: net.ode_wrapper(t, x, full, null, 4.5)  # noqa: E731
        return model, start, self.flow.to_data(flow, start)

    def decoded(self, model, latents):
        utils = model.codec()
        with torch.inference_mode():
            mel = utils.decode(latents * model.net.latent_std + model.net.latent_mean)
            return utils.vocode(mel)[:, 0].clone()

    def encoded(self, model, waves):
        """By upstream's FeaturesUtils with its VAE's encoder, of whole latents."""
        rate, mode = ("16", "16k") if model.sample_rate_hz == 16_000 else ("44", "44k")
        code = mmaudio_modules().features_utils.FeaturesUtils
        given = dict(tod_vae_ckpt=f"v1-{rate}.pth", bigvgan_vocoder_ckpt="best_netG.pt", mode=mode)
        with contextlib.chdir(self.weights), torch.inference_mode():
            utils = code(enable_conditions=False, need_vae_encoder=True, **given).eval()
            waves = F.pad(waves, (0, 353_280 - waves.shape[1] if rate == "44" else 0))
            mean = utils.encode_audio(waves).mean.transpose(1, 2)
            return self.load(model.checkpoint, model.variant).normalize(mean).clone()

    def foreign(self, folder):
        """{what: (content, words of the error)}."""
        own, other = (torch.load(self.weights / f"mmaudio_small_{x}.pth") for x in ("16k", "44k"))
        return {
            "another variant": (other, ["size mismatch"]),
            "wrapped": ({"weights": own}, ["Missing key"]),
        }


class FrierenSide:
    """Upstream's side of Frieren."""

    name, file, shape, blocks = "frieren", "v2a/noreflow/last.ckpt", (256, 20), 2
    kinds = 2  # the first block's input lies otherwise in memory
    unread, frozen, parts = set(), set(), ("model.diffusion_model.", "cond_stage_model.")

    def __init__(self, weights, patch):
        self.weights, self.net = weights, write_frieren(weights, patch)
        self.names = {name for name in self.net.state_dict() if name.startswith(self.parts)}
        write_cavp(weights / "cavp", [f"-clip{index:06d}_00001{index}" for index in range(3)])
        self.cavp = sorted((weights / "cavp").iterdir())

    def load(self, path):
        net = frieren_model()
        net.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return net

    def features(self, rows, seed=0):
        return {"cavp": F.normalize(noise(rows, 32, 512, seed), dim=-1)}

    def velocity(self, net, a_t, t, features, guidance=1.0):
        conditions = net.get_learned_conditioning(features["cavp"])
        if guidance == 1.0:
            return -net.apply_model(a_t.mT, (1000 * (1 - t)).round().long(), conditions).mT
        return -net.ode_wrapper_cfg(conditions, guidance)(1 - t[0], a_t.mT, None).mT

    def loss(self, a_0, eps, t, features):
        conditions = self.net.get_learned_conditioning(features["cavp"])
        k = (1000 * (1 - t)).round().long()
        _, logged = self.net.p_losses(a_0.mT, conditions, k, noise=eps.mT)
        return logged["val/loss_simple"]

    def sampled(self, features, solver):
        if solver == "torchdyn":
            pytest.importorskip("torchdyn", reason="torchdyn, which Frieren's use does not need")
        net = frieren_model(solver == "torchdyn")
        net.load_state_dict(self.net.state_dict())
        fed = times_fed(net.model.diffusion_model)
        conditions = net.get_learned_conditioning(features["cavp"])
        settings = dict(batch_size=2, solver="euler", timesteps=26)
        last, states = net.sample_param_cfg(conditions, 4.5, **settings)
        assert fed == UPSTREAM_25 and len(states) == 26
        return load_model("frieren", weights=self.weights), states[0].mT, last.mT

    def decoded(self, model, latents):
        with frieren_modules():
            models = importlib.import_module("vocoder.bigvgan.models")
            vocoder = models.BigVGAN(SimpleNamespace(**BIGVGAN_16K)).eval()
        state = torch.load(self.weights / "bigvnat/best_netG.pt", weights_only=True)
        vocoder.load_state_dict(state["generator"])
        with torch.no_grad():
            return vocoder(self.net.decode_first_stage(latents.mT))[:, 0]

    def encoded(self, model, waves):
        """By upstream's MelNet, whose call of librosa is of an older version, and its VAE."""
        spec = importlib.util.spec_from_file_location("nat_mel", frieren_root() / NAT_MEL)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        filters = script.librosa_mel_fn
        script.librosa_mel_fn = lambda sr, n_fft, n_mels, fmin, fmax: filters(
            sr=sr, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax
        )
        sizes = dict(fft_size=1024, win_size=1024, hop_size=256, fmin=0, fmax=8000)
        sizes |= dict(audio_num_mel_bins=80, audio_sample_rate=16_000)
        with torch.no_grad():
            mean = self.net.encode_first_stage(script.MelNet(sizes)(waves)).mode()
            return self.net.get_first_stage_encoding(mean).mT

    def foreign(self, folder):
        state, dit = self.net.state_dict(), self.parts[0]
        renamed = {name.replace(dit, "net.dit."): value for name, value in state.items()}
        more, other = {dit + "adapter.weight": torch.zeros(2)}, dit + "final_layer.conv1d.bias"
        save_lightning(folder / "lightning.pt", state, hyper_parameters=Malicious(folder / "mark"))

        def without(part):
            return {name: value for name, value in state.items() if not name.startswith(part)}

        cases = {
            "prefix": (renamed, [dit, "net.dit", "Missing"]),
            "no VAE": (without("first"), ["first_stage_model.", "Missing"]),
            "no embedder": (without("cond"), ["cond_stage_model.", "Missing"]),
            "adapter": (state | more, [dit, "adapter.weight", "Unexpected"]),
            "shape": (state | {other: torch.zeros(21)}, ["size mismatch", "conv1d.bias"]),
        }
        cases = {case: ({"state_dict": wrong}, words) for case, (wrong, words) in cases.items()}
        return cases | {"bare": (state, ["'state_dict'"]), "lightning": (None, ["cannot be read"])}


def side_of(family):
    @pytest.fixture(scope="module")
    def made(tmp_path_factory):
        """A --weights folder of tiny files, and upstream's side; meanwhile networks of these sizes
        are built."""
        folder = tmp_path_factory.mktemp("weights")
        with pytest.MonkeyPatch.context() as patch:
            yield family(folder, patch)
        shutil.rmtree(folder)  # 0.4 GB

    return made


mmaudio, frieren = side_of(MMAudioSide), side_of(FrierenSide)


@pytest.fixture(scope="module", params=["mmaudio", "frieren"])
def side(request):
    return request.getfixturevalue(request.param)


def ours(side, checkpoint=None):
    return load_model(side.name, checkpoint, weights=side.weights)


def cavp_clip(path):
    """A clip whose CAVP features lie in this file, with or without suffix."""
    clip = a_clip(id=path.stem)
    clip.cavp = path
    return clip


def fits(model, features):
    """Whether these are a clip's features, as stage 01 stores them for this model."""
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    finite = all(value.isfinite().all() for value in features.values())
    return finite and shapes == model.feature_shapes


@pytest.fixture
def model(side):
    return ours(side)


def tune(side, folder):
    """A model that training has moved, and its policy's file."""
    model = ours(side)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p += 0.01 * torch.randn_like(p)
    files.save_pt(folder / "policy.pt", model.policy_state())
    return model, folder / "policy.pt"


def times_fed(dit):
    """The integers that Frieren's DiT will be called with, one per call; every row of a call must
    have the same."""
    fed = []

    def note(_, args, kwargs):
        t = args[1] if len(args) > 1 else kwargs["t"]
        assert t.dtype == torch.int64 and (t == t[0]).all()
        fed.append(t[0].item())

    dit.register_forward_pre_hook(note, with_kwargs=True)
    return fed


# Time, sign, guidance, sampler


def test_velocity_is_minus_upstreams_and_its_error_is_upstreams_loss(side, model):
    t = 1 - torch.tensor([0, 1, 200, 359, 400, 999]) / 1000
    a_0, eps, features = noise(6, *side.shape), noise(6, *side.shape, 1), side.features(6)
    a_t, v = interpolate(a_0, eps, t)
    with torch.no_grad():
        u, theirs = model(a_t, t, features), side.velocity(side.net, a_t, t, features)
        loss = side.loss(a_0, eps, t, features)
    torch.testing.assert_close(u, theirs, rtol=1e-5, atol=5e-5)  # by other convolutions
    assert flow_error(v, u).mean().item() == pytest.approx(loss, rel=1e-5)
    # the test can tell the sign
    assert flow_error(v, -u).mean().item() != pytest.approx(loss, rel=1e-3)
    assert model.latent_shape == side.shape and len(model.blocks()) == side.blocks


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_guided_velocity_equals_upstreams(side, model, guidance):
    features, t, a_t = side.features(2), torch.tensor([0.25, 0.25]), noise(2, *side.shape)
    with torch.no_grad():
        u = model.velocity(a_t, t, model.project(features), guidance)
        theirs = side.velocity(side.net, a_t, t, features, guidance)
    torch.testing.assert_close(u, theirs, rtol=1e-4, atol=1e-4)


CASES = ["mmaudio small_16k", "mmaudio large_44k_v2", "frieren euler", "frieren torchdyn"]


@pytest.mark.parametrize("case", CASES)
def test_25_guided_steps_equal_upstreams_sampler(request, monkeypatch, case):
    family, variant = case.split()
    side = request.getfixturevalue(family)
    features = side.features(2)
    with torch.no_grad():
        model, start, theirs = side.sampled(features, variant)
    monkeypatch.setattr(common, "initial_noise", lambda *_: start)
    fed = times_fed(model.model["diffusion_model"]) if family == "frieren" else UPSTREAM_25
    latents = common.sample(model, features, [11, 12])
    assert latents.dtype == torch.float32 and (latents - start).std() > 0.1 and fed == UPSTREAM_25
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=1e-4)


def test_an_audio_depends_on_its_seed_and_clip_not_on_its_batch(side, model):
    features = side.features(2)
    one = {key: value[1:] for key, value in features.items()}
    # row 3 = second clip, second audio
    together = common.sample(model, features, [1, 2, 3, 4], steps=2)[3:]
    alone = common.sample(model, one, [4], steps=2)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert torch.equal(common.initial_noise(model, [3, 4])[1], common.initial_noise(model, [4])[0])
    assert not torch.equal(*common.initial_noise(model, [3, 4]))


def test_one_projection_serves_winner_and_loser(side, model):
    t, winner, loser = torch.tensor([0.2, 0.7]), noise(2, *side.shape), noise(2, *side.shape, 1)
    with torch.no_grad():
        conditions = model.project(side.features(2))
        both = model.velocity(torch.cat([winner, loser]), torch.cat([t, t]), conditions)
        apart = [model.predict(a_t, t, conditions) for a_t in (winner, loser)]
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_mmaudio_large_v2_keeps_its_time_embedding_in_float32_under_autocast(mmaudio):
    model, seen = load_model("mmaudio:large_44k_v2", weights=mmaudio.weights), []
    note = lambda _, inputs, output: seen.append((inputs[0].dtype, output))  # noqa: E731
    model.net.t_embed.register_forward_hook(note)
    a_t, t, features = noise(1, *model.latent_shape), torch.tensor([0.937]), mmaudio.features(1)
    with torch.no_grad():
        exact = model(a_t, t, features)
        with torch.autocast("cpu", torch.bfloat16):
            fast = model(a_t, t, features)
    (_, embedded), (kind, embedded_fast) = seen
    assert kind == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.cosine_similarity(embedded, embedded_fast.float()).item() > 0.9999
    assert (fast.float() - exact).norm() / exact.norm() < 0.03


def test_frierens_output_depends_on_each_of_those_integers(frieren):
    model, a_t, features = ours(frieren), noise(1, 256, 20), frieren.features(1)
    u = [model(a_t, torch.tensor([1 - k / 1000]), features) for k in (199, 200)]
    assert (u[0] - u[1]).abs().max() > 1e-5, "a sampler test could not see a wrong integer"


def test_frieren_every_time_of_training_feeds_its_own_integer(frieren):
    fed, model = [], ours(frieren)
    dit = model.model["diffusion_model"]
    dit.t_embedder.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    dit.blocks = nn.ModuleList()  # only the times matter here
    k, a_t = torch.arange(1000), torch.zeros(1000, 256, 20)
    context = {"context": torch.zeros(1000, 32, 768)}
    with torch.no_grad():
        model.predict(a_t, 1 - k / 1000, context)
        model.predict(a_t, 1 - k.double() / 1000, context)
    assert torch.equal(fed[0], k) and torch.equal(fed[1], k)


def test_frieren_snap_t_cuts_to_the_thousandth_that_has_begun(frieren):
    model = ours(frieren)

    def k_of(t):
        return ((1 - model.snap_t(t)) * 1000).round().long()

    by_hand = {1.0: 0, 0.9995: 0, 0.9991: 0, 0.998: 2, 0.5: 500, 0.0005: 999, 0.0: 999}
    assert k_of(torch.tensor([*by_hand])).tolist() == [*by_hand.values()]
    t = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    share = k_of(t).bincount(minlength=1000)  # uniform over all thousand integers
    assert len(share) == 1000 and share.min() > 100 and share.max() < 310
    earlier = model.snap_t(t) - t  # by at most one
    assert (earlier >= -1e-5).all() and (earlier < 1.06e-3).all()
    k = torch.arange(1000)
    k = k[~torch.isin(k, torch.tensor([200, 360, 400]))]
    assert torch.equal(k_of(1 - k / 1000), k), "a snapped time stays, but for upstream's three"
    assert k_of(torch.linspace(1, 0, 26)[:-1]).tolist() == UPSTREAM_25
    one = model.snap_t(torch.tensor(0.3))
    assert one.dtype == torch.float32 and one.shape == ()


# Training


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_gradients_reach_every_trainable_parameter_and_recomputed_blocks_give_the_same(
    side, model, guidance
):
    a_t, t, features = noise(2, *side.shape), torch.tensor([0.2, 0.8]), side.features(2)
    gradients = []
    for recompute in (False, True):
        twin = copy.deepcopy(model).train()
        if recompute:
            training.checkpoint_blocks(twin)
        twin(a_t, t, features, guidance).square().mean().backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == side.frozen
    for name, grad in plain.items():  # DistributedDataParallel waits for every one
        assert grad.isfinite().all() and (grad.abs().sum() > 0) == (name not in side.unread), name
        torch.testing.assert_close(grad, recomputed[name], msg=name)
    if "model.diffusion_model.pos_emb.weight" in plain:  # 256 latents and the token of t
        assert plain["model.diffusion_model.pos_emb.weight"][:257].abs().amax(dim=1).min() > 0


def through_adapters(model, given, file, rank, bf16=False):
    """Trains adapters and merges them into `file`. Returns u before, u after, and then u of the
    reference."""
    with torch.no_grad():
        before = model(*given)
    training.add_lora(model, rank, seed=0, bf16=bf16)
    # in the first step, one half of every adapter is zero and stops the other half's gradient
    for _ in range(2):
        model.zero_grad()
        (model(*given) - given[0]).square().mean().backward()
        with torch.no_grad():
            for p in model.trainable_parameters():
                p -= 0.01 * p.grad.sign()
    with torch.no_grad():
        after, reference = model(*given), training.lora_reference(model)(*given)
    training.merge_lora(model)
    files.save_pt(file, model.policy_state())
    return before, after, reference


def test_adapters_on_every_layer_merge_into_a_policy_of_upstreams_form(side, model, tmp_path):
    given = noise(2, *side.shape), torch.tensor([0.2, 0.8]), side.features(2)
    kinds = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d))]
    twin, policy = copy.deepcopy(model), tmp_path / "policy.pt"
    before, after, reference = through_adapters(twin, given, policy, rank=2)
    assert torch.equal(reference, before)
    with torch.no_grad():
        theirs = side.velocity(side.load(policy), *given)
    assert (theirs - after).abs().max() < 1e-3 * (after - before).abs().max()
    training.add_lora(model, 2, seed=0, bf16=False)
    assert len(training.lora_layers(model)) == len(kinds)
    assert len(model.trainable_parameters()) == 2 * len(kinds)
    training.merge_lora(model)
    assert set(model.state_dict()) == side.names


def test_weights_rounded_below_adapters_change_no_bit_of_training_and_merging_under_autocast(
    side, model, tmp_path
):
    given, found = (noise(2, *side.shape), torch.tensor([0.2, 0.8]), side.features(2)), []
    for bf16 in (False, True):
        twin, file = copy.deepcopy(model), tmp_path / f"{bf16}.pt"
        # the cache would outlive an update
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            made = through_adapters(twin, given, file, rank=2, bf16=bf16)
        found.append([*made, *twin.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and len(found[1]) == 3 + len(side.names)
    assert not torch.equal(found[1][0], found[1][1])
    assert torch.bfloat16 not in {value.dtype for value in found[1][3:]}


def test_reference_keeps_its_own_network_and_shares_the_frozen_parts(side, model):
    reference = training.frozen_copy(model, bf16=False)
    a_t, t, features = noise(2, *side.shape), torch.tensor([0.2, 0.8]), side.features(2)
    with torch.no_grad():
        before = reference(a_t, t, features, 4.5)
        for p in model.parameters():
            p += 0.01
        assert torch.equal(reference(a_t, t, features, 4.5), before)
        assert not torch.equal(model(a_t, t, features, 4.5), before)
    model.decode(a_t)
    assert reference.codec is model.codec and model.codec.cache_info().currsize == 1
    assert getattr(reference, "encoders", None) is getattr(model, "encoders", None)
    assert set(model.state_dict()) == side.names  # encoders and codec are no part of it
    assert not reference.trainable_parameters() and model.trainable_parameters()


def test_blocks_compile_into_one_graph_each_class(side, model, monkeypatch, capsys):
    a_t, t, features = noise(2, *side.shape), torch.tensor([0.2, 0.7]), side.features(2)
    plain = model(a_t, t, features)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    speed.compile_models(model)
    torch.testing.assert_close(model(a_t, t, features), plain, rtol=1e-4, atol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == side.kinds and "cannot be compiled" not in capsys.readouterr().out
    assert set(model.state_dict()) == side.names  # no compiler's prefix
    torch._dynamo.reset()


def test_frieren_unconditional_is_the_embedder_of_zero_features_and_learns(frieren):
    theirs, model = frieren.net, ours(frieren)
    conditions = model.project(frieren.features(2))
    null = model.null_conditions(conditions)["context"]
    zeros = theirs.get_learned_conditioning(theirs.zero_embed)
    torch.testing.assert_close(null, zeros.expand(2, -1, -1))
    assert null.abs().max() > 0, "not zeros: the embedder's bias"
    null.sum().backward()
    assert model.cond_stage_model.embedder[0].bias.grad.abs().min() > 0
    with torch.no_grad():
        model.cond_stage_model.embedder[0].bias += 1
    torch.testing.assert_close(model.null_conditions(conditions)["context"], null + 1)


# Policies and audio


def test_upstream_strictly_loads_a_saved_policy_and_predicts_the_same(side, tmp_path):
    tuned, policy = tune(side, tmp_path)
    theirs = side.load(policy)
    assert theirs.state_dict().keys() == side.net.state_dict().keys()
    prefix = "net." if side.name.startswith("mmaudio") else ""
    for name, value in theirs.state_dict().items():
        moved = prefix + name in side.names - side.frozen
        source = tuned.state_dict()[prefix + name] if moved else side.net.state_dict()[name]
        assert torch.equal(value, source), name
    a_t, t, features = noise(1, *side.shape), torch.tensor([0.4]), side.features(1)
    with torch.no_grad():
        u, base = tuned(a_t, t, features), side.velocity(side.net, a_t, t, features)
        torch.testing.assert_close(u, side.velocity(theirs, a_t, t, features), rtol=1e-5, atol=5e-5)
    assert not torch.allclose(u, base, atol=1e-3)


def same_weights(model, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_load_policy_replaces_the_weights_and_leaves_the_file_alone(side, model, tmp_path):
    tuned, policy = tune(side, tmp_path)
    before = policy.read_bytes()
    assert not same_weights(model, tuned)
    model.load_policy(policy)
    for other in (model, ours(side, policy)):
        assert same_weights(other, tuned)
        assert other.policy_state().get("global_step", 1234) == 1234  # Frieren's file has it
    assert policy.read_bytes() == before


@pytest.mark.parametrize("family, name, samples, seconds", [
    ("mmaudio", "mmaudio:small_16k", 128_000, 8.0), ("mmaudio", "mmaudio:small_44k", 352_800, 8.0),
    ("frieren", "frieren", 131_072, 8.192),
])  # fmt: skip
def test_decode_equals_upstreams_vae_and_vocoder(request, family, name, samples, seconds):
    side = request.getfixturevalue(family)
    model = load_model(name, weights=side.weights)
    latents = noise(3, *model.latent_shape)
    before = latents.clone()
    waves = model.decode(latents)
    assert torch.equal(latents, before)  # MMAudio's unnormalize works in place, ours on a copy
    assert waves.shape == (3, samples) and samples / model.sample_rate_hz == seconds
    assert waves.dtype == torch.float32 and waves.std() > 0
    assert not (waves.is_inference() or waves.requires_grad)
    theirs = side.decoded(model, before)[:, :samples]
    torch.testing.assert_close(waves, theirs, rtol=1e-4, atol=2e-5)  # other batches round otherwise


@pytest.mark.parametrize("family, name, samples", [
    ("mmaudio", "mmaudio:small_16k", 128_000), ("mmaudio", "mmaudio:small_44k", 352_800),
    ("frieren", "frieren", 131_072),
])  # fmt: skip
def test_encode_audio_equals_upstreams_mel_and_the_mean_of_its_vae(request, family, name, samples):
    side = request.getfixturevalue(family)
    model = load_model(name, weights=side.weights)
    seconds = samples / model.sample_rate_hz
    waves = [5 * bursts(seconds, model.sample_rate_hz, seed=seed)[:samples] for seed in range(9)]
    waves = torch.tensor(np.stack(waves), dtype=torch.float32)  # up to beyond 1, as upstream cuts
    waves[1] = 0
    before = waves.clone()
    latents = model.encode_audio(waves)
    assert torch.equal(waves, before) and waves.abs().max() > 1
    assert latents.shape == (9, *model.latent_shape) and latents.dtype == torch.float32
    assert not (latents.is_inference() or latents.requires_grad) and latents.isfinite().all()
    assert latents[0].std() > 0 and (latents[0] - latents[1]).abs().max() > 1e-2
    theirs = side.encoded(model, waves)
    torch.testing.assert_close(latents, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    assert torch.equal(model.encode_audio(waves), latents)  # no sample
    # there and back again, as upstream does both
    again = side.decoded(model, theirs[:3])[:, :samples]
    difference = (model.decode(latents[:3]) - again).abs().max()
    assert again.std() > 0 and difference < 1e-3 * again.abs().max()


def test_mmaudios_generate_makes_our_audio_from_a_saved_policy(
    mmaudio, encoded, tmp_path, monkeypatch
):
    """The whole path: video, features, noise, 25 guided Euler steps, VAE, vocoder."""
    tuned, policy = tune(mmaudio, tmp_path)
    theirs = mmaudio_generate(mmaudio.load(policy), encoded.model, encoded.clip, steps=25, seed=7)
    assert theirs.shape == (128000,) and theirs.isfinite().all() and theirs.std() > 0
    monkeypatch.setattr(common, "initial_noise", lambda *_: noise(1, 250, 20, 7))
    features = {key: value[None] for key, value in encoded.features.items()}
    latents = common.sample(tuned, features, [7])
    torch.testing.assert_close(tuned.decode(latents)[0], theirs, rtol=1e-3, atol=1e-4)


def test_frierens_generation_script_loads_the_policy_and_makes_our_mels(
    frieren, tmp_path, monkeypatch, capsys
):
    """script/generate_mel_cfm_cfg_scale.py as it is, from its loader to its .npy files; CUDA alone
    is read as CPU."""
    (model, policy), starts = tune(frieren, tmp_path), []

    class NotingEuler(EulerOnly):
        def __call__(self, x, times):
            starts.append(x)
            return super().__call__(x, times)

    class OnCPU:
        device = staticmethod(lambda name: torch.device("cpu"))

        def __getattr__(self, name):
            return getattr(torch, name)

    with frieren_modules():
        monkeypatch.setattr(sys.modules["torchdyn.core"], "NeuralODE", NotingEuler)
        script, config = frieren_script(tmp_path, monkeypatch)
        theirs = script.load_model_from_config(config, policy, verbose=True)
        printed = capsys.readouterr().out
        assert "Global Step: 1234" in printed
        assert "missing" not in printed and "unexpected" not in printed
        saved = torch.load(policy, weights_only=True)["state_dict"]
        assert theirs.state_dict().keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in theirs.state_dict().items())
        script.torch = OnCPU()
        script.seed_everything = lambda seed: torch.manual_seed(seed)
        given = (str(tmp_path / "infer.yaml"), str(policy), str(frieren.weights / "cavp"))
        script.generate_mel(*given, "0", str(tmp_path), 26, "euler", 4.5, 2)
    for start, file in zip(starts, frieren.cavp, strict=True):
        features = {"cavp": model.read(cavp_clip(file))[0][None]}
        monkeypatch.setattr(common, "initial_noise", lambda *_, start=start: start.mT)
        with torch.no_grad():
            latents = common.sample(model, features, [0, 1])
            mel = model.codec()[0].decode(latents.mT / 0.18215)
        for row in range(2):
            written = np.load(tmp_path / f"CFG4.5_euler_26/Y{file.stem}_{row}.npy")
            assert written.shape == (80, 512)
            np.testing.assert_allclose(mel[row].numpy(), written, rtol=1e-4, atol=1e-4)


def test_frieren_full_size_network_makes_8_192_seconds_from_32_frames(tmp_path, monkeypatch):
    """The published sizes once, one forward of the DiT instead of fifty. BigVGAN's args.yml is not
    in upstream's repository; this is the usual 112M shape with a product of strides of 256."""
    for name, value in FULL_SIZE.items():
        monkeypatch.setattr(Frieren, name, value)
    sizes = BIGVGAN_16K | dict(upsample_initial_channel=1536, resblock_kernel_sizes=[3, 7, 11])
    sizes["resblock_dilation_sizes"] = [[1, 3, 5]] * 3
    (tmp_path / "bigvnat").mkdir()
    (tmp_path / "bigvnat" / "args.yml").write_text(yaml.safe_dump(sizes))

    def thin(prefix, module):
        """Full shapes, but every output channel shares one row, so that the file stays small."""
        found = {}
        for name, value in module.state_dict().items():
            row = torch.randn(value.shape[1:]) / max(1, value.shape[1:].numel()) ** 0.5
            found[prefix + name] = row.expand(value.shape)
        return found

    classes = upstream_classes()
    with torch.device("meta"):
        parts = {"model.diffusion_model.": classes.dit(**Frieren.dit_config)}
        parts["cond_stage_model."] = classes.embedder(512, 768)
        without_loss = {"target": "torch.nn.Identity"}
        parts["first_stage_model."] = classes.vae(20, Frieren.vae_config, without_loss)
        vocoder = classes.vocoder(SimpleNamespace(**sizes))
    state = {}
    for prefix, part in parts.items():
        state |= thin(prefix, part)
    assert len(state) == 327, "339 with the twelve buffers"
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    torch.save({"generator": thin("", vocoder)}, tmp_path / "bigvnat" / "best_netG.pt")

    model = load_model("frieren", tmp_path / "last.ckpt", weights=tmp_path)
    assert sum(p.numel() for p in model.model.parameters()) == 158_882_708
    assert sum(p.numel() for p in model.cond_stage_model.parameters()) == 393_984
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 512)))
    clip = cavp_clip(tmp_path / "x")
    cavp = model.encode(clip, model.read(clip))["cavp"]
    latents = common.sample(model, {"cavp": cavp[None]}, seeds=[3], steps=1, guidance=1.0)
    waves = model.decode(latents)
    assert fits(model, {"cavp": cavp}) and cavp.shape == (32, 512)
    assert latents.shape == (1, 256, 20) and waves.shape == (1, 131072)
    assert waves.shape[1] / model.sample_rate_hz == 8.192 and model.clip_s == 8.0


# Features


@pytest.fixture
def frames_of(mmaudio, monkeypatch):
    """path -> the two batches of frames that MMAudio's encode hands to upstream's CLIP and
    Synchformer."""
    model, seen = ours(mmaudio), {}
    encoders = SimpleNamespace(
        encode_video_with_clip=lambda x, **_: seen.update(clip=x) or x,
        encode_video_with_sync=lambda x, **_: seen.update(sync=x) or x,
    )
    monkeypatch.setattr(model, "encoders", lambda: encoders)

    def frames(path):
        model.encode(a_clip(path), model.read(a_clip(path)))
        return seen["clip"][0], seen["sync"][0]

    return frames


@pytest.mark.parametrize("rate, size", [
    ("24000/1001", (160, 90)), ("43/2", (90, 160)), (25, (96, 64)), (60, (96, 96)), (10, (64, 48)),
])  # fmt: skip
def test_mmaudio_frames_equal_those_of_upstreams_evaluation(frames_of, tmp_path, rate, size):
    path = film(tmp_path / "a.mp4", 9.0, Fraction(rate), None, size)
    clip_frames, sync_frames = frames_of(path)
    assert clip_frames.shape == (64, 3, 384, 384) and sync_frames.shape == (200, 3, 224, 224)
    assert all(map(torch.equal, (clip_frames, sync_frames), mmaudio_frames(path)))
    # frames do differ from one another
    assert sync_frames[::20].diff(dim=0).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_mmaudios_demo_shows_the_first_frame_at_or_after_a_time_instead(frames_of, tmp_path):
    """At 25 fps half a slot of 8 fps is 1.56 frames: the demo's CLIP sees other frames than
    upstream's training did."""
    path = film(tmp_path / "a.mp4", 9.0, Fraction(25), None)
    theirs = mmaudio_modules().eval_utils.load_video(path, 8.0).clip_frames
    assert sum(not torch.equal(*pair) for pair in zip(frames_of(path)[0], theirs)) == 40


def test_mmaudio_a_video_of_exactly_8_seconds_is_whole_and_a_shorter_one_is_skipped(
    frames_of, tmp_path
):
    path = film(tmp_path / "a.mp4", 8.0, Fraction(25), None)
    assert [len(frames) for frames in frames_of(path)] == [64, 200]
    assert all(map(torch.equal, frames_of(path), mmaudio_frames(path)))
    demo = mmaudio_modules().eval_utils.load_video(path, 8.0, load_all_frames=False)
    # upstream's demo loses the end of such a file
    assert (len(demo.clip_frames), len(demo.sync_frames)) == (63, 199)
    with pytest.raises(SkipClip, match=r"too short: 3\.00 s of video, 8\.00 s needed"):
        frames_of(film(tmp_path / "b.mp4", 3.0, Fraction(25), None))


@pytest.fixture(scope="module")
def encoded(mmaudio, tmp_path_factory):
    """A real file through MMAudio's encode, with and without caption."""
    model, path = ours(mmaudio), tmp_path_factory.mktemp("video") / "a.mp4"
    clip = a_clip(film(path, sound=None), caption="a dog barks")
    seen = model.read(clip)
    features, silent = model.encode(clip, seen), model.encode(a_clip(path), seen)
    return SimpleNamespace(model=model, clip=clip, features=features, without_caption=silent)


def test_mmaudio_encode_equals_upstreams_reader_and_feature_functions(encoded):
    utils, (clip_frames, sync_frames) = encoded.model.encoders(), mmaudio_frames(encoded.clip.path)
    theirs = {
        "clip": utils.encode_video_with_clip(clip_frames[None])[0],
        "sync": utils.encode_video_with_sync(sync_frames[None])[0],
        "text": utils.encode_text(["a dog barks"])[0],
    }
    shapes = {"clip": (64, 1024), "sync": (192, 768), "text": (77, 1024)}
    assert fits(encoded.model, encoded.features) and fits(encoded.model, encoded.without_caption)
    for key, value in encoded.features.items():
        assert value.shape == shapes[key]
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        torch.testing.assert_close(value, theirs[key].clone(), rtol=1e-4, atol=1e-5)


def test_mmaudio_features_are_plain_tensors_that_training_can_use(encoded, tmp_path):
    for value in encoded.features.values():
        assert not value.is_inference() and not value.requires_grad
    files.save_pt(tmp_path / "features.pt", encoded.features)
    features = {key: value[None] for key, value in files.load_pt(tmp_path / "features.pt").items()}
    encoded.model(noise(1, 250, 20), torch.tensor([0.5]), features).square().mean().backward()
    assert encoded.model.net.clip_input_proj[0].weight.grad.abs().sum() > 0
    encoded.model.zero_grad()


def test_mmaudio_text_is_encoded_once_per_caption_and_its_absence_is_upstreams_null(encoded, spied):
    model = encoded.model
    calls = spied(model.encoders(), "encode_text")
    texts = [model.text_features(caption) for caption in ("rain", "wind", "rain", "rain")]
    assert calls == [(["rain"],), (["wind"],)]
    assert torch.equal(texts[0], texts[3]) and not torch.equal(texts[0], texts[1])
    assert torch.equal(encoded.without_caption["text"], model.net.empty_string_feat)
    for key in ("clip", "sync"):
        assert torch.equal(encoded.without_caption[key], encoded.features[key])


def test_frieren_reads_cavp_files_by_stem_or_name_and_cuts_them_to_32_frames(frieren, tmp_path):
    model, rows = ours(frieren), noise(1, 40, 512)[0].numpy()
    np.savez(tmp_path / "a.b_000010.npz", feat=rows.astype(np.float16))
    np.save(tmp_path / "c.npy", rows)
    for name, expected in (("a.b_000010", rows.astype(np.float16)), ("c", rows), ("c.npy", rows)):
        (cavp,) = model.read(cavp_clip(tmp_path / name))
        assert cavp.shape == (32, 512) and cavp.dtype == torch.float32 and cavp.device.type == "cpu"
        assert np.array_equal(cavp.numpy(), expected[:32].astype(np.float32))


def test_frieren_clips_without_usable_cavp_features_are_skipped_with_the_reason(frieren, tmp_path):
    model, good = ours(frieren), np.ones((40, 512), np.float32)
    bad = good.copy()
    bad[3, 7] = np.nan
    np.savez(tmp_path / "short.npz", feat=good[:31])
    np.savez(tmp_path / "narrow.npz", feat=good[:, :511])
    np.savez(tmp_path / "nan.npz", feat=bad)
    np.savez(tmp_path / "key.npz", other=good)
    np.save(tmp_path / "code.npy", np.array([os.system], dtype=object), allow_pickle=True)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:1000])
    (tmp_path / "other.txt").write_text("x")
    reasons = {
        "short": r"are \(31, 512\), not \(at least 32, 512\)",
        "narrow": r"are \(40, 511\), not \(at least 32, 512\)",
        "nan": "not finite",
        "key": r"unreadable CAVP features \(KeyError\)",
        "code": r"unreadable CAVP features \(ValueError\)",
        "torn": r"unreadable CAVP features \(BadZipFile\)",
        "absent": "no CAVP features",
        "other.txt": "no CAVP features",
    }
    for name, reason in reasons.items():
        with pytest.raises(SkipClip, match=reason):
            model.read(cavp_clip(tmp_path / name))
    assert "--cavp" in stopped(model.read, a_clip())


# Files that are missing, foreign or malicious


def test_foreign_malicious_and_absent_policies_are_one_line_and_not_run(side, model, tmp_path):
    mark = tmp_path / "mark"
    cases = side.foreign(tmp_path) | {
        "no dict": ([1, 2], []),
        "malicious": ({"state_dict": {}, "lr": Malicious(mark)}, ["cannot be read"]),
        "another model": ({"net.weight": torch.zeros(3)}, []),
        "not a .pt": (b"no archive", ["cannot be read"]),
        "absent": (None, ["no such file"]),
    }
    for case, (content, words) in cases.items():
        path = tmp_path / f"{case}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        for call in (model.load_policy, lambda path: ours(side, path)):
            said(stopped(call, path), path, *words)
    assert not mark.exists()


MISSING = [
    ("mmaudio:large_44k", "mmaudio_large_44k.pth"), ("mmaudio:small_44k", "v1-44.pth"),
    ("mmaudio:small_44k", "synchformer_state_dict.pth"),
    ("mmaudio:small_44k", f"{VOCODER}/bigvgan_generator.pt"),
    ("frieren", "v2a/noreflow/last.ckpt"), ("frieren", "bigvnat/args.yml"),
    ("frieren", "bigvnat/best_netG.pt"),
]  # fmt: skip


def beside(weights, folder, *but):
    """Links to all files of a --weights folder but these."""
    for path in weights.rglob("*.*"):
        name = str(path.relative_to(weights))
        if path.is_file() and name not in but:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)


@pytest.mark.parametrize("name, missing", MISSING)
def test_missing_file_is_one_line_with_its_row_of_the_table(request, tmp_path, name, missing):
    beside(request.getfixturevalue(name.partition(":")[0]).weights, tmp_path, missing)

    def use():
        model = load_model(name, weights=tmp_path)
        model.decode(noise(1, *model.latent_shape))
        model.encoders()

    said(stopped(use), tmp_path / missing, *weights_row(missing))


@pytest.mark.parametrize("name, word", [
    ("mmaudio:huge", "large_44k_v2"), ("frieren:large", "no variants"),
])  # fmt: skip
def test_unknown_variant_is_one_line(tmp_path, name, word):
    said(stopped(load_model, name, None, "cpu", tmp_path), name, word)


def test_mmaudios_clip_outside_the_cache_is_one_line_without_network(
    mmaudio, tmp_path, monkeypatch
):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said(stopped(ours(mmaudio).encoders), CLIP, "hf download")


def test_mmaudios_truncated_codec_file_is_one_line(mmaudio, tmp_path):
    beside(mmaudio.weights, tmp_path, "v1-16.pth")
    (tmp_path / "v1-16.pth").write_bytes((mmaudio.weights / "v1-16.pth").read_bytes()[:5000])
    assert "v1-16.pth" in stopped(load_model("mmaudio:small_16k", weights=tmp_path).codec)


@pytest.mark.parametrize("content, words", [
    ("<!DOCTYPE html>", ["is a web page", "bigvnat/args.yml"]),
    ("a: [", ["not the sizes"]), ("- 80", ["not the sizes"]), ("num_mels: 80", ["not the sizes"]),
])  # fmt: skip
def test_frierens_sizes_of_another_form_are_one_line(frieren, tmp_path, content, words):
    beside(frieren.weights, tmp_path, "bigvnat/args.yml")
    (tmp_path / "bigvnat/args.yml").write_text(content)
    said(stopped(load_model("frieren", weights=tmp_path).codec), tmp_path, *words)


def test_frierens_lightning_checkpoint_loads_safely_and_completely(frieren):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(frieren.weights / frieren.file, weights_only=True)
    theirs, model = frieren.net.state_dict(), ours(frieren)
    vae = nn.ModuleDict({"first_stage_model": model.codec()[0]})
    assert len(theirs) == 12 + len(model.state_dict()) + len(vae.state_dict())
    for part in (model, vae):
        assert all(torch.equal(value, theirs[name]) for name, value in part.state_dict().items())


def test_frierens_reflowed_and_distilled_checkpoints_are_refused_where_a_path_tells(
    frieren, tmp_path
):
    state, by_record = frieren.net.state_dict(), tmp_path / "given" / "last.ckpt"
    by_record.parent.mkdir()
    for kind in ("reflow", "distill"):
        by_name = tmp_path / kind / "last.ckpt"
        by_name.parent.mkdir()
        torch.save({"state_dict": state}, by_name)
        logs = f"/y/logs/2024_v2a_cfm_{kind}_vcfg_mix_train_load_2card/checkpoints"
        save_lightning(by_record, state, dirpath=logs)
        for file in (by_name, by_record):
            assert "without reflow" in stopped(load_model, "frieren", file, "cpu", frieren.weights)
    torch.save({"state_dict": state}, by_record)  # nothing tells: the tensors alone cannot
    for name in ("last", "noreflow", "Frieren (no reflow)", "no_reflow-25"):
        by_record = by_record.rename(by_record.with_name(f"{name}.ckpt"))
        load_model("frieren", by_record)


def test_frieren_imports_four_modules_and_generic_names_do_not_stay(frieren):
    shell(sys.executable, "-c", IMPORTS)


IMPORTS = """
import sys, types
from adapters.frieren import upstream_classes
path = list(sys.path)
sys.modules["cfm"] = mine = types.ModuleType("cfm")
classes = upstream_classes()
assert classes is upstream_classes() and sys.modules["cfm"] is mine and sys.path == path
unwanted = {"vocoder", "pytorch_lightning", "torchdyn", "mmcv", "omegaconf"}
assert not {name.partition(".")[0] for name in sys.modules} & unwanted
assert [name for name in sys.modules if name.partition(".")[0] == "cfm"] == ["cfm"]
# the training classes need Lightning and torchdyn
assert not [x for x in sys.modules if x.startswith("frieren_v2a") and "diffusion." in x]
"""
