"""The whole pipeline as a user runs it, smaller: what a run contains, and that it can be stopped,
repeated, divided."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import av
import campaign
import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    ENVIRONMENT,
    LATENTS,
    PROBABILITIES,
    ROOT,
    SCORES,
    STAGES,
    TORCHRUN,
    a_clip,
    arguments,
    call,
    cells,
    close,
    files_of,
    judged,
    make_video,
    read,
    same_rows,
    shell,
    stage,
    start,
    stopped,
    torchrun,
    write,
)

import common
from adapters.toy import Toy, ToyScorer
from common import AudioScore, files, media, rows, scoring, training

SYSTEMS = ("ground_truth", "base", "flow_dpo", "ddpo")


def without_times(name, content):
    """A training log less what differs between two equal runs."""
    if not name.endswith("log.jsonl"):
        return content
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in content.decode().splitlines()
    ]


def logs_of(run, *folders):
    return [
        without_times("log.jsonl", (run / folder / "log.jsonl").read_bytes()) for folder in folders
    ]


def weights(run, out):
    return files.load_pt(run / out / "policy.pt")


def about(file):
    return json.loads(file.read_text())


def results(run, split="test"):
    file = run / ("07_results.jsonl" if split == "test" else f"07_results_{split}.jsonl")
    return {(row["system"], row["metric"]): row for row in read(file)}


def shards_of(run):
    return training.Shards(run, common.read_samples(run), common.load_base_model(run))


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


# What a finished run contains
# --------------------------------------------------------------------------------


def test_every_file_of_a_run_is_there(finished):
    names = [
        "run.json",
        "clips.jsonl",
        "00_base.pt",
        "00_scorers.pt",
        "00_oracle.pt",
        "00_truth.jsonl",
        "00_videos",
    ]
    names += ["01_samples/00000.jsonl", "01_samples/00000.pt", "01_audio"]
    names += ["02_to_rate.csv", "02_ratings.jsonl", "02_scores.jsonl", "02_audioscore.pt"]
    names += [
        "03_to_choose.csv",
        "03_human_choices.jsonl",
        "03_scores/00000.jsonl",
        "03_pairs.jsonl",
    ]
    names += ["03_human_pairs.jsonl", "04_stage1.jsonl", "04_stage2.jsonl"]
    names += [
        "02_scores/00000.toy.pt",
        "03_scores/00000.toy.pt",
        "03_scores/00000.toy_video.pt",
        "weights.json",
    ]
    names += ["07_results.jsonl", "07_systems.json", "07_clips/test_00000.toy_video.pt"]
    names += ["07_clips/test_00000.features_video.pt", "07_scores/base/test_00000.toy.pt"]
    for folder in ("05_flow_dpo", "06_ddpo"):
        names += [
            f"{folder}/{x}"
            for x in ("policy.pt", "policy.json", "checkpoint.pt", "log.jsonl", "settings.json")
        ]
    assert [name for name in names if not (finished / name).exists()] == []
    assert [path for path in finished.rglob("*") if ".tmp" in path.name] == []


def test_every_stage_says_what_to_run_next(finished):
    parts = finished.with_suffix(".log").read_text().split("== ")[1:]
    names = sorted({*(path.name for path in STAGES.values()), "08_listen.py"})
    for part, name in zip(parts, names[1:]):
        assert f"next: python {name} --run-dir {finished}" in part


def test_clips_have_their_fields_and_real_videos_and_the_truth_is_apart(finished):
    clips, truth = read(finished / "clips.jsonl"), read(finished / "00_truth.jsonl")
    assert {clip["split"] for clip in clips} == {"train", "val", "test"}
    assert all(list(clip) == ["id", "video", "caption", "label", "split"] for clip in clips)
    assert [row["id"] for row in truth] == [clip["id"] for clip in clips]
    assert all(
        list(row) == ["id", "class", "hits_s", "wet"] and 2 <= len(row["hits_s"]) <= 4
        for row in truth
    )
    with av.open(
        str(finished / about(finished / "run.json")["video_root"] / clips[0]["video"])
    ) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]


def test_run_json_records_model_sampler_and_seed(finished):
    run = about(finished / "run.json")
    assert (run["model"], run["num_samples"], run["seed"], run["size"]) == ("toy", 5, 0, "tiny")
    assert run["checkpoint_digest"] == files.digest(finished / "00_base.pt")
    assert run["sampler"] == {"steps": 8, "guidance": 1.5} and len(run["latent_shape"]) == 2


def test_five_audible_audios_per_train_clip(finished):
    train = [clip["id"] for clip in read(finished / "clips.jsonl") if clip["split"] == "train"]
    rows, rate = (
        read(finished / "01_samples" / "00000.jsonl"),
        about(finished / "run.json")["sample_rate_hz"],
    )
    assert Counter((row["clip"], row["k"]) for row in rows) == Counter(
        (c, k) for c in train for k in range(5)
    )
    assert len({row["seed"] for row in rows}) == len(rows)
    for row in rows:
        wave, found = soundfile.read(finished / row["wav"])
        assert found == rate and wave.shape == (2 * rate,)
        assert np.abs(wave).max() == pytest.approx(row["peak"], abs=1e-4)
    shard = files.load_pt(finished / "01_samples" / "00000.pt")
    assert shard["latents"].shape[0] == len(rows) and shard["latents"].isfinite().all()
    assert {len(value) for value in shard["features"].values()} == {len(train)}


def test_ratings_are_of_all_three_kinds(finished):
    rows, asked = read(finished / "02_ratings.jsonl"), cells(finished / "02_to_rate.csv")
    assert {row["rating"] for row in rows} == {"Good", "Medium", "Bad"}
    assert {(row["clip"], int(row["k"])) for row in asked} == {
        (row["clip"], row["k"]) for row in rows
    }


def test_scores_are_null_exactly_where_they_do_not_apply(finished):
    clips = {clip["id"]: clip for clip in read(finished / "clips.jsonl")}
    rows = read(finished / "03_scores" / "00000.jsonl")
    assert len(rows) == len(read(finished / "01_samples" / "00000.jsonl"))
    for row in rows:
        clip = clips[row["clip"]]
        assert (row["clap"] is None) == (clip["caption"] is None)
        assert row["pesq"] is None or (
            clip["label"] == "person speaking" and 1 <= row["pesq"] <= 4.7
        )
        assert -1 <= row["ib"] <= 1 and row["desync_s"] >= 0 and row["is_nats"] > -1e-4
        assert sum(row["p"]) == pytest.approx(1, abs=1e-5) and min(row["p"]) >= 0
    assert any(row["pesq"] is not None for row in rows) and any(
        row["clap"] is not None for row in rows
    )


def test_a_pair_is_the_best_and_the_worst_of_its_clip_and_rated_clips_are_not_mined(finished):
    p, rated = {}, {row["clip"] for row in read(finished / "02_ratings.jsonl")}
    for row in read(finished / "03_scores" / "00000.jsonl"):
        p.setdefault(row["clip"], {})[row["k"]] = row["p"]
    mined, human = read(finished / "03_pairs.jsonl"), read(finished / "03_human_pairs.jsonl")
    assert mined and human and {pair["clip"] for pair in human} <= rated
    assert all(pair["winner"] != pair["loser"] for pair in mined + human)
    samples = common.read_samples(finished)
    for pair in mined:
        ours = p[pair["clip"]]
        may_win = [audio.k for audio in samples[pair["clip"]] if stage("03").may_win(audio)]
        assert pair["clip"] not in rated and pair["winner"] == max(
            may_win, key=lambda k: ours[k][0]
        )
        assert pair["loser"] == max(ours, key=lambda k: ours[k][2])
        assert (pair["p_winner"], pair["p_loser"]) == (ours[pair["winner"]], ours[pair["loser"]])


def test_the_curriculum_splits_at_the_threshold_and_keeps_people_for_stage_2(finished):
    stage1, stage2 = (read(finished / f"04_stage{i}.jsonl") for i in (1, 2))
    threshold = about(finished / "04_settings.json")["settings"]["threshold"]
    assert stage1 and all(
        pair["score_c"] > threshold and pair["source"] == "auto" for pair in stage1
    )
    assert all(pair["score_c"] <= threshold for pair in stage2)
    human = [pair["score_c"] for pair in stage2 if pair["source"] == "human"]
    assert human == [0.0] * len(read(finished / "03_human_pairs.jsonl")) != []
    assert len(stage1) + len(stage2) - len(human) == len(read(finished / "03_pairs.jsonl"))


def test_both_stages_are_trained_in_order_and_logged(finished):
    log, ddpo = (read(finished / out / "log.jsonl") for out in ("05_flow_dpo", "06_ddpo"))
    for number, steps in (("05", log), ("06", ddpo)):
        assert [row["step"] for row in steps] == list(
            range(stage("00").DEFAULTS["tiny"][number]["steps"])
        )
    stages = [row["stage"] for row in log]
    assert stages == sorted(stages) and set(stages) == {1, 2}
    wanted = {
        "loss",
        "accuracy",
        "gap_w",
        "gap_l",
        "gap_w_t",
        "gap_l_t",
        "saturated",
        "opposed",
        "weight",
    }
    wanted |= {"weight_wrong", "grad_norm", "lr", "seconds"}
    assert all(wanted <= row.keys() and len(row["gap_w_t"]) == 4 for row in log)
    assert all(
        0 <= row["reward"] <= 1 and row["grad_norm"] >= 0 and row["forwards"] > 0 for row in ddpo
    )


def test_training_moves_the_policy_and_leaves_the_base_alone(finished):
    base = files.load_pt(finished / "00_base.pt")["net"]
    for out in ("05_flow_dpo", "06_ddpo"):
        tuned = weights(finished, out)
        moved = {key for key in base if not torch.equal(base[key], tuned[key])}
        assert tuned.keys() == base.keys() and len(moved) > len(base) / 2
        assert not moved & {"null_tokens", "null_vector"}  # null conditions are frozen
        policy = about(finished / out / "policy.json")
        assert (policy["model"], policy["base_digest"]) == (
            "toy",
            files.digest(finished / "00_base.pt"),
        )


def test_the_reference_stays_the_base_while_the_policy_learns(run, monkeypatch):
    kept, copied = [], training.frozen_copy
    monkeypatch.setattr(
        training, "frozen_copy", lambda *given: kept.append(copied(*given)) or kept[-1]
    )
    call("05", run, "--out", "watched", "--steps", 3)
    assert largest_difference(kept[0].state_dict(), common.load_base_model(run).state_dict()) == 0
    assert (
        largest_difference(weights(run, "watched"), files.load_pt(run / "00_base.pt")["net"]) > 1e-5
    )


def test_results_have_every_system_metric_and_field(finished):
    rows = read(finished / "07_results.jsonl")
    keys = [
        "system",
        "metric",
        "better",
        "value",
        "low",
        "high",
        "n",
        "diff",
        "diff_low",
        "diff_high",
        "verdict",
    ]
    assert all(list(row) == keys for row in rows)
    assert list(dict.fromkeys(row["system"] for row in rows)) == list(SYSTEMS)
    named = {(row["system"], row["metric"]): row for row in rows}
    means = (
        "ib",
        "clap",
        "desync_s",
        "p_good",
        "win_rate",
        "oracle_semantic",
        "oracle_sync_s",
        "oracle_floor_db",
    )
    for metric in ("fd", "kl", "is", *means, "oracle_aesthetic"):
        assert ("base", metric) in named and ("flow_dpo", metric) in named
    for row in rows:
        assert row["better"] in ("higher", "lower")
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
        assert row["diff_low"] is None or row["diff_low"] <= row["diff"] <= row["diff_high"]
        assert row["system"] != "base" or row["diff"] is row["diff_low"] is row["diff_high"] is None
    assert named["base", "win_rate"]["value"] == 0.5
    difference = named["ddpo", "ib"]["value"] - named["base", "ib"]["value"]
    assert named["ddpo", "ib"]["diff"] == pytest.approx(difference, abs=1e-6)


def test_p_good_in_the_results_is_the_mean_of_audioscore_on_that_systems_audio(finished):
    clips = common.read_clips(finished, "test")
    folder = finished / "07_audio" / "flow_dpo"
    audios = [scoring.Audio(clip, 0, folder / f"{clip.id}.wav", "") for clip in clips]
    scorers = common.scorers_of(finished, "weights")
    said = {}
    for name in scorers.of_audioscore:
        scorer = scorers.load(name)
        said[name] = judged(
            scorer, scoring.read_waves(audios, scorer.sample_rate_hz, 2.0), clips, 2.0
        )
    audioscore = AudioScore.load(finished / "02_audioscore.pt")
    expected = audioscore(audioscore.five_scores(scorers.five(said)))[:, 0].mean().item()
    row = results(finished)["flow_dpo", "p_good"]
    assert close(row["value"], expected, PROBABILITIES) and row["n"] == len(clips)


def test_a_rehearsal_of_07_says_what_audio_there_is_and_makes_nothing(
    run, tmp_path, capsys, refused
):
    first, *_ = [clip.id for clip in common.read_clips(run, "test")]
    for name in (first, "stranger"):
        media.write_audio(tmp_path / "own" / f"{name}.wav", torch.zeros(8), 16000)
    shutil.rmtree(run / "07_audio" / "ddpo")
    before = files_of(run, "0")
    call("07", run, "--dry-run", "--systems", "ddpo", f"own={tmp_path / 'own'}")
    said = capsys.readouterr().out
    assert (
        "own: audio for 1 of 8 test clips; 1 files name no clip of this split, first stranger\n"
        in said
    )
    assert (
        "ddpo: audio for 0 of 8 test clips, 8 will be generated\n" in said and "missing" not in said
    )
    assert files_of(run, "0") == before
    assert "--judge audiobox" in refused(
        "07", run, "--judge", "audiobox"
    )  # the toy world's scorers have none


def test_two_systems_are_compared_and_what_their_intervals_leave_out_is_said(run, capsys, refused):
    before = (run / "07_results.jsonl").read_text()
    call("07", run, "--against", "flow_dpo")
    said = capsys.readouterr().out
    assert (
        "minus flow_dpo, 95 % interval" in said
        and "intervals over clips, one training seed" in said
        and "next:" not in said  # stage 08 reads what is compared with base
    )
    rows = {(row["system"], row["metric"]): row for row in read(run / "07_results_flow_dpo.jsonl")}
    assert rows["flow_dpo", "win_rate"]["value"] == 0.5 and rows["flow_dpo", "ib"]["diff"] is None
    assert rows["ddpo", "ib"]["diff"] == pytest.approx(
        rows["ddpo", "ib"]["value"] - rows["flow_dpo", "ib"]["value"]
    )
    assert (run / "07_results.jsonl").read_text() == before and "on the test split" not in said
    assert "none of the systems (ground_truth, base, flow_dpo, ddpo)" in refused(
        "07", run, "--against", "mine"
    )


def test_a_policy_beyond_the_two_that_is_judged_on_test_is_warned_of(run, capsys):
    shutil.copytree(run / "05_flow_dpo", run / "other")
    call("07", run, "--split", "val", "--systems", "base", "other")
    said = capsys.readouterr().out
    assert "warning" not in said and "Table 1" not in said and "next:" not in said
    call("07", run, "--systems", "base", "other")
    said = capsys.readouterr().out
    assert "warning: other on the test split; choose on --split val" in said
    assert "Table 1, VGGSound test" in said and "next: python 08_listen.py" in said


def test_a_policy_that_gains_on_audioscore_and_loses_by_another_judge_is_said(capsys):
    def row(system, metric, verdict):
        return rows.Result(system=system, metric=metric, better="higher", n=8, verdict=verdict)

    gains = [row(system, "p_good", "better") for system in ("a", "b")] + [row("c", "p_good", None)]
    losses = [
        row("a", "audiobox_pq", "worse"),
        row("b", "fd", "worse"),
        row("c", "oracle_semantic", "worse"),
    ]
    measures = {"audiobox_pq": ("mean", "audiobox", "pq"), "fd": ("fd", "toy", "embedding")}
    stage("07").print_hacked(gains + losses, ["a", "b", "c"], measures, ("audiobox",))
    (line,) = capsys.readouterr().out.splitlines()
    assert "a gains on AudioScore and loses on audiobox_pq" in line


def test_preparing_a_run_lists_the_missing_weights_of_all_stages_with_their_size(tmp_path, capsys):
    make_video(tmp_path / "videos" / "a.mp4")
    flags = ("--videos", tmp_path / "videos", "--weights", tmp_path, "--max-clips", 0)
    stopped(call, "01", tmp_path / "run", "--model", "mmaudio:large_44k", *flags)
    said = capsys.readouterr().out
    for name in (
        "mmaudio_large_44k.pth",
        "v1-44.pth",
        "imagebind_huge.pth",
        "Cnn14_mAP=0.431.pth",
        "passt-s-f128",
    ):
        assert f"  {name}" in said, name
    assert (
        "13 files" in said
    )  # 3.9, 1.2 GiB, 466 MiB; 0.95, 4.8, 2.4, 0.327, 0.324, 0.345, 0.4 GB


# Runs that are stopped, repeated, or divided
# -----------------------------------------------------------------


def test_the_same_content_has_the_same_bytes_whichever_process_writes_it(tmp_path, monkeypatch):
    value = {"x": torch.arange(10.0), "name": "x"}
    files.save_pt(tmp_path / "one.pt", value)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    (tmp_path / "again").mkdir()
    files.save_pt(tmp_path / "again" / "one.pt", value)
    assert files.digest(tmp_path / "one.pt") == files.digest(tmp_path / "again" / "one.pt")


@pytest.fixture
def counted(monkeypatch):
    """How often the expensive things happen, each done as ever."""
    counts = Counter()

    def watch(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    watched = (
        (common, "sample"),
        (Toy, "encode"),
        (common, "flow_dpo_loss"),
        (stage("06"), "collect"),
    )
    for owner, name in (*watched, (ToyScorer, "score"), (stage("00"), "draw_picture")):
        watch(owner, name)
    return counts


def test_a_rerun_of_every_stage_succeeds_and_does_nothing_twice(run, counted):
    before = files_of(run, *STAGES, "ru", "cl")
    call("00", run, "--size", "tiny")
    for number in ("01", "02", "03", "04", "05", "06", "07"):
        call(number, run)
    after = files_of(run, *STAGES, "ru", "cl")
    assert counted == {} and before.keys() == after.keys()
    moved = {
        "07_systems.json",
        "02_to_rate.csv",
        "03_to_choose.csv",
    }  # these name the run's own place
    changed = [
        n
        for n in sorted(before.keys() - moved)
        if without_times(n, before[n]) != without_times(n, after[n])
    ]
    assert changed == []


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stage("01"), "SHARD_CLIPS", 4)


def interrupt_after(monkeypatch, owner, name, count):
    """Ctrl-C at the count-th call."""
    original, calls = getattr(owner, name), Counter()

    def breaking(*args, **kwargs):
        calls[name] += 1
        if calls[name] == count:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, breaking)


def test_interrupted_generation_goes_on_without_repeating_or_losing_anything(
    fresh, small_shards, monkeypatch
):
    call("01", fresh)
    whole = files_of(fresh, "01")
    assert sorted(path.stem for path in (fresh / "01_samples").glob("*.jsonl")) == [
        f"{i:05d}" for i in range(5)
    ]
    for path in (fresh / "01_samples").glob("0000[234].*"):
        path.unlink()
    times = {p.name: p.stat().st_mtime_ns for p in (fresh / "01_samples").iterdir()}
    with monkeypatch.context() as patch:
        interrupt_after(
            patch, media, "write_audio", 30
        )  # in the second of the three missing shards
        with pytest.raises(KeyboardInterrupt):
            call("01", fresh)
    assert not (fresh / "01_samples" / "00003.jsonl").exists()
    call("01", fresh)
    assert files_of(fresh, "01") == whole
    assert {name: (fresh / "01_samples" / name).stat().st_mtime_ns for name in times} == times


def test_generation_is_the_same_in_shards_of_any_size(fresh, finished, small_shards):
    call("01", fresh, "--batch-clips", 3)
    read_all = {
        (row["clip"], row["k"]): row
        for file in (fresh / "01_samples").glob("*.jsonl")
        for row in read(file)
    }
    assert len(read_all) == len(read(finished / "01_samples" / "00000.jsonl"))
    ours, theirs = (shards_of(run) for run in (fresh, finished))
    audios = sorted(read_all)[::7]
    assert close(ours.latents(audios), theirs.latents(audios), LATENTS)


@pytest.mark.parametrize("number, how", [("01", "kill"), ("05", "full_disk"), ("05", "two")])
def test_a_short_campaign(number, how, finished, tmp_path, monkeypatch):
    """campaign.py's disturbances, one each: what the same command makes after them equals the
    undisturbed run's."""
    monkeypatch.setattr(campaign, "FLAGS", {})
    after, before = (tmp_path / name for name in ("after", "before"))
    shutil.copytree(finished, after, ignore=shutil.ignore_patterns("0[67]_*"))
    shutil.copytree(after, before, ignore=shutil.ignore_patterns(f"{number}_*"))
    trial = campaign.Trial(number, 1, tmp_path / "run", before, after, (60, 59.5))
    getattr(trial, how)(random.Random(0))
    trial.again()
    assert (trial.said, +trial.counts) == ([], Counter())


