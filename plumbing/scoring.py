"""Stores what frozen scorers say in blocks: one file for each block of audios and each scorer,
written whole.

A block is a fixed group of clips with their audios: a shard of stage 01, 32 clips drawn for rating,
or 32 test clips of a system. Its file holds one scorer's tensors, where row i belongs to audio i
and nan means that a score does not apply; and one `key`, a digest of all that the scores depend on.
A file with another key is made anew as a whole: a block is always computed at once, so that a rerun
gives the same bits. The scorers' embeddings of a block's videos are stored in files of the same
kind, with a row for each clip.

A video that cannot be decoded gets a row of nan. Its size and time are part of the key, so that a
replaced file is decoded again. A fault of the system (disk, rights, memory) stops the stage and
leaves no file.
"""

import functools
import importlib
import math
import os
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from plumbing import downloads, files, media, ranks, rows
from plumbing.ahead import in_threads, read_ahead
from plumbing.files import NoAudio, NoFile, SkipClip, digest_of, stop

BLOCK_CLIPS = 32
FEATURES = "features"  # stands for a backbone's encoders among the names of scorers
PEAK = "peak"  # stands for the one measure that needs no network among the names of scorers


class Audio(NamedTuple):
    """An audio to score."""

    clip: rows.Clip  # with its `path`
    k: int  # its number among the clip's audios
    path: Path
    digest: str  # of that file
    is_own: bool = False  # whether it is the clip's own sound, with which scorers compare


class Block(NamedTuple):
    """Audios that are scored together."""

    name: str  # the beginning of its files' names
    scores_folder: Path  # for the scores of the audios
    videos_folder: Path  # for the embeddings of the clips' videos
    clips: list  # of rows.Clip with `path`
    audios: list  # of Audio; a clip may have several or none

    def score_file(self, scorer):
        return self.scores_folder / f"{self.name}.{scorer}.pt"

    def video_file(self, seer):
        return self.videos_folder / f"{self.name}.{seer}_video.pt"


class ScorerSet:
    """The frozen scorers of a run, by name; each is loaded when it is asked for."""

    def __init__(self, run, modules, root):
        """modules: names of the modules that hold the scorers; root: the folder of their files."""
        self.run = Path(run)
        self.root = Path(root)
        self.classes = {}  # {scorer: class}
        self.audioscore_tensors = {}  # {what AudioScore needs: (scorer, tensor)}
        # {metric of 07: (how, scorer, tensor)}, such as {"fd_passt": ("fd", "passt", "embedding")}
        self.measures = {}
        self.judges = ()  # scorers that stage 07 asks only when told to
        self.digests = {}  # {scorer: digest of its files}
        for name in modules:
            module = importlib.import_module(name)
            self.classes |= module.SCORERS
            self.measures |= module.MEASURES
            self.judges += getattr(module, "JUDGES", ())
            self.audioscore_tensors |= getattr(module, "AUDIOSCORE", {})
        self.of_audioscore = []  # the names of the scorers that AudioScore needs
        for scorer, _ in self.audioscore_tensors.values():
            if scorer not in self.of_audioscore:
                self.of_audioscore.append(scorer)

    def load(self, name, device="cpu", workers=0):
        scorer = self.classes[name](self.root, device)
        scorer.workers = workers
        return scorer

    def digest(self, name):
        """The digest of a scorer's files."""
        if name not in self.digests:
            paths = [downloads.weight_file(self.root, file) for file in self.classes[name].files]
            self.digests[name] = digest_of_weights(self.run, paths)
        return self.digests[name]

    def tensors_of(self, name):
        """The names of a scorer's tensors that AudioScore and the metrics need."""
        wanted = list(self.audioscore_tensors.values())
        for _, scorer, tensor in self.measures.values():
            wanted.append((scorer, tensor))
        return {tensor for scorer, tensor in wanted if scorer == name}

    def audioscore_inputs(self, by_scorer):
        """Picks what AudioScore needs from all that the scorers measured: {scorer: {tensor:
        values}} -> {ib, clap, desync_s, tag_logits, pesq: values}."""
        measured = {}
        for name, (scorer, tensor) in self.audioscore_tensors.items():
            measured[name] = by_scorer[scorer][tensor]
        return measured


