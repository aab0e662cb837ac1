"""What a user can get wrong beyond one flag or file: videos, trainings that diverge, stages rerun
out of order, foreign pickles, abbreviated flags. One line on stderr, exit code 2, nothing lost."""

import pickle
import re

import av
import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import (
    ROOT,
    STAGES,
    Malicious,
    call,
    is_progress,
    make_video,
    read,
    said,
    set_rating,
    stage,
    start,
    stopped,
)

from common import files, ranks


def test_a_user_error_in_a_process_of_its_own_is_one_line_and_exit_code_2(tmp_path):
    started = start("05", tmp_path / "nowhere")
    error = started.communicate()[1]
    assert (started.returncode, error.count("\n")) == (2, 1)
    assert error.startswith("error: --run-dir")


@pytest.mark.parametrize(
    "line, is_bar",
    [
        ("toy:   4%|  | 1/24 [00:00<?, ?audio/s]", True),
        ("toy: 100%|██| 24/24 [00:00<00:00, 99audio/s]  ", True),
        ("12it [00:01, 9.5it/s]  ", True),
        ("error: toy: 24/24 audios, 100% of them short", False),
    ],
)
def test_a_bar_of_progress_is_told_from_an_error_whatever_rate_it_shows(line, is_bar):
    assert bool(is_progress(line)) == is_bar


def test_a_redone_audioscore_makes_the_later_stages_ask_for_theirs(run, refused):
    set_rating(run)
    call("02", run, "--redo")
    for number in ("04", "05"):
        said(refused(number, run), "03_mine_pairs.py", "--redo")
    call("03", run, "--redo")
    said(refused("05", run), "04_curriculum_split.py", "--redo")
    call("04", run, "--redo")
    said(refused("05", run), "--out")


def test_more_processes_than_the_batch_can_be_divided_over(run, refused, monkeypatch):
    monkeypatch.setattr(ranks, "setup", lambda: ranks.Ranks(0, 3))
    said(refused("05", run, "--out", "x"), "--global-batch 4", "3 processes")
    said(refused("06", run, "--out", "x"), "--prompts 2", "3 processes")


# Videos