def wait_until(happened, process, seconds=300):
    began = time.monotonic()
    while not happened():
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() - began < seconds
        time.sleep(0.005)


def test_interrupted_scoring_goes_on_and_gives_the_same_audioscore(run, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_CLIPS", 4)
    shutil.rmtree(run / "02_scores")
    (run / "02_audioscore.pt").unlink()
    whole = shutil.copytree(run, run.with_name("whole"))
    call("02", whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, ToyScorer, "score", 2)
        with pytest.raises(KeyboardInterrupt):
            call("02", run)
    assert [path.name for path in run.glob("02_scores/*.toy.pt")] == ["00000.toy.pt"]
    assert not (run / "02_audioscore.pt").exists()
    kept = (run / "02_scores/00000.toy.pt").stat().st_mtime_ns
    call("02", run)
    names = ("02_scores", "02_audioscore.pt")
    assert files_of(run, *names) == files_of(whole, *names)
    assert (run / "02_scores/00000.toy.pt").stat().st_mtime_ns == kept


REDO = {
    "02": "fit",
    "03": "mine",
    "04": "split",
}  # each stage's first step after its record is written


@pytest.mark.parametrize("number, following", [("02", "03"), ("03", "04"), ("04", "05")])
def test_an_interrupted_redo_leaves_nothing_that_later_stages_would_take_for_new(
    run, number, following, monkeypatch
):
    if number == "02":
        set_rating(run, 0)
    else:
        call(
            *(
                ("02", run, "--redo", "--seed", 5)
                if number == "03"
                else ("03", run, "--redo", "--min-score-c", 0.01)
            )
        )
    with monkeypatch.context() as patch:
        interrupt_after(patch, stage(number), REDO[number], 1)
        with pytest.raises(KeyboardInterrupt):
            call(number, run, "--redo")
    stopped(call, following, run, *(("--out", "x") if following == "05" else ()))
    call(number, run)  # the same command without --redo goes on


def set_rating(run, number):
    rows = read(run / "02_ratings.jsonl")
    rows[number]["rating"] = "Good" if rows[number]["rating"] != "Good" else "Bad"
    write(run / "02_ratings.jsonl", rows)


def test_missing_videos_of_the_toy_world_are_made_again_alike(run):
    before = files_of(run, "00")
    for name in ("train00003.mp4", "test00001.mp4"):
        (run / "00_videos" / name).unlink()
    (run / "clips.jsonl").rename(run / "lost")
    call("00", run, "--size", "tiny")
    assert files_of(run, "00") == before
    assert (run / "clips.jsonl").read_bytes() == (run / "lost").read_bytes()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("number, flags, how", [
    ("05", ("--steps", 24, "--save-every", 3), signal.SIGKILL),
    ("06", ("--steps", 16, "--save-every", 1), signal.SIGINT),
])  # fmt: skip
def test_resume_equals_uninterrupted(run, number, flags, how):
    call(number, run, "--out", "whole", *flags)
    started = start(number, run, "--out", "stopped", *flags)
    wait_until(lambda: lines(run / "stopped" / "log.jsonl") >= 5, started)
    started.send_signal(how)
    errors = started.communicate()[1]
    assert not (run / "stopped" / "policy.pt").exists()
    if how == signal.SIGINT:
        assert (
            started.returncode == 130
            and "run the same command again" in errors
            and "Traceback" not in errors
        )
    assert 0 < files.load_pt(run / "stopped" / "checkpoint.pt")["step"] < flags[1]
    call(number, run, "--out", "stopped", *flags)
    assert largest_difference(weights(run, "stopped"), weights(run, "whole")) == 0
    stopped_log, whole_log = logs_of(run, "stopped", "whole")
    assert stopped_log == whole_log


@pytest.mark.parametrize(
    "number, flags", [("05", ("--steps", 20)), ("06", ("--steps", 4, "--lr", 3e-5))]
)
def test_two_ranks_match_one(run, number, flags):
    call(number, run, "--out", "one", *flags)
    torchrun(number, run, "--out", "two", *flags)
    one, two, base = (
        weights(run, "one"),
        weights(run, "two"),
        files.load_pt(run / "00_base.pt")["net"],
    )
    assert largest_difference(one, two) < 1e-4
    apart, moved = (
        sum((a[key] - b[key]).square().sum().item() for key in a)
        for a, b in ((one, two), (one, base))
    )
    # Adam turns the rounding of a vanishing gradient, and of rewards that hardly differ, into a
    # step now and then.
    assert apart**0.5 < 0.2 * moved**0.5
    logs = [read(run / out / "log.jsonl") for out in ("one", "two")]
    assert [len(log) for log in logs] == [flags[1]] * 2
    names, rows = (
        (("loss", "gap_w", "gap_l"), 20)
        if number == "05"
        else (("reward", "reward_std", "approx_kl"), 2)
    )
    for (
        name
    ) in names:  # of DDPO the first round: the second samples from weights that differ by rounding
        one, two = ([row[name] for row in log[:rows]] for log in logs)
        assert one == pytest.approx(two, abs=1e-3)
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-2)


