"""What the tests share: one tiny run, made the way a user makes one, stages as modules, and what must be refused."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import common

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

STAGES = {path.name[:2]: path for path in sorted(ROOT.glob("0?_*.py"))}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}  # torchrun on a free port of its own
TORCHRUN = Path(sys.executable).with_name("torchrun")


def pytest_runtest_setup(item):
    if item.get_closest_marker("upstream") and not os.environ.get("UPSTREAM_DIR"):
        pytest.skip("runs fetched code: UPSTREAM_DIR, the folder that holds its clones, is unset")


def stage(number):
    """A stage file as a module (their names start with digits, so `import` cannot name them)."""
    return importlib.import_module(STAGES[number].stem)


def arguments(run, *flags):
    return ["--run-dir", str(run), *map(str, flags)]


def call(number, run, *flags):
    """A stage as its command line would run it, in this process; a user error is a common.Stop."""
    stage(number).main(stage(number).parse_args(arguments(run, *flags)))


def shell(*command):
    """A command in the repository's folder; its output is in the failure's message."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": ENVIRONMENT, "timeout": 600}
    done = subprocess.run([*map(str, command)], **options)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def torchrun(number, run, *flags):
    """Two processes, by the command that the stages' docstrings show."""
    return shell(TORCHRUN, "--nproc_per_node", 2, STAGES[number].name, *arguments(run, *flags))


def start(number, run, *flags):
    """A stage in a process of its own, its errors in a pipe."""
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    # A shell's background jobs ignore Ctrl-C, and so would their children: back to the default.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, STAGES[number].name, *arguments(run, *flags)], **pipes)


def read(path):
    """The lines of a .jsonl, by other code than the stages'."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def cells(path):
    """The rows of a .csv, as dicts."""
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files_of(run, *numbers):
    """{name: bytes} of what these stages wrote: names that begin with these numbers."""
    found = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name.startswith(numbers)}


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
        done = shell(sys.executable, file.name, *arguments(run, *(("--size", "tiny") if number == "00" else ())))
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
    fresh = shutil.copytree(finished, tmp_path / "fresh", ignore=shutil.ignore_patterns("0[1-9]_*", "scores"))
    known, samplers = json.loads((fresh / "run.json").read_text()), ("num_samples", "seed", "sampler", "max_clips")
    of_01 = {"latent_shape", "sample_rate_hz", "clips_digest", *samplers}
    (fresh / "run.json").write_text(json.dumps({key: known[key] for key in known.keys() - of_01}))
    return fresh


@pytest.fixture
def toy(finished):
    """The flags that take the toy model to other clips."""
    return ("--model", "toy", "--checkpoint", finished / "00_base.pt", "--sampling-steps", 2, "--num-samples", 2)


# What must be refused ----------------------------------------------------------------------------------------


def stopped(call, *args):
    """A callable that must end as a user error; returns its line."""
    with pytest.raises(common.Stop) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def refused(capsys):
    """A stage that must end as a user error, by its own entry: exit code 2 and one line, which is returned."""

    def check(number, run, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            common.launch(stage(number).main, lambda: stage(number).parse_args(arguments(run, *flags)))
        error = capsys.readouterr().err
        lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip()]
        said = [line for line in lines if not re.search(r"\d%\|.*\]$|^\d+\w+ \[.*\]$", line)]  # less progress bars
        assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), error
        return said[0]

    return check


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture(scope="module")
def no_network():
    """From its first use to the end of the module, nothing may as much as look up a host."""
    calls = []

    def refuse(*args, **_):
        calls.append((os.environ.get("PYTEST_CURRENT_TEST"), args))
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        yield
    assert not calls
