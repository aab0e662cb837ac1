"""What comes with a GPU: two devices that must not be mixed, a host that should not wait, bf16. On
a pretended GPU, and where there is a real one also on that (marker `gpu`)."""

import contextlib
import gc
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import call, read, stage, utilisation
from pretended_gpu import pretended_gpu
from test_speed import Operations

import common
from adapters import mmaudio
from common import inputs

LOG2 = pytest.approx(math.log(2), abs=1e-3)
DEVICE = "cuda:0"
ONE_ROUND = ("--steps", 2, "--prompts", 1, "--group-size", 2)  # of stage 06


@pytest.fixture
def syncs():
    """A pretended GPU for as long as the test lasts, and where the host waited: {"file function
    line: why": times}."""
    with pretended_gpu() as counted:
        yield counted


def sampled(run, device, steps=8, compiled=False):
    """Latents of four clips by the toy model, on the CPU."""
    model, samples = common.load_base_model(run, device), inputs.read_samples(run)
    if compiled:
        model.compiles = True  # though it is small
        common.speed.compile_models(model)
    features = common.training.Shards(run, samples, model).features([*samples][:4])
    features = {name: value.to(device) for name, value in features.items()}
    return common.sample(model, features, range(4), steps, 4.5).cpu()


# A pretended GPU


