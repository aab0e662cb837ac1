"""Stage 01: N audios for every training clip, from the model that will be aligned (Sec. 2.2).

Run:
    python 01_generate.py                                    # the toy world of stage 00
    python 01_generate.py --run-dir runs/vgg --model mmaudio:large_44k --clips vggsound.csv --videos DIR \\
        --test-list MMAudio/sets/vgg-test.tsv                # the paper's
    torchrun --standalone --nproc_per_node 8 01_generate.py ...           # shards are divided over the GPUs

Reads:
    clips        the toy's clips.jsonl; or a .jsonl (id, and if known video, caption, label, split); VGGSound's csv
                 (youtube id, start second, label, split; no header); MMAudio's tsv (header id, label; its split is the
                 last word of its name, as in vgg-test.tsv, else train); or all videos of a folder, for training
    videos       below --videos, named by `video` or `<id>.mp4` (.mkv, .webm, .mov, .avi)
Writes:
    run.json                    model, checkpoint and its digest, latent shape, sampler, N, seed, video root
    clips.jsonl                 id, video, caption or null, label or null, split
    01_missing.jsonl            clips whose video does not exist: id, split, reason
    01_samples/00012.jsonl      one line per audio: clip, k, seed, wav, row (= k-th of clip row // N), digest of the
                                wav, finite, peak (of full scale), clipped (share of samples at full scale)
    01_samples/00012.pt         latents (rows, T, C) float32 normalised; features: dict of (rows // N, ...) float32;
                                digests: those of the rows, which bind the two files; crc32: by name, of the bytes of
                                each row of latents and of each feature, checked whenever a row is read
    01_samples/00012.skipped.jsonl   clips of the shard that could not be used: clip, reason
    01_audio/<clip>_<k>.wav     what a person listens to
Takes: toy 29 s on 2 cores; MMAudio-L needs 26 TFLOP per audio (25 steps, guidance), 250K audios in all.
"""

import os
import random
import re
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import (
    SkipClip,
    ahead,
    files,
    media,
    number,
    ranks,
    record,
    rows,
    stop,
    training,
)

SHARD_CLIPS = 32
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".MKV", ".webm", ".WEBM", ".mov", ".MOV", ".avi", ".AVI")
ADVICE = "use another --run-dir, or remove this one"


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    paper = parser.paper
    engineering = parser.engineering
    io.add_argument(
        "--model",
        help="toy, mmaudio:small_16k ... mmaudio:large_44k, frieren; the toy run knows its own",
    )
    io.add_argument(
        "--checkpoint",
        help="weights of the velocity network, if not the upstream file under --weights",
    )
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    io.add_argument("--clips", help=".jsonl, VGGSound's .csv or MMAudio's .tsv")
    io.add_argument(
        "--test-list", help="MMAudio's sets/vgg-test.tsv: the test split is exactly these clips"
    )
    io.add_argument("--videos", help="folder of videos")
    io.add_argument("--cavp", help="Frieren only: folder of CAVP features, <id>.npz or <id>.npy")
    io.add_argument(
        "--strict",
        action="store_true",
        help="a video that cannot be used is an error, not a counted skip",
    )
    described = "train clips, a seeded random subset; 0 only prepares the run folder, for stage 07 [Sec. 2.2]"
    paper.add_argument("--max-clips", type=number(int, 0), default=50_000, help=described)
    paper.add_argument(
        "--num-samples", type=number(int, 2), default=5, help="audios per clip [Sec. 3.1]"
    )
    paper.add_argument(
        "--guidance", type=number(float, 0), default=4.5, help="guidance scale gamma [Sec. 3.1]"
    )
    paper.add_argument(
        "--sampling-steps", type=number(int, 1), default=25, help="Euler steps; upstream's"
    )
    engineering.add_argument(
        "--batch-clips",
        type=number(int, 0),
        default=0,
        help="clips sampled together; 0: 4, or 16 of the small Frieren",
    )
    engineering.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the clips' draw and all noise"
    )
    common.compile_flag(parser)
    common.workers_flag(parser)
    return common.parse(parser, argv, "01")


# --------------------------------------------------------------------------------------------------
# Clips in
# --------------------------------------------------------------------------------------------------


