"""What a GPU makes of this code, in one call of at most 8 minutes: each of its tricks beside what
was there before, with networks of real size and random weights, built on the device.

Run:   UPSTREAM_DIR=<clones> python docs/gpu_check.py            # one GPU of 80 GB
       UPSTREAM_DIR=<clones> python docs/gpu_check.py --tiny     # does this script work? Anywhere

A line of a markdown table for each measurement, written at once, so that a time-out keeps the rest;
a part that fails is a line too. The first line names the card: bandwidth differs between them.
    peaks         of a large matrix product in bf16 and of a copy
    convolution   one of MMAudio's, forward and backward: upstream's, channels last, compiled
    05            a step of 1, 8, 32 pairs: upstream's convolutions, channels last, compiled. Median
                  seconds, launched kernels, share of the time in which none runs, GiB, seconds of
                  the first step (which compiles); whether step 0 is log 2 to the bit
    sampling      20 audios of 4 clips in the same ways, and the error against float32
    encoders      CLIP (64 pictures), Synchformer (a video) in TF32, in bf16, compiled, and errors
    codec         8 audios: upstream's activation in TF32, in bf16; by slices, compiled; noise
    06            a rollout and an update: |ratio - 1|, share that is clipped
    01            clips from frames to wavs: seconds of each, share of the time without a kernel
"""

import argparse
import functools
import gc
import importlib
import math
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
import upstream_files  # noqa: E402
from conftest import a_clip, stage  # noqa: E402

import common  # noqa: E402
from adapters import mmaudio  # noqa: E402
from common import ranks, rows, speed, training  # noqa: E402

PAIR_TFLOP, AUDIO_TFLOP, CODEC_TFLOP = 4.166, 26.05, 2.66  # docs/cost.md, of large_44k
CLIP_TFLOP, SYNC_TFLOP = 64.4, 9.5  # of a clip
WAYS = ("upstream's convolutions", "channels last", "compiled")


# Measuring
# --------------------------------------------------------------------------------------------------