def test_the_pretended_gpu_refuses_and_counts_what_cuda_would_and_leaves_nothing():
    before = [torch.cuda.is_available, torch.autocast.__init__, ThreadPoolExecutor.submit]
    cpu, generator = torch.arange(3.0), torch.Generator()
    with pretended_gpu() as syncs:
        gpu, net = torch.ones(3, device=DEVICE), torch.nn.Linear(3, 3).to(DEVICE)
        syncs.clear()
        for mixed in (
            lambda: gpu + cpu,
            lambda: gpu.add_(cpu),
            lambda: torch.stack([gpu, cpu]),
            lambda: torch.stack([gpu[0], cpu[0]]),
            lambda: cpu[gpu.long()],
            lambda: net(cpu),
            lambda: gpu.numpy(),
            lambda: torch.randn(3, generator=generator, device=DEVICE),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        result = net((gpu * cpu[1]).double().to(torch.float32))
        result.sum().backward()
        others = (result, net.weight.grad, torch.zeros_like(result))
        assert {other.device for other in others} == {gpu.device}
        cpu.pin_memory().to(gpu, non_blocking=True)
        assert not syncs
        cpu.to(gpu, non_blocking=True)
        assert syncs.total() == 1
        syncs.clear()
        with common.training.autocast(DEVICE), ThreadPoolExecutor(1) as pool:
            assert net(gpu).dtype == torch.bfloat16
            assert pool.submit(torch.ones, 3, device=DEVICE).result().device == gpu.device
        assert [x.item() for x in gpu] == gpu.tolist() == gpu.cpu().tolist()
        assert gpu.isfinite().all()
        gpu[gpu > 0] = cpu.to(DEVICE)
        assert sum(syncs.values()) == 8
        assert all("test_gpu.py test_the_pretended_gpu" in place for place in syncs)
    assert [torch.cuda.is_available, torch.autocast.__init__, ThreadPoolExecutor.submit] == before
    assert type(torch.zeros(3) + cpu) is torch.Tensor and not torch.cuda.is_available()


def test_the_stages_mix_no_devices_and_start_at_log2_and_ratio_1_in_bf16(fresh, syncs, monkeypatch):
    # AudioScore of four clips likes all audios alike
    monkeypatch.setattr(stage("06"), "MIN_SPREAD", 0.0)
    call("01", fresh, "--num-samples", 2, "--sampling-steps", 2, "--max-clips", 8)
    call("02", fresh, "--num-rated-clips", 4)
    call("03", fresh)
    call("04", fresh)
    call("05", fresh, "--steps", 2, "--beta", 600, "--gradient-checkpointing")
    call("06", fresh, *ONE_ROUND, "--steps", 4)
    call("07", fresh, "--split", "val", "--systems", "base", "flow_dpo")
    assert len(read(fresh / "07_results_val.jsonl")) > 10
    log = read(fresh / "05_flow_dpo/log.jsonl")
    assert log[0]["loss"] == LOG2 != log[1]["loss"] and log[0]["grad_norm"] > 0
    log = read(fresh / "06_ddpo/log.jsonl")
    ratios = [(row["ratio"], row["clipped"]) for row in log]
    assert ratios[::2] == [(pytest.approx(1, abs=1e-6), 0)] * 2 and ratios[1][0] != 1


def test_the_host_waits_for_no_step_of_the_sampler(finished, syncs):
    waits = []
    for steps in (2, 5):
        syncs.clear()
        sampled(finished, DEVICE, steps)
        waits.append(Counter(syncs))
    assert not waits[1] - waits[0]


OF_06 = (*ONE_ROUND, "--micro-batch", 2, "--sampling-steps", 3)


@pytest.mark.parametrize("number, flags, more", [
    ("05", ("--steps", 2, "--micro-batch", 4), ("--micro-batch", 1)),
    ("06", OF_06, ("--micro-batch", 1, "--sampling-steps", 5)),
])  # fmt: skip
def test_the_host_waits_for_no_micro_batch_and_no_step_of_a_rollout(
    number, flags, more, run, syncs
):
    waits = []
    for out in (flags, (*flags, *more)):
        syncs.clear()
        call(number, run, "--out", f"{number}_{len(out)}", *out)
        waits.append(Counter(syncs))
    assert not waits[1] - waits[0]
    assert not [place for place in waits[0] if " train_step " in place]


@pytest.mark.parametrize(
    "number, flags", [("05", ()), ("06", (*ONE_ROUND, "--updates", 4, "--sampling-steps", 5))]
)
def test_the_host_waits_once_in_a_step(number, flags, run, syncs):
    waits = []
    for steps in (2, 4):
        syncs.clear()
        call(number, run, "--out", f"{number}_{steps}", *flags, "--steps", steps)
        waits.append(Counter(syncs))
    more = waits[1] - waits[0]
    assert sum(more.values()) == 2 and all(" sum_step_over_ranks " in place for place in more)


# What a GPU would launch


@pytest.mark.upstream
def test_a_step_of_flow_dpo_at_the_papers_size_has_less_than_6_000_operations(
    tmp_path, monkeypatch
):
    """Eager, of tensors without values; views are not counted. 5,946 by upstream's convolutions,
    5,961 by those that keep channels last."""
    monkeypatch.setattr(mmaudio.MMAudio, "load_policy", lambda *_: None)
    monkeypatch.setattr(common.training, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "random.pth").write_bytes(b"random")
    with torch.device("meta"):
        model = mmaudio.MMAudio("large_44k", tmp_path / "random.pth", tmp_path)
        features = {}
        for name, shape in model.feature_shapes.items():
            features[name] = torch.empty(8, *shape)
        latents = torch.empty(3, 8, *model.latent_shape)
        batch = stage("05").Batch(0, latents[:2], features, torch.empty(8), latents[2])
    reference = common.training.frozen_copy(model, bf16=False)
    args = stage("05").parse_args([])
    with Operations() as step:
        stage("05").train_step(model, reference, batch, args)
    assert 5_000 < step.counts.total() < 6_000, step.counts.most_common(20)


# A real GPU


@pytest.fixture
def float32(monkeypatch):
    """Float32 on CUDA too, where sampling is in bf16 and stages allow TF32."""
    monkeypatch.setattr(common.training, "in_bf16", lambda device, precision: False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def relative_error(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--gradient-checkpointing",)])
def test_flow_dpo_starts_at_log2_in_bf16_on_cuda(run, flags):
    call("05", run, "--out", "cuda", "--beta", 600, "--steps", 4, *flags)
    log = read(run / "cuda/log.jsonl")
    assert log[0]["loss"] == LOG2 and log[0]["peak_gb"] > 0
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)


@pytest.mark.gpu
def test_ddpo_starts_every_round_at_ratio_1_in_bf16_on_cuda(run):
    call("06", run, *ONE_ROUND, "--out", "cuda", "--steps", 4)
    first = [(row["ratio"], row["clipped"]) for row in read(run / "cuda/log.jsonl")[::2]]
    assert first == [(pytest.approx(1, abs=1e-3), 0)] * 2


@pytest.mark.gpu
def test_cuda_samples_the_latents_of_the_cpu_in_float32(finished, float32):
    assert relative_error(sampled(finished, DEVICE), sampled(finished, "cpu")) < 1e-3


@pytest.mark.gpu
def test_compiled_sampling_on_cuda_makes_the_eager_latents_but_for_rounding(finished):
    """In bf16, where fused operations round less often. On a CPU in bf16: 0.7 % apart, each 1.2 %
    from float32."""
    compiled = sampled(finished, DEVICE, compiled=True)
    assert relative_error(compiled, sampled(finished, DEVICE)) < 0.05


PAIR_FLOP = 4.166e12  # docs/cost.md


@pytest.mark.gpu
@pytest.mark.upstream
@pytest.mark.parametrize("pairs", [1, 8])  # the paper's batch on 8 GPUs, and on one
def test_mmaudio_large_starts_at_log2_and_fits_40_gb_with_one_pair(
    pairs, tmp_path, monkeypatch, capsys
):
    """Random weights of the real size; prints seconds per step, peak memory and the share of the
    peak arithmetic."""
    (tmp_path / "random.pth").write_bytes(b"random")
    monkeypatch.setattr(mmaudio.MMAudio, "load_policy", lambda self, path: None)
    gc.collect()  # an earlier model, whose caches refer to it
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = common.load_model("mmaudio:large_44k", tmp_path / "random.pth", DEVICE)
    dpo, shapes = stage("05"), model.feature_shapes.items()
    flags = ["--run-dir", str(tmp_path), "--global-batch", str(pairs), "--steps", "7"]
    args = dpo.parse_args(flags)
    weights = model.trainable_parameters()
    for p in weights:  # zeros of a fresh network would hide every difference
        if not p.data.any():
            p.data.normal_(std=0.02)
    shards = SimpleNamespace(
        device=DEVICE,
        features=lambda clips: {
            name: torch.randn(len(clips), *shape, device=DEVICE) for name, shape in shapes
        },
        latents=lambda audios: torch.randn(len(audios), *model.latent_shape, device=DEVICE),
    )
    reference = common.training.frozen_copy(model, bf16=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, fused=True)
    pair = common.rows.SplitPair("a", winner=0, loser=1, score_c=1.0, source="auto")
    here = common.ranks.Ranks(0, 1, DEVICE)
    losses, seconds = [], []
    for batch in dpo.read_batches(0, [[pair], []], [7, 0], shards, model, here, args):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        sums = dpo.train_step(model, reference, batch, args)
        norm = common.training.clip_gradient(model)
        sums, _ = common.training.sum_step_over_ranks(0, sums, norm, tmp_path)
        optimizer.step()
        losses.append(dpo.means_of(sums)["loss"])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    second, peak = sorted(seconds[2:])[2], torch.cuda.max_memory_allocated() / 2**30
    name = torch.cuda.get_device_name()
    share = utilisation(pairs * PAIR_FLOP / second)
    with capsys.disabled():
        print(f"\n{name}, large_44k, {pairs} pairs: {second:.3f} s per step, {peak:.1f} GiB{share}")
    assert losses[0] == LOG2 and all(map(math.isfinite, losses)) and (pairs > 1 or peak < 40)