# --------------------------------------------------------------------------------------------------
# A file and its key
# --------------------------------------------------------------------------------------------------


def is_made(file, key):
    """Whether this file exists and was made from what there is now. Reads no tensor."""
    return file.exists() and files.load_pt(file, {"key": str}, mmap=True)["key"] == key


def read_tensors(file, key, count):
    """{name: (count, ...) float32, memory-mapped} from a file that must exist and have this key."""
    tensors = files.load_pt(file, {"key": str}, mmap=True)
    if tensors.pop("key") != key:
        stop(
            f"{file}: was made from other audio, videos or weights than there are now; run the "
            "stage that writes it again"
        )
    for name, value in tensors.items():
        is_whole = torch.is_tensor(value) and value.is_floating_point() and not value.isinf().any()
        if not is_whole or value.shape[:1] != (count,):
            stop(f"{file}: '{name}' is damaged; remove it and run the stage again")
    return tensors


def stamp(path):
    """The size and time of a file, which identify its content without opening it. Stops where a
    file that was found before is gone."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        files.gone(path)
    return f"{about.st_size}-{about.st_mtime_ns}"


def score_key(scorers, name, audios):
    """A digest of all that one scorer's scores of these audios depend on. It leaves out the length
    of clips, which is the same throughout a run."""
    reads = scorers.classes[name].reads
    clips = {audio.clip.id: audio.clip for audio in audios}.values()
    parts = [name, scorers.digest(name), [(audio.clip.id, audio.digest) for audio in audios]]
    if "caption" in reads:
        parts.append([clip.caption for clip in clips])
    if "reference" in reads:
        parts.append([clip.label for clip in clips])
    if "video" in reads or "reference" in reads:
        parts.append([stamp(clip.path) for clip in clips])
    own = [audio.is_own for audio in audios]
    if "reference" in reads and any(own):
        parts.append(own)
    return digest_of(*parts)


def video_key(scorers, name, clips):
    """A digest of all that one scorer's embeddings of these clips' videos depend on."""
    return digest_of(name, scorers.digest(name), [stamp(clip.path) for clip in clips])


def features_key(model, clips):
    """A digest of all that a backbone's features of these clips depend on."""
    about = [(clip.caption, model.stamp_of(clip)) for clip in clips]
    return digest_of(FEATURES, model.checkpoint_digest, about)


def peak_key(block, clip_s):
    """A digest of all that the peaks of a block's audios depend on."""
    return digest_of(PEAK, clip_s, [audio.digest for audio in block.audios])


# --------------------------------------------------------------------------------------------------
# Videos
# --------------------------------------------------------------------------------------------------


def embed_videos(blocks, scorers, names, clip_s, device, workers, model=None):
    """Writes the missing embeddings of these blocks' videos: those of the scorers among `names`
    that read videos, and, with a `model`, its features. Each video is decoded once for all of them.
    A feature that equals a scorer's embedding (`seen_as`) is not computed twice."""
    names = [name for name in names if "video" in scorers.classes[name].reads]
    todo = []  # [(block, {name whose embeddings of its videos are missing: the key})]
    asked = set()
    for block in blocks:
        lacking = {name: video_key(scorers, name, block.clips) for name in names}
        if model is not None:
            lacking[FEATURES] = features_key(model, block.clips)
        for name, key in list(lacking.items()):
            if is_made(block.video_file(name), key):
                del lacking[name]
        if lacking:
            todo.append((block, lacking))
            known = model.seen_as if FEATURES in lacking else ()
            asked.update(name for name in lacking if name not in known)
    loaded = {}
    wanted = []
    for name in names:
        if name in asked:
            loaded[name] = scorers.load(name, device, workers)
            wanted.append(loaded[name].frames)

    def read(clip):
        if FEATURES in asked:
            return model.read(clip, wanted)
        return media.read_frames(clip.path, wanted, clip_s)

    clips = []
    for block, _ in todo:
        clips += block.clips
    hidden = not clips or not ranks.is_first()
    bar = tqdm(total=len(clips), desc="videos", unit="video", disable=hidden)
    with bar, closing(read_ahead(read, clips, workers)) as videos:
        for block, lacking in todo:
            seen = []
            for clip in block.clips:
                seen.append(see(clip, next(videos), loaded, model, lacking))
                bar.update()
            for name, key in lacking.items():
                is_model = name == FEATURES
                shapes = model.feature_shapes if is_model else scorers.classes[name].video_shapes
                tensors = stack(seen, name, shapes)
                files.save_pt(block.video_file(name), {"key": key, **tensors})


