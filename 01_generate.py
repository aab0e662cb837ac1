"""Stage 01: N audios for every training clip, from the model that will be aligned (Sec. 2.2).

Run:
    python 01_generate.py                                   # the toy world of stage 00
    python 01_generate.py --run-dir runs/vgg --model mmaudio:large_44k --clips vggsound.csv \\
        --videos DIR --test-list MMAudio/sets/vgg-test.tsv  # the paper's
    torchrun --standalone --nproc_per_node 8 01_generate.py ...  # shards are divided over the GPUs
    python 01_generate.py ... --given ground_truth rival=DIR  # more candidates, also later
    python 01_generate.py ... --max-clips 0                 # no train clips: prepares a run for 07

The paper's part is `generate`, `sample_shards`, and the draw of clips (inputs.drawn). The rest
reads lists of clips, and takes in what the paper has not: audio that the model did not make
(--given), and the split rate, clips of which a run has nothing but given audio for people to rate
(docs/people.md).

Reads:
    clips        the toy's clips.jsonl; or a .jsonl (id, and if known video, caption, label, split);
                 VGGSound's csv (youtube id, start second, label, split; no header); MMAudio's tsv
                 (header id, label; its split is the last word of the file's name, as in
                 vgg-test.tsv, else train); or all videos of a folder, for training. The splits are
                 train, val, test and rate
    videos       below --videos, named by `video` or `<id>.mp4` (.mkv, .webm, .mov, .avi)
    --given      folders of audio that the model did not make, `<id>.wav` (.flac, .mp3, .ogg, .m4a,
                 .mp4, .opus); ground_truth: the clips' own sound (docs/candidates.md)
Writes:
    run.json                    model, checkpoint and its digest, latent shape, sampler, N, seed,
                                video root; given, given_to_rate: the names under --given that have
                                audio of train clips, and of clips of the split rate
    clips.jsonl                 id, video, caption or null, label or null, split
    01_settings.json            what the run was made with; another command must agree with it
    01_missing.jsonl            clips whose video does not exist: id, split, reason
    01_to_rate.jsonl            the clips of the split rate, with the fields of clips.jsonl; they
                                may be added to a finished run
    01_samples/00012.jsonl      one line per audio: clip, k, seed, wav, row (of the latents), digest
                                of the wav, finite, peak (of full scale), clipped (share of samples
                                at full scale), source (model)
    01_samples/00012.pt         latents (rows, T, C) float32 normalised; features: dict of
                                (clips, ...) float32; clips: their ids; digests: the rows' digests
                                from the .jsonl, which bind the two files; crc32: {name: a checksum
                                for each row} of latents and features, compared at every reading
    01_samples/00012.skipped.jsonl   clips of the shard that could not be used: clip, reason
    01_samples/00012.NAME.*     the same for the audios that were given as NAME, with latents but
                                without features; k is N plus the place of NAME in given
    01_samples/rate_00000.NAME.jsonl   the same for clips of the split rate, without latents; k is
                                the place of NAME in given_to_rate
    01_audio/<clip>_<k>.wav     the audio that people hear and scorers score
Takes: toy 48 s on 2 cores; MMAudio-L needs 26 TFLOP per audio (25 steps, guidance), 250K audios in
all.
"""

import functools
import os
import re
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import (
    NoFile,
    SkipClip,
    ahead,
    command,
    files,
    inputs,
    media,
    ranks,
    record,
    rows,
    run_flag,
    scoring,
    stop,
    training,
)

SHARD_CLIPS = 32
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".MKV", ".webm", ".WEBM", ".mov", ".MOV", ".avi", ".AVI")
ADVICE = "use another --run-dir, or remove this one"
NO_FILE = "no such file"  # why a clip has no audio of a source


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    flag = parser.io.add_argument
    described = "for a new run: toy, mmaudio:small_16k ... mmaudio:large_44k, or frieren"
    flag("--model", help=described)
    described = "weights of the velocity network; without it, upstream's file below --weights"
    flag("--checkpoint", help=described)
    flag("--weights", default="weights", help="folder of the downloaded weights")
    described = ".jsonl, VGGSound's .csv or MMAudio's .tsv; without it, every video of --videos"
    flag("--clips", help=described)
    flag("--test-list", help="MMAudio's sets/vgg-test.tsv: the test split is exactly these clips")
    flag("--videos", help="folder of videos")
    flag("--cavp", help="Frieren only: folder of CAVP features, <id>.npz or <id>.npy")
    described = "stop where a video is missing or cannot be used, instead of leaving it out"
    flag("--strict", action="store_true", help=described)
    described = "only check the list, its videos and the weights that all stages need, then end"
    flag("--dry-run", action="store_true", help=described)
    described = "candidates that the model did not make: ground_truth (the clips' own sound), or "
    described += "NAME=DIR (a folder of audio)"
    flag("--given", nargs="+", action="extend", default=[], metavar="NAME", help=described)
    flag = parser.paper.add_argument
    described = "train clips at most, drawn at random; 0 only prepares the run for 07 [Sec. 2.2]"
    flag("--max-clips", type=command.whole(0), default=50_000, help=described)
    described = "N, audios that the model makes of each clip [Sec. 3.1]"
    flag("--num-samples", type=command.whole(0), default=5, help=described)
    flag("--guidance", type=command.number(0), default=4.5, help="scale gamma [Sec. 3.1]")
    described = "Euler steps of one audio; paper silent, upstream's number"
    flag("--sampling-steps", type=command.whole(1), default=25, help=described)
    flag = parser.engineering.add_argument
    described = "clips sampled together; 0: the model's own number, 16 for Frieren, else 4"
    flag("--batch-clips", type=command.whole(0), default=0, help=described)
    described = "seed of the draw of clips and of all noise"
    flag("--seed", type=command.whole(0), default=0, help=described)
    command.compile_flag(parser)
    command.workers_flag(parser)
    command.part_flag(parser)
    return command.parse(parser, argv, "01")


