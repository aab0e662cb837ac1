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

import difflib
import os
import random
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import SkipClip, number, stop

SHARD_CLIPS = 32
LISTED = common.CLIP | {"video": common.maybe(common.PATH)}  # what a user's list says of a clip
SECOND = common.Kind("a whole number of up to six digits", lambda x: x.isdecimal() and len(x) <= 6)
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".MKV", ".webm", ".WEBM", ".mov", ".MOV", ".avi", ".AVI")


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io, paper, engineering = parser.io, parser.paper, parser.engineering
    io.add_argument("--model", help="toy, mmaudio:small_16k ... mmaudio:large_44k, frieren; the toy run knows its own")
    io.add_argument("--checkpoint", help="weights of the velocity network, if not the upstream file under --weights")
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    io.add_argument("--clips", help=".jsonl, VGGSound's .csv or MMAudio's .tsv")
    io.add_argument("--test-list", help="MMAudio's sets/vgg-test.tsv: the test split is exactly these clips")
    io.add_argument("--videos", help="folder of videos")
    io.add_argument("--cavp", help="Frieren only: folder of CAVP features, <id>.npz or <id>.npy")
    io.add_argument("--strict", action="store_true", help="a video that cannot be used is an error, not a counted skip")
    described = "train clips, a seeded random subset; 0 only prepares the run folder, for stage 07 [Sec. 2.2]"
    paper.add_argument("--max-clips", type=number(int, 0), default=50_000, help=described)
    paper.add_argument("--num-samples", type=number(int, 2), default=5, help="audios per clip [Sec. 3.1]")
    paper.add_argument("--guidance", type=number(float, 0), default=4.5, help="guidance scale gamma [Sec. 3.1]")
    paper.add_argument("--sampling-steps", type=number(int, 1), default=25, help="Euler steps; upstream's")
    engineering.add_argument("--compile", action="store_true", help="torch.compile the network that samples")
    engineering.add_argument("--batch-clips", type=number(int, 1), default=4, help="clips sampled together")
    engineering.add_argument("--seed", type=number(int, 0), default=0, help="of the clips' draw and all noise")
    common.workers_flag(parser)
    return common.parse(parser, argv, "01")


# ------------------------------------------------------------------------------------------------------------
# Clips in
# ------------------------------------------------------------------------------------------------------------


def clips_of_table(path):
    """VGGSound's csv or MMAudio's tsv -> clips; ids in upstream's form, `<youtube id>_<start second, 6 digits>`."""
    word = re.split(r"[-_. ]", path.stem)[-1].lower()
    split, rows = word if common.CLIP["split"].holds(word) else "train", []
    if path.suffix.lower() == ".tsv":
        print(f"{path}: all in the split {split}, by the last word of its name")
        table = common.read_csv(path, ("id", "label"), delimiter="\t", header=False)
        rows = [(line, *row.values(), split) for line, row in table if (line, *row.values()) != (1, "id", "label")]
    else:
        for line, row in common.read_csv(path, ("youtube id", "start second", "label", "split"), header=False):
            common.check(row, {"youtube id": common.NAME, "start second": SECOND}, f"{path}, line {line}")
            name, start, label, split = row.values()
            rows.append((line, f"{name}_{int(start):06d}", label, split))
    clips = [(line, dict(id=name, caption=label, label=label, split=split)) for line, name, label, split in rows]
    return [common.check(clip, LISTED, f"{path}, line {line}") for line, clip in clips]


def files_below(root):
    """Paths relative to root, sorted, without hidden ones. A folder that cannot be read stops the
    stage: pathlib would leave it out."""

    def refuse(error):
        raise error

    names = []
    for folder, _, files in os.walk(root, onerror=refuse):
        names += [Path(folder, file).relative_to(root) for file in files]
    return [name for name in sorted(names) if not any(part[0] == "." for part in name.parts)]


