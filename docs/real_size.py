"""What MMAudio costs on a GPU: every stage, and its parts, with all networks at their real size and
random weights.

Run:   UPSTREAM_DIR=<clones> python docs/real_size.py --videos DIR        # one GPU of 80 GB, 15 minutes, 30 GB
       UPSTREAM_DIR=<clones> python docs/real_size.py --videos DIR --tiny     # does this script work? Anywhere

Stages run as a user runs them, one after the other in this process, on --clips train clips (names for DIR's videos, in
turn) of five audios, and a test clip for every eight. The last lines are two tables in markdown.
    stages  seconds, loading and saving included; of those with an inner loop, of a turn of it in its stride, and in
            training its share of the GPU's peak arithmetic; peak GiB of tensors, GiB of the GPU in use at the end (what
            nvidia-smi shows: with the allocator's gaps and the context)
    parts   median seconds: reading a video; upstream's generate() in bf16 as its demo runs it, its frames decoded
            beforehand; each scorer (20 audios). Encoders, sampler and codec: docs/gpu_check.py
"""

import argparse
import contextlib
import gc
import io
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
import upstream_files  # noqa: E402
from conftest import a_clip, answer, call, read, stage, utilisation, write  # noqa: E402

import common  # noqa: E402
from adapters import scorers  # noqa: E402
from common import files, media, scoring, training  # noqa: E402

SPEECH = common.HUMAN_SPEECH_CLASSES[0]
TFLOP = dict(
    pair=4.166, row=26.05 / 50, clip=64.4, sync=9.5, audio=26.05, codec=2.66
)  # docs/cost.md, of large_44k
STAGES, PARTS = [], []


def row(table, *cells):
    table.append(f"| {' | '.join(cells)} |")
    print(table[-1], flush=True)


def clean():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def spend(what, number, run, *flags, stride=lambda: ""):
    """Runs a stage and adds its row. stride: what its loop did, from its log."""
    clean()
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        call(number, run, *flags)
    took, peak, used = time.perf_counter() - began, 0.0, 0.0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak, used = (x / 2**30 for x in (torch.cuda.max_memory_allocated(), total - free))
    row(STAGES, what, f"{took:.0f}", stride(), f"{peak:.1f}", f"{used:.1f}")


def part(what, call, tflop=None):
    """Median seconds of three calls after a first one."""
    found = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    took = median(found[1:])
    row(
        PARTS,
        what,
        f"{took:.4g}",
        f"{tflop / took:.0f}" if tflop and torch.cuda.is_available() else "",
    )


# Stages
# --------------------------------------------------------------------------------------------------


def generate(what, run, args, source, weights):
    """Stage 01; a shard's stride is the time from its predecessor's end to its own."""
    sampling, ends = stage("01"), []

    def write_shard(*given):
        plain(*given)
        ends.append(time.perf_counter())

    def stride():  # up to the last shard but one: beside the last one nothing is encoded
        per_clip = (ends[-2] - ends[0]) / ((len(ends) - 2) * args.shard)
        return f"{per_clip:.2f} s per clip, {5 / per_clip:.2f} audios/s"

    with pytest.MonkeyPatch.context() as patch:
        plain = sampling.write_shard
        patch.setattr(sampling, "write_shard", write_shard)
        patch.setattr(sampling, "SHARD_CLIPS", args.shard)
        spend(what, "01", run, "--num-samples", 5, *source, *weights, stride=stride)


def save_nothing(trainer, *_):
    for name in ("policy.pt", "policy.json"):
        files.save_pt(trainer.folder / name, {})


def train(what, number, run, *flags, unit=1, tflop=None, keep=False):
    """A training; a turn is `unit` steps, the first of them left out. No checkpoint is saved, a
    policy if kept."""
    names = {"05": "05_flow_dpo", "06": "06_ddpo"}
    out = names[number] if keep else f"{number}_{len(STAGES)}"

    def stride():
        log = [line["seconds"] for line in read(run / out / "log.jsonl")]
        turn = median(sum(log[i : i + unit]) for i in range(unit, len(log) - unit + 1, unit))
        share = utilisation(tflop * 1e12 / turn) if tflop else ""
        return f"{turn:.3f} s per {'step' if unit == 1 else 'round'}{share}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", lambda *_: None)  # 12 GB each
        if not keep:
            patch.setattr(training.Trainer, "save_policy", save_nothing)
        spend(what, number, run, "--out", out, *flags, stride=stride)


