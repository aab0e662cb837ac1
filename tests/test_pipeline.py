"""The whole pipeline as a user runs it, smaller: what a run contains, and that it can be stopped,
repeated, divided."""

import csv
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter

import av
import campaign
import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    LATENTS,
    PROBABILITIES,
    ROOT,
    STAGES,
    SYSTEMS,
    TORCHRUN,
    a_clip,
    arguments,
    base_weights,
    call,
    cells,
    close,
    distance,
    ended,
    files_of,
    interrupted,
    judged,
    largest_difference,
    log_of,
    make_video,
    read,
    read_json,
    remove,
    results,
    said,
    set_rating,
    shards_of,
    stage,
    start,
    stopped,
    torchrun,
    weights,
    without_times,
    write,
)

import common
from adapters.toy import Toy, ToyScorer
from adapters.toy_people import Truth
from common import AudioScore, files, inputs, media, ranks, record, rows, scoring, training

# What a finished run contains

TYPES = {
    "run.json": rows.Run,
    "weights.json": rows.Weights,
    "clips.jsonl": rows.Clip,
    "00_truth.jsonl": Truth,
    "01_samples/00000.jsonl": rows.Sample,
    "02_ratings.jsonl": rows.RatingAnswer,
    "02_scores.jsonl": rows.RatedScore,
    "03_human_choices.jsonl": rows.ChoiceAnswer,
    "03_scores/00000.jsonl": rows.Score,
    "03_pairs.jsonl": rows.Pair,
    "03_human_pairs.jsonl": rows.Pair,
    "04_stage1.jsonl": rows.SplitPair,
    "04_stage2.jsonl": rows.SplitPair,
    "05_flow_dpo/log.jsonl": rows.FlowDpoStep,
    "06_ddpo/log.jsonl": rows.DdpoStep,
    "07_results.jsonl": rows.Result,
    "07_systems.json": rows.Systems,
}
TYPES |= {f"{x}/policy.json": rows.Policy for x in ("05_flow_dpo", "06_ddpo")}
TYPES |= {f"{x}/settings.json": rows.Record for x in ("05_flow_dpo", "06_ddpo")}
UNTYPED = """00_base.pt 00_scorers.pt 00_oracle.pt 00_twin.pt 00_videos 01_samples/00000.pt 01_audio
02_to_rate.csv 02_audioscore.pt 03_to_choose.csv 02_scores/00000.toy.pt 03_scores/00000.toy.pt
03_scores/00000.toy_video.pt 07_clips/test_00000.toy_video.pt 07_clips/test_00000.features_video.pt
07_scores/base/test_00000.toy.pt 05_flow_dpo/policy.pt 05_flow_dpo/checkpoint.pt 06_ddpo/policy.pt
06_ddpo/checkpoint.pt"""


def test_every_file_of_a_run_is_there_and_holds_every_field_of_its_type(finished):
    for name, kind in TYPES.items():
        read_typed, read_plain = rows.read_json, lambda path: [read_json(path)]
        if name.endswith(".jsonl"):
            read_typed, read_plain = rows.read, read
        assert read_typed(finished / name, kind), name
        fields = [x for x in kind.__struct_encode_fields__ if x != "peak_gb"]
        if not kind.__struct_config__.omit_defaults:
            for line in read_plain(finished / name):
                assert [x for x in line if x != "peak_gb"][: len(fields)] == fields, name
    assert [name for name in UNTYPED.split() if not (finished / name).exists()] == []
    assert [path for path in finished.rglob("*") if ".tmp" in path.name] == []


def test_every_stage_says_what_to_run_next(finished):
    parts = finished.with_suffix(".log").read_text().split("== ")[1:]
    names = sorted({*(path.name for path in STAGES.values()), "08_listen.py"})
    for part, name in zip(parts, names[1:]):
        assert f"next: python {name} --run-dir {finished}" in part


def test_what_to_run_next_can_be_pasted_where_a_folder_has_a_space(run, capsys):
    place = run.rename(run.with_name("my run"))
    call("04", place)
    printed = capsys.readouterr().out
    commands = [line[6:] for line in printed.splitlines() if line[:6] in ("next: ", "  or: ")]
    assert len(commands) == 2 and all(f" --run-dir '{place}'" in line for line in commands)


def test_clips_have_real_videos_and_the_truth_is_apart(finished):
    clips, truth = read(finished / "clips.jsonl"), read(finished / "00_truth.jsonl")
    assert {clip["split"] for clip in clips} == {"train", "val", "test"}
    assert [row["id"] for row in truth] == [clip["id"] for clip in clips]
    assert all(2 <= len(row["hits_s"]) <= 4 for row in truth)
    with av.open(str(inputs.read_clips(finished)[0].path)) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]


def test_run_json_records_model_sampler_and_seed(finished):
    run = inputs.read_run(finished)
    assert (run.model, run.num_samples, run.seed, run.size) == ("toy", 5, 0, "tiny")
    assert run.checkpoint_digest == files.digest(finished / "00_base.pt")
    assert (run.sampler.steps, run.sampler.guidance) == (8, 1.5)


def test_five_audible_audios_per_train_clip(finished):
    train = [clip.id for clip in inputs.read_clips(finished, "train")]
    audios = rows.read(finished / "01_samples" / "00000.jsonl", rows.Sample)
    rate = inputs.read_run(finished).sample_rate_hz
    assert {(x.clip, x.k) for x in audios} == {(clip, k) for clip in train for k in range(5)}
    assert len({audio.seed for audio in audios}) == len(audios) == 5 * len(train)
    for audio in audios:
        wave, rate_hz = soundfile.read(finished / audio.wav)
        assert rate_hz == rate and wave.shape == (2 * rate,)
        assert np.abs(wave).max() == pytest.approx(audio.peak, abs=1e-4)
    shard = files.load_pt(finished / "01_samples" / "00000.pt")
    assert shard["latents"].shape[0] == len(audios) and shard["latents"].isfinite().all()
    assert {len(value) for value in shard["features"].values()} == {len(train)}


def test_every_audio_that_was_asked_about_is_rated_and_not_all_alike(finished):
    ratings, asked = read(finished / "02_ratings.jsonl"), cells(finished / "02_to_rate.csv")
    # A tiny world's model makes hardly any that is Good.
    assert {"Medium", "Bad"} <= {row["rating"] for row in ratings} <= set(common.RATINGS)
    rated = {(row["clip"], row["k"]) for row in ratings}
    assert {(row["clip"], int(row["k"])) for row in asked} == rated


def test_scores_are_null_exactly_where_they_do_not_apply(finished):
    clips = {clip.id: clip for clip in inputs.read_clips(finished)}
    scores = rows.read(finished / "03_scores" / "00000.jsonl", rows.Score)
    assert len(scores) == len(read(finished / "01_samples" / "00000.jsonl"))
    for score in scores:
        clip = clips[score.clip]
        assert (score.clap is None) == (clip.caption is None)
        speaks = clip.label == "person speaking"
        assert score.pesq is None or (speaks and 1 <= score.pesq <= 4.7)
        assert -1 <= score.ib <= 1 and score.desync_s >= 0 and score.is_nats > -1e-4
        assert sum(score.p) == pytest.approx(1, abs=1e-5) and min(score.p) >= 0
    assert any(score.pesq is not None for score in scores)
    assert any(score.clap is not None for score in scores)


def test_a_pair_is_the_best_and_the_worst_of_its_clip_and_rated_clips_are_not_mined(finished):
    p = {}
    for score in rows.read(finished / "03_scores" / "00000.jsonl", rows.Score):
        p.setdefault(score.clip, {})[score.k] = score.p
    rated = {row["clip"] for row in read(finished / "02_ratings.jsonl")}
    mined = rows.read(finished / "03_pairs.jsonl", rows.Pair)
    human = rows.read(finished / "03_human_pairs.jsonl", rows.Pair)
    assert mined and human and {pair.clip for pair in human} <= rated
    assert all(pair.winner != pair.loser for pair in mined + human)
    samples = inputs.read_samples(finished)
    for pair in mined:
        ours = p[pair.clip]
        may_win = [audio.k for audio in samples[pair.clip] if stage("03").is_good_enough(audio)]
        assert pair.clip not in rated
        assert pair.winner == max(may_win, key=lambda k: ours[k][0])
        assert pair.loser == max(ours, key=lambda k: ours[k][2])
        assert (pair.p_winner, pair.p_loser) == (ours[pair.winner], ours[pair.loser])