@pytest.fixture
def bad_videos(tmp_path):
    folder = tmp_path / "videos"
    good = make_video(folder / "good.mp4").read_bytes()
    make_video(folder / "short.mp4", seconds=0.8)
    (folder / "corrupt.mp4").write_bytes(good[:700])
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "damaged.mp4").write_bytes(good[: len(good) // 3].ljust(len(good), b"\0"))
    sound = str(folder / "sound.mp4")
    with av.open(str(folder / "good.mp4")) as source, av.open(sound, "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return folder


def reasons(run):
    return {x["clip"]: x["reason"] for x in read(run / "01_samples/00000.skipped.jsonl")}


def sampled(run):
    return {row["clip"] for row in read(run / "01_samples" / "00000.jsonl")}


def test_unusable_videos_are_skipped_counted_and_listed_and_an_error_under_strict(
    bad_videos, tmp_path, toy, capsys, refused
):
    run = tmp_path / "run"
    line = refused("01", run, "--videos", bad_videos, *toy, "--strict")
    said(line, "--strict", "6 clips", "corrupt")
    assert not (run / "01_samples" / "00000.jsonl").exists()
    call("01", run, "--videos", bad_videos, *toy)
    skipped = reasons(run)
    assert skipped.keys() == {"short", "corrupt", "text", "empty", "sound", "damaged"}
    assert skipped["sound"] == "no video stream"
    assert skipped["short"].startswith("too short: 0.80 s")
    assert all("unreadable" in skipped[name] for name in ("corrupt", "text", "empty"))
    assert sampled(run) == {"good"}
    assert "7 in, 1 used, 6 skipped" in capsys.readouterr().out


def test_a_title_in_latin_1_is_no_reason_and_frames_without_time_are(tmp_path, toy):
    (tmp_path / "videos").mkdir()
    for name, container in (("titled.mkv", "matroska"), ("raw.mp4", "h264")):
        with av.open(str(tmp_path / "videos" / name), "w", format=container) as target:
            target.metadata["title"] = "caf.."
            video = target.add_stream("libx264", rate=25)
            video.width = video.height = 64
            for frame in [*[av.VideoFrame(64, 64, "yuv420p") for _ in range(60)], None]:
                target.mux(video.encode(frame))
    titled = tmp_path / "videos" / "titled.mkv"
    assert b"caf.." in titled.read_bytes()
    titled.write_bytes(titled.read_bytes().replace(b"caf..", b"caf\xe9\xe9"))
    call("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy)
    assert sampled(tmp_path / "run") == {"titled"}
    assert reasons(tmp_path / "run") == {"raw": "frames without time stamps"}


def test_a_list_without_a_single_usable_video(tmp_path, toy, refused):
    videos = tmp_path / "videos"
    videos.mkdir()
    said(refused("01", tmp_path / "run", "--videos", videos, *toy), videos, "no video")
    (videos / "text.mp4").write_text("not a video")
    line = refused("01", tmp_path / "run", "--videos", videos, *toy)
    said(line, "no train clip", "skipped.jsonl")


# Trainings that diverge


def loss_of_nan(patch):
    """In step 4."""
    original, steps = stage("05").train_step, []

    def breaking(*args):
        sums = original(*args)
        steps.append(1)
        factor = float("nan") if len(steps) == 5 else 1
        return {name: value * factor for name, value in sums.items()}

    patch.setattr(stage("05"), "train_step", breaking)


def infinite_gradient(patch):
    """In step 2."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def infinite(parameters, bound):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == 3:
            parameters[0].grad.fill_(float("inf"))
        return clip(parameters, bound)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)


@pytest.mark.parametrize("breaks, flags, step", [
    (loss_of_nan, ("--save-every", 2), 4),
    (infinite_gradient, ("--save-every", 1), 2),
    (lambda patch: None, ("--save-every", 1, "--lr", 1e9, "--warmup", 0), None),
])  # fmt: skip
def test_a_training_that_is_not_finite_stops_and_keeps_the_last_finite_checkpoint(
    breaks, flags, step, run, refused, monkeypatch
):
    breaks(monkeypatch)
    line = refused("05", run, "--out", "broken", *flags)
    said(line, "not finite", run / "broken" / "checkpoint.pt", "--lr")
    state = files.load_pt(run / "broken" / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (run / "broken" / "policy.pt").exists()
    if step:
        said(line, f"step {step}")
        assert state["step"] == step == len(read(run / "broken" / "log.jsonl"))


# Pickles


def test_torch_load_occurs_once_with_weights_only_and_nothing_else_unpickles():
    places = [path for room in ("", "adapters/", "plumbing/") for path in ROOT.glob(f"{room}*.py")]
    lines = [(path.name, line) for path in places for line in path.read_text().splitlines()]
    ((file, line),) = [place for place in lines if "torch.load(" in place[1]]
    assert file == "files.py" and "weights_only=True" in line
    unsafe = r"weights_only=False|pickle\.load|import pickle|np\.load\((?!.*allow_pickle=False)"
    assert [place for place in lines if re.search(unsafe, place[1])] == []


class Scalar:
    """What a numpy scalar is in a pickle: a function of numpy's and its arguments."""

    build = None

    def __reduce__(self):
        return self.build, (np.dtype("f8"), np.float64(0.1).tobytes())


class Crafted:
    """A file whose numpy dtype gets a state, and whose array a shape, of the attacker's choice."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "<", None, None, None, -1, -1, 0)


@pytest.mark.parametrize("ignore", [(), files.NUMPY], ids=["refused", "left out"])
@pytest.mark.parametrize("core", ["core", "_core"], ids=["numpy 1", "numpy 2"])
def test_a_numpy_object_of_a_third_party_file_is_never_built(core, ignore, tmp_path, monkeypatch):
    def scalar(*_):
        """Pickled by the name that this numpy gives its own."""

    scalar.__module__, scalar.__qualname__ = f"numpy.{core}.multiarray", "scalar"
    monkeypatch.setattr(f"{scalar.__module__}.scalar", scalar)
    monkeypatch.setattr(Scalar, "build", staticmethod(scalar))
    torch.save({"weight": torch.ones(2), "lr": Scalar(), "dtype": Crafted()}, tmp_path / "x.pt")
    monkeypatch.setattr(files.Ignored, "__init__", lambda self, *args: None)
    if not ignore:
        assert "plain tensors (it holds numpy" in stopped(files.load_pt, tmp_path / "x.pt")
        return
    file = files.load_pt(tmp_path / "x.pt", ignore=ignore)
    assert {type(file[key]) for key in ("lr", "dtype")} == {files.Ignored}
    assert torch.equal(file["weight"], torch.ones(2))


def test_a_bare_malicious_pickle_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    assert str(tmp_path / "evil.pt") in stopped(files.load_pt, tmp_path / "evil.pt")
    assert not (tmp_path / "mark").exists()


# Help

SHOWN = {
    "00": ("--size", "--seed"),
    "01": ("--num-samples", "(default: 5)", "(default: 4.5)", "(default: 50000)", "(default: 25)"),
    "02": ("--num-rated-clips", "(default: 2000)", "Sec. 2.1"),
    "03": ("--num-human-pairs", "(default: 2000)", "(default: 0.0)", "Sec. 2.2"),
    "04": ("score_delta", "(default: 0.7)", "Tab. 2"),
    "05": ("(default: 600.0)", "(default: 5e-06)", "(default: 1000)", "(default: 12000)"),
    "06": ("(default: 12000)", "(default: 5e-06)", "(default: 0.7)", "--group-size"),
    "07": ("--systems", "--split", "(default: 4.5)", "--allow-missing"),
}
SHOWN["01"] += ("Sec. 3.1",)
SHOWN["05"] += ("(default: 8)", "--no-human")


@pytest.fixture(params=STAGES)
def help_of(request, capsys, monkeypatch):
    """A stage's number and its help."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        stage(request.param).parse_args(["--help"])
    assert ended.value.code == 0
    return request.param, capsys.readouterr().out


def test_help_shows_every_flag_and_the_papers_numbers(help_of):
    number, text = help_of
    assert "--run-dir" in text and "default: None" not in text
    said(text, *SHOWN.get(number, ()))
    options = re.split(r"\n(?=  -)", text.split("options:")[1])[1:]
    bare = [x for x in options if not re.search(r"\S {2,}\S|\n {10,}\S", x.strip())]
    assert bare == []


def test_no_flag_is_or_abbreviates_one_of_torchruns(help_of):
    theirs = torch.distributed.run.get_args_parser()
    ours = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of[1])) - {"--help"}
    assert "--run-dir" in ours
    assert [flag for flag in ours if theirs._get_option_tuples(flag)] == []
    longer = tuple(x for x in theirs._option_string_actions if len(x) > 2)
    assert [flag for flag in ours if flag.startswith(longer)] == []
