"""What a user can get wrong: one line on stderr that says where and what to do, exit code 2, nothing lost."""

import json
import pickle
import re
import shutil

import av
import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import ROOT, STAGES, Malicious, call, files_of, make_video, read, stage, start, stopped, write

import common


def said(line, *parts):
    """The line names all of these."""
    assert [part for part in map(str, parts) if part not in line] == [], line


def set_line(path, number, **changes):
    rows = read(path)
    rows[number - 1] = {key: value for key, value in {**rows[number - 1], **changes}.items() if value is not ...}
    write(path, rows)


# Missing and broken files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(STAGES)[1:])
def test_a_missing_run(number, tmp_path, refused):
    said(refused(number, tmp_path / "nowhere"), tmp_path / "nowhere", "--model" if number == "01" else "01")
    assert not (tmp_path / "nowhere").exists()


def test_a_user_error_in_a_process_of_its_own_is_one_line_and_exit_code_2(tmp_path):
    started = start("05", tmp_path / "nowhere")
    error = started.communicate()[1]
    assert (started.returncode, error.count("\n")) == (2, 1) and error.startswith("error: --run-dir")


NEEDED = {
    "01": ("00_base.pt", "clips.jsonl"),
    "02": ("01_samples/00000.jsonl", "00_scorers.pt"),
    "03": ("02_audioscore.pt", "02_ratings.jsonl", "01_samples/00000.jsonl"),
    "04": ("03_pairs.jsonl", "03_human_pairs.jsonl"),
    "05": ("04_stage1.jsonl", "04_stage2.jsonl", "01_samples/00000.pt", "00_base.pt"),
    "06": ("02_audioscore.pt",),
    "07": ("clips.jsonl", "05_flow_dpo/policy.pt", "05_flow_dpo/policy.json"),
}


@pytest.mark.parametrize("number, name", [(number, name) for number, names in NEEDED.items() for name in names])
def test_a_missing_input(number, name, run, refused):
    for path in run.glob(f"{number}_*"):  # the stage runs anew
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / name).unlink()
    kept = files_of(run, *STAGES)
    said(refused(number, run), name.split("/")[0])
    now = files_of(run, *STAGES)
    assert {key: now.get(key) for key in kept} == kept


def test_a_line_separator_inside_a_caption_ends_no_line(tmp_path):
    rows = [{"caption": "a\u2028b\x85c"}, {"caption": "d"}]
    common.write_jsonl(tmp_path / "x.jsonl", rows)
    assert common.read_jsonl(tmp_path / "x.jsonl", {"caption": common.TEXT}) == rows


def test_a_blank_line_is_named_and_trailing_ones_do_not_matter(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\r\n{"a": 2}\r\n\n')
    assert common.read_jsonl(tmp_path / "x.jsonl", {"a": common.INDEX}) == [{"a": 1}, {"a": 2}]
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"b": 2}\n')
    assert "x.jsonl, line 2: not valid JSON" in stopped(common.read_jsonl, tmp_path / "x.jsonl", {"a": common.INDEX})


# Ratings and choices -----------------------------------------------------------------------------------------


