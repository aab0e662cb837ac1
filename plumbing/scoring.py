"""What frozen scorers said, kept in blocks: one file for each block of audios and each scorer,
written whole.

A block is some clips with their audios, always the same ones: a shard of stage 01, 32 rated clips,
32 test clips of a system. Its file holds one scorer's tensors, row i = audio i, nan where a score
does not apply, and one `key`: a digest of all that the scores depend on. A file of another key is
made anew, never added to: a block is what is computed at once, so that a rerun gives the same bits.
What networks saw of a block's videos lies in files of the same kind, a row for each clip.

A video that cannot be decoded is a row of nan; its size and time are in the key, so that another
file is seen anew. A fault of the system (disk, rights, memory) stops the stage and leaves no file.
"""

import math
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from plumbing import files, media, ranks, rows
from plumbing.ahead import in_threads, read_ahead
from plumbing.files import NoAudio, NoFile, SkipClip, digest_of, stop

BLOCK_CLIPS = 32
FEATURES = "features"  # the name of a backbone's encoders among those who see a video
PEAK = "peak"  # the name of the one score that needs no network


class Audio(NamedTuple):
    """An audio to score."""

    clip: rows.Clip  # with its `path`
    k: int  # the k-th of its clip
    path: Path
    digest: str  # of that file


class Block(NamedTuple):
    """Audios that are scored together."""

    name: str  # the beginning of its files' names
    scores: Path  # the folder of what was said of the audios
    videos: Path  # the folder of what was seen of the clips
    clips: list  # of rows.Clip with `path`
    audios: list  # of Audio; a clip may have several or none

    def score_file(self, scorer):
        return self.scores / f"{self.name}.{scorer}.pt"

    def video_file(self, seer):
        return self.videos / f"{self.name}.{seer}_video.pt"


# --------------------------------------------------------------------------------------------------
# A file and its key
# --------------------------------------------------------------------------------------------------


def is_made(file, key):
    """Whether this file is there, made from what there is now. Reads no tensor."""
    return file.exists() and files.load_pt(file, {"key": str}, mmap=True)["key"] == key


def read_tensors(file, key, count):
    """{name: (count, ...) float32, memory-mapped} of a file that must be there."""
    tensors = files.load_pt(file, {"key": str}, mmap=True)
    if tensors.pop("key") != key:
        stop(
            f"{file}: of other audio, videos or weights than there are now; run the stage that "
            "writes it again"
        )
    for name, value in tensors.items():
        is_whole = torch.is_tensor(value) and value.is_floating_point() and not value.isinf().any()
        if not is_whole or value.shape[:1] != (count,):
            stop(f"{file}: '{name}' is damaged; remove it and run the stage again")
    return tensors


def stamp(path):
    """Size and time of a file that stage 01 found: enough to know it by, without opening it."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        files.gone(path)
    return f"{about.st_size}-{about.st_mtime_ns}"


def score_key(scorers, name, audios):
    """A digest of all that one scorer's scores of these audios depend on."""
    reads = scorers.classes[name].reads
    clips = {audio.clip.id: audio.clip for audio in audios}.values()
    parts = [name, scorers.digest(name), [(audio.clip.id, audio.digest) for audio in audios]]
    if "caption" in reads:
        parts.append([clip.caption for clip in clips])
    if "reference" in reads:
        parts.append([clip.label for clip in clips])
    if "video" in reads or "reference" in reads:
        parts.append([stamp(clip.path) for clip in clips])
    return digest_of(*parts)


def video_key(scorers, name, clips):
    """A digest of all that one scorer's embeddings of these clips' videos depend on."""
    return digest_of(name, scorers.digest(name), [stamp(clip.path) for clip in clips])


def features_key(model, clips):
    """A digest of all that a backbone's features of these clips depend on."""
    return digest_of(
        FEATURES, model.checkpoint_digest, [(clip.caption, model.stamp_of(clip)) for clip in clips]
    )


# --------------------------------------------------------------------------------------------------
# Videos
# --------------------------------------------------------------------------------------------------


