"""The Frieren adapter against the real upstream code, with small random networks in its shape.

Run:  UPSTREAM_DIR=<folder of the clones> python -m pytest tests/test_frieren.py
Upstream's own model class, sampler method and generation script run here. Lightning is stood in for by a bare
module. torchdyn's ODE solver is the real one where torchdyn is installed; otherwise only its Euler loop is
stood in for, step for step.
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import yaml
from upstream_files import (
    TINY_DIT,
    TINY_VAE,
    TINY_VOCODER,
    EulerOnly,
    frieren_model,
    frieren_modules,
    frieren_root,
    inference_config,
    save_lightning,
    write_cavp,
    write_frieren,
)

import common
from common import Frieren, SkipClip, flow_error, interpolate, load_model, sample

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif("UPSTREAM_DIR" not in os.environ, reason="needs UPSTREAM_DIR, the folder of the clones"),
]
ROOT = Path(__file__).resolve().parents[1]
# Written out by hand: 1000 k / 25 for k = 0 ... 24, with upstream's three float32 truncations.
UPSTREAM_25 = [0, 40, 80, 120, 160, 199, 240, 280, 320, 359, 399, 440, 480, 520, 560, 600, 640, 680, 720, 760, 800]
UPSTREAM_25 += [840, 880, 920, 960]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Upstream's small model, its Lightning-style checkpoint, a vocoder beside it, and three clips' CAVP features."""
    root = tmp_path_factory.mktemp("frieren")
    theirs = write_frieren(root)
    write_cavp(root / "cavp", [f"-clip{index:06d}_00001{index}" for index in range(3)])
    cavp = sorted((root / "cavp").iterdir())
    return types.SimpleNamespace(root=root, theirs=theirs, checkpoint=root / "v2a/noreflow/last.ckpt", cavp=cavp)


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    if "full_size" not in request.node.name:
        monkeypatch.setattr(Frieren, "dit_config", TINY_DIT)
        monkeypatch.setattr(Frieren, "vae_config", TINY_VAE)


@pytest.fixture
def model(world):
    return load_model("frieren", weights=world.root)


def dit_of(model):
    return model.model["diffusion_model"]


def features(model, world, clips=2):
    rows = [model.encode({"id": file.stem, "cavp": str(file)}) for file in world.cavp[:clips]]
    return {"cavp": torch.stack([row["cavp"] for row in rows])}


