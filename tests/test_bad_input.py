"""What a user can get wrong: one line on stderr that says where and what to do, exit code 2,
nothing lost."""

import pickle
import re
import shutil

import av
import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import ROOT, STAGES, Malicious, call, make_video, read, stage, start, stopped, write
from test_inputs import said

from common import files, ranks


def set_line(path, number, **changes):
    rows = read(path)
    rows[number - 1] = {
        key: value for key, value in {**rows[number - 1], **changes}.items() if value is not ...
    }
    write(path, rows)


# Missing and broken files
# ------------------------------------------------------------------------------------


def test_a_user_error_in_a_process_of_its_own_is_one_line_and_exit_code_2(tmp_path):
    started = start("05", tmp_path / "nowhere")
    error = started.communicate()[1]
    assert (started.returncode, error.count("\n")) == (2, 1) and error.startswith(
        "error: --run-dir"
    )


# Ratings and choices
# -----------------------------------------------------------------------------------------


@pytest.fixture
def unrated(run):
    """A run in which stages 02 and later have not run, and somebody's ratings."""
    rows = read(run / "02_ratings.jsonl")
    for path in run.glob("0[2-9]_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(run / "answers.jsonl", rows)
    return run


def test_all_wrong_ratings_are_listed_at_once_the_first_ten_in_full(unrated, refused):
    rows = read(unrated / "answers.jsonl")
    wrong = {"rating": "Great", "k": 9}
    write(unrated / "answers.jsonl", [row | wrong if i % 2 else row for i, row in enumerate(rows)])
    line = refused("02", unrated, "--ratings", unrated / "answers.jsonl")
    said(
        line,
        unrated / "answers.jsonl",
        "20 of 40 rows are wrong",
        *(f"line {i}," for i in range(2, 21, 2)),
        "...",
    )
    assert "line 22" not in line
    assert not (unrated / "02_ratings.jsonl").exists() and not (unrated / "02_scores").exists()


def test_ratings_from_elsewhere_stay_below_their_folder_and_beside_no_clip(
    unrated, tmp_path, refused
):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.wav").symlink_to(unrated / "01_audio" / "train00000_0.wav")
    shutil.copy(unrated / "00_videos" / "train00000.mp4", tmp_path / "root" / "a.mp4")
    rows = [
        dict(audio=name, video="a.mp4", rating="Good")
        for name in ("a.mp4", "link.wav", "../root/a.mp4")
    ]
    write(unrated / "b.jsonl", [*rows, rows[0] | {"clip": "train00000", "k": 0}])
    said(
        refused("02", unrated, "--ratings", unrated / "b.jsonl"),
        "4 of 4",
        "line 1",
        "'audio'",
        "--ratings-root",
    )
    line = refused(
        "02", unrated, "--ratings", unrated / "b.jsonl", "--ratings-root", tmp_path / "root"
    )
    said(
        line,
        "3 of 4",
        "line 2, field 'audio': 'link.wav' points outside",
        "line 3",
        "twice",
        "line 4",
        "both a clip",
    )
    assert not (unrated / "02_scores").exists()


# Chains of stages
# --------------------------------------------------------------------------------------------


def test_a_redone_audioscore_makes_the_later_stages_ask_for_theirs(run, refused):
    rows = read(run / "02_ratings.jsonl")
    set_line(run / "02_ratings.jsonl", 1, rating="Good" if rows[0]["rating"] != "Good" else "Bad")
    call("02", run, "--redo")
    for number in ("04", "05"):
        said(refused(number, run), "03_mine_pairs.py", "--redo")
    call("03", run, "--redo")
    said(refused("05", run), "04_curriculum_split.py", "--redo")
    call("04", run, "--redo")
    said(refused("05", run), "--out")


# Trainings
# --------------------------------------------------------------------------------------------------


def test_more_processes_than_the_batch_can_be_divided_over(run, refused, monkeypatch):
    monkeypatch.setattr(ranks, "setup", lambda: ranks.Ranks(0, 3))
    said(refused("05", run, "--out", "x"), "--global-batch 4", "3 processes")
    said(refused("06", run, "--out", "x"), "--prompts 2", "3 processes")


# Videos
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_videos(tmp_path):
    folder = tmp_path / "videos"
    make_video(folder / "good.mp4", (64, 64), 25, 2.2)
    make_video(folder / "short.mp4", (64, 64), 25, 0.8)
    (folder / "corrupt.mp4").write_bytes((folder / "good.mp4").read_bytes()[:700])
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").write_bytes(b"")
    shutil.copy(folder / "good.mp4", folder / "damaged.mp4")
    content = bytearray((folder / "good.mp4").read_bytes())
    content[len(content) // 3 :] = bytes(len(content) - len(content) // 3)
    (folder / "damaged.mp4").write_bytes(content)
    with (
        av.open(str(folder / "good.mp4")) as source,
        av.open(str(folder / "sound.mp4"), "w") as target,
    ):
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return folder


def test_unusable_videos_are_skipped_counted_and_listed(bad_videos, tmp_path, toy, capsys):
    call("01", tmp_path / "run", "--videos", bad_videos, *toy)
    skipped = {
        row["clip"]: row["reason"]
        for row in read(tmp_path / "run" / "01_samples" / "00000.skipped.jsonl")
    }
    assert skipped.keys() == {"short", "corrupt", "text", "empty", "sound", "damaged"}
    assert skipped["sound"] == "no video stream"
    assert skipped["short"].startswith("too short: 0.80 s")
    assert all("unreadable" in skipped[name] for name in ("corrupt", "text", "empty"))
    assert {row["clip"] for row in read(tmp_path / "run" / "01_samples" / "00000.jsonl")} == {
        "good"
    }
    assert "7 in, 1 used, 6 skipped" in capsys.readouterr().out


def test_a_title_in_latin_1_is_no_reason_and_frames_without_time_are(tmp_path, toy):
    (tmp_path / "videos").mkdir()
    for name, container in (("titled.mkv", "matroska"), ("raw.mp4", "h264")):
        with av.open(str(tmp_path / "videos" / name), "w", format=container) as target:
            target.metadata["title"] = "caf.."
            video = target.add_stream("libx264", rate=25)
            video.width = video.height = 64
            for _ in range(60):
                target.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
            target.mux(video.encode(None))
    titled = tmp_path / "videos" / "titled.mkv"
    assert b"caf.." in titled.read_bytes()
    titled.write_bytes(titled.read_bytes().replace(b"caf..", b"caf\xe9\xe9"))
    call("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy)
    assert {row["clip"] for row in read(tmp_path / "run/01_samples/00000.jsonl")} == {"titled"}
    (skipped,) = read(tmp_path / "run/01_samples/00000.skipped.jsonl")
    assert (skipped["clip"], skipped["reason"]) == ("raw", "frames without time stamps")


def test_unusable_videos_are_an_error_under_strict(bad_videos, tmp_path, toy, refused):
    said(
        refused("01", tmp_path / "run", "--videos", bad_videos, *toy, "--strict"),
        "--strict",
        "6 clips",
        "corrupt",
    )
    assert not (tmp_path / "run" / "01_samples" / "00000.jsonl").exists()


def test_a_list_without_a_single_usable_video(tmp_path, toy, refused):
    (tmp_path / "videos").mkdir()
    said(
        refused("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy),
        tmp_path / "videos",
        "no video",
    )
    (tmp_path / "videos" / "text.mp4").write_text("not a video")
    said(
        refused("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy),
        "no train clip",
        "skipped.jsonl",
    )


# Models and checkpoints
# --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(run, refused, monkeypatch):
    original, step = stage("05").train_step, []

    def breaking(*args):
        sums = original(*args)
        step.append(1)
        return (
            {name: value * float("nan") for name, value in sums.items()} if len(step) == 5 else sums
        )

    monkeypatch.setattr(stage("05"), "train_step", breaking)
    line = refused("05", run, "--out", "broken", "--save-every", 2)
    said(line, "step 4", "not finite", run / "broken" / "checkpoint.pt", "--lr")
    state = files.load_pt(run / "broken" / "checkpoint.pt")
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())
    assert (
        not (run / "broken" / "policy.pt").exists() and len(read(run / "broken" / "log.jsonl")) == 4
    )


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    run, refused, monkeypatch
):
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def infinite(parameters, bound):
        parameters = list(parameters)
        seen.append(1)
        if len(seen) == 3:
            parameters[0].grad.fill_(float("inf"))
        return clip(parameters, bound)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    said(
        refused("05", run, "--out", "broken", "--save-every", 1),
        "step 2",
        "not finite",
        "broken/checkpoint.pt",
    )
    state = files.load_pt(run / "broken" / "checkpoint.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_a_learning_rate_that_explodes_stops_with_finite_weights_kept(run, refused):
    line = refused("05", run, "--out", "broken", "--save-every", 1, "--lr", 1e9, "--warmup", 0)
    said(line, "not finite", run / "broken" / "checkpoint.pt")
    state = files.load_pt(run / "broken" / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["model"].values())


# Pickles
# --------------------------------------------------------------------------------------------------


def test_torch_load_occurs_once_with_weights_only_and_nothing_else_unpickles():
    rooms = ("", "adapters/", "plumbing/")
    sources = {
        p.name: p.read_text().splitlines() for room in rooms for p in ROOT.glob(f"{room}*.py")
    }
    (call,) = [
        (name, line) for name, lines in sources.items() for line in lines if "torch.load(" in line
    ]
    assert call[0] == "files.py" and "weights_only=True" in call[1]
    unsafe = re.compile(
        r"weights_only=False|pickle\.load|import pickle|np\.load\((?!.*allow_pickle=False)"
    )
    assert [name for name, lines in sources.items() if any(map(unsafe.search, lines))] == []


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
    assert {type(file[key]) for key in ("lr", "dtype")} == {files.Ignored} and torch.equal(
        file["weight"], torch.ones(2)
    )


def test_a_bare_malicious_pickle_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    assert str(tmp_path / "evil.pt") in stopped(files.load_pt, tmp_path / "evil.pt")
    assert not (tmp_path / "mark").exists()


# Help
# --------------------------------------------------------------------------------------------------

SHOWN = {
    "00": ("--size", "--seed"),
    "01": (
        "--num-samples",
        "(default: 5)",
        "(default: 4.5)",
        "(default: 50000)",
        "(default: 25)",
        "Sec. 3.1",
    ),
    "02": ("--num-rated-clips", "(default: 2000)", "Sec. 2.1"),
    "03": ("--num-human-pairs", "(default: 2000)", "(default: 0.0)", "Sec. 2.2"),
    "04": ("score_delta", "(default: 0.7)", "Tab. 2"),
    "05": (
        "(default: 600.0)",
        "(default: 5e-06)",
        "(default: 1000)",
        "(default: 12000)",
        "(default: 8)",
        "--no-human",
    ),
    "06": ("(default: 12000)", "(default: 5e-06)", "(default: 0.7)", "--group-size"),
    "07": ("--systems", "--split", "(default: 4.5)", "--allow-missing"),
}


@pytest.fixture
def help_of(capsys, monkeypatch):
    def show(number):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            stage(number).parse_args(["--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("number", STAGES)
def test_help_shows_every_flag_and_the_papers_numbers(number, help_of):
    text = help_of(number)
    assert "--run-dir" in text and "default: None" not in text
    said(text, *SHOWN.get(number, ()))
    options = re.split(r"\n(?=  -)", text.split("options:")[1])[1:]
    assert [
        option.strip()
        for option in options
        if not re.search(r"\S {2,}\S|\n {10,}\S", option.strip())
    ] == []


@pytest.mark.parametrize("number", STAGES)
def test_no_flag_is_or_abbreviates_one_of_torchruns(number, help_of):
    theirs = torch.distributed.run.get_args_parser()
    ours = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(number))) - {"--help"}
    assert (
        "--run-dir" in ours
        and {flag: found for flag in ours if (found := theirs._get_option_tuples(flag))} == {}
    )
    longer = [
        (flag, x)
        for flag in ours
        for x in theirs._option_string_actions
        if len(x) > 2 and flag.startswith(x)
    ]
    assert longer == []


def test_no_abbreviated_or_unknown_flag_passes_silently():
    for flags in (["--bta", "7"], ["--bet", "7"], ["--global", "4"], ["--beta", "high"]):
        assert flags[0] in stopped(stage("05").parse_args, flags)
