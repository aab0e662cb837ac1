"""What stages read of a run folder: run.json, its clips, stage 01's audios, pairs.

What no stage would have written ends in one line that says which to run again. run: the folder, a
Path.
"""

import re
from pathlib import Path

from plumbing import files, rows, scoring
from plumbing.files import stop


class FoundClip(rows.Clip):
    """A line of clips.jsonl with its files."""

    path: Path  # of the video, checked to lie below the video root
    cavp: Path | None = None  # Frieren alone: its features, without suffix


class FoundSample(rows.Sample):
    """A line of stage 01 with its shard."""

    shard: str = ""


def video_of(name):
    """The YouTube id of `<youtube id>_<start second, 6 digits>`, the name of a clip or, in any
    folder, of its video; any other name or path stands for itself."""
    youtube = re.fullmatch(r"(?:.*/)?([^/]{11})_\d{6}", name)
    return youtube[1] if youtube else name


def read_run(run, row_type=rows.Run):
    """run.json of a run folder, completed by stage 01 unless row_type is rows.World."""
    if not run.is_dir():
        stop(f"--run-dir {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
    return rows.read_json(
        run / "run.json", row_type, "; run 01_generate.py (or 00_toy_world.py) first"
    )


def read_clips(run, split=None):
    """The lines of clips.jsonl, in order, with their files."""
    run_json = read_run(run)
    file = run / "clips.jsonl"
    root = run / run_json.video_root
    found = []
    ids = set()
    for line, clip in enumerate(rows.read(file, rows.Clip, "; rerun 01_generate.py"), 1):
        where = f"{file}, line {line}"
        if clip.id in ids:
            stop(f"{where}, field 'id': {clip.id} occurs twice; rerun 01_generate.py")
        ids.add(clip.id)
        if split is None or clip.split == split:
            path = files.inside(root, clip.video, f"{where}, field 'video'")
            cavp = None
            if run_json.cavp_root:
                cavp = files.inside(run_json.cavp_root, clip.id, f"{where}, field 'id'")
            found.append(FoundClip(**rows.as_dict(clip), path=path, cavp=cavp))
    return found


def read_samples(run):
    """Every audio of stage 01: {clip: [FoundSample, ...]} in order of k.

    Every train clip that stage 01 drew must be there, with all its audios, or be skipped.
    """
    run_json = read_run(run)
    train = {clip.id for clip in rows.read(run / "clips.jsonl", rows.Clip) if clip.split == "train"}
    hint = "; remove that shard and rerun 01_generate.py"
    samples = {}
    skipped = 0
    for file in sorted((run / "01_samples").glob("[0-9]*.jsonl")):
        if file.name.endswith(".skipped.jsonl"):
            skipped += len(rows.read(file, rows.SkippedClip, hint))
            continue
        shard = file.stem
        for i, sample in enumerate(rows.read(file, FoundSample, hint)):
            audios = samples.setdefault(sample.clip, [])
            wav = f"01_audio/{sample.clip}_{sample.k}.wav"
            is_of_run = sample.clip in train and sample.wav == wav
            is_next = sample.row == i and sample.k == len(audios)
            in_one_shard = all(audio.shard == shard for audio in audios)
            if not (is_of_run and is_next and in_one_shard):
                stop(
                    f"{file}, line {i + 1}: not the next audio of a train clip, with its row, k "
                    f"and wav{hint}"
                )
            sample.shard = shard
            audios.append(sample)
    if not samples:
        stop(f"{run / '01_samples'}: no generated audio; run 01_generate.py --run-dir {run} first")
    whole = all(len(audios) == run_json.num_samples for audios in samples.values())
    if not whole or len(samples) + skipped != min(len(train), run_json.max_clips):
        stop(
            f"{run / '01_samples'}: some of the {len(train)} train clips are not there; rerun "
            "01_generate.py"
        )
    return samples


def shard_blocks(run, samples, clips):
    """Stage 03's blocks of audios, one for each shard of stage 01."""
    clip_of = {clip.id: clip for clip in clips}
    folder = run / "03_scores"
    blocks = {}
    for clip_id, audios in samples.items():
        shard = audios[0].shard
        if shard not in blocks:
            blocks[shard] = scoring.Block(shard, scores=folder, videos=folder, clips=[], audios=[])
        clip = clip_of[clip_id]
        blocks[shard].clips.append(clip)
        for audio in audios:
            blocks[shard].audios.append(scoring.Audio(clip, audio.k, run / audio.wav, audio.digest))
    return list(blocks.values())


def read_pairs(path, row_type, hint):
    """Pairs of different audios, each once."""
    pairs = rows.read(path, row_type, hint)
    known = set()
    for line, pair in enumerate(pairs, 1):
        key = (pair.clip, *sorted((pair.winner, pair.loser)))
        if pair.winner == pair.loser or key in known:
            stop(f"{path}, line {line}: {key} is no pair, or stands here twice{hint}")
        known.add(key)
    return pairs