def listed_clips(args):
    """The clips that --clips or --videos name, each with id, caption, label, split and, from a .jsonl, video."""
    if args.clips is None:
        names = [n for n in files_below(args.videos) if n.suffix.lower() in VIDEO_SUFFIXES]
        if not names:
            stop(f"--videos {args.videos}: no video ({', '.join(VIDEO_SUFFIXES[::2])}) in this folder")
        clips = [{"id": "_".join(n.with_suffix("").parts), "video": str(n), "split": "train"} for n in names]
        return without_odd_names(clips, args.strict)
    path = Path(args.clips)
    if path.suffix.lower() == ".jsonl":
        clips = common.read_jsonl(path, LISTED | {"split": common.maybe(common.CLIP["split"])})
        for key, count in Counter(key for clip in clips for key in clip.keys() - common.CLIP.keys()).items():
            like = difflib.get_close_matches(key, common.CLIP, 1)
            print(f"{path}: field {key!r} of {count} lines is not read" + (f"; {like[0]!r} was meant?" if like else ""))
        return [{key: v.strip() if isinstance(v, str) else v for key, v in clip.items()} for clip in clips]
    if path.suffix.lower() not in (".csv", ".tsv"):
        stop(f"--clips {path}: expected a .jsonl, VGGSound's .csv or MMAudio's .tsv")
    return clips_of_table(path)


def without_odd_names(clips, strict):
    """Those that can be named by their videos. The others are said, or with `strict` refused."""
    odd = [clip["video"] for clip in clips if not common.NAME.holds(clip["id"])]
    if odd:
        rule = "not in UTF-8, of more than 200 bytes, or with a backslash or a line break"
        said = f"{len(odd)} videos have names that no clip can have ({rule}), first {odd[0]!a}"
        if strict or len(odd) == len(clips):
            stop(f"{said}; rename them")
        print(f"{said}; they are left out until they are renamed")
    return [clip for clip in clips if common.NAME.holds(clip["id"])]


def check_clips(clips, where):
    """Ids are unique file names, one split each; YouTube ids that recur across splits are listed, since one video's
    clips sound alike. Labels that nearly equal another are said: PESQ, and the class of an audio, go by them."""
    split_of, splits_of = {}, defaultdict(set)  # by id; by YouTube id
    for i, clip in enumerate(clips, 1):
        name, split = clip["id"], clip.setdefault("split", "train")
        if name in split_of:
            twice = f"in both {split_of[name]} and {split}" if split_of[name] != split else "twice"
            stop(f"{where}, clip {i}, field 'id': {name} occurs {twice}; keep one")
        split_of[name] = split
        splits_of[name[:11] if len(name) == 18 and name[11] == "_" else name].add(split)
    shared = sorted(video for video, splits in splits_of.items() if len(splits) > 1)
    if shared:
        print(f"{len(shared)} YouTube ids occur in more than one split:", *shared[:10], "..." * (len(shared) > 10))
    plain = lambda label: re.sub(r"\W+", " ", label).strip().lower()  # noqa: E731
    known = {plain(label): label for label in common.HUMAN_SPEECH_CLASSES}
    for label, count in Counter(clip["label"] for clip in clips if clip.get("label")).most_common():
        near = known.setdefault(plain(label), label)
        if near == label:
            near = next(iter(difflib.get_close_matches(label, common.HUMAN_SPEECH_CLASSES, 1, 0.9)), label)
        if near != label:
            print(f"label {label!r} ({count} clips) is nearly, but not, {near!r}")
    has = {key: sum(bool(clip.get(key)) for clip in clips) for key in ("caption", "label")}
    print(f"clips: {len(clips)}, with caption {has['caption']}, with label {has['label']}")


def gather_clips(args):
    """From the user's list: every clip of it, the lines of clips.jsonl (videos that exist) and of 01_missing.jsonl."""
    where, root = " and ".join(filter(None, (args.clips or args.videos, args.test_list))), Path(args.videos).resolve()
    clips = listed_clips(args)
    if args.test_list:
        test, known = clips_of_table(Path(args.test_list)), {clip["id"]: clip for clip in clips}
        wanted = {clip["id"] for clip in test}
        clips = [clip for clip in clips if clip.get("split") != "test" and clip["id"] not in wanted]
        clips += [{**clip, **known.get(clip["id"], {}), "split": "test"} for clip in test]
    check_clips(clips, where)
    found, missing = [], []
    for clip in clips:
        names = [clip["video"]] if clip.get("video") else [clip["id"] + suffix for suffix in VIDEO_SUFFIXES]
        name = next((n for n in names if common.inside(root, n, f"{where}, clip {clip['id']}").is_file()), None)
        if name is None:
            missing.append({"id": clip["id"], "split": clip["split"], "reason": f"no {names[0]} below {root.name}/"})
        else:
            said = {key: clip.get(key) or None for key in ("caption", "label")}
            found.append({"id": clip["id"], "video": name, **said, "split": clip["split"]})
    if missing and args.strict:
        stop(f"{len(missing)} of {len(clips)} videos are missing, first {missing[0]['id']} ({missing[0]['reason']})")
    have, listed = Counter(c["split"] for c in found), Counter(c["split"] for c in clips)
    print("videos found: " + ", ".join(f"{split} {have[split]} of {listed[split]}" for split in sorted(listed)))
    if not found:
        stop(f"none of the {len(clips)} clips of {where} has a video below {args.videos}: {missing[0]['reason']} ...")
    return found, missing


