"""The store of scores: what a score depends on, that nothing is scored twice or lost, and that ranks divide it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROBABILITIES, ROOT, SCORES, call, close, files_of, read, same_rows, stage, torchrun

import common

FIVE = set(common.AUDIOSCORE_SCORERS)
LOOK = {"imagebind", "synchformer", "pesq"}  # what looks at the video, or listens to its sound


# Keys --------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path, finished):
    """The keys of one audio by scorer, after changes to it. Nobody could decode the files of this run."""
    about = dict(json.loads((finished / "run.json").read_text()), scorers_root=".")
    (tmp_path / "run.json").write_text(json.dumps(about))
    for name in ("00_scorers.pt", "x.mp4"):
        (tmp_path / name).write_bytes(b"12345")

    def of(digest="0123", wav="a.wav", group="00000", **changes):
        clip = {"id": "x", "caption": "a dog", "label": "dog barking", "path": tmp_path / "x.mp4", **changes}
        audio = common.Audio(clip, tmp_path / wav, digest, group)
        return {name: common.score_keys(tmp_path, [audio], name, "weights")[0] for name in FIVE}

    return of


@pytest.mark.parametrize("changes, anew", [
    (dict(digest="4567"), FIVE), (dict(caption="a cat"), {"clap"}), (dict(caption=None), {"clap"}),
    (dict(label="meowing"), {"pesq"}), (dict(id="y"), set()), (dict(group="test_00000"), set()),
    (dict(wav="b.wav"), set()), (dict(split="val"), set()),
])  # fmt: skip
def test_a_key_changes_with_what_its_score_depends_on_and_with_nothing_else(changes, anew, keys):
    before, after = keys(), keys(**changes)
    assert len(set(before.values())) == 5
    assert {name for name in FIVE if before[name] != after[name]} == anew


@pytest.mark.parametrize("name, content, later_s, anew", [
    ("00_scorers.pt", b"54321", 1, FIVE), ("00_scorers.pt", b"12345", 1, set()),  # the same weights, downloaded again
    ("x.mp4", b"123456", 0, LOOK), ("x.mp4", b"12345", 1, LOOK), ("x.mp4", b"54321", 0, set()),  # nobody has looked
])  # fmt: skip
def test_weights_are_known_by_content_and_videos_by_size_and_time(name, content, later_s, anew, keys, tmp_path):
    before, time_ns = keys(), (tmp_path / name).stat().st_mtime_ns + later_s * 10**9
    (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / name, ns=(time_ns, time_ns))
    after = keys()
    assert {scorer for scorer in FIVE if before[scorer] != after[scorer]} == anew


# Nothing twice -----------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch):
    """(scorer, digest) of every audio that a network hears."""
    heard, original = [], common.Scorer.__call__

    def listen(scorer, waves, *rest):
        heard.extend((type(scorer).__name__, common.digest_of(wave.tolist())) for wave in waves)
        return original(scorer, waves, *rest)

    monkeypatch.setattr(common.Scorer, "__call__", listen)
    return heard


def scores(run):
    return {name: (run / name).read_bytes() for name in ("02_scores.jsonl", "03_scores/00000.jsonl", "03_pairs.jsonl")}


def test_stage_03_scores_only_what_stage_02_did_not(run, finished, heard):
    shutil.rmtree(run / "scores")
    call("02", run)
    assert len(heard) == 5 * 8 * 5  # clips, audios, scorers
    call("03", run)
    assert len(heard) == len(set(heard)) == 20 * 5 * 5
    assert scores(run) == scores(finished)


def test_the_same_audio_of_two_systems_is_scored_once(run, heard, tmp_path):
    shutil.copytree(run / "07_audio" / "base", tmp_path / "twin")
    shutil.rmtree(run / "scores")
    call("07", run, "--only", "--systems", "base", f"twin={tmp_path / 'twin'}")
    assert len(heard) == len(set(heard)) == 8 * 6
    value = {(row["system"], row["metric"]): row["value"] for row in read(run / "07_results.jsonl")}
    assert value["twin", "ib"] == value["base", "ib"] and value["twin", "is"] == value["base", "is"]


def test_what_is_scored_needs_neither_audio_nor_video_nor_weights_again(run, finished, monkeypatch):
    call("03", run)  # the weights have another place than in the run that this is a copy of
    shutil.rmtree(run / "01_audio")
    for file in (run / "00_scorers.pt", *(run / "00_videos").iterdir()):
        about = file.stat()
        file.write_bytes(bytes(about.st_size))
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.delattr(common, "store_of")  # nor the store's lock, with a look through its thousands of files
        for number in ("02", "03"):
            call(number, run, "--redo")
    assert scores(run) == scores(finished)
    call("07", run, "--only", "--systems", "base")
    ours, theirs = ({row["metric"]: row["value"] for row in read(place / "07_results.jsonl") if row["system"] == "base"}
                    for place in (run, finished))  # fmt: skip
    assert ours == {metric: theirs[metric] for metric in ours} and {"ib", "clap", "is", "p_good"} <= ours.keys()


def test_other_weights_score_anew_and_the_old_ones_are_not_forgotten(run, finished, heard):
    whole = (run / "00_scorers.pt").read_bytes()
    state = common.load_pt(run / "00_scorers.pt")
    state["panns"]["head.bias"][0] += 3
    common.save_pt(run / "00_scorers.pt", state)
    call("03", run)
    assert len(heard) == len(set(heard)) == 20 * 5 * 5
    ours, theirs = (read(place / "03_scores" / "00000.jsonl") for place in (run, finished))
    assert close([row["ib"] for row in ours], [row["ib"] for row in theirs], SCORES)  # beside other audios this time
    assert all(a["is_nats"] != b["is_nats"] for a, b in zip(ours, theirs))
    (run / "00_scorers.pt").write_bytes(whole)
    call("03", run)
    assert len(heard) == 20 * 5 * 5 and scores(run) == scores(finished)


# Failures ----------------------------------------------------------------------------------------------------


def test_a_video_that_cannot_be_read_leaves_no_score_behind(run, finished, capsys):
    samples, clip = common.read_samples(run), common.read_clips(run, "train")[0]
    audios = [common.Audio(clip, run / row["wav"], row["digest"], row["shard"]) for row in samples[clip["id"]]]
    names, whole, about = ("imagebind", "panns"), clip["path"].read_bytes(), clip["path"].stat()
    expected = common.stored_scores(finished, audios, names, "weights")

    def stored(content):
        clip["path"].write_bytes(content)
        os.utime(clip["path"], ns=(about.st_atime_ns, about.st_mtime_ns))
        common.fill_store(run, audios, names, "weights")
        return common.stored_scores(run, audios, names, "weights")

    shutil.rmtree(run / "scores")
    broken = stored(bytes(len(whole)))
    assert f"{clip['id']}: unreadable video" in capsys.readouterr().err
    assert broken["imagebind"]["ib"].isnan().all()
    assert close(broken["panns"]["logits"], expected["panns"]["logits"], SCORES)  # of 5 audios, and of 20
    assert not (run / "scores" / "00000.imagebind.pt").exists()
    assert close(stored(whole)["imagebind"]["ib"], expected["imagebind"]["ib"], SCORES)


def test_a_video_moved_away_while_scoring_stops_the_stage_and_back_again_nothing_is_lost(
    run, finished, refused, monkeypatch
):
    shutil.rmtree(run / "scores")
    moved = common.read_clips(run, "train")[1]["path"]
    original = common.read_frames

    def read_frames(path, *rest):
        if path == moved:
            moved.rename(run / "moved.mp4")
        return original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(common, "read_frames", read_frames)
        line = refused("03", run)
    assert f"{moved}: gone" in line and "same command again" in line
    (run / "moved.mp4").rename(moved)
    call("03", run)
    call("02", run)
    for name in ("02_scores.jsonl", "03_scores/00000.jsonl"):  # no pairs: rounding could turn a tie
        assert same_rows(read(run / name), read(finished / name), PROBABILITIES)


def test_what_was_heard_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    heard, original = [], common.decode_audio
    monkeypatch.setattr(common, "decode_audio", lambda path, *rest: heard.append(path) or original(path, *rest))
    one, two = tmp_path / "one.wav", tmp_path / "two.wav"
    for path in (one, two):
        common.write_audio(path, torch.full((800,), 0.5), 8000)
    listen = lambda *paths: common.listen(tmp_path, paths, 1.0, common.Ranks())  # noqa: E731
    assert listen(one) == {one: pytest.approx(0.5, abs=1e-4)} and listen(two) and heard == [one, two]
    assert list(listen(one, two)) == [one, two] and heard == [one, two]  # two splits in turn
    common.write_audio(two, torch.full((900,), 0.25), 8000)
    assert listen(one, two)[two] == pytest.approx(0.25, abs=1e-4) and heard == [one, two, two]
    two.write_text("no sound")
    assert listen(one, two)[two] is None and listen(two) == {two: None} and len(heard) == 5  # asked again


# Ranks and workers -------------------------------------------------------------------------------------------


def test_a_video_is_decoded_once_for_model_and_towers_and_never_again(run, monkeypatch):
    for name in ("scores", "07_audio"):
        shutil.rmtree(run / name)
    decoded, original = [], common.read_frames
    monkeypatch.setattr(common, "read_frames", lambda path, *rest: decoded.append(path) or original(path, *rest))
    for number, flags in (
        ("02", ("--redo",)),
        ("03", ("--redo",)),
        ("06", ("--out", "again", "--steps", 2)),
        ("07", ()),
    ):
        call(number, run, "--workers", 0, *flags)
    assert sorted(decoded) == sorted(
        clip["path"] for split in ("test", "train") for clip in common.read_clips(run, split)
    )
    call("07", run, "--workers", 0, "--systems", "again")
    assert len(decoded) == len({*decoded})


def test_bytes_do_not_depend_on_the_workers_and_an_error_of_one_is_the_clips_own_reason(fresh):
    broken = next(clip for clip in read(fresh / "clips.jsonl") if clip["split"] == "train")
    (fresh / "00_videos" / broken["video"]).write_bytes(bytes(1000))
    two = shutil.copytree(fresh, fresh.with_name("two"))
    for place, workers in ((fresh, 0), (two, 2)):
        call("01", place, "--sampling-steps", 2, "--num-samples", 2, "--workers", workers)
        call("02", place, "--num-rated-clips", 4, "--workers", workers)
        call("07", place, "--only", "--systems", "base", "--workers", workers)
    names = ("01_samples", "01_audio", "02_scores", "scores/0", "scores/test", "07_audio", "07_results")
    assert files_of(two, *names) == files_of(fresh, *names)
    (skipped,) = read(two / "01_samples/00000.skipped.jsonl")
    assert skipped["clip"] == broken["id"] and skipped["reason"].startswith("unreadable video")


def test_a_worker_whose_process_was_killed_ends():
    code = "import common, time; common.end_with(-1); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50).returncode == 1


def test_two_ranks_divide_the_groups_and_give_the_bytes_of_one(fresh, monkeypatch):
    monkeypatch.setattr(stage("01"), "SHARD_CLIPS", 4)
    call("01", fresh, "--sampling-steps", 2, "--max-clips", 12, "--num-samples", 3)
    two = shutil.copytree(fresh, fresh.with_name("two"))
    for number, flags in (("02", ("--num-rated-clips", 4)), ("03", ())):
        call(number, fresh, *flags)
        torchrun(number, two, *flags)
    for place in (two, fresh):
        (place / "scores" / ".lock").unlink()  # it names the process
    ours, theirs = (files_of(place, "02", "03", "sc") for place in (two, fresh))
    assert len([name for name in theirs if name.startswith("scores/0")]) == 3 * 7
    assert {name: content.replace(bytes(two), bytes(fresh)) for name, content in ours.items()} == theirs
    shutil.rmtree(two / "scores")
    (two / "03_pairs.jsonl").unlink()
    monkeypatch.setattr(common, "setup_ranks", lambda: common.Ranks(1, 2))
    call("03", two)  # the second of two processes scores its groups, and leaves the rest to the first
    made = {path.name for path in (two / "scores").glob("*.pt")}
    assert made == {f"00001.{name}.pt" for name in (*FIVE, "imagebind_video", "synchformer_video")}
    assert not (two / "03_pairs.jsonl").exists()