def embed_videos(blocks, scorers, names, clip_s, device, workers, model=None, known=None):
    """Writes what is missing of what is seen of these blocks' videos: by the scorers among `names`
    that see, and, with a `model`, by its encoders. A video is decoded once, for all who lack it.

    known(clip), if given: {scorer: {part: tensor}}, what the model's encoders have seen of the clip
    already as a scorer would, {} of a clip that they have not seen.
    """
    seers = [name for name in names if "video" in scorers.classes[name].reads]
    todo = []
    for block in blocks:
        keys = {name: video_key(scorers, name, block.clips) for name in seers}
        if model is not None:
            keys[FEATURES] = features_key(model, block.clips)
        lacking = {
            name: key for name, key in keys.items() if not is_made(block.video_file(name), key)
        }
        if lacking and known is not None:
            take_known(block, lacking, known, scorers)
        if lacking:
            todo.append((block, lacking))
    asked = {name for _, lacking in todo for name in lacking}
    loaded = {name: scorers.load(name, device, workers) for name in seers if name in asked}
    rates = list(
        dict.fromkeys(scorer.frames for scorer in loaded.values())
    )  # two may want the same frames

    def read(clip):
        if FEATURES in asked:
            return model.read(clip, rates)
        return media.read_frames(clip.path, rates, clip_s)

    clips = [clip for block, _ in todo for clip in block.clips]
    bar = tqdm(
        total=len(clips), desc="videos", unit="video", disable=not clips or not ranks.is_first()
    )
    with bar, closing(read_ahead(read, clips, workers)) as videos:
        for block, lacking in todo:
            seen = {name: [] for name in lacking}
            for clip in block.clips:
                video = next(videos)
                bar.update()
                if isinstance(video, NoFile):
                    files.gone(clip.path)
                if isinstance(video, SkipClip):
                    tqdm.write(
                        f"{clip.id}: {video}; {', '.join(lacking)} cannot use it", file=sys.stderr
                    )
                    for name in lacking:
                        seen[name].append(None)
                    continue
                own = video[: len(video) - len(rates)]  # what the model's encoders need
                frames = dict(zip(rates, video[len(own) :]))
                for name in lacking:
                    if name == FEATURES:
                        seen[name].append(model.encode(clip, own))
                    else:
                        with torch.inference_mode():
                            seen[name].append(loaded[name].embed_video(frames[loaded[name].frames]))
            for name, key in lacking.items():
                shapes = model.feature_shapes if name == FEATURES else loaded[name].video_shapes
                files.save_pt(block.video_file(name), {"key": key, **stack(seen[name], shapes)})


def take_known(block, lacking, known, scorers):
    """Writes, and takes from `lacking` ({scorer: key}), what is known of all clips of a block."""
    found = [known(clip) for clip in block.clips]
    for name in list(lacking):
        if all(name in seen for seen in found):
            key = lacking.pop(name)
            tensors = stack([seen[name] for seen in found], scorers.classes[name].video_shapes)
            files.save_pt(block.video_file(name), {"key": key, **tensors})


def stack(seen, shapes):
    """A list of {part: tensor}, None for a video that cannot be used -> {part: (rows, ...)
    float32}, nan for None."""
    tensors = {}
    for part, shape in shapes.items():
        nothing = torch.full(shape, math.nan)
        tensors[part] = torch.stack(
            [nothing if row is None else row[part].float().cpu() for row in seen]
        )
    return tensors


def read_videos(block, key, seer, shapes):
    """{clip id: {part: tensor}} of a block whose videos were seen, memory-mapped. shapes: {part:
    shape}."""
    file = block.video_file(seer)
    tensors = read_tensors(file, key, len(block.clips))
    if {part: value.shape[1:] for part, value in tensors.items()} != shapes:
        stop(f"{file}: not what {seer} sees of a video; remove it and run the stage again")
    found = {}
    for row, clip in enumerate(block.clips):
        found[clip.id] = {part: value[row] for part, value in tensors.items()}
    return found


# --------------------------------------------------------------------------------------------------
# Audios
# --------------------------------------------------------------------------------------------------


def score(blocks, scorers, names, clip_s, here, workers, known=None):
    """Writes what these blocks lack of these scorers, divided over the ranks, one network in memory
    at a time. known: of `embed_videos`."""
    for name in names:
        scorers.digest(name)  # a file that is missing is said before any network works
    of_videos = {
        block.videos / block.name: block for block in blocks
    }  # systems share what is seen of the test clips
    mine = here.share(list(of_videos.values()))
    embed_videos(mine, scorers, names, clip_s, here.device, workers, known=known)
    ranks.barrier()
    for name in names:
        todo = []
        for block in here.share(blocks):
            key = score_key(scorers, name, block.audios)
            if not is_made(block.score_file(name), key):
                todo.append((block, key))
        if todo:
            score_by(name, todo, scorers, clip_s, here.device, workers)
    ranks.barrier()