# --------------------------------------------------------------------------------------------------
# Audios out
# --------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """A shard that is being made: of the model's audios, or of those of one given source."""

    name: str
    clips: list  # those that can be used
    features: dict  # {clip id: its features}; {} for a given source
    skipped: list  # rows.SkippedClip
    samples: list  # rows.Sample of the audios made so far
    latents: list  # of tensors (n, T, C): a clip's N, or those of all clips of a given source


def encode_all(model, clips, workers):
    """A generator of each clip's features, or of the SkipClip that says why it has none. Worker
    processes decode video ahead."""
    with closing(ahead.read_ahead(model.read, clips, workers)) as videos:
        for clip, tensors in zip(clips, videos):
            yield tensors if isinstance(tensors, SkipClip) else model.encode(clip, tensors)


def generate(run, model, shards, todo, here, args):
    """Makes the audios of the shards in `todo`, names of `shards`, {name: clips}. Each of these
    takes from the one before, and all work at the same time:

        worker processes decode videos  ->  a thread encodes them, up to a shard ahead
        ->  this thread samples latents, a batch at a time  ->  a thread decodes them to waves
    """
    clips = []
    for name in todo:
        clips += shards[name]
    if clips:
        # So that a missing codec is reported now, not after the first shard.
        model.decode(torch.zeros(1, *model.latent_shape))
    with closing(encode_all(model, clips, args.workers)) as encoder:
        # One step of `encoder` for each clip, taken in a thread: it is the thread that waits for
        # videos, while the main thread samples.
        encoded = ahead.in_threads(
            lambda _: next(encoder), clips, threads=1, in_advance=SHARD_CLIPS
        )
        bar = tqdm(total=len(todo), unit="shard", disable=not here.first)
        with closing(encoded), bar:
            sample_shards(run, model, shards, todo, encoded, bar, args)


def sample_shards(run, model, shards, todo, encoded, bar, args):
    """Samples the audios of the shards, a batch of clips at a time, and writes a shard once its
    last clip has its audios. encoded: an iterator of what `encode_all` yields. `batches` is a
    batch or two ahead of the loop below, which gets the clips in the same order."""
    at_work = {}  # {clip id: its shard, the seeds of its audios} of the clips being sampled

    def batches():
        """Each batch is of clips of one shard, so that audios never depend on which shards were
        left to do."""
        size = args.batch_clips or model.batch_clips
        for name in todo:
            shard = gather(name, shards[name], encoded, args)
            # With --num-samples 0 all candidates are given; what is left to make are features.
            if not shard.clips or args.num_samples == 0:
                shard.latents.append(torch.empty(0, *model.latent_shape))
                write_shard(run, shard)
                bar.update()
                continue
            to_sample = []
            for clip in shard.clips:
                seeds = [common.seed_of(args.seed, clip.id, k) for k in range(args.num_samples)]
                at_work[clip.id] = shard, seeds
                to_sample.append((clip, shard.features[clip.id], seeds))
            for start in range(0, len(to_sample), size):
                yield to_sample[start : start + size]

    sampler = rows.Sampler(steps=args.sampling_steps, guidance=args.guidance)
    for clip, latents, waves in common.sample_clips(model, batches(), sampler):
        shard, seeds = at_work.pop(clip.id)
        for k, seed in enumerate(seeds):
            wav = f"01_audio/{clip.id}_{k}.wav"
            written = media.write_audio(run / wav, waves[k], model.sample_rate_hz)
            written["finite"] = written["finite"] and bool(latents[k].isfinite().all())
            row = len(shard.samples)
            about = {"clip": clip.id, "k": k, "seed": seed, "wav": wav, "row": row}
            shard.samples.append(rows.Sample(**about, **written))
        shard.latents.append(latents)
        if clip is shard.clips[-1]:
            write_shard(run, shard)
            bar.update()


def begin_shard(name, clips, values):
    """A Shard of these clips, and {clip id: its value} of those that can be used. values: an
    iterator with an item for each clip, its features or its wave; or the SkipClip that says why the
    clip cannot be used."""
    shard = Shard(name, clips=[], features={}, skipped=[], samples=[], latents=[])
    usable = {}
    for clip in clips:
        value = next(values)
        if isinstance(value, SkipClip):
            shard.skipped.append(rows.SkippedClip(clip=clip.id, reason=str(value)))
        else:
            shard.clips.append(clip)
            usable[clip.id] = value
    return shard, usable