def prepare_run(run, known, own_clips, model, args):
    """run.json, clips.jsonl and 01_missing.jsonl, or the proof that those of this run are of the same settings."""
    found, missing = ([], []) if own_clips else gather_clips(args)
    given = args.checkpoint and Path(args.checkpoint).resolve()
    settings = dict(model=args.model, checkpoint_digest=model.checkpoint_digest)
    settings |= dict(latent_shape=list(model.latent_shape), sample_rate_hz=model.sample_rate_hz, clip_s=model.clip_s)
    settings |= dict(sampler=dict(steps=args.sampling_steps, guidance=args.guidance), num_samples=args.num_samples)
    settings |= dict(seed=args.seed, max_clips=args.max_clips)
    # Where things lie is kept for the stages to come and for people; what has moved is still the same.
    about = {f"{key}_root": str(Path(x).resolve()) for key, x in (("video", args.videos), ("cavp", args.cavp)) if x}
    if given:
        about["checkpoint"] = str(given)
    elif not own_clips:
        about["checkpoint"] = "upstream"
    if given and (beside := given.with_name("run.json")).is_file():  # a world's model keeps its scorers
        world = common.read_json(beside, {key: common.WORLD[key] for key in ("defaults", "scorers")})
        about |= {key: world[key] for key in ("defaults", "scorers") if key in world}
        about |= {"scorers_root": str(given.parent)} if "scorers" in world else {}

    advice, listed = "use another --run-dir, or remove this one", run / "clips.jsonl"
    if (run / "01_settings.json").exists():
        before = common.read_json(run / "01_settings.json", common.RECORD)["settings"]
        if before.get("model") == args.model and before.get("checkpoint_digest") != model.checkpoint_digest:
            stop(f"{model.checkpoint}: not the checkpoint that {run} was made with; give that one, or {advice}")
    prepared = known.get("max_clips") == 0  # a run that --max-clips 0 prepared may get its train clips later
    if prepared:
        may_change = {key: known.get(key) for key in ("max_clips", "clips_digest")}
        common.claim(run, "01_settings.json", settings | may_change, advice=advice)
    if prepared or not listed.exists():
        common.write_jsonl(run / "01_missing.jsonl", missing)
        common.write_jsonl(listed, found)
    elif not own_clips:  # the run keeps its list: its audios are made from it
        own, now = ({clip["id"] for clip in clips} for clips in (common.read_jsonl(listed, common.CLIP), found))
        if own != now:
            print(f"{listed} stays as it is: {len(now - own)} videos appeared since, {len(own - now)} vanished")
    settings |= dict(clips_digest=common.digest(listed))
    common.claim(run, "01_settings.json", settings, redo=prepared, advice=advice)
    common.write_json(run / "run.json", {**known, **settings, **about})


# ------------------------------------------------------------------------------------------------------------
# Audios out
# ------------------------------------------------------------------------------------------------------------


def encode(model, clip, videos):
    """The clip's features, or the reason why it has none. videos: an iterator over what `model.read` sees."""
    seen = next(videos)
    return str(seen) if isinstance(seen, SkipClip) else model.encode(clip, seen)


def holds_tensors(file, rows):
    """Whether a shard's .pt is the one that was written with these lines. Its directory is at its
    end, so one that was cut cannot be opened. Rows are checked when they are read (`common.Shards`)."""
    if not file.exists():
        return False
    try:
        shard = common.load_pt(file, mmap=True)  # 3 ms, however large it is
    except common.Stop:
        return False
    return "crc32" in shard and shard["digests"] == [row["digest"] for row in rows]