def spread_of_some(self, model, a_0, clips):
    """Rewards in the place of stage 06's: for every second clip they differ, for the others by
    rounding alone."""
    repeat = torch.arange(len(clips)) // len(
        {clip.id for clip in clips}
    )  # 0, 1, 2: row r * B + b is clip b's
    half_width = torch.tensor(
        [0.1 if int(clip.id[-1]) % 2 else 6e-8 for clip in clips], dtype=torch.float64
    )
    return 0.3 + (repeat - 1) * half_width


def spread_of_none(self, model, a_0, clips):
    return spread_of_some(self, model, a_0, [a_clip(id=clip.id + "0") for clip in clips])


TWO_RANKS = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_pipeline
from test_pipeline import stage
exec(sys.argv[1])
for number, *flags in json.loads(sys.argv[2]):
    stage(number).main(stage(number).parse_args(flags))
"""


def in_two_ranks(run, change, *jobs):
    """Stages one after the other, each with its flags, in the same two ranks, after a change to
    their code."""
    script = run.with_name("two_ranks.py")
    script.write_text(TWO_RANKS)
    commands = json.dumps([[number, *arguments(run, *flags)] for number, *flags in jobs])
    shell(TORCHRUN, "--standalone", "--nproc_per_node", 2, script, change, commands)


def test_two_ranks_divide_01_02_03_and_07_and_give_the_bytes_of_one(fresh, small_shards):
    two = shutil.copytree(fresh, fresh.with_name("two"))
    jobs = [
        ("01", "--sampling-steps", 2, "--max-clips", 12, "--num-samples", 3),
        ("02", "--num-rated-clips", 4),
    ]
    jobs += [("03",), ("07", "--systems", "ground_truth", "base")]
    for number, *flags in jobs:
        call(number, fresh, *flags)
    in_two_ranks(two, "stage('01').SHARD_CLIPS = 4", *jobs)
    ours, theirs = (files_of(place, *STAGES) for place in (two, fresh))
    assert len([name for name in theirs if name.startswith("03_scores/")]) == 3 * 3
    assert {
        name: content.replace(bytes(two), bytes(fresh)) for name, content in ours.items()
    } == theirs


def test_ddpo_on_equal_rewards_leaves_the_policy_as_it_was_and_says_so(run, capsys, monkeypatch):
    monkeypatch.setattr(stage("06").Reward, "__call__", spread_of_none)
    call("06", run, "--out", "none", "--steps", 4)
    base = files.load_pt(run / "00_base.pt")["net"]
    assert largest_difference(weights(run, "none"), base) == 0
    assert files.load_pt(run / "none/checkpoint.pt")["optimizer"]["state"] == {}
    log = read(run / "none/log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    assert [(row["no_spread"], row["grad_norm"]) for row in log] == [(1, 0)] * 4
    (warning,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")
    ]
    assert (
        "100% of the prompts taught nothing" in warning
        and "02's report" in warning
        and "--group-size" in warning
    )
    (run / "none/policy.pt").unlink()
    call("06", run, "--out", "none", "--steps", 4)  # a checkpoint without moments is taken up
    assert largest_difference(weights(run, "none"), base) == 0


def test_a_round_without_spread_changes_nothing_also_after_a_resume_and_on_two_ranks(
    run, monkeypatch
):
    flags = ("--steps", 12, "--save-every", 1, "--lr", 3e-5)
    monkeypatch.setattr(stage("06").Reward, "__call__", spread_of_some)
    kept, save = {}, training.save_checkpoint

    def keeping(folder, step, model, optimizer, made_from):
        moments = [
            moment.clone() for state in optimizer.state.values() for moment in state.values()
        ]
        kept[step] = [value.clone() for value in training.trained_state(model).values()] + moments
        save(folder, step, model, optimizer, made_from)

    monkeypatch.setattr(training, "save_checkpoint", keeping)
    call("06", run, "--out", "whole", *flags)
    log = read(run / "whole/log.jsonl")
    by_round = [row["no_spread"] for row in log[::2]]
    assert set(by_round) == {0, 0.5, 1}  # on two ranks, one prompt each: both, one of them, none
    for number in range(1, 6):
        before, after = kept[2 * number], kept[2 * number + 2]
        same = len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after))
        assert same == (by_round[number] == 1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, stage("06"), "train_step", 7)
        call("06", run, "--out", "stopped", *flags)
    call("06", run, "--out", "stopped", *flags)
    assert largest_difference(weights(run, "stopped"), weights(run, "whole")) == 0

    in_two_ranks(
        run,
        "stage('06').Reward.__call__ = test_pipeline.spread_of_some",
        ("06", "--out", "two", *flags),
    )
    two = read(run / "two/log.jsonl")
    assert [row["no_spread"] for row in two] == [row["no_spread"] for row in log]
    assert [row["grad_norm"] for row in two] == pytest.approx(
        [row["grad_norm"] for row in log], rel=1e-2
    )
    assert largest_difference(weights(run, "two"), weights(run, "whole")) < 1e-4


def seal_anew(run, name):
    """Makes the record of an output believe what it has become."""
    record = run / f"{name[:2]}_settings.json"
    made = json.loads(record.read_text())
    made["outputs"][name] = files.digest(run / name)
    record.write_text(json.dumps(made))


def exchange_winners_and_losers(run):
    """What another program's idea of the columns makes of 03_pairs.jsonl."""
    pairs = read(run / "03_pairs.jsonl")
    other = dict(
        winner="loser", loser="winner", p_winner="p_loser", p_loser="p_winner", clip="clip"
    )
    write(
        run / "03_pairs.jsonl",
        [{other[key]: value for key, value in pair.items()} for pair in pairs],
    )
    seal_anew(run, "03_pairs.jsonl")
    return len(pairs)