def gather(name, clips, encoded, args):
    """A shard of these clips, with the features of those that can be used."""
    shard, features = begin_shard(name, clips, encoded)
    shard.features = features
    if shard.skipped and args.strict:
        first = ", ".join(f"{row.clip} ({row.reason})" for row in shard.skipped[:10])
        more = " ..." if len(shard.skipped) > 10 else ""
        stop(f"--strict: {len(shard.skipped)} clips of shard {name} cannot be used: {first}{more}")
    return shard


def write_shard(run, shard):
    """The .jsonl is written last, so that a shard that has one is whole. A shard without a usable
    clip has no .pt, as those of the split rate, whose audios have no latents."""
    folder = run / "01_samples"
    if shard.clips and shard.latents:
        features = {}
        if shard.features:
            features = common.stack_features(list(shard.features.values()), "cpu")
        digests = [sample.digest for sample in shard.samples]
        latents = torch.cat(shard.latents)
        file = folder / f"{shard.name}.pt"
        training.save_shard(file, latents, digests, features, clips=list(shard.features))
    unused = folder / f"{shard.name}.skipped.jsonl"
    if shard.skipped or unused.exists():  # an earlier, damaged shard may have left one
        rows.write(unused, shard.skipped)
    rows.write(folder / f"{shard.name}.jsonl", shard.samples)


def is_whole(run, name, clips, ks, wavs):
    """Whether every clip of a shard is either skipped or has exactly the audios with these k, and
    their wavs and latents are there. name: 00012 of the model's audios; 00012.NAME of given ones,
    which has no features; rate_00012.NAME of clips to rate, which has no latents either. wavs: the
    names of the run's wavs."""
    file = run / "01_samples" / f"{name}.jsonl"
    if not file.exists():
        return False
    samples = rows.read(file, rows.Sample)
    skipped = {row.clip for row in read_skipped(run, name)}
    used = [clip.id for clip in clips if clip.id not in skipped]
    expected = [(clip, k) for clip in used for k in ks]
    if [(sample.clip, sample.k) for sample in samples] != expected:
        return False
    if not wavs.issuperset(Path(sample.wav).name for sample in samples):
        return False
    has_latents = not name.startswith(rows.RATE_SPLIT)
    if not has_latents or not used:
        return True
    is_given = "." in name
    of_features = [] if is_given else used
    digests = [sample.digest for sample in samples]
    return rows_of(file.with_suffix(".pt")) == (of_features, digests)


def read_skipped(run, name):
    return rows.read_if_there(run / "01_samples" / f"{name}.skipped.jsonl", rows.SkippedClip)


def rows_of(file):
    """What the rows of a shard's .pt belong to: the clips of its features, the digests of its
    latents' wavs. None where the file is absent or was cut short, which shows at once, since the
    directory of a .pt is at its end. The rows themselves are checked when they are read
    (training.Shards)."""
    if not file.exists():
        return None
    try:
        saved = files.load_pt(file, {"clips": list, "digests": list}, mmap=True)  # takes 3 ms
    except common.Stop:
        return None
    return saved["clips"], saved["digests"]


# --------------------------------------------------------------------------------------------------
# Audios in: candidates that the model did not make
# --------------------------------------------------------------------------------------------------


def files_given(given):
    """What --given names: {source: {clip id: file}}, with None in place of the files for
    ground_truth, the clips' own sound."""
    found = {}
    reserved = (inputs.MODEL, inputs.GROUND_TRUTH, "skipped")  # the last is a suffix of files
    for text in given:
        name, _, folder = text.partition("=")
        if name in found:
            stop(f"--given {text}: {name} is given twice; keep one")
        if text == inputs.GROUND_TRUTH:
            found[name] = None
            continue
        if not re.fullmatch(r"[\w-]{1,100}", name) or name in reserved:
            stop(
                f"--given {text}: give ground_truth, or NAME=DIR; a name is of letters, digits, _ "
                f"and -, and none of {', '.join(reserved)}"
            )
        if not folder or not Path(folder).is_dir():
            stop(f"--given {text}: no such folder; give NAME=DIR, a folder of <clip id>.wav ...")
        found[name] = media.audio_files(Path(folder))
    return found


def name_sources(run, given, train, to_rate):
    """Adds new sources to run.json, after checking that their files are named by clips of this run.
    train: the train clips that were drawn; to_rate: the clips to rate."""
    run_json = inputs.read_run(run)
    ids = {clip.id for clip in train}
    ids_to_rate = {clip.id for clip in to_rate}
    for source, file_of in given.items():
        names = ids | ids_to_rate if file_of is None else file_of.keys()
        if names.isdisjoint(ids | ids_to_rate):
            stop(f"--given {source}: no file there names a train clip, as <clip id>.wav")
        foreign = sorted(names - ids - ids_to_rate)
        if foreign:
            which = f"none of the {len(ids | ids_to_rate)} clips, first {foreign[0]}"
            print(f"{source}: {len(foreign)} files name {which}")
        if source not in run_json.given and not names.isdisjoint(ids):
            run_json.given.append(source)
        if source not in run_json.given_to_rate and not names.isdisjoint(ids_to_rate):
            run_json.given_to_rate.append(source)
    rows.write_json(run / "run.json", run_json)


