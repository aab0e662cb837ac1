"""The MMAudio adapter against upstream's own code: same tensors in, same numbers out.

    UPSTREAM_DIR=<folder that holds the clone MMAudio> python -m pytest tests/test_mmaudio.py

No weight of MMAudio is needed: every file is built here in upstream's form, by upstream's own classes at tiny size (one
layer, few channels, the true sequence lengths), and read back by upstream's own loaders. Only sizes are replaced.
"""

import functools
import os
import shutil
import socket
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from upstream_files import mmaudio_modules, write_mmaudio

import common

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif("UPSTREAM_DIR" not in os.environ, reason="UPSTREAM_DIR, the folder of the clones, is unset"),
]


@pytest.fixture(scope="module")
def upstream():
    return mmaudio_modules()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A --weights folder and a Hugging Face cache of tiny files; meanwhile upstream builds networks of these sizes."""
    folder, patch = tmp_path_factory.mktemp("weights"), pytest.MonkeyPatch()
    write_mmaudio(folder, patch)
    yield folder
    patch.undo()
    shutil.rmtree(folder)  # 0.4 GB


@pytest.fixture(scope="module")
def model(weights):
    return common.load_model("mmaudio:small_16k", weights=weights)


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Nothing here, whatever weights are missing, may as much as look up a host."""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        yield
    assert not calls


def random_features(rows, seed=0):
    """What encode returns, for several clips: CLIP's outputs have norm 1, Synchformer's are not normalised."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    clip, text = draw(rows, 64, 1024), draw(rows, 77, 1024)
    norm = torch.nn.functional.normalize
    return {"clip": norm(clip, dim=-1), "sync": draw(rows, 192, 768), "text": norm(text, dim=-1)}


def upstream_conditions(model, features):
    return model.net.preprocess_conditions(features["clip"], features["sync"], features["text"])


def write_video(path, rate=25, frames=200, width=96, height=64):
    """An H.264 mp4 whose picture says when it is: a bar that moves over coloured noise."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = noise.copy()
            picture[:, (3 * i) % width :][:, :8] = (i * 7 % 255, 255 - i % 255, 128)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return {"id": "clip", "path": path, "caption": "a dog barks"}


# Time, sign, guidance, sampler ------------------------------------------------------------------------------


def test_time_is_mirrored_and_the_velocity_changes_sign_only_in_predict(upstream, model):
    a_0, eps = torch.randn(2, 3, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    t, features = torch.tensor([0.1, 0.5, 0.93]), random_features(3)
    flow = upstream.flow_matching.FlowMatching()
    a_t, v = common.interpolate(a_0, eps, t)
    x_t = flow.get_conditional_flow(x0=eps, x1=a_0, t=1 - t)
    torch.testing.assert_close(a_t, x_t)
    with torch.no_grad():
        theirs = flow.loss(model.net.predict_flow(x_t, 1 - t, upstream_conditions(model, features)), x0=eps, x1=a_0)
        u = model.predict(a_t, t, model.project(features))
    torch.testing.assert_close(common.flow_error(v, u), theirs)
    assert (common.flow_error(v, -u) - theirs).abs().min() > 0.01  # the test can tell the sign
    torch.testing.assert_close(common.flow_error(v, -(a_0 - eps)), torch.zeros(3))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_guided_velocity_equals_upstreams_ode_wrapper(model, guidance):
    features, t = random_features(2), torch.tensor(0.3)
    a_t = torch.randn(2, *model.latent_shape)
    with torch.no_grad():
        null = model.net.get_empty_conditions(2)
        theirs = model.net.ode_wrapper(1 - t, a_t, upstream_conditions(model, features), null, guidance)
        ours = model.velocity(a_t, t.expand(2), model.project(features), guidance)
    torch.testing.assert_close(ours, -theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["small_16k", "large_44k_v2"])
def test_sample_equals_upstreams_euler_trajectory(upstream, weights, variant):
    model = common.load_model(f"mmaudio:{variant}", weights=weights)
    features, seeds = random_features(2), [11, 12]
    flow = upstream.flow_matching.FlowMatching(min_sigma=0, inference_mode="euler", num_steps=25)
    noise = common.initial_noise(model, seeds)
    with torch.no_grad():
        full, null = upstream_conditions(model, features), model.net.get_empty_conditions(2)
        theirs = flow.to_data(lambda t, x: model.net.ode_wrapper(t, x, full, null, 4.5), noise)
    ours = common.sample(model, features, seeds)
    assert ours.dtype == torch.float32 and (ours - noise).std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_an_audio_depends_on_its_seed_and_clip_not_on_its_batch(model):
    features = random_features(2)
    one = {key: value[1:] for key, value in features.items()}
    together = common.sample(model, features, [1, 2, 3, 4], steps=2)  # row 3 = second clip, second audio
    torch.testing.assert_close(common.sample(model, one, [4], steps=2), together[3:], rtol=1e-4, atol=1e-4)
    assert torch.equal(common.initial_noise(model, [3, 4])[1], common.initial_noise(model, [4])[0])
    assert not torch.equal(*common.initial_noise(model, [3, 4]))


def test_one_projection_serves_winner_and_loser(model):
    features, t = random_features(2), torch.tensor([0.2, 0.7])
    winner, loser = torch.randn(2, 2, *model.latent_shape)
    with torch.no_grad():
        conditions = model.project(features)
        both = model.velocity(torch.cat([winner, loser]), torch.cat([t, t]), conditions)
        apart = [model.predict(a_t, t, conditions) for a_t in (winner, loser)]
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_large_v2_keeps_its_time_embedding_in_float32_under_autocast(weights):
    model = common.load_model("mmaudio:large_44k_v2", weights=weights)
    seen = []
    model.net.t_embed.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output)))
    a_t, t, features = torch.randn(1, *model.latent_shape), torch.tensor([0.937]), random_features(1)
    with torch.no_grad():
        exact = model(a_t, t, features)
        with torch.autocast("cpu", torch.bfloat16):
            fast = model(a_t, t, features)
    (_, embedded), (kind, embedded_fast) = seen
    assert kind == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.cosine_similarity(embedded, embedded_fast.float()).item() > 0.9999
    assert (fast.float() - exact).norm() / exact.norm() < 0.03