def row(*cells):
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call):
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def profiled(call):
    """The kernels of a call, and the seconds for which they run."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize()
    ran = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(ran), sum(e.self_device_time_total for e in ran) / 1e6


def error(found, exact):
    return f"error {((found - exact).float().norm() / exact.float().norm()).item():.2g}"


def free():
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Networks
# --------------------------------------------------------------------------------------------------


class Bench:
    """The networks of one size on one device."""

    def __init__(self, device, tiny, folder, patch):
        self.device, self.tiny, self.folder, self.patch = device, tiny, folder, patch
        self.code = upstream_files.mmaudio_modules()
        self.variant = "small_16k" if tiny else "large_44k"
        (folder / "random.pth").write_bytes(b"random")
        patch.setattr(mmaudio.MMAudio, "load_policy", lambda self, path: None)
        patch.setattr(mmaudio.MMAudio, "features_utils", self.features_utils)
        patch.setattr(mmaudio, "weight_file", lambda weights, name: Path(name))
        hub = importlib.import_module("huggingface_hub")
        patch.setattr(hub, "try_to_load_from_cache", lambda *_: "")
        if tiny:
            patch.setattr(self.code.networks, "get_my_mmaudio", upstream_files.tiny_network)
            upstream_files.shrink_motionformer(self.code.motionformer, patch)

    def model(self, way=WAYS[1]):
        """Our model; upstream's convolutions are a CPU's."""
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch, torch.device(self.device):
            patch.setattr(torch.cuda, "is_available", lambda: way != WAYS[0])
            name = f"mmaudio:{self.variant}"
            model = common.load_model(name, self.folder / "random.pth", self.device)
            for p in model.parameters():  # a fresh network's zeros would hide every difference
                if not (p.data.any() and p.data.isfinite().all()):
                    p.data.copy_(0.02 * torch.randn(p.shape))
            model.net.latent_mean.data.zero_()
            model.net.latent_std.data.fill_(1.0)
        return model

    def features_utils(self, enable_conditions, **_):
        """Upstream's FeaturesUtils without its files."""
        code = self.code.features_utils
        utils = code.FeaturesUtils.__new__(code.FeaturesUtils)
        torch.nn.Module.__init__(utils)
        with torch.device(self.device):
            if enable_conditions:
                sizes = upstream_files.CLIP if self.tiny else upstream_files.CLIP_REAL
                utils.clip_model = code.patch_clip(code.open_clip.CLIP(**sizes))
                utils.clip_preprocess = code.Normalize([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
                utils.synchformer = self.code.synchformer.Synchformer()
                utils.tokenizer = code.open_clip.get_tokenizer("ViT-H-14-378-quickgelu")
            else:
                utils.tod = self.autoencoder()
        return utils.to(self.device).eval().requires_grad_(False)

    def autoencoder(self):
        tod = self.code.autoencoder.AutoEncoderModule
        tod = tod.__new__(tod)
        torch.nn.Module.__init__(tod)
        if self.tiny:
            tod.vae = self.code.vae.VAE(data_dim=80, embed_dim=20, hidden_dim=16)
            sizes = upstream_files.BIGVGAN_16K
        else:
            tod.vae = self.code.vae.get_my_vae("44k")
            sizes = upstream_files.BIGVGAN_44K_REAL
        tod.vae.remove_weight_norm()
        tod.vocoder = self.code.bigvgan_v2.BigVGAN(self.code.bigvgan_v2.AttrDict(sizes))
        tod.vocoder.remove_weight_norm()
        return tod

    def measure(self, what, call, tflop=None, more=lambda: "", repeats=3):
        """A row: the median after a first call, TFLOP/s, kernels, idle share, GiB, the first."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        first = seconds_of(call)
        repeats = 1 if self.tiny else repeats
        took = statistics.median(seconds_of(call) for _ in range(repeats))
        rate, kernels, idle, memory = "", "", "", ""
        if torch.cuda.is_available():
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            rate = f"{tflop / took:.0f}" if tflop else ""
            kernels, busy = profiled(call)
            idle = f"{max(0, 1 - busy / took):.0%}"
        row(what, f"{took:.4g}", rate, kernels, idle, memory, f"{first:.1f}", more())

    def features(self, model, count):
        shapes = model.feature_shapes
        return {
            name: torch.randn(count, *shape, device=self.device) for name, shape in shapes.items()
        }


# Parts
# --------------------------------------------------------------------------------------------------


def check_peaks(bench):
    size = 256 if bench.tiny else 8192
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    bench.measure("matrix product, bf16", lambda: a @ a, 2 * size**3 / 1e12, repeats=20)
    long = torch.empty(2**20 if bench.tiny else 2**30, device=bench.device)
    other = torch.empty_like(long)
    took = min(seconds_of(lambda: other.copy_(long)) for _ in range(5))
    row(f"copy, {8 * long.numel() / took / 1e12:.2f} TB/s", f"{took:.4g}", *[""] * 6)


def check_convolution(bench):
    for way in WAYS:
        convolve(bench, way)
        free()


def convolve(bench, way):
    low_level = importlib.import_module("mmaudio.model.low_level")
    width, count = (64, 2) if bench.tiny else (896, 16)
    net = low_level.ConvMLP(width, 4 * width).to(bench.device)
    if way != WAYS[0]:
        speed.keep_channels_last(net, low_level.ChannelLastConv1d)
    if way == WAYS[2]:
        speed.compile_blocks([net])
    x = torch.randn(count, 345, width, device=bench.device, requires_grad=True)

    def step():
        with training.autocast(bench.device):
            net(x).float().square().mean().backward()

    bench.measure(f"ConvMLP, {way}", step, repeats=10)


def check_05(bench):
    eight, one, many = (2, 1, 3) if bench.tiny else (8, 1, 32)
    todo = [(eight, way) for way in WAYS] + [(one, WAYS[2]), (many, WAYS[2])]
    for pairs, way in todo:
        train(bench, pairs, way)
        free()


def train(bench, pairs, way):
    dpo = stage("05")
    steps = 10**9
    flags = ["--run-dir", str(bench.folder), "--global-batch", str(pairs), "--steps", str(steps)]
    args = dpo.parse_args(flags)
    args.compile = way == WAYS[2]
    model = bench.model(way)
    reference = training.frozen_copy(model, training.in_bf16(bench.device, "auto"))
    if args.compile:
        training.compile_both(model, reference)
    optimizer = training.adamw(model, args.lr)
    shards = types.SimpleNamespace(
        device=bench.device,
        features=lambda clips: bench.features(model, len(clips)),
        latents=lambda audios: torch.randn(len(audios), *model.latent_shape, device=bench.device),
    )
    pair = rows.SplitPair("a", winner=0, loser=1, score_c=1.0, source="auto")
    here = ranks.Ranks(0, 1, bench.device)
    batches = dpo.read_batches(0, [[pair], []], [steps, 0], shards, model, here, args)
    log = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        sums = dpo.train_step(model, reference, next(batches), args)
        norm = training.clip_gradient(model)
        sums, _ = training.sum_step_over_ranks(len(log), sums, norm, bench.folder)
        optimizer.step()
        log.append(dpo.means_of(sums))

    def start():
        return (
            f"step 0: loss - log 2 = {log[0]['loss'] - math.log(2):.1g}, gap {log[0]['gap_w']:.1g}"
        )

    bench.measure(f"05, {pairs} pairs, {way}", step, pairs * PAIR_TFLOP, start, repeats=5)


def check_sampling(bench):
    exact = sample(bench, "float32")
    free()
    for way in WAYS:
        sample(bench, way, exact)
        free()


def sample(bench, way, exact=None):
    clips, each, steps = (1, 2, 2) if bench.tiny else (4, 5, 25)
    model = bench.model(way)
    torch.manual_seed(0)
    features = bench.features(model, clips)
    made = []

    def call():
        made[:] = [common.sample(model, features, range(clips * each), steps, 4.5)]

    if exact is None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "in_bf16", lambda *_: False)
            call()
        return made[0]
    training.only_sample(model, way == WAYS[2])
    what = f"sampling {clips * each} audios, {way}"
    bench.measure(what, call, clips * each * AUDIO_TFLOP, lambda: error(made[0], exact))
    return made[0]


def check_encoders(bench):
    encoders = bench.model().encoders()
    pictures = torch.rand(1, 2 if bench.tiny else 64, 3, 384, 384, device=bench.device)
    encode(bench, "CLIP", encoders.encode_video_with_clip, pictures, CLIP_TFLOP)
    blocks = encoders.clip_model.visual.transformer.resblocks
    speed.compile_blocks(blocks, (encoders, "encode_video_with_clip"))
    encode(bench, "CLIP, compiled", encoders.encode_video_with_clip, pictures, CLIP_TFLOP)
    if not bench.tiny:  # minutes on a CPU
        video = torch.rand(1, 200, 3, 224, 224, device=bench.device)
        seen = functools.partial(encoders.encode_video_with_sync, batch_size=8)
        encode(bench, "Synchformer", seen, video, SYNC_TFLOP)


def encode(bench, what, function, x, tflop):
    exact = function(x)
    made = []

    def call():
        with torch.autocast(torch.device(bench.device).type, torch.bfloat16, enabled=in_bf16):
            made[:] = [function(x)]

    for in_bf16 in (False, True):
        way = "bf16" if in_bf16 else "TF32"
        bench.measure(f"{what}, {way}", call, tflop, lambda: error(made[0], exact))


def check_codec(bench):
    exact = decode(bench, "upstream's, TF32")
    for way in ("upstream's, bf16", "slices, bf16", "slices, bf16, compiled"):
        decode(bench, way, exact)
        free()


def decode(bench, way, exact=None):
    count = 1 if bench.tiny else 8
    model = bench.model()
    model.compiled = way.endswith("compiled")
    latents = torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    made = []

    def call():
        made[:] = [model.decode(latents)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "in_bf16", lambda *_: "bf16" in way)
        if way.startswith("upstream"):
            patch.setattr(speed, "slice_activations", lambda vocoder: [])
        what = f"codec of {count} audios, {way}"
        bench.measure(
            what, call, count * CODEC_TFLOP, lambda: "" if exact is None else error(made[0], exact)
        )
    return made[0]


def check_06(bench):
    for way in WAYS[1:]:
        reinforce(bench, way)
        free()


def reinforce(bench, way):
    ddpo = stage("06")
    prompts, group = (1, 2) if bench.tiny else (2, 8)
    flags = ["--prompts", str(prompts), "--group-size", str(group)]
    args = ddpo.parse_args(["--run-dir", str(bench.folder), *flags])
    args.sampling_steps, args.updates = (3, 1) if bench.tiny else (10, 8)
    args.compile = way == WAYS[2]
    model = bench.model(way)
    if args.compile:
        speed.compile_models(model)
    features = bench.features(model, prompts)
    seeds = list(range(prompts * group))
    batches = []
    found = {}

    def rollout():
        batch, _ = ddpo.rollout(model, features, seeds, 4.5, args)
        batch.advantages = torch.randn(len(seeds), device=bench.device)
        batches[:] = [batch]

    def update():
        model.zero_grad(set_to_none=True)
        sums = ddpo.train_step(model, batches, 0, 4.5, args)
        # Sums are divided by the round's audios, of which all are here.
        found.update({name: value.item() / len(seeds) for name, value in sums.items()})

    def ratio():
        return f"ratio - 1 = {found['ratio'] - 1:.1g}, clipped {found['clipped']:.0%}"

    bench.measure(f"06, rollout of {len(seeds)} audios, {way}", rollout)
    bench.measure(f"06, gradient of an update, {way}", update, None, ratio)


def check_01(bench):
    for way in WAYS[1:]:
        generate(bench, way)
        free()


def generate(bench, way):
    sampling, clips = stage("01"), 2 if bench.tiny else 8
    run = bench.folder / f"01_{way.split()[0]}"
    (run / "01_samples").mkdir(parents=True)
    flags = ["--run-dir", str(run), "--model", f"mmaudio:{bench.variant}", "--workers", "0"]
    args = sampling.parse_args(flags)
    if bench.tiny:
        args.num_samples, args.sampling_steps = 2, 2
    model = bench.model(way)
    training.only_sample(model, way == WAYS[2])
    drawn = (2, 16) if bench.tiny else (64, 200)
    shapes = (drawn[0], 3, 384, 384), (drawn[1], 3, 224, 224)
    frames = [torch.randint(256, shape, dtype=torch.uint8) for shape in shapes]
    model.read = lambda clip: frames
    features = bench.features(model, 1)
    if bench.tiny:  # of fewer pictures than the network wants
        plain = {name: value[0].cpu() for name, value in features.items()}
        model.encode = lambda clip, tensors: plain
    named = [a_clip(id=f"clip{i}", caption="a dog barks") for i in range(clips)]
    here = ranks.Ranks(0, 1, bench.device)

    def call():
        sampling.generate(run, model, {"00000": named}, ["00000"], here, args)

    bench.measure(f"01, {clips} clips of {args.num_samples} audios, {way}", call, repeats=1)


PARTS = {
    "peaks": check_peaks,
    "convolution": check_convolution,
    "05": check_05,
    "sampling": check_sampling,
    "encoders": check_encoders,
    "codec": check_codec,
    "06": check_06,
    "01": check_01,
}


def main(args):
    device = ranks.setup().device
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    row("what", "s", "TFLOP/s", "kernels", "idle", "GiB", "first, s", "")
    row(*8 * ["---"])
    failed = []
    with (
        tempfile.TemporaryDirectory(prefix="gpu_check") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        if args.tiny:  # no C++ compiler's minutes
            eager = functools.partial(torch.compile, backend="aot_eager")
            patch.setattr(torch, "compile", eager)
        bench = Bench(device, args.tiny, Path(folder), patch)
        for name in args.only or PARTS:
            try:
                PARTS[name](bench)
            except Exception as wrong:  # the other parts are worth having
                reason = " ".join(str(wrong).split())[:200]
                row(f"{name} failed: {type(wrong).__name__}: {reason}", *[""] * 7)
                failed.append(name)
                free()
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny networks, a few minutes on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    sys.exit(bool(main(parser.parse_args())))