def test_pairs_whose_winner_is_the_worse_audio_are_named_by_04_and_05(run, capsys):
    count = exchange_winners_and_losers(run)
    call("04", run, "--redo")
    said = capsys.readouterr().out
    assert (
        f"warning: {count} of {count} mined pairs have a negative score_c" in said
        and "exchanged" in said
        and "rerun 03_mine_pairs.py --redo --min-score-c 0" in said
    )
    assert (
        "stage 1 is empty: no score_c is above the threshold 0.1, so 05 trains on stage 2 alone"
        in said
    )
    call("05", run, "--out", "backwards", "--steps", 3)
    said = capsys.readouterr().out
    assert "stage 1 (easy): 0 pairs, 0 steps" in said
    assert "curves: pairs are backwards: score_c is negative for 100% of the mined pairs" in said
    assert "03 with --redo --min-score-c 0, then 04 --redo, then 05 --out NAME" in said
    assert "healthy" not in said
    # The advice, followed:
    call("03", run, "--redo", "--min-score-c", 0)
    call("04", run, "--redo")
    call("05", run, "--out", "mined_anew", "--steps", 3)
    assert "backwards" not in capsys.readouterr().out


def test_mined_pairs_are_named_backwards_where_min_score_c_lets_them_in(run, capsys, monkeypatch):
    original = common.score_c
    monkeypatch.setattr(common, "score_c", lambda p_w, p_l: -original(p_w, p_l))
    call("03", run, "--redo", "--min-score-c", -1)
    count = len(read(run / "03_pairs.jsonl"))
    assert f"warning: {count} of {count} pairs have a negative score_c" in capsys.readouterr().out


def test_pairs_that_are_as_they_should_be_are_not_warned_of(finished):
    assert "negative score_c" not in finished.with_suffix(".log").read_text()


def test_two_nodes_equal_two_ranks_of_one_node(run):
    torchrun("05", run, "--out", "ranks", "--steps", 3)
    torchrun("05", run, "--out", "nodes", "--steps", 3, nodes=2)
    assert (run / "nodes" / "policy.pt").read_bytes() == (run / "ranks" / "policy.pt").read_bytes()
    ranks_log, nodes_log = logs_of(run, "ranks", "nodes")
    assert ranks_log == nodes_log


@pytest.mark.parametrize("number, flags, within", [
    ("05", ("--micro-batch", 1), 1e-5), ("05", ("--gradient-checkpointing",), 1e-5),
    ("06", ("--micro-batch", 1), 2e-6),  # a prompt's three audios together, and one by one
])  # fmt: skip
def test_memory_savers_do_not_change_the_result(run, number, flags, within):
    few = {"05": ("--steps", 4), "06": ("--steps", 2, "--micro-batch", 3, "--lr", 3e-5)}[number]
    call(number, run, "--out", "plain", *few)
    call(number, run, "--out", "saved", *few, *flags)
    assert largest_difference(weights(run, "plain"), weights(run, "saved")) < within
    plain, saved = (read(run / out / "log.jsonl") for out in ("plain", "saved"))
    for key in {"05": ("loss", "grad_norm"), "06": ("reward", "grad_norm", "approx_kl")}[number]:
        assert [row[key] for row in saved] == pytest.approx(
            [row[key] for row in plain], rel=1e-3, abs=1e-9
        )