# Video and features -----------------------------------------------------------------------------------------


@pytest.fixture
def frames_of(model, monkeypatch):
    """clip -> the two batches of frames that encode hands to upstream's CLIP and Synchformer."""

    def read(clip):
        seen = {}
        encoders = SimpleNamespace(
            encode_video_with_clip=lambda x, **_: seen.update(clip=x) or x,
            encode_video_with_sync=lambda x, **_: seen.update(sync=x) or x,
        )
        monkeypatch.setattr(model, "encoders", lambda: encoders)
        model.encode(dict(clip, caption=None))
        return seen["clip"][0], seen["sync"][0]

    return read


@pytest.mark.parametrize(
    "rate, frames, size",
    [
        ("24000/1001", 240, (160, 90)),
        ("43/2", 215, (90, 160)),
        (25, 250, (96, 64)),
        (60, 600, (96, 96)),
        (10, 100, (64, 48)),
    ],
)
def test_frames_equal_upstreams_reader(upstream, frames_of, tmp_path, rate, frames, size):
    """Bit-equal, except that we take a frame shown exactly at i / fps, where upstream, which adds up 0.04 s in floating
    point, often takes the next one (of a 25 fps video nearly always)."""
    from PIL import Image

    clip = write_video(tmp_path / "clip.mp4", rate, frames, *size)
    theirs = upstream.eval_utils.load_video(clip["path"], 8.0)
    clip_frames, sync_frames = frames_of(clip)
    assert clip_frames.shape == (64, 3, 384, 384) and sync_frames.shape == (200, 3, 224, 224)
    assert torch.equal(clip_frames, theirs.clip_frames[:64])
    differing = [i for i in range(200) if not torch.equal(sync_frames[i], theirs.sync_frames[i])]
    shown_exactly_then = {i for i in range(200) if (Fraction(i, 25) * Fraction(rate)).denominator == 1}
    assert set(differing) <= shown_exactly_then and (bool(differing) == (rate != "24000/1001"))
    for i in differing[:3]:
        Image.fromarray(theirs.all_frames[int(Fraction(i, 25) * Fraction(rate))]).save(tmp_path / "frame.png")
        assert torch.equal(sync_frames[i], upstream.eval_utils.load_image(tmp_path / "frame.png").sync_frames[0])
    assert sync_frames[::20].diff(dim=0).abs().amax(dim=(1, 2, 3)).min() > 0.1  # frames do differ from one another