def forget_sources(run, given):
    """Removes from the end of run.json's lists the sources of which no audio was made and which are
    not given now: of a --given that was interrupted, or taken back. Only from the end, since the k
    of a source is its place in the list."""
    run_json = inputs.read_run(run)
    for sources, shards in ((run_json.given, "[0-9]*"), (run_json.given_to_rate, "rate_*")):
        while sources and sources[-1] not in given:
            if any((run / "01_samples").glob(f"{shards}.{sources[-1]}.jsonl")):
                break
            print(f"{sources.pop()}: no audio was made of it, so run.json no longer lists it")
    rows.write_json(run / "run.json", run_json)


def read_given(item, given, model, length):
    """[(length,) float32] in [-1, 1]: a clip's audio, cut or padded to this many samples of sound.
    item: (source, clip). Raises SkipClip where the clip has none that can be used."""
    source, clip = item
    path = clip.path
    if given[source] is not None:
        path = given[source].get(clip.id)
        if path is None:
            raise SkipClip(NO_FILE)
    rate = model.sample_rate_hz
    try:
        wave = media.read_audio(path, rate, length / rate, pad=False)
    except NoFile:
        files.gone(path)
    if not wave.isfinite().all():
        raise SkipClip("not finite")
    if len(wave) < model.clip_s / 2 * rate:
        found = f"{len(wave) / rate:.2f} s of audio"
        raise SkipClip(f"too short: {found}, at least {model.clip_s / 2:.2f} s needed")
    return [media.fit_length(wave.clamp(-1, 1), length)]


def add_given(run, model, shards, ks_of, given, wavs, here, args):
    """Writes and encodes the audios of --given, for the clips that can be used: one shard of one
    source after another, while worker processes read the next files. ks_of: {source: range of the
    k of its audios}; a given source has one audio for each clip, and so one k."""
    todo = []
    for source in [source for source in given if source in ks_of]:
        for shard, of_shard in shards.items():
            skipped = {row.clip for row in read_skipped(run, shard)}
            clips = [clip for clip in of_shard if clip.id not in skipped]
            name = inputs.shard_file(shard, source)
            # A clip that was skipped for want of a file is tried again when the folder has one.
            had_no_file = {row.clip for row in read_skipped(run, name) if row.reason == NO_FILE}
            has_file_now = given[source] is not None and not had_no_file.isdisjoint(given[source])
            if has_file_now or not is_whole(run, name, clips, ks_of[source], wavs):
                todo.append((source, name, clips))
    ranks.barrier()  # all ranks have looked at the files before one writes
    todo = here.share(todo)
    if not todo:
        return
    length = model.decode(torch.zeros(1, *model.latent_shape)).shape[1]
    items = [(source, clip) for source, _, clips in todo for clip in clips]
    read = functools.partial(read_given, given=given, model=model, length=length)
    bar = tqdm(todo, "given", unit="shard", disable=not here.first)
    with closing(ahead.read_ahead(read, items, args.workers)) as waves, bar:
        for source, name, clips in bar:
            (k,) = ks_of[source]
            write_shard(run, encode_given(run, model, source, name, k, clips, waves))


def encode_given(run, model, source, name, k, clips, waves):
    """The Shard of one source's audios for these clips. waves: an iterator of what `read_given`
    returns, or of the SkipClip that it raises."""
    shard, wave_of = begin_shard(name, clips, waves)
    waves = [wave for (wave,) in wave_of.values()]
    is_to_rate = name.startswith(rows.RATE_SPLIT)
    if waves and not is_to_rate:
        shard.latents.append(model.encode_audio(torch.stack(waves)))
    for row, clip in enumerate(shard.clips):
        wav = f"01_audio/{clip.id}_{k}.wav"
        written = media.write_audio(run / wav, waves[row], model.sample_rate_hz)
        if not is_to_rate:  # the wave is finite (`read_given`)
            written["finite"] = bool(shard.latents[0][row].isfinite().all())
        about = {"clip": clip.id, "k": k, "seed": 0, "wav": wav, "row": row, "source": source}
        shard.samples.append(rows.Sample(**about, **written))
    return shard


# --------------------------------------------------------------------------------------------------
# Clips in: a rows.ListedClip for each clip that --clips or --videos names
# --------------------------------------------------------------------------------------------------


def clips_of_file(path):
    """A user's own .jsonl, VGGSound's .csv or MMAudio's .tsv. In the two tables the label is the
    caption too."""
    readers = {".jsonl": clips_of_jsonl, ".csv": clips_of_csv, ".tsv": clips_of_tsv}
    if path.suffix.lower() not in readers:
        stop(f"{path}: expected a .jsonl, VGGSound's .csv or MMAudio's .tsv")
    return readers[path.suffix.lower()](path)


def clips_of_tsv(path):
    """MMAudio's table: all its clips have the split that is the last word of the file's name, as in
    vgg-test.tsv, else train."""
    split = re.split(r"[-_. ]", path.stem)[-1].lower()
    if split not in (*rows.SPLITS, rows.RATE_SPLIT):
        split = "train"
    clips = []
    for line, cells in files.read_csv(path, ("id", "label"), delimiter="\t"):
        clip = {"id": cells["id"], "caption": cells["label"], "label": cells["label"]}
        clip["split"] = split
        clips.append(rows.typed(clip, rows.ListedClip, f"{path}, line {line}"))
    return clips