# The oracle
# --------------------------------------------------------------------------------------------------


def test_no_stage_from_01_to_06_reads_the_truth_or_the_oracle(fresh, finished, tmp_path):
    for name in ("00_truth.jsonl", "00_oracle.pt"):
        (fresh / name).unlink()
    for name in ("02_ratings.jsonl", "03_human_choices.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    call("01", fresh)
    call("02", fresh, "--ratings", tmp_path / "02_ratings.jsonl")
    call("03", fresh, "--choices", tmp_path / "03_human_choices.jsonl")
    for number in ("04", "05", "06"):
        call(number, fresh)
    ours, theirs = (
        files_of(place, "01", "02", "03", "04", "05", "06") for place in (fresh, finished)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        place = ours[name].replace(str(fresh).encode(), str(finished).encode())
        assert without_times(name, place) == without_times(name, theirs[name]), name


# Other clips than the toy world's
# ----------------------------------------------------------------------------


def test_a_plain_folder_of_videos_of_any_size_rate_and_container(tmp_path, toy):
    videos, run = tmp_path / "videos", tmp_path / "run"
    make_video(videos / "wide.mp4", (320, 90), 30000 / 1001, 2.5)
    make_video(videos / "odd.mkv", (75, 131), 12, 2.2, pixels="yuv444p")
    make_video(videos / "deep" / "er" / "slow.mov", (64, 64), 10, 3.0, codec="mpeg4", sound=False)
    (videos / "notes.txt").write_text("no video")
    call("01", run, "--videos", videos, *toy)
    clips = read(run / "clips.jsonl")
    names = {"wide": "wide.mp4", "odd": "odd.mkv", "deep_er_slow": "deep/er/slow.mov"}
    assert {clip["id"]: clip["video"] for clip in clips} == names
    assert {(clip["split"], clip["caption"], clip["label"]) for clip in clips} == {
        ("train", None, None)
    }
    assert len(list((run / "01_audio").glob("*.wav"))) == 6
    wave, rate = soundfile.read(run / "01_audio" / "odd_1.wav")
    assert (len(wave), rate) == (32_000, 16_000) and np.abs(wave).max() > 0
    call("02", run)  # nobody has rated anything: the sheet is written, and that is all
    assert len(cells(run / "02_to_rate.csv")) == 6
    assert not (run / "02_ratings.jsonl").exists() and not (run / "02_audioscore.pt").exists()


@pytest.fixture
def youtube(finished, tmp_path):
    """Six videos named as VGGSound's are, and the list of their names."""
    names = [f"{'abcdefghijk'[::-1] if i % 2 else 'ABCDEFGHIJ_'}_{10 * i:06d}" for i in range(6)]
    (tmp_path / "videos").mkdir()
    for i, name in enumerate(names):
        shutil.copy(
            finished / "00_videos" / f"train{i:05d}.mp4", tmp_path / "videos" / f"{name}.mp4"
        )
    return tmp_path / "videos", names


def clips_and_sampled(run):
    clips, rows = read(run / "clips.jsonl"), read(run / "01_samples" / "00000.jsonl")
    return {clip["id"]: clip["split"] for clip in clips}, {row["clip"] for row in rows}


def test_vggsounds_csv(tmp_path, youtube, toy, capsys):
    videos, names = youtube
    split = {name: "test" if i > 3 else "train" for i, name in enumerate(names)}
    table = [f'{name[:11]},{int(name[12:])},"dog, barking",{split[name]}' for name in names]
    (tmp_path / "vggsound.csv").write_text("\n".join([*table, "lost_video_,30,bird,train\n"]))
    call("01", tmp_path / "run", "--clips", tmp_path / "vggsound.csv", "--videos", videos, *toy)
    assert clips_and_sampled(tmp_path / "run") == (split, set(names[:4]))
    assert {(c["caption"], c["label"]) for c in read(tmp_path / "run" / "clips.jsonl")} == {
        ("dog, barking",) * 2
    }
    assert [row["id"] for row in read(tmp_path / "run" / "01_missing.jsonl")] == [
        "lost_video__000030"
    ]
    said = capsys.readouterr().out
    assert "2 YouTube ids occur in more than one split" in said and "train 4 of 5" in said


def test_mmaudios_tsv_and_test_list(tmp_path, youtube, toy):
    videos, names = youtube
    for split, part in (("train", names), ("test", names[:2])):
        (tmp_path / f"vgg-{split}.tsv").write_text(
            "id\tlabel\n" + "".join(f"{name}\tdog\n" for name in part)
        )
    flags = (
        "--clips",
        tmp_path / "vgg-train.tsv",
        "--videos",
        videos,
        "--test-list",
        tmp_path / "vgg-test.tsv",
    )
    call("01", tmp_path / "run", *flags, *toy)
    split = {name: "test" if i < 2 else "train" for i, name in enumerate(names)}
    assert clips_and_sampled(tmp_path / "run") == (split, set(names[2:]))


def test_a_test_list_changes_the_split_of_a_clip_and_nothing_else(tmp_path, youtube, toy):
    videos, names = youtube
    rows = [
        {"id": name, "caption": f"caption {i}", "label": f"label {i}"}
        for i, name in enumerate(names)
    ]
    (videos / f"{names[0]}.mp4").rename(videos / "elsewhere.mp4")
    rows[0]["video"] = "elsewhere.mp4"
    write(
        tmp_path / "list.jsonl",
        [{**row, "split": "test"} if row is rows[3] else row for row in rows],
    )
    (tmp_path / "test.tsv").write_text(f"id\tlabel\n{names[0]}\tdog\n", encoding="utf-8-sig")
    flags = (
        "--clips",
        tmp_path / "list.jsonl",
        "--videos",
        videos,
        "--test-list",
        tmp_path / "test.tsv",
    )
    call("01", tmp_path / "run", *flags, *toy, "--max-clips", 0)
    clips = {clip["id"]: clip for clip in read(tmp_path / "run" / "clips.jsonl")}
    wanted = {
        "id": names[0],
        "video": "elsewhere.mp4",
        "caption": "caption 0",
        "label": "label 0",
        "split": "test",
    }
    assert clips[names[0]] == wanted and names[3] not in clips  # the test split is exactly the list


TSV_SPLITS = [("vgg-test", "test"), ("VGG-TEST", "test"), ("x_val", "val"), ("a.train", "train")]
TSV_SPLITS += [("latest", "train"), ("testing", "train"), ("test-2", "train")]


@pytest.mark.parametrize("name, split", TSV_SPLITS)
def test_the_split_of_a_tsv_is_the_last_word_of_its_name(tmp_path, name, split):
    (tmp_path / f"{name}.tsv").write_text("id\tlabel\na\tdog\n")
    assert [clip.split for clip in stage("01").clips_of_tsv(tmp_path / f"{name}.tsv")] == [split]


def test_captions_labels_and_clips_of_speech_are_counted_and_unread_fields_said(tmp_path, capsys):
    speech = "male speech, man speaking"
    lines = [
        {"id": "a", "captoin": "x", "label": f" {speech} "},
        {"id": "b", "caption": "y", "label": "Male Speech"},
    ]
    lines += [
        {"id": "c", "label": "male speach, man speaking"},
        {"id": "d", "label": "dog barking"},
        {"id": "e"},
    ]
    write(tmp_path / "list.jsonl", lines)
    clips = stage("01").clips_of_jsonl(tmp_path / "list.jsonl")
    stage("01").check_clips(clips, "list.jsonl")
    unread, counts = capsys.readouterr().out.splitlines()
    assert "field 'captoin' of 1 lines is not read" in unread and "caption" in unread
    assert clips[0].label == speech  # stripped
    assert counts == "clips: 5, with caption 1, with label 4, of human speech 1"


def test_a_folder_run_keeps_its_list_when_a_video_is_added(tmp_path, youtube, toy, capsys):
    flags = ("--videos", youtube[0], *toy)
    call("01", tmp_path / "run", *flags)
    before = files_of(tmp_path / "run", "01", "cl")
    shutil.copy(youtube[0] / f"{youtube[1][0]}.mp4", youtube[0] / "new.mp4")
    call("01", tmp_path / "run", *flags)
    assert (
        "1 videos appeared since" in capsys.readouterr().out
        and files_of(tmp_path / "run", "01", "cl") == before
    )


@pytest.fixture
def listed(tmp_path, youtube, toy):
    """The flags for a list of those videos, of which the last is for testing."""
    rows = [
        {"id": name, "split": "train" if i < 5 else "test"} for i, name in enumerate(youtube[1])
    ]
    write(tmp_path / "list.jsonl", rows)
    return "--clips", tmp_path / "list.jsonl", "--videos", youtube[0], *toy


def test_max_clips_draws_a_seeded_subset_of_the_train_clips(tmp_path, youtube, listed):
    drawn = {}
    for run, seed in (("one", 0), ("again", 0), ("other", 1), ("third", 2)):
        call("01", tmp_path / run, *listed, "--max-clips", 2, "--seed", seed)
        drawn[run] = clips_and_sampled(tmp_path / run)[1]
    assert all(len(part) == 2 and part < set(youtube[1][:5]) for part in drawn.values())
    assert drawn["one"] == drawn["again"] and len({frozenset(part) for part in drawn.values()}) > 1


def test_a_run_prepared_without_train_clips_gets_them_later(tmp_path, youtube, listed, capsys):
    run, video = tmp_path / "run", youtube[0] / f"{youtube[1][0]}.mp4"
    video.rename(tmp_path / "later.mp4")
    call("01", run, *listed, "--max-clips", 0)
    (tmp_path / "later.mp4").rename(video)
    assert "prepared" in capsys.readouterr().out and not (run / "01_samples").exists()
    stopped(call, "01", run, *listed, "--guidance", 2)
    call("01", run, *listed)
    assert clips_and_sampled(run)[1] == set(youtube[1][:5])


def test_a_toy_run_prepared_without_train_clips_keeps_its_own_list(fresh, finished):
    listed = (fresh / "clips.jsonl").read_bytes()
    for flags in (("--max-clips", 0), ("--max-clips", 0), ()):
        call("01", fresh, *flags)
        assert (fresh / "clips.jsonl").read_bytes() == listed
    assert files_of(fresh, "01_s") == files_of(finished, "01_s")


def test_a_toy_world_that_was_stopped_half_made_is_said_to_be_one(fresh, refused):
    (fresh / "run.json").unlink()
    for flags in ((), ("--model", "toy")):
        assert "stage 00 has not finished" in refused("01", fresh, *flags)


def test_a_rerun_keeps_its_list_when_videos_appear_or_vanish(tmp_path, youtube, listed, capsys):
    run, (first, second) = tmp_path / "run", (youtube[0] / f"{name}.mp4" for name in youtube[1][:2])
    first.rename(tmp_path / "kept.mp4")
    call("01", run, *listed)
    before = files_of(run, "01", "cl")
    (tmp_path / "kept.mp4").rename(first)
    second.unlink()
    capsys.readouterr()
    call("01", run, *listed)
    assert "1 videos appeared since, 1 vanished" in capsys.readouterr().out
    assert files_of(run, "01", "cl") == before


def test_the_toy_model_on_other_clips_goes_on_with_its_own_settings(tmp_path, youtube, finished):
    flags = (
        "--model",
        "toy",
        "--checkpoint",
        finished / "00_base.pt",
        "--videos",
        youtube[0],
        "--max-clips",
        2,
    )
    for _ in range(2):
        call("01", tmp_path / "run", *flags)
        assert about(tmp_path / "run" / "run.json")["sampler"] == {"steps": 8, "guidance": 1.5}


# What binds files to each other
# -------------------------------------------------------------------------------


def test_a_deleted_audio_or_shard_is_made_again_and_nothing_reads_less_meanwhile(
    fresh, small_shards, refused
):
    call("01", fresh)
    whole = files_of(fresh, "01")
    (fresh / "01_samples/00002.jsonl").write_text("")
    assert "some of the 20 train clips are not there" in refused("02", fresh)
    for name in ("01_audio/train00001_2.wav", "01_samples/00001.pt", "01_samples/00003.jsonl"):
        (fresh / name).unlink()
    call("01", fresh)
    assert files_of(fresh, "01") == whole


def test_another_shards_latents_are_not_taken_for_this_ones(fresh, finished, small_shards):
    call("01", fresh)
    shutil.copy(fresh / "01_samples/00001.pt", fresh / "01_samples/00000.pt")
    shards = shards_of(fresh)
    assert shards.latents([("train00004", 0)]).isfinite().all()
    with pytest.raises(common.Stop, match="00000.pt: not of the audios in 00000.jsonl"):
        shards.latents([("train00000", 0)])


def test_another_trainings_checkpoint_or_a_later_one_is_refused(run, refused):
    call("05", run, "--out", "other", "--steps", 2, "--seed", 1)
    for source, step in (("06_ddpo", None), ("other", None), ("05_flow_dpo", 1_000_000)):
        state = files.load_pt(run / source / "checkpoint.pt")
        files.save_pt(run / "05_flow_dpo/checkpoint.pt", state | ({"step": step} if step else {}))
        assert "05_flow_dpo/checkpoint.pt: of another training" in refused("05", run)


MADE = [
    ("02_audioscore.pt", "03", "02_fit_audioscore.py"),
    ("03_pairs.jsonl", "04", "03_mine_pairs.py"),
]
MADE += [
    ("04_stage1.jsonl", "05", "04_curriculum_split.py"),
    ("02_scores.jsonl", "06", "02_fit_audioscore.py"),
]
GIVEN = [("01_samples/00000.jsonl", "03", "02_fit_audioscore.py")]
GIVEN += [
    ("03_human_choices.jsonl", "05", "03_mine_pairs.py"),
    ("02_ratings.jsonl", "07", "02_fit_audioscore.py"),
]


@pytest.mark.parametrize("name, number, script", MADE + GIVEN)
def test_a_changed_input_is_refused_by_every_later_stage_and_the_stage_to_rerun_named(
    name, number, script, run, refused
):
    (run / name).write_bytes((run / name).read_bytes() + b"\n")
    line = refused(number, run, *(("--out", "x") if number in ("05", "06") else ()))
    reason = (
        "not the file that was written here"
        if (name, number, script) in MADE
        else "changed after it was read for"
    )
    assert reason in line and f"rerun {script} --run-dir {run} --redo" in line


FAILING = """
import sys
from common import ranks, record, rows
here = ranks.setup()
with record.stage(sys.argv[1], "04", outputs=["04_x.jsonl"]) as stage:
    stage.claim({})
    if here.first:
        rows.write(stage.run / "04_x.jsonl", [])
    if str(here.rank) in sys.argv[2:]:
        raise KeyError
"""


@pytest.mark.parametrize("failing, outputs", [((), ["04_x.jsonl"]), ((0,), []), ((1,), [])])
def test_an_error_on_any_rank_seals_nothing(failing, outputs, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    launch = (
        [str(TORCHRUN), "--standalone", "--nproc_per_node", "2"]
        if failing == (1,)
        else [sys.executable]
    )
    command = [*launch, str(script), str(tmp_path / "run"), *map(str, failing)]
    ended = subprocess.run(
        command, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120
    )
    assert (ended.returncode == 0) == (not failing), ended.stderr
    assert list(about(tmp_path / "run" / "04_settings.json")["outputs"]) == outputs


def test_equal_pairs_and_a_winner_against_itself_are_refused(tmp_path):
    pair = dict(clip="a", winner=0, loser=1, score_c=0.5, source="auto")
    for other in (pair, pair | dict(winner=1, loser=0), pair | dict(clip="b", winner=2, loser=2)):
        write(tmp_path / "pairs.jsonl", [pair, other])
        with pytest.raises(
            common.Stop, match="pairs.jsonl, line 2: .* is no pair, or stands here twice"
        ):
            common.read_pairs(tmp_path / "pairs.jsonl", rows.SplitPair, "")


def test_a_cut_last_line_of_a_log_is_dropped_and_the_rest_kept(run):
    log = run / "05_flow_dpo/log.jsonl"
    kept = log.read_bytes()
    log.write_bytes(kept + b'{"step": 8, "lo')
    call("05", run)
    assert log.read_bytes() == kept


def test_temporaries_of_killed_runs_are_removed_by_the_next_that_holds_the_lock_and_others_left(
    run,
):
    stale = {
        "02": [".02_scores.jsonl.1.tmp.jsonl", "02_scores/.00000.toy.pt.1.tmp.pt"],
        "05": ["05_flow_dpo/.x.pt.1.tmp.pt"],
    }
    stale["01"] = [
        ".run.json.1.tmp.json",
        "01_audio/.a_0.wav.1.tmp.wav",
        "01_samples/.00000.pt.1.tmp.pt",
    ]
    others = [run / "05_flow_dpo_2/.policy.pt.1.tmp.pt", run / "07_audio/base/.x.wav.1.tmp.wav"]
    (run / "05_flow_dpo_2").mkdir()
    for path in [*others, *(run / name for names in stale.values() for name in names)]:
        path.write_bytes(b"half")
    for number, names in stale.items():
        call(number, run)
        assert [name for name in names if (run / name).exists()] == []
    assert all(path.exists() for path in others)


def test_a_file_and_its_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: order.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))),
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b, replace=os.replace: (order.append("rename"), replace(a, b))
    )
    files.write_text(tmp_path / "x.json", "{}")
    assert order == [f".x.json.{os.getpid()}.tmp.json", "rename", tmp_path.name]


