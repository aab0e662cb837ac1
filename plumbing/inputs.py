"""Reads what stages need of a run folder: run.json, its clips, stage 01's audios, pairs.

Where a file holds what no stage would have written, one line says which stage to run again. `run`
is always the folder, a Path.
"""

import random
import re
from collections import Counter
from pathlib import Path

from plumbing import files, rows, scoring
from plumbing.files import stop


class FoundClip(rows.Clip):
    """A line of clips.jsonl with its files."""

    path: Path  # of the video, checked to lie below the video root
    cavp: Path | None = None  # Frieren alone: its features, without suffix


class FoundSample(rows.Sample):
    """A line of 01_samples with the name of its file."""

    file: str = ""  # 00012 or 00012.NAME, without suffix

    @property
    def shard(self):
        """The shard of its clip, which holds the clip's features."""
        return self.file.partition(".")[0]


def video_of(name):
    """The YouTube id in a name `<youtube id>_<start second, 6 digits>`, of a clip or of a video in
    any folder; any other name or path is returned as it is."""
    youtube = re.fullmatch(r"(?:.*/)?([^/]{11})_\d{6}", name)
    return youtube[1] if youtube else name


def videos_of(clip_id, path):
    """All names that a clip's video is known by: the YouTube id in the clip's id, or that id; its
    path without suffix; and the YouTube id in that path."""
    name = str(path.with_suffix(""))
    return {video_of(clip_id), name, video_of(name)}