def clips_of_csv(path):
    """VGGSound's table: a clip gets the id `<youtube id>_<start second, 6 digits>`, as upstream
    names it."""
    clips = []
    columns = ("youtube id", "start second", "label", "split")
    for line, clip in files.read_csv(path, columns, header=False):
        where = f"{path}, line {line}"
        video = clip["youtube id"]
        start = clip["start second"]
        if not files.is_name(video):
            stop(f"{where}, field 'youtube id': {video!r:.60} is not a name that a file can have")
        if not re.fullmatch(r"\d{1,6}", start):
            header = "; VGGSound's table has no line of column names" if line == 1 else ""
            stop(
                f"{where}, field 'start second': {start!r:.60} is not a whole number of up to six "
                f"digits{header}"
            )
        clip["id"] = f"{video}_{int(start):06d}"
        clip["caption"] = clip["label"]
        clips.append(rows.typed(clip, rows.ListedClip, where))
    return clips


def clips_of_jsonl(path):
    """A user's own list. Texts are stripped; fields that no stage reads are reported."""
    known = rows.ListedClip.__struct_fields__
    unread = Counter()
    clips = []
    for line, fields in files.read_jsonl(path):
        for name, value in fields.items():
            if name not in known:
                unread[name] += 1
            if isinstance(value, str):
                fields[name] = value.strip()
        clips.append(rows.typed(fields, rows.ListedClip, f"{path}, line {line}"))
    for name, count in unread.items():
        print(f"{path}: field {name!r} of {count} lines is not read (known: {', '.join(known)})")
    return clips


def files_below(root):
    """Paths relative to root, sorted, without hidden ones. A folder that cannot be read stops the
    stage; pathlib would silently leave it out."""

    def refuse(error):
        raise error

    found = []
    for folder, _, names in os.walk(root, onerror=refuse):
        for name in names:
            path = Path(folder, name).relative_to(root)
            if "/." not in f"/{path}":
                found.append(path)
    return sorted(found)


def clips_of_folder(root, strict):
    """Every video of a folder, for training. Videos whose name cannot be a clip's id are reported,
    or with `strict` refused."""
    clips = []
    odd = []
    for path in files_below(root):
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        name = "_".join(path.with_suffix("").parts)
        if files.is_name(name):
            clips.append(rows.ListedClip(id=name, video=str(path)))
        else:
            odd.append(str(path))
    if odd:
        rule = "not in UTF-8, of more than 200 bytes, or with a backslash or a line break"
        said = f"{len(odd)} videos have names that no clip can have ({rule}), first {odd[0]!a}"
        if strict or not clips:
            stop(f"{said}; rename them")
        print(f"{said}; they are left out until they are renamed")
    if not clips:
        stop(f"--videos {root}: no video ({', '.join(VIDEO_SUFFIXES[::2])}) in this folder")
    return clips


def with_test_list(clips, path):
    """The test split becomes exactly the clips of MMAudio's list. Of those that --clips lists too,
    caption, label and video stay as they are there."""
    listed = {clip.id: clip for clip in clips}
    test = [listed.get(clip.id, clip) for clip in clips_of_file(path)]
    for clip in test:
        clip.split = "test"
    return [clip for clip in clips if clip.split != "test"] + test


def check_clips(clips, where):
    """Stops where an id occurs twice. Prints which YouTube ids occur in several splits, since clips
    of one video sound alike, and how many clips are of human speech, to which PESQ applies."""
    split_of = {}
    splits_of_video = defaultdict(set)
    for i, clip in enumerate(clips, 1):
        if clip.id in split_of:
            before = split_of[clip.id]
            twice = "twice" if before == clip.split else f"in both {before} and {clip.split}"
            stop(f"{where}, clip {i}, field 'id': {clip.id} occurs {twice}; keep one")
        split_of[clip.id] = clip.split
        splits_of_video[inputs.video_of(clip.id)].add(clip.split)
    shared = sorted(video for video, splits in splits_of_video.items() if len(splits) > 1)
    if shared:
        more = " ..." if len(shared) > 10 else ""
        print(
            f"{len(shared)} YouTube ids occur in more than one split: {' '.join(shared[:10])}{more}"
        )
    captions = sum(bool(clip.caption) for clip in clips)
    labels = sum(bool(clip.label) for clip in clips)
    speech = sum(clip.label in common.HUMAN_SPEECH_CLASSES for clip in clips)
    print(
        f"clips: {len(clips)}, with caption {captions}, with label {labels}, of human speech "
        f"{speech}"
    )


def find_video(clip, root, where):
    """The name of a clip's video below root; None where there is none."""
    names = [clip.video] if clip.video else [clip.id + suffix for suffix in VIDEO_SUFFIXES]
    for name in names:
        if files.inside(root, name, f"{where}, clip {clip.id}").is_file():
            return name
    return None


