"""The whole pipeline as a user runs it, smaller: what a run contains, and that it can be stopped, repeated, divided."""

import csv
import json
import os
import shutil
import signal
import time
from collections import Counter

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import STAGES, call, files_of, make_video, read, stage, start, torchrun, write

import common

SYSTEMS = ("ground_truth", "base", "flow_dpo", "ddpo")


def without_times(name, content):
    """A training log less what differs between two equal runs."""
    if not name.endswith("log.jsonl"):
        return content
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in content.decode().splitlines()]


def weights(run, out):
    return common.load_pt(run / out / "policy.pt")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


# What a finished run contains --------------------------------------------------------------------------------


def test_every_file_of_a_run_is_there(finished):
    names = ["run.json", "clips.jsonl", "00_base.pt", "00_scorers.pt", "00_oracle.pt", "00_truth.jsonl", "00_videos"]
    names += ["01_samples/00000.jsonl", "01_samples/00000.pt", "01_audio"]
    names += ["02_to_rate.csv", "02_ratings.jsonl", "02_scores.jsonl", "02_audioscore.pt"]
    names += ["03_to_choose.csv", "03_human_choices.jsonl", "03_scores/00000.jsonl", "03_pairs.jsonl"]
    names += ["03_human_pairs.jsonl", "scores/00000.pesq.pt", "04_stage1.jsonl", "04_stage2.jsonl"]
    names += ["07_results.jsonl", "07_systems.json", "07_audio", "07_conditions", "scores/test_00000.passt.pt"]
    for folder in ("05_flow_dpo", "06_ddpo"):
        names += [f"{folder}/{x}" for x in ("policy.pt", "policy.json", "checkpoint.pt", "log.jsonl", "settings.json")]
    assert [name for name in names if not (finished / name).exists()] == []
    assert [path for path in finished.rglob("*") if ".tmp" in path.name] == []


def test_every_stage_says_what_to_run_next(finished):
    parts = finished.with_suffix(".log").read_text().split("== ")[1:]
    names = sorted({*(path.name for path in STAGES.values()), "08_listen.py"})
    for part, name in zip(parts, names[1:]):
        assert f"next: python {name} --run-dir {finished}" in part


def test_clips_have_their_fields_and_real_videos_and_the_truth_is_apart(finished):
    clips, about = read(finished / "clips.jsonl"), json.loads((finished / "run.json").read_text())
    assert {clip["split"] for clip in clips} == {"train", "val", "test"}
    assert all(list(clip) == ["id", "video", "caption", "label", "split"] for clip in clips)
    truth = read(finished / "00_truth.jsonl")
    assert [row["id"] for row in truth] == [clip["id"] for clip in clips]
    assert all(list(row) == ["id", "class", "hits_s", "wet"] and 2 <= len(row["hits_s"]) <= 4 for row in truth)
    with av.open(str(finished / about["video_root"] / clips[0]["video"])) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]


def test_run_json_records_model_sampler_and_seed(finished):
    about = json.loads((finished / "run.json").read_text())
    assert (about["model"], about["num_samples"], about["seed"], about["size"]) == ("toy", 5, 0, "tiny")
    assert about["checkpoint_digest"] == common.digest(finished / "00_base.pt")
    assert about["sampler"].keys() == {"steps", "guidance"} and len(about["latent_shape"]) == 2


def test_five_audible_audios_per_train_clip(finished):
    train = [clip["id"] for clip in read(finished / "clips.jsonl") if clip["split"] == "train"]
    rows = read(finished / "01_samples" / "00000.jsonl")
    assert Counter((row["clip"], row["k"]) for row in rows) == Counter((c, k) for c in train for k in range(5))
    assert len({row["seed"] for row in rows}) == len(rows)
    rate = json.loads((finished / "run.json").read_text())["sample_rate_hz"]
    for row in rows:
        wave, found = soundfile.read(finished / row["wav"])
        assert found == rate and wave.shape == (2 * rate,)
    shard = common.load_pt(finished / "01_samples" / "00000.pt")
    assert shard["latents"].shape[0] == len(rows) and shard["latents"].isfinite().all()
    assert {len(value) for value in shard["features"].values()} == {len(train)}


