"""Stages 02 to 05 on a run of the paper's size whose audios are scored: wall and CPU seconds, peak
memory of each.

Run:   python docs/scale.py                # some minutes, 2 GB in a temporary folder
       python docs/scale.py 1000           # clips

50,000 train clips with 5 audios each, 15,000 test clips; one clip in 25 is rated. Networks, latents
and features have the tiny toy world's sizes; the scorers are the real ones, PANNs with its 527
tags; all numbers are drawn. There is no wav, and videos and weights are empty files, so that a
stage that opened one would stop. Stage 05 ends after one step.
"""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import files, inputs, rows, scoring, training  # noqa: E402

N = 5  # audios of a clip
SHARD_CLIPS = 32


def measure(number, run, *flags):
    """Runs a stage; returns wall seconds, CPU seconds and peak GiB."""
    script = next(ROOT.glob(f"{number}_*.py"))
    command = [str(part) for part in (sys.executable, script, "--run-dir", run, *flags)]
    began = time.monotonic()
    _, status, used = os.wait4(
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL).pid, 0
    )
    assert status == 0, f"stage {number} failed"
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def enlarge(run, weights, count):
    """Puts `count` train clips in the place of the run's, with what stage 01, scorers and raters
    would add."""
    for name in ("00_videos", "01_samples", "01_audio"):
        shutil.rmtree(run / name)
    (run / "00_truth.jsonl").unlink()  # simulates no people
    write_clips(run, count)
    model = common.load_base_model(run)
    train = inputs.read_clips(run, "train")
    for start in range(0, count, SHARD_CLIPS):
        write_shard(run, f"{start // SHARD_CLIPS:05d}", model, train[start : start + SHARD_CLIPS])

    samples = inputs.read_samples(run)
    fitting = importlib.import_module("02_fit_audioscore")
    order = fitting.drawn_order(samples, seed=0)
    rated = []
    for name in order[: count // 25]:
        for k in range(N):
            rated.append(rows.RatingAnswer(clip=name, k=k, rating=random.choice(common.RATINGS)))
    rows.write(run / "02_ratings.jsonl", rated)

    scorers = common.scorers_of(run, weights)
    clips = {clip.id: clip for clip in train}
    for scorer in scorers.classes.values():
        for name in scorer.files:
            (weights / name).parent.mkdir(parents=True, exist_ok=True)
            (weights / name).touch()
    blocks = fitting.rated_blocks(run, order, samples, clips, rated)
    for block in blocks + inputs.shard_blocks(run, samples, train):
        write_scores(block, scorers)


def write_clips(run, count):
    """clips.jsonl with its empty videos, and the records that name it."""
    (run / "00_videos").mkdir()
    clips = []
    for i in range(count):
        (run / "00_videos" / f"{i}.mp4").touch()
        clips.append(
            rows.Clip(id=f"{i:018d}", video=f"{i}.mp4", caption=f"clip {i}", split="train")
        )
    for clip in clips[: count * 3 // 10]:
        clips.append(
            rows.Clip(id=f"test_{clip.id}", video=clip.video, caption=clip.caption, split="test")
        )
    rows.write(run / "clips.jsonl", clips)
    new = {"clips_digest": files.digest(run / "clips.jsonl"), "max_clips": count}
    run_json = json.loads((run / "run.json").read_text())
    del run_json["scorers"], run_json["scorers_root"]  # the real ones
    rows.write_json(run / "run.json", run_json | new)
    record = json.loads((run / "01_settings.json").read_text())
    record["settings"] |= new
    rows.write_json(run / "01_settings.json", record)


def write_shard(run, shard, model, clips):
    samples = []
    for clip in clips:
        for k in range(N):
            wav = f"01_audio/{clip.id}_{k}.wav"
            usable = {"finite": True, "peak": 1.0, "clipped": 0.0, "digest": files.digest_of(wav)}
            samples.append(
                rows.Sample(clip=clip.id, k=k, seed=0, wav=wav, row=len(samples), **usable)
            )
    latents = torch.randn(len(samples), *model.latent_shape)
    features = {
        name: torch.randn(len(clips), *shape) for name, shape in model.feature_shapes.items()
    }
    digests = [sample.digest for sample in samples]
    ids = [clip.id for clip in clips]
    training.save_shard(run / "01_samples" / f"{shard}.pt", latents, digests, features, ids)
    rows.write(run / "01_samples" / f"{shard}.jsonl", samples)


def write_scores(block, scorers):
    """What AudioScore's five said of a block; what they saw of its videos is a key without
    tensors."""
    for name, (scorer, tensor) in scorers.audioscore_tensors.items():
        shape = (527,) if name == "logits" else ()
        drawn = {tensor: torch.randn(len(block.audios), *shape)}
        files.save_pt(
            block.score_file(scorer),
            {"key": scoring.score_key(scorers, scorer, block.audios), **drawn},
        )
        if "video" in scorers.classes[scorer].reads:
            files.save_pt(
                block.video_file(scorer), {"key": scoring.video_key(scorers, scorer, block.clips)}
            )


def main(count):
    files.sync = lambda path: None  # nothing here has to outlive a power failure
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        weights = Path(folder) / "weights"
        measure("00", run, "--size", "tiny")
        measure("01", run, "--num-samples", N, "--sampling-steps", 1)
        enlarge(run, weights, count)
        print("stage   wall, s   CPU, s   peak, GiB")
        scored = ("--weights", weights)
        flags = {
            "02": (*scored, "--num-rated-clips", count // 25),
            "03": scored,
            "04": (),
            "05": ("--steps", 1),
        }
        for number, more in flags.items():
            wall, cpu, peak = measure(number, run, *more)
            print(f"{number:5} {wall:9.0f} {cpu:8.0f} {peak:11.2f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