def test_the_curriculum_splits_at_the_threshold_and_keeps_people_for_stage_2(finished):
    stage1, stage2 = (read(finished / f"04_stage{i}.jsonl") for i in (1, 2))
    threshold = read_json(finished / "04_settings.json")["settings"]["threshold"]
    assert stage1 and {pair["source"] for pair in stage1} == {"auto"}
    assert all(pair["score_c"] > threshold for pair in stage1)
    assert all(pair["score_c"] <= threshold for pair in stage2)
    human = [pair["score_c"] for pair in stage2 if pair["source"] == "human"]
    assert human == [0.0] * len(read(finished / "03_human_pairs.jsonl")) != []
    assert len(stage1) + len(stage2) - len(human) == len(read(finished / "03_pairs.jsonl"))


def test_a_threshold_that_leaves_no_easy_pair_is_said_with_one_that_leaves_81_percent(run, capsys):
    call("04", run, "--redo", "--threshold", 0.99)
    out = capsys.readouterr().out
    said(out, "stage 1 is empty: no score_c is above the threshold 0.99", "without a curriculum")
    assert read(run / "04_stage1.jsonl") == []
    (advice,) = [line for line in out.splitlines() if "python 04_curriculum_split.py" in line]
    stage("04").main(stage("04").parse_args(advice.split()[2:]))  # followed as printed
    mined = read(run / "03_pairs.jsonl")
    easy = len(read(run / "04_stage1.jsonl"))
    assert abs(easy - 0.81 * len(mined)) < 2
    assert "stage 1 is empty" not in capsys.readouterr().out


def test_both_stages_are_trained_in_order_and_logged(finished):
    logs = {
        "05": read(finished / "05_flow_dpo/log.jsonl"),
        "06": read(finished / "06_ddpo/log.jsonl"),
    }
    for number, log in logs.items():
        steps = stage("00").DEFAULTS["tiny"][number]["steps"]
        assert [row["step"] for row in log] == list(range(steps))
    stages = [row["stage"] for row in logs["05"]]
    assert stages == sorted(stages) and set(stages) == {1, 2}
    assert all(len(row["gap_w_t"]) == 4 for row in logs["05"])
    for row in logs["06"]:
        assert 0 <= row["reward"] <= 1 and row["grad_norm"] >= 0 and row["forwards"] > 0


def test_training_moves_the_policy_and_leaves_the_base_alone(finished):
    base = base_weights(finished)
    for out in ("05_flow_dpo", "06_ddpo"):
        tuned = weights(finished, out)
        moved = {key for key in base if not torch.equal(base[key], tuned[key])}
        assert tuned.keys() == base.keys() and len(moved) > len(base) / 2
        assert not moved & {"null_tokens", "null_vector"}  # null conditions are frozen
        policy = read_json(finished / out / "policy.json")
        assert policy["model"] == "toy"
        assert policy["base_digest"] == files.digest(finished / "00_base.pt")


def test_the_reference_stays_the_base_while_the_policy_learns(run, monkeypatch):
    kept, copied = [], training.frozen_copy
    keep = lambda *given: kept.append(copied(*given)) or kept[-1]  # noqa: E731
    monkeypatch.setattr(training, "frozen_copy", keep)
    call("05", run, "--out", "watched", "--steps", 3)
    assert largest_difference(kept[0].state_dict(), common.load_base_model(run).state_dict()) == 0
    assert largest_difference(weights(run, "watched"), base_weights(run)) > 1e-5


def test_results_have_every_system_and_metric_with_differences_to_base(finished):
    lines, named = read(finished / "07_results.jsonl"), results(finished)
    assert list(dict.fromkeys(row["system"] for row in lines)) == list(SYSTEMS)
    oracle = "oracle_semantic oracle_sync_s oracle_floor_db oracle_aesthetic"
    for metric in f"fd kl is ib clap desync_s p_good win_rate {oracle}".split():
        assert ("base", metric) in named and ("flow_dpo", metric) in named
    for row in lines:
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
        assert row["diff_low"] is None or row["diff_low"] <= row["diff"] <= row["diff_high"]
        assert row["system"] != "base" or row["diff"] is row["diff_low"] is row["diff_high"] is None
    assert named["base", "win_rate"]["value"] == 0.5
    difference = named["ddpo", "ib"]["value"] - named["base", "ib"]["value"]
    assert named["ddpo", "ib"]["diff"] == pytest.approx(difference, abs=1e-6)


def test_p_good_in_the_results_is_the_mean_of_audioscore_on_that_systems_audio(finished):
    clips = inputs.read_clips(finished, "test")
    folder = finished / "07_audio" / "flow_dpo"
    audios = [scoring.Audio(clip, 0, folder / f"{clip.id}.wav", "") for clip in clips]
    scorers = common.scorers_of(finished, "weights")
    scores = {}
    for name in scorers.of_audioscore:
        scorer = scorers.load(name)
        waves = scoring.read_waves(audios, scorer.sample_rate_hz, 2.0)
        scores[name] = judged(scorer, waves, clips, 2.0)
    audioscore = AudioScore.load(finished / "02_audioscore.pt")
    expected = (
        audioscore(audioscore.five_scores(scorers.audioscore_inputs(scores)))[:, 0].mean().item()
    )
    row = results(finished)["flow_dpo", "p_good"]
    assert close(row["value"], expected, PROBABILITIES) and row["n"] == len(clips)


# What stages say


def test_a_rehearsal_of_07_says_what_audio_there_is_and_makes_nothing(run, tmp_path, capsys):
    for name in (inputs.read_clips(run, "test")[0].id, "stranger"):
        media.write_audio(tmp_path / "own" / f"{name}.wav", torch.zeros(8), 16000)
    remove(run, "07_audio/ddpo")
    before = files_of(run, "0")
    call("07", run, "--dry-run", "--systems", "ddpo", f"own={tmp_path / 'own'}")
    out = capsys.readouterr().out
    said(
        out,
        "own: audio for 1 of 8 test clips; 1 files name no clip of this split, first stranger\n",
    )
    said(out, "ddpo: audio for 0 of 8 test clips, 8 will be generated\n")
    assert "missing" not in out and files_of(run, "0") == before
    call("07", run, "--dry-run")
    said(capsys.readouterr().out, "base: audio for 8 of 8 test clips\n")
    made_from = read_json(run / "07_audio/base/settings.json")
    made_from["settings"]["seed"] += 1
    (run / "07_audio/base/settings.json").write_text(json.dumps(made_from))
    call("07", run, "--dry-run")
    said(capsys.readouterr().out, "base: audio for 0 of 8 test clips, 8 will be generated\n")


def test_two_systems_are_compared_and_what_their_intervals_leave_out_is_said(run, capsys):
    before = (run / "07_results.jsonl").read_text()
    call("07", run, "--against", "flow_dpo")
    out = capsys.readouterr().out
    said(out, "minus flow_dpo, 95 % interval", "intervals over clips, one training seed")
    assert "next:" not in out  # stage 08 reads what is compared with base
    found = {(row["system"], row["metric"]): row for row in read(run / "07_results_flow_dpo.jsonl")}
    ours, theirs = found["ddpo", "ib"], found["flow_dpo", "ib"]
    assert found["flow_dpo", "win_rate"]["value"] == 0.5 and theirs["diff"] is None
    assert ours["diff"] == pytest.approx(ours["value"] - theirs["value"])
    assert (run / "07_results.jsonl").read_text() == before and "on the test split" not in out


def test_a_policy_beyond_the_two_that_is_judged_on_test_is_warned_of(run, capsys):
    shutil.copytree(run / "05_flow_dpo", run / "other")
    call("07", run, "--split", "val", "--systems", "base", "other")
    said = capsys.readouterr().out
    assert "warning" not in said and "Table 1" not in said and "next:" not in said
    call("07", run, "--systems", "base", "other")
    said = capsys.readouterr().out
    assert "warning: other on the test split; choose settings on --split val" in said
    assert "Table 1, VGGSound test" in said and "next: python 08_listen.py" in said


