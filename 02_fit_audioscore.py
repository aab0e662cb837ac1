"""Stage 02: AudioScore, five frozen scores and a small MLP fitted to human ratings (Sec. 2.1).

Run:
    python 02_fit_audioscore.py                               # toy world: simulated raters answer
    python 02_fit_audioscore.py --run-dir runs/vgg                # writes 02_to_rate.csv; rate it, then run again with
    python 02_fit_audioscore.py --run-dir runs/vgg --ratings ann.csv packs/rate_*.csv
    torchrun --standalone --nproc_per_node 8 02_fit_audioscore.py ...    # scoring is divided over the GPUs

Reads:
    01_samples/, 01_audio/      stage 01's audios
    --ratings or 02_ratings.jsonl   clip, k, rating (Good, Medium or Bad; an empty cell in a csv is not rated), rater;
                                if known repeat (1: asked once more, to see how steady the rater is), seconds, comment.
                                From elsewhere: audio, video, caption, label instead of clip, k (docs/people.md)
Writes:
    02_to_rate.csv              the audios of --num-rated-clips random train clips: clip, k, wav, video, caption, rating
    02_ratings.jsonl            the answers, validated
    scores/*.pt                 what every scorer said, by shard of stage 01: the store that stages 03 and 07 share
    02_scores.jsonl             clip, k, ib (cosine), clap (cosine), desync_s (seconds), is_nats (nats), pesq (MOS-LQO),
                                null where a score does not apply; rating (majority, the worse of a tie)
    02_elsewhere.jsonl          the same of the audios from elsewhere, k being the file, which no later stage reads
    02_audioscore.pt            audioscore: the state dict of common.AudioScore (MLP, standardiser, marginal p(y));
                                heldout: p (n, 3) float32 and rating (n,) int64 of the cross-validated report
Takes: toy 11 s on 2 cores.
"""

import random
from collections import Counter, defaultdict
from pathlib import Path

import torch

import common
from common import RATINGS, SCORES, AudioScore, number, stop

FOLDS = 5


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument("--ratings", nargs="+", help="answers to 02_to_rate.csv (.csv, .jsonl); else 02_ratings.jsonl")
    io.add_argument("--ratings-root", help="folder of the files that ratings from elsewhere name as audio and video")
    io.add_argument("--exclude-rater", nargs="+", action="extend", default=[], help="names whose answers do not count")
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    io.add_argument("--redo", action="store_true", help="replace this stage's outputs; what is scored stays cached")
    paper = parser.paper
    paper.add_argument("--num-rated-clips", type=number(int, 2), default=2000, help="clips to rate [Sec. 2.1]")
    engineering = parser.engineering
    engineering.add_argument("--seed", type=number(int, 0), default=0, help="of the draw, the folds and the fit")
    common.workers_flag(parser)
    return common.parse(parser, argv, "02")


# ------------------------------------------------------------------------------------------------------------
# Ratings
# ------------------------------------------------------------------------------------------------------------


def draw_rated_clips(samples, count, seed):
    """A seeded random draw of train clips, in order of their names."""
    names = sorted(samples)
    return sorted(random.Random(seed).sample(names, min(count, len(names))))


def rating_sheet(rated, samples, clips):
    """Header and rows of 02_to_rate.csv."""
    audios = [(clip, row) for clip in rated for row in samples[clip]]
    rows = [(c, r["k"], r["wav"], clips[c]["path"], common.as_cell(clips[c]["caption"]), "", "") for c, r in audios]
    return ("clip", "k", "wav", "video", "caption", "rating", "rater"), rows


def read_ratings(paths, samples, root=None):
    """Every answer, checked: [{clip, k, rating, rater, and what is known of repeat, seconds, comment}], and of audio
    below root that is not this run's what `from_elsewhere` says."""

    def answer(row, where):
        if row.get("audio"):
            about = common.from_elsewhere(row, root, where)
        else:
            about = {"clip": row.get("clip"), "k": common.sample_index(row, samples, where)}
        rating = common.meant(row["rating"], RATINGS, where, "rating")
        return (about["clip"], about["k"]), about | {"rating": rating}

    return common.read_answers(paths, "rating", answer)


def rated_audios(answers):
    """Answers of several raters -> {(clip, k): (3,) share of Good, Medium, Bad}, in order of their names."""
    counts = defaultdict(lambda: torch.zeros(len(RATINGS)))
    for answer in answers:
        counts[answer["clip"], answer["k"]][RATINGS.index(answer["rating"])] += 1
    return {key: count / count.sum() for key, count in sorted(counts.items())}


def majority(target):
    """(3,) or (n, 3) shares -> class index; of a tie, the worse."""
    return len(RATINGS) - 1 - target.flip(-1).argmax(dim=-1)


# ------------------------------------------------------------------------------------------------------------
# Ratings from elsewhere: of audio that is not this run's, never mined nor tested on
# ------------------------------------------------------------------------------------------------------------


