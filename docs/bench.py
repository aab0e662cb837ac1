"""What the code costs beside the least that it could cost, and beside upstream's own code: ratios,
each of one run.

Run:   python docs/bench.py                                           # about 4 minutes on 2 cores
       UPSTREAM_DIR=<clones> python docs/bench.py --clips VIDEOS      # every row but the next one's, 8 minutes
       UPSTREAM_DIR=<clones> python docs/bench.py --real              # and small_16k at its real size: 2 hours
       UPSTREAM_DIR=<clones> python docs/bench.py --count             # only counts the arithmetic of docs/cost.md

Random weights, on the CPU, no file of a real model. What is compared runs in turn, once to warm up; a row has medians,
the ratio of the seconds (below 1: ours is faster) and, in brackets, the quartiles of the ratios of neighbours. All but
the workers' and PESQ's rows are CPU seconds of one thread, which other work on the machine disturbs little.
    05        a step of stage 05 as its main makes it (batch, times and noise, features and latents from the shards,
              train_step, the log's row, clipping, AdamW) against a bare loop on tensors that lie ready: reference
              without gradient, policy, loss, backward, AdamW; the stage's own batch and micro-batch
    01        five audios of a clip by sample_shards, against MMAudio's generate() called five times, and once for
              five; what the encoders give is given to both (generate() would see the video five times)
    scorers   five audios of a clip in one call, against a call for each
    pesq      that of 20 audios of 8 s in two processes, against this one, by the clock
    metrics   FD, IS and KL of stage 07 against av-benchmark's functions on the same arrays: seconds, memory beyond
              the arrays, difference of the values
    workers   clips through read_ahead with MMAudio's `read`, into a GPU that is a sleep of GPU_S for each, by the
              clock; the share of the time in which it waited
Rows that need upstream's code are left out without UPSTREAM_DIR. The last lines are the table, in markdown.
"""

import argparse
import ctypes
import importlib
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import upstream_files  # noqa: E402
from conftest import a_clip, make_video, shell, stage, videos_of  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402
from adapters import mmaudio, scorers, toy  # noqa: E402
from common import inputs, ranks, rows, scoring, training  # noqa: E402

GPU_S = 1.65  # of one clip; an H100 takes 1.87 in stage 01 with large_44k, N = 5 (docs/cost.md)
TABLE = []


# Measuring
# --------------------------------------------------------------------------------------------------


def alternate(seconds, *calls, rounds=4):
    """CPU seconds of each call, [[...], ...]: in turn, for so long, so many rounds at least; the
    first is left out."""
    found, began = [], time.process_time()
    while len(found) < rounds or time.process_time() - began < seconds:
        found.append([])
        for call in calls:
            start = time.process_time()
            call()
            found[-1].append(time.process_time() - start)
    return [*zip(*found[1:])]


def ratio(ours, theirs):
    """Of the medians, and the quartiles of the neighbours'."""
    shares = [a / b for a, b in zip(ours, theirs)]
    low, _, high = quantiles(shares, n=4) if len(shares) > 1 else 3 * shares
    return f"{median(ours) / median(theirs):.3g} ({low:.3g} to {high:.3g})"


def row(*cells):
    TABLE.append(f"| {' | '.join(cells)} |")
    print(TABLE[-1], flush=True)


def compare(what, seconds, ours, theirs, **least):
    a, b = alternate(seconds, ours, theirs, **least)
    row(what, *(f"{median(x):.3g} s" for x in (a, b)), ratio(a, b))


# Stage 05
# --------------------------------------------------------------------------------------------------