def gather_clips(args):
    """From the user's list: the clips whose video exists, for clips.jsonl, and the others, for
    01_missing.jsonl."""
    where = args.clips or args.videos
    root = Path(args.videos).resolve()
    if args.clips is None:
        clips = clips_of_folder(args.videos, args.strict)
    else:
        clips = clips_of_file(Path(args.clips))
        if clips and args.clips.lower().endswith(".tsv"):
            print(f"{args.clips}: all in the split {clips[0].split}, by the last word of its name")
    if args.test_list:
        where = f"{where} and {args.test_list}"
        clips = with_test_list(clips, Path(args.test_list))
    check_clips(clips, where)
    found = []
    missing = []
    for clip in clips:
        video = find_video(clip, root, where)
        if video is None:
            reason = f"no {clip.video or clip.id + VIDEO_SUFFIXES[0]} below {root.name}/"
            missing.append(rows.MissingClip(id=clip.id, split=clip.split, reason=reason))
            continue
        caption = clip.caption or None
        label = clip.label or None
        found.append(
            rows.Clip(id=clip.id, video=video, caption=caption, label=label, split=clip.split)
        )
    if missing and args.strict:
        stop(
            f"{len(missing)} of {len(clips)} videos are missing, first {missing[0].id} "
            f"({missing[0].reason})"
        )
    have = Counter(clip.split for clip in found)
    listed = Counter(clip.split for clip in clips)
    counts = ", ".join(f"{split} {have[split]} of {listed[split]}" for split in sorted(listed))
    print(f"videos found: {counts}")
    if not found:
        stop(
            f"none of the {len(clips)} clips of {where} has a video below {args.videos}: "
            f"{missing[0].reason} ..."
        )
    return found, missing


# --------------------------------------------------------------------------------------------------
# The run: run.json and its record
# --------------------------------------------------------------------------------------------------


def check_flags(run, world, is_toy, given, args):
    """Stops at flags that do not fit together or do not fit this run. world: its run.json, if there
    is one; is_toy: whether stage 00 made the run, with its clips.jsonl; given: see
    `files_given`."""
    if is_toy and world is None:
        stop(f"{run}: stage 00 has not finished; run it again with {run_flag(run)}")
    if is_toy and not (run / "clips.jsonl").exists():
        stop(f"{run}/clips.jsonl: gone; run 00_toy_world.py again")
    if is_toy and (args.clips or args.videos):
        stop(f"--clips, --videos: {run} has stage 00's; use another --run-dir")
    if not args.model:
        stop(f"--run-dir {run} is new: give --model (or run stage 00 first for the toy world)")
    if not is_toy and not args.videos:
        stop("--videos: name the videos' folder, also when you run a command again")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        stop(f"--checkpoint {args.checkpoint}: no such file")
    if args.videos and not Path(args.videos).is_dir():
        stop(f"--videos {args.videos}: no such folder")
    if (args.cavp is None) == (args.model == "frieren"):
        stop("--cavp: give CAVP features to Frieren, and to no other")
    if args.given and args.max_clips == 0:
        stop("--given: with --max-clips 0 there are no candidates; give them when there are clips")
    sources = given.keys() | set(world.given if world else ())
    if args.max_clips and args.num_samples + len(sources) < 2:
        stop(
            f"--num-samples {args.num_samples}: a clip needs two candidates; give --given NAME=DIR "
            "or ground_truth, or more samples"
        )


def places(args):
    """Fields of run.json that say where things lie, taken from the flags. They are no part of the
    record: a folder that was moved has the same content."""
    found = {}
    if args.videos:
        found["video_root"] = str(Path(args.videos).resolve())
    if args.cavp:
        found["cavp_root"] = str(Path(args.cavp).resolve())
    if args.checkpoint:
        checkpoint = Path(args.checkpoint).resolve()
        found["checkpoint"] = str(checkpoint)
        found |= inherited(checkpoint)
    return found


def inherited(checkpoint):
    """Fields that a run takes over from a run.json beside its --checkpoint. A toy world's model
    brings that world's scorers and its replacements for the paper's numbers."""
    file = checkpoint.with_name("run.json")
    if not file.is_file():
        return {}
    world = rows.read_json(file, rows.World)
    found = {"defaults": world.defaults}
    if world.scorers != "real":
        found["scorers"] = world.scorers
        found["scorers_root"] = str(checkpoint.parent)
    return found


def may_get_train_clips(stage, settings, model):
    """Whether this run has no train clips yet, since `01 --max-clips 0` prepared it, and gets them
    now. Stops where the settings, which must be those of then, differ in anything else; for another
    checkpoint, in any run, with a line of its own."""
    if not stage.file.exists():
        return False
    before = rows.read_json(stage.file, rows.Record).settings
    same_model = before.get("model") == settings["model"]
    if same_model and before.get("checkpoint_digest") != settings["checkpoint_digest"]:
        other = f"not the checkpoint that {stage.run} was made with"
        stop(f"{model.checkpoint}: {other}; give that one, or {ADVICE}")
    if before.get("max_clips") != 0:
        return False
    # max_clips and the list of clips may differ: their recorded values are put in place of ours.
    may_differ = {"max_clips": 0, "clips_digest": before.get("clips_digest")}
    record.compare(stage.file, rows.Record(settings=settings | may_differ, inputs={}), ADVICE)
    return True


