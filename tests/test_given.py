"""Candidates that the model did not make: 01 --given, and what the other stages do with them."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    SCORES,
    call,
    cells,
    close,
    files_of,
    interrupted,
    make_video,
    read,
    read_json,
    remove,
    shards_of,
    stage,
    torchrun,
    write,
)

import common
from adapters import toy as toy_adapter
from common import files, inputs, media, rows, scoring

SMALL = ("--sampling-steps", 2, "--num-samples", 2)
RATE = toy_adapter.RATE_HZ
TONE = 0.3 * np.sin(np.arange(2 * RATE) / 15)
SPEECH = toy_adapter.LABELS[toy_adapter.SPEECH]


def ids_of(run):
    return [clip.id for clip in inputs.read_clips(run, "train")]


def noises(folder, ids, level=0.3):
    """A folder of white noise, one file for each clip."""
    folder.mkdir()
    for seed, name in enumerate(ids):
        noise = level * np.random.default_rng(seed).standard_normal(2 * RATE)
        soundfile.write(folder / f"{name}.flac", noise.clip(-1, 1), RATE)
    return folder


@pytest.fixture(scope="module")
def two_given(finished, tmp_path_factory):
    """A run without any audio of the model: of each clip its own sound and noise, up to stage
    05."""
    place = tmp_path_factory.mktemp("given")
    ignored = shutil.ignore_patterns("0[1-9]_*", "weights.json")
    run = shutil.copytree(finished, place / "run", ignore=ignored)
    rows.write_json(run / "run.json", inputs.read_run(run, rows.World))
    noise = noises(place / "noise", ids_of(finished))
    call("01", run, "--num-samples", 0, "--given", "ground_truth", f"noise={noise}")
    for number in ("02", "03", "04", "05"):
        call(number, run)
    return run


def test_a_pair_of_two_given_audios_is_rated_mined_and_trained_on(two_given):
    samples = inputs.read_samples(two_given)
    assert list(samples) == ids_of(two_given)
    for audios in samples.values():
        sources = [(audio.k, audio.source, audio.seed) for audio in audios]
        assert sources == [(0, "ground_truth", 0), (1, "noise", 0)]
    mined = read(two_given / "03_pairs.jsonl")
    won = [pair["winner"] for pair in mined]
    assert len(won) > 6 and won.count(0) > 0.6 * len(won)  # its own sound, mostly
    good = {0: 0, 1: 0}
    for row in read(two_given / "02_ratings.jsonl"):
        good[row["k"]] += row["rating"] != "Bad"
    assert good[0] > good[1]
    log = read(two_given / "05_flow_dpo" / "log.jsonl")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and len(log) == 8
    assert torch.isfinite(files.load_pt(two_given / "05_flow_dpo/policy.pt")["out.bias"]).all()


def test_latents_and_features_of_given_audio_are_found_by_their_own_file_and_by_clip(two_given):
    shards = shards_of(two_given)
    model = common.load_base_model(two_given)
    sample = inputs.read_samples(two_given)["train00003"][1]
    assert (sample.file, sample.shard, sample.row) == ("00000.noise", "00000", 3)
    wave = media.read_audio(two_given / sample.wav, RATE, model.clip_s)
    latent = shards.latents([("train00003", 1)])
    # the latent is of the wave that was read, the file of 16 bits
    assert (latent - model.encode_audio(wave[None])).abs().max() < 1e-2
    clip = inputs.read_clips(two_given, "train")[3]
    seen = model.encode(clip, model.read(clip))
    assert torch.equal(shards.features([clip.id])["pooled"][0], seen["pooled"])
    shard = files.load_pt(two_given / "01_samples/00000.pt")
    assert shard["latents"].shape == (0, *model.latent_shape)
    assert shard["clips"] == ids_of(two_given) and shard["digests"] == []
    given = files.load_pt(two_given / "01_samples/00000.noise.pt")
    assert given["features"] == {} and given["clips"] == [] and len(given["latents"]) == 20


def test_neither_sheets_nor_questions_name_a_source(two_given):
    for name in ("02_to_rate.csv", "03_to_choose.csv"):
        text = (two_given / name).read_text().replace(str(two_given), "")
        assert cells(two_given / name)
        assert "ground_truth" not in text and "noise" not in text


def test_pesq_is_nan_of_the_clips_own_sound_alone_and_only_its_key_changes(two_given, finished):
    speech = {clip.id for clip in inputs.read_clips(two_given) if clip.label == SPEECH}
    scores = read(two_given / "03_scores/00000.jsonl")
    for score in scores:
        applies = score["clip"] in speech and score["k"] == 1
        assert (score["pesq"] is not None) == applies
    clips = {clip.id: clip for clip in inputs.read_clips(finished)}
    scorers = common.scorers_of(finished, "weights")
    sample = inputs.read_samples(finished)["train00000"][0]
    before = inputs.audio_of(finished, clips["train00000"], sample)
    sample.source = "rival"
    given = inputs.audio_of(finished, clips["train00000"], sample)
    sample.source = "ground_truth"
    own = inputs.audio_of(finished, clips["train00000"], sample)
    keys = [scoring.score_key(scorers, "toy", [audio]) for audio in (before, given, own)]
    assert keys[0] == keys[1] != keys[2]


# A finished run


@pytest.fixture
def noise(finished, tmp_path):
    return noises(tmp_path / "noise", ids_of(finished))


def of_model(run):
    """Times of what the model's part of 01 wrote."""
    parts = [path for path in (run / "01_samples").iterdir() if path.name.count(".") == 1]
    wavs = [path for path in (run / "01_audio").iterdir() if int(path.stem.split("_")[-1]) < 5]
    return {path: path.stat().st_mtime_ns for path in parts + wavs}