def stopped(capsys, call, *args):
    """The one line of a user error, exit code 2."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def times_fed(dit):
    """The integers that a DiT is called with, one per call; every row of a call must have the same."""
    fed = []

    def note(_, args, kwargs):
        t = args[1] if len(args) > 1 else kwargs["t"]
        assert t.dtype == torch.int64 and (t == t[0]).all()
        fed.append(t[0].item())

    return fed, dit.register_forward_pre_hook(note, with_kwargs=True)


# --- imports ---


def test_only_four_upstream_modules_are_imported_and_generic_names_do_not_stay(world):
    script = (
        "import sys, types; import common; before = set(sys.modules); path = list(sys.path)\n"
        "sys.modules['cfm'] = mine = types.ModuleType('cfm')\n"
        "classes = common.frieren_code(); assert classes is common.frieren_code()\n"
        "assert sys.modules['cfm'] is mine and sys.path == path\n"
        "unwanted = {'vocoder', 'pytorch_lightning', 'torchdyn', 'mmcv', 'omegaconf'}\n"
        "assert not {m.split('.')[0] for m in sys.modules} & unwanted\n"
        "assert [m for m in sys.modules if m.split('.')[0] == 'cfm'] == ['cfm']\n"
        "print(sorted(m for m in sys.modules if m.startswith('frieren_v2a') and 'diffusion.' in m))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "the training classes, which need Lightning and torchdyn, are not touched"


def test_network_compiles_in_one_graph_after_the_names_are_gone(model, world):
    a_t, t = torch.randn(2, 256, 20), torch.tensor([0.3, 0.7])
    eager = model(a_t, t, features(model, world))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a_t, t, features(model, world)), eager)
    torch._dynamo.reset()


# --- the flow ---


def test_velocity_is_minus_upstreams_and_its_error_is_upstreams_loss(model, world):
    theirs, cavp = world.theirs, features(model, world)
    a_0, eps = torch.randn(2, 256, 20), torch.randn(2, 256, 20)
    for k in (0, 1, 200, 359, 400, 999):
        with torch.no_grad():
            steps = torch.full((2,), k)
            conditions = theirs.get_learned_conditioning(cavp["cavp"])
            _, logged = theirs.p_losses(a_0.mT, conditions, steps, noise=eps.mT)
            t = 1 - steps / 1000
            a_t, v = interpolate(a_0, eps, t)
            u = model(a_t, t, cavp)
            torch.testing.assert_close(u, -theirs.apply_model(a_t.mT, steps, conditions).mT, rtol=0, atol=1e-6)
            assert flow_error(v, u).mean().item() == pytest.approx(logged["val/loss_simple"], rel=1e-5)
            assert flow_error(v, -u).mean().item() != pytest.approx(logged["val/loss_simple"], rel=1e-3)


@pytest.mark.parametrize("solver", ["stand-in", "torchdyn"])
def test_25_steps_with_guidance_equal_upstreams_sampler(model, world, monkeypatch, solver):
    if solver == "torchdyn":
        pytest.importorskip("torchdyn", reason="torchdyn is not installed (it is not needed to use Frieren)")
    theirs = frieren_model(solver == "torchdyn")
    theirs.load_state_dict(world.theirs.state_dict())
    cavp = features(model, world)
    fed_theirs, hook = times_fed(theirs.model.diffusion_model)
    torch.manual_seed(5)
    last, states = theirs.sample_param_cfg(
        theirs.get_learned_conditioning(cavp["cavp"]), cfg_scale=4.5, batch_size=2, solver="euler", timesteps=26
    )
    hook.remove()
    monkeypatch.setattr(common, "initial_noise", lambda *_: states[0].mT)
    fed, hook = times_fed(dit_of(model))
    ours = sample(model, cavp, seeds=[0, 1])
    hook.remove()
    assert fed == fed_theirs == UPSTREAM_25
    assert len(states) == 26 and (last - states[0]).square().mean() > 0.1
    torch.testing.assert_close(ours.mT, last, rtol=1e-5, atol=1e-5)


def test_network_output_depends_on_each_of_those_times(model, world):
    a_t, cavp = torch.randn(1, 256, 20), features(model, world, 1)
    u = [model(a_t, torch.tensor([1 - k / 1000]), cavp) for k in (199, 200)]
    assert (u[0] - u[1]).abs().max() > 1e-5, "a sampler test could not see a wrong integer"


def test_every_time_of_training_feeds_its_own_integer(model, world):
    fed = []
    hook = dit_of(model).t_embedder.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    dit_of(model).blocks, blocks = nn.ModuleList(), dit_of(model).blocks  # only the times matter here
    k = torch.arange(1000)
    context = {"context": torch.zeros(1000, 32, 768)}
    with torch.no_grad():
        model.predict(torch.zeros(1000, 256, 20), 1 - k / 1000, context)
        model.predict(torch.zeros(1000, 256, 20), 1 - k.double() / 1000, context)
    hook.remove()
    dit_of(model).blocks = blocks
    assert torch.equal(fed[0], k) and torch.equal(fed[1], k)


def test_snap_t_cuts_to_the_thousandth_that_has_begun(model):
    def k_of(t):
        return ((1 - model.snap_t(t)) * 1000).round().long()

    assert k_of(torch.tensor([1.0, 0.9995, 0.9991, 0.998, 0.5, 0.0005, 0.0])).tolist() == [0, 0, 0, 2, 500, 999, 999]
    t = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    share = k_of(t).bincount(minlength=1000)
    assert len(share) == 1000 and share.min() > 100 and share.max() < 310, "uniform over all thousand integers"
    assert (t <= model.snap_t(t) + 1e-5).all() and (model.snap_t(t) - t < 1.06e-3).all(), "earlier, by at most one"
    k = torch.arange(1000)
    k = k[~torch.isin(k, torch.tensor([200, 360, 400]))]
    assert torch.equal(k_of(1 - k / 1000), k), "a snapped time stays, but for upstream's three"
    assert k_of(torch.linspace(1, 0, 26)[:-1]).tolist() == UPSTREAM_25
    assert model.snap_t(torch.tensor(0.3)).dtype == torch.float32 and model.snap_t(torch.tensor(0.3)).shape == ()


def test_unconditional_is_the_embedder_of_zero_features_and_learns(model, world):
    theirs = world.theirs
    conditions = model.project(features(model, world))
    null = model.null_conditions(conditions)["context"]
    assert torch.equal(null, theirs.get_learned_conditioning(theirs.zero_embed).expand(2, -1, -1))
    assert null.abs().max() > 0, "not zeros: the embedder's bias"
    null.sum().backward()
    assert model.cond_stage_model.embedder[0].bias.grad.abs().min() > 0
    with torch.no_grad():
        model.cond_stage_model.embedder[0].bias += 1
    torch.testing.assert_close(model.null_conditions(conditions)["context"], null + 1)


# --- training ---


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_trainable_parameter_gets_a_gradient(model, world, guidance, checkpointed):
    reference = model.reference()
    if checkpointed:
        model.checkpoint_blocks()
    a_t, t, cavp = torch.randn(2, 256, 20), torch.tensor([0.2, 0.8]), features(model, world)
    model.train()
    u = model(a_t, t, cavp, guidance)
    u.square().mean().backward()
    assert model.trainable_parameters() == list(model.parameters())
    used = len(a_t[0]) + 1  # positions: 256 latents and the token of t
    for name, p in model.named_parameters():
        grad = p.grad[:used] if name.endswith("pos_emb.weight") else p.grad
        assert grad is not None and grad.abs().max() > 0 and grad.isfinite().all(), name
    twin = copy.deepcopy(reference).requires_grad_(True)
    twin(a_t, t, cavp, guidance).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_reference_keeps_its_own_network_and_embedder_and_shares_the_codec(model, world):
    reference, cavp = model.reference(), features(model, world)
    a_t, t = torch.randn(2, 256, 20), torch.tensor([0.2, 0.8])
    with torch.no_grad():
        before = reference(a_t, t, cavp, 4.5)
        for p in model.parameters():
            p += 0.01
        assert torch.equal(reference(a_t, t, cavp, 4.5), before)
        assert not torch.equal(model(a_t, t, cavp, 4.5), before)
        model.decode(a_t)
    assert model.reference().codec is model.codec and model.codec.cache_info().currsize == 1
    assert {name.split(".")[0] for name in model.state_dict()} == {"model", "cond_stage_model"}


# --- CAVP features ---


def test_cavp_files_are_read_by_stem_or_name_and_cut_to_32_frames(model, world, tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32)
    np.savez(tmp_path / "a.b_000010.npz", feat=rows.astype(np.float16))
    np.save(tmp_path / "c.npy", rows)
    for name, expected in (("a.b_000010", rows.astype(np.float16)), ("c", rows), ("c.npy", rows)):
        cavp = model.encode({"id": name, "cavp": str(tmp_path / name)})["cavp"]
        assert cavp.shape == (32, 512) and cavp.dtype == torch.float32 and cavp.device.type == "cpu"
        assert np.array_equal(cavp.numpy(), expected[:32].astype(np.float32))


def test_clips_without_usable_cavp_features_are_skipped_with_the_reason(model, tmp_path, capsys):
    good = np.ones((40, 512), np.float32)
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
            model.encode({"id": name, "cavp": str(tmp_path / name)})
    assert "--cavp" in stopped(capsys, model.encode, {"id": "x"})


# --- checkpoints ---


def test_lightning_checkpoint_loads_safely_and_completely(model, world):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(world.checkpoint, weights_only=True)
    theirs = world.theirs.state_dict()
    assert len(theirs) == 12 + sum(len(part.state_dict()) for part in (model, model.codec(model.device)[0]))
    for part in (model, nn.ModuleDict({"first_stage_model": model.codec(model.device)[0]})):
        assert all(torch.equal(value, theirs[name]) for name, value in part.state_dict().items())


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_checkpoint_with_foreign_code_is_refused_in_one_line(world, tmp_path, capsys):
    file, mark, state = tmp_path / "evil.ckpt", tmp_path / "owned", world.theirs.state_dict()
    torch.save({"state_dict": state, "hyper_parameters": Malicious(mark)}, file)
    assert str(file) in stopped(capsys, load_model, "frieren", file, "cpu", world.root) and not mark.exists()
    save_lightning(file, state, hyper_parameters=Malicious(mark))
    assert str(file) in stopped(capsys, load_model, "frieren", file, "cpu", world.root) and not mark.exists()


def test_wrong_prefix_missing_part_and_wrong_shape_are_named(world, tmp_path, capsys):
    state, file = world.theirs.state_dict(), tmp_path / "other.ckpt"
    dit = "model.diffusion_model."
    without = {part: {n: v for n, v in state.items() if not n.startswith(part)} for part in ("first", "cond")}
    cases = [
        ({name.replace(dit, "net.dit."): value for name, value in state.items()}, [dit, "net.dit", "Missing"]),
        (without["first"], ["first_stage_model.", "Missing"]),
        (without["cond"], ["cond_stage_model.", "Missing"]),
        (state | {dit + "adapter.weight": torch.zeros(2)}, [dit, "adapter.weight", "Unexpected"]),
        (state | {dit + "final_layer.conv1d.bias": torch.zeros(21)}, ["size mismatch", "final_layer.conv1d.bias"]),
    ]
    for wrong, words in cases:
        torch.save({"state_dict": wrong}, file)
        line = stopped(capsys, load_model, "frieren", file, "cpu", world.root)
        assert str(file) in line and all(word in line for word in words), line
    torch.save(state, file)
    assert "state_dict" in stopped(capsys, load_model, "frieren", file, "cpu", world.root)


def test_reflowed_and_distilled_checkpoints_are_refused_where_a_path_tells(world, tmp_path, capsys):
    state = world.theirs.state_dict()
    by_record = tmp_path / "given" / "last.ckpt"
    by_record.parent.mkdir()
    for kind in ("reflow", "distill"):
        by_name = tmp_path / kind / "last.ckpt"
        by_name.parent.mkdir()
        torch.save({"state_dict": state}, by_name)
        save_lightning(by_record, state, dirpath=f"/y/logs/2024_v2a_cfm_{kind}_vcfg_mix_train_load_2card/checkpoints")
        for file in (by_name, by_record):
            assert "without reflow" in stopped(capsys, load_model, "frieren", file, "cpu", world.root)
    torch.save({"state_dict": state}, by_record)  # nothing tells: the tensors alone cannot
    load_model("frieren", by_record)
    for name in ("noreflow", "Frieren (no reflow)", "no_reflow-25"):
        by_record.rename(by_record.with_name(f"{name}.ckpt"))
        by_record = by_record.with_name(f"{name}.ckpt")
        load_model("frieren", by_record)


def test_variant_and_missing_files_are_one_line(world, tmp_path, capsys):
    assert "frieren:large" in stopped(capsys, load_model, "frieren:large", None, "cpu", world.root)
    line = stopped(capsys, load_model, "frieren", None, "cpu", tmp_path)
    assert "v2a/noreflow/last.ckpt: missing" in line and "Frieren-V2A" in line
    model = load_model("frieren", world.checkpoint, "cpu", tmp_path)
    assert "bigvnat/args.yml: missing" in stopped(capsys, model.decode, torch.zeros(1, 256, 20))


def test_policy_round_trip_and_refusal_of_another_models_policy(model, world, tmp_path, capsys):
    base = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    model.save_policy(tmp_path / "policy.pt")
    torch.load(tmp_path / "policy.pt", weights_only=True)  # plain tensors and numbers
    other = load_model("frieren", weights=world.root)
    assert all(torch.equal(value, base[name]) for name, value in other.state_dict().items())
    other.load_policy(tmp_path / "policy.pt")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert other.policy_state()["global_step"] == 1234
    torch.save({"net.weight": torch.zeros(3)}, tmp_path / "mmaudio.pt")
    assert "mmaudio.pt" in stopped(capsys, other.load_policy, tmp_path / "mmaudio.pt")


def test_upstreams_generation_script_loads_the_policy_and_makes_our_mels(model, world, tmp_path, monkeypatch, capsys):
    """script/generate_mel_cfm_cfg_scale.py as it is, from its loader to its .npy files; CUDA alone is read as CPU."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    model.save_policy(tmp_path / "policy.pt")
    (tmp_path / "infer.yaml").write_text(yaml.safe_dump(inference_config()))
    noise = []

    class NotingEuler(EulerOnly):
        def __call__(self, x, times):
            noise.append(x)
            return super().__call__(x, times)

    class OnCPU:
        device = staticmethod(lambda name: torch.device("cpu"))

        def __getattr__(self, name):
            return getattr(torch, name)

    with frieren_modules():
        monkeypatch.setattr(sys.modules["torchdyn.core"], "NeuralODE", NotingEuler)
        monkeypatch.chdir(frieren_root() / "script")
        file = frieren_root() / "script/generate_mel_cfm_cfg_scale.py"
        spec = importlib.util.spec_from_file_location("generate", file)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        config = script.OmegaConf.load(tmp_path / "infer.yaml")
        theirs = script.load_model_from_config(config, tmp_path / "policy.pt", verbose=True)
        printed = capsys.readouterr().out
        assert "Global Step: 1234" in printed and "missing" not in printed and "unexpected" not in printed
        policy = torch.load(tmp_path / "policy.pt", weights_only=True)["state_dict"]
        loaded, base = theirs.state_dict(), world.theirs.state_dict()
        assert loaded.keys() == policy.keys() == base.keys()
        assert all(torch.equal(loaded[name], policy[name]) for name in loaded)
        changed = {name for name in loaded if not torch.equal(loaded[name], base[name])}
        assert changed == {name for name in loaded if name.startswith(("model.diffusion_model.", "cond_stage_model."))}

        script.torch = OnCPU()
        script.seed_everything = lambda seed: torch.manual_seed(seed)
        script.generate_mel(
            str(tmp_path / "infer.yaml"), str(tmp_path / "policy.pt"), str(world.root / "cavp"), "0", str(tmp_path),
            26, "euler", 4.5, 2,
        )  # fmt: skip
    for x, file in zip(noise, world.cavp, strict=True):
        cavp = {"cavp": model.encode({"id": file.stem, "cavp": str(file)})["cavp"][None]}
        monkeypatch.setattr(common, "initial_noise", functools.partial(lambda x, *_: x.mT, x))
        vae, _ = model.codec(model.device)
        with torch.no_grad():
            mel = vae.decode(sample(model, cavp, seeds=[0, 1]).mT / 0.18215)
        for row in range(2):
            written = np.load(tmp_path / f"CFG4.5_euler_26/Y{file.stem}_{row}.npy")
            assert written.shape == (80, 512)
            np.testing.assert_allclose(mel[row].numpy(), written, rtol=1e-4, atol=1e-4)


