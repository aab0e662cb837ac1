"""What the tests share: one tiny run, made the way a user makes one, stages as modules, and what
must be refused."""

import contextlib
import csv
import fcntl
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

import common
from common import command, files, inputs, training

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

STAGES = {path.name[:2]: path for path in sorted(ROOT.glob("0?_*.py"))}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Not in os.environ: a process that has met CUDA so never finds a GPU again.
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
TORCHRUN = Path(sys.executable).with_name("torchrun")
NOISE = ROOT / "tests" / "noise"
SYSTEMS = ("ground_truth", "base", "flow_dpo", "ddpo")

# How far apart floats may be that are equal but for rounding, by kind. Bits are compared only where
# both sides come from one computation of one shape: resumed, repeated, divided over ranks or
# workers, copied, or written and read.
SCORES = dict(rtol=1e-5, atol=1e-5)  # of networks, in other batches or by upstream's own code
PROBABILITIES = dict(rtol=0.0, atol=1e-4)  # of such scores: 4e-6 of every score moved them by 4e-5
LATENTS = dict(rtol=0.0, atol=1e-4)  # sampled in several steps, in other batches or compiled


def pytest_addoption(parser):
    text = (
        "multiply every score of a network by 1 ± 2e-6, by its batch (tests/noise/score_noise.py)"
    )
    parser.addoption("--score-noise", action="store_true", help=text)
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")


def pytest_configure(config):
    """With --score-noise: here, and by PYTHONPATH in every process that is started, pytest's own
    included."""
    if config.getoption("--score-noise") and not hasattr(common.scoring, "noisy"):
        paths = filter(None, (str(NOISE), os.environ.get("PYTHONPATH")))
        os.environ["PYTHONPATH"] = ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path.insert(0, str(NOISE))
        importlib.import_module("score_noise").add_to(common)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hides a GPU from every test that is not marked `gpu`, and from the fixtures that it makes."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


def pytest_collection_modifyitems(items):
    """Of two processes one begins with the first test, and makes the finished run, the other in the
    middle: with tests that need not wait for it."""
    waiting = [item for item in items if "finished" in item.fixturenames]
    free = [item for item in items if "finished" not in item.fixturenames]
    middle = len(items) // 2
    items[:] = waiting[:middle] + free + waiting[middle:]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes minutes: give --slow")
    if item.get_closest_marker("upstream") and not os.environ.get("UPSTREAM_DIR"):
        pytest.skip("runs fetched code: UPSTREAM_DIR, the folder that holds its clones, is unset")


# Stages, in this process and in others


def stage(number):
    """A stage file as a module (their names start with digits, so `import` cannot name them)."""
    return importlib.import_module(STAGES[number].stem)


def arguments(run, *flags):
    return ["--run-dir", str(run), *map(str, flags)]


def call(number, run, *flags):
    """A stage as its command line would run it, in this process; a user error is a common.Stop."""
    stage(number).main(stage(number).parse_args(arguments(run, *flags)))


def ended(*command, **environment):
    """What a command in the repository's folder came to: its exit code and its texts."""
    options = dict(capture_output=True, text=True, cwd=ROOT, timeout=600)
    return subprocess.run([*map(str, command)], env=ENVIRONMENT | environment, **options)


def shell(*command, **environment):
    """A command that must succeed; its output is in the failure's message."""
    done = ended(*command, **environment)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def torchrun(number, run, *flags, nodes=1):
    """Two processes, by the commands that the stages' docstrings show; where of two nodes, both are
    this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    launch = [TORCHRUN, *(meet if nodes > 1 else ["--standalone"]), "--nnodes", nodes]
    launch += ["--nproc_per_node", 2 // nodes, STAGES[number].name, *arguments(run, *flags)]
    with ThreadPoolExecutor() as launchers:
        for launched in [launchers.submit(shell, *launch) for _ in range(nodes)]:
            launched.result()


def start(number, run, *flags, code=None):
    """A stage, or this code instead, in a process of its own, its errors in a pipe."""
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    # A shell's background jobs ignore Ctrl-C, and so would their children: back to the default.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = ["-c", code] if code else [STAGES[number].name]
    command = [sys.executable, *program, *arguments(run, *flags)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)


@contextlib.contextmanager
def interrupted(owner, name, count=1):
    """Ctrl-C at the count-th call of owner.name, which must come."""
    original, calls = getattr(owner, name), itertools.count(1)

    def breaking(*args, **kwargs):
        if next(calls) == count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, breaking)
        yield


@pytest.fixture
def spied(monkeypatch):
    """spied(owner, name): a list of the arguments of every call to come, each done as ever."""

    def spy(owner, name):
        original, calls = getattr(owner, name), []

        def noting(*args, **kwargs):
            calls.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)
        return calls

    return spy


# Clips, scores, files


def videos_of(scorer, clips, clip_s=8.0):
    """{clip id: what the scorer sees of its video}; None of a scorer that sees none."""
    if "video" not in scorer.reads:
        return None
    seen = {}
    for clip in clips:
        (frames,) = common.media.read_frames(clip.path, [scorer.frames], clip_s)
        with torch.inference_mode():
            seen[clip.id] = scorer.embed_video(frames)
    return seen


def judged(scorer, waves, clips, clip_s=8.0):
    """The scores of waves against clips that no file knows."""
    each = {clip.id: clip for clip in clips}.values()
    return common.scoring.score_waves(scorer, waves, clips, videos_of(scorer, each, clip_s))


def a_clip(path="none.mp4", id="x", caption=None, label=None):
    """A clip of no run."""
    given = dict(id=id, video=str(path), caption=caption, label=label, split="train")
    return inputs.FoundClip(**given, path=Path(path))


def read(path):
    """The lines of a .jsonl, by other code than the stages'."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path):
    """The rows of a .csv, as dicts."""
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files_of(run, *numbers):
    """{name: bytes} of what these stages wrote: names that begin with these numbers."""
    names = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if name.startswith(numbers)}


