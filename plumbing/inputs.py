"""What stages read of a run folder: run.json, its clips, stage 01's audios, pairs.

What no stage would have written ends in one line that says which to run again. run: the folder, a
Path.
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
    """A line of stage 01 with its file."""

    file: str = ""  # 00012 or 00012.NAME, without suffix

    @property
    def shard(self):
        """That of its clip, where the features are."""
        return self.file.partition(".")[0]


def video_of(name):
    """The YouTube id of `<youtube id>_<start second, 6 digits>`, the name of a clip or, in any
    folder, of its video; any other name or path stands for itself."""
    youtube = re.fullmatch(r"(?:.*/)?([^/]{11})_\d{6}", name)
    return youtube[1] if youtube else name


def videos_of(clip_id, path):
    """What a clip's video is known by: its YouTube id, or the clip's id; its path without suffix,
    or that YouTube id."""
    name = str(path.with_suffix(""))
    return {video_of(clip_id), name, video_of(name)}


def read_run(run, row_type=rows.Run):
    """run.json of a run folder, completed by stage 01 unless row_type is rows.World."""
    if not run.is_dir():
        stop(f"--run-dir {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
    return rows.read_json(
        run / "run.json", row_type, "; run 01_generate.py (or 00_toy_world.py) first"
    )


def read_clips(run, split=None):
    """The lines of clips.jsonl, in order, with their files; of split `rate` (rows.TO_RATE), those
    of 01_to_rate.jsonl."""
    run_json = read_run(run)
    file = run / "clips.jsonl"
    if split == rows.TO_RATE:
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
    """The name in 01_samples, without suffix, of a source's part of a shard."""
    return shard if source == MODEL else f"{shard}.{source}"


def shards_of(run):
    """The names of the shards that the model's part is there of."""
    found = (run / "01_samples").glob("[0-9]*.jsonl")
    return sorted(file.stem for file in found if "." not in file.stem)


def shards_to_rate(run):
    """{name: its clips} of the shards of clips to rate."""
    clips = read_clips(run, rows.TO_RATE)
    shards = {}
    for start in range(0, len(clips), scoring.BLOCK_CLIPS):
        name = f"{rows.TO_RATE}_{start // scoring.BLOCK_CLIPS:05d}"
        shards[name] = clips[start : start + scoring.BLOCK_CLIPS]
    return shards


def numbers_of(run_json):
    """{source: the k of its audios} of train clips."""
    numbers = {MODEL: range(run_json.num_samples)}
    for place, source in enumerate(run_json.given, run_json.num_samples):
        numbers[source] = range(place, place + 1)
    return numbers


def numbers_to_rate(run_json):
    """{source: the k of its audios} of clips to rate."""
    numbers = {}
    for place, source in enumerate(run_json.given_to_rate):
        numbers[source] = range(place, place + 1)
    return numbers


def drawn(train, settings):
    """The train clips that stage 01 draws, in their order: at most --max-clips. settings: with seed
    and max_clips."""
    if len(train) <= settings.max_clips:
        return train
    places = random.Random(settings.seed).sample(range(len(train)), settings.max_clips)
    return [train[i] for i in sorted(places)]


def read_samples(run):
    """Every audio of stage 01 that may be mined: {clip: [FoundSample, ...]} in order of k.

    Every train clip that stage 01 drew must be there, with all audios of the model, or be skipped;
    of a given source, every one of these with its audio, or with the reason why it has none.
    """
    run_json = read_run(run)
    train = [clip.id for clip in rows.read(run / "clips.jsonl", rows.Clip) if clip.split == "train"]
    shards = shards_of(run)
    if not shards:
        stop(f"{run / '01_samples'}: no generated audio; run 01_generate.py --run-dir {run} first")
    wanted = drawn(train, run_json)
    samples = {clip: [] for clip in wanted}
    for source, numbers in numbers_of(run_json).items():
        skipped = read_source(run, shards, source, numbers, samples, wanted)
        if source == MODEL:  # of these no source has an audio
            wanted = [clip for clip in wanted if clip not in skipped]
    samples = {clip: audios for clip, audios in samples.items() if audios}
    if not samples:
        stop(f"{run / '01_samples'}: no audio; run 01_generate.py --run-dir {run} first")
    return samples


def read_to_rate(run):
    """The audios of clips to rate, as `read_samples`; {} where there are none."""
    shards = shards_to_rate(run)
    samples = {clip.id: [] for clips in shards.values() for clip in clips}
    for source, numbers in numbers_to_rate(read_run(run)).items():
        read_source(run, shards, source, numbers, samples, wanted=list(samples))
    return {clip: audios for clip, audios in samples.items() if audios}


def again(source):
    """The command that makes what is missing of a source."""
    if source == MODEL:
        return "01_generate.py"
    return (
        f"01_generate.py with --given {source}, or, to do without it, remove "
        f"01_samples/*.{source}.* and rerun 01_generate.py"
    )


def read_source(run, shards, source, numbers, samples, wanted):
    """Adds what a source's part of these shards holds to `samples`. Of every clip that is wanted it
    must hold audio, or why there is none; returns the clips of which it says so."""
    hint = f"; remove that shard and rerun {again(source)}"
    skipped = set()
    told = set()
    for shard in shards:
        file = run / "01_samples" / f"{shard_file(shard, source)}.jsonl"
        without = rows.read_if_there(file.with_suffix(".skipped.jsonl"), rows.SkippedClip, hint)
        found = rows.read_if_there(file, FoundSample, hint)
        add_samples(samples, found, file, source, numbers, hint)
        for row in without:
            skipped.add(row.clip)
        for sample in found:
            told.add(sample.clip)
    for clip in wanted:
        if numbers and clip not in told and clip not in skipped:
            stop(f"{run / '01_samples'}: clip {clip} is not there; rerun {again(source)}")
    return skipped


def add_samples(samples, found, file, source, numbers, hint):
    """Adds what a file holds, after checking that it is in order: its rows, and for each clip these
    numbers k."""
    counts = Counter(sample.clip for sample in found)
    for i, sample in enumerate(found):
        audios = samples.get(sample.clip, [])
        sample.file = file.stem
        wav = f"01_audio/{sample.clip}_{sample.k}.wav"
        nth = sum(audio.source == source for audio in audios)
        is_of_run = sample.clip in samples and sample.wav == wav and sample.source == source
        is_next = sample.row == i and nth < len(numbers) and sample.k == numbers[nth]
        is_whole = counts[sample.clip] == len(numbers)
        in_one_shard = all(audio.shard == sample.shard for audio in audios)
        if not (is_of_run and is_next and is_whole and in_one_shard):
            stop(
                f"{file}, line {i + 1}: not the next audio of a clip of this run, with its row, k, "
                f"source and wav{hint}"
            )
        audios.append(sample)


def audio_of(run, clip, sample):
    """A line of stage 01 as an audio to score."""
    is_own = sample.source == GROUND_TRUTH
    return scoring.Audio(clip, sample.k, run / sample.wav, sample.digest, is_own)


def find_sample(samples, clip, k):
    """The audio of a clip with this k, which is there."""
    return next(sample for sample in samples[clip] if sample.k == k)


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
        for sample in audios:
            blocks[shard].audios.append(audio_of(run, clip, sample))
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