def test_a_policy_that_gains_on_audioscore_and_loses_by_another_judge_is_said(capsys):
    verdicts = [("a", "p_good", "better"), ("b", "p_good", "better"), ("c", "p_good", None)]
    verdicts += [
        ("a", "audiobox_pq", "worse"),
        ("b", "fd", "worse"),
        ("c", "judge_semantic", "worse"),
        ("d", "p_good", "better"),
        ("d", "oracle_semantic", "worse"),  # whose measures the simulated people answer by
        ("e", "p_good", "better"),
        ("e", "judge_semantic", "worse"),
    ]
    found = [
        rows.Result(system=system, metric=metric, better="higher", n=8, verdict=verdict)
        for system, metric, verdict in verdicts
    ]
    measures = {"audiobox_pq": ("mean", "audiobox", "pq"), "fd": ("fd", "toy", "embedding")}
    stage("07").print_hacked(found, list("abcde"), measures, ["toy"])
    of_a, of_e = capsys.readouterr().out.splitlines()
    assert "a gains on AudioScore and loses on audiobox_pq" in of_a
    assert "e gains on AudioScore and loses on judge_semantic" in of_e


def test_preparing_a_run_lists_the_missing_weights_of_all_stages_with_their_size(tmp_path, capsys):
    make_video(tmp_path / "videos" / "a.mp4")
    flags = ("--videos", tmp_path / "videos", "--weights", tmp_path, "--max-clips", 0)
    stopped(call, "01", tmp_path / "run", "--model", "mmaudio:large_44k", *flags)
    out = capsys.readouterr().out
    said(out, "  mmaudio_large_44k.pth", "  v1-44.pth", "  imagebind_huge.pth")
    said(out, "  Cnn14_mAP=0.431.pth", "  passt-s-f128")
    # 3.9, 1.2 GiB, 466 MiB; 0.95, 4.8, 2.4, 0.327, 0.324, 0.345, 0.4 GB
    said(out, ": 13, 15.5 GB in all")