@pytest.fixture
def unrated(run):
    """A run in which stages 02 and later have not run, and somebody's ratings."""
    rows = read(run / "02_ratings.jsonl")
    for path in (*run.glob("0[2-9]_*"), run / "scores"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(run / "answers.jsonl", rows)
    return run


def test_all_wrong_ratings_are_listed_at_once_the_first_ten_in_full(unrated, refused):
    rows = read(unrated / "answers.jsonl")
    wrong = {"rating": "Great", "k": 9}
    write(unrated / "answers.jsonl", [row | wrong if i % 2 else row for i, row in enumerate(rows)])
    line = refused("02", unrated, "--ratings", unrated / "answers.jsonl")
    said(line, unrated / "answers.jsonl", "20 of 40 rows are wrong", *(f"line {i}," for i in range(2, 21, 2)), "...")
    assert "line 22" not in line and not (unrated / "02_ratings.jsonl").exists() and not (unrated / "scores").exists()


def test_a_rating_given_twice_by_one_rater_names_both_lines(unrated, refused):
    rows = read(unrated / "answers.jsonl")
    write(unrated / "answers.jsonl", [*rows, rows[2]])
    line = refused("02", unrated, "--ratings", unrated / "answers.jsonl")
    said(line, f"line {len(rows) + 1}", rows[2]["clip"], "twice", "line 3")


def test_an_answer_given_in_two_files_by_one_rater_names_both(unrated, refused):
    first, second = read(unrated / "answers.jsonl")[:20], read(unrated / "answers.jsonl")[20:]
    write(unrated / "answers.jsonl", first)
    write(unrated / "b.jsonl", [*second, first[4] | {"repeat": 1}, first[4], first[4] | {"rater": "another"}])
    line = refused("02", unrated, "--ratings", unrated / "answers.jsonl", unrated / "b.jsonl")
    said(line, "1 of 43 rows", f"{unrated / 'b.jsonl'}, line 22", "twice", f"{unrated / 'answers.jsonl'}, line 5")


def test_ratings_from_elsewhere_stay_below_their_folder_and_beside_no_clip(unrated, tmp_path, refused):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.wav").symlink_to(unrated / "01_audio" / "train00000_0.wav")
    shutil.copy(unrated / "00_videos" / "train00000.mp4", tmp_path / "root" / "a.mp4")
    rows = [dict(audio=name, video="a.mp4", rating="Good") for name in ("a.mp4", "link.wav", "../root/a.mp4")]
    write(unrated / "b.jsonl", [*rows, rows[0] | {"clip": "train00000", "k": 0}])
    said(refused("02", unrated, "--ratings", unrated / "b.jsonl"), "4 of 4", "line 1", "'audio'", "--ratings-root")
    line = refused("02", unrated, "--ratings", unrated / "b.jsonl", "--ratings-root", tmp_path / "root")
    said(line, "3 of 4", "line 2, field 'audio': 'link.wav' points outside", "line 3", "twice", "line 4", "both a clip")
    assert not (unrated / "scores").exists()


def test_a_rater_to_exclude_who_has_not_answered_is_named(run, refused):
    for number in ("02", "03"):
        said(refused(number, run, "--exclude-rater", "bob", "--redo"), "--exclude-rater bob", "simulated")
    said(refused("02", run, "--exclude-rater", "simulated", "--redo"), "at least 2")


@pytest.mark.parametrize("name", ["nobody.csv", "nobody.jsonl", "01_samples"])
def test_a_file_of_ratings_that_does_not_exist(name, unrated, refused):
    said(refused("02", unrated, "--ratings", unrated / name), unrated / name, "no such file")


def test_an_empty_sheet_of_ratings(unrated, refused):
    (unrated / "rated.csv").write_text("clip,k,rating\ntrain00000,0,\n")
    said(refused("02", unrated, "--ratings", unrated / "rated.csv"), unrated / "rated.csv", "no rating")


def test_ratings_of_one_clip_cannot_be_checked_on_another(unrated, refused):
    write(unrated / "answers.jsonl", read(unrated / "answers.jsonl")[:5])
    said(refused("02", unrated, "--ratings", unrated / "answers.jsonl"), "answers.jsonl", "one video", "at least 2")


def test_other_ratings_than_the_run_has_need_redo(run, refused):
    write(run / "other.jsonl", read(run / "02_ratings.jsonl")[:-1])
    said(refused("02", run, "--ratings", run / "other.jsonl"), run / "other.jsonl", "--redo")


def test_a_comparison_answered_twice_by_one_rater(run, refused):
    rows = read(run / "03_human_choices.jsonl")
    turned = {**rows[0], "a": rows[0]["b"], "b": rows[0]["a"]}
    write(run / "answers.jsonl", [*rows, turned])
    line = refused("03", run, "--choices", run / "answers.jsonl", "--redo")
    said(line, f"line {len(rows) + 1}", "twice", "line 1")


# Chains of stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["03", "04", "05", "06", "07"])
def test_ratings_changed_after_stage_02_name_the_stage_to_rerun(number, run, refused):
    rows = read(run / "02_ratings.jsonl")
    set_line(run / "02_ratings.jsonl", 1, rating="Good" if rows[0]["rating"] != "Good" else "Bad")
    said(refused(number, run), run / "02_ratings.jsonl", "changed", "02_fit_audioscore.py", "--redo")


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


CHANGED = [
    ("00", ("--size", "tiny", "--seed", 1), "seed"),
    ("01", ("--guidance", 3), "sampler"),
    ("01", ("--seed", 4), "seed"),
    ("01", ("--num-samples", 4), "num_samples"),
    ("02", ("--num-rated-clips", 7), "num_rated_clips"),
    ("03", ("--min-score-c", 0.1), "min_score_c"),
    ("04", ("--threshold", 0.11), "threshold"),
    ("05", ("--beta", 7), "beta"),
    ("05", ("--hard-first",), "hard_first"),
    ("06", ("--lr", 1), "lr"),
]


@pytest.mark.parametrize("number, flags, field", CHANGED)
def test_changed_settings_on_an_existing_folder(number, flags, field, run, refused):
    kept = files_of(run, *STAGES, "ru", "cl")
    line = refused(number, run, *flags)
    said(line, f"{field}=", "now")
    assert re.search(r"use (--redo|another --(run-dir|out))", line), line
    now = files_of(run, *STAGES, "ru", "cl")
    assert {name for name in kept if now.get(name) != kept[name]} <= {"02_to_rate.csv", "03_to_choose.csv"}


# Trainings ---------------------------------------------------------------------------------------------------


def test_a_policy_whose_training_has_not_finished(run, refused):
    (run / "05_flow_dpo").rename(run / "05_mine")
    (run / "05_mine" / "policy.json").unlink()
    said(refused("07", run, "--systems", "mine=05_mine"), run / "05_mine", "not finished")


def test_more_processes_than_the_batch_can_be_divided_over(run, refused, monkeypatch):
    monkeypatch.setattr(common, "setup_ranks", lambda: common.Ranks(0, 3))
    said(refused("05", run, "--out", "x"), "--global-batch 4", "3 processes")
    said(refused("06", run, "--out", "x"), "--prompts 2", "3 processes")


# Videos ------------------------------------------------------------------------------------------------------


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
    with av.open(str(folder / "good.mp4")) as source, av.open(str(folder / "sound.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return folder


def test_unusable_videos_are_skipped_counted_and_listed(bad_videos, tmp_path, toy, capsys):
    call("01", tmp_path / "run", "--videos", bad_videos, *toy)
    skipped = {row["clip"]: row["reason"] for row in read(tmp_path / "run" / "01_samples" / "00000.skipped.jsonl")}
    assert skipped.keys() == {"short", "corrupt", "text", "empty", "sound", "damaged"}
    assert skipped["sound"] == "no video stream"
    assert skipped["short"].startswith("too short: 0.80 s")
    assert all("unreadable" in skipped[name] for name in ("corrupt", "text", "empty"))
    assert {row["clip"] for row in read(tmp_path / "run" / "01_samples" / "00000.jsonl")} == {"good"}
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
    said(refused("01", tmp_path / "run", "--videos", bad_videos, *toy, "--strict"), "--strict", "6 clips", "corrupt")
    assert not (tmp_path / "run" / "01_samples" / "00000.jsonl").exists()


def test_a_list_without_a_single_usable_video(tmp_path, toy, refused):
    (tmp_path / "videos").mkdir()
    said(refused("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy), tmp_path / "videos", "no video")
    (tmp_path / "videos" / "text.mp4").write_text("not a video")
    said(refused("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy), "no train clip", "skipped.jsonl")


def test_a_toy_checkpoint_without_its_scorers_beside_it(tmp_path, toy, refused):
    make_video(tmp_path / "videos" / "good.mp4", (64, 64), 25, 2.2)
    shutil.copy(toy[3], tmp_path / "00_base.pt")
    flags = ("--model", "toy", "--checkpoint", tmp_path / "00_base.pt", "--videos", tmp_path / "videos")
    said(refused("01", tmp_path / "run", *flags), tmp_path / "00_base.pt", "00_scorers.pt", "beside it")


def test_a_video_path_that_leaves_the_root_after_stage_01(run, refused):
    set_line(run / "clips.jsonl", 1, video="../00_base.pt")
    said(refused("06", run), run / "clips.jsonl", "line 1", "'video'", "../00_base.pt")


# Models and checkpoints --------------------------------------------------------------------------------------


def test_a_policy_of_another_model(run, refused):
    about = json.loads((run / "05_flow_dpo" / "policy.json").read_text())
    for changes in ({"model": "frieren"}, {"base_digest": "0123456789abcdef"}):
        (run / "05_flow_dpo" / "policy.json").write_text(json.dumps({**about, **changes}))
        said(refused("07", run), run / "05_flow_dpo", "another base")


def test_weights_of_another_model_are_refused_as_policy_and_as_base(run, refused, tmp_path):
    shutil.rmtree(run / "07_audio" / "flow_dpo")
    common.save_pt(run / "05_flow_dpo" / "policy.pt", {"weight": torch.zeros(3)})
    said(refused("07", run), run / "05_flow_dpo" / "policy.pt", "not the file that was written here")
    common.save_pt(tmp_path / "00_base.pt", {"weight": torch.zeros(3)})
    flags = ("--model", "toy", "--checkpoint", tmp_path / "00_base.pt", "--videos", run / "00_videos")
    said(refused("01", tmp_path / "new", *flags), tmp_path / "00_base.pt", "not a toy base")


def test_another_base_than_stage_01_sampled_from(run, refused):
    base = common.load_pt(run / "00_base.pt")
    base["net"]["out.bias"] += 1
    common.save_pt(run / "00_base.pt", base)
    said(refused("05", run, "--out", "x"), run / "00_base.pt", "stage 01")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(run, refused, monkeypatch):
    original, step = stage("05").train_step, []

    def breaking(*args):
        sums = original(*args)
        step.append(1)
        return sums * float("nan") if len(step) == 5 else sums

    monkeypatch.setattr(stage("05"), "train_step", breaking)
    line = refused("05", run, "--out", "broken", "--save-every", 2)
    said(line, "step 4", "not finite", run / "broken" / "checkpoint.pt", "--lr")
    state = common.load_pt(run / "broken" / "checkpoint.pt")
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())
    assert not (run / "broken" / "policy.pt").exists() and len(read(run / "broken" / "log.jsonl")) == 4


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(run, refused, monkeypatch):
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def infinite(parameters, bound):
        parameters = list(parameters)
        seen.append(1)
        if len(seen) == 3:
            parameters[0].grad.fill_(float("inf"))
        return clip(parameters, bound)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    said(refused("05", run, "--out", "broken", "--save-every", 1), "step 2", "not finite", "broken/checkpoint.pt")
    state = common.load_pt(run / "broken" / "checkpoint.pt")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_a_learning_rate_that_explodes_stops_with_finite_weights_kept(run, refused):
    line = refused("05", run, "--out", "broken", "--save-every", 1, "--lr", 1e9, "--warmup", 0)
    said(line, "not finite", run / "broken" / "checkpoint.pt")
    state = common.load_pt(run / "broken" / "checkpoint.pt")
    assert all(value.isfinite().all() for value in state["model"].values())


# Pickles -----------------------------------------------------------------------------------------------------


def test_torch_load_occurs_once_with_weights_only_and_nothing_else_unpickles():
    rooms = ("", "adapters/", "plumbing/")
    sources = {p.name: p.read_text().splitlines() for room in rooms for p in ROOT.glob(f"{room}*.py")}
    (call,) = [(name, line) for name, lines in sources.items() for line in lines if "torch.load(" in line]
    assert call[0] == "files.py" and "weights_only=True" in call[1]
    unsafe = re.compile(r"weights_only=False|pickle\.load|import pickle|np\.load\((?!.*allow_pickle=False)")
    assert [name for name, lines in sources.items() if any(map(unsafe.search, lines))] == []


@pytest.mark.parametrize("name", ["00_base.pt", "02_audioscore.pt", "05_flow_dpo/checkpoint.pt", "01_samples/00000.pt"])
def test_a_malicious_pickle_is_refused_and_not_run(name, run, refused):
    for path in run.glob("05_flow_dpo/policy.*"):
        path.unlink()
    torch.save({"audioscore": Malicious(run / "mark")}, run / name)
    number = "06" if name == "02_audioscore.pt" else "05"
    flags = () if "checkpoint" in name else ("--out", "x")
    said(refused(number, run, *flags), run / name, "plain tensors" if number == "05" else "not the file")
    assert not (run / "mark").exists()


class Scalar:
    """What a numpy scalar is in a pickle: a function of numpy's and its arguments."""

    build = None

    def __reduce__(self):
        return self.build, (np.dtype("f8"), np.float64(0.1).tobytes())


class Crafted:
    """A file whose numpy dtype gets a state, and whose array a shape, of the attacker's choice."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "<", None, None, None, -1, -1, 0)


@pytest.mark.parametrize("ignore", [(), common.NUMPY], ids=["refused", "left out"])
@pytest.mark.parametrize("core", ["core", "_core"], ids=["numpy 1", "numpy 2"])
def test_a_numpy_object_of_a_third_party_file_is_never_built(core, ignore, tmp_path, monkeypatch):
    def scalar(*_):
        """Pickled by the name that this numpy gives its own."""

    scalar.__module__, scalar.__qualname__ = f"numpy.{core}.multiarray", "scalar"
    monkeypatch.setattr(f"{scalar.__module__}.scalar", scalar)
    monkeypatch.setattr(Scalar, "build", staticmethod(scalar))
    torch.save({"weight": torch.ones(2), "lr": Scalar(), "dtype": Crafted()}, tmp_path / "x.pt")
    monkeypatch.setattr(common.Ignored, "__init__", lambda self, *args: None)
    if not ignore:
        assert "plain tensors (it holds numpy" in stopped(common.load_pt, tmp_path / "x.pt")
        return
    file = common.load_pt(tmp_path / "x.pt", ignore=ignore)
    assert {type(file[key]) for key in ("lr", "dtype")} == {common.Ignored} and torch.equal(
        file["weight"], torch.ones(2)
    )


def test_a_bare_malicious_pickle_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    assert str(tmp_path / "evil.pt") in stopped(common.load_pt, tmp_path / "evil.pt")
    assert not (tmp_path / "mark").exists()


# Help --------------------------------------------------------------------------------------------------------

SHOWN = {
    "00": ("--size", "--seed"),
    "01": ("--num-samples", "(default: 5)", "(default: 4.5)", "(default: 50000)", "(default: 25)", "Sec. 3.1"),
    "02": ("--num-rated-clips", "(default: 2000)", "Sec. 2.1"),
    "03": ("--num-human-pairs", "(default: 2000)", "(default: 0.0)", "Sec. 2.2"),
    "04": ("score_delta", "(default: 0.7)", "Tab. 2"),
    "05": ("(default: 600.0)", "(default: 5e-06)", "(default: 1000)", "(default: 12000)", "(default: 8)", "--no-human"),
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
    assert [option.strip() for option in options if not re.search(r"\S {2,}\S|\n {10,}\S", option.strip())] == []


@pytest.mark.parametrize("number", STAGES)
def test_no_flag_is_or_abbreviates_one_of_torchruns(number, help_of):
    theirs = torch.distributed.run.get_args_parser()
    ours = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(number))) - {"--help"}
    assert "--run-dir" in ours and {flag: found for flag in ours if (found := theirs._get_option_tuples(flag))} == {}
    longer = [(flag, x) for flag in ours for x in theirs._option_string_actions if len(x) > 2 and flag.startswith(x)]
    assert longer == []


def test_no_abbreviated_or_unknown_flag_passes_silently():
    for flags in (["--bta", "7"], ["--bet", "7"], ["--global", "4"], ["--beta", "high"]):
        assert flags[0] in stopped(stage("05").parse_args, flags)
