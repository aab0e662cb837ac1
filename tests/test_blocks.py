"""Blocks of scores: what a key depends on; a block is made whole and anew; nothing twice; ranks
divide them."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, a_clip, call, files_of, make_video, read, remove, results, stopped

import common
from adapters.toy import ToyScorer
from common import files, inputs, media, ranks, scoring

FIVE = {"imagebind", "clap", "synchformer", "panns", "pesq"}
LOOK = {"imagebind", "synchformer", "pesq"}  # what looks at the video, or listens to its sound

# Keys


@pytest.fixture
def keys(tmp_path):
    """The keys of one audio by scorer, after changes to it. Nobody could decode these files, or
    load these weights."""
    scorers = scoring.ScorerSet(tmp_path, common.SCORERS["real"], tmp_path / "weights")
    (tmp_path / "x.mp4").write_bytes(b"12345")
    for name in [name for scorer in scorers.classes.values() for name in scorer.files]:
        (tmp_path / "weights" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / name).write_bytes(b"12345")

    def of(digest="0123", wav="a.wav", k=0, **changes):
        clip = dict(id="x", video="x.mp4", caption="a dog", label="dog barking", split="train")
        clip = inputs.FoundClip(**(clip | changes), path=tmp_path / "x.mp4")
        audio = scoring.Audio(clip, k, tmp_path / wav, digest)
        scorers = scoring.ScorerSet(tmp_path, common.SCORERS["real"], tmp_path / "weights")
        return {name: scoring.score_key(scorers, name, [audio]) for name in FIVE}

    return of


@pytest.mark.parametrize("changes, anew", [
    (dict(digest="4567"), FIVE), (dict(caption="a cat"), {"clap"}), (dict(caption=None), {"clap"}),
    (dict(label="meowing"), {"pesq"}), (dict(id="y"), FIVE), (dict(k=1), set()),
    (dict(wav="b.wav"), set()), (dict(split="val"), set()),
])  # fmt: skip
def test_a_key_changes_with_what_its_scores_depend_on_and_with_nothing_else(changes, anew, keys):
    before, after = keys(), keys(**changes)
    assert len(set(before.values())) == 5
    assert {name for name in FIVE if before[name] != after[name]} == anew


@pytest.mark.parametrize("name, content, later_s, anew", [
    ("weights/imagebind_huge.pth", b"54321", 1, {"imagebind"}),
    ("weights/imagebind_huge.pth", b"12345", 1, set()),  # the same weights, downloaded again
    ("x.mp4", b"123456", 0, LOOK), ("x.mp4", b"12345", 1, LOOK),
    ("x.mp4", b"54321", 0, set()),  # nobody has looked
])  # fmt: skip
def test_weights_are_known_by_content_and_videos_by_size_and_time(
    name, content, later_s, anew, keys, tmp_path
):
    before, time_ns = keys(), (tmp_path / name).stat().st_mtime_ns + later_s * 10**9
    (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / name, ns=(time_ns, time_ns))
    after = keys()
    assert {scorer for scorer in FIVE if before[scorer] != after[scorer]} == anew


def test_weights_are_read_once_for_a_run(keys, monkeypatch):
    before = keys()
    monkeypatch.setattr(files, "digest", None)
    assert keys() == before


# Made whole, and anew


@pytest.fixture
def heard(spied):
    """The arguments of every batch that the toy's networks hear."""
    return spied(ToyScorer, "score")


def digests(heard):
    """Of the waves of every batch."""
    return [[files.digest_of(wave.tolist()) for wave in waves] for _, waves, *_ in heard]


@pytest.fixture
def blocks(run):
    """Two blocks of two clips each, of five audios, without any file yet."""
    samples, clips, found = inputs.read_samples(run), inputs.read_clips(run, "train"), []
    for number, part in enumerate((clips[:2], clips[2:4])):
        audios = []
        for clip in part:
            for audio in samples[clip.id]:
                audios.append(scoring.Audio(clip, audio.k, run / audio.wav, audio.digest))
        found.append(scoring.Block(f"b{number}", run / "scores", run / "videos", part, audios))
    return found