def test_adding_to_a_finished_run_leaves_the_models_shards_alone_and_later_stages_ask_for_redo(
    run, noise, refused, capsys
):
    before = of_model(run)
    digests = files_of(run, "01")
    call("01", run, "--given", f"noise={noise}")
    call("01", run, "--given", "ground_truth")
    said = capsys.readouterr().out
    assert "noise: audio for 20 of 20 clips" in said and "audios: 140, 0 not finite" in said
    assert of_model(run) == before and digests.items() <= files_of(run, "01").items()
    assert read_json(run / "run.json")["given"] == ["noise", "ground_truth"]  # as they came
    audios = inputs.read_samples(run)["train00000"]
    found = [(audio.k, audio.source) for audio in audios]
    assert found == [(k, "model") for k in range(5)] + [(5, "noise"), (6, "ground_truth")]
    for number in ("02", "03", "05"):
        assert "01_samples" in refused(number, run)
    seen = run / "03_scores/00000.toy_video.pt"
    time = seen.stat().st_mtime_ns
    call("02", run, "--redo")
    call("03", run, "--redo")
    assert seen.stat().st_mtime_ns == time  # the videos are not seen again
    said = capsys.readouterr().out
    for source, count in (("model", 100), ("noise", 20), ("ground_truth", 20)):
        assert f"  {source}: {count} audios, which win " in said
    assert "made with mine=all, now model; use --redo" in refused("03", run, "--mine", "model")
    call("03", run, "--mine", "model", "--redo")
    mined = read(run / "03_pairs.jsonl")
    assert mined and all(max(pair["winner"], pair["loser"]) < 5 for pair in mined)
    again = files_of(run, "01")
    call("01", run, "--given", "ground_truth", f"noise={noise}")
    assert files_of(run, "01") == again


def test_given_candidates_killed_or_damaged_are_made_again_and_the_end_is_equal(
    fresh, small_shards, noise, refused
):
    given = ("--given", "ground_truth", f"noise={noise}")
    begun = (fresh / "run.json").read_bytes()
    call("01", fresh, *SMALL)
    shutil.copytree(fresh, fresh.with_name("before"))
    call("01", fresh, *SMALL, *given)
    whole = files_of(fresh, "01", "run.json")
    assert len([name for name in whole if name.endswith(".noise.pt")]) == 5
    for count in (3, 30):  # within a shard of the first source, and of the second
        place = shutil.copytree(fresh.with_name("before"), fresh.with_name(f"killed {count}"))
        assert (place / "run.json").read_bytes() != begun
        with interrupted(media, "write_audio", count):
            call("01", place, *SMALL, *given)
        assert "is not there; rerun 01_generate.py with --given" in refused("02", place)
        call("01", place, *SMALL, *given)
        assert files_of(place, "01", "run.json") == whole
    remove(fresh, "01_audio/train00001_3.wav", "01_samples/00002.noise.jsonl")
    remove(fresh, "01_samples/00003.ground_truth.pt", "01_samples/00004*")
    call("01", fresh, *SMALL, *given, "--workers", 0)
    assert files_of(fresh, "01", "run.json") == whole