# People and published systems
# --------------------------------------------------------------------------------


def fill(sheet, column, answers):
    """What a spreadsheet does with a sheet: in its place."""
    rows = cells(sheet)
    for row, answer in zip(rows, answers):
        row[column] = answer
    with open(sheet, "w", newline="") as stream:
        csv.writer(stream).writerows([rows[0], *(row.values() for row in rows)])
    return sheet.read_bytes()


def test_sheets_that_people_fill_in_are_read_in_place_and_never_written_over(run, refused):
    for path in (run / "00_truth.jsonl", *run.glob("0[23]_*.*")):
        path.unlink()
    call("02", run)
    filled = fill(run / "02_to_rate.csv", "rating", ("Good", "Bad", "Medium", "Medium") * 5)
    call("02", run)  # not given yet: asks again
    call("02", run, "--ratings", run / "02_to_rate.csv")
    assert (run / "02_to_rate.csv").read_bytes() == filled and len(
        read(run / "02_ratings.jsonl")
    ) == 20
    call("03", run)
    assert "no choice" in refused("03", run, "--choices", run / "03_to_choose.csv", "--redo")
    filled = fill(run / "03_to_choose.csv", "choice", ("a", "b", "tie"))
    call("03", run, "--choices", run / "03_to_choose.csv", "--redo")
    assert (run / "03_to_choose.csv").read_bytes() == filled and len(
        read(run / "03_human_pairs.jsonl")
    ) == 2