def clips_of_table(path):
    """VGGSound's csv or MMAudio's tsv as rows.ListedClip; ids in upstream's form, `<youtube
    id>_<start second, 6 digits>`; the label is the caption too."""
    found = []
    if path.suffix.lower() == ".tsv":
        word = re.split(r"[-_. ]", path.stem)[-1].lower()
        split = word if word in rows.SPLITS else "train"
        print(f"{path}: all in the split {split}, by the last word of its name")
        for line, cells in files.read_csv(path, ("id", "label"), delimiter="\t", header=False):
            if line > 1 or cells != {"id": "id", "label": "label"}:
                found.append((line, cells["id"], cells["label"], split))
    else:
        columns = ("youtube id", "start second", "label", "split")
        for line, cells in files.read_csv(path, columns, header=False):
            where = f"{path}, line {line}"
            start = cells["start second"]
            if not files.is_name(cells["youtube id"]):
                stop(
                    f"{where}, field 'youtube id': {cells['youtube id']!r:.60} is not a name that "
                    "a file can have"
                )
            if not start.isdecimal() or len(start) > 6:
                stop(
                    f"{where}, field 'start second': {start!r:.60} is not a whole number of up to "
                    "six digits"
                )
            found.append(
                (line, f"{cells['youtube id']}_{int(start):06d}", cells["label"], cells["split"])
            )
    clips = []
    for line, name, label, split in found:
        clip = {"id": name, "caption": label, "label": label, "split": split}
        clips.append(rows.typed(clip, rows.ListedClip, f"{path}, line {line}"))
    return clips


def clips_of_jsonl(path):
    """A user's own list."""
    known = rows.ListedClip.__struct_fields__
    unread = Counter(key for _, line in files.read_jsonl(path) for key in line if key not in known)
    for key, count in unread.items():
        print(f"{path}: field {key!r} of {count} lines is not read (there are {', '.join(known)})")
    clips = rows.read(path, rows.ListedClip)
    for clip in clips:
        for field in ("id", "video", "caption", "label"):
            if getattr(clip, field) is not None:
                setattr(clip, field, getattr(clip, field).strip())
    return clips


def files_below(root):
    """Paths relative to root, sorted, without hidden ones. A folder that cannot be read stops the
    stage: pathlib would leave it out."""

    def refuse(error):
        raise error

    found = []
    for folder, _, names in os.walk(root, onerror=refuse):
        for name in names:
            path = Path(folder, name).relative_to(root)
            if not any(part.startswith(".") for part in path.parts):
                found.append(path)
    return sorted(found)