def test_ratings_are_of_all_three_kinds(finished):
    rows = read(finished / "02_ratings.jsonl")
    assert {row["rating"] for row in rows} == {"Good", "Medium", "Bad"}
    with open(finished / "02_to_rate.csv", newline="") as stream:
        asked = list(csv.DictReader(stream))
    assert {(row["clip"], int(row["k"])) for row in asked} == {(row["clip"], row["k"]) for row in rows}


def test_scores_are_null_exactly_where_they_do_not_apply(finished):
    clips = {clip["id"]: clip for clip in read(finished / "clips.jsonl")}
    rows = read(finished / "03_scores" / "00000.jsonl")
    assert len(rows) == len(read(finished / "01_samples" / "00000.jsonl"))
    for row in rows:
        clip = clips[row["clip"]]
        assert (row["clap"] is None) == (clip["caption"] is None)
        assert row["pesq"] is None or (clip["label"] == "person speaking" and 1 <= row["pesq"] <= 4.7)
        assert -1 <= row["ib"] <= 1 and row["desync_s"] >= 0 and row["is_nats"] > -1e-4
        assert sum(row["p"]) == pytest.approx(1, abs=1e-5) and min(row["p"]) >= 0
    assert any(row["pesq"] is not None for row in rows) and any(row["clap"] is not None for row in rows)


def test_a_pair_is_the_best_and_the_worst_of_its_clip(finished):
    p = {}
    for row in read(finished / "03_scores" / "00000.jsonl"):
        p.setdefault(row["clip"], {})[row["k"]] = row["p"]
    pairs, fault, samples = read(finished / "03_pairs.jsonl"), stage("03").fault, common.read_samples(finished)
    assert pairs
    for pair in pairs:
        mine = p[pair["clip"]]
        may_win = [row["k"] for row in samples[pair["clip"]] if fault(row) is None]
        assert pair["winner"] == max(may_win, key=lambda k: mine[k][0])
        assert pair["loser"] == max(mine, key=lambda k: mine[k][2])
        assert (pair["p_winner"], pair["p_loser"]) == (mine[pair["winner"]], mine[pair["loser"]])


def test_the_winner_is_never_the_loser_and_rated_clips_are_not_mined(finished):
    mined, people = read(finished / "03_pairs.jsonl"), read(finished / "03_human_pairs.jsonl")
    assert mined and people
    assert all(pair["winner"] != pair["loser"] for pair in mined + people)
    rated = {row["clip"] for row in read(finished / "02_ratings.jsonl")}
    assert not rated & {pair["clip"] for pair in mined}
    assert {pair["clip"] for pair in people} <= rated


def test_the_curriculum_splits_at_the_threshold_and_keeps_people_for_stage_2(finished):
    stage1, stage2 = (read(finished / f"04_stage{i}.jsonl") for i in (1, 2))
    threshold = json.loads((finished / "04_settings.json").read_text())["settings"]["threshold"]
    assert stage1 and all(pair["score_c"] > threshold and pair["source"] == "auto" for pair in stage1)
    people = [pair for pair in stage2 if pair["source"] == "human"]
    assert len(people) == len(read(finished / "03_human_pairs.jsonl")) > 0
    assert {pair["score_c"] for pair in people} == {0.0}
    assert all(pair["score_c"] <= threshold for pair in stage2)
    assert len(stage1) + len(stage2) - len(people) == len(read(finished / "03_pairs.jsonl"))


def test_both_stages_are_trained_in_order_and_logged(finished):
    log = read(finished / "05_flow_dpo" / "log.jsonl")
    assert [row["step"] for row in log] == list(range(stage("00").DEFAULTS["tiny"]["05"]["steps"]))
    stages = [row["stage"] for row in log]
    assert stages == sorted(stages) and set(stages) == {1, 2}
    wanted = {"loss", "accuracy", "gap_w", "gap_l", "gap_w_t", "gap_l_t", "saturated", "grad_norm", "lr", "seconds"}
    assert all(wanted <= row.keys() and len(row["gap_w_t"]) == 4 for row in log)
    ddpo = read(finished / "06_ddpo" / "log.jsonl")
    assert [row["step"] for row in ddpo] == list(range(stage("00").DEFAULTS["tiny"]["06"]["steps"]))
    assert all(0 <= row["reward"] <= 1 and row["grad_norm"] >= 0 and row["forwards"] > 0 for row in ddpo)