def score_by(name, todo, scorers, clip_s, device, workers):
    """Writes the scores of one scorer. todo: [(block, its key), ...]."""
    scorer = scorers.load(name, device, workers)

    def read(item):
        block, _ = item
        return read_waves(block.audios, scorer.sample_rate_hz, clip_s)

    total = sum(len(block.audios) for block, _ in todo)
    with tqdm(total=total, desc=name, unit="audio", disable=not ranks.is_first()) as bar:
        for (block, key), waves in zip(todo, in_threads(read, todo, threads=2)):
            clips = [audio.clip for audio in block.audios]
            videos = None
            if "video" in scorer.reads:
                videos = read_videos(
                    block, video_key(scorers, name, block.clips), name, scorer.video_shapes
                )
            scores = score_waves(scorer, waves, clips, videos)
            files.save_pt(block.score_file(name), {"key": key, **scores})
            bar.update(len(clips))
    if device != "cpu":
        torch.cuda.empty_cache()


def score_waves(scorer, waves, clips, videos=None):
    """{name: (B, ...) float32 on the CPU}: one scorer's word on waves (B, S) at its sample rate.
    clips: the clip of each wave; videos: {clip id: {part: tensor}} of a scorer that sees."""
    seen = None
    if videos is not None:
        seen = {
            part: torch.stack([videos[clip.id][part] for clip in clips])
            for part in scorer.video_shapes
        }
    with torch.inference_mode():
        scores = scorer.score(waves, clips, seen)
    return {name: value.float().cpu() for name, value in scores.items()}


def read_waves(audios, sample_rate_hz, clip_s):
    """(B, S) float32, the first clip_s seconds of each audio."""
    waves = []
    for audio in audios:
        try:
            waves.append(media.read_audio(audio.path, sample_rate_hz, clip_s))
        except SkipClip as reason:
            stop(
                f"{audio.path}: {reason}; the audio of {audio.clip.id} cannot be judged, make or "
                "copy it again"
            )
    return torch.stack(waves)


def find_peaks(blocks, clip_s):
    """Writes the peak of every audio's first clip_s seconds, nan for one without a track that can
    be decoded to there: a damaged packet stops no evaluation."""
    todo = []
    for block in blocks:
        key = digest_of(PEAK, clip_s, [audio.digest for audio in block.audios])
        if not is_made(block.score_file(PEAK), key):
            todo.append((block, key))
    total = sum(len(block.audios) for block, _ in todo)
    bar = tqdm(total=total, desc=PEAK, unit="audio", disable=not todo or not ranks.is_first())
    with bar:
        for block, key in todo:
            peaks = list(in_threads(lambda audio: peak_of(audio, clip_s), block.audios, threads=4))
            files.save_pt(block.score_file(PEAK), {"key": key, PEAK: torch.tensor(peaks)})
            bar.update(len(peaks))


def peak_of(audio, clip_s):
    """Of full scale; nan where there is no sound to be read."""
    try:
        wave, _ = media.decode_audio(audio.path, clip_s)
    except NoAudio:  # a silent film
        return math.nan
    except NoFile:
        files.gone(audio.path)
    except SkipClip as reason:
        tqdm.write(f"{audio.path}: {reason}; no usable audio track", file=sys.stderr)
        return math.nan
    return wave.nan_to_num().abs().max().item()


def read_peaks(blocks, clip_s):
    """(n,) of all audios of the blocks, in order."""
    peaks = []
    for block in blocks:
        key = digest_of(PEAK, clip_s, [audio.digest for audio in block.audios])
        peaks.append(read_tensors(block.score_file(PEAK), key, len(block.audios))[PEAK])
    return torch.cat(peaks) if peaks else torch.zeros(0)


def read_scores(blocks, scorers, names):
    """{scorer: {name: (n, ...) float32}} of all audios of the blocks, in order."""
    said = {}
    for name in names:
        parts = []
        for block in blocks:
            key = score_key(scorers, name, block.audios)
            tensors = read_tensors(block.score_file(name), key, len(block.audios))
            lacking = scorers.tensors_of(name) - tensors.keys()
            if lacking:
                stop(
                    f"{block.score_file(name)}: lacks '{min(lacking)}'; remove it and run the "
                    "stage again"
                )
            parts.append(tensors)
        said[name] = (
            {column: torch.cat([part[column] for part in parts]) for column in parts[0]}
            if parts
            else {}
        )
    return said


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def digest_of_weights(run, paths):
    """Of a scorer's files. They are read once per run; <run>/weights.json remembers them by size
    and time."""
    memory = Path(run) / "weights.json"
    known = rows.read_json(memory, rows.Weights).files if memory.exists() else {}
    digests = []
    changed = False
    for path in paths:
        name = str(Path(path).resolve())
        now = stamp(path)
        if name not in known or known[name].stamp != now:
            known[name] = rows.WeightFile(stamp=now, digest=files.digest(path))
            changed = True
        digests.append(known[name].digest)
    if changed and ranks.is_first():
        rows.write_json(memory, rows.Weights(files=known))
    return digest_of(*digests)