def made_up_run(run, model, clips=40, n=2, defaults=None):
    """A run whose latents and features are noise. Returns its shards, and a pair of each clip."""
    run_json = rows.Run(
        model=model.name,
        checkpoint="upstream",
        checkpoint_digest=model.checkpoint_digest,
        video_root=".",
        clip_s=model.clip_s,
        defaults=defaults or {},
        latent_shape=model.latent_shape,
        sample_rate_hz=model.sample_rate_hz,
        sampler=rows.Sampler(steps=25, guidance=4.5),
        num_samples=n,
        seed=0,
        max_clips=clips,
        clips_digest="",
    )
    rows.write_json(run / "run.json", run_json)
    samples = {}
    pairs = []
    digests = []
    for i in range(clips):
        audios = []
        for k in range(n):
            usable = {"finite": True, "peak": 1.0, "clipped": 0.0, "digest": f"{i}_{k}"}
            audios.append(
                inputs.FoundSample(
                    clip=f"c{i}", k=k, seed=0, wav="", row=n * i + k, file="0", **usable
                )
            )
            digests.append(audios[-1].digest)
        samples[f"c{i}"] = audios
        pairs.append(rows.SplitPair(f"c{i}", winner=0, loser=1, score_c=1.0, source="auto"))
    features = {key: torch.randn(clips, *shape) for key, shape in model.feature_shapes.items()}
    latents = torch.randn(clips * n, *model.latent_shape)
    training.save_shard(run / "01_samples/0.pt", latents, digests, features, clips=samples)
    return training.Shards(run, samples, model), pairs


def bench_05(what, run, model, seconds, **more):
    """A step of stage 05 against the bare loop, on one network and one optimizer."""
    shards, pairs = made_up_run(run, model, **more)
    train, steps = stage("05"), 10**9
    args = train.parse_args(["--run-dir", str(run), "--steps", str(steps)])
    size, micro = args.global_batch, min(args.micro_batch, args.global_batch)
    reference, weights = training.frozen_copy(model, bf16=False), model.trainable_parameters()
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-6)

    here = ranks.Ranks(0, 1, "cpu")
    batches = train.read_batches(0, [pairs, []], [steps, 0], shards, model, here, args)

    def ours():
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        sums = train.train_step(model, reference, batch, args)
        norm = training.clip_gradient(model)
        sums, _ = training.sum_step_over_ranks(0, sums, norm, run)
        train.means_of(sums)
        training.take_step(optimizer, args.lr)

    ready = []
    for part in (pairs[i : i + micro] for i in range(0, size, micro)):
        v, t = torch.randn(2 * len(part), *model.latent_shape), torch.rand(len(part)).repeat(2)
        ready.append((torch.randn_like(v), t, shards.features([pair.clip for pair in part]), v))

    def bare():
        optimizer.zero_grad(set_to_none=True)
        for *given, v in ready:
            with torch.no_grad():
                ref_w, ref_l = (reference(*given) - v).square().mean(dim=(1, 2)).chunk(2)
            err_w, err_l = (model(*given) - v).square().mean(dim=(1, 2)).chunk(2)
            loss = -F.logsigmoid(-0.5 * args.beta * ((err_w - ref_w) - (err_l - ref_l)))
            (loss.sum() / size).backward()
        optimizer.step()

    compare(
        f"05, a step of {size} pairs, {micro} in a forward, {what} : bare loop", seconds, ours, bare
    )


# Stage 01
# --------------------------------------------------------------------------------------------------


def bench_01(what, run, model, seconds, five=5, **least):
    """sample_shards' audios of one clip against generate()'s; the encoders give both the same
    noise at once."""
    code, sampling = upstream_files.mmaudio_modules(), stage("01")
    args = sampling.parse_args(
        ["--run-dir", str(run), "--num-samples", str(five), "--model", model.name]
    )
    (run / "01_samples").mkdir(parents=True, exist_ok=True)
    generator = code.flow_matching.FlowMatching(0, "euler", args.sampling_steps)
    settings = dict(
        net=model.net,
        fm=generator,
        rng=torch.Generator().manual_seed(0),
        cfg_strength=args.guidance,
    )
    noise = {key: torch.randn(shape) for key, shape in model.feature_shapes.items()}
    utils = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    utils.decode, utils.vocode = model.codec().decode, model.codec().vocode
    for name, key in dict(video_with_clip="clip", video_with_sync="sync", text="text").items():
        setattr(utils, f"encode_{name}", lambda x, key=key, **_: noise[key].expand(len(x), -1, -1))

    def ours():
        clips = {"00000": [a_clip()]}
        sampling.sample_shards(run, model, clips, clips, iter([noise]), tqdm(disable=True), args)

    @torch.inference_mode()
    def theirs(count):
        video = torch.zeros(count, 1)
        return code.eval_utils.generate(
            video, video, ["a man talks"] * count, feature_utils=utils, **settings
        )

    calls = ours, lambda: [theirs(1) for _ in range(five)], lambda: theirs(five)
    times = alternate(seconds, *calls, **least)
    speed = [f"{five / median(x):.3g} audios/s" for x in times]
    for name, other, cell in zip(("five times", "once for five"), times[1:], speed[1:]):
        row(f"01, {what} : generate() {name}", speed[0], cell, ratio(times[0], other))