def test_words_are_taken_as_meant_and_replaced_answers_counted(run, capsys):
    answers = read(run / "02_ratings.jsonl")
    spelled = []
    for i, answer in enumerate(answers):
        rating = answer["rating"].upper() if i % 2 else f" {answer['rating'].lower()} "
        spelled.append(answer | {"rating": rating})
    write(run / "spelled.jsonl", spelled)
    call("02", run, "--ratings", run / "spelled.jsonl")
    assert read(run / "02_ratings.jsonl") == answers
    write(run / "spelled.jsonl", spelled[:10])
    call("02", run, "--ratings", run / "spelled.jsonl", "--redo")
    assert f"{len(answers)} answers are replaced by the 10 of" in capsys.readouterr().out


def test_that_nothing_will_be_left_to_mine_is_said_when_the_sheet_is_written(run, capsys):
    for name in ("00_truth.jsonl", "02_ratings.jsonl"):
        (run / name).unlink()
    call("02", run, "--num-rated-clips", 20)
    assert "warning: that is every clip, and rated clips are not mined" in capsys.readouterr().out
    call("02", run, "--num-rated-clips", 19)
    assert "warning" not in capsys.readouterr().out


def test_cells_are_no_formulas_and_ids_come_back_as_they_are(run):
    name = "-0jeONf82dE_000021"
    sample = common.FoundSample(
        name, 0, 1, f"01_audio/{name}_0.wav", 0, "", True, 0.5, 0.0, "00000"
    )
    texts = {"=1+1": "'=1+1", "+a": "'+a", "-a": "'-a", "@a": "'@a", "a\n=b": "a =b", None: ""}
    for caption, cell in texts.items():
        (run / "02_to_rate.csv").unlink()
        stage("02").write_rating_sheet(
            run, [name], {name: [sample]}, {name: a_clip(caption=caption)}
        )
        ((_, row),) = files.read_csv(run / "02_to_rate.csv", ("clip", "caption"))
        assert (row["clip"], row["caption"]) == (name, cell)


def test_prompts_of_ddpo_are_no_clips_that_audioscore_was_fitted_on(run, monkeypatch):
    drawn, draw = [], stage("06").draw_prompts
    monkeypatch.setattr(
        stage("06"), "draw_prompts", lambda clips, *args: drawn.append(clips) or draw(clips, *args)
    )
    call("06", run, "--out", "x", "--steps", 1, "--updates", 1)
    rated = {row["clip"] for row in read(run / "02_ratings.jsonl")}
    assert {clip.id for clip in drawn[0]} == {f"train{i:05d}" for i in range(20)} - rated and len(
        rated
    ) == 8


def test_silent_audio_of_a_broken_policy_is_counted_and_warned_of(run, tmp_path, capsys):
    shutil.copytree(run / "05_flow_dpo", tmp_path / "broken")
    state = weights(run, "05_flow_dpo")
    files.save_pt(
        tmp_path / "broken/policy.pt", {key: value * float("nan") for key, value in state.items()}
    )
    call("07", run, "--split", "val", "--systems", "base", f"broken={tmp_path / 'broken'}")
    assert "warning: 6 of 6 audios of broken are silent or broken" in capsys.readouterr().out
    base = files.load_pt(run / "00_base.pt")
    base["net"] = {key: value * float("nan") for key, value in base["net"].items()}
    for name in ("00_scorers.pt", "run.json"):
        shutil.copy(run / name, tmp_path)
    files.save_pt(tmp_path / "00_base.pt", base)
    flags = (
        "--model",
        "toy",
        "--checkpoint",
        tmp_path / "00_base.pt",
        "--videos",
        run / "00_videos",
        "--max-clips",
        2,
    )
    call("01", tmp_path / "new", *flags, "--num-samples", 2)
    said = capsys.readouterr().out
    assert (
        "audios: 4, 4 not finite (never used in a pair), 4 silent" in said
        and "warning: more than 1 %" in said
    )


def test_a_policy_folder_is_named_as_stage_05_says_and_exactly_what_is_named_is_evaluated(
    run, capsys
):
    call("05", run, "--out", "05_beta200", "--beta", 200, "--steps", 2)
    assert (
        f"07_evaluate.py --run-dir {run} --systems ground_truth base 05_beta200\n"
        in capsys.readouterr().out
    )
    for flags, systems in (
        (("--systems", "base", "05_beta200"), ["base", "05_beta200"]),
        ((), list(SYSTEMS)),
    ):
        call("07", run, *flags)
        assert (
            list(dict.fromkeys(row["system"] for row in read(run / "07_results.jsonl"))) == systems
        )


def test_the_toy_worlds_people_answer_anew_when_redo_asks_them_other_questions(run):
    before = read(run / "02_ratings.jsonl")
    set_rating(run, 0)
    edited = read(run / "02_ratings.jsonl")
    call("02", run, "--redo")
    assert read(run / "02_ratings.jsonl") == edited  # the same audios: what a person changed stays
    call("02", run, "--redo", "--num-rated-clips", 6)
    assert {row["clip"] for row in read(run / "02_ratings.jsonl")} < {row["clip"] for row in before}
    call("03", run, "--redo", "--num-human-pairs", 4)
    assert len(read(run / "03_human_choices.jsonl")) == 4


def test_without_choices_stage_03_asks_for_them_and_goes_on(run, capsys):
    for name in ("00_truth.jsonl", "03_human_choices.jsonl", "03_settings.json"):
        (run / name).unlink()
    call("03", run)
    assert "no human choices" in capsys.readouterr().out
    assert read(run / "03_pairs.jsonl") and read(run / "03_human_pairs.jsonl") == []
    rows = cells(run / "03_to_choose.csv")
    assert rows and all(row["a"] != row["b"] and (run / row["wav_a"]).exists() for row in rows)
    answers = run / "chosen.csv"
    answers.write_text(
        "clip,a,b,choice\n" + "".join(f"{r['clip']},{r['a']},{r['b']},b\n" for r in rows)
    )
    call("03", run, "--choices", answers, "--redo")
    made = {
        (pair["clip"], pair["winner"], pair["loser"]) for pair in read(run / "03_human_pairs.jsonl")
    }
    assert made == {(row["clip"], int(row["b"]), int(row["a"])) for row in rows}