def prepare_run(run, stage, is_toy, model, args):
    """Writes run.json, clips.jsonl, 01_missing.jsonl and 01_settings.json, or checks that those of
    this run were made with the same settings.

    01_settings.json is the record that other commands are compared with. run.json is what later
    stages read: the settings once more, where files lie, and what stage 00 wrote there (rows.World,
    which is completed to a rows.Run)."""
    settings = {
        "model": args.model,
        "checkpoint_digest": model.checkpoint_digest,
        "latent_shape": list(model.latent_shape),
        "sample_rate_hz": model.sample_rate_hz,
        "clip_s": model.clip_s,
        "sampler": {"steps": args.sampling_steps, "guidance": args.guidance},
        "num_samples": args.num_samples,
        "seed": args.seed,
        "max_clips": args.max_clips,
    }
    gets_train_clips = may_get_train_clips(stage, settings, model)
    to_rate = []
    if not is_toy:
        to_rate = list_clips(run, gets_train_clips, args)
    settings["clips_digest"] = files.digest(run / "clips.jsonl")
    stage.write_or_compare(settings, redo=gets_train_clips)  # 01_settings.json
    file = run / "run.json"
    fields = {"checkpoint": "upstream"}
    if file.exists():
        fields |= rows.as_dict(rows.read_json(file, rows.World))
    rows.write_json(file, rows.typed(fields | places(args) | settings, rows.Run, file))
    if to_rate or gets_train_clips:  # new train clips may be of videos that were to be rated
        list_to_rate(run, to_rate)


def list_clips(run, gets_train_clips, args):
    """Writes clips.jsonl and 01_missing.jsonl from the user's list, for a new run and for one that
    gets its train clips now; another run keeps the list that its audios were made from. Returns the
    listed clips of the split rate, which may also be added later."""
    file = run / "clips.jsonl"
    found, missing = gather_clips(args)
    clips = [clip for clip in found if clip.split != rows.RATE_SPLIT]
    to_rate = [clip for clip in found if clip.split == rows.RATE_SPLIT]
    if gets_train_clips or not file.exists():
        if not clips:
            stop(f"--clips {args.clips}: only clips to rate; {run} is new and needs clips to train")
        rows.write(run / "01_missing.jsonl", missing)
        rows.write(file, clips)
        return to_rate
    if not clips:  # the list only adds clips to rate to a run that has its other clips
        return to_rate
    before = {clip.id: clip for clip in rows.read(file, rows.Clip)}
    now = {clip.id: clip for clip in clips}
    if before != now:
        both = before.keys() & now.keys()
        changed = sum(before[name] != now[name] for name in both)
        print(
            f"{file} stays as it is: {len(now.keys() - both)} videos appeared since, "
            f"{len(before.keys() - both)} vanished, {changed} have another caption, label or "
            "split; for these use another --run-dir"
        )
    return to_rate


def list_to_rate(run, to_rate):
    """01_to_rate.jsonl: the clips to rate that the run has, then these, without any whose video the
    run mines or tests on."""
    file = run / "01_to_rate.jsonl"
    ids = set()
    videos = set()  # of all train, val and test clips
    for clip in inputs.read_clips(run):
        ids.add(clip.id)
        videos |= inputs.videos_of(clip.id, clip.path)
    root = run / inputs.read_run(run).video_root
    known = {clip.id: clip for clip in rows.read_if_there(file, rows.Clip)}
    known |= {clip.id: clip for clip in to_rate}
    if not known:
        return
    kept = []
    for clip in known.values():
        if clip.id in ids:
            stop(
                f"clip {clip.id}: cannot have the split rate, since it is a clip of this run "
                "already; give it another id, or leave it out"
            )
        path = files.inside(root, clip.video, f"{file}, clip {clip.id}")
        if videos.isdisjoint(inputs.videos_of(clip.id, path)):
            kept.append(clip)
    if len(kept) < len(known):
        count = len(known) - len(kept)
        print(f"left out: {count} clips to rate, of videos that this run mines or tests on")
    rows.write(file, kept)


# --------------------------------------------------------------------------------------------------
# Report, main
# --------------------------------------------------------------------------------------------------


def skipped_by(run, source, shards):
    """A rows.SkippedClip for each clip of these shards that has no audio of a source."""
    skipped = []
    for shard in shards:
        skipped += read_skipped(run, inputs.shard_file(shard, source))
    return skipped


def print_reasons(skipped):
    example = {row.reason: row.clip for row in reversed(skipped)}
    for reason, count in Counter(row.reason for row in skipped).most_common(20):
        print(f"  {count} x {reason}, e.g. {example[reason]}")