def clips_of_folder(root, strict):
    """Every video of a folder, for training. Those whose name cannot name a clip are said, or with
    `strict` refused."""
    videos = [path for path in files_below(root) if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        stop(f"--videos {root}: no video ({', '.join(VIDEO_SUFFIXES[::2])}) in this folder")
    clips = []
    odd = []
    for video in videos:
        name = "_".join(video.with_suffix("").parts)
        if files.is_name(name):
            clips.append(rows.ListedClip(id=name, video=str(video)))
        else:
            odd.append(str(video))
    if odd:
        rule = "not in UTF-8, of more than 200 bytes, or with a backslash or a line break"
        said = f"{len(odd)} videos have names that no clip can have ({rule}), first {odd[0]!a}"
        if strict or not clips:
            stop(f"{said}; rename them")
        print(f"{said}; they are left out until they are renamed")
    return clips


def listed_clips(args):
    """The clips that --clips or --videos name."""
    if args.clips is None:
        return clips_of_folder(args.videos, args.strict)
    path = Path(args.clips)
    if path.suffix.lower() == ".jsonl":
        return clips_of_jsonl(path)
    if path.suffix.lower() not in (".csv", ".tsv"):
        stop(f"--clips {path}: expected a .jsonl, VGGSound's .csv or MMAudio's .tsv")
    return clips_of_table(path)


def with_test_list(clips, path):
    """The test split becomes exactly the clips of MMAudio's list; what --clips says of them is
    kept."""
    listed = {clip.id: clip for clip in clips}
    test = clips_of_table(path)
    names = {clip.id for clip in test}
    kept = [clip for clip in clips if clip.split != "test" and clip.id not in names]
    for clip in test:
        clip = listed.get(clip.id, clip)
        clip.split = "test"
        kept.append(clip)
    return kept


def check_clips(clips, where):
    """Ids are unique, one split each. Says which YouTube ids recur across splits, since one video's
    clips sound alike, and how many clips PESQ will apply to."""
    split_of = {}
    splits_of_video = defaultdict(set)
    for i, clip in enumerate(clips, 1):
        if clip.id in split_of:
            before = split_of[clip.id]
            twice = "twice" if before == clip.split else f"in both {before} and {clip.split}"
            stop(f"{where}, clip {i}, field 'id': {clip.id} occurs {twice}; keep one")
        split_of[clip.id] = clip.split
        is_youtube = len(clip.id) == 18 and clip.id[11] == "_"
        splits_of_video[clip.id[:11] if is_youtube else clip.id].add(clip.split)
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
    """The name of a clip's video below root, or None and the name that is missing."""
    names = [clip.video] if clip.video else [clip.id + suffix for suffix in VIDEO_SUFFIXES]
    for name in names:
        if files.inside(root, name, f"{where}, clip {clip.id}").is_file():
            return name, None
    return None, names[0]


def gather_clips(args):
    """From the user's list: the lines of clips.jsonl (videos that exist) and of
    01_missing.jsonl."""
    where = " and ".join(filter(None, (args.clips or args.videos, args.test_list)))
    root = Path(args.videos).resolve()
    clips = listed_clips(args)
    if args.test_list:
        clips = with_test_list(clips, Path(args.test_list))
    check_clips(clips, where)
    found = []
    missing = []
    for clip in clips:
        name, missing_name = find_video(clip, root, where)
        if name is None:
            reason = f"no {missing_name} below {root.name}/"
            missing.append(rows.MissingClip(id=clip.id, split=clip.split, reason=reason))
            continue
        caption = clip.caption or None
        label = clip.label or None
        found.append(
            rows.Clip(id=clip.id, video=name, caption=caption, label=label, split=clip.split)
        )
    if missing and args.strict:
        first = missing[0]
        stop(
            f"{len(missing)} of {len(clips)} videos are missing, first {first.id} ({first.reason})"
        )
    have = Counter(clip.split for clip in found)
    listed = Counter(clip.split for clip in clips)
    print(
        "videos found: "
        + ", ".join(f"{split} {have[split]} of {listed[split]}" for split in sorted(listed))
    )
    if not found:
        stop(
            f"none of the {len(clips)} clips of {where} has a video below {args.videos}: "
            f"{missing[0].reason} ..."
        )
    return found, missing


# --------------------------------------------------------------------------------------------------
# The run: run.json and its record
# --------------------------------------------------------------------------------------------------


def check_flags(run, world, own_clips, args):
    """Flags that do not fit together or to this run. own_clips: stage 00 wrote clips.jsonl
    itself."""
    if own_clips and not args.model:
        stop(f"{run}: stage 00 has not finished; run it again with --run-dir {run}")
    if own_clips and not (run / "clips.jsonl").exists():
        stop(f"{run}/clips.jsonl: gone; run 00_toy_world.py again")
    if not args.model:
        stop(f"--run-dir {run} is new: give --model (or run stage 00 first for the toy world)")
    if own_clips and (args.clips or args.videos):
        stop(f"--clips, --videos: {run} has stage 00's; use another --run-dir")
    if not own_clips and not args.videos:
        stop("--videos: name the videos' folder, also when you run a command again")
    if args.videos and not Path(args.videos).is_dir():
        stop(f"--videos {args.videos}: no such folder")
    if (args.cavp is None) == (args.model == "frieren"):
        stop("--cavp: give CAVP features to Frieren, and to no other")


def places(world, args):
    """Where things lie, for the stages to come and for people: fields of run.json. They are no part
    of the record: what has moved is still the same."""
    found = {} if world is None else rows.as_dict(world)
    if args.videos:
        found["video_root"] = str(Path(args.videos).resolve())
    if args.cavp:
        found["cavp_root"] = str(Path(args.cavp).resolve())
    if not args.checkpoint:
        found.setdefault("checkpoint", "upstream")
        return found
    checkpoint = Path(args.checkpoint).resolve()
    found["checkpoint"] = str(checkpoint)
    beside = checkpoint.with_name("run.json")
    if (
        beside.is_file()
    ):  # a world's model keeps its scorers and its replacements for the paper's numbers
        own = rows.read_json(beside, rows.World)
        found["defaults"] = own.defaults
        if own.scorers != "real":
            found["scorers"] = own.scorers
            found["scorers_root"] = str(checkpoint.parent)
    return found


def claim_run(stage, settings, model):
    """The record of stage 01. Returns whether the run was only prepared before, by --max-clips 0,
    and may get its train clips now."""
    prepared = False
    if stage.file.exists():
        before = rows.read_json(stage.file, rows.Record).settings
        same_model = before.get("model") == settings["model"]
        if same_model and before.get("checkpoint_digest") != settings["checkpoint_digest"]:
            stop(
                f"{model.checkpoint}: not the checkpoint that {stage.run} was made with; give that "
                f"one, or {ADVICE}"
            )
        prepared = before.get("max_clips") == 0
        if prepared:
            may_change = {key: before.get(key) for key in ("max_clips", "clips_digest")}
            record.compare(
                stage.file, rows.Record(settings=settings | may_change, inputs={}), ADVICE
            )
    return prepared


def prepare_run(run, stage, world, own_clips, model, args):
    """run.json, clips.jsonl and 01_missing.jsonl, or the proof that those of this run are of the
    same settings."""
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
    listed = run / "clips.jsonl"
    found, missing = ([], []) if own_clips else gather_clips(args)
    prepared = claim_run(stage, settings, model)
    if prepared or not listed.exists():
        rows.write(run / "01_missing.jsonl", missing)
        rows.write(listed, found)
    elif not own_clips:  # the run keeps its list: its audios are made from it
        own = {clip.id for clip in rows.read(listed, rows.Clip)}
        now = {clip.id for clip in found}
        if own != now:
            print(
                f"{listed} stays as it is: {len(now - own)} videos appeared since, "
                f"{len(own - now)} vanished"
            )
    settings["clips_digest"] = files.digest(listed)
    stage.write(settings, redo=prepared)
    run_json = rows.typed(places(world, args) | settings, rows.Run, run / "run.json")
    rows.write_json(run / "run.json", run_json)


# --------------------------------------------------------------------------------------------------
# Audios out
# --------------------------------------------------------------------------------------------------


def encode(model, clip, videos):
    """The clip's features, or the SkipClip that says why it has none. videos: what `model.read`
    read, in order."""
    tensors = next(videos)
    return tensors if isinstance(tensors, SkipClip) else model.encode(clip, tensors)


def is_whole(folder, shard, clips, wavs):
    """Whether each clip of a shard is used or skipped, its latents and wavs there. wavs: names of
    the run's wavs."""
    if not (folder / f"{shard}.jsonl").exists():
        return False
    samples = rows.read(folder / f"{shard}.jsonl", rows.Sample)
    skipped = rows.read_if_there(folder / f"{shard}.skipped.jsonl", rows.SkippedClip)
    done = {row.clip for row in samples + skipped}
    if done != {clip.id for clip in clips}:
        return False
    if not {Path(sample.wav).name for sample in samples} <= wavs:
        return False
    return not samples or holds_tensors(folder / f"{shard}.pt", samples)


def holds_tensors(file, samples):
    """Whether a shard's .pt is the one that was written with these lines. Its directory is at its
    end: one that was cut cannot be opened. Its rows are checked when they are read
    (training.Shards)."""
    if not file.exists():
        return False
    try:
        shard = files.load_pt(file, mmap=True)  # 3 ms, however large it is
    except common.Stop:
        return False
    return "crc32" in shard and shard["digests"] == [sample.digest for sample in samples]


def generate_shard(run, shard, model, clips, encoded, args):
    """Samples, decodes and writes one shard; its .jsonl comes last, so that a shard that has one is
    whole.

    encoded: for each clip its features, or the SkipClip that says why it has none.
    """
    folder = run / "01_samples"
    usable = []
    features = {}
    skipped = []
    for clip, found in zip(clips, encoded):
        if isinstance(found, SkipClip):
            skipped.append(rows.SkippedClip(clip=clip.id, reason=str(found)))
        else:
            usable.append(clip)
            features[clip.id] = found

    def seeds_of(clip):
        return [common.seed_of(args.seed, clip.id, k) for k in range(args.num_samples)]

    def write(clip, latents, waves):
        """Its wavs, and the lines of stage 01, whose row is counted later."""
        samples = []
        for k, (seed, latent, wave) in enumerate(zip(seeds_of(clip), latents, waves)):
            wav = f"01_audio/{clip.id}_{k}.wav"
            written = media.write_audio(run / wav, wave, model.sample_rate_hz)
            written["finite"] = written["finite"] and bool(latent.isfinite().all())
            samples.append(rows.Sample(clip=clip.id, k=k, seed=seed, wav=wav, row=0, **written))
        return samples, latents

    samples = []
    latents = []
    sampler = rows.Sampler(steps=args.sampling_steps, guidance=args.guidance)
    batch_clips = args.batch_clips or model.batch_clips
    for own_samples, own_latents in common.sample_clips(
        model, usable, features, seeds_of, write, sampler, batch_clips
    ):
        samples += own_samples
        latents.append(own_latents)
    for row, sample in enumerate(samples):
        sample.row = row
    if usable:
        stacked = common.stack_features([features[clip.id] for clip in usable], "cpu")
        digests = [sample.digest for sample in samples]
        training.save_shard(folder / f"{shard}.pt", torch.cat(latents), stacked, digests)
    unused = folder / f"{shard}.skipped.jsonl"
    if skipped or unused.exists():  # of an earlier, damaged shard
        rows.write(unused, skipped)
    rows.write(folder / f"{shard}.jsonl", samples)


def generate(run, model, blocks, todo, here, args):
    """All shards of this process. Worker processes decode video ahead; while a shard is sampled,
    the next one is encoded."""
    if todo:
        model.decode(
            torch.zeros(1, *model.latent_shape)
        )  # a missing codec is said now, not after the first shard
    clips = [clip for i in todo for clip in blocks[i]]
    with closing(ahead.read_ahead(model.read, clips, args.workers)) as videos:
        encoded = ahead.in_threads(
            lambda clip: encode(model, clip, videos), clips, threads=1, waiting=SHARD_CLIPS
        )
        with closing(encoded):
            for i in tqdm(todo, unit="shard", disable=not here.first):
                found = [next(encoded) for _ in blocks[i]]
                if args.strict:
                    refuse_unusable(f"{i:05d}", blocks[i], found)
                generate_shard(run, f"{i:05d}", model, blocks[i], found, args)


def refuse_unusable(shard, clips, encoded):
    """--strict, of one shard."""
    unusable = [
        f"{clip.id} ({found})" for clip, found in zip(clips, encoded) if isinstance(found, SkipClip)
    ]
    if unusable:
        more = " ..." if len(unusable) > 10 else ""
        stop(
            f"--strict: {len(unusable)} clips of shard {shard} cannot be used: "
            f"{', '.join(unusable[:10])}{more}"
        )


def print_report(run, train):
    """Counts of clips and audios."""
    skipped = []
    for file in sorted((run / "01_samples").glob("*.skipped.jsonl")):
        skipped += rows.read(file, rows.SkippedClip)
    print(f"train clips: {len(train)} in, {len(train) - len(skipped)} used, {len(skipped)} skipped")
    example = {row.reason: row.clip for row in reversed(skipped)}
    for reason, count in Counter(row.reason for row in skipped).most_common(20):
        print(f"  {count} x {reason}, e.g. {example[reason]}")
    if len(skipped) == len(train):
        stop(
            f"no train clip of {run} could be used; the reasons are above and in "
            f"{run}/01_samples/*.skipped.jsonl"
        )
    samples = [sample for audios in common.read_samples(run).values() for sample in audios]
    broken = sum(not sample.finite for sample in samples)
    silent = sum(sample.peak < common.SILENT_PEAK for sample in samples)
    print(f"audios: {len(samples)}, {broken} not finite (never used in a pair), {silent} silent")
    if max(broken, silent) > 0.01 * len(samples):
        print(
            "warning: more than 1 % of the audios are broken: look at the checkpoint, --guidance "
            "and precision"
        )
    print(f"next: python 02_fit_audioscore.py --run-dir {run}")


def main(args):
    # -- setup
    here = ranks.setup()
    run = Path(args.run_dir)
    world = common.read_run(run, rows.World) if (run / "run.json").exists() else None
    own_clips = (run / "00_settings.json").exists()
    args.model = args.model or (world and world.model)
    check_flags(run, world, own_clips, args)
    if args.max_clips == 0:  # all that any stage will ask for, said at once
        common.print_missing(args.weights, common.files_of(args.model, args.checkpoint))
    checkpoint = args.checkpoint or (run / world.checkpoint if own_clips else None)
    model = common.load_model(args.model, checkpoint, here.device, args.weights)
    training.only_sample(model, args.compile)

    with record.stage(run, "01", advice=ADVICE) as stage:
        # -- clips
        if here.first:
            prepare_run(run, stage, world, own_clips, model, args)
        ranks.barrier()
        train = common.read_clips(run, "train")
        if len(train) > args.max_clips:
            drawn = random.Random(args.seed).sample(range(len(train)), args.max_clips)
            train = [train[i] for i in sorted(drawn)]
        blocks = [train[i : i + SHARD_CLIPS] for i in range(0, len(train), SHARD_CLIPS)]

        # -- audios
        wavs = {wav.name for wav in (run / "01_audio").glob("*.wav")}
        folder = run / "01_samples"
        todo = [
            i for i, block in enumerate(blocks) if not is_whole(folder, f"{i:05d}", block, wavs)
        ]
        ranks.barrier()  # every rank has seen the same
        generate(run, model, blocks, here.share(todo), here, args)

    if not here.first:
        return
    if not train:
        print(
            f"prepared {run}, no train clips\nnext: python 07_evaluate.py --run-dir {run} "
            "--systems NAME=DIR"
        )
        return
    print_report(run, train)


if __name__ == "__main__":
    common.launch(main, parse_args)