def film(answer, root):
    """Which video a rated audio belongs to, whatever its caption."""
    return video_of(str((root / answer["video"]).with_suffix("")) if "audio" in answer else answer["clip"])


def without_own_videos(answers, clips, root):
    """The answers less those from elsewhere whose video this run mines or tests on, which are counted."""
    own = {video for clip in clips for video in (video_of(clip["id"]), str(clip["path"].with_suffix("")))}
    kept = [answer for answer in answers if "audio" not in answer or film(answer, root) not in own]
    if len(kept) < len(answers):
        print(f"left out: {len(answers) - len(kept)} ratings from elsewhere, of videos that this run mines or tests on")
    return kept


def audios_from_elsewhere(run, answers, root):
    """{(clip, k): common.Audio}, its group in the store by its clip, so that a video is encoded once."""
    rows = {(answer["clip"], answer["k"]): answer for answer in answers if "audio" in answer}
    weigh = lambda path: {"digest": common.digest(path)}  # noqa: E731
    paths, audios = [root / k for _, k in rows], {}
    about = common.remembered(run, "rated", paths, dict(digest=common.TEXT), weigh)
    for (name, k), row in rows.items():
        clip = dict(id=name, path=root / row["video"], caption=row.get("caption"), label=row.get("label"))
        group = name[: len("elsewhere_00")]
        audios[name, k] = common.Audio(clip, root / k, about[root / k]["digest"], group)
    return audios


# ------------------------------------------------------------------------------------------------------------
# The MLP (cross entropy, Sec. 2.1)
# ------------------------------------------------------------------------------------------------------------


