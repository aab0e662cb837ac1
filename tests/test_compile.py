"""Compiled blocks: policy and reference go through one graph, so that training starts where it
should; what is recorded of it; and what happens where a graph cannot be compiled."""

import functools
import math

import pytest
import torch
from conftest import call, interrupted, read, stage, weights

import common
from adapters.toy import Toy
from common import inputs, speed, training

LOG_2 = math.log(2)
FIVE = ("--steps", 4, "--save-every", 2, "--compile")


@pytest.fixture
def graphs(monkeypatch):
    """Graphs as AOTAutograd makes them, run operation by operation: a C++ compiler would take
    minutes. Of the toy, which nobody would compile, though it is the same with a real backbone.
    Yields counts of them."""
    monkeypatch.setattr(Toy, "compiles", True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def given(model, finished):
    samples = inputs.read_samples(finished)
    features = training.Shards(finished, samples, model).features([*samples][:2])
    generator = torch.Generator().manual_seed(0)
    a_t = torch.randn(4, *model.latent_shape, generator=generator)
    return a_t, torch.tensor([0.2, 0.8, 0.2, 0.8]), features


def test_policy_and_reference_share_their_graphs_in_gradient_mode_alone(finished, graphs):
    model = common.load_base_model(finished)
    reference = training.frozen_copy(model, bf16=False)
    training.compile_both(model, reference)
    batch = given(model, finished)
    with torch.no_grad():
        u_ref = reference(*batch)
    counted = graphs["unique_graphs"]
    u_theta = model(*batch)
    assert counted == graphs["unique_graphs"] == 1  # of three blocks of one class
    assert torch.equal(u_ref, u_theta)
    u_theta.square().mean().backward()
    assert not any(p.grad is not None for p in reference.parameters())
    with torch.no_grad():
        model(*batch)
    assert graphs["unique_graphs"] == 2  # without gradients it is another graph


@pytest.mark.parametrize("more", [(), ("--precision", "bf16"), ("--gradient-checkpointing",)])
def test_compiled_flow_dpo_starts_at_log2_and_a_resumed_one_equals_an_unbroken_one(
    run, graphs, more
):
    call("05", run, "--out", "whole", *FIVE, *more)
    first = read(run / "whole/log.jsonl")[0]
    assert (first["gap_w"], first["gap_l"], first["accuracy"]) == (0.0, 0.0, 0.5)
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-7)
    with interrupted(stage("05"), "train_step", 3):
        call("05", run, "--out", "broken", *FIVE, *more)
    torch._dynamo.reset()  # another process
    call("05", run, "--out", "broken", *FIVE, *more)
    whole, broken = (weights(run, out) for out in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_compiled_ddpo_starts_every_round_at_ratio_1(run, graphs, monkeypatch):
    monkeypatch.setattr(stage("06"), "MIN_SPREAD", 0.0)  # AudioScore of few clips likes all alike
    flags = ("--steps", 4, "--updates", 2, "--prompts", 1, "--group-size", 2)
    call("06", run, "--out", "compiled", "--compile", *flags)
    log = read(run / "compiled/log.jsonl")
    assert [(row["ratio"], row["clipped"]) for row in log[::2]] == [(1.0, 0.0)] * 2
    assert log[1]["ratio"] != 1


def test_a_resume_with_another_compile_is_refused_by_a_line_that_names_the_flag(
    run, graphs, monkeypatch, refused
):
    call("05", run, "--out", "compiled", "--steps", 1, "--compile")
    line = refused("05", run, "--out", "compiled", "--steps", 1)
    assert "made with compile=True, now False; give --compile, or" in line
    call("05", run, "--out", "eager", "--steps", 1)
    line = refused("05", run, "--out", "eager", "--steps", 1, "--compile")
    assert "made with compile=False, now True; give --no-compile, or" in line


@pytest.mark.parametrize("number, flags", [("05", ()), ("06", ("--prompts", 1))])
def test_what_cannot_be_compiled_is_said_once_and_runs_eagerly(
    run, graphs, monkeypatch, capsys, number, flags
):
    def fails(graph, inputs):
        raise RuntimeError("no compiler here")

    call(number, run, "--out", "eager", "--steps", 2, *flags)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fails))
    capsys.readouterr()
    call(number, run, "--out", "tried", "--steps", 2, "--compile", *flags)
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be compiled" in line]
    assert len(said) == 1 and "--no-compile" in said[0] and "no compiler here" in said[0]
    eager, tried = (weights(run, out) for out in ("eager", "tried"))
    assert all(torch.equal(eager[name], tried[name]) for name in eager)


def test_a_training_of_before_there_was_compiling_goes_on_where_nothing_is_compiled(
    run, graphs, monkeypatch, refused
):
    with monkeypatch.context() as before:
        before.setattr(training, "MAY_CHANGE", (*training.MAY_CHANGE, "compile"))  # not recorded
        call("05", run, "--out", "old", "--steps", 1)
    line = refused("05", run, "--out", "old", "--steps", 1, "--compile")
    assert "made with compile=False, now True; give --no-compile, or" in line
    call("05", run, "--out", "old", "--steps", 1, "--no-compile")


@pytest.mark.parametrize("number", ["05", "06"])
def test_the_toy_is_never_compiled_and_no_model_with_lora_and_that_is_recorded(
    run, monkeypatch, number
):
    """So that what began where --compile is the default goes on where it is not."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    call(number, run, "--out", "toy", "--steps", 1, "--compile")
    call(number, run, "--out", "toy", "--steps", 1, "--no-compile")
    monkeypatch.setattr(Toy, "compiles", True)
    call(number, run, "--out", "lora", "--steps", 1, "--compile", "--lora", 4)
    call(number, run, "--out", "lora", "--steps", 1, "--no-compile", "--lora", 4)


def test_the_default_is_the_machines_and_adapters_stay_eager(monkeypatch):
    for number in ("01", "05", "06", "07"):
        assert stage(number).parse_args([]).compile is False  # no GPU
        assert stage(number).parse_args(["--compile"]).compile is True
    monkeypatch.setattr(speed, "can_compile", lambda: True)
    for number in ("01", "05", "06", "07"):
        assert stage(number).parse_args([]).compile is True
        assert stage(number).parse_args(["--no-compile"]).compile is False


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inductors_policy_and_reference_are_equal_to_the_bit(run, monkeypatch, precision):
    """By the real compiler, on the CPU. In bf16 the reference keeps its weights in bf16."""
    monkeypatch.setattr(Toy, "compiles", True)
    flags = ("--out", "compiled", *FIVE, "--precision", precision, "--global-batch", 4)
    with interrupted(stage("05"), "train_step", 3):
        call("05", run, *flags)
    call("05", run, *flags)
    first = read(run / "compiled/log.jsonl")[0]
    assert (first["gap_w"], first["gap_l"], first["accuracy"]) == (0.0, 0.0, 0.5)
    call("05", run, *flags, "--out", "whole")
    whole, broken = (weights(run, out) for out in ("whole", "compiled"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    torch._dynamo.reset()