def see(clip, video, loaded, model, names):
    """{name: {part: tensor}}: embeddings of a clip's video by these scorers and encoders; {} where
    the video cannot be used. video: the tensors that the model's encoders need, then the frames for
    each of the `loaded` scorers; or the SkipClip that says why the video cannot be used."""
    if isinstance(video, NoFile):
        files.gone(clip.path)
    if isinstance(video, SkipClip):
        tqdm.write(f"{clip.id}: {video}; {', '.join(names)} cannot use it", file=sys.stderr)
        return {}
    of_model = len(video) - len(loaded)
    frames = dict(zip(loaded, video[of_model:]))
    seen = {}
    if FEATURES in names:
        seen = encode(clip, video[:of_model], model)
    for name in names:
        if name not in seen:
            with torch.inference_mode():
                seen[name] = loaded[name].embed_video(frames[name])
    return seen


def encode(clip, tensors, model):
    """{name: {part: tensor}}: a model's features of a clip, and those of them that equal a scorer's
    embeddings, under the scorer's name."""
    features = model.encode(clip, tensors)
    seen = {FEATURES: features}
    for name, (feature, part, shape) in model.seen_as.items():
        seen[name] = {part: features[feature].view(shape)}
    return seen


def stack(seen, name, shapes):
    """{part: (clips, ...) float32}: one scorer's embeddings or a model's features, nan for a video
    that cannot be used. seen: what `see` returned for each clip."""
    tensors = {}
    for part, shape in shapes.items():
        of_clips = []
        for parts in seen:
            value = parts[name][part] if name in parts else torch.full(shape, math.nan)
            of_clips.append(value.float().cpu())
        tensors[part] = torch.stack(of_clips)
    return tensors


def read_videos(block, key, seer, shapes):
    """{clip id: {part: tensor}}: the stored embeddings of a block's videos, memory-mapped. seer:
    the scorer's name, or FEATURES; shapes: {part: shape}."""
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


def score(blocks, scorers, names, clip_s, here, workers):
    """Writes the scores that these blocks lack, divided over the ranks. The scorers that read
    videos are loaded together to embed the videos; then all score the audios, one scorer at a
    time."""
    for name in names:
        scorers.digest(name)  # reports a missing file before any network works
    # Systems share the embeddings of the test clips: one block is taken for each of their files.
    by_file = {block.videos_folder / block.name: block for block in blocks}
    embed_videos(here.share(list(by_file.values())), scorers, names, clip_s, here.device, workers)
    ranks.barrier()
    for name in names:
        todo = []
        for block in here.share(blocks):
            key = score_key(scorers, name, block.audios)
            if not is_made(block.score_file(name), key):
                todo.append((block, key))
        if todo:
            score_by(name, todo, scorers, clip_s, here.device, workers)
            if here.device != "cpu":
                torch.cuda.empty_cache()
    ranks.barrier()


def score_by(name, todo, scorers, clip_s, device, workers):
    """Writes the scores by one scorer. todo: [(block, its key), ...]."""
    scorer = scorers.load(name, device, workers)

    def read(item):
        block, _ = item
        return read_waves(block.audios, scorer.sample_rate_hz, clip_s)

    total = sum(len(block.audios) for block, _ in todo)
    with tqdm(total=total, desc=name, unit="audio", disable=not ranks.is_first()) as bar:
        for (block, key), waves in zip(todo, in_threads(read, todo, threads=2)):
            videos = None
            if "video" in scorer.reads:
                seen_with = video_key(scorers, name, block.clips)
                videos = read_videos(block, seen_with, name, scorer.video_shapes)
            clips = [audio.clip for audio in block.audios]
            scores = score_waves(scorer, waves, clips, videos)
            own = torch.tensor([audio.is_own for audio in block.audios])
            for tensor in scorer.compared:
                scores[tensor] = scores[tensor].masked_fill(own, math.nan)
            files.save_pt(block.score_file(name), {"key": key, **scores})
            bar.update(len(clips))


