"""What fits a card: adapters instead of weights, and what is said where it does not fit."""

import copy
import shutil
import signal
from unittest.mock import Mock

import peft
import pytest
import torch
from conftest import (
    base_weights,
    call,
    distance,
    interrupted,
    largest_difference,
    log_of,
    read,
    said,
    shards_of,
    stage,
    torchrun,
    weights,
)
from test_backbones import through_adapters
from upstream_files import mmaudio_modules, random_state

import common
from common import ahead, files, rows, training

LORA = ("--lora", 4, "--lr", 1e-3, "--steps", 8, "--ema", 0.2)


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory):
    """The finished run with a policy trained through adapters, too."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("lora") / "run")
    call("05", run, "--out", "lora", *LORA)
    return run


@torch.no_grad()
def test_the_merged_policy_is_the_base_plus_its_adapters_and_the_reference_the_base(tuned):
    base, policy = common.load_base_model(tuned), common.load_base_model(tuned)
    shards = shards_of(tuned)
    a_t = torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    features = shards.features(sorted(shards.shard_of_clip)[:3])
    given = a_t, torch.tensor([0.2, 0.5, 0.9]), features
    model, state = copy.deepcopy(base), files.load_pt(tuned / "lora/checkpoint.pt")["average"]
    training.add_lora(model, 4, seed=0, bf16=False)
    reference = training.lora_reference(model)
    assert torch.equal(model(*given), base(*given))
    assert all("lora_" in name for name in state)
    model.load_state_dict(model.state_dict() | state)
    assert torch.equal(reference(*given), base(*given))
    shapes = [value.shape for value in state.values()]
    assert [p.shape for p in model.trainable_parameters()] == shapes
    policy.load_policy(tuned / "lora/policy.pt")
    moved = (model(*given) - base(*given)).abs().max()
    assert (policy(*given) - model(*given)).abs().max() < 1e-4 * moved and moved > 1e-2
    ours, theirs = weights(tuned, "lora"), base_weights(tuned)
    assert ours.keys() == theirs.keys() and torch.equal(ours["place"], theirs["place"])


def test_training_adapters_starts_at_log2_learns_and_resumes_exactly(tuned):
    with interrupted(stage("05"), "train_step", 6):
        call("05", tuned, "--out", "stopped", "--save-every", 3, *LORA)
    assert files.load_pt(tuned / "stopped/checkpoint.pt")["step"] == 3
    call("05", tuned, "--out", "stopped", *LORA)
    assert largest_difference(weights(tuned, "stopped"), weights(tuned, "lora")) == 0
    assert log_of(tuned, "lora") == log_of(tuned, "stopped")
    losses = [row["loss"] for row in read(tuned / "lora/log.jsonl")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6) and losses[-1] != losses[0]


def test_two_ranks_train_the_adapters_of_one(tuned):
    torchrun("05", tuned, "--out", "two", *LORA)
    one, two, base = weights(tuned, "lora"), weights(tuned, "two"), base_weights(tuned)
    assert distance(one, two) < 0.01 * distance(one, base)
    logs = [[row["loss"] for row in read(tuned / out / "log.jsonl")] for out in ("lora", "two")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


def test_ddpo_trains_adapters_from_a_ratio_of_1(tuned):
    call("06", tuned, "--out", "ddpo", "--lora", 4, "--steps", 2)
    first = read(tuned / "ddpo/log.jsonl")[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["clipped"] == 0 and first["grad_norm"] > 0
    assert largest_difference(weights(tuned, "ddpo"), base_weights(tuned)) > 0


def test_adapters_and_full_training_never_go_on_from_each_other(tuned, refused):
    said(refused("05", tuned, "--out", "lora", *LORA[2:]), "lora=4, now 0; use another --out")
    said(refused("05", tuned, "--lora", 4), "lora=0, now 4; use another --out")
    for source, out, flags in (("lora", "05_flow_dpo", ()), ("05_flow_dpo", "lora", LORA)):
        here = tuned / out / "checkpoint.pt"
        kept = here.read_bytes()
        shutil.copy(tuned / source / "checkpoint.pt", here)
        line = refused("05", tuned, *flags, "--out", out)
        assert f"{out}/checkpoint.pt: belongs to another training" in line
        made = rows.read_json(tuned / out / "settings.json", rows.Record)
        own = {"settings": files.digest_of(made.settings, made.inputs), "step": 1}
        files.save_pt(here, files.load_pt(here) | own)
        line = refused("05", tuned, *flags, "--out", out)
        assert f"{out}/checkpoint.pt: is not of this model" in line
        here.write_bytes(kept)


INJECT, SWITCH = peft.inject_adapter_in_model, peft.tuners.lora.LoraLayer.enable_adapters


def frozen_when_made(config, model):
    INJECT(config, model)
    model.requires_grad_(False)


def frozen_when_switched_on(layer, enabled):
    SWITCH(layer, enabled)
    layer.requires_grad_(False)


def without_effect(config, model):
    INJECT(config, model)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] = 0.0


@pytest.mark.parametrize("number, shim", [
    ("05", frozen_when_made), ("06", frozen_when_made), ("05", frozen_when_switched_on),
    ("05", without_effect), ("06", without_effect),
])  # fmt: skip
def test_adapters_that_a_peft_leaves_untrained_are_said_in_one_line(
    number, shim, tuned, refused, monkeypatch
):
    if shim is frozen_when_switched_on:
        monkeypatch.setattr(peft.tuners.lora.LoraLayer, "enable_adapters", shim)
    else:
        monkeypatch.setattr(peft, "inject_adapter_in_model", shim)
    monkeypatch.setattr(peft, "__version__", "9.9.9")
    out = f"untrained_{number}_{shim.__name__}"
    line = refused(number, tuned, "--out", out, "--lora", 4, "--steps", 2)
    said(line, "--lora: the adapters are frozen, or do not move")
    said(line, "peft 9.9.9 is installed", "pip install -r requirements.txt")
    assert not (tuned / out / "policy.pt").exists()


@pytest.mark.upstream
def test_of_real_size_the_merged_policy_is_base_plus_adapters_and_upstream_loads_it(tmp_path):
    networks, t = mmaudio_modules().networks, torch.tensor([0.5])
    net = networks.get_my_mmaudio("small_16k").eval()
    torch.save(random_state(net, 0), tmp_path / "mmaudio_small_16k.pth")
    model = common.load_model("mmaudio:small_16k", weights=tmp_path)
    features = {name: torch.randn(1, *shape) for name, shape in model.feature_shapes.items()}
    a_t = torch.randn(1, *model.latent_shape)
    policy = tmp_path / "policy.pt"
    before, after, reference = through_adapters(model, (a_t, t, features), policy, rank=16)
    assert torch.equal(reference, before)
    state = torch.load(policy, weights_only=True)
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == shapes
    net.load_weights(state)
    with torch.no_grad():
        theirs = -net.predict_flow(a_t, 1 - t, net.preprocess_conditions(*features.values()))
    error, moved = ((x - after).square().mean().sqrt().item() for x in (theirs, before))
    print(f"root mean squares: merged against adapters {error:.2e}, these against base {moved:.2e}")
    assert error < 1e-4 * moved


# Too little memory

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LEAST = ("--micro-batch", 1, "--gradient-checkpointing")
LOWER = "lower --micro-batch or give --gradient-checkpointing or give --lora 16"


@pytest.mark.parametrize("number, flags, parts", [
    ("05", (), ("CUDA out of memory", LOWER)),
    ("06", LEAST, ("than the GPU has; give --lora 16",)),
    ("05", (*LEAST, "--lora", 8), ("no flag of this command lowers that",)),
    ("01", (), ("lower --batch-clips",)),
    ("07", (), ("lower --batch-clips",)),
])  # fmt: skip
def test_a_lack_of_memory_is_one_line_that_says_what_to_change(
    number, flags, parts, finished, refused, monkeypatch
):
    monkeypatch.setattr(stage(number), "main", Mock(side_effect=GPU))
    said(refused(number, finished, *flags), *parts)


def read_by_killed(args):
    list(ahead.read_ahead(lambda item: signal.raise_signal(signal.SIGKILL), [0], 1))


def called_by_killed(args):
    ahead.in_processes(signal.raise_signal, [(signal.SIGKILL,)], 1)


@pytest.mark.parametrize("number, killed, part", [
    ("01", read_by_killed, "a worker process ended unexpectedly (exit code -9)"),
    ("03", called_by_killed, "process in the process pool was terminated"),
])  # fmt: skip
def test_a_worker_that_is_killed_is_one_line(number, killed, part, finished, refused, monkeypatch):
    monkeypatch.setattr(ahead, "pool_of", ahead.pool_of.__wrapped__)  # a broken one is not kept
    monkeypatch.setattr(stage(number), "main", killed)
    said(refused(number, finished), part, "lower --workers")


def test_ddpo_warns_when_rounding_alone_moves_the_ratios(run, monkeypatch, capfd):
    rollout = stage("06").rollout

    def rounded(*args):
        batch, a_0 = rollout(*args)
        batch.log_probs += 0.01
        return batch, a_0

    monkeypatch.setattr(stage("06"), "rollout", rounded)
    call("06", run, "--out", "rounded", "--steps", 1)
    assert read(run / "rounded/log.jsonl")[0]["clipped"] == 1
    assert "warning: rounding alone clips 100% of the ratios" in "".join(capfd.readouterr())
