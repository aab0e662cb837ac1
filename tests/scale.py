"""Stages 02 to 05 on a run of the paper's size whose audios are scored: wall and CPU seconds, peak memory of each.

Run:   python tests/scale.py                # some minutes, 2 GB in a temporary folder
       python tests/scale.py 1000           # clips

50,000 train clips with 5 audios each, 15,000 test clips; one clip in 25 is rated. Networks, latents and features have
the tiny toy world's sizes, PANNs its 527 tags; all numbers are drawn. There is no wav, and the videos are empty files,
so that a stage that opened one would stop. Stage 05 ends after one step.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import plumbing.files as files  # noqa: E402

N, SHARD_CLIPS = 5, 32
FLAGS = {"00": ("--size", "tiny"), "01": ("--num-samples", N, "--sampling-steps", 1), "05": ("--steps", 1)}


def measure(number, run):
    """Runs a stage; returns wall seconds, CPU seconds and peak GiB."""
    script, began = next(ROOT.glob(f"{number}_*.py")), time.monotonic()
    command = [*map(str, (sys.executable, script, "--run-dir", run, *FLAGS.get(number, ())))]
    _, status, used = os.wait4(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL).pid, 0)
    assert status == 0, f"stage {number} failed"
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def enlarge(run, count):
    """Puts `count` train clips in the place of the run's, with what stages 00 and 01, scorers and raters would add."""
    for name in ("00_videos", "01_samples", "01_audio"):
        shutil.rmtree(run / name)
    (run / "00_truth.jsonl").unlink()  # simulates no people
    (run / "00_videos").mkdir()
    clips = [dict(id=f"{i:018d}", video=f"{i}.mp4", caption=f"clip {i}", split="train") for i in range(count)]
    tested = [dict(clip, id=f"test_{clip['id']}", split="test") for clip in clips[: count * 3 // 10]]
    common.write_jsonl(run / "clips.jsonl", clips + tested)
    new = dict(clips_digest=common.digest(run / "clips.jsonl"), max_clips=count)
    about, record = (json.loads((run / name).read_text()) for name in ("run.json", "01_settings.json"))
    common.write_json(run / "run.json", about | new)
    common.write_json(run / "01_settings.json", record | {"settings": record["settings"] | new})
    model, usable = common.load_base_model(run), dict(seed=0, finite=True, peak=1.0, clipped=0.0)
    for start in range(0, count, SHARD_CLIPS):
        shard, part, rows, audios = f"{start // SHARD_CLIPS:05d}", clips[start : start + SHARD_CLIPS], [], []
        for clip, k in ((clip, k) for clip in part for k in range(N)):
            path, wav = run / "00_videos" / clip["video"], f"01_audio/{clip['id']}_{k}.wav"
            path.touch()
            rows.append(dict(usable, clip=clip["id"], k=k, wav=wav, row=len(rows), digest=common.digest_of(wav)))
            audios.append(common.Audio(clip | {"path": path, "label": None}, wav, rows[-1]["digest"], shard))
        latents = torch.randn(len(rows), *model.latent_shape)
        features = {name: torch.randn(len(part), *shape) for name, shape in model.feature_shapes.items()}
        digests = [row["digest"] for row in rows]
        common.save_shard(run / "01_samples" / f"{shard}.pt", latents, features, digests)
        common.write_jsonl(run / "01_samples" / f"{shard}.jsonl", rows)
        for name, score in common.AUDIOSCORE_SCORERS.items():
            keys, tags = common.score_keys(run, audios, name, "weights"), [527] * (name == "panns")
            drawn = {score: torch.randn(len(rows), *tags)}
            common.add_to_store(run, common.store_file(run, shard, name), keys, drawn)
    rated = [dict(clip=clip["id"], k=k, rating=random.choice(common.RATINGS)) for clip in clips[::25] for k in range(N)]
    common.write_jsonl(run / "02_ratings.jsonl", rated)


if __name__ == "__main__":
    files.sync, common.store_of = lambda path: None, lambda run: nullcontext()  # nobody else writes
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for number in ("00", "01"):
            measure(number, run)
        enlarge(run, *map(int, sys.argv[1:] or ["50000"]))
        print("stage   wall, s   CPU, s   peak, GiB")
        for number in ("02", "03", "04", "05"):
            print("{:5} {:9.0f} {:8.0f} {:11.2f}".format(number, *measure(number, run)), flush=True)