def test_training_moves_the_policy_and_leaves_the_base_alone(finished):
    base = common.load_pt(finished / "00_base.pt")["net"]
    for out in ("05_flow_dpo", "06_ddpo"):
        policy = weights(finished, out)
        assert policy.keys() == base.keys()
        moved = {key for key in base if not torch.equal(base[key], policy[key])}
        assert len(moved) > len(base) / 2
        assert not moved & {"null_tokens", "null_vector"}  # null conditions are frozen
        about = json.loads((finished / out / "policy.json").read_text())
        assert (about["model"], about["base_digest"]) == ("toy", common.digest(finished / "00_base.pt"))


def test_the_reference_stays_the_base_while_the_policy_learns(run, monkeypatch):
    kept, reference = [], common.FlowModel.reference
    monkeypatch.setattr(common.FlowModel, "reference", lambda model: kept.append(reference(model)) or kept[-1])
    call("05", run, "--out", "watched", "--steps", 3)
    assert largest_difference(kept[0].state_dict(), common.load_base_model(run).state_dict()) == 0
    assert largest_difference(weights(run, "watched"), common.load_pt(run / "00_base.pt")["net"]) > 1e-5


def test_results_have_every_system_metric_and_field(finished):
    rows = read(finished / "07_results.jsonl")
    keys = ["system", "metric", "better", "value", "low", "high", "n", "diff", "diff_low", "diff_high"]
    assert all(list(row) == keys for row in rows)
    assert list(dict.fromkeys(row["system"] for row in rows)) == list(SYSTEMS)
    named = {(row["system"], row["metric"]): row for row in rows}
    means = ("ib", "clap", "desync_s", "p_good", "win_rate", "oracle_semantic", "oracle_sync_s", "oracle_floor_db")
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
    run = finished
    clips = common.read_clips(run, "test")
    audios = [common.Audio(c, run / "07_audio" / "flow_dpo" / f"{c['id']}.wav", "", "") for c in clips]
    found = {n: common.score_files(common.load_scorer(n, run), audios, 2.0) for n in common.AUDIOSCORE_SCORERS}
    judge = common.AudioScore.load(run / "02_audioscore.pt")
    expected = judge(common.five_scores(found, judge))[:, 0].mean().item()
    row = next(r for r in read(run / "07_results.jsonl") if (r["system"], r["metric"]) == ("flow_dpo", "p_good"))
    assert row["value"] == pytest.approx(expected, abs=1e-5) and row["n"] == len(clips)


# Runs that are stopped, repeated, or divided -----------------------------------------------------------------


def test_the_same_content_has_the_same_bytes_whichever_process_writes_it(tmp_path, monkeypatch):
    value = {"x": torch.arange(10.0), "name": "x"}
    common.save_pt(tmp_path / "one.pt", value)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    (tmp_path / "again").mkdir()
    common.save_pt(tmp_path / "again" / "one.pt", value)
    assert common.digest(tmp_path / "one.pt") == common.digest(tmp_path / "again" / "one.pt")


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

    watch(common.Scorer, "__call__")
    watch(common, "sample")
    watch(stage("00").Toy, "encode")
    watch(common, "flow_dpo_loss")
    watch(stage("06"), "collect")
    watch(stage("00"), "draw_picture")
    return counts


def test_a_rerun_of_every_stage_succeeds_and_does_nothing_twice(run, counted):
    before = files_of(run, *STAGES, "ru", "cl")
    call("00", run, "--size", "tiny")
    for number in ("01", "02", "03", "04", "05", "06", "07"):
        call(number, run)
    after = files_of(run, *STAGES, "ru", "cl")
    assert counted == {}
    assert before.keys() == after.keys()
    moved = {"07_systems.json", "02_to_rate.csv", "03_to_choose.csv"}  # these name the run's own place
    changed = [n for n in sorted(before.keys() - moved) if without_times(n, before[n]) != without_times(n, after[n])]
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