def score(run, blocks, here=ranks.Ranks()):  # noqa: B008, a constant
    scorers = common.scorers_of(run, "weights")
    scoring.score(blocks, scorers, ["toy"], 2.0, here, workers=0)
    return scorers


def values(run, blocks):
    return scoring.read_scores(blocks, common.scorers_of(run, "weights"), ["toy"])["toy"]


def bytes_of(run):
    return files_of(run, "scores/", "videos/")


def test_a_block_whose_key_differs_is_made_anew_as_a_whole_and_no_other(run, blocks, heard):
    score(run, blocks)
    assert [len(batch) for batch in digests(heard)] == [10, 10]
    before = bytes_of(run)
    score(run, blocks)
    assert len(heard) == 2 and bytes_of(run) == before
    other = blocks[1].audios[0]
    blocks[0].audios[3] = blocks[0].audios[3]._replace(path=other.path, digest=other.digest)
    score(run, blocks)
    _, second, third = digests(heard)
    assert len(third) == 10 and third[3] == second[0]
    after = bytes_of(run)
    assert {name for name in after if after[name] != before[name]} == {"scores/b0.toy.pt"}
    assert len(values(run, blocks)["ib"]) == 20


def test_a_block_that_is_made_again_has_the_same_bytes_whatever_lies_beside_it(run, blocks):
    score(run, blocks)
    before = bytes_of(run)
    remove(run, "scores/b1.toy.pt", "videos/b1.toy_video.pt")
    score(run, blocks)
    assert bytes_of(run) == before


def test_what_a_models_encoders_see_as_a_scorer_does_is_not_computed_again(
    run, blocks, monkeypatch, spied
):
    """Unless its file alone is missing; and it is seen anew with another video."""
    model, scorers = common.load_base_model(run), common.scorers_of(run, "weights")
    model.seen_as = {"toy": ("pooled", "segments", (2, 16))}
    monkeypatch.setattr(ToyScorer, "video_shapes", {"segments": (2, 16)})
    seen = lambda *_: {"segments": torch.full((2, 16), 7.0)}  # noqa: E731
    monkeypatch.setattr(ToyScorer, "embed_video", seen)
    loaded = spied(ToyScorer, "__init__")

    def sevens():
        """How many of the four clips the scorer has looked at itself, the others being equal."""
        scoring.embed_videos(blocks, scorers, ["toy"], 2.0, "cpu", 0, model)
        count = 0
        for block in blocks:
            key = scoring.features_key(model, block.clips)
            features = scoring.read_videos(block, key, "features", model.feature_shapes)
            key = scoring.video_key(scorers, "toy", block.clips)
            for clip, own in scoring.read_videos(block, key, "toy", ToyScorer.video_shapes).items():
                same = torch.equal(own["segments"].flatten(), features[clip]["pooled"])
                assert same or (own["segments"] == 7).all()
                count += not same
        return count

    assert sevens() == 0 and not loaded
    blocks[0].video_file("toy").unlink()
    assert sevens() == 2 and len(loaded) == 1
    os.utime(blocks[0].clips[0].path)
    assert sevens() == 0 and len(loaded) == 1


def test_a_block_of_another_key_is_never_read(run, blocks):
    score(run, blocks)
    shutil.copy(run / "scores/b0.toy.pt", run / "scores/b1.toy.pt")
    line = stopped(values, run, blocks)
    assert "b1.toy.pt: was made from other audio, videos or weights than there are now" in line


def test_a_clip_may_have_any_number_of_audios(run, blocks):
    del blocks[0].audios[1:5], blocks[1].audios[5:]
    score(run, blocks)
    found = values(run, blocks)
    assert len(found["ib"]) == len(found["pesq"]) == 1 + 5 + 5 and found["ib"].isfinite().all()