# Scorers and metrics
# -----------------------------------------------------------------------------------------


def bench_scorers(what, classes, folder, clip, clip_s, seconds):
    for name, make in classes.items():
        scorer = make(folder, "cpu")
        waves = 0.1 * torch.randn(5, round(clip_s * scorer.sample_rate_hz))
        seen = videos_of(scorer, [clip], clip_s)

        def together():
            scoring.score_waves(scorer, waves, [clip] * 5, seen)  # noqa: B023

        def alone():
            for wave in waves:  # noqa: B023
                scoring.score_waves(scorer, wave[None], [clip], seen)  # noqa: B023

        compare(
            f"scorers, five audios together : each alone, {what} {name}", seconds, together, alone
        )


def extra_gb(call):
    """What a call's memory peaks at beyond what was there before, with nothing free in the heap."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status()["VmRSS"]
    call()
    return (status()["VmHWM"] - before) / 2**20


def status():
    """What the system says of this process's memory, {name: kB}."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split()[0].rstrip(":"): int(line.split()[1]) for line in lines if line.endswith("kB")
    }


def bench_metrics(n, seconds):
    """PaSST's 768 numbers and AudioSet's 527 classes, of n clips."""
    with common.upstream("av-benchmark"):
        from av_bench.metrics import compute_fd, compute_isc, compute_kl
    ours, rng = stage("07"), np.random.default_rng(0)
    mix = rng.standard_normal((768, 768)).astype(np.float32) / 28
    truth, made = (
        rng.standard_normal((n, 768)).astype(np.float32) @ mix + shift for shift in (0, 0.1)
    )
    p, q = (
        torch.from_numpy(3 * rng.standard_normal((n, 527)).astype(np.float32)) for _ in range(2)
    )
    isc = dict(feat_layer_name=None, rng_seed=2020, samples_shuffle=True, splits=10)
    pairs = {
        "FD": (lambda: ours.frechet_distance(made, truth), lambda: compute_fd(made, truth)),
        "IS": (
            lambda: ours.inception_score(q[ours.shuffled(n)]),
            lambda: compute_isc(q, **isc)["inception_score_mean"],
        ),
        "KL": (lambda: ours.kl_divergence(p, q).mean(), lambda: compute_kl([q], p)["kl_softmax"]),
    }
    for name, calls in pairs.items():
        (a, b), value, gb = (
            alternate(seconds, *calls),
            [call() for call in calls],
            [*map(extra_gb, calls)],
        )
        cells = [f"{median(x):.3g} s, {peak:.2f} GB" for x, peak in zip((a, b), gb)]
        said = f"{ratio(a, b)}; values differ by {abs(value[0] / value[1] - 1):.0e} of theirs"
        row(f"metrics, {name} of {n} clips : av-benchmark's", *cells, said)


def bench_pesq(repeats=5):
    voice, took = torch.from_numpy(upstream_files.bursts(8.0, 16000)).float(), {0: [], 2: []}
    waves = voice + 0.01 * torch.randn(20, len(voice))
    for workers in (2, 0) * (repeats + 1):
        began = time.perf_counter()
        common.media.pesq_scores([voice] * len(waves), waves, workers)
        took[workers].append(time.perf_counter() - began)
    ours, other = took[2][1:], took[0][1:]  # the first starts the processes
    row(
        "PESQ of 20 audios, two processes : one",
        *(f"{median(x):.3g} s" for x in (ours, other)),
        ratio(ours, other),
    )


# Workers
# --------------------------------------------------------------------------------------------------