def test_interrupted_generation_goes_on_without_repeating_or_losing_anything(fresh, small_shards, monkeypatch):
    call("01", fresh)
    whole = files_of(fresh, "01")
    shards = sorted(path.stem for path in (fresh / "01_samples").glob("*.jsonl"))
    assert shards == [f"{i:05d}" for i in range(5)]
    for name in ("00002", "00003", "00004"):
        for path in (fresh / "01_samples").glob(f"{name}.*"):
            path.unlink()
    times = {p.name: p.stat().st_mtime_ns for p in (fresh / "01_samples").iterdir()}
    with monkeypatch.context() as patch:
        interrupt_after(patch, common, "write_audio", 30)  # in the second of the three missing shards
        with pytest.raises(KeyboardInterrupt):
            call("01", fresh)
    assert not (fresh / "01_samples" / "00003.jsonl").exists()
    call("01", fresh)
    assert files_of(fresh, "01") == whole
    assert {name: (fresh / "01_samples" / name).stat().st_mtime_ns for name in times} == times


def test_generation_is_the_same_in_shards_of_any_size(fresh, finished, small_shards):
    call("01", fresh, "--batch-clips", 3)
    read_all = {(row["clip"], row["k"]): row for file in (fresh / "01_samples").glob("*.jsonl") for row in read(file)}
    assert len(read_all) == len(read(finished / "01_samples" / "00000.jsonl"))
    ours, theirs = (common.Shards(run, common.read_samples(run), 5) for run in (fresh, finished))
    audios = sorted(read_all)[::7]
    assert torch.allclose(ours.latents(audios), theirs.latents(audios), atol=1e-4)


def test_a_killed_generation_is_completed_by_the_same_command(fresh, finished):
    started = start("01", fresh)
    wait_until(lambda: len(list((fresh / "01_audio").glob("*.wav"))) > 12, started)
    started.kill()
    started.communicate()
    assert not (fresh / "01_samples" / "00000.jsonl").exists()
    call("01", fresh)
    ours, theirs = files_of(fresh, "01"), files_of(finished, "01")
    leftovers = {name for name in ours if ".tmp" in name}
    assert {name: ours[name] for name in ours.keys() - leftovers} == theirs


def wait_until(happened, process, seconds=300):
    began = time.monotonic()
    while not happened():
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() - began < seconds
        time.sleep(0.005)


def test_interrupted_scoring_goes_on_and_gives_the_same_audioscore(run, finished, monkeypatch):
    for name in ("02_audioscore.pt", "02_scores.jsonl", "02_settings.json"):
        (run / name).unlink()
    shutil.rmtree(run / "scores")
    with monkeypatch.context() as patch:
        interrupt_after(patch, common.Scorer, "__call__", 5)
        with pytest.raises(KeyboardInterrupt):
            call("02", run)
    assert list((run / "scores").glob("0*.pt")) and not (run / "02_audioscore.pt").exists()
    call("02", run)
    ours, theirs = (common.load_pt(place / "02_audioscore.pt")["audioscore"] for place in (run, finished))
    assert largest_difference(ours, theirs) == 0
    assert (run / "02_scores.jsonl").read_bytes() == (finished / "02_scores.jsonl").read_bytes()


@pytest.mark.parametrize("number, owner, name", [("02", "02", "fit"), ("03", "03", "mine"), ("04", "04", "split")])
def test_an_interrupted_redo_leaves_nothing_that_later_stages_would_take_for_new(run, number, owner, name, monkeypatch):
    if number == "02":
        set_rating(run, 0)
    elif number == "03":
        call("02", run, "--redo", "--seed", 5)
    else:
        call("03", run, "--redo", "--min-score-c", 0.01)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stage(owner), name, 1)
        with pytest.raises(KeyboardInterrupt):
            call(number, run, "--redo")
    with pytest.raises(common.Stop):
        call({"02": "03", "03": "04", "04": "05"}[number], run, *(("--out", "x") if number == "04" else ()))
    call(number, run)  # the same command without --redo goes on


def set_rating(run, number):
    rows = read(run / "02_ratings.jsonl")
    rows[number]["rating"] = "Good" if rows[number]["rating"] != "Good" else "Bad"
    write(run / "02_ratings.jsonl", rows)


def test_smaller_micro_batches_of_ddpo_give_the_same_policy(run):
    for out, size in (("whole", 3), ("sliced", 1)):  # a prompt's three audios together, and one by one
        call("06", run, "--out", out, "--steps", 2, "--micro-batch", size, "--lr", 3e-5)
    assert largest_difference(weights(run, "whole"), weights(run, "sliced")) < 2e-6
    whole, sliced = (read(run / out / "log.jsonl") for out in ("whole", "sliced"))
    for key in ("reward", "grad_norm", "approx_kl"):
        assert [row[key] for row in sliced] == pytest.approx([row[key] for row in whole], rel=1e-3, abs=1e-9)


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