def print_report(run, train):
    """Counts of clips and audios."""
    shards = inputs.shards_of(run)
    skipped = skipped_by(run, inputs.MODEL, shards)
    used = len(train) - len(skipped)
    print(f"train clips: {len(train)} in, {used} used, {len(skipped)} skipped")
    print_reasons(skipped)
    if len(skipped) == len(train):
        stop(
            f"no train clip of {run} could be used; the reasons are above and in "
            f"{run}/01_samples/*.skipped.jsonl"
        )
    run_json = inputs.read_run(run)
    samples = []
    for audios in inputs.read_samples(run).values():
        samples += audios
    for source in run_json.given:
        count = sum(sample.source == source for sample in samples)
        print(f"{source}: audio for {count} of {used} clips")
        print_reasons(skipped_by(run, source, shards))
    count = len(inputs.read_clips(run, rows.RATE_SPLIT))
    for source in run_json.given_to_rate:
        lacking = skipped_by(run, source, inputs.shards_to_rate(run))
        print(f"{source}: audio for {count - len(lacking)} of {count} clips to rate")
        print_reasons(lacking)
    broken = sum(not sample.finite for sample in samples)
    silent = sum(sample.peak < common.SILENT_PEAK for sample in samples)
    print(f"audios: {len(samples)}, {broken} not finite (never used in a pair), {silent} silent")
    if max(broken, silent) > 0.01 * len(samples):
        print(
            "warning: more than 1 % of the audios are broken or silent: look at the checkpoint, "
            "--guidance and precision"
        )
    print(f"next: python 02_fit_audioscore.py {run_flag(run)}")


def print_all_missing(name, checkpoint, weights):
    """Prints every missing file that some stage needs with this model, its size and its source.
    Returns whether any is missing besides those of judges, which 07 reads only with --judge."""
    adapter, variant = common.adapter_of(name)
    own = list(adapter.files(variant))
    if not own:  # the toy's lie in its run folder
        return False
    if checkpoint:
        own = own[1:]  # the first is the velocity network's
    of_judges = []
    scorers = scoring.ScorerSet(".", common.SCORERS["real"], "")
    for scorer_name, scorer in scorers.classes.items():
        if scorer_name in scorers.judges:
            of_judges += scorer.files
        else:
            own += scorer.files
    missing = common.print_missing(weights, own + of_judges)
    elsewhere = adapter.missing_elsewhere()
    if elsewhere:
        print(elsewhere)
    return elsewhere is not None or not set(missing) <= set(of_judges)


def main(args):
    # -- setup
    here = ranks.setup(args.part)  # this process: its share of the GPUs, its part by --part
    run = Path(args.run_dir)
    is_toy = (run / "00_settings.json").exists()
    world = inputs.read_run(run, rows.World) if (run / "run.json").exists() else None
    if world is not None and args.model is None:
        args.model = world.model
    given = files_given(args.given)
    check_flags(run, world, is_toy, given, args)
    if args.dry_run:
        if not is_toy:
            gather_clips(args)
        if print_all_missing(args.model, args.checkpoint, args.weights):
            stop("files of weights are missing, see above; get them, then run the command again")
        print("all weights that the stages need are there; run the command without --dry-run")
        return
    if args.max_clips == 0:  # lists at once all files that any later stage will ask for
        print_all_missing(args.model, args.checkpoint, args.weights)
    checkpoint = args.checkpoint
    if is_toy and checkpoint is None:
        checkpoint = run / world.checkpoint
    model = common.load_model(args.model, checkpoint, here.device, args.weights)
    training.only_sample(model, args.compile)

    # Other stages record their settings, inputs and outputs once (`stage.claim`). Here shards may
    # be added later, and each is checked by the digests that it holds.
    with record.stage(run, "01", advice=ADVICE, part=here.part) as stage:
        # -- clips
        with stage.one_at_a_time():
            if here.first:
                prepare_run(run, stage, is_toy, model, args)
                if here.part is None:
                    forget_sources(run, given)
        ranks.barrier()
        # Sec. 2.2: 50K of the train clips, drawn at random; later stages draw the same ones again.
        # Paper silent: whether its 2K rated videos are among them. Ours are (stage 02).
        train = inputs.drawn(inputs.read_clips(run, "train"), args)
        all_shards = {}
        for start in range(0, len(train), SHARD_CLIPS):
            all_shards[f"{start // SHARD_CLIPS:05d}"] = train[start : start + SHARD_CLIPS]
        shards = dict(here.part_of([*all_shards.items()]))  # without --part: all

        # -- audios
        wavs = {wav.name for wav in (run / "01_audio").glob("*.wav")}
        ks = range(args.num_samples)
        todo = [name for name in shards if not is_whole(run, name, shards[name], ks, wavs)]
        ranks.barrier()  # all ranks have looked at the files before one writes
        generate(run, model, shards, here.share(todo), here, args)
        if given:
            to_rate = dict(here.part_of([*inputs.shards_to_rate(run).items()]))
            with stage.one_at_a_time():
                if here.first:
                    name_sources(run, given, train, inputs.read_clips(run, rows.RATE_SPLIT))
            ranks.barrier()
            run_json = inputs.read_run(run)
            ks_of = inputs.ks_of_sources(run_json)
            add_given(run, model, shards, ks_of, given, wavs, here, args)
            ks_of = inputs.ks_to_rate(run_json)
            add_given(run, model, to_rate, ks_of, given, wavs, here, args)

    if not here.first or here.ends_part():
        return
    if train:
        print_report(run, train)
    else:
        print(f"prepared {run}, no train clips")
        print(f"next: python 07_evaluate.py {run_flag(run)} --systems NAME=DIR")


if __name__ == "__main__":
    command.launch(main, parse_args)