def bench_workers(videos, what, clips):
    def read(path):
        return mmaudio.MMAudio.read(mmaudio.MMAudio, a_clip(path))  # it uses clip_s alone

    began = time.process_time()
    read(videos[0])
    print(f"reading {videos[0].name}: {time.process_time() - began:.2f} CPU s; GPU_S {GPU_S:.2f}")
    for workers in (0, 1, 2):
        began, waited = time.perf_counter(), 0.0
        found = common.ahead.read_ahead(
            read, [videos[i % len(videos)] for i in range(clips)], workers
        )
        for _ in range(clips):
            asked = time.perf_counter()
            if isinstance(seen := next(found), common.SkipClip):
                raise SystemExit(f"a video of --clips cannot be used: {seen}")
            waited += time.perf_counter() - asked
            time.sleep(GPU_S)
        took = time.perf_counter() - began
        cells = (
            f"{clips / took:.2f} clips/s",
            f"{1 / GPU_S:.2f}",
            f"{took / clips / GPU_S:.2f}; waited {waited / took:.0%}",
        )
        row(f"{workers} workers, {what} : a GPU that never waits", *cells)


def main(args):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    world, s = importlib.import_module("00_toy_world"), args.seconds
    with (
        tempfile.TemporaryDirectory(prefix="bench") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(folder)
        shell(sys.executable, "00_toy_world.py", "--size", "tiny", "--run-dir", folder / "toy")
        model = common.load_model("toy", folder / "toy/00_base.pt")
        bench_05("toy", folder / "05_toy", model, s, defaults=world.DEFAULTS["default"])
        first = rows.read(folder / "toy/clips.jsonl", rows.Clip)[0]
        clip = a_clip(
            folder / "toy/00_videos" / first.video, caption=first.caption, label="person speaking"
        )
        bench_scorers("toy", toy.SCORERS, folder / "toy", clip, toy.CLIP_S, s / 4)
        bench_pesq()
        if args.clips:
            bench_workers(sorted(args.clips.glob("*.mp4")), f"{args.clips.name}/*.mp4", args.videos)
        else:
            bench_workers(
                [make_video(folder / "720p.mp4", (1280, 720), 30, 9)], "720p made here", args.videos
            )
        if os.environ.get("UPSTREAM_DIR"):
            bench_metrics(2000, s)
            bench_metrics(15_000, s)
            film = upstream_files.film(folder / "film.mp4")
            clip = a_clip(film, caption="a man talks", label=common.HUMAN_SPEECH_CLASSES[0])
            if args.real:
                (folder / "real").mkdir()
                upstream_files.write_real(folder / "real", "small_16k")
                model = common.load_model("mmaudio:small_16k", weights=folder / "real")
                bench_05("small_16k", folder / "05_real", model, s)
                bench_01("small_16k", folder / "01_real", model, s, rounds=2)
                del model
            upstream_files.write_mmaudio(folder, patch)
            model = common.load_model("mmaudio:small_16k", weights=folder)
            bench_05("tiny small_16k", folder / "05_tiny", model, s)
            bench_01("tiny small_16k", folder / "01_tiny", model, s)
            for name in ("synchformer", "imagebind", "passt"):
                getattr(upstream_files, f"write_{name}")(folder, patch)
            upstream_files.shrink_htsat(patch)
            upstream_files.write_clap(folder, patch)
            upstream_files.shrink_cnn14(patch)
            upstream_files.write_panns(folder)
            asked = {
                name: made for name, made in scorers.SCORERS.items() if name not in scorers.JUDGES
            }
            bench_scorers("tiny", asked, folder, clip, 8.0, s / 4)
        else:
            print(
                "left out, UPSTREAM_DIR is not set: 05 and 01 with small_16k, scorers of the real "
                "set, metrics"
            )
    print(
        "| what : beside what | ours | the other | ratio (quartiles) |",
        "|---|---|---|---|",
        *TABLE,
        sep="\n",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="of CPU time for a row, at least")
    parser.add_argument(
        "--clips", type=Path, help="a folder of .mp4 for the workers' rows, else one film is made"
    )
    parser.add_argument(
        "--videos", type=int, default=24, help="that the workers read, each as often as it takes"
    )
    parser.add_argument("--real", action="store_true", help="also small_16k at its real size")
    parser.add_argument(
        "--count", action="store_true", help="only count the arithmetic of the real networks"
    )
    given = parser.parse_args()
    upstream_files.count() if given.count else main(given)