@pytest.mark.parametrize(
    "number, flags, rows, how",
    [
        ("05", ("--steps", 24, "--save-every", 3), 5, signal.SIGKILL),
        ("06", ("--steps", 16, "--save-every", 1), 5, signal.SIGINT),
    ],
    ids=["flow_dpo, killed", "ddpo, Ctrl-C"],
)
def test_resume_equals_uninterrupted(run, number, flags, rows, how):
    call(number, run, "--out", "whole", *flags)
    started = start(number, run, "--out", "stopped", *flags)
    wait_until(lambda: lines(run / "stopped" / "log.jsonl") >= rows, started)
    started.send_signal(how)
    errors = started.communicate()[1]
    assert not (run / "stopped" / "policy.pt").exists()
    if how == signal.SIGINT:
        assert started.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
    done = common.load_pt(run / "stopped" / "checkpoint.pt")["step"]
    assert 0 < done < flags[1]
    call(number, run, "--out", "stopped", *flags)
    assert largest_difference(weights(run, "stopped"), weights(run, "whole")) == 0
    logs = [without_times("log.jsonl", (run / out / "log.jsonl").read_bytes()) for out in ("stopped", "whole")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "number, flags",
    [("05", ("--steps", 20)), ("06", ("--steps", 4, "--lr", 3e-5))],
    ids=["flow_dpo", "ddpo"],
)
def test_two_ranks_match_one(run, number, flags):
    call(number, run, "--out", "one", *flags)
    torchrun(number, run, "--out", "two", *flags)
    one, two, base = weights(run, "one"), weights(run, "two"), common.load_pt(run / "00_base.pt")["net"]
    assert largest_difference(one, two) < 1e-4
    apart, moved = (sum((a[key] - b[key]).square().sum().item() for key in a) for a, b in ((one, two), (one, base)))
    # Adam turns the rounding of a vanishing gradient, and of rewards that hardly differ, into a step now and then.
    assert apart**0.5 < 0.2 * moved**0.5
    logs = [read(run / out / "log.jsonl") for out in ("one", "two")]
    assert [len(log) for log in logs] == [flags[1]] * 2
    names, rows = (("loss", "gap_w", "gap_l"), 20) if number == "05" else (("reward", "reward_std", "approx_kl"), 2)
    for name in names:  # of DDPO the first round: the second samples from weights that differ by rounding
        one, two = ([row[name] for row in log[:rows]] for log in logs)
        assert one == pytest.approx(two, abs=1e-3)
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("flags", [("--micro-batch", 1), ("--gradient-checkpointing",)], ids=lambda f: f[0][2:])
def test_memory_savers_do_not_change_the_result(run, flags):
    call("05", run, "--out", "plain", "--steps", 4)
    call("05", run, "--out", "saved", "--steps", 4, *flags)
    assert largest_difference(weights(run, "plain"), weights(run, "saved")) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [(), ("--compile",), ("--gradient-checkpointing",)])
def test_flow_dpo_starts_at_log2_and_learns_in_bf16_on_cuda(run, flags):
    call("05", run, "--out", "cuda", "--steps", 4, *flags)
    log = read(run / "cuda" / "log.jsonl")
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-3) and log[0]["peak_gb"] > 0
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)


# The oracle --------------------------------------------------------------------------------------------------


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
    ours, theirs = (files_of(place, "01", "02", "03", "04", "05", "06") for place in (fresh, finished))
    assert ours.keys() == theirs.keys()
    for name in ours:
        place = ours[name].replace(str(fresh).encode(), str(finished).encode())
        assert without_times(name, place) == without_times(name, theirs[name]), name


