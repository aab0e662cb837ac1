"""Another run's AudioScore where nobody has rated: 02 --audioscore, and what the other stages do
with it."""

import contextlib
import io
import shutil

import pytest
import torch
from conftest import answer, call, cells, files_of, interrupted, read, results, said, write

import common
from common import AudioScore, files, inputs, ranks, record, scoring

TRAIN = 8  # clips; others are for testing


def scene(finished, place):
    """A list of the finished world's videos as anybody's, without truth or people."""
    clips = inputs.read_clips(finished, "train")[:TRAIN] + inputs.read_clips(finished, "test")[:4]
    about = ("id", "video", "caption", "label", "split")
    write(place / "clips.jsonl", [{name: getattr(clip, name) for name in about} for clip in clips])
    return "--clips", place / "clips.jsonl", "--videos", finished / "00_videos"


def flags_of(finished):
    return "--model", "toy", "--checkpoint", finished / "00_base.pt", "--num-samples", 3


@pytest.fixture(scope="module")
def unrated(finished, tmp_path_factory):
    """A run in which nobody has rated, from clips to the page; and {stage: what it printed}."""
    place = tmp_path_factory.mktemp("unrated")
    run, printed = place / "run", {}
    small = ("--steps", 2)
    for number, *flags in (
        ("01", *scene(finished, place), *flags_of(finished)),
        ("02", "--audioscore", finished / "02_audioscore.pt"),
        ("03",),
        ("04",),
        ("05", *small),
        ("06", *small),
        ("07",),
        ("08",),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            call(number, run, *flags)
        printed[number] = out.getvalue()
    return run, printed


@pytest.fixture
def prepared(unrated, tmp_path):
    """A copy of that run in which only stage 01 has run."""
    later = shutil.ignore_patterns("0[2-8]_*")
    return shutil.copytree(unrated[0], tmp_path / "run", ignore=later)


def test_it_is_the_other_runs_to_the_bit_and_no_accuracy_is_claimed(unrated, finished):
    run, printed = unrated
    said(printed["02"], "no held-out accuracy", "next: python 03_mine_pairs.py")
    theirs, ours = (files.load_pt(place / "02_audioscore.pt") for place in (finished, run))
    assert ours.keys() == {"audioscore", "weights"} and ours["weights"] == theirs["weights"]
    assert ours["audioscore"].keys() == theirs["audioscore"].keys()
    for name, value in ours["audioscore"].items():
        assert torch.equal(value, theirs["audioscore"][name])
    assert read(run / "02_scores.jsonl") == []
    assert not (run / "02_ratings.jsonl").exists() and not (run / "02_to_rate.csv").exists()


def test_every_clip_is_mined_by_it_and_nobody_is_asked_to_choose(unrated, finished):
    run, printed = unrated
    said(printed["03"], f"clips: {TRAIN} in", "none of this run's own clips is rated")
    assert "people rated" not in printed["03"] and cells(run / "03_to_choose.csv") == []
    samples = inputs.read_samples(run)
    scorers = common.scorers_of(run, "weights")
    blocks = inputs.shard_blocks(run, samples, inputs.read_clips(run, "train"))
    judge = AudioScore.load(finished / "02_audioscore.pt")
    heard = scorers.audioscore_inputs(scoring.read_scores(blocks, scorers, scorers.of_audioscore))
    p = judge(judge.five_scores(heard)).tolist()
    assert [row["p"] for row in read(run / "03_scores/00000.jsonl")] == p and len(p) == 3 * TRAIN
    assert read(run / "03_pairs.jsonl") and read(run / "03_human_pairs.jsonl") == []
    assert {pair["source"] for pair in read(run / "04_stage2.jsonl")} <= {"auto"}


def test_its_p_good_is_ddpos_reward_and_a_metric_and_the_page_shows_no_calibration(
    unrated, finished
):
    run, _ = unrated
    assert all(0 < step["reward"] < 1 for step in read(run / "06_ddpo/log.jsonl"))
    found = results(run)
    for system in ("ground_truth", "base", "flow_dpo", "ddpo"):
        assert 0 < found[system, "p_good"]["value"] < 1 and found[system, "p_good"]["n"] == 4
    assert found["base", "win_rate"]["value"] == 0.5
    assert "AudioScore was not fitted here" not in (run / "08_report.html").read_text()


def test_a_run_without_train_clips_gets_p_good_from_it(finished, tmp_path, capsys):
    run = tmp_path / "run"
    call("01", run, *scene(finished, tmp_path), *flags_of(finished), "--max-clips", 0)
    call("02", run, "--audioscore", finished / "02_audioscore.pt")
    assert f"next: python 07_evaluate.py --run-dir {run}" in capsys.readouterr().out
    call("07", run, "--systems", "ground_truth", "base")
    assert {metric for _, metric in results(run)} >= {"p_good", "win_rate"}


def test_killed_before_it_is_written_and_repeated_it_is_the_same_and_so_from_two_ranks(
    unrated, finished, prepared, monkeypatch
):
    taken = ("--audioscore", finished / "02_audioscore.pt")
    whole = files_of(unrated[0], "02_")
    with interrupted(files, "save_pt"):
        call("02", prepared, *taken)
    assert not (prepared / "02_audioscore.pt").exists()
    for _ in range(2):
        call("02", prepared, *taken)
        assert files_of(prepared, "02_") == whole
    monkeypatch.setattr(ranks, "setup", lambda part: ranks.Ranks(1, 2))
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    (prepared / "02_audioscore.pt").unlink()
    call("02", prepared, *taken)  # the second of two processes writes nothing
    assert files_of(prepared, "02_").keys() == whole.keys() - {"02_audioscore.pt"}


def test_another_file_needs_redo_and_then_the_later_stages_ask_for_theirs(
    unrated, finished, prepared, tmp_path, refused
):
    other = files.load_pt(finished / "02_audioscore.pt")
    other["audioscore"]["mlp.2.bias"] += 1
    files.save_pt(tmp_path / "other.pt", other)
    run = shutil.copytree(unrated[0], tmp_path / "copy")
    line = refused("02", run, "--audioscore", tmp_path / "other.pt")
    said(line, "02_settings.json: made with audioscore_file=", "use --redo")
    call("02", run, "--audioscore", tmp_path / "other.pt", "--redo")
    said(refused("04", run), "rerun 03_mine_pairs.py", "--redo")


def test_one_of_another_number_of_tags_is_refused_where_it_is_first_used(
    finished, prepared, tmp_path, refused
):
    """Which no file of another tagger comes to: its digest differs."""
    other = files.load_pt(finished / "02_audioscore.pt")
    other["audioscore"]["p_y"] = torch.full((3,), 1 / 3)
    files.save_pt(tmp_path / "other.pt", other)
    call("02", prepared, "--audioscore", tmp_path / "other.pt")
    said(refused("03", prepared), "02_audioscore.pt: fitted with another tagger", "--redo")


def test_own_ratings_may_take_its_place_and_rated_clips_are_then_not_mined(
    finished, prepared, tmp_path, refused, capsys
):
    call("02", prepared, "--audioscore", finished / "02_audioscore.pt")
    before = files_of(prepared, "02_audioscore", "02_settings")
    call("02", prepared, "--num-rated-clips", 2)  # the sheet, and nothing else
    said(capsys.readouterr().out, "--num-rated-clips 2 --ratings FILE\n")
    assert files_of(prepared, "02_audioscore", "02_settings") == before
    ratings = dict(enumerate(["Good", "Bad", "Medium"] * 2))
    answer(prepared / "02_to_rate.csv", tmp_path / "rated.csv", "rating", ratings)
    own = ("--num-rated-clips", 2, "--ratings", tmp_path / "rated.csv")
    said(refused("02", prepared, *own), "audioscore_file=", "now None; use --redo")
    call("02", prepared, *own, "--redo")
    capsys.readouterr()
    call("03", prepared)
    assert "2 are set aside, since people rated them" in capsys.readouterr().out
    record.follow(prepared, ["02_audioscore.pt"])