def test_other_weights_score_anew(run, finished, heard):
    whole = (run / "00_scorers.pt").read_bytes()
    state = files.load_pt(run / "00_scorers.pt")
    state["panns"]["head.bias"][0] += 3
    files.save_pt(run / "00_scorers.pt", state)
    call("03", run)
    assert [len(batch) for batch in digests(heard)] == [20 * 5]
    ours, theirs = (read(place / "03_scores" / "00000.jsonl") for place in (run, finished))
    assert [row["ib"] for row in ours] == [row["ib"] for row in theirs]
    assert all(a["is_nats"] != b["is_nats"] for a, b in zip(ours, theirs))
    (run / "00_scorers.pt").write_bytes(whole)
    call("03", run)
    assert len(heard) == 2 and files_of(run, "03_scores") == files_of(finished, "03_scores")


# Nothing twice


def test_no_stage_scores_an_audio_or_decodes_a_video_twice_and_no_later_run_of_it_again(
    run, heard, spied
):
    """Of a test clip, the model and the towers see one decode."""
    decoded = spied(media, "read_frames")
    remove(run, "02_scores", "03_scores", "07_clips", "07_scores", "07_audio")
    train = [clip.path for clip in inputs.read_clips(run, "train")]
    test = [clip.path for clip in inputs.read_clips(run, "test")]
    for number, flags, audios, videos in (
        ("02", ("--redo",), 100, train),
        ("03", ("--redo",), 100, train),
        ("06", ("--out", "again", "--steps", 2), None, []),
        ("07", (), 4 * 8, test),
        ("07", ("--systems", "base", "again"), 8, []),
    ):
        for again in (False, True):
            heard.clear()
            decoded.clear()
            call(number, run, "--workers", 0, *flags)
            assert sorted(x[0] for x in decoded) == ([] if again else sorted(videos)), number
            waves = [digest for batch in digests(heard) for digest in batch]
            if audios is not None:
                assert len(waves) == len(set(waves)) == (0 if again else audios), number


def test_the_same_audio_of_two_systems_has_the_same_scores(run, tmp_path):
    shutil.copytree(run / "07_audio" / "base", tmp_path / "twin")
    call("07", run, "--systems", "base", f"twin={tmp_path / 'twin'}")
    found = results(run)
    for _, metric in found:
        assert found["twin", metric]["value"] == found["base", metric]["value"]


def test_what_is_scored_needs_neither_audio_nor_video_nor_weights_again(run, finished):
    call("03", run)  # the weights have another place than in the run that this is a copy of
    shutil.rmtree(run / "01_audio")
    for file in (run / "00_scorers.pt", *(run / "00_videos").iterdir()):
        about = file.stat()
        file.write_bytes(bytes(about.st_size))
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    for number in ("02", "03"):
        call(number, run, "--redo")
    names = ("02_sco", "03_sco", "03_pairs")
    assert files_of(run, *names) == files_of(finished, *names)
    call("07", run, "--systems", "base")
    ours, theirs = results(run), results(finished)
    assert {("base", metric) for metric in ("ib", "clap", "is", "p_good")} <= ours.keys()
    assert all(row["value"] == theirs[key]["value"] for key, row in ours.items())


# Failures


def test_a_video_that_cannot_be_decoded_is_a_row_of_nan_until_there_is_another_file(
    run, blocks, capsys
):
    score(run, blocks)
    before = values(run, blocks)
    path = blocks[0].clips[0].path
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole) + 1))
    score(run, blocks)
    assert f"{blocks[0].clips[0].id}: unreadable video" in capsys.readouterr().err
    broken = values(run, blocks)
    for name in ("ib", "desync_s"):
        assert broken[name].isfinite().tolist() == [False] * 5 + [True] * 15
    assert torch.equal(broken["logits"], before["logits"])
    path.write_bytes(whole)
    score(run, blocks)
    after = values(run, blocks)
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