def fit(found, target, seed, steps=200):
    """Fits AudioScore on the given audios: standardiser, marginal p(y), then cross entropy on the raters' shares.

    found: cached scores of n audios; target: (n, 3). Paper silent: the optimizer. Full-batch AdamW, lr 3e-3, weight
    decay 0.3, 200 steps: of six settings the best cross-validated log-loss in the toy world.
    """
    logits = found["panns"]["logits"]
    torch.manual_seed(seed)
    audioscore = AudioScore(tags=logits.shape[1])
    audioscore.p_y.copy_(logits.softmax(dim=-1).mean(dim=0))
    scores = common.five_scores(found, audioscore)
    mean = scores.nanmean(dim=0).nan_to_num(nan=0.0)
    std = (scores - mean).square().nanmean(dim=0).sqrt().nan_to_num(nan=1.0)
    audioscore.mean.copy_(mean)
    audioscore.std.copy_(torch.where(std > 1e-6, std, 1.0))  # a score without spread stays unscaled
    optimizer = torch.optim.AdamW(audioscore.parameters(), lr=3e-3, weight_decay=0.3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(audioscore.logits(scores), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return audioscore.eval().requires_grad_(False)


def video_of(clip):
    """The YouTube id of `<youtube id>_<start second>`; any other id, or path, stands for itself."""
    name = Path(clip).name
    return name[:11] if len(name) == 18 and name[11] == "_" else clip


def select(found, rows):
    return {name: {key: value[rows] for key, value in part.items()} for name, part in found.items()}


def cross_validate(found, target, videos, seed):
    """p (n, 3) of every audio from a fit that saw no other of the same video; videos: the name of each audio's."""
    names = sorted(set(videos))
    random.Random(seed).shuffle(names)
    fold_of = {name: i % min(FOLDS, len(names)) for i, name in enumerate(names)}
    fold, p = torch.tensor([fold_of[video] for video in videos]), torch.full((len(videos), len(RATINGS)), float("nan"))
    for i in sorted(set(fold.tolist())):
        rest, held = (fold != i).nonzero().flatten(), (fold == i).nonzero().flatten()
        audioscore = fit(select(found, rest), target[rest], seed)
        p[held] = audioscore(common.five_scores(select(found, held), audioscore)).float()
    return p


def report(p, truth):
    """Prints accuracy against the majority class, the confusion matrix, and calibration of P(Good)."""
    guess = p.argmax(dim=-1)
    shares = truth.bincount(minlength=len(RATINGS)) / len(truth)
    accuracy = (guess == truth).float().mean()
    print(f"held-out clips ({FOLDS}-fold, {len(truth)} audios): accuracy {accuracy:.3f}, ", end="")
    print(f"majority class ({RATINGS[shares.argmax()]}) {shares.max():.3f}")
    print("  rated \\ predicted " + "".join(f"{name:>8}" for name in RATINGS))
    for i, name in enumerate(RATINGS):
        print(f"  {name:>17} " + "".join(f"{int(((truth == i) & (guess == j)).sum()):>8}" for j in range(len(RATINGS))))
    good, edges = p[:, 0], torch.linspace(0, 1, 6)
    print("  calibration of P(Good): predicted -> rated Good (audios)")
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (good >= low) & ((good < high) | (high == 1))
        if inside.any():
            mean, rate = good[inside].mean(), (truth[inside] == 0).float().mean()
            print(f"    {low:.1f}-{high:.1f}: {mean:.2f} -> {rate:.2f} ({int(inside.sum())})")


def main(args):
    # -- setup
    ranks = common.setup_ranks()
    run = Path(args.run_dir)
    common.read_run(run)
    common.hold(run, "02", ranks)
    samples = common.read_samples(run)
    everything = common.read_clips(run)
    clips = {clip["id"]: clip for clip in everything if clip["split"] == "train"}
    root = Path(args.ratings_root).resolve() if args.ratings_root else None
    rated = draw_rated_clips(samples, args.num_rated_clips, args.seed)

    # -- data: who answers
    answers_file = run / "02_ratings.jsonl"
    sources = args.ratings or [answers_file]
    if ranks.rank == 0:
        common.write_sheet(run / "02_to_rate.csv", *rating_sheet(rated, samples, clips), "rating")
        asked = {(clip, row["k"]) for clip in rated for row in samples[clip]}
        if not args.ratings and common.to_simulate(run, answers_file, asked, ("clip", "k"), args.redo):
            audios = [(clips[c], row["k"], run / row["wav"]) for c in rated for row in samples[c]]
            common.write_jsonl(answers_file, common.people_of(run).simulated_ratings(run, audios, args.seed))
    common.barrier()
    if not args.ratings and not answers_file.exists():
        count = sum(len(samples[clip]) for clip in rated)
        if len(rated) == len(samples):
            print("warning: that is every clip, and rated clips are not mined: lower --num-rated-clips to keep some")
        print(f"wrote {run / '02_to_rate.csv'}: {count} audios of {len(rated)} clips")
        print(f"Fill its column 'rating' ({', '.join(RATINGS)}), or have pages made for it:")
        print(f"      python 08_listen.py rate --run-dir {run}")
        print(f"next: python 02_fit_audioscore.py --run-dir {run} --ratings FILE")
        return
    answers = read_ratings(sources, samples, root)
    heard = without_own_videos(common.without_raters(answers, args.exclude_rater), everything, root)
    counted = [answer for answer in heard if "repeat" not in answer]
    video = {(answer["clip"], answer["k"]): film(answer, root) for answer in counted}
    if len({*video.values()}) < 2:
        needed = "at least 2 are needed, AudioScore is fitted on some, checked on others"
        stop(f"{common.named(sources)}: ratings of one video; {needed}")
    if ranks.rank == 0:
        settings = dict(num_rated_clips=args.num_rated_clips, seed=args.seed, audioscore=list(SCORES))
        settings |= dict(exclude_rater=sorted(args.exclude_rater) or None)
        if args.ratings:
            common.keep_answers(answers_file, answers, sources, args.redo)
        inputs, scores = ("01_samples", "02_ratings.jsonl"), ("02_scores.jsonl", "02_elsewhere.jsonl")
        common.claim(run, "02_settings.json", settings, inputs, args.redo, outputs=("02_audioscore.pt", *scores))

    # -- scores
    target_of = rated_audios(counted)
    audio_of = audios_from_elsewhere(run, counted, root)
    for row in (row for rows in samples.values() for row in rows):
        audio = common.Audio(clips[row["clip"]], run / row["wav"], row["digest"], row["shard"])
        audio_of[row["clip"], row["k"]] = audio
    audios = [audio_of[key] for key in target_of]
    common.fill_store(run, audios, common.AUDIOSCORE_SCORERS, args.weights, ranks, args.workers)
    if ranks.rank > 0:
        return
    found = common.stored_scores(run, audios, common.AUDIOSCORE_SCORERS, args.weights)
    target = torch.stack([*target_of.values()])

    # -- fit, report, save
    common.report_raters(heard, lambda a: (a["clip"], a["k"]), lambda a: RATINGS.index(a["rating"]), "ordinal")
    names = {clip for clip, _ in target_of}
    print(f"ratings: {len(counted)} of {len(target_of)} audios of {len(names)} clips, ", end="")
    print(", ".join(f"{name} {count}" for name, count in Counter(a["rating"] for a in counted).most_common()))
    p = cross_validate(found, target, [video[key] for key in target_of], args.seed)
    report(p, majority(target))
    audioscore = fit(found, target, args.seed)
    scores = common.five_scores(found, audioscore)
    judged = zip(target_of, scores, majority(target).tolist())
    lines = [common.score_line(clip, k, row, rating=RATINGS[rating]) for (clip, k), row, rating in judged]
    others = [line for line in lines if line["clip"] not in samples]
    common.write_jsonl(run / "02_scores.jsonl", [line for line in lines if line["clip"] in samples])
    if others:
        common.write_jsonl(run / "02_elsewhere.jsonl", others)
    heldout = {"p": p, "rating": majority(target)}
    common.save_pt(run / "02_audioscore.pt", {"audioscore": audioscore.state_dict(), "heldout": heldout})
    common.seal(run, "02_settings.json", ("02_audioscore.pt", "02_scores.jsonl"))
    print(f"wrote {run / '02_audioscore.pt'}")
    print(f"next: python 03_mine_pairs.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
