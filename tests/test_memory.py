"""What fits a card: adapters instead of weights, the account of memory, and what is said where it does not fit."""

import copy
import shutil
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import peft
import pytest
import torch
from account import account
from conftest import call, read, stage, torchrun
from test_backbones import through_adapters
from test_pipeline import interrupt_after, largest_difference, weights, without_times
from upstream_files import mmaudio_modules, random_state

import adapters.frieren
import adapters.mmaudio
import common
import plumbing.ahead

LORA = ("--lora", 4, "--lr", 1e-3, "--steps", 8)


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory):
    """The finished run with a policy trained through adapters, too."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("lora") / "run")
    call("05", run, "--out", "lora", *LORA)
    return run


def an_input(model, run):
    shards = common.Shards(run, common.read_samples(run), model)
    clips = sorted({clip for clip, _ in shards.place})[:3]
    a_t = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return a_t, torch.tensor([0.2, 0.5, 0.9]), shards.features(clips)


@torch.no_grad()
def test_the_merged_policy_is_the_base_plus_its_adapters_and_the_reference_the_base(tuned):
    base, policy = common.load_base_model(tuned), common.load_base_model(tuned)
    model, state = copy.deepcopy(base), common.load_pt(tuned / "lora/checkpoint.pt")["model"]
    model.add_lora(4, seed=0)
    given, reference = an_input(base, tuned), model.reference()
    assert torch.equal(model(*given), base(*given))
    assert all("lora_" in name for name in state)
    model.load_state_dict(model.state_dict() | state)
    assert torch.equal(reference(*given), base(*given))
    assert [p.shape for p in model.trainable_parameters()] == [value.shape for value in state.values()]
    policy.load_policy(tuned / "lora/policy.pt")
    moved = (model(*given) - base(*given)).abs().max()
    assert (policy(*given) - model(*given)).abs().max() < 1e-4 * moved and moved > 1e-2
    ours, theirs = common.load_pt(tuned / "lora/policy.pt"), common.load_pt(tuned / "00_base.pt")["net"]
    assert ours.keys() == theirs.keys() and torch.equal(ours["place"], theirs["place"])


def test_training_adapters_starts_at_log2_learns_and_resumes_exactly(tuned, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, stage("05"), "train_step", 6)
        call("05", tuned, "--out", "stopped", "--save-every", 3, *LORA)
    assert common.load_pt(tuned / "stopped/checkpoint.pt")["step"] == 3
    call("05", tuned, "--out", "stopped", *LORA)
    assert largest_difference(weights(tuned, "stopped"), weights(tuned, "lora")) == 0
    whole, stopped = ((tuned / out / "log.jsonl").read_bytes() for out in ("lora", "stopped"))
    assert without_times("log.jsonl", whole) == without_times("log.jsonl", stopped)
    losses = [row["loss"] for row in read(tuned / "lora/log.jsonl")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6) and losses[-1] != losses[0]


def test_two_ranks_train_the_adapters_of_one(tuned):
    torchrun("05", tuned, "--out", "two", *LORA)
    one, two, base = weights(tuned, "lora"), weights(tuned, "two"), common.load_pt(tuned / "00_base.pt")["net"]
    apart, moved = (sum((a[key] - b[key]).square().sum().item() for key in a) for a, b in ((one, two), (one, base)))
    assert apart**0.5 < 0.01 * moved**0.5
    logs = [[row["loss"] for row in read(tuned / out / "log.jsonl")] for out in ("lora", "two")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


def test_ddpo_trains_adapters_from_a_ratio_of_1(tuned):
    call("06", tuned, "--out", "ddpo", "--lora", 4, "--steps", 2)
    log = read(tuned / "ddpo/log.jsonl")
    assert log[0]["ratio"] == pytest.approx(1, abs=1e-5) and log[0]["clipped"] == 0 and log[0]["grad_norm"] > 0
    assert largest_difference(weights(tuned, "ddpo"), common.load_pt(tuned / "00_base.pt")["net"]) > 0


def test_adapters_and_full_training_never_go_on_from_each_other(tuned, refused):
    assert "lora=4, now 0; use another --out" in refused("05", tuned, "--out", "lora", *LORA[2:])
    assert "lora=0, now 4; use another --out" in refused("05", tuned, "--lora", 4)
    for source, out, flags in (("lora", "05_flow_dpo", ()), ("05_flow_dpo", "lora", LORA)):
        here = tuned / out / "checkpoint.pt"
        kept = here.read_bytes()
        shutil.copy(tuned / source / "checkpoint.pt", here)
        assert f"{out}/checkpoint.pt: of another training" in refused("05", tuned, *flags, "--out", out)
        state = common.load_pt(here)
        common.save_pt(here, state | {"settings": common.made_with(tuned / out), "step": 1})
        assert f"{out}/checkpoint.pt: is not of this model" in refused("05", tuned, *flags, "--out", out)
        here.write_bytes(kept)
    assert "--reference-precision" in refused("05", tuned, "--out", "x", *LORA, "--reference-precision", "fp32")


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
        for _, layer in model.lora_layers():
            layer.scaling["default"] = 0.0

    patch.setattr(peft, "inject_adapter_in_model", powerless)


@pytest.mark.parametrize("number, shim", [
    ("05", frozen_when_made), ("06", frozen_when_made), ("05", frozen_when_switched_on),
    ("05", without_effect), ("06", without_effect),
])  # fmt: skip
def test_adapters_that_a_peft_leaves_untrained_are_said_in_one_line(number, shim, tuned, refused, monkeypatch):
    shim(monkeypatch)
    monkeypatch.setattr(peft, "__version__", "9.9.9")
    out = f"untrained_{number}_{shim.__name__}"
    line = refused(number, tuned, "--out", out, "--lora", 4, "--steps", 2)
    assert "--lora: the adapters are frozen, or do not move" in line
    assert "peft 9.9.9 is installed" in line and "pip install peft==0.17.1" in line
    assert not (tuned / out / "policy.pt").exists()


@pytest.mark.upstream
def test_of_real_size_the_merged_policy_is_base_plus_adapters_and_upstream_loads_it(tmp_path):
    networks, t = mmaudio_modules().networks, torch.tensor([0.5])
    net = networks.get_my_mmaudio("small_16k").eval()
    torch.save(random_state(net, 0), tmp_path / "mmaudio_small_16k.pth")
    model = common.load_model("mmaudio:small_16k", weights=tmp_path)
    features = {name: torch.randn(1, *shape) for name, shape in model.feature_shapes.items()}
    a_t = torch.randn(1, *model.latent_shape)
    before, after, reference = through_adapters(model, (a_t, t, features), tmp_path / "policy.pt", rank=16)
    assert torch.equal(reference, before)
    policy = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert {k: v.shape for k, v in policy.items()} == {k: v.shape for k, v in net.state_dict().items()}
    net.load_weights(policy)
    with torch.no_grad():
        theirs = -net.predict_flow(a_t, 1 - t, net.preprocess_conditions(*features.values()))
    error, moved = ((x - after).square().mean().sqrt().item() for x in (theirs, before))
    print(f"merged against base and adapters: {error:.2e}, adapters against base: {moved:.2e} (root mean square)")
    assert error < 1e-4 * moved


# The account ---------------------------------------------------------------------------------------------------


class Card(common.FlowModel):
    """A quarter of 2**30 weights that nobody allocates: 1 GiB in float32."""

    memory = common.Memory(row=0.5, recomputed=0.1, sampled=0.05, codec=2.0, encoders=3.0)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2**28, device="meta"))


@pytest.mark.parametrize("flags, needs, total", [
    # On the GPU: weights 1, copies .5, CUDA 1.5; trained: 3 of gradients and AdamW, 8 rows of .5.
    (dict(trained=8, sampled=40), {}, 10.0),
    (dict(trained=8, sampled=40), dict(gradient_checkpointing=True), 8.0),  # 40 rows of .05 are more than 8 of .1
    (dict(sampled=40, frozen=("codec", "encoders"), others=1.0), {}, 11.0),
    (dict(trained=8), dict(precision="fp32"), 13.5),  # activations twice, no copies
])  # fmt: skip
def test_the_expected_peak_is_the_sum_of_its_parts(flags, needs, total, monkeypatch, capsys):
    args = SimpleNamespace(**dict(precision="auto", gradient_checkpointing=False, lora=0, micro_batch=4) | needs)
    properties = SimpleNamespace(total_memory=total * 2**30 - 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    common.say_memory(Card(), args, "cuda:0", **flags)
    first, warning = capsys.readouterr().out.splitlines()
    assert first.startswith(f"expected peak: {total:.1f} GiB")
    assert warning.startswith("warning: more than the") and "lower --micro-batch or give" in warning
    properties.total_memory += 2
    common.say_memory(Card(), args, "cuda:0", **flags)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.upstream
@pytest.mark.parametrize("name", ["mmaudio:small_16k", "frieren"])
def test_the_tables_in_adapters_are_what_fake_tensors_count(name):
    _, _, variant = name.partition(":")
    counted = account(name)
    table = adapters.mmaudio.ROWS[variant] if variant else adapters.frieren.Frieren.memory[:3]
    assert counted == pytest.approx(table, rel=0.1)


def test_a_reference_costs_its_own_bytes_and_a_model_without_account_says_nothing(capsys):
    args, model = SimpleNamespace(precision="fp32", lora=0), Card()
    common.say_memory(model, args, "cpu", trained=1, reference=copy.deepcopy(model).to(torch.bfloat16))
    assert capsys.readouterr().out.startswith("expected peak: 5.5 GiB")  # 1, .5, 3, one row of twice .5
    for dtype, total in ((torch.float32, 5.0), (torch.bfloat16, 2.5)):  # 1, .5 of copies, 3, .5; .5, 1.5, .5
        model, args.precision = Card().to(dtype), "bf16"
        common.say_memory(model, args, "cpu", trained=1)
        assert capsys.readouterr().out.startswith(f"expected peak: {total} GiB")
    model.memory = None
    common.say_memory(model, args, "cpu")
    assert capsys.readouterr().out == ""


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB")
WORKER = RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. ")


@pytest.mark.parametrize("number, error, flags, parts", [
    ("05", GPU, (), ("CUDA out of memory", "lower --micro-batch or give --gradient-checkpointing or give --lora 16")),
    ("06", GPU, ("--micro-batch", 1, "--gradient-checkpointing"), ("than the GPU has; give --lora 16",)),
    ("05", GPU, ("--micro-batch", 1, "--gradient-checkpointing", "--lora", 8), ("nothing to change",)),
    ("01", GPU, (), ("lower --batch-clips",)), ("07", GPU, (), ("lower --batch-clips",)),
    ("01", WORKER, (), ("worker (pid 71) is killed", "lower --workers")),
])  # fmt: skip
def test_a_lack_of_memory_is_one_line_that_says_what_to_change(
    number, error, flags, parts, finished, refused, monkeypatch
):
    monkeypatch.setattr(stage(number), "main", Mock(side_effect=error))
    line = refused(number, finished, *flags)
    assert all(part in line for part in parts), line


def test_a_process_for_pesq_that_is_killed_is_one_line(finished, refused, monkeypatch):
    monkeypatch.setattr(plumbing.ahead, "POOLS", {})
    killed = lambda args: common.in_processes(signal.raise_signal, [(signal.SIGKILL,)], 1)  # noqa: E731
    monkeypatch.setattr(stage("03"), "main", killed)
    line = refused("03", finished)
    assert "process in the process pool was terminated" in line and "lower --workers" in line, line


def test_ddpo_warns_when_rounding_alone_moves_the_ratios(run, monkeypatch, capfd):
    rollout = stage("06").rollout

    def rounded(*args):
        states, log_probs, a_0 = rollout(*args)
        return states, log_probs + 0.01, a_0

    monkeypatch.setattr(stage("06"), "rollout", rounded)
    call("06", run, "--out", "rounded", "--steps", 1)
    assert read(run / "rounded/log.jsonl")[0]["clipped"] == 1
    assert "warning: rounding alone clips 100% of the ratios" in "".join(capfd.readouterr())