def is_whole(folder, shard, clips, heard):
    """Whether each clip of a shard is used or skipped, its latents and wavs there. heard: names of the run's wavs."""
    lines, skipped = folder / f"{shard}.jsonl", folder / f"{shard}.skipped.jsonl"
    if not lines.exists():
        return False
    rows = common.read_jsonl(lines, common.SAMPLE)
    unused = common.read_jsonl(skipped, common.SKIPPED) if skipped.exists() else []
    if {row["clip"] for row in rows + unused} != {clip["id"] for clip in clips}:
        return False
    if not {Path(row["wav"]).name for row in rows} <= heard:
        return False
    return not rows or holds_tensors(folder / f"{shard}.pt", rows)


def generate_shard(model, clips, encoded, folder, shard, args):
    """Samples, decodes and writes one shard; its .jsonl comes last, so that a shard that has one is whole."""
    usable = [(clip, features) for clip, features in zip(clips, encoded) if isinstance(features, dict)]
    skipped = [{"clip": c["id"], "reason": reason} for c, reason in zip(clips, encoded) if isinstance(reason, str)]
    rows, waiting, n = [], [], args.num_samples

    def write(lines, a_0):  # while the next batch is sampled
        for line, wave, latent in zip(lines, model.decode(a_0), a_0 := a_0.float().cpu()):
            about = common.write_audio(Path(args.run_dir) / line["wav"], wave, model.sample_rate_hz)
            line.update(about, finite=about["finite"] and bool(latent.isfinite().all()))
        return a_0

    with ThreadPoolExecutor(1) as codec:
        for start in range(0, len(usable), args.batch_clips):
            batch = usable[start : start + args.batch_clips]
            features = {key: torch.stack([f[key] for _, f in batch]).to(model.device) for key in batch[0][1]}
            # Sampled k-major (all first audios, then all second), so that a clip's N audios share its conditions.
            seeds = [common.seed_of(args.seed, clip["id"], k) for k in range(n) for clip, _ in batch]
            a_0 = common.sample(model, features, seeds, args.sampling_steps, args.guidance)
            a_0 = a_0.unflatten(0, (n, len(batch))).transpose(0, 1).flatten(0, 1)  # (clips * N, T, C): clip-major
            for i, (clip, _) in enumerate(batch):
                for k, seed in enumerate(seeds[i :: len(batch)]):
                    wav = f"01_audio/{clip['id']}_{k}.wav"
                    rows.append({"clip": clip["id"], "k": k, "seed": seed, "wav": wav, "row": len(rows)})
            waiting.append(codec.submit(write, rows[-len(a_0) :], a_0))
    if usable:
        latents = torch.cat([a_0.result() for a_0 in waiting])
        features = {key: torch.stack([f[key] for _, f in usable]) for key in usable[0][1]}
        common.save_shard(folder / f"{shard}.pt", latents, features, [row["digest"] for row in rows])
    unused = folder / f"{shard}.skipped.jsonl"
    if skipped or unused.exists():  # of an earlier, damaged shard
        common.write_jsonl(unused, skipped)
    common.write_jsonl(folder / f"{shard}.jsonl", rows)