def test_two_ranks_and_one_make_the_same_of_what_was_given(fresh, noise, tmp_path):
    given = (*SMALL, "--given", "ground_truth", f"noise={noise}")
    two = shutil.copytree(fresh, tmp_path / "two")
    call("01", fresh, *given)
    torchrun("01", two, *given)
    assert files_of(two, "01", "run.json") == files_of(fresh, "01", "run.json")


# Files that can and cannot be used


def writes(wave, rate_hz=RATE, **options):
    return lambda path: soundfile.write(path, wave, rate_hz, format="WAV", **options)


def instead(make):
    """Puts something else in a file's place."""
    return lambda path: (path.unlink(), make(path))


NAN = np.where(np.arange(2 * RATE) == 7, np.nan, TONE)
BAD = {  # what is done with the file of a clip, the reason why the clip has no such candidate
    "not a number": (writes(NAN, subtype="FLOAT"), "not finite"),
    "undecodable": (lambda path: path.write_bytes(b"no sound"), "unreadable audio"),
    "too short": (writes(TONE[: RATE - 160]), "too short: 0.99 s of audio, at least 1.00 s needed"),
    "empty": (writes(TONE[:0]), "empty audio stream"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "a link to nothing": (instead(lambda path: path.symlink_to("gone.wav")), "no such file"),
    "a folder": (instead(lambda path: path.mkdir()), "no such file"),
    "a pipe": (instead(os.mkfifo), "no such file"),
}
GOOD = {  # what is written instead, how many samples of it are sound, its peak
    "half": (writes(TONE[:RATE]), RATE, 0.3),
    "longer": (writes(np.tile(TONE, 3)), 2 * RATE, 0.3),
    "at 44.1 kHz, in stereo": (
        writes(np.tile(TONE, 2)[:, None].repeat(2, axis=1), 44_100), 23_220, 0.3
    ),
    "beyond full scale": (writes(5 * TONE, subtype="FLOAT"), 2 * RATE, 1.0),
    "silent": (writes(0 * TONE), 0, 0.0),
}  # fmt: skip


def test_files_that_can_and_cannot_be_used(fresh, finished, noise, capsys):
    ids = ids_of(finished)
    for name, (spoil, *_) in zip(ids, [*BAD.values(), *GOOD.values()]):
        (noise / f"{name}.flac").rename(noise / f"{name}.wav")
        spoil(noise / f"{name}.wav")
    (noise / "train99999.wav").write_bytes(b"")
    (noise / "test00000.flac").write_bytes(b"")
    call("01", fresh, *SMALL, "--given", f"noise={noise}")
    said = capsys.readouterr().out
    assert "noise: 2 files name none of the 20 clips, first test00000" in said
    assert f"noise: audio for {20 - len(BAD)} of 20 clips" in said and "1 silent" in said
    skipped = {
        row["clip"]: row["reason"] for row in read(fresh / "01_samples/00000.noise.skipped.jsonl")
    }
    assert list(skipped) == ids[: len(BAD)]
    counts = Counter(skipped.values())
    for name, (_, reason) in zip(ids, BAD.values()):
        assert reason in skipped[name]
        assert f"{counts[skipped[name]]} x {skipped[name]}, e.g. train" in said
    samples = inputs.read_samples(fresh)
    for name, (_, heard, peak) in zip(ids[len(BAD) :], GOOD.values()):
        sample = samples[name][2]
        wave, rate_hz = soundfile.read(fresh / sample.wav)
        assert (wave.shape, rate_hz) == ((2 * RATE,), RATE)
        assert not wave[heard + 20 :].any() and sample.peak == pytest.approx(peak, abs=0.01)
        assert sample.finite and stage("03").is_good_enough(sample) == (0 < peak < 1)
    assert [len(samples[name]) for name in ids] == [2] * len(BAD) + [3] * (20 - len(BAD))


def test_a_file_that_comes_later_is_made_and_of_two_formats_wav_is_taken(fresh, finished, noise):
    name = ids_of(finished)[0]
    file = noise / f"{name}.flac"
    hidden = file.rename(noise / "hidden")
    call("01", fresh, *SMALL, "--given", f"noise={noise}")
    assert len(inputs.read_samples(fresh)[name]) == 2
    hidden.rename(file)
    soundfile.write(noise / f"{name}.WAV", 0 * TONE, RATE)
    call("01", fresh, *SMALL, "--given", f"noise={noise}")
    assert inputs.read_samples(fresh)[name][2].peak == 0


def test_a_source_of_which_nothing_was_made_hinders_nobody(fresh, finished, noise):
    call("01", fresh, *SMALL)
    with interrupted(media, "write_audio"):
        call("01", fresh, *SMALL, "--given", f"noise={noise}")
    shutil.rmtree(noise)
    call("01", fresh, *SMALL)
    assert {len(audios) for audios in inputs.read_samples(fresh).values()} == {2}


def test_a_silent_film_has_no_sound_of_its_own_to_give(tmp_path, toy):
    for name, sound in (("a", True), ("b", False)):
        make_video(tmp_path / "videos" / f"{name}.mp4", sound=sound)
    flags = ("--videos", tmp_path / "videos", *toy)
    call("01", tmp_path / "run", *flags, "--given", "ground_truth")
    (skipped,) = read(tmp_path / "run/01_samples/00000.ground_truth.skipped.jsonl")
    assert skipped == {"clip": "b", "reason": "no audio stream"}
    samples = inputs.read_samples(tmp_path / "run")
    assert {clip: len(audios) for clip, audios in samples.items()} == {"a": 3, "b": 2}


WRONG = {  # --given: what the line says
    "rival": "give NAME=DIR",
    "model={noise}": "give ground_truth, or NAME=DIR",
    "ground_truth={noise}": "give ground_truth, or NAME=DIR",
    "skipped={noise}": "give ground_truth, or NAME=DIR",
    "a.b={noise}": "give ground_truth, or NAME=DIR",
    "../x={noise}": "give ground_truth, or NAME=DIR",
    "={noise}": "give ground_truth, or NAME=DIR",
    "rival={noise}/none": "no such folder",
    "rival=": "no such folder",
    "ground_truth ground_truth": "ground_truth is given twice",
    "rival={run}/01_samples": "no file there names a train clip",
    "rival={noise} --max-clips 0": "--max-clips 0",
}


def test_what_is_no_source_is_one_line_and_leaves_the_run_as_it_was(run, noise, refused):
    before = files_of(run, "01", "run.json")
    for flags, line in WRONG.items():
        given = flags.format(run=run, noise=noise).split()
        assert line in refused("01", run, "--given", *given), flags
    assert files_of(run, "01", "run.json") == before


@pytest.mark.parametrize("flags", [(0,), (1,), (0, "--given", "ground_truth")])
def test_a_clip_needs_two_candidates(flags, fresh, refused):
    line = refused("01", fresh, "--num-samples", *flags)
    assert "--num-samples" in line and "two candidates" in line


def test_a_given_audio_whose_line_was_changed_is_refused(run, noise, refused):
    call("01", run, "--given", f"noise={noise}")
    file = run / "01_samples/00000.noise.jsonl"
    lines = read(file)
    for field, value in (("k", 6), ("source", "model"), ("row", 3), ("clip", "test00000")):
        write(file, [lines[0] | {field: value}, *lines[1:]])
        line = refused("02", run, "--redo")
        assert "00000.noise.jsonl, line 1" in line and "with --given noise" in line


def test_a_model_that_cannot_encode_sound_says_so(run, refused, monkeypatch):
    monkeypatch.delattr(toy_adapter.Toy, "encode_audio")
    assert "has no encoder of sound" in refused("01", run, "--given", "ground_truth")


# Clips to rate


@pytest.fixture
def rated(finished, tmp_path, toy):
    """A finished run on six of the toy's videos, folders of sound for six others, their list; the
    flags of 01."""
    videos = tmp_path / "videos"
    shutil.copytree(finished / "00_videos", videos)
    clips = {clip["id"]: clip for clip in read(finished / "clips.jsonl")}
    about = [clips[f"train{i:05d}"] for i in range(12)]
    write(tmp_path / "clips.jsonl", [*about[:6], clips["test00000"]])
    to_rate = [clip | {"id": f"other{i}", "split": "rate"} for i, clip in enumerate(about[6:])]
    to_rate.append(about[0] | {"id": "again", "split": "rate"})  # whose video is mined
    shutil.copy(videos / clips["test00000"]["video"], videos / "ABCDEFGHIJK_000010.mp4")
    to_rate.append({"id": "part", "split": "rate", "video": "ABCDEFGHIJK_000010.mp4"})
    write(tmp_path / "to_rate.jsonl", to_rate)
    names = [clip["id"] for clip in to_rate]
    one = noises(tmp_path / "one", names)
    two = tmp_path / "two"
    two.mkdir()
    for i, name in enumerate(names[:5]):
        shutil.copy(finished / f"01_audio/{about[6 + i]['id']}_0.wav", two / f"{name}.wav")
    flags = (*toy, "--videos", videos, "--clips")
    call("01", tmp_path / "run", *flags, tmp_path / "clips.jsonl")
    given = ("--given", f"one={one}", f"two={two}")
    return tmp_path / "run", (*flags, tmp_path / "to_rate.jsonl", *given), tmp_path


def test_clips_to_rate_are_added_to_a_finished_run_rated_and_scored_and_never_mined(
    rated, capsys, finished
):
    run, flags, folder = rated
    before = files_of(run, "01", "clips")
    capsys.readouterr()
    call("01", run, *flags)
    said = capsys.readouterr().out
    assert "left out: 1 clips to rate, of videos that this run mines or tests on" in said
    assert "one: audio for 7 of 7 clips to rate" in said and "two: audio for 5 of 7" in said
    after = files_of(run, "01", "clips")
    assert before.items() <= after.items()
    new = {name for name in after.keys() - before.keys() if not name.startswith("01_audio")}
    parts = {f"01_samples/rate_00000.{name}.jsonl" for name in ("one", "two", "two.skipped")}
    assert new == {"01_to_rate.jsonl", *parts}  # no latents
    assert read_json(run / "run.json")["given_to_rate"] == ["one", "two"]
    assert "given" not in read_json(run / "run.json")
    call("01", run, *flags)
    assert files_of(run, "01", "clips") == after
    call("02", run, "--num-rated-clips", 2)
    asked = [(row["clip"], row["k"]) for row in cells(run / "02_to_rate.csv")]
    assert len(asked) == 2 * 2 + 7 + 5 and ("other0", "1") in asked
    answers = []
    for i, name in enumerate(f"other{i}" for i in range(5)):
        answers.append({"clip": name, "k": "one", "rating": "Bad"})
        answers.append({"clip": name, "k": "1", "rating": ("Good", "Medium")[i % 2]})
    write(folder / "rated.jsonl", answers)
    call("02", run, "--num-rated-clips", 2, "--ratings", folder / "rated.jsonl")
    assert "10 of 10 audios of 5 clips" in capsys.readouterr().out
    scores = {(row["clip"], row["k"]): row for row in read(run / "02_scores.jsonl")}
    assert len(scores) == 10 and scores["other0", 0]["rating"] == "Bad"
    theirs = {(row["clip"], row["k"]): row for row in read(finished / "03_scores/00000.jsonl")}
    for i in range(5):  # the same sound and video, scored in a block of another size
        for score in ("ib", "clap", "desync_s", "pesq"):
            ours = scores[f"other{i}", 1][score]
            other = theirs[f"train{i + 6:05d}", 0][score]
            assert ours is other or close(ours, other, SCORES), score
    call("03", run)
    said = capsys.readouterr().out
    assert "clips: 6 in" in said and "own clips is rated" in said
    assert "people rated them" not in said
    assert {row["clip"] for row in read(run / "03_scores/00000.jsonl")} == set(ids_of(run))
    assert cells(run / "03_to_choose.csv") == []


def test_a_clip_of_the_run_is_not_one_to_rate_and_a_part_without_ratings_says_so(rated, refused):
    run, flags, folder = rated
    clip = read(run / "clips.jsonl")[0]
    write(folder / "to_rate.jsonl", [clip | {"split": "rate"}])
    assert f"clip {clip['id']}: cannot have the split rate" in refused("01", run, *flags)
    assert "nobody has rated yet" in refused("02", run, "--part", "1/2")


def test_a_list_of_clips_to_rate_alone_makes_no_run(rated, refused):
    _, flags, folder = rated
    assert "only clips to rate" in refused("01", folder / "new", *flags)


def test_clips_to_rate_that_a_kill_left_half_done_are_said_and_made(rated, refused):
    run, flags, _ = rated
    with interrupted(media, "write_audio", 9):  # in the second source
        call("01", run, *flags)
    assert "is not there; rerun 01_generate.py with --given two" in refused("02", run)
    call("01", run, *flags)
    assert len(inputs.read_rate_split(run)) == 7