def score_waves(scorer, waves, clips, videos=None):
    """{name: (B, ...) float32 on the CPU}: one scorer's scores of waves (B, S) at its sample rate.
    clips: the clip of each wave; videos: {clip id: {part: tensor}}, if the scorer reads videos."""
    seen = None
    if videos is not None:
        seen = {}
        for part in scorer.video_shapes:
            seen[part] = torch.stack([videos[clip.id][part] for clip in clips])
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
                f"{audio.path}: {reason}; the audio of {audio.clip.id} cannot be scored, make or "
                "copy it again"
            )
    return torch.stack(waves)


def find_peaks(blocks, clip_s):
    """Writes the peak of every audio's first clip_s seconds, nan where these cannot be decoded, so
    that a damaged file does not stop the evaluation."""
    todo = []
    for block in blocks:
        if not is_made(block.score_file(PEAK), peak_key(block, clip_s)):
            todo.append(block)
    total = sum(len(block.audios) for block in todo)
    hidden = not todo or not ranks.is_first()
    with tqdm(total=total, desc=PEAK, unit="audio", disable=hidden) as bar:
        for block in todo:
            peak = functools.partial(peak_of, clip_s=clip_s)
            peaks = list(in_threads(peak, block.audios, threads=4))
            tensors = {"key": peak_key(block, clip_s), PEAK: torch.tensor(peaks)}
            files.save_pt(block.score_file(PEAK), tensors)
            bar.update(len(peaks))


def peak_of(audio, clip_s):
    """An audio's peak, 1 at full scale; nan where no sound can be read."""
    try:
        wave, _ = media.decode_audio(audio.path, clip_s)
    except NoAudio:
        return math.nan
    except NoFile:
        files.gone(audio.path)
    except SkipClip as reason:
        tqdm.write(f"{audio.path}: {reason}; no usable audio track", file=sys.stderr)
        return math.nan
    return wave.nan_to_num().abs().max().item()


def read_peaks(blocks, clip_s):
    """The peaks (n,) of all audios of the blocks, in order."""
    peaks = []
    for block in blocks:
        file = block.score_file(PEAK)
        peaks.append(read_tensors(file, peak_key(block, clip_s), len(block.audios))[PEAK])
    return torch.cat(peaks)


def read_scores(blocks, scorers, names):
    """{scorer: {tensor: (n, ...) float32}} of all audios of the blocks, in order: those tensors of
    these scorers that AudioScore and the metrics need."""
    by_scorer = {}
    for name in names:
        parts = defaultdict(list)
        for block in blocks:
            file = block.score_file(name)
            tensors = read_tensors(file, score_key(scorers, name, block.audios), len(block.audios))
            for tensor in scorers.tensors_of(name):
                if tensor not in tensors:
                    stop(f"{file}: lacks '{tensor}'; remove it and run the stage again")
                parts[tensor].append(tensors[tensor])
        by_scorer[name] = {tensor: torch.cat(values) for tensor, values in parts.items()}
    return by_scorer


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def digest_of_weights(run, paths):
    """The digest of a scorer's files. Each is read once per run; <run>/weights.json keeps its
    digest with its size and time."""
    memory = Path(run) / "weights.json"
    known = rows.read_json(memory, rows.Weights).files if memory.exists() else {}
    digests = []
    before = dict(known)
    for path in paths:
        name = str(Path(path).resolve())
        now = stamp(path)
        if name not in known or known[name].stamp != now:
            known[name] = rows.WeightFile(stamp=now, digest=files.digest(path))
        digests.append(known[name].digest)
    if known != before and ranks.is_first():
        rows.write_json(memory, rows.Weights(files=known))
    return digest_of(*digests)