# Other clips than the toy world's ----------------------------------------------------------------------------


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
    assert {(clip["split"], clip["caption"], clip["label"]) for clip in clips} == {("train", None, None)}
    assert len(list((run / "01_audio").glob("*.wav"))) == 6
    wave, rate = soundfile.read(run / "01_audio" / "odd_1.wav")
    assert (len(wave), rate) == (32_000, 16_000) and np.abs(wave).max() > 0
    call("02", run)  # nobody has rated anything: the sheet is written, and that is all
    with open(run / "02_to_rate.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 6
    assert not (run / "02_ratings.jsonl").exists() and not (run / "02_audioscore.pt").exists()


@pytest.fixture
def youtube(finished, tmp_path):
    """Six videos named as VGGSound's are, and the list of their names."""
    names = [f"{'abcdefghijk'[::-1] if i % 2 else 'ABCDEFGHIJ_'}_{10 * i:06d}" for i in range(6)]
    (tmp_path / "videos").mkdir()
    for i, name in enumerate(names):
        shutil.copy(finished / "00_videos" / f"train{i:05d}.mp4", tmp_path / "videos" / f"{name}.mp4")
    return tmp_path / "videos", names


def splits(run):
    return {clip["id"]: clip["split"] for clip in read(run / "clips.jsonl")}


def test_vggsounds_csv(tmp_path, youtube, toy, capsys):
    videos, names = youtube
    table = [f'{n[:11]},{int(n[12:])},"dog, barking",{"test" if i > 3 else "train"}' for i, n in enumerate(names)]
    (tmp_path / "vggsound.csv").write_text("\n".join([*table, "lost_video_,30,bird,train\n"]))
    call("01", tmp_path / "run", "--clips", tmp_path / "vggsound.csv", "--videos", videos, *toy)
    assert splits(tmp_path / "run") == {n: "test" if i > 3 else "train" for i, n in enumerate(names)}
    assert {(c["caption"], c["label"]) for c in read(tmp_path / "run" / "clips.jsonl")} == {("dog, barking",) * 2}
    missing = read(tmp_path / "run" / "01_missing.jsonl")
    assert [row["id"] for row in missing] == ["lost_video__000030"]
    assert {row["clip"] for row in read(tmp_path / "run" / "01_samples" / "00000.jsonl")} == set(names[:4])
    said = capsys.readouterr().out
    assert "2 YouTube ids occur in more than one split" in said and "train 4 of 5" in said


def test_mmaudios_tsv_and_test_list(tmp_path, youtube, toy):
    videos, names = youtube
    (tmp_path / "vgg-train.tsv").write_text("id\tlabel\n" + "".join(f"{name}\tdog\n" for name in names))
    (tmp_path / "vgg-test.tsv").write_text("id\tlabel\n" + "".join(f"{name}\tdog\n" for name in names[:2]))
    flags = ("--clips", tmp_path / "vgg-train.tsv", "--videos", videos, "--test-list", tmp_path / "vgg-test.tsv")
    call("01", tmp_path / "run", *flags, *toy)
    assert splits(tmp_path / "run") == {name: "test" if i < 2 else "train" for i, name in enumerate(names)}


def test_max_clips_draws_a_seeded_subset_of_the_train_clips(tmp_path, youtube, toy):
    videos, names = youtube
    write(tmp_path / "list.jsonl", [{"id": n, "split": "val" if i == 5 else "train"} for i, n in enumerate(names)])
    flags, drawn = ("--clips", tmp_path / "list.jsonl", "--videos", videos, "--max-clips", 2), {}
    for run, seed in (("one", 0), ("again", 0), ("other", 1), ("third", 2)):
        call("01", tmp_path / run, *flags, *toy, "--seed", seed)
        drawn[run] = {row["clip"] for row in read(tmp_path / run / "01_samples" / "00000.jsonl")}
    assert drawn["one"] == drawn["again"] and all(len(part) == 2 and names[5] not in part for part in drawn.values())
    assert len({frozenset(part) for part in drawn.values()}) > 1


def test_a_run_prepared_without_train_clips_gets_them_later(tmp_path, youtube, toy, capsys):
    videos, names = youtube
    write(tmp_path / "list.jsonl", [{"id": n, "split": "test" if i > 3 else "train"} for i, n in enumerate(names)])
    flags = ("--clips", tmp_path / "list.jsonl", "--videos", videos, *toy)
    (videos / f"{names[0]}.mp4").rename(tmp_path / "later.mp4")
    call("01", tmp_path / "run", *flags, "--max-clips", 0)
    (tmp_path / "later.mp4").rename(videos / f"{names[0]}.mp4")
    assert "prepared" in capsys.readouterr().out and not (tmp_path / "run" / "01_samples").exists()
    with pytest.raises(common.Stop):
        call("01", tmp_path / "run", *flags, "--guidance", 2)
    call("01", tmp_path / "run", *flags)
    assert {row["clip"] for row in read(tmp_path / "run" / "01_samples" / "00000.jsonl")} == set(names[:4])


def test_a_rerun_keeps_its_list_when_videos_appear_or_vanish(tmp_path, youtube, toy, capsys):
    videos, names = youtube
    write(tmp_path / "list.jsonl", [{"id": name} for name in names])
    flags = ("--clips", tmp_path / "list.jsonl", "--videos", videos, *toy)
    (videos / f"{names[0]}.mp4").rename(tmp_path / "kept.mp4")
    call("01", tmp_path / "run", *flags)
    before = files_of(tmp_path / "run", "01", "cl")
    (tmp_path / "kept.mp4").rename(videos / f"{names[0]}.mp4")
    (videos / f"{names[1]}.mp4").unlink()
    capsys.readouterr()
    call("01", tmp_path / "run", *flags)
    assert "1 videos appeared since, 1 vanished" in capsys.readouterr().out
    assert files_of(tmp_path / "run", "01", "cl") == before


def test_the_toy_model_on_other_clips_goes_on_with_its_own_settings(tmp_path, youtube, finished):
    flags = ("--model", "toy", "--checkpoint", finished / "00_base.pt", "--videos", youtube[0], "--max-clips", 2)
    call("01", tmp_path / "run", *flags)
    sampler = json.loads((tmp_path / "run" / "run.json").read_text())["sampler"]
    assert sampler == {"steps": stage("00").DEFAULTS["tiny"]["01"]["sampling_steps"], "guidance": 1.5}
    call("01", tmp_path / "run", *flags)


# People and published systems --------------------------------------------------------------------------------


def fill(sheet, column, answers):
    """What a spreadsheet does with a sheet: in its place."""
    with open(sheet, newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, answer in zip(rows, answers):
        row[column] = answer
    with open(sheet, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return sheet.read_bytes()


def test_sheets_that_people_fill_in_are_read_in_place_and_never_written_over(run, refused):
    for path in [path for number in ("02", "03") for path in run.glob(f"{number}_*") if path.is_file()]:
        path.unlink()
    (run / "00_truth.jsonl").unlink()
    call("02", run)
    filled = fill(run / "02_to_rate.csv", "rating", ("Good", "Bad", "Medium", "Medium") * 5)
    call("02", run)  # not given yet: asks again
    call("02", run, "--ratings", run / "02_to_rate.csv")
    assert (run / "02_to_rate.csv").read_bytes() == filled and len(read(run / "02_ratings.jsonl")) == 20
    call("03", run)
    assert "no choice" in refused("03", run, "--choices", run / "03_to_choose.csv", "--redo")
    filled = fill(run / "03_to_choose.csv", "choice", ("a", "b", "tie"))
    call("03", run, "--choices", run / "03_to_choose.csv", "--redo")
    assert (run / "03_to_choose.csv").read_bytes() == filled and len(read(run / "03_human_pairs.jsonl")) == 2


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
    with open(run / "03_to_choose.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows and all(row["a"] != row["b"] and (run / row["wav_a"]).exists() for row in rows)
    answers = run / "chosen.csv"
    answers.write_text("clip,a,b,choice\n" + "".join(f"{r['clip']},{r['a']},{r['b']},b\n" for r in rows))
    call("03", run, "--choices", answers, "--redo")
    made = {(pair["clip"], pair["winner"], pair["loser"]) for pair in read(run / "03_human_pairs.jsonl")}
    assert made == {(row["clip"], int(row["b"]), int(row["a"])) for row in rows}


def test_ratings_from_a_csv_are_the_same_as_from_a_jsonl(run, finished):
    rows = read(run / "02_ratings.jsonl")
    with open(run / "rated.csv", "w", newline="", encoding="utf-8-sig") as stream:  # as a spreadsheet saves it
        writer = csv.writer(stream)
        writer.writerow(["clip", "k", "wav", "rating", "rater"])
        writer.writerows([[r["clip"], r["k"], "x.wav", r["rating"], r["rater"]] for r in rows])
        writer.writerow([rows[0]["clip"], rows[0]["k"], "x.wav", "", "absent"])  # not rated yet
    (run / "02_ratings.jsonl").unlink()
    call("02", run, "--ratings", run / "rated.csv", "--redo")
    assert (run / "02_ratings.jsonl").read_bytes() == (finished / "02_ratings.jsonl").read_bytes()
    ours, theirs = (common.load_pt(place / "02_audioscore.pt")["audioscore"] for place in (run, finished))
    assert largest_difference(ours, theirs) == 0


def results(run, split="test"):
    rows = read(run / ("07_results.jsonl" if split == "test" else f"07_results_{split}.jsonl"))
    return {(row["system"], row["metric"]): row for row in rows}


def test_an_untrained_policy_differs_from_base_by_nothing_and_wins_half(run):
    call("05", run, "--lr", 0, "--steps", 2, "--out", "still")
    call("07", run, "--split", "val", "--only", "--systems", "ground_truth", "base", "still=still")
    found = results(run, "val")
    assert found["still", "win_rate"]["value"] == 0.5
    for metric in ("ib", "desync_s", "p_good", "oracle_semantic"):
        row = found["still", metric]
        assert (row["diff"], row["diff_low"], row["diff_high"]) == (0, 0, 0) and row["n"] == 6
    assert found["still", "fd"]["diff"] == pytest.approx(0, abs=1e-6)
    assert read(run / "07_results.jsonl")[0]["system"] == "ground_truth"  # the test split's numbers are untouched


def test_a_folder_of_audio_is_a_system_and_the_truth_itself_is_at_distance_0(run, tmp_path, refused):
    folder, clips = tmp_path / "published", common.read_clips(run, "val")
    folder.mkdir()
    for clip in clips:  # a container with the same sound
        shutil.copy(clip["path"], folder / f"{clip['id']}.mp4")
    flags = ("--split", "val", "--only", "--systems", "ground_truth", f"published={folder}")
    call("07", run, *flags)
    found = results(run, "val")
    assert found["published", "fd"]["value"] == pytest.approx(0, abs=1e-3)
    assert found["published", "kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["published", "ib"]["value"] == found["ground_truth", "ib"]["value"]
    (folder / f"{clips[3]['id']}.mp4").unlink()
    assert f"published: audio for 5 of 6 val clips, first missing {clips[3]['id']}" in refused("07", run, *flags)
    call("07", run, *flags, "--allow-missing")
    found = results(run, "val")
    assert (found["published", "ib"]["n"], found["ground_truth", "ib"]["n"]) == (5, 6)


def test_a_test_clip_whose_video_or_sound_cannot_be_read_is_left_out_where_it_must(run, capfd):
    names = [clip["id"] for clip in read(run / "clips.jsonl") if clip["split"] == "test"]
    whole = (run / "00_videos" / f"{names[0]}.mp4").read_bytes()
    make_video(run / "00_videos" / f"{names[0]}.mp4", (64, 64), 25, 0.8)  # too short to look at, but it sounds
    (run / "00_videos" / f"{names[1]}.mp4").write_bytes(whole[:700])  # neither
    for name in ("scores", "07_conditions"):
        shutil.rmtree(run / name)
    call("07", run, "--allow-missing")
    found, said = results(run), capfd.readouterr().err
    assert f"{names[0]}: too short" in said and f"{names[1]}: unreadable" in said
    assert found["ground_truth", "ib"]["n"] == 6 and found["ground_truth", "is"]["n"] == 7
    assert found["base", "ib"]["n"] == found["base", "desync_s"]["n"] == 6  # its audio is cached, the video is gone
    assert all(row["value"] is None or np.isfinite(row["value"]) for row in found.values())


def test_coverage_counts_the_listed_clips_without_video(run, capsys):
    write(run / "01_missing.jsonl", [{"id": x, "split": s, "reason": "no"} for x, s in (("a", "test"), ("b", "train"))])
    call("07", run, "--only", "--systems", "ground_truth", "base")
    assert "1 more listed test clips have no video" in capsys.readouterr().out


def test_a_cached_audio_of_another_policy_is_never_taken_for_this_ones(run):
    before = (run / "07_audio/flow_dpo/settings.json").read_bytes()
    (run / "07_audio/flow_dpo/settings.json").unlink()  # as an interrupted clean-up leaves it
    names = sorted((run / "07_audio/flow_dpo").glob("*.wav"))
    kept = names[0].read_bytes()
    names[0].write_bytes(names[1].read_bytes())
    call("07", run)
    assert names[0].read_bytes() == kept and (run / "07_audio/flow_dpo/settings.json").read_bytes() == before