# --- audio ---


def test_decode_equals_upstreams_vae_and_vocoder(model, world):
    latents = torch.randn(3, 256, 20)
    waves = model.decode(latents)
    assert waves.shape == (3, 131072) and waves.dtype == torch.float32 and model.sample_rate_hz == 16000
    with frieren_modules():
        models = importlib.import_module("vocoder.bigvgan.models")
        vocoder = models.BigVGAN(types.SimpleNamespace(**TINY_VOCODER)).eval()
    vocoder.load_state_dict(torch.load(world.root / "bigvnat/best_netG.pt", weights_only=True)["generator"])
    with torch.no_grad():
        expected = vocoder(world.theirs.decode_first_stage(latents.mT)).squeeze()
    torch.testing.assert_close(waves, expected, rtol=1e-4, atol=2e-5)  # other batch splits round otherwise: 9e-6 seen
    assert waves.std() > 0 and not waves.requires_grad


def test_full_size_network_makes_8_192_seconds_from_32_frames(tmp_path):
    """The published sizes once, one forward of the DiT instead of fifty. BigVGAN's args.yml is not in upstream's
    repository; this is the usual 112M shape with a product of strides of 256."""
    sizes, weights = dict(TINY_VOCODER, upsample_initial_channel=1536), tmp_path / "bigvnat"
    sizes |= dict(resblock_kernel_sizes=[3, 7, 11], resblock_dilation_sizes=[[1, 3, 5]] * 3)
    weights.mkdir()
    (weights / "args.yml").write_text(yaml.safe_dump(sizes))
    dit, embedder, autoencoder, bigvgan = common.frieren_code()

    def thin(prefix, module):
        """Full shapes, but every output channel shares one row, so that the file stays small."""
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        rows = {name: torch.randn(s[1:]) / max(1, s[1:].numel()) ** 0.5 for name, s in shapes.items()}
        return {prefix + name: row.expand(shapes[name]) for name, row in rows.items()}

    with torch.device("meta"):
        parts = {"model.diffusion_model.": dit(**Frieren.dit_config), "cond_stage_model.": embedder(512, 768)}
        vocoder = bigvgan(argparse.Namespace(**sizes))
        parts["first_stage_model."] = autoencoder(20, Frieren.vae_config, {"target": "torch.nn.Identity"})
    state = {name: value for prefix, part in parts.items() for name, value in thin(prefix, part).items()}
    assert len(state) == 327, "339 with the twelve buffers"
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    torch.save({"generator": thin("", vocoder)}, weights / "best_netG.pt")

    model = load_model("frieren", tmp_path / "last.ckpt", weights=tmp_path)
    assert sum(p.numel() for p in dit_of(model).parameters()) == 158_882_708
    assert sum(p.numel() for p in model.cond_stage_model.parameters()) == 393_984
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 512)))
    cavp = model.encode({"id": "x", "cavp": str(tmp_path / "x")})
    assert cavp["cavp"].shape == (32, 512) and model.latent_shape == (256, 20)
    latents = sample(model, {"cavp": cavp["cavp"][None]}, seeds=[3], steps=1, guidance=1.0)
    assert latents.shape == (1, 256, 20)
    waves = model.decode(latents)
    assert waves.shape == (1, 131072) and waves.shape[1] / model.sample_rate_hz == 8.192 and model.clip_s == 8.0
