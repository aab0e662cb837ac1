"""What the tests share: one tiny run, made the way a user makes one, and stages as modules."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

STAGES = {path.name[:2]: path for path in sorted(ROOT.glob("0?_*.py"))}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def stage(number):
    """A stage file as a module (their names start with digits, so `import` cannot name them)."""
    return importlib.import_module(STAGES[number].stem)


def call(number, run, *flags):
    """A stage as its command line would run it, in this process."""
    module = stage(number)
    module.main(module.parse_args(["--run", str(run), *map(str, flags)]))


def shell(*command, check=True, **options):
    """A command in the repository's folder; its output is in the failure's message."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": ENVIRONMENT, "timeout": 600, **options}
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def torchrun(number, run, *flags):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--")
    return shell(*launcher, STAGES[number], "--run", run, *flags)


def read(path):
    """The lines of a .jsonl, by other code than the stages'."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files_of(run, *numbers):
    """{name: bytes} of what these stages wrote."""
    found = (path for path in sorted(run.rglob("*")) if path.is_file())
    return {str(p.relative_to(run)): p.read_bytes() for p in found if str(p.relative_to(run))[:2] in numbers}


def make_video(path, size, fps, seconds, codec="libx264", pixels="yuv420p", sound=True):
    """A moving gradient, and a beep in stereo at 44.1 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = width, height, pixels
        voice = container.add_stream("aac", rate=44_100, layout="stereo") if sound else None
        for i in range(round(seconds * fps)):
            picture = np.full((height, width, 3), (7 * i) % 255, np.uint8)
            picture[: height // 2, : 1 + i % width] = 255
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)))
        container.mux(video.encode(None))
        if voice:
            wave = np.sin(np.arange(round(44_100 * seconds)) / 15).astype(np.float32)[None].repeat(2, 0) * 0.3
            for start in range(0, wave.shape[1], 1024):
                block = np.ascontiguousarray(wave[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
                frame.sample_rate, frame.pts, frame.time_base = 44_100, start, Fraction(1, 44_100)
                container.mux(voice.encode(frame))
            container.mux(voice.encode(None))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run by the README's own command, only smaller. Read it; to change something, take `run`."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.with_suffix(".log").write_text("")
    for number, file in STAGES.items():
        done = shell(file, "--run", run, *(("--size", "tiny") if number == "00" else ()))
        with open(run.with_suffix(".log"), "a", encoding="utf-8") as log:
            log.write(f"== {file.name}\n{done.stdout}\n")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def fresh(finished, tmp_path):
    """A copy in which only stage 00 has run."""
    shutil.copytree(finished, tmp_path / "fresh", ignore=shutil.ignore_patterns("0[1-7]_*"))
    known = json.loads((tmp_path / "fresh" / "run.json").read_text())
    keep = ("model", "size", "world_seed", "scorers", "video_root", "clip_s")
    known = {**{key: known[key] for key in keep}, "checkpoint": "00_base.pt"}
    (tmp_path / "fresh" / "run.json").write_text(json.dumps(known))
    return tmp_path / "fresh"


@pytest.fixture
def refused(capsys):
    """Runs a stage that must end as a user error: exit code 2 and one line, which is returned."""

    def check(number, run, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(number, run, *flags)
        error = capsys.readouterr().err
        lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip()]
        said = [line for line in lines if not re.search(r"\d%\|.*\]$|^\d+\w+ \[.*\]$", line)]  # less progress bars
        assert stopped.value.code == 2, error
        assert len(said) == 1 and said[0].startswith("error: "), error
        return said[0]

    return check


@pytest.fixture
def toy(finished):
    """The flags that take the toy model to other clips."""
    return ("--model", "toy", "--checkpoint", finished / "00_base.pt", "--sampling-steps", 2, "--num-samples", 2)