def test_a_rehearsal_of_01_stops_where_any_stage_lacks_weights_and_makes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    make_video(tmp_path / "videos" / "a.mp4")
    flags = ("--videos", tmp_path / "videos", "--weights", tmp_path / "weights", "--dry-run")
    rehearsal = ("01", tmp_path / "run", "--model", "mmaudio:large_44k", *flags)
    assert "weights are missing" in stopped(call, *rehearsal)
    out = capsys.readouterr().out
    said(out, "videos found: train 1 of 1", ": 13, 15.5 GB in all")
    said(out, "open_clip_config.json of MMAudio's CLIP (3.7 GiB) is missing")
    names = re.findall(r"^  (\S+) \(", out, flags=re.M)
    names.remove("audiobox_aesthetics.pt")  # of a judge, whom 07 asks only when it is told to
    assert len(names) == 12
    files_there = [tmp_path / "weights" / name for name in names]
    hub = tmp_path / "hub/models--apple--DFN5B-CLIP-ViT-H-14-384"
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        files_there.append(hub / "snapshots" / "0" / name)
    files_there[0].parent.mkdir()
    for file in files_there[1:]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("0")
    assert "weights are missing" in stopped(call, *rehearsal)
    said(capsys.readouterr().out, ": 2, 4.6 GB in all\n")  # 3.9 GiB and 0.4 GB
    torch.save(torch.zeros(1000), files_there[0])
    whole = files_there[0].read_bytes()
    for part in (b"", whole[: len(whole) // 2]):  # a download that was cut short
        files_there[0].write_bytes(part)
        assert "weights are missing" in stopped(call, *rehearsal)
        cut_short = f"  {names[0]} (3.9 GiB), of which only a part is there, velocity network"
        said(capsys.readouterr().out, cut_short, ": 2, 4.6 GB in all\n")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for other, what in ((b"\n<!DOCTYPE html>", "a web page"), (pointer, "a Git LFS pointer")):
        files_there[0].write_bytes(other)
        assert "weights are missing" in stopped(call, *rehearsal)
        in_place = f"  {names[0]} (3.9 GiB), in whose place is {what}, velocity network"
        said(capsys.readouterr().out, in_place, ": 2, 4.6 GB in all\n")
        line = stopped(common.weight_file, files_there[0].parent, names[0])
        assert f"is {what} in place of the file (velocity network" in line
        assert f"is {what} in place of the file" in stopped(files.load_pt, files_there[0])
    files_there[0].unlink()
    files_there[0].mkdir()
    assert "weights are missing" in stopped(call, *rehearsal)
    said(capsys.readouterr().out, "in whose place is a folder", ": 2, 4.6 GB in all\n")
    files_there[0].rmdir()
    files_there[0].write_bytes(whole)
    call(*rehearsal)
    said(capsys.readouterr().out, ": 1, 0.4 GB in all\nall weights that the stages need are")
    assert not (tmp_path / "run").exists()


def seal_anew(run, name):
    """Makes the record of an output believe what it has become."""
    file = run / f"{name[:2]}_settings.json"
    made = read_json(file)
    made["outputs"][name] = files.digest(run / name)
    file.write_text(json.dumps(made))


def test_pairs_whose_winner_is_the_worse_audio_are_named_by_04_and_05(run, capsys):
    """What another program's idea of the columns makes of 03_pairs.jsonl."""
    pairs, other = read(run / "03_pairs.jsonl"), {"winner": "loser", "loser": "winner"}
    other |= {"p_winner": "p_loser", "p_loser": "p_winner", "clip": "clip"}
    write(run / "03_pairs.jsonl", [{other[x]: pair[x] for x in pair} for pair in pairs])
    seal_anew(run, "03_pairs.jsonl")
    call("04", run, "--redo")
    out, count = capsys.readouterr().out, len(pairs)
    said(out, f"warning: {count} of {count} mined pairs have a negative score_c", "exchanged")
    said(out, "rerun 03_mine_pairs.py --redo --min-score-c 0")
    said(
        out,
        "stage 1 is empty: no score_c is above the threshold 0.1, so 05 trains on stage 2 alone",
    )
    call("05", run, "--out", "backwards", "--steps", 3)
    out = capsys.readouterr().out
    said(out, "stage 1 (easy): 0 pairs, 0 steps")
    said(out, "curves: pairs are backwards: score_c is negative for 100% of the mined pairs")
    said(out, "03 with --redo --min-score-c 0, then 04 --redo, then 05 --out NAME")
    assert "healthy" not in out
    call("03", run, "--redo", "--min-score-c", 0)  # the advice, followed
    call("04", run, "--redo")
    call("05", run, "--out", "mined_anew", "--steps", 3)
    assert "backwards" not in capsys.readouterr().out


def test_mined_pairs_are_named_backwards_where_min_score_c_lets_them_in_and_else_not(
    run, finished, capsys, monkeypatch
):
    original = common.score_c
    monkeypatch.setattr(common, "score_c", lambda p_w, p_l: -original(p_w, p_l))
    call("03", run, "--redo", "--min-score-c", -1)
    count = len(read(run / "03_pairs.jsonl"))
    assert f"warning: {count} of {count} pairs have a negative score_c" in capsys.readouterr().out
    assert "negative score_c" not in finished.with_suffix(".log").read_text()


# Runs that are stopped, repeated, or divided

SMALL = ("--sampling-steps", 2, "--num-samples", 2)


def test_the_same_content_has_the_same_bytes_whichever_process_writes_it(tmp_path, monkeypatch):
    value = {"x": torch.arange(10.0), "name": "x"}
    files.save_pt(tmp_path / "one.pt", value)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    (tmp_path / "again").mkdir()
    files.save_pt(tmp_path / "again" / "one.pt", value)
    assert files.digest(tmp_path / "one.pt") == files.digest(tmp_path / "again" / "one.pt")


def test_a_rerun_of_every_stage_succeeds_and_does_nothing_twice(run, spied):
    before = files_of(run, *STAGES, "ru", "cl")
    expensive = [(common, "sample"), (Toy, "encode"), (common, "flow_dpo_loss")]
    expensive += [(stage("06"), "collect"), (ToyScorer, "score"), (stage("00"), "draw_picture")]
    done = [spied(owner, name) for owner, name in expensive]
    call("00", run, "--size", "tiny")
    for number in ("01", "02", "03", "04", "05", "06", "07"):
        call(number, run)
    after = files_of(run, *STAGES, "ru", "cl")
    assert not any(done) and before.keys() == after.keys()
    # these name the run's own place
    for name in before.keys() - {"07_systems.json", "02_to_rate.csv", "03_to_choose.csv"}:
        assert without_times(name, before[name]) == without_times(name, after[name]), name


def test_interrupted_generation_goes_on_without_repeating_or_losing_anything(fresh, small_shards):
    call("01", fresh, *SMALL)
    whole, folder = files_of(fresh, "01"), fresh / "01_samples"
    assert sorted(path.stem for path in folder.glob("*.jsonl")) == [f"{i:05d}" for i in range(5)]
    remove(fresh, "01_samples/0000[234].*")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with interrupted(media, "write_audio", 12):  # in the second of the three missing shards
        call("01", fresh, *SMALL)
    assert not (folder / "00003.jsonl").exists()
    call("01", fresh, *SMALL)
    assert files_of(fresh, "01") == whole
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_generation_is_the_same_in_shards_of_any_size(fresh, finished, small_shards):
    call("01", fresh, "--batch-clips", 3)
    ours, theirs = (shards_of(run) for run in (fresh, finished))
    assert ours.place_of_audio.keys() == theirs.place_of_audio.keys()
    audios = sorted(ours.place_of_audio)[::7]
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


def test_interrupted_scoring_goes_on_and_gives_the_same_audioscore(run, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_CLIPS", 4)
    remove(run, "02_scores", "02_audioscore.pt")
    whole = shutil.copytree(run, run.with_name("whole"))
    call("02", whole)
    with interrupted(ToyScorer, "score", 2):
        call("02", run)
    assert [path.name for path in run.glob("02_scores/*.toy.pt")] == ["00000.toy.pt"]
    assert not (run / "02_audioscore.pt").exists()
    kept = (run / "02_scores/00000.toy.pt").stat().st_mtime_ns
    call("02", run)
    names = ("02_scores", "02_audioscore.pt")
    assert files_of(run, *names) == files_of(whole, *names)
    assert (run / "02_scores/00000.toy.pt").stat().st_mtime_ns == kept


@pytest.mark.parametrize("number, first_step, following, flags", [
    ("02", "fit", "03", ()), ("03", "mine", "04", ()), ("04", "split", "05", ("--out", "x")),
])  # fmt: skip
def test_an_interrupted_redo_leaves_nothing_that_later_stages_would_take_for_new(
    run, number, first_step, following, flags
):
    if number == "02":
        set_rating(run)
    elif number == "03":
        call("02", run, "--redo", "--seed", 5)
    else:
        call("03", run, "--redo", "--min-score-c", 0.01)
    with interrupted(common if number == "04" else stage(number), first_step):
        call(number, run, "--redo")
    stopped(call, following, run, *flags)
    call(number, run)  # the same command without --redo goes on


def test_missing_videos_of_the_toy_world_are_made_again_alike(run):
    before = files_of(run, "00", "clips.jsonl")
    remove(run, "00_videos/train00003.mp4", "00_videos/test00001.mp4", "clips.jsonl")
    call("00", run, "--size", "tiny")
    assert files_of(run, "00", "clips.jsonl") == before


@pytest.mark.parametrize("number, flags, how", [
    ("05", ("--steps", 24, "--save-every", 3, "--ema", 0.2), signal.SIGKILL),
    ("06", ("--steps", 12, "--save-every", 1, "--ema", 0.2), signal.SIGINT),
])  # fmt: skip
def test_resume_equals_uninterrupted(run, number, flags, how):
    call(number, run, "--out", "whole", *flags)
    started, log = start(number, run, "--out", "stopped", *flags), run / "stopped" / "log.jsonl"
    began = time.monotonic()
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        assert started.poll() is None, "ended before it could be stopped"
        assert time.monotonic() - began < 300
        time.sleep(0.005)
    started.send_signal(how)
    errors = started.communicate()[1]
    assert not (run / "stopped" / "policy.pt").exists()
    if how == signal.SIGINT:
        assert started.returncode == 130 and "Traceback" not in errors
        assert "run the same command again" in errors
    assert 0 < files.load_pt(run / "stopped" / "checkpoint.pt")["step"] < flags[1]
    call(number, run, "--out", "stopped", *flags)
    assert largest_difference(weights(run, "stopped"), weights(run, "whole")) == 0
    assert log_of(run, "stopped") == log_of(run, "whole")


@pytest.mark.parametrize("number, flags", [("05", ()), ("06", ("--updates", 1))])
def test_with_ema_the_policy_is_the_average_of_the_weights_after_every_step(
    run, number, flags, monkeypatch
):
    """Of width .28 gamma is .169344. Of four steps the first counts 4^-1.169344 = .197690."""
    after = []
    save = training.save_checkpoint

    def keeping(folder, step, model, *others):
        after.append({name: p.clone() for name, p in model.net.state_dict().items()})
        save(folder, step, model, *others)

    monkeypatch.setattr(training, "save_checkpoint", keeping)
    call(number, run, "--out", "wide", "--steps", 4, "--ema", 0.28, "--save-every", 1, *flags)
    averaged = weights(run, "wide")
    for name, value in averaged.items():
        shares = (0.197690, 0.246933, 0.269714, 0.285662)
        mean = sum(share * state[name] for share, state in zip(shares, after, strict=True))
        assert torch.allclose(value, mean, atol=1e-6)
    assert largest_difference(averaged, after[-1]) > 1e-5


@pytest.mark.parametrize("number, flags, names, steps", [
    ("05", ("--steps", 20, "--ema", 0.2), ("loss", "gap_w", "gap_l"), 20),
    # the first round: the second samples from weights that differ by rounding
    ("06", ("--steps", 4, "--lr", 3e-5), ("reward", "reward_std", "approx_kl"), 2),
])  # fmt: skip
def test_two_ranks_match_one_and_two_nodes_two_ranks(run, number, flags, names, steps):
    call(number, run, "--out", "one", *flags)
    torchrun(number, run, "--out", "two", *flags)
    one, two = weights(run, "one"), weights(run, "two")
    assert largest_difference(one, two) < 1e-4
    # Adam turns the rounding of a vanishing gradient, and of rewards that hardly differ, into a
    # step now and then.
    assert distance(one, two) < 0.2 * distance(one, base_weights(run))
    logs = [read(run / out / "log.jsonl") for out in ("one", "two")]
    assert [len(log) for log in logs] == [flags[1]] * 2
    for name in names:
        ours, theirs = ([row[name] for row in log[:steps]] for log in logs)
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-2)
    if number == "05":
        torchrun(number, run, "--out", "nodes", *flags, nodes=2)
        assert (run / "nodes/policy.pt").read_bytes() == (run / "two/policy.pt").read_bytes()
        assert log_of(run, "nodes") == log_of(run, "two")


def spread_of_some(self, model, a_0, clips):
    """Rewards in the place of stage 06's: for every second clip they differ, for the others by
    rounding alone."""
    repeat = torch.arange(len(clips)) // len({clip.id for clip in clips})  # row r * B + b: 0, 1, 2
    half_width = [0.1 if int(clip.id[-1]) % 2 else 6e-8 for clip in clips]
    return 0.3 + (repeat - 1) * torch.tensor(half_width, dtype=torch.float64)


def spread_of_none(self, model, a_0, clips):
    return spread_of_some(self, model, a_0, [a_clip(id=clip.id + "0") for clip in clips])


def seal(run, failing):
    """A stage that writes one file; some ranks fail after that."""
    here = ranks.setup()
    with record.stage(run, "04", outputs=["04_x.jsonl"]) as made:
        made.claim({})
        if here.first:
            rows.write(made.run / "04_x.jsonl", [])
        if here.rank in failing:
            raise KeyError


TWO_RANKS = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_pipeline
from test_pipeline import stage
exec(sys.argv[1])
for number, *flags in json.loads(sys.argv[2]):
    stage(number).main(stage(number).parse_args(flags))
"""


SECOND_RANK_IS_SLOW = """
import os, time
first_stage = stage("01")
first_stage.SHARD_CLIPS = 4
write_shard = first_stage.write_shard
def write_late(*given):
    time.sleep(4 * int(os.environ["RANK"]))
    write_shard(*given)
first_stage.write_shard = write_late
"""


def in_two_ranks(run, code, *jobs):
    """A line of code, then stages one after the other, each with its flags, in the same two ranks;
    returns the exit code."""
    script = run.with_name("two_ranks.py")
    script.write_text(TWO_RANKS)
    commands = json.dumps([[number, *arguments(run, *flags)] for number, *flags in jobs])
    done = ended(TORCHRUN, "--standalone", "--nproc_per_node", 2, script, code, commands)
    print(done.stderr)
    return done.returncode


def test_an_error_on_any_rank_seals_nothing(tmp_path):
    seal(tmp_path / "run", ())
    with pytest.raises(KeyError):
        seal(tmp_path / "first", (0,))
    assert in_two_ranks(
        tmp_path / "second", f"test_pipeline.seal({str(tmp_path / 'second')!r}, (1,))"
    )
    for name, outputs in (("run", ["04_x.jsonl"]), ("first", []), ("second", [])):
        assert [*read_json(tmp_path / name / "04_settings.json")["outputs"]] == outputs


def test_two_ranks_divide_01_02_03_and_07_and_give_the_bytes_of_one(fresh, small_shards):
    two = shutil.copytree(fresh, fresh.with_name("two"))
    jobs = [("01", "--sampling-steps", 2, "--max-clips", 12, "--num-samples", 2)]
    jobs += [("02", "--num-rated-clips", 4), ("03",), ("07", "--systems", "ground_truth", "base")]
    for number, *flags in jobs:
        call(number, fresh, *flags)
    assert in_two_ranks(two, SECOND_RANK_IS_SLOW, *jobs) == 0
    ours, theirs = (files_of(place, *STAGES) for place in (two, fresh))
    assert len([name for name in theirs if name.startswith("03_scores/")]) == 3 * 3
    assert {x: ours[x].replace(bytes(two), bytes(fresh)) for x in ours} == theirs


def test_parts_in_any_order_and_two_of_them_killed_end_with_the_bytes_of_one_command(
    fresh, small_shards
):
    parts = shutil.copytree(fresh, fresh.with_name("parts"))
    jobs = {"01": ("--sampling-steps", 2, "--max-clips", 12, "--num-samples", 2)}
    jobs |= {"02": ("--num-rated-clips", 4), "03": ()}
    jobs |= {"07": ("--systems", "ground_truth", "base", "--batch-clips", 6)}
    for number, flags in jobs.items():
        call(number, fresh, *flags)
        for part in ("3/4", "1/4", "4/4", "2/4"):
            if (number, part) in (("01", "3/4"), ("03", "1/4")):
                with interrupted(files, "save_pt"):
                    call(number, parts, *flags, "--part", part)
            call(number, parts, *flags, "--part", part)
        if number in ("02", "03"):
            assert read_json(parts / f"{number}_settings.json")["outputs"] == {}
        made = {file: file.stat().st_mtime_ns for file in parts.rglob("*.pt")}
        call(number, parts, *flags)
        assert all(file.stat().st_mtime_ns == time for file, time in made.items())
    ours, theirs = (files_of(place, *STAGES) for place in (parts, fresh))
    assert {x: ours[x].replace(bytes(parts), bytes(fresh)) for x in ours} == theirs


def test_a_part_does_not_remove_the_audio_of_another_policy(run, refused):
    record = run / "07_audio" / "flow_dpo" / "settings.json"
    made = read_json(record)
    made["settings"]["policy"] = "another"
    record.write_text(json.dumps(made))
    before = files_of(run, "07_audio")
    assert "holds audio of another policy" in refused("07", run, "--part", "1/2")
    assert files_of(run, "07_audio") == before
    call("07", run)  # the whole stage replaces it
    assert read_json(record)["settings"]["policy"] != "another"


def test_ddpo_on_equal_rewards_leaves_the_policy_as_it_was_and_says_so(run, capsys, monkeypatch):
    monkeypatch.setattr(stage("06").Reward, "__call__", spread_of_none)
    call("06", run, "--out", "none", "--steps", 4)
    assert largest_difference(weights(run, "none"), base_weights(run)) == 0
    assert files.load_pt(run / "none/checkpoint.pt")["optimizer"]["state"] == {}
    log = [
        (row["step"], row["no_spread"], row["grad_norm"]) for row in read(run / "none/log.jsonl")
    ]
    assert log == [(i, 1, 0) for i in range(4)]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    said(line, "100% of the prompts taught nothing", "02's report", "--group-size")
    (run / "none/policy.pt").unlink()
    call("06", run, "--out", "none", "--steps", 4)  # a checkpoint without moments is taken up
    assert largest_difference(weights(run, "none"), base_weights(run)) == 0


@pytest.mark.parametrize("number, out", [("05", "05_flow_dpo"), ("06", "06_ddpo")])
def test_a_finished_training_that_is_run_again_leaves_its_policy_and_makes_what_is_gone(
    run, number, out, monkeypatch
):
    monkeypatch.setattr(record, "commit", lambda: "another")
    policy, about = run / out / "policy.pt", run / out / "policy.json"
    before = policy.read_bytes(), about.read_bytes()
    call(number, run)
    assert before == (policy.read_bytes(), about.read_bytes())
    about.unlink()
    policy.write_bytes(b"not what was trained")
    call(number, run)
    assert read_json(about)["commit"] == "another"
    assert torch.load(policy, weights_only=True).keys() == base_weights(run).keys()


def test_a_round_without_spread_changes_nothing_also_after_a_resume_and_on_two_ranks(
    run, monkeypatch
):
    flags = ("--steps", 12, "--save-every", 1, "--lr", 3e-5)
    monkeypatch.setattr(stage("06").Reward, "__call__", spread_of_some)
    kept, save = {}, training.save_checkpoint

    def keeping(folder, step, model, optimizer, *others):
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        kept[step] = [x.clone() for x in (*training.trained_state(model).values(), *moments)]
        save(folder, step, model, optimizer, *others)

    monkeypatch.setattr(training, "save_checkpoint", keeping)
    call("06", run, "--out", "whole", *flags)
    log = read(run / "whole/log.jsonl")
    by_round = [row["no_spread"] for row in log[::2]]
    assert set(by_round) == {0, 0.5, 1}  # on two ranks, one prompt each: both, one of them, none
    for number in range(1, 6):
        before, after = kept[2 * number], kept[2 * number + 2]
        same = len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after))
        assert same == (by_round[number] == 1)

    with interrupted(stage("06"), "train_step", 7):
        call("06", run, "--out", "stopped", *flags)
    call("06", run, "--out", "stopped", *flags)
    assert largest_difference(weights(run, "stopped"), weights(run, "whole")) == 0

    code = "stage('06').Reward.__call__ = test_pipeline.spread_of_some"
    assert in_two_ranks(run, code, ("06", "--out", "two", *flags)) == 0
    two = read(run / "two/log.jsonl")
    assert [row["no_spread"] for row in two] == [row["no_spread"] for row in log]
    norms = [row["grad_norm"] for row in log]
    assert [row["grad_norm"] for row in two] == pytest.approx(norms, rel=1e-2)
    assert largest_difference(weights(run, "two"), weights(run, "whole")) < 1e-4


FEW = {"05": ("--steps", 4), "06": ("--steps", 2, "--micro-batch", 3, "--lr", 3e-5)}
LOGGED = {"05": ("loss", "grad_norm"), "06": ("reward", "grad_norm", "approx_kl")}


@pytest.mark.parametrize("number, flags, within", [
    ("05", ("--micro-batch", 1), 3e-5), ("05", ("--gradient-checkpointing",), 3e-5),
    ("06", ("--micro-batch", 1), 2e-6),  # a prompt's three audios together, and one by one
])  # fmt: skip
def test_memory_savers_do_not_change_the_result(run, number, flags, within):
    call(number, run, "--out", "plain", *FEW[number])
    call(number, run, "--out", "saved", *FEW[number], *flags)
    assert largest_difference(weights(run, "plain"), weights(run, "saved")) < within
    plain, saved = (read(run / out / "log.jsonl") for out in ("plain", "saved"))
    for key in LOGGED[number]:
        expected = [row[key] for row in plain]
        assert [row[key] for row in saved] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_no_stage_from_01_to_06_reads_truth_oracle_or_twin(fresh, finished, tmp_path):
    remove(fresh, "00_truth.jsonl", "00_oracle.pt", "00_twin.pt")
    for name in ("02_ratings.jsonl", "03_human_choices.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    call("01", fresh)
    call("02", fresh, "--ratings", tmp_path / "02_ratings.jsonl")
    call("03", fresh, "--choices", tmp_path / "03_human_choices.jsonl")
    for number in ("04", "05", "06"):
        call(number, fresh)
    numbers = ("01", "02", "03", "04", "05", "06")
    ours, theirs = (files_of(place, *numbers) for place in (fresh, finished))
    assert ours.keys() == theirs.keys()
    for name in ours:
        content = ours[name].replace(bytes(fresh), bytes(finished))
        assert without_times(name, content) == without_times(name, theirs[name]), name


# Other clips than the toy world's


def test_a_plain_folder_of_videos_of_any_size_rate_and_container(tmp_path, toy):
    videos, run = tmp_path / "videos", tmp_path / "run"
    make_video(videos / "wide.mp4", (320, 90), 30000 / 1001, 2.5)
    make_video(videos / "odd.mkv", (75, 131), 12, 2.2, pixels="yuv444p")
    make_video(videos / "deep" / "er" / "slow.mov", fps=10, seconds=3.0, codec="mpeg4", sound=False)
    (videos / "notes.txt").write_text("no video")
    call("01", run, "--videos", videos, *toy)
    clips = read(run / "clips.jsonl")
    names = {"wide": "wide.mp4", "odd": "odd.mkv", "deep_er_slow": "deep/er/slow.mov"}
    assert {clip["id"]: clip["video"] for clip in clips} == names
    about = {(clip["split"], clip["caption"], clip["label"]) for clip in clips}
    assert about == {("train", None, None)}
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
        video = finished / "00_videos" / f"train{i:05d}.mp4"
        shutil.copy(video, tmp_path / "videos" / f"{name}.mp4")
    return tmp_path / "videos", names


def clips_and_sampled(run):
    splits = {clip["id"]: clip["split"] for clip in read(run / "clips.jsonl")}
    return splits, {row["clip"] for row in read(run / "01_samples" / "00000.jsonl")}


def test_vggsounds_csv(tmp_path, youtube, toy, capsys):
    (videos, names), run = youtube, tmp_path / "run"
    split = {name: "test" if i > 3 else "train" for i, name in enumerate(names)}
    table = [f'{name[:11]},{int(name[12:])},"dog, barking",{split[name]}' for name in names]
    (tmp_path / "vggsound.csv").write_text("\n".join([*table, "lost_video_,30,bird,train\n"]))
    call("01", run, "--clips", tmp_path / "vggsound.csv", "--videos", videos, *toy)
    assert clips_and_sampled(run) == (split, set(names[:4]))
    about = {(clip["caption"], clip["label"]) for clip in read(run / "clips.jsonl")}
    assert about == {("dog, barking", "dog, barking")}
    assert [row["id"] for row in read(run / "01_missing.jsonl")] == ["lost_video__000030"]
    out = capsys.readouterr().out
    said(out, "2 YouTube ids occur in more than one split", "train 4 of 5")


def test_mmaudios_tsv_and_test_list(tmp_path, youtube, toy, capsys):
    """A test list may have any name."""
    videos, names = youtube
    train, test = tmp_path / "vgg-train.tsv", tmp_path / "few.tsv"
    for file, part in ((train, names), (test, names[:2])):
        file.write_text("id\tlabel\n" + "".join(f"{name}\tdog\n" for name in part))
    flags = ("--clips", train, "--videos", videos, "--test-list", test)
    call("01", tmp_path / "run", *flags, *toy)
    printed = capsys.readouterr().out
    assert printed.count("all in the split") == 1
    said(printed, f"{train}: all in the split train")
    split = {name: "test" if i < 2 else "train" for i, name in enumerate(names)}
    assert clips_and_sampled(tmp_path / "run") == (split, set(names[2:]))


def test_a_line_of_column_names_in_vggsounds_table_is_said(tmp_path):
    table = tmp_path / "vggsound.csv"
    table.write_text("youtube_id,start,label,split\nabc,10,dog,train\n")
    said(stopped(stage("01").clips_of_csv, table), "line 1", "has no line of column names")


def test_a_test_list_changes_the_split_of_a_clip_and_nothing_else(tmp_path, youtube, toy):
    videos, names = youtube
    (videos / f"{names[0]}.mp4").rename(videos / "elsewhere.mp4")
    listed = [
        {"id": name, "caption": f"caption {i}", "label": f"label {i}"}
        for i, name in enumerate(names)
    ]
    listed[0]["video"], listed[3]["split"] = "elsewhere.mp4", "test"
    write(tmp_path / "list.jsonl", listed)
    (tmp_path / "test.tsv").write_text(f"id\tlabel\n{names[0]}\tdog\n", encoding="utf-8-sig")
    flags = ("--clips", tmp_path / "list.jsonl", "--test-list", tmp_path / "test.tsv")
    call("01", tmp_path / "run", *flags, "--videos", videos, *toy, "--max-clips", 0)
    clips = {clip["id"]: clip for clip in read(tmp_path / "run" / "clips.jsonl")}
    assert clips[names[0]] == listed[0] | {"split": "test"}
    assert names[3] not in clips  # the test split is exactly the list


@pytest.mark.parametrize("name, split", [
    ("vgg-test", "test"), ("VGG-TEST", "test"), ("x_val", "val"), ("a.train", "train"),
    ("latest", "train"), ("testing", "train"), ("test-2", "train"),
])  # fmt: skip
def test_the_split_of_a_tsv_is_the_last_word_of_its_name(tmp_path, name, split):
    (tmp_path / f"{name}.tsv").write_text("id\tlabel\na\tdog\n")
    assert [clip.split for clip in stage("01").clips_of_tsv(tmp_path / f"{name}.tsv")] == [split]


def test_captions_labels_and_clips_of_speech_are_counted_and_unread_fields_said(tmp_path, capsys):
    speech = "male speech, man speaking"
    listed = [{"id": "a", "captoin": "x", "label": f" {speech} "}, {"id": "e"}]
    listed += [{"id": "b", "caption": "y", "label": "Male Speech"}]
    listed += [
        {"id": "c", "label": "male speach, man speaking"},
        {"id": "d", "label": "dog barking"},
    ]
    write(tmp_path / "list.jsonl", listed)
    clips = stage("01").clips_of_jsonl(tmp_path / "list.jsonl")
    stage("01").check_clips(clips, "list.jsonl")
    unread, counts = capsys.readouterr().out.splitlines()
    said(unread, "field 'captoin' of 1 lines is not read", "caption")
    assert clips[0].label == speech  # stripped
    assert counts == "clips: 5, with caption 1, with label 4, of human speech 1"


@pytest.fixture
def listed(tmp_path, youtube, toy):
    """The flags for a list of those videos, of which the last is for testing."""
    splits = zip(youtube[1], ["train"] * 5 + ["test"])
    write(tmp_path / "list.jsonl", [{"id": name, "split": split} for name, split in splits])
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


@pytest.mark.parametrize("of_folder", [True, False], ids=["a folder", "a list"])
def test_a_rerun_keeps_its_list_when_videos_appear_or_vanish(
    of_folder, tmp_path, youtube, listed, capsys
):
    (videos, names), run = youtube, tmp_path / "run"
    first, second = videos / f"{names[0]}.mp4", videos / f"{names[1]}.mp4"
    flags = listed[2:] if of_folder else listed
    first.rename(tmp_path / "kept.mp4")
    call("01", run, *flags)
    before = files_of(run, "01", "cl")
    (tmp_path / "kept.mp4").rename(first)
    if not of_folder:
        second.unlink()
    capsys.readouterr()
    call("01", run, *flags)
    vanished = "" if of_folder else ", 1 vanished"
    assert f"1 videos appeared since{vanished}" in capsys.readouterr().out
    assert files_of(run, "01", "cl") == before


def test_a_rerun_says_that_captions_labels_and_splits_stay_what_they_were(tmp_path, listed, capsys):
    call("01", tmp_path / "run", *listed)
    before = files_of(tmp_path / "run", "01", "cl")
    first, second, *others = read(tmp_path / "list.jsonl")
    changed = [first | {"caption": "a dog"}, second | {"split": "val"}, *others]
    write(tmp_path / "list.jsonl", changed)
    capsys.readouterr()
    call("01", tmp_path / "run", *listed)
    assert "2 have another caption, label or split" in capsys.readouterr().out
    assert files_of(tmp_path / "run", "01", "cl") == before


def test_the_toy_model_on_other_clips_goes_on_with_its_own_settings(tmp_path, youtube, finished):
    flags = ("--model", "toy", "--checkpoint", finished / "00_base.pt", "--videos", youtube[0])
    for _ in range(2):
        call("01", tmp_path / "run", *flags, "--max-clips", 2)
        sampler = read_json(tmp_path / "run" / "run.json")["sampler"]
        assert sampler == {"steps": 8, "guidance": 1.5}


# What binds files to each other


def test_a_deleted_audio_or_shard_is_made_again_and_nothing_reads_less_or_anothers_meanwhile(
    fresh, small_shards, refused
):
    call("01", fresh, *SMALL)
    whole = files_of(fresh, "01")
    (fresh / "01_samples/00002.jsonl").write_text("")
    assert "is not there; rerun 01_generate.py" in refused("02", fresh)
    remove(fresh, "01_audio/train00001_1.wav", "01_samples/00001.pt", "01_samples/00003.jsonl")
    call("01", fresh, *SMALL)
    assert files_of(fresh, "01") == whole
    shutil.copy(fresh / "01_samples/00001.pt", fresh / "01_samples/00000.pt")
    assert shards_of(fresh).latents([("train00004", 0)]).isfinite().all()
    line = stopped(shards_of(fresh).latents, [("train00000", 0)])
    assert "00000.pt: does not belong to the audios in 00000.jsonl" in line


def test_a_cut_last_line_of_a_log_is_dropped_and_the_rest_kept(run):
    log = run / "05_flow_dpo/log.jsonl"
    kept = log.read_bytes()
    log.write_bytes(kept + b'{"step": 8, "lo')
    call("05", run)
    assert log.read_bytes() == kept


def test_temporaries_of_killed_runs_are_removed_by_the_next_that_holds_the_lock_and_others_left(
    run,
):
    stale = {"02": [".02_scores.jsonl.1.tmp.jsonl", "02_scores/.00000.toy.pt.1.tmp.pt"]}
    stale["05"] = ["05_flow_dpo/.x.pt.1.tmp.pt"]
    stale["01"] = [".run.json.1.tmp.json", "01_audio/.a_0.wav.1.tmp.wav"]
    stale["01"] += ["01_samples/.00000.pt.1.tmp.pt"]
    others = ["05_flow_dpo_2/.policy.pt.1.tmp.pt", "07_audio/base/.x.wav.1.tmp.wav"]
    (run / "05_flow_dpo_2").mkdir()
    for name in [*others, *stale["01"], *stale["02"], *stale["05"]]:
        (run / name).write_bytes(b"half")
    for number, names in stale.items():
        call(number, run)
        assert [name for name in names if (run / name).exists()] == []
    assert all((run / name).exists() for name in others)


def test_a_file_and_its_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    order, replace = [], os.replace

    def sync(handle):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))

    def rename(source, target):
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    files.write_text(tmp_path / "x.json", "{}")
    assert order == [f".x.json.{os.getpid()}.tmp.json", "rename", tmp_path.name]


# People


def fill(sheet, column, answers):
    """What a spreadsheet does with a sheet: in its place."""
    filled = cells(sheet)
    for row, answer in zip(filled, answers):
        row[column] = answer
    with open(sheet, "w", newline="") as stream:
        csv.writer(stream).writerows([filled[0], *(row.values() for row in filled)])
    return sheet.read_bytes()


def test_sheets_are_asked_for_read_in_place_and_never_written_over(run, capsys):
    remove(run, "00_truth.jsonl", "0[23]_*.*")
    call("02", run)
    filled = fill(run / "02_to_rate.csv", "rating", ("Good", "Bad", "Medium", "Medium") * 5)
    call("02", run)  # not given yet: asks again
    call("02", run, "--ratings", run / "02_to_rate.csv")
    assert (run / "02_to_rate.csv").read_bytes() == filled
    assert len(read(run / "02_ratings.jsonl")) == 20
    capsys.readouterr()
    call("03", run, "--num-human-pairs", 0)
    assert "nothing to choose: --num-human-pairs is 0" in capsys.readouterr().out
    remove(run, "03_*.*")
    call("03", run)  # asks, and goes on
    assert "no human choices" in capsys.readouterr().out
    assert read(run / "03_pairs.jsonl") and read(run / "03_human_pairs.jsonl") == []
    first, second, *others = cells(run / "03_to_choose.csv")
    for row in (first, second, *others):
        assert row["a"] != row["b"] and (run / row["wav_a"]).exists()
    filled = fill(run / "03_to_choose.csv", "choice", ("a", "b", "tie"))
    call("03", run, "--choices", run / "03_to_choose.csv", "--redo")
    assert (run / "03_to_choose.csv").read_bytes() == filled
    made = read(run / "03_human_pairs.jsonl")
    expected = {(first["clip"], int(first["a"]), int(first["b"]))}
    expected.add((second["clip"], int(second["b"]), int(second["a"])))
    assert {(pair["clip"], pair["winner"], pair["loser"]) for pair in made} == expected


def test_words_are_taken_as_meant_and_replaced_answers_counted(run, capsys):
    answers = read(run / "02_ratings.jsonl")
    spelled = []
    for i, row in enumerate(answers):
        rating = row["rating"].upper() if i % 2 else f" {row['rating'].lower()} "
        spelled.append(row | {"rating": rating})
    write(run / "spelled.jsonl", spelled)
    call("02", run, "--ratings", run / "spelled.jsonl")
    assert read(run / "02_ratings.jsonl") == answers
    write(run / "spelled.jsonl", spelled[:10])
    call("02", run, "--ratings", run / "spelled.jsonl", "--redo")
    assert f"{len(answers)} answers are replaced by the 10 of" in capsys.readouterr().out


def test_that_nothing_will_be_left_to_mine_is_said_when_the_sheet_is_written(run, capsys):
    remove(run, "00_truth.jsonl", "02_ratings.jsonl")
    call("02", run, "--num-rated-clips", 20)
    assert "warning: the sheet asks about every train clip" in capsys.readouterr().out
    call("02", run, "--num-rated-clips", 19)
    assert "warning" not in capsys.readouterr().out


def test_cells_are_no_formulas_and_ids_come_back_as_they_are(run):
    name = "-0jeONf82dE_000021"
    wav = f"01_audio/{name}_0.wav"
    sample = inputs.FoundSample(name, 0, 1, wav, 0, "", True, 0.5, 0.0)
    texts = {"=1+1": "'=1+1", "+a": "'+a", "-a": "'-a", "@a": "'@a", "a\n=b": "a =b", None: ""}
    for caption, cell in texts.items():
        (run / "02_to_rate.csv").unlink()
        clips = {name: a_clip(caption=caption)}
        stage("02").write_rating_sheet(run, [name], {name: [sample]}, clips)
        ((_, row),) = files.read_csv(run / "02_to_rate.csv", ("clip", "caption"))
        assert (row["clip"], row["caption"]) == (name, cell)


def test_prompts_of_ddpo_are_no_clips_that_audioscore_was_fitted_on(run, spied):
    drawn = spied(stage("06"), "draw_prompts")
    call("06", run, "--out", "x", "--steps", 1, "--updates", 1)
    rated = {row["clip"] for row in read(run / "02_ratings.jsonl")}
    others = {f"train{i:05d}" for i in range(20)} - rated
    assert {clip.id for clip in drawn[0][0]} == others and len(rated) == 8


def test_the_toy_worlds_people_answer_anew_when_redo_asks_them_other_questions(run):
    before = read(run / "02_ratings.jsonl")
    set_rating(run)
    edited = read(run / "02_ratings.jsonl")
    call("02", run, "--redo")
    assert read(run / "02_ratings.jsonl") == edited  # the same audios: what a person changed stays
    call("02", run, "--redo", "--num-rated-clips", 6)
    assert {row["clip"] for row in read(run / "02_ratings.jsonl")} < {row["clip"] for row in before}
    call("03", run, "--redo", "--num-human-pairs", 4)
    assert len(read(run / "03_human_choices.jsonl")) == 4


def test_ratings_in_many_csv_files_are_those_in_one_jsonl_and_repeats_do_not_count(run, finished):
    columns = ("clip", "k", "rating", "rater", "repeat", "seconds", "comment")
    given, tables = read(run / "02_ratings.jsonl"), [run / f"{i}.csv" for i in range(3)]
    for i, table in enumerate(tables):
        part = [[row[x] for x in columns[:4]] + [0, 4.5, "a, b"] for row in given[i::3]]
        again = [*part[0][:2], "Bad" if part[0][2] == "Good" else "Good", part[0][3], 1, 3, ""]
        absent = [*part[0][:2], "", "absent", "", "", ""]  # has not rated it yet
        # as a spreadsheet saves it
        with open(table, "w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows([columns, *part, again, absent])
    other = [row | {"rater": "bob", "rating": "Bad"} for row in given]
    write(run / "bob.jsonl", other)
    call("02", run, "--redo", "--ratings", *tables, run / "bob.jsonl", "--exclude-rater", "bob")
    kept = read(run / "02_ratings.jsonl")
    assert len(kept) == len(given) + 3 + len(other)
    assert kept[0] == given[0] | {"seconds": 4.5, "comment": "a, b"}
    assert (run / "02_audioscore.pt").read_bytes() == (finished / "02_audioscore.pt").read_bytes()


# Systems


def nowhere_finite(state):
    return {key: value * float("nan") for key, value in state.items()}


def test_silent_audio_of_a_broken_policy_is_counted_and_warned_of(run, tmp_path, capsys):
    broken = shutil.copytree(run / "05_flow_dpo", tmp_path / "broken")
    files.save_pt(broken / "policy.pt", nowhere_finite(weights(run, "05_flow_dpo")))
    call("07", run, "--split", "val", "--systems", "base", f"broken={broken}")
    assert "warning: 6 of 6 audios of broken are silent or broken" in capsys.readouterr().out
    base = files.load_pt(run / "00_base.pt")
    for name in ("00_scorers.pt", "run.json"):
        shutil.copy(run / name, tmp_path)
    files.save_pt(tmp_path / "00_base.pt", base | {"net": nowhere_finite(base["net"])})
    model = ("--model", "toy", "--checkpoint", tmp_path / "00_base.pt")
    flags = ("--videos", run / "00_videos", "--max-clips", 2, "--num-samples", 2)
    call("01", tmp_path / "new", *model, *flags)
    out = capsys.readouterr().out
    said(out, "audios: 4, 4 not finite (never used in a pair), 4 silent", "warning: more than 1 %")


def test_a_policy_folder_is_named_as_stage_05_says_and_exactly_what_is_named_is_evaluated(
    run, capsys
):
    call("05", run, "--out", "05_beta200", "--beta", 200, "--steps", 2)
    following = f"07_evaluate.py --run-dir {run} --systems ground_truth base 05_beta200\n"
    assert following in capsys.readouterr().out
    for systems in (("base", "05_beta200"), ()):
        call("07", run, *(["--systems", *systems] if systems else []))
        named = dict.fromkeys(row["system"] for row in read(run / "07_results.jsonl"))
        assert tuple(named) == (systems or SYSTEMS)


def test_an_untrained_policy_differs_from_base_by_nothing_and_wins_half(run):
    before = (run / "07_results.jsonl").read_bytes()
    call("05", run, "--lr", 0, "--steps", 2, "--out", "still")
    call("07", run, "--split", "val", "--systems", "ground_truth", "base", "still=still")
    found = results(run, "val")
    assert found["still", "win_rate"]["value"] == 0.5
    for metric in ("ib", "desync_s", "p_good", "oracle_semantic"):
        row = found["still", metric]
        assert (row["diff"], row["diff_low"], row["diff_high"]) == (0, 0, 0) and row["n"] == 6
    assert found["still", "fd"]["diff"] == pytest.approx(0, abs=1e-6)
    assert (run / "07_results.jsonl").read_bytes() == before  # of the test split: untouched


def test_a_folder_of_audio_is_a_system_and_the_truth_itself_is_at_distance_0(
    run, tmp_path, refused
):
    """Neither needs the weights of a model."""
    folder, clips = tmp_path / "published", inputs.read_clips(run, "val")
    folder.mkdir()
    remove(run, "00_base.pt")
    for clip in clips:  # a container with the same sound
        shutil.copy(clip.path, folder / f"{clip.id}.mp4")
    flags = ("--split", "val", "--systems", "ground_truth", f"published={folder}")
    call("07", run, *flags)
    found = results(run, "val")
    assert found["published", "fd"]["value"] == pytest.approx(0, abs=1e-3)
    assert found["published", "kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["published", "ib"]["value"] == found["ground_truth", "ib"]["value"]
    (folder / f"{clips[3].id}.mp4").unlink()
    line = refused("07", run, *flags)
    said(line, f"published: audio for 5 of 6 val clips, first missing {clips[3].id}")
    call("07", run, *flags, "--allow-missing")
    found = results(run, "val")
    assert (found["published", "ib"]["n"], found["ground_truth", "ib"]["n"]) == (5, 6)


def test_a_system_without_audio_for_a_whole_block_of_clips_is_judged_on_the_others(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "BLOCK_CLIPS", 4)
    clips = inputs.read_clips(run, "test")
    for clip in clips[:3]:
        shutil.copy(run / "07_audio/base" / f"{clip.id}.wav", tmp_path)
    call("07", run, "--systems", "base", f"few={tmp_path}", "--allow-missing")
    found = results(run)
    assert (found["few", "ib"]["n"], found["base", "ib"]["n"], len(clips)) == (3, 8, 8)


def test_a_test_clip_whose_video_or_sound_cannot_be_read_is_left_out_where_it_must(run, capfd):
    first, second, *_ = inputs.read_clips(run, "test")
    whole = first.path.read_bytes()
    make_video(first.path, seconds=0.8)  # too short to look at, but it sounds
    second.path.write_bytes(whole[:700])  # neither
    call("07", run, "--allow-missing")
    found = results(run)
    said(capfd.readouterr().err, f"{first.id}: too short", f"{second.id}: unreadable")
    assert found["ground_truth", "ib"]["n"] == 6 and found["ground_truth", "is"]["n"] == 7
    # its audio is cached, the video is gone
    assert found["base", "ib"]["n"] == found["base", "desync_s"]["n"] == 6
    assert all(row["value"] is None or np.isfinite(row["value"]) for row in found.values())


def test_coverage_counts_the_listed_clips_without_video(run, capsys):
    missing = [{"id": x, "split": s, "reason": "no"} for x, s in (("a", "test"), ("b", "train"))]
    write(run / "01_missing.jsonl", missing)
    call("07", run, "--systems", "ground_truth", "base")
    assert "1 more listed test clips have no video" in capsys.readouterr().out


def test_a_cached_audio_of_another_policy_is_never_taken_for_this_ones(run):
    folder = run / "07_audio/flow_dpo"
    made, (first, second, *_) = read_json(folder / "settings.json"), sorted(folder.glob("*.wav"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    other = made | {"settings": made["settings"] | {"policy": "0123456789abcdef"}}
    (folder / "settings.json").write_text(json.dumps(other))
    call("07", run)
    assert first.read_bytes() == kept and read_json(folder / "settings.json") == made


def test_a_name_given_to_another_policy_voids_its_audio_of_both_splits(run):
    of_base = {clip.id: run / f"07_audio/x/{clip.id}.wav" for clip in inputs.read_clips(run, "val")}
    call("07", run, "--split", "val", "--systems", "x=05_flow_dpo")
    kept = {name: wav.read_bytes() for name, wav in of_base.items()}
    call("07", run, "--split", "test", "--systems", "x=06_ddpo")
    call("07", run, "--split", "val", "--systems", "x=06_ddpo", "ddpo")
    for name, wav in of_base.items():
        assert wav.read_bytes() == (run / f"07_audio/ddpo/{name}.wav").read_bytes() != kept[name]
