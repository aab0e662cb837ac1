"""What fits a card: adapters instead of weights, and what is said where it does not fit."""

import copy
import shutil
import signal
from unittest.mock import Mock

import peft
import pytest
import torch
from conftest import call, read, stage, torchrun
from test_backbones import through_adapters
from test_pipeline import interrupt_after, largest_difference, weights, without_times
from upstream_files import mmaudio_modules, random_state

import common
from common import ahead, files, rows, training

LORA = ("--lora", 4, "--lr", 1e-3, "--steps", 8)


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory):
    """The finished run with a policy trained through adapters, too."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("lora") / "run")
    call("05", run, "--out", "lora", *LORA)
    return run


def an_input(model, run):
    shards = training.Shards(run, common.read_samples(run), model)
    clips = sorted(shards.place_of_clip)[:3]
    a_t = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return a_t, torch.tensor([0.2, 0.5, 0.9]), shards.features(clips)


@torch.no_grad()
def test_the_merged_policy_is_the_base_plus_its_adapters_and_the_reference_the_base(tuned):
    base, policy = common.load_base_model(tuned), common.load_base_model(tuned)
    model, state = copy.deepcopy(base), files.load_pt(tuned / "lora/checkpoint.pt")["model"]
    training.add_lora(model, 4, seed=0, bf16=False)
    reference = training.lora_reference(model)
    given = an_input(base, tuned)
    assert torch.equal(model(*given), base(*given))
    assert all("lora_" in name for name in state)
    model.load_state_dict(model.state_dict() | state)
    assert torch.equal(reference(*given), base(*given))
    assert [p.shape for p in model.trainable_parameters()] == [
        value.shape for value in state.values()
    ]
    policy.load_policy(tuned / "lora/policy.pt")
    moved = (model(*given) - base(*given)).abs().max()
    assert (policy(*given) - model(*given)).abs().max() < 1e-4 * moved and moved > 1e-2
    ours, theirs = (
        files.load_pt(tuned / "lora/policy.pt"),
        files.load_pt(tuned / "00_base.pt")["net"],
    )
    assert ours.keys() == theirs.keys() and torch.equal(ours["place"], theirs["place"])


def test_training_adapters_starts_at_log2_learns_and_resumes_exactly(tuned, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, stage("05"), "train_step", 6)
        call("05", tuned, "--out", "stopped", "--save-every", 3, *LORA)
    assert files.load_pt(tuned / "stopped/checkpoint.pt")["step"] == 3
    call("05", tuned, "--out", "stopped", *LORA)
    assert largest_difference(weights(tuned, "stopped"), weights(tuned, "lora")) == 0
    whole, stopped = ((tuned / out / "log.jsonl").read_bytes() for out in ("lora", "stopped"))
    assert without_times("log.jsonl", whole) == without_times("log.jsonl", stopped)
    losses = [row["loss"] for row in read(tuned / "lora/log.jsonl")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6) and losses[-1] != losses[0]


def test_two_ranks_train_the_adapters_of_one(tuned):
    torchrun("05", tuned, "--out", "two", *LORA)
    one, two, base = (
        weights(tuned, "lora"),
        weights(tuned, "two"),
        files.load_pt(tuned / "00_base.pt")["net"],
    )
    apart, moved = (
        sum((a[key] - b[key]).square().sum().item() for key in a)
        for a, b in ((one, two), (one, base))
    )
    assert apart**0.5 < 0.01 * moved**0.5
    logs = [[row["loss"] for row in read(tuned / out / "log.jsonl")] for out in ("lora", "two")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


def test_ddpo_trains_adapters_from_a_ratio_of_1(tuned):
    call("06", tuned, "--out", "ddpo", "--lora", 4, "--steps", 2)
    log = read(tuned / "ddpo/log.jsonl")
    assert (
        log[0]["ratio"] == pytest.approx(1, abs=1e-5)
        and log[0]["clipped"] == 0
        and log[0]["grad_norm"] > 0
    )
    assert (
        largest_difference(weights(tuned, "ddpo"), files.load_pt(tuned / "00_base.pt")["net"]) > 0
    )


def test_adapters_and_full_training_never_go_on_from_each_other(tuned, refused):
    assert "lora=4, now 0; use another --out" in refused("05", tuned, "--out", "lora", *LORA[2:])
    assert "lora=0, now 4; use another --out" in refused("05", tuned, "--lora", 4)
    for source, out, flags in (("lora", "05_flow_dpo", ()), ("05_flow_dpo", "lora", LORA)):
        here = tuned / out / "checkpoint.pt"
        kept = here.read_bytes()
        shutil.copy(tuned / source / "checkpoint.pt", here)
        assert f"{out}/checkpoint.pt: of another training" in refused(
            "05", tuned, *flags, "--out", out
        )
        state = files.load_pt(here)
        made = rows.read_json(tuned / out / "settings.json", rows.Record)
        files.save_pt(
            here, state | {"settings": files.digest_of(made.settings, made.inputs), "step": 1}
        )
        assert f"{out}/checkpoint.pt: is not of this model" in refused(
            "05", tuned, *flags, "--out", out
        )
        here.write_bytes(kept)


def frozen_when_made(patch):
    inject = peft.inject_adapter_in_model

    def freezing(config, model):
        inject(config, model)
        model.requires_grad_(False)

    patch.setattr(peft, "inject_adapter_in_model", freezing)


def frozen_when_switched_on(patch):
    switch = peft.tuners.lora.LoraLayer.enable_adapters

    def freezing(layer, enabled):
        switch(layer, enabled)
        layer.requires_grad_(False)

    patch.setattr(peft.tuners.lora.LoraLayer, "enable_adapters", freezing)


def without_effect(patch):
    inject = peft.inject_adapter_in_model

    def powerless(config, model):
        inject(config, model)
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.scaling["default"] = 0.0

    patch.setattr(peft, "inject_adapter_in_model", powerless)


@pytest.mark.parametrize("number, shim", [
    ("05", frozen_when_made), ("06", frozen_when_made), ("05", frozen_when_switched_on),
    ("05", without_effect), ("06", without_effect),
])  # fmt: skip
def test_adapters_that_a_peft_leaves_untrained_are_said_in_one_line(
    number, shim, tuned, refused, monkeypatch
):
    shim(monkeypatch)
    monkeypatch.setattr(peft, "__version__", "9.9.9")
    out = f"untrained_{number}_{shim.__name__}"
    line = refused(number, tuned, "--out", out, "--lora", 4, "--steps", 2)
    assert "--lora: the adapters are frozen, or do not move" in line
    assert "peft 9.9.9 is installed" in line and "pip install -r requirements.txt" in line
    assert not (tuned / out / "policy.pt").exists()


@pytest.mark.upstream
def test_of_real_size_the_merged_policy_is_base_plus_adapters_and_upstream_loads_it(tmp_path):
    networks, t = mmaudio_modules().networks, torch.tensor([0.5])
    net = networks.get_my_mmaudio("small_16k").eval()
    torch.save(random_state(net, 0), tmp_path / "mmaudio_small_16k.pth")
    model = common.load_model("mmaudio:small_16k", weights=tmp_path)
    features = {name: torch.randn(1, *shape) for name, shape in model.feature_shapes.items()}
    a_t = torch.randn(1, *model.latent_shape)
    before, after, reference = through_adapters(
        model, (a_t, t, features), tmp_path / "policy.pt", rank=16
    )
    assert torch.equal(reference, before)
    policy = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert {k: v.shape for k, v in policy.items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    net.load_weights(policy)
    with torch.no_grad():
        theirs = -net.predict_flow(a_t, 1 - t, net.preprocess_conditions(*features.values()))
    error, moved = ((x - after).square().mean().sqrt().item() for x in (theirs, before))
    print(
        f"merged against base and adapters: {error:.2e}, adapters against base: {moved:.2e} (root "
        "mean square)"
    )
    assert error < 1e-4 * moved


# Too little memory
# ---------------------------------------------------------------------------------------------

GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB"
)


@pytest.mark.parametrize("number, error, flags, parts", [
    ("05", GPU, (), ("CUDA out of memory", "lower --micro-batch or give --gradient-checkpointing or give --lora 16")),
    ("06", GPU, ("--micro-batch", 1, "--gradient-checkpointing"), ("than the GPU has; give --lora 16",)),
    ("05", GPU, ("--micro-batch", 1, "--gradient-checkpointing", "--lora", 8), ("nothing to change",)),
    ("01", GPU, (), ("lower --batch-clips",)), ("07", GPU, (), ("lower --batch-clips",)),
])  # fmt: skip
def test_a_lack_of_memory_is_one_line_that_says_what_to_change(
    number, error, flags, parts, finished, refused, monkeypatch
):
    monkeypatch.setattr(stage(number), "main", Mock(side_effect=error))
    line = refused(number, finished, *flags)
    assert all(part in line for part in parts), line


def read_by_killed(args):
    list(ahead.read_ahead(lambda item: signal.raise_signal(signal.SIGKILL), [0], 1))


def heard_by_killed(args):
    ahead.in_processes(signal.raise_signal, [(signal.SIGKILL,)], 1)


@pytest.mark.parametrize("number, killed, said", [
    ("01", read_by_killed, "a worker process ended unexpectedly (exit code -9)"),
    ("03", heard_by_killed, "process in the process pool was terminated"),
])  # fmt: skip
def test_a_worker_that_is_killed_is_one_line(number, killed, said, finished, refused, monkeypatch):
    monkeypatch.setattr(ahead, "pool_of", ahead.pool_of.__wrapped__)  # a broken one is not kept
    monkeypatch.setattr(stage(number), "main", killed)
    line = refused(number, finished)
    assert said in line and "lower --workers" in line, line


def test_ddpo_warns_when_rounding_alone_moves_the_ratios(run, monkeypatch, capfd):
    rollout = stage("06").rollout

    def rounded(*args):
        states, log_probs, a_0 = rollout(*args)
        return states, log_probs + 0.01, a_0

    monkeypatch.setattr(stage("06"), "rollout", rounded)
    call("06", run, "--out", "rounded", "--steps", 1)
    assert read(run / "rounded/log.jsonl")[0]["clipped"] == 1
    assert "warning: rounding alone clips 100% of the ratios" in "".join(capfd.readouterr())