def read_run(run, row_type=rows.Run):
    """run.json of a run folder. It must be complete, as stage 01 leaves it, unless row_type is
    rows.World."""
    if not run.is_dir():
        stop(f"--run-dir {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
    return rows.read_json(
        run / "run.json", row_type, "; run 01_generate.py (or 00_toy_world.py) first"
    )


def read_clips(run, split=None):
    """The lines of clips.jsonl, in order, with their files; for the split `rate`, RATE_SPLIT, the
    lines of 01_to_rate.jsonl."""
    run_json = read_run(run)
    file = run / "clips.jsonl"
    if split == rows.RATE_SPLIT:
        file = run / "01_to_rate.jsonl"
        if not file.exists():
            return []
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


MODEL = "model"  # the source of audios that the model made
GROUND_TRUTH = "ground_truth"  # the source of the clips' own sound


def shard_file(shard, source):
    """The name, without suffix, of the file in 01_samples with a source's part of a shard."""
    return shard if source == MODEL else f"{shard}.{source}"


def shards_of(run):
    """The names of the shards whose part by the model exists."""
    found = (run / "01_samples").glob("[0-9]*.jsonl")
    return sorted(file.stem for file in found if "." not in file.stem)


def shards_to_rate(run):
    """The shards of clips of the split rate, {name: its clips}."""
    clips = read_clips(run, rows.RATE_SPLIT)
    shards = {}
    for start in range(0, len(clips), scoring.BLOCK_CLIPS):
        name = f"{rows.RATE_SPLIT}_{start // scoring.BLOCK_CLIPS:05d}"
        shards[name] = clips[start : start + scoring.BLOCK_CLIPS]
    return shards


def ks_of_sources(run_json):
    """{source: the k of its audios} for train clips."""
    ks = {MODEL: range(run_json.num_samples)}
    for place, source in enumerate(run_json.given, run_json.num_samples):
        ks[source] = range(place, place + 1)
    return ks


def ks_to_rate(run_json):
    """{source: the k of its audios} for clips of the split rate."""
    ks = {}
    for place, source in enumerate(run_json.given_to_rate):
        ks[source] = range(place, place + 1)
    return ks


def drawn(train, settings):
    """The train clips that stage 01 draws, at most --max-clips, in their order. settings: anything
    with the attributes seed and max_clips."""
    if len(train) <= settings.max_clips:
        return train
    places = random.Random(settings.seed).sample(range(len(train)), settings.max_clips)
    return [train[i] for i in sorted(places)]


def read_samples(run):
    """Every audio of stage 01 that may be mined: {clip: [FoundSample, ...]} in order of k.

    Every train clip that stage 01 drew must have all audios of the model, or be skipped. Every clip
    that is not skipped must also have the audio of each given source, or the reason why it has
    none.
    """
    run_json = read_run(run)
    train = [clip.id for clip in rows.read(run / "clips.jsonl", rows.Clip) if clip.split == "train"]
    shards = shards_of(run)
    if not shards:
        generate = f"01_generate.py {files.run_flag(run)}"
        stop(f"{run / '01_samples'}: no generated audio; run {generate} first")
    wanted = drawn(train, run_json)
    samples = {clip: [] for clip in wanted}
    for source, ks in ks_of_sources(run_json).items():
        skipped = read_source(run, shards, source, ks, samples, wanted)
        if source == MODEL:  # for a skipped clip no source has an audio
            wanted = [clip for clip in wanted if clip not in skipped]
    samples = {clip: audios for clip, audios in samples.items() if audios}
    if not samples:
        stop(f"{run / '01_samples'}: no audio; run 01_generate.py {files.run_flag(run)} first")
    return samples


def read_rate_split(run):
    """The audios of clips of the split rate, as of `read_samples`; {} where there are none."""
    shards = shards_to_rate(run)
    samples = {clip.id: [] for clips in shards.values() for clip in clips}
    for source, ks in ks_to_rate(read_run(run)).items():
        read_source(run, shards, source, ks, samples, wanted=list(samples))
    return {clip: audios for clip, audios in samples.items() if audios}


def again(source):
    """The command that makes the missing audios of a source."""
    if source == MODEL:
        return "01_generate.py"
    return (
        f"01_generate.py with --given {source}, or, to do without it, remove "
        f"01_samples/*.{source}.* and rerun 01_generate.py"
    )


def read_source(run, shards, source, ks, samples, wanted):
    """Adds a source's audios of these shards to `samples`. For every clip in `wanted` there must be
    audio, or a reason why there is none; returns the clips that have such a reason."""
    hint = f"; remove that shard and rerun {again(source)}"
    skipped = set()
    told = set()
    for shard in shards:
        file = run / "01_samples" / f"{shard_file(shard, source)}.jsonl"
        without = rows.read_if_there(file.with_suffix(".skipped.jsonl"), rows.SkippedClip, hint)
        found = rows.read_if_there(file, FoundSample, hint)
        add_samples(samples, found, file, source, ks, hint)
        for row in without:
            skipped.add(row.clip)
        for sample in found:
            told.add(sample.clip)
    for clip in wanted:
        if ks and clip not in told and clip not in skipped:
            stop(f"{run / '01_samples'}: clip {clip} is not there; rerun {again(source)}")
    return skipped


def add_samples(samples, found, file, source, ks, hint):
    """Adds a file's audios to `samples`, after checking them: the rows must be numbered in order,
    and each clip must have exactly these k."""
    counts = Counter(sample.clip for sample in found)
    for i, sample in enumerate(found):
        audios = samples.get(sample.clip, [])
        sample.file = file.stem
        wav = f"01_audio/{sample.clip}_{sample.k}.wav"
        nth = sum(audio.source == source for audio in audios)
        is_of_run = sample.clip in samples and sample.wav == wav and sample.source == source
        is_next = sample.row == i and nth < len(ks) and sample.k == ks[nth]
        is_whole = counts[sample.clip] == len(ks)
        in_one_shard = all(audio.shard == sample.shard for audio in audios)
        if not (is_of_run and is_next and is_whole and in_one_shard):
            stop(
                f"{file}, line {i + 1}: not the next audio of a clip of this run, with its row, k, "
                f"source and wav{hint}"
            )
        audios.append(sample)


def audio_of(run, clip, sample):
    """A line of 01_samples as an audio to score."""
    is_own = sample.source == GROUND_TRUTH
    return scoring.Audio(clip, sample.k, run / sample.wav, sample.digest, is_own)


def find_sample(samples, clip, k):
    """The audio of a clip with this k, which must exist."""
    return next(sample for sample in samples[clip] if sample.k == k)


def shard_blocks(run, samples, clips):
    """Stage 03's blocks of audios, one for each shard of stage 01."""
    clip_of = {clip.id: clip for clip in clips}
    folder = run / "03_scores"
    blocks = {}
    for clip_id, audios in samples.items():
        shard = audios[0].shard
        if shard not in blocks:
            blocks[shard] = scoring.Block(shard, folder, folder, clips=[], audios=[])
        clip = clip_of[clip_id]
        blocks[shard].clips.append(clip)
        for sample in audios:
            blocks[shard].audios.append(audio_of(run, clip, sample))
    return list(blocks.values())


def read_pairs(path, row_type, hint):
    """The pairs of a file; stops where a pair has two equal audios or occurs twice."""
    pairs = rows.read(path, row_type, hint)
    known = set()
    for line, pair in enumerate(pairs, 1):
        key = (pair.clip, *sorted((pair.winner, pair.loser)))
        if pair.winner == pair.loser or key in known:
            stop(f"{path}, line {line}: {key} is no pair, or stands here twice{hint}")
        known.add(key)
    return pairs