@pytest.mark.parametrize("reader", ["read_frames", "read_audio"])
def test_an_error_of_the_system_leaves_no_file_of_its_block(reader, run, blocks, monkeypatch):
    original, ill = getattr(media, reader), {blocks[1].clips[1].path, blocks[1].audios[7].path}

    def failing(path, *rest, **options):
        if path in ill:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(media, reader, failing)
        with pytest.raises(OSError):
            score(run, blocks)
    of_scores = {"read_frames": [], "read_audio": ["b0.toy.pt"]}[reader]
    assert sorted(path.name for path in run.glob("scores/*")) == of_scores
    assert not list(run.glob("videos/b1*")) or reader == "read_audio"
    score(run, blocks)
    assert values(run, blocks)["ib"].isfinite().all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_moved_away_for_a_moment_stops_the_stage_and_is_no_result(
    workers, run, finished, refused, monkeypatch
):
    shutil.rmtree(run / "03_scores")
    moved = inputs.read_clips(run, "train")[1].path
    original = media.read_frames

    def read_frames(path, *rest):
        if path != moved:
            return original(path, *rest)
        moved.rename(run / "moved.mp4")
        try:
            return original(path, *rest)
        finally:
            (run / "moved.mp4").rename(moved)

    with monkeypatch.context() as patch:
        patch.setattr(media, "read_frames", read_frames)
        line = refused("03", run, "--workers", workers)
    assert f"{moved}: gone" in line and "same command again" in line
    call("03", run)
    assert files_of(run, "03_scores", "03_pairs") == files_of(finished, "03_scores", "03_pairs")


def test_a_reference_of_pesq_that_is_gone_stops_the_stage_and_a_silent_film_has_none(
    finished, tmp_path
):
    scorer = common.scorers_of(finished, "weights").load("toy")
    clip = a_clip(tmp_path / "x.mp4", label="person speaking")
    assert "x.mp4: gone" in stopped(scorer.reference, clip)
    make_video(clip.path, sound=False)
    assert scorer.reference(clip) is None


def test_a_peak_is_known_until_the_file_changes_and_of_no_file_for_good(tmp_path, spied):
    path, clip, decoded = tmp_path / "x.wav", a_clip(), spied(media, "decode_audio")

    def peak():
        digest = files.digest(path) if path.exists() else "gone"
        audios = [scoring.Audio(clip, 0, path, digest)]
        block = scoring.Block("b", tmp_path / "scores", tmp_path, [clip], audios)
        scoring.find_peaks([block], 1.0)
        return scoring.read_peaks([block], 1.0).item()

    media.write_audio(path, torch.full((800,), 0.5), 8000)
    assert peak() == peak() == pytest.approx(0.5, abs=1e-4) and len(decoded) == 1
    media.write_audio(path, torch.full((900,), 0.25), 8000)
    assert peak() == pytest.approx(0.25, abs=1e-4) and len(decoded) == 2
    path.write_text("no sound")
    assert peak() != peak() and len(decoded) == 3  # nan
    path.unlink()
    assert "x.wav: gone" in stopped(peak)


# Ranks and workers


def test_bytes_do_not_depend_on_the_workers_and_an_error_of_one_is_the_clips_own_reason(fresh):
    broken = next(clip for clip in read(fresh / "clips.jsonl") if clip["split"] == "train")
    (fresh / "00_videos" / broken["video"]).write_bytes(bytes(1000))
    two = shutil.copytree(fresh, fresh.with_name("two"))
    for place, workers in ((fresh, 0), (two, 2)):
        call("01", place, "--sampling-steps", 2, "--num-samples", 2, "--workers", workers)
        call("02", place, "--num-rated-clips", 4, "--workers", workers)
        call("03", place, "--workers", workers)
        call("07", place, "--systems", "base", "--workers", workers)
    names = ["01_samples", "01_audio", "02_sc", "03_sc", "03_pairs"]
    names += ["07_clips", "07_audio", "07_scores", "07_results"]
    assert files_of(two, *names) == files_of(fresh, *names)
    assert all(files_of(two, name) for name in names)
    (skipped,) = read(two / "01_samples/00000.skipped.jsonl")
    assert skipped["clip"] == broken["id"] and skipped["reason"].startswith("unreadable video")


def test_a_worker_whose_process_was_killed_ends():
    code = "from common import ahead; import time; ahead.end_with(-1); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50).returncode == 1


def test_the_second_of_two_ranks_scores_its_blocks_alone(run, blocks):
    score(run, blocks, ranks.Ranks(1, 2))
    assert bytes_of(run).keys() == {"scores/b1.toy.pt", "videos/b1.toy_video.pt"}