def test_ratings_in_many_csv_files_are_those_in_one_jsonl_and_repeats_do_not_count(run, finished):
    columns = ("clip", "k", "rating", "rater", "repeat", "seconds", "comment")
    rows, files = read(run / "02_ratings.jsonl"), [run / f"{i}.csv" for i in range(3)]
    for i, file in enumerate(files):
        part = [
            [row["clip"], row["k"], row["rating"], row["rater"], 0, 4.5, "a, b"]
            for row in rows[i::3]
        ]
        again = [*part[0][:4], 1, 3, ""]
        again[2] = "Good" if again[2] == "Bad" else "Bad"
        absent = [*part[0][:2], "", "absent", "", "", ""]  # has not rated it yet
        with open(
            file, "w", newline="", encoding="utf-8-sig"
        ) as stream:  # as a spreadsheet saves it
            csv.writer(stream).writerows([columns, *part, again, absent])
    other = [row | {"rater": "bob", "rating": "Bad"} for row in rows]
    write(run / "bob.jsonl", other)
    call("02", run, "--redo", "--ratings", *files, run / "bob.jsonl", "--exclude-rater", "bob")
    kept = read(run / "02_ratings.jsonl")
    assert (len(kept), kept[0]) == (
        len(rows) + 3 + len(other),
        rows[0] | {"seconds": 4.5, "comment": "a, b"},
    )
    assert (run / "02_audioscore.pt").read_bytes() == (finished / "02_audioscore.pt").read_bytes()


def test_audioscore_is_fitted_on_ratings_from_elsewhere_alone_which_are_never_mined(
    run, tmp_path, capsys
):
    own, clips = (
        read(run / "03_scores" / "00000.jsonl"),
        {clip["id"]: clip for clip in read(run / "clips.jsonl")},
    )
    for path in run.glob("0[23]_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rows, root = [], tmp_path / "root"
    root.mkdir()
    for i, row in enumerate(own[:20]):
        clip, audio = clips[row["clip"]], f"{'abc'[i % 3]}{i}.wav"
        shutil.copy(run / "01_audio" / f"{row['clip']}_{row['k']}.wav", root / audio)
        shutil.copy(run / "00_videos" / clip["video"], root / f"film_{row['clip']}.mp4")
        about = dict(
            caption=clip.get("caption"), label=clip.get("label"), rating=common.RATINGS[i % 3]
        )
        rows.append(dict(audio=audio, video=f"film_{row['clip']}.mp4", **about))
    shutil.copy(run / "00_videos" / "test00000.mp4", root / "ABCDEFGHIJK_000010.mp4")
    lost = dict(rows[0], video="ABCDEFGHIJK_000010.mp4")
    listed = read(run / "clips.jsonl")
    write(
        run / "clips.jsonl", [*listed, dict(listed[-1], id="ABCDEFGHIJK_000020")]
    )  # a test clip of that video
    write(run / "other.jsonl", [*rows, lost])
    call("02", run, "--ratings", run / "other.jsonl", "--ratings-root", root)
    said = capsys.readouterr().out
    assert "left out: 1 ratings from elsewhere" in said and "20 of 20 audios of 4 clips" in said
    judged = {row["k"]: row for row in read(run / "02_elsewhere.jsonl")}
    assert len(common.rows.read(run / "02_elsewhere.jsonl", common.rows.ElsewhereScore)) == 20
    for row, mine in zip(rows, own):  # scored in batches of other sizes
        for key in ("ib", "clap", "desync_s", "pesq"):
            assert same_rows(judged[row["audio"]][key], mine[key], SCORES)
    assert read(run / "02_scores.jsonl") == []
    call("02", run, "--ratings-root", root)  # its own record of the answers is enough
    call("03", run)
    said = capsys.readouterr().out
    assert (
        "clips: 20 in" in said
        and "rated by people" not in said
        and "none of this run's own is rated" in said
    )
    assert {row["clip"] for row in read(run / "03_pairs.jsonl")} <= clips.keys()
    assert cells(run / "03_to_choose.csv") == []


def test_an_untrained_policy_differs_from_base_by_nothing_and_wins_half(run):
    call("05", run, "--lr", 0, "--steps", 2, "--out", "still")
    call("07", run, "--split", "val", "--systems", "ground_truth", "base", "still=still")
    found = results(run, "val")
    assert found["still", "win_rate"]["value"] == 0.5
    for metric in ("ib", "desync_s", "p_good", "oracle_semantic"):
        row = found["still", metric]
        assert (row["diff"], row["diff_low"], row["diff_high"]) == (0, 0, 0) and row["n"] == 6
    assert found["still", "fd"]["diff"] == pytest.approx(0, abs=1e-6)
    assert (
        read(run / "07_results.jsonl")[0]["system"] == "ground_truth"
    )  # the test split's numbers are untouched


def test_a_folder_of_audio_is_a_system_and_the_truth_itself_is_at_distance_0(
    run, tmp_path, refused
):
    """Neither needs the weights of a model."""
    folder, clips = tmp_path / "published", common.read_clips(run, "val")
    folder.mkdir()
    (run / "00_base.pt").unlink()
    for clip in clips:  # a container with the same sound
        shutil.copy(clip.path, folder / f"{clip.id}.mp4")
    flags = ("--split", "val", "--systems", "ground_truth", f"published={folder}")
    call("07", run, *flags)
    found = results(run, "val")
    assert found["published", "fd"]["value"] == pytest.approx(0, abs=1e-3)
    assert found["published", "kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["published", "ib"]["value"] == found["ground_truth", "ib"]["value"]
    (folder / f"{clips[3].id}.mp4").unlink()
    assert f"published: audio for 5 of 6 val clips, first missing {clips[3].id}" in refused(
        "07", run, *flags
    )
    call("07", run, *flags, "--allow-missing")
    found = results(run, "val")
    assert (found["published", "ib"]["n"], found["ground_truth", "ib"]["n"]) == (5, 6)


def test_a_system_without_audio_for_a_whole_block_of_clips_is_judged_on_the_others(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "BLOCK_CLIPS", 4)
    clips = [clip["id"] for clip in read(run / "clips.jsonl") if clip["split"] == "test"]
    for clip in clips[:3]:
        shutil.copy(run / "07_audio/base" / f"{clip}.wav", tmp_path / f"{clip}.wav")
    call("07", run, "--systems", "base", f"few={tmp_path}", "--allow-missing")
    found = results(run)
    assert (found["few", "ib"]["n"], found["base", "ib"]["n"], len(clips)) == (3, 8, 8)


def test_a_test_clip_whose_video_or_sound_cannot_be_read_is_left_out_where_it_must(run, capfd):
    names = [clip["id"] for clip in read(run / "clips.jsonl") if clip["split"] == "test"]
    whole = (run / "00_videos" / f"{names[0]}.mp4").read_bytes()
    make_video(
        run / "00_videos" / f"{names[0]}.mp4", (64, 64), 25, 0.8
    )  # too short to look at, but it sounds
    (run / "00_videos" / f"{names[1]}.mp4").write_bytes(whole[:700])  # neither
    call("07", run, "--allow-missing")
    found, said = results(run), capfd.readouterr().err
    assert f"{names[0]}: too short" in said and f"{names[1]}: unreadable" in said
    assert found["ground_truth", "ib"]["n"] == 6 and found["ground_truth", "is"]["n"] == 7
    assert (
        found["base", "ib"]["n"] == found["base", "desync_s"]["n"] == 6
    )  # its audio is cached, the video is gone
    assert all(row["value"] is None or np.isfinite(row["value"]) for row in found.values())


def test_coverage_counts_the_listed_clips_without_video(run, capsys):
    write(
        run / "01_missing.jsonl",
        [{"id": x, "split": s, "reason": "no"} for x, s in (("a", "test"), ("b", "train"))],
    )
    call("07", run, "--systems", "ground_truth", "base")
    assert "1 more listed test clips have no video" in capsys.readouterr().out


def test_a_cached_audio_of_another_policy_is_never_taken_for_this_ones_and_foreign_audio_left_alone(
    run, refused
):
    record, names = (
        run / "07_audio/flow_dpo/settings.json",
        sorted((run / "07_audio/flow_dpo").glob("*.wav")),
    )
    kept, made = names[0].read_bytes(), about(record)
    names[0].write_bytes(names[1].read_bytes())
    record.write_text(
        json.dumps(made | {"settings": made["settings"] | {"policy": "0123456789abcdef"}})
    )
    call("07", run)
    assert names[0].read_bytes() == kept and about(record) == made
    record.unlink()
    assert "07_audio/flow_dpo: holds audio that stage 07 did not make" in refused("07", run)
    assert all(path.exists() for path in names)


def test_a_name_given_to_another_policy_voids_its_audio_of_both_splits(run):
    of_base = {clip.id: run / f"07_audio/x/{clip.id}.wav" for clip in common.read_clips(run, "val")}
    call("07", run, "--split", "val", "--systems", "x=05_flow_dpo")
    kept = {name: wav.read_bytes() for name, wav in of_base.items()}
    call("07", run, "--split", "test", "--systems", "x=06_ddpo")
    call("07", run, "--split", "val", "--systems", "x=06_ddpo", "ddpo")
    for name, wav in of_base.items():
        assert wav.read_bytes() == (run / f"07_audio/ddpo/{name}.wav").read_bytes() != kept[name]