def remove(run, *patterns):
    """Files and folders, the latter with all that is in them."""
    for path in [path for pattern in patterns for path in run.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def set_rating(run, number=0):
    """Another answer to one question of 02."""
    rows = read(run / "02_ratings.jsonl")
    rows[number]["rating"] = "Good" if rows[number]["rating"] != "Good" else "Bad"
    write(run / "02_ratings.jsonl", rows)


def answer(sheet, to, column, answers):
    """What a person does with a sheet: {row number: answer}."""
    rows = cells(sheet)
    with open(to, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | {column: answers.get(i, "")} for i, row in enumerate(rows))


def results(run, split="test"):
    """{(system, metric): row} of stage 07."""
    file = run / ("07_results.jsonl" if split == "test" else f"07_results_{split}.jsonl")
    return {(row["system"], row["metric"]): row for row in read(file)}


def without_times(name, content):
    """A training log less what differs between two equal runs."""
    if not name.endswith("log.jsonl"):
        return content
    lines = [json.loads(line) for line in content.decode().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def log_of(run, folder):
    return without_times("log.jsonl", (run / folder / "log.jsonl").read_bytes())


def weights(run, out):
    return files.load_pt(run / out / "policy.pt")


def base_weights(run):
    return files.load_pt(run / "00_base.pt")["net"]


def shards_of(run):
    return training.Shards(run, inputs.read_samples(run), common.load_base_model(run))


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def distance(a, b):
    """Of two sets of weights, Euclid's."""
    return sum((a[key] - b[key]).square().sum().item() for key in a) ** 0.5


def close(ours, theirs, within):
    """Whether two tensors or (lists of) numbers are of one shape and equal but for rounding, nan to
    nan."""
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, **within, equal_nan=True)


def utilisation(flops):
    """Model FLOPs utilisation of the GPU that is here, as text, of so many FLOP/s; dense bf16 is
    the peak."""
    peaks = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return "".join(f", MFU {flops / peak:.1%}" for key, peak in peaks.items() if key in name)


def make_video(
    path, size=(64, 64), fps=25, seconds=2.2, codec="libx264", pixels="yuv420p", sound=True,
    voice="aac", rate_hz=44_100, times=None, hold_s=None, late_s=0.0, options=None,
):  # fmt: skip
    """Frames that say their number (`number_of`) over noise with a moving bar. sound: True for a
    beep in stereo, or (S,) samples at rate_hz; False for a silent film. times: when each frame is
    shown, in s, instead of i / fps; hold_s: for how long the last one is; late_s: when the sound
    starts; options: the video encoder's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    if sound is True:
        sound = 0.3 * np.sin(np.arange(round(rate_hz * seconds)) / 15)[None].repeat(2, 0)
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        video = container.add_stream(codec, rate=rate, options=options or {})
        video.width, video.height, video.pix_fmt = width, height, pixels
        if sound is not False:
            wave = np.atleast_2d(sound).astype(np.float32)
            layout = "mono" if len(wave) == 1 else "stereo"
            audio = container.add_stream(voice, rate=rate_hz, layout=layout)
        if times is not None:
            video.codec_context.time_base = Fraction(1, 12_800)
        packets = []
        for i in range(round(seconds * fps) if times is None else len(times)):
            picture = noise.copy()
            picture[:, (3 * i) % width :][:, :8] = (i * 7 % 255, 255 - i % 255, 128)
            for bit in range(10):
                columns = slice(width * bit // 10, width * (bit + 1) // 10)
                picture[: height // 4, columns] = 255 * (i >> bit & 1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            if times is not None:
                frame.pts, frame.time_base = round(12_800 * times[i]), Fraction(1, 12_800)
            packets += video.encode(frame)
        packets += video.encode(None)
        if hold_s is not None:
            packets[-1].duration = round(hold_s / packets[-1].time_base)
        container.mux(packets)
        if sound is not False:
            for start in range(0, wave.shape[1], 1024):
                block = np.ascontiguousarray(wave[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
                frame.pts = start + round(rate_hz * late_s)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def number_of(frame):
    """Which of make_video's frames this is. frame: (3, H, W) uint8 tensor."""
    _, height, width = frame.shape
    row = frame[1, height // 8]
    return sum(int(row[width * (2 * bit + 1) // 20] > 127) << bit for bit in range(10))


# Runs


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run by the README's own command, only smaller, made once for all of pytest's
    processes. Read it; to change something, take `run`."""
    base = tmp_path_factory.getbasetemp()
    run = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    with open(run.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not run.with_suffix(".log").exists():
            made = []
            for number, file in STAGES.items():
                size = ("--size", "tiny") if number == "00" else ()
                said = shell(sys.executable, file.name, *arguments(run, *size)).stdout
                made.append(f"== {file.name}\n{said}\n")
            run.with_suffix(".log").write_text("".join(made), encoding="utf-8")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def fresh(finished, tmp_path):
    """A copy in which only stage 00 has run."""
    of_stages = shutil.ignore_patterns("0[1-9]_*", "weights.json")
    fresh = shutil.copytree(finished, tmp_path / "fresh", ignore=of_stages)
    world = inputs.read_run(fresh, common.rows.World)
    common.rows.write_json(fresh / "run.json", world)
    return fresh


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stage("01"), "SHARD_CLIPS", 4)


@pytest.fixture
def toy(finished):
    """The flags that take the toy model to other clips."""
    model = ("--model", "toy", "--checkpoint", finished / "00_base.pt")
    return (*model, "--sampling-steps", 2, "--num-samples", 2)


# Pages in a browser


def program(*names):
    return next(filter(None, map(shutil.which, names)), None)


BROWSER = program("chromium", "chromium-browser", "google-chrome", "chrome")
DRIVER = program("chromedriver", "chromium.chromedriver")
QUIET = """--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-sync --disable-component-update --disable-dev-shm-usage --mute-audio
--window-size=1280,720"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium without network; what its pages save lies in `browser.downloads`."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its chromedriver is installed")
    options, downloads = webdriver.ChromeOptions(), tmp_path_factory.mktemp("downloads")
    options.binary_location = BROWSER
    for flag in (*QUIET.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(executable_path=DRIVER))
    driver.set_script_timeout(90)
    driver.downloads = downloads
    yield driver
    driver.quit()


def shown(browser, page):
    """The browser with a page of the disk, whole: `get` may return while one of many megabytes is
    still read."""
    browser.get(page.as_uri())
    state = "return document.readyState"
    WebDriverWait(browser, 60).until(lambda seen: seen.execute_script(state) == "complete")
    return browser


@pytest.fixture
def without_pictures(monkeypatch):
    """Stage 08 draws and films nothing: time."""
    figures = ("draw_differences", "draw_training", "draw_audioscore")
    for name in ("playable_video", "spectrogram", "picture", *figures):
        monkeypatch.setattr(stage("08"), name, lambda *_: "data:,")


def asked_for(browser, page):
    """What a page has asked for since it was opened, itself included, and what it complained of."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["documentURL"] == page.as_uri()]
    log = browser.get_log("browser")
    wrong = [entry for entry in log if entry["level"] in ("WARNING", "SEVERE")]
    return [url for url in urls if not url.startswith("data:")], wrong


# What must be refused


def said(line, *parts):
    """The line names all of these."""
    assert [part for part in map(str, parts) if part not in line] == [], line


def stopped(call, *args):
    """A callable that must end as a user error; returns its line."""
    with pytest.raises(common.Stop) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def is_progress(line):
    """A bar of tqdm, which overwrites its longer predecessor with blanks."""
    return re.search(r"\d%\|.*\] *$|^\d+\w+ \[.*\] *$", line)


@pytest.fixture
def refused(capsys):
    """A stage that must end as a user error, by its own entry: exit code 2 and one line, which is
    returned."""

    def check(number, run, *flags):
        capsys.readouterr()
        module = stage(number)
        with pytest.raises(SystemExit) as ended:
            command.launch(module.main, lambda: module.parse_args(arguments(run, *flags)))
        error = capsys.readouterr().err
        lines = error.replace("\x1b[A", "").replace("\r", "\n").splitlines()
        lines = [line for line in lines if line.strip() and not is_progress(line)]
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), error
        return lines[0]

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