def test_a_video_of_exactly_8_seconds_is_whole(upstream, frames_of, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", rate=25, frames=200)
    clip_frames, sync_frames = frames_of(clip)
    assert (len(clip_frames), len(sync_frames)) == (64, 200)
    theirs = upstream.eval_utils.load_video(clip["path"], 8.0, load_all_frames=False)
    assert (len(theirs.clip_frames), len(theirs.sync_frames)) == (63, 199)  # upstream loses the end of such a file
    assert torch.equal(clip_frames[:63], theirs.clip_frames)


def test_a_short_video_is_skipped_with_its_length(frames_of, tmp_path):
    with pytest.raises(common.SkipClip, match=r"too short: 3\.00 s of video, 8\.00 s needed"):
        frames_of(write_video(tmp_path / "clip.mp4", rate=25, frames=75))


@pytest.fixture(scope="module")
def encoded(upstream, weights, tmp_path_factory):
    """A real file through encode, with and without caption, and the same file through upstream's functions."""
    model = common.load_model("mmaudio:small_16k", weights=weights)
    clip = write_video(tmp_path_factory.mktemp("video") / "clip.mp4", "30000/1001", 300)
    features, silent = model.encode(clip), model.encode(dict(clip, caption=None))
    video = upstream.eval_utils.load_video(clip["path"], 8.0, load_all_frames=False)
    return SimpleNamespace(model=model, clip=clip, features=features, without_caption=silent, video=video)


def test_encode_equals_upstreams_feature_functions(encoded):
    utils = encoded.model.encoders()
    theirs = {
        "clip": utils.encode_video_with_clip(encoded.video.clip_frames[None])[0],
        "sync": utils.encode_video_with_sync(encoded.video.sync_frames[None])[0],
        "text": utils.encode_text(["a dog barks"])[0],
    }
    shapes = {"clip": (64, 1024), "sync": (192, 768), "text": (77, 1024)}
    for key, value in encoded.features.items():
        assert value.shape == shapes[key] and value.dtype == torch.float32 and value.device.type == "cpu"
        torch.testing.assert_close(value, theirs[key].clone(), rtol=1e-4, atol=1e-5)


def test_features_are_plain_tensors_that_training_can_use(encoded, tmp_path):
    assert not any(value.is_inference() or value.requires_grad for value in encoded.features.values())
    common.save_pt(tmp_path / "features.pt", encoded.features)
    features = {key: value[None] for key, value in common.load_pt(tmp_path / "features.pt").items()}
    model = encoded.model
    model(torch.randn(1, *model.latent_shape), torch.tensor([0.5]), features).square().mean().backward()
    assert model.net.clip_input_proj[0].weight.grad.abs().sum() > 0
    model.zero_grad()


def test_text_is_encoded_once_per_caption_and_its_absence_is_upstreams_null(encoded, monkeypatch):
    model, calls = encoded.model, []
    utils = model.encoders()
    original = utils.encode_text
    monkeypatch.setattr(utils, "encode_text", lambda text: calls.append(text) or original(text))
    texts = [model.text_features(caption) for caption in ("rain", "wind", "rain", "rain")]
    assert calls == [["rain"], ["wind"]] and torch.equal(texts[0], texts[3]) and not torch.equal(texts[0], texts[1])
    assert torch.equal(encoded.without_caption["text"], model.net.empty_string_feat)
    for key in ("clip", "sync"):
        assert torch.equal(encoded.without_caption[key], encoded.features[key])


# Latents to audio -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, samples", [("small_16k", 128000), ("small_44k", 352800)])
def test_decode_equals_upstream_and_lasts_8_seconds(weights, variant, samples):
    model = common.load_model(f"mmaudio:{variant}", weights=weights)
    latents = torch.randn(2, *model.latent_shape)
    before = latents.clone()
    waves = model.decode(latents)
    assert torch.equal(latents, before)  # upstream's unnormalize works in place, ours on a copy
    assert waves.shape == (2, samples) and samples / model.sample_rate_hz == 8.0
    assert waves.dtype == torch.float32 and not waves.is_inference() and waves.std() > 0
    with torch.inference_mode():
        utils = model.codec()
        theirs = utils.vocode(utils.decode(before * model.net.latent_std + model.net.latent_mean))[:, 0, :samples]
    torch.testing.assert_close(waves, theirs.clone(), rtol=1e-4, atol=1e-5)


def test_encoders_and_codec_are_no_part_of_the_model(encoded):
    model = encoded.model
    model.codec()
    network = set(model.net.state_dict())
    assert {key.removeprefix("net.") for key in model.state_dict()} == network == set(model.policy_state())
    copied = model.reference()
    assert sum(p.numel() for p in copied.parameters()) == sum(p.numel() for p in model.net.parameters())
    assert copied.encoders() is model.encoders() and copied.codec() is model.codec()
    assert not any(p.requires_grad for p in copied.parameters()) and model.trainable_parameters()


# Policies ---------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(upstream, encoded, tmp_path):
    """A policy that differs from the base, saved by us and loaded by upstream's own lines."""
    model = common.load_model("mmaudio:small_16k", weights=encoded.model.weights)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_policy(tmp_path / "policy.pt")
    net = upstream.networks.get_my_mmaudio("small_16k").eval()
    net.load_weights(torch.load(tmp_path / "policy.pt", weights_only=True))
    return SimpleNamespace(model=model, net=net, path=tmp_path / "policy.pt")


def test_upstream_strictly_loads_a_saved_policy_and_predicts_the_same(policy, encoded):
    features, x, t = random_features(1), torch.randn(1, 250, 20), torch.tensor([0.4])
    with torch.no_grad():
        ours, base = policy.model(x, t, features), encoded.model(x, t, features)
        theirs = policy.net(x, features["clip"], features["sync"], features["text"], 1 - t)
    assert torch.equal(ours, -theirs) and not torch.allclose(ours, base, atol=1e-3)


def test_upstreams_generate_makes_our_audio_from_a_saved_policy(upstream, policy, encoded, monkeypatch):
    """The whole path: video, features, noise, 25 guided Euler steps, VAE, vocoder."""
    conditions, codec = encoded.model.encoders(), encoded.model.codec()
    utils = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, decode=codec.decode, vocode=codec.vocode)
    for name in ("encode_video_with_clip", "encode_video_with_sync", "encode_text"):
        setattr(utils, name, getattr(conditions, name))
    settings = dict(feature_utils=utils, net=policy.net, fm=upstream.flow_matching.FlowMatching(0, "euler", 25))
    frames = encoded.video.clip_frames[None], encoded.video.sync_frames[None]
    rng = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        theirs = upstream.eval_utils.generate(*frames, ["a dog barks"], rng=rng, cfg_strength=4.5, **settings)
    assert theirs.shape == (1, 1, 128000) and theirs.isfinite().all() and theirs.std() > 0

    tuned = common.load_model("mmaudio:small_16k", checkpoint=policy.path, weights=encoded.model.weights)
    noise = torch.randn(1, 250, 20, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(common, "initial_noise", lambda model, seeds: noise)
    latents = common.sample(tuned, {key: value[None] for key, value in encoded.features.items()}, [7])
    torch.testing.assert_close(tuned.decode(latents), theirs[:, 0].clone(), rtol=1e-3, atol=1e-4)


def test_load_policy_replaces_the_weights_and_leaves_the_file_alone(policy, weights):
    model = common.load_model("mmaudio:small_16k", weights=weights)
    before = policy.path.read_bytes()
    model.load_policy(policy.path)
    assert policy.path.read_bytes() == before
    for (name, ours), theirs in zip(model.net.state_dict().items(), policy.net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


# Training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_gradients_reach_every_trainable_parameter(weights, guidance):
    model = common.load_model("mmaudio:small_16k", weights=weights)
    last = len(model.net.joint_blocks) - 1
    # The last joint block hands on its latents alone: the queries of its video and text tokens are never read.
    unused = {f"net.joint_blocks.{last}.{part}_block.attn.q_norm.weight" for part in ("clip", "text")}
    a_0, eps = torch.randn(2, 2, *model.latent_shape)
    a_t, v = common.interpolate(a_0, eps, torch.tensor([0.2, 0.8]))
    u = model(a_t, torch.tensor([0.2, 0.8]), random_features(2), guidance)
    common.flow_error(v, u).mean().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trainable.values())  # DistributedDataParallel waits for every one
    assert {name for name, p in trainable.items() if not p.grad.abs().sum() > 0} == unused


def test_null_conditions_and_latent_statistics_are_frozen(model):
    frozen = {name.removeprefix("net.") for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"empty_clip_feat", "empty_sync_feat", "empty_string_feat", "latent_mean", "latent_std"}
    assert frozen <= set(model.policy_state())


def test_recomputed_blocks_give_the_same_gradients(weights):
    gradients = []
    for recompute in (False, True):
        model = common.load_model("mmaudio:small_16k", weights=weights)
        if recompute:
            model.checkpoint_blocks()
        x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        model(x, torch.tensor([0.5]), random_features(1)).square().mean().backward()
        gradients.append([p.grad for p in model.trainable_parameters()])
    assert len(model.blocks()) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_projection_and_prediction_compile_into_one_graph_each(weights):
    model = common.load_model("mmaudio:small_16k", weights=weights)
    a_t, t, features = torch.randn(2, *model.latent_shape), torch.tensor([0.2, 0.7]), random_features(2)
    plain = model(a_t, t, features)
    for name in ("project", "predict"):
        setattr(model, name, torch.compile(getattr(model, name), backend="eager", fullgraph=True))
    torch.testing.assert_close(model(a_t, t, features), plain, rtol=1e-4, atol=1e-4)
    assert set(model.policy_state()) == set(common.load_pt(weights / "mmaudio_small_16k.pth"))  # no compiler's prefix


# One line and exit code 2 -----------------------------------------------------------------------------------


def one_line(capsys, call):
    """Runs `call`, which must stop with code 2 and exactly one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_unknown_variant_is_one_line(weights, capsys):
    assert "large_44k_v2" in one_line(capsys, lambda: common.load_model("mmaudio:huge", weights=weights))


def test_missing_network_names_its_source(tmp_path, weights, capsys):
    line = one_line(capsys, lambda: common.load_model("mmaudio:large_44k", weights=tmp_path))
    assert str(tmp_path / "mmaudio_large_44k.pth") in line and "3.9 GiB" in line and "huggingface.co/hkchengrex" in line


@pytest.mark.parametrize("kind", ["another variant", "wrapped", "no dict", "not a .pt", "absent"])
def test_foreign_policy_is_one_line(weights, model, tmp_path, capsys, kind):
    path, state = tmp_path / "policy.pt", common.load_pt(weights / "mmaudio_small_44k.pth")
    if kind == "not a .pt":
        path.write_bytes(b"no archive")
    elif kind != "absent":
        own = common.load_pt(weights / "mmaudio_small_16k.pth")
        torch.save({"another variant": state, "wrapped": {"weights": own}, "no dict": [1, 2]}[kind], path)
    line = one_line(capsys, lambda: common.load_model("mmaudio:small_16k", checkpoint=path, weights=weights))
    assert str(path) in line
    if path.exists():
        assert str(path) in one_line(capsys, lambda: model.load_policy(path))


@pytest.mark.parametrize(
    "missing", ["synchformer_state_dict.pth", "v1-44.pth", f"{common.MMAUDIO_VOCODER}/bigvgan_generator.pt"]
)
def test_missing_encoder_or_codec_file_is_one_line(weights, tmp_path, capsys, missing):
    for name in common.WEIGHTS:
        if (weights / name).exists() and name != missing:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).symlink_to(weights / name)
    model = common.load_model("mmaudio:small_44k", weights=tmp_path)
    line = one_line(capsys, model.encoders if missing.startswith("sync") else model.codec)
    assert missing in line and common.WEIGHTS[missing][1] in line


def test_clip_outside_the_cache_is_one_line_without_network(weights, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = common.load_model("mmaudio:small_16k", weights=weights)
    line = one_line(capsys, model.encoders)
    assert common.MMAUDIO_CLIP in line and "hf download" in line


def test_truncated_codec_file_is_one_line(weights, tmp_path, capsys):
    for name in ("mmaudio_small_16k.pth", "best_netG.pt"):
        (tmp_path / name).symlink_to(weights / name)
    (tmp_path / "v1-16.pth").write_bytes((weights / "v1-16.pth").read_bytes()[:5000])
    model = common.load_model("mmaudio:small_16k", weights=tmp_path)
    assert "v1-16.pth" in one_line(capsys, model.codec)