def run_stages(folder, args, model, weights):
    run, steps = folder / "run", 12 if not args.tiny else 3
    videos = itertools.cycle(sorted(args.videos.glob("*.mp4")))
    splits = ["train"] * args.clips + ["test"] * (args.clips // 8)
    clips = [
        dict(id=f"clip{i:05d}", video=next(videos).name, split=split)
        for i, split in enumerate(splits)
    ]
    about = itertools.cycle([("a man talks", SPEECH), ("a car passes by", "car passing by")])
    write(
        folder / "clips.jsonl",
        [dict(clip, **dict(zip(("caption", "label"), next(about)))) for clip in clips],
    )
    source = ("--clips", folder / "clips.jsonl", "--videos", args.videos, "--model", model)

    generate(f"01, {args.clips} clips", run, args, source, weights)
    rated = ("--num-rated-clips", args.clips // 4)
    call("02", run, *weights, *rated)
    ratings, words = (
        folder / "ratings.csv",
        random.Random(0).choices(common.RATINGS, k=5 * args.clips),
    )
    answer(run / "02_to_rate.csv", ratings, "rating", dict(enumerate(words)))
    spend(f"02, {args.clips // 4} clips", "02", run, *weights, *rated, "--ratings", ratings)
    spend(f"03, {args.clips} clips", "03", run, *weights)
    call("04", run)

    dpo, eight = ("--steps", steps, "--warmup", 0, *weights), 8 * TFLOP["pair"]
    train("05, 8 pairs", "05", run, *dpo, "--global-batch", 8, tflop=eight, keep=True)
    train("05, 1 pair", "05", run, *dpo, "--global-batch", 1, tflop=TFLOP["pair"])
    train("05, 32 pairs", "05", run, *dpo, "--global-batch", 32, tflop=4 * eight)
    checkpointing = ("--gradient-checkpointing",)
    train(
        "05 --gradient-checkpointing, 8 pairs", "05", run, *dpo, "--global-batch", 8, *checkpointing
    )
    train("05 --lora 16, 8 pairs", "05", run, *dpo, "--global-batch", 8, "--lora", 16)
    train("05 --lora 16, 1 pair", "05", run, *dpo, "--global-batch", 1, "--lora", 16)

    # 64 audios: 10 steps with two rows each, 8 updates of two rows forward and backward
    ddpo, one_round = ("--steps", 24, *weights), 64 * 2 * (10 + 8 * 3) * TFLOP["row"]
    if args.tiny:
        ddpo += ("--prompts", 1, "--group-size", 2)
    train("06, 64 audios", "06", run, *ddpo, unit=8, tflop=one_round, keep=True)
    train(
        "06 --lora 16 --gradient-checkpointing",
        "06",
        run,
        *ddpo,
        *checkpointing,
        "--lora",
        16,
        unit=8,
    )
    spend(f"07, {args.clips // 8} clips, ground truth and 3 systems", "07", run, *weights)


# Parts
# --------------------------------------------------------------------------------------------------


def first_clip(args):
    return a_clip(sorted(args.videos.glob("*.mp4"))[0], caption="a man talks", label=SPEECH)


def run_model(args, name, weights):
    device, clip = common.ranks.setup().device, first_clip(args)
    model = common.load_model(name, device=device, weights=weights)
    part("reading a video, CPU", lambda: model.read(clip))
    squashed, cropped = (frames.to(device).float()[None] / 255 for frames in model.read(clip))
    cropped, encoders = 2 * cropped - 1, model.encoders()
    code, utils = (
        upstream_files.mmaudio_modules(),
        SimpleNamespace(device=device, dtype=torch.bfloat16),
    )
    with torch.inference_mode():  # upstream's parts, cast as its demo casts them
        net = code.networks.get_my_mmaudio(model.variant)
        net.load_state_dict(model.net.state_dict())
        net, half = (
            net.to(device, torch.bfloat16).eval(),
            [x.bfloat16() for x in (encoders, model.codec())],
        )
        for kind in ("encode_video_with_clip", "encode_video_with_sync", "encode_text"):
            setattr(utils, kind, getattr(half[0], kind))
        utils.decode, utils.vocode = half[1].decode, half[1].vocode
    settings = dict(
        feature_utils=utils,
        net=net,
        cfg_strength=4.5,
        rng=torch.Generator(device=device).manual_seed(0),
    )
    settings["fm"] = code.flow_matching.FlowMatching(0, "euler", 25)

    @torch.inference_mode()
    def upstream(count):
        frames = (
            squashed.expand(count, *squashed.shape[1:]),
            cropped.expand(count, *cropped.shape[1:]),
        )
        code.eval_utils.generate(*frames, [clip.caption] * count, **settings)

    part("generate(), one audio, bf16", lambda: upstream(1))
    part("generate(), five audios of a clip, bf16", lambda: upstream(5))


def run_scorers(args, weights):
    device, clip = common.ranks.setup().device, first_clip(args)
    for key in [key for key in scorers.SCORERS if key not in scorers.JUDGES]:
        clean()
        scorer = scorers.SCORERS[key](weights, device)
        waves = 0.1 * torch.randn(20, round(8 * scorer.sample_rate_hz))
        seen = None
        if "video" in scorer.reads:
            (frames,) = media.read_frames(clip.path, [scorer.frames], 8.0)
            with torch.inference_mode():
                part(f"{key}, video of a clip", lambda: scorer.embed_video(frames))  # noqa: B023
                seen = {clip.id: scorer.embed_video(frames)}
        part(f"{key}, 20 audios", lambda: scoring.score_waves(scorer, waves, [clip] * 20, seen))  # noqa: B023
        if torch.cuda.is_available():
            print(f"{key}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main(args):
    variant = "small_16k" if args.tiny else "large_44k"
    name = f"mmaudio:{variant}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        tempfile.TemporaryDirectory(prefix="real", dir=args.folder) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder, weights = Path(folder), Path(folder) / "weights"
        weights.mkdir()
        began = time.perf_counter()
        if args.tiny:
            upstream_files.write_mmaudio(weights, patch)
            for name in ("synchformer", "imagebind", "passt"):
                getattr(upstream_files, f"write_{name}")(weights, patch)
            upstream_files.shrink_htsat(patch)
            upstream_files.write_clap(weights, patch)
            upstream_files.shrink_cnn14(patch)
        else:
            with torch.device(device):
                upstream_files.write_real(weights, variant)
                upstream_files.write_clip(weights, patch, upstream_files.CLIP_REAL)
                for name in ("synchformer", "imagebind", "passt", "clap"):
                    getattr(upstream_files, f"write_{name}")(weights)
        upstream_files.write_panns(weights)
        print(f"weights written in {time.perf_counter() - began:.0f} s", flush=True)
        if args.only != "stages":
            run_model(args, name, weights)
            run_scorers(args, weights)
        if args.only != "parts":
            run_stages(folder, args, name, ("--weights", weights))
    about = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{about}, torch {torch.__version__}, {os.cpu_count()} cores, {name}")
    print("| stage | s | in its stride | tensors, GiB | GPU, GiB |", f"|{5 * '---|'}", sep="\n")
    print(*STAGES, "", "| part | s | TFLOP/s |", "|---|---|---|", *PARTS, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--videos", type=Path, required=True, help="a folder of .mp4 of 8 s or more, with sound"
    )
    parser.add_argument("--clips", type=int, default=32, help="train clips")
    parser.add_argument("--shard", type=int, default=8, help="clips that stage 01 writes together")
    parser.add_argument("--only", choices=("stages", "parts"), help="one of the two tables")
    parser.add_argument("--folder", help="for the temporary folder")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, small_16k")
    given = parser.parse_args()
    if given.tiny:
        given.clips, given.shard = 8, 2
    main(given)