def main(args):
    # -- setup
    rank, world, device = ranks = common.setup_ranks()
    run, folder = Path(args.run_dir), Path(args.run_dir) / "01_samples"
    known = common.read_run(run, common.WORLD) if (run / "run.json").exists() else {}
    args.model = args.model or known.get("model")
    own_clips = (run / "00_settings.json").exists()  # stage 00 wrote clips.jsonl itself
    refusals = [
        (own_clips and not args.model, f"{run}: stage 00 has not finished; run it again with --run-dir {run}"),
        (own_clips and not (run / "clips.jsonl").exists(), f"{run}/clips.jsonl: gone; run 00_toy_world.py again"),
        (not args.model, f"--run-dir {run} is new: give --model (or run stage 00 first for the toy world)"),
        (own_clips and (args.clips or args.videos), f"--clips, --videos: {run} has stage 00's; use another --run-dir"),
        (not own_clips and not args.videos, "--videos: name the videos' folder, also when you run a command again"),
        (args.videos and not Path(args.videos).is_dir(), f"--videos {args.videos}: no such folder"),
        ((args.cavp is None) == (args.model == "frieren"), "--cavp: give CAVP features to Frieren, and to no other"),
    ]
    for why in [why for refused, why in refusals if refused]:
        stop(why)
    if args.max_clips == 0:  # all that any stage will ask for, said at once
        common.print_missing(args.weights, common.files_of(args.model, args.checkpoint))
    checkpoint = args.checkpoint or (run / known["checkpoint"] if own_clips else None)
    model = common.load_model(args.model, checkpoint, device, args.weights)
    if args.compile:
        model.compile_sampling()
    common.say_memory(model, args, device, 0, 2 * args.batch_clips * args.num_samples, frozen=("codec", "encoders"))

    # -- data
    common.hold(run, "01", ranks)
    if rank == 0:
        prepare_run(run, known, own_clips, model, args)
    common.barrier()
    train = common.read_clips(run, "train")
    if len(train) > args.max_clips:
        train = [train[i] for i in sorted(random.Random(args.seed).sample(range(len(train)), args.max_clips))]
    blocks = [train[i : i + SHARD_CLIPS] for i in range(0, len(train), SHARD_CLIPS)]
    heard = {wav.name for wav in (run / "01_audio").glob("*.wav")}
    todo = [i for i, block in enumerate(blocks) if not is_whole(folder, f"{i:05d}", block, heard)][rank::world]
    common.barrier()  # every rank has seen the same

    # -- loop: workers decode video ahead; the next shard is encoded, the last batch written, while one is sampled
    if todo:
        model.decode(torch.zeros(1, *model.latent_shape))  # a missing codec is said now, not after the first shard
    videos = common.read_ahead(model.read, [clip for i in todo for clip in blocks[i]], args.workers)
    ahead = ThreadPoolExecutor(1)
    queue = {i: (ahead.submit(encode, model, clip, videos) for clip in blocks[i]) for i in todo}  # when listed
    try:
        waiting = [*queue[todo[0]]] if todo else []
        for i, following in zip(tqdm(todo, unit="shard", disable=rank > 0), [*todo[1:], None]):
            encoded = [future.result() for future in waiting]
            waiting = [*queue.get(following, ())]
            if args.strict and (bad := [(c["id"], e) for c, e in zip(blocks[i], encoded) if isinstance(e, str)]):
                stop(f"--strict: {len(bad)} clips of shard {i:05d} cannot be used, first {bad[0][0]}: {bad[0][1]}")
            generate_shard(model, blocks[i], encoded, folder, f"{i:05d}", args)
    finally:
        ahead.shutdown(cancel_futures=True)  # Ctrl-C need not wait for the clips that queue
        with suppress(ValueError):  # Ctrl-C as that thread starts: it is not waited for, and may still read
            videos.close()
    common.barrier()

    # -- report
    if rank == 0 and not train:
        print(f"prepared {run}, no train clips\nnext: python 07_evaluate.py --run-dir {run} --only --systems NAME=DIR")
    elif rank == 0:
        skipped = [row for f in sorted(folder.glob("*.skipped.jsonl")) for row in common.read_jsonl(f, common.SKIPPED)]
        print(f"train clips: {len(train)} in, {len(train) - len(skipped)} used, {len(skipped)} skipped")
        for reason, count in Counter(row["reason"] for row in skipped).most_common(20):
            print(f"  {count} x {reason}, e.g. {next(r['clip'] for r in skipped if r['reason'] == reason)}")
        if len(skipped) == len(train):
            stop(f"no train clip of {run} could be used; the reasons are above and in {folder}/*.skipped.jsonl")
        samples = [row for rows in common.read_samples(run).values() for row in rows]
        broken, silent = sum(not r["finite"] for r in samples), sum(r["peak"] < common.SILENT_PEAK for r in samples)
        print(f"audios: {len(samples)}, {broken} not finite (never used in a pair), {silent} silent")
        if max(broken, silent) > 0.01 * len(samples):
            print("warning: more than 1 % of the audios are broken: look at the checkpoint, --guidance and precision")
        print(f"next: python 02_fit_audioscore.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
