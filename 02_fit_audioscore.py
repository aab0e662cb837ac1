"""Stage 02: AudioScore, five frozen scores and a small MLP fitted to human ratings (Sec. 2.1).

Run:
    python 02_fit_audioscore.py                    # toy world: simulated raters answer
    python 02_fit_audioscore.py --run-dir runs/vgg # writes 02_to_rate.csv; rate it, then run again:
    python 02_fit_audioscore.py --run-dir runs/vgg --ratings ann.csv packs/rate_*.csv
    torchrun --standalone --nproc_per_node 8 02_fit_audioscore.py ...  # scoring, over the GPUs
    python 02_fit_audioscore.py --run-dir runs/mine --audioscore runs/vgg/02_audioscore.pt
                                                   # nobody has rated: another run's AudioScore

The five scores of an audio (networks: adapters/scorers.py; the toy world's own: adapters/toy.py):

    score_1  ib        cosine of ImageBind's video and audio embeddings, each a mean: of several
                       crops of the video, of three windows of 2 s of the audio
    score_2  clap      cosine of LAION-CLAP's caption and audio embeddings; only with a caption
                       (the paper cites Microsoft's CLAP; docs/choices.md says why not that one)
    score_3  desync_s  Synchformer's |audio-video offset| in seconds
    score_4  is_nats   KL(p(y|a) || p(y)) in nats, y: the tags of PANNs at 32 kHz; the audio's part
                       of an inception score (stage 07's IS is by PANNs at 16 kHz)
    score_5  pesq      PESQ against the clip's own sound, MOS-LQO; only for clips of human speech,
                       and not where that sound itself is scored. Paper silent: what PESQ compares
                       with

AudioScore (common.py) standardises them, replaces a score that does not apply by the mean, and maps
them by Linear(5, 32), ReLU, Linear(32, 3), softmax to p = (Good, Medium, Bad). Paper silent:
whether one AudioScore serves both models. Here each run fits its own, on audios of its own model.

Reads:
    01_samples/, 01_audio/  stage 01's audios
    --ratings or 02_ratings.jsonl   clip, k, rating (Good, Medium or Bad; a row without one is left
                            out), rater; if known repeat (1: the question was asked again, to see
                            how steady the rater is), seconds, comment; k may be a NAME, for audio
                            that another program made and 01 --given NAME=DIR took in
    --audioscore FILE       instead of ratings, the 02_audioscore.pt of another run, whose scorers
                            must have had the same weights. Which clips were rated there is not
                            known here, so stage 03 mines all clips
Writes:
    02_to_rate.csv          the audios of --num-rated-clips random clips of 01_samples, and of all
                            clips of the split `rate`, which a run has only so that people rate
                            given audio of them: clip, k, wav, video, caption, rating, rater
    02_ratings.jsonl        the answers, validated
    02_scores/*.pt          what every scorer measured, one file for each block of 32 drawn clips
    02_scores.jsonl         a line for each rated audio: clip, k, the five scores (null where one
                            does not apply), rating (the majority's; of a tie the worse); empty
                            with --audioscore
    02_audioscore.pt        audioscore: the state dict of common.AudioScore (MLP, mean and std,
                            marginal p(y)); weights: {scorer: digest of its files}; heldout: p
                            (n, 3) float32 and rating (n,) int64 of the cross-validated report,
                            which is absent with --audioscore
Takes: toy 20 s on 2 cores.
"""

import random
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import (
    RATINGS,
    SCORES,
    AudioScore,
    command,
    files,
    inputs,
    people,
    ranks,
    record,
    rows,
    run_flag,
    scoring,
    stop,
)

FOLDS = 5


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    flag = parser.io.add_argument
    described = "files with people's ratings (.csv, .jsonl); without it, 02_ratings.jsonl"
    flag("--ratings", nargs="+", help=described)
    described = "names of raters whose ratings do not count"
    flag("--exclude-rater", nargs="+", action="extend", default=[], help=described)
    flag("--audioscore", metavar="FILE", help="another run's 02_audioscore.pt, instead of ratings")
    flag("--weights", default="weights", help="folder of the downloaded weights")
    described = "replace this stage's results; scores that are still valid are kept"
    flag("--redo", action="store_true", help=described)
    flag = parser.paper.add_argument
    flag("--num-rated-clips", type=command.whole(2), default=2000, help="clips to rate [Sec. 2.1]")
    flag = parser.engineering.add_argument
    described = "seed of the draw of clips, the folds and the fit"
    flag("--seed", type=command.whole(0), default=0, help=described)
    command.workers_flag(parser)
    command.part_flag(parser)
    return command.parse(parser, argv, "02")


# --------------------------------------------------------------------------------------------------
# The fit of AudioScore (cross entropy, Sec. 2.1); the module itself is common.AudioScore
# --------------------------------------------------------------------------------------------------


def fit(measured, target, seed, steps=200):
    """An AudioScore fitted on n audios: first marginal p(y), which the fourth score needs, then
    mean and std, then the MLP by cross entropy. Paper silent: several raters of one audio. The
    target is the shares of their answers.

    measured: what the scorers measured, {ib, clap, desync_s, pesq: (n,), tag_logits: (n, tags)};
    target: (n, 3). Paper silent: the optimizer. Full-batch AdamW, lr 3e-3, weight decay 0.3, 200
    steps had the best cross-validated log-loss of six settings in the toy world.
    """
    torch.manual_seed(seed)
    audioscore = AudioScore(tags=measured["tag_logits"].shape[1])
    audioscore.p_y.copy_(measured["tag_logits"].softmax(dim=-1).mean(dim=0))
    scores = audioscore.five_scores(measured)
    mean = scores.nanmean(dim=0).nan_to_num(nan=0.0)
    std = (scores - mean).square().nanmean(dim=0).sqrt()
    audioscore.mean.copy_(mean)
    # A score that is one value everywhere, or nan, as PESQ without a clip of speech, has no spread
    # to divide by.
    audioscore.std.copy_(torch.where(std > 1e-6, std, 1.0))
    optimizer = torch.optim.AdamW(audioscore.parameters(), lr=3e-3, weight_decay=0.3)
    for _ in range(steps):
        loss = F.cross_entropy(audioscore.logits(scores), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return audioscore.eval().requires_grad_(False)


def select(measured, chosen):
    """What the scorers measured on some audios only. chosen: a mask (n,), or a list of rows."""
    return {name: value[chosen] for name, value in measured.items()}


def cross_validate(measured, target, videos, seed):
    """p (n, 3) of every audio, from an AudioScore that was fitted without any audio of the same
    video. videos: the name of each audio's video."""
    names = sorted(set(videos))
    random.Random(seed).shuffle(names)
    fold_of = {name: i % FOLDS for i, name in enumerate(names)}
    fold = torch.tensor([fold_of[video] for video in videos])
    p = torch.full((len(videos), len(RATINGS)), float("nan"))
    for i in fold.unique():
        audioscore = fit(select(measured, fold != i), target[fold != i], seed)
        p[fold == i] = audioscore(audioscore.five_scores(select(measured, fold == i))).float()
    return p


def print_heldout(p, truth):
    """Accuracy against the majority class, confusion matrix, calibration of P(Good). p: (n, 3);
    truth: (n,) classes."""
    guess = p.argmax(dim=-1)
    shares = truth.bincount(minlength=len(RATINGS)) / len(truth)
    accuracy = (guess == truth).float().mean()
    print(
        f"AudioScore on clips that it was not fitted on ({FOLDS} folds, {len(truth)} audios): "
        f"accuracy {accuracy:.3f}; always answering {RATINGS[shares.argmax()]}: {shares.max():.3f}"
    )
    print("  rated \\ predicted     Good  Medium     Bad")
    for i, name in enumerate(RATINGS):
        good, medium, bad = guess[truth == i].bincount(minlength=len(RATINGS)).tolist()
        print(f"  {name:>17} {good:>8}{medium:>8}{bad:>8}")
    print("  P(Good), in five bins: mean prediction -> share that people rated Good")
    fifth = (p[:, 0] * 5).long().clamp(max=4)
    for i in range(5):
        inside = fifth == i
        if inside.any():
            mean = p[inside, 0].mean()
            rate = (truth[inside] == RATINGS.index("Good")).float().mean()
            bounds = f"{i / 5:.1f}-{(i + 1) / 5:.1f}"
            print(f"    {bounds}: {mean:.2f} -> {rate:.2f} of {int(inside.sum())} audios")


# --------------------------------------------------------------------------------------------------
# Ratings
# --------------------------------------------------------------------------------------------------


def drawn_order(samples, seed):
    """All clips with audio, in random order. The first --num-rated-clips of them are to be rated,
    so that a larger number only adds clips."""
    names = sorted(samples)
    random.Random(seed).shuffle(names)
    return names


def write_rating_sheet(run, on_sheet, samples, clips):
    """02_to_rate.csv."""
    lines = []
    for name in on_sheet:
        clip = clips[name]
        caption = people.as_cell(clip.caption)
        for audio in samples[name]:
            lines.append((name, audio.k, audio.wav, clip.path, caption, "", ""))
    columns = ("clip", "k", "wav", "video", "caption", "rating", "rater")
    people.write_sheet(run / "02_to_rate.csv", columns, lines, "rating")


def take_ratings(run, samples, clips, on_sheet, args):
    """Writes the sheet. In the toy world simulated people answer it. Returns all answers, a list of
    rows.RatingAnswer, after checking that each is about an audio of this run; [] where nobody has
    answered yet."""
    file = run / "02_ratings.jsonl"
    if ranks.is_first():
        write_rating_sheet(run, on_sheet, samples, clips)
        if not args.ratings:
            simulate_ratings(run, file, samples, clips, on_sheet, args)

    def checked(line, where):
        line = dict(line, k=people.known_k(line, samples, where, "k"))
        rating = people.meant(line["rating"], RATINGS, where, "rating")
        return people.typed_answer(dict(line, rating=rating), rows.RatingAnswer, where)

    return people.take_answers(file, args.ratings, "rating", checked, args.redo)


def simulate_ratings(run, file, samples, clips, on_sheet, args):
    """In the toy world: the simulated people's answers to the sheet, where they are to be made."""
    asked = []
    audios = []
    for name in on_sheet:
        for audio in samples[name]:
            asked.append((name, audio.k))
            audios.append((clips[name], audio.k, run / audio.wav))
    simulated = common.people_of(run)
    if simulated and people.must_simulate(file, asked, args.redo):
        rows.write(file, simulated.simulated_ratings(run, audios, args.seed))


def print_how_to_rate(run, on_sheet, samples, is_all_rated, num_rated_clips):
    count = sum(len(samples[name]) for name in on_sheet)
    flags = run_flag(run)
    if is_all_rated:
        print(
            "warning: the sheet asks about every train clip, and stage 03 mines no pair of a rated "
            "clip; give a lower --num-rated-clips"
        )
    else:
        flags += f" --num-rated-clips {num_rated_clips}"
    print(f"wrote {run / '02_to_rate.csv'}: {count} audios of {len(on_sheet)} clips")
    print(f"Fill in its column 'rating' ({', '.join(RATINGS)}), or make pages to rate on:")
    print(f"      python 08_listen.py rate {run_flag(run)}")
    print(f"next: python 02_fit_audioscore.py {flags} --ratings FILE")


def rated_video(clip):
    """The name of the video that a clip is cut from, by which the folds of `cross_validate` and the
    count of rated videos go. The name of a train clip tells it (<youtube id>_<start>); of the split
    rate several clips may name one file, with different captions."""
    if clip.split != rows.RATE_SPLIT:
        return inputs.video_of(clip.id)
    return inputs.video_of(str(clip.path.with_suffix("")))


def class_of(answer):
    return RATINGS.index(answer.rating)


def shares_of(answers):
    """{(clip, k): (3,) shares of its raters who said Good, Medium, Bad}, sorted by (clip, k)."""
    votes = defaultdict(list)
    for answer in answers:
        votes[answer.clip, answer.k].append(class_of(answer))
    shares = {}
    for audio in sorted(votes):
        counts = torch.tensor(votes[audio]).bincount(minlength=len(RATINGS))
        shares[audio] = counts / len(votes[audio])
    return shares


def majority(target):
    """(n, 3) shares -> (n,) the class with the largest share; of a tie the last, worse class."""
    is_most = target == target.amax(dim=-1, keepdim=True)
    return (is_most * torch.arange(len(RATINGS))).amax(dim=-1)


# --------------------------------------------------------------------------------------------------
# What the scorers say of the rated clips
# --------------------------------------------------------------------------------------------------


def rated_blocks(run, order, samples, clips, answers):
    """The blocks to score. All train clips are cut into blocks of 32 in the order of the draw, all
    clips of the split rate in their own order; a block in which any audio is rated is scored as a
    whole. A score depends a little on the audios beside it; as blocks never change, one more rating
    changes no other audio's score. samples: the audios of both."""
    rated_clips = {answer.clip for answer in answers}
    train = set(order)
    of_split_rate = [name for name in samples if name not in train]
    blocks = []
    for prefix, names in (("", order), ("to_rate_", of_split_rate)):
        for start in range(0, len(names), scoring.BLOCK_CLIPS):
            block_clips = names[start : start + scoring.BLOCK_CLIPS]
            if not rated_clips.isdisjoint(block_clips):
                name = f"{prefix}{start // scoring.BLOCK_CLIPS:05d}"
                blocks.append(rated_block(run, name, block_clips, samples, clips))
    return blocks


def rated_block(run, name, block_clips, samples, clips):
    folder = run / "02_scores"
    block = scoring.Block(name, scores_folder=folder, videos_folder=folder, clips=[], audios=[])
    for clip in block_clips:
        block.clips.append(clips[clip])
        block.audios.extend(inputs.audio_of(run, clips[clip], sample) for sample in samples[clip])
    return block


def read_measured(rated, blocks, scorers):
    """What the scorers measured on the rated audios, in the form that `fit` takes. rated: (clip, k)
    of each, whose order is kept."""
    # From {"imagebind": {"ib": (n,)}, "panns": {"logits": (n, tags)}, ...}
    by_scorer = scoring.read_scores(blocks, scorers, scorers.of_audioscore)
    # to {"ib": (n,), "tag_logits": (n, tags), ...}.
    measured = scorers.audioscore_inputs(by_scorer)
    scored = [(audio.clip.id, audio.k) for block in blocks for audio in block.audios]
    row_of = {audio: row for row, audio in enumerate(scored)}
    return select(measured, [row_of[audio] for audio in rated])


def write_scores(run, rated, scores, truth):
    """02_scores.jsonl. scores: (n, 5); truth: (n,) classes."""
    lines = []
    for (clip, k), five, rating in zip(rated, scores, truth.tolist()):
        about = {"clip": clip, "k": k, "rating": RATINGS[rating], **rows.score_fields(SCORES, five)}
        lines.append(rows.RatedScore(**about))
    rows.write(run / "02_scores.jsonl", lines)


# --------------------------------------------------------------------------------------------------
# Another run's AudioScore
# --------------------------------------------------------------------------------------------------


def take_audioscore(run, outputs, here, args):
    """Takes 02_audioscore.pt from --audioscore FILE, without ratings, after checking that this
    run's scorers have the weights that it was fitted with."""
    file = Path(args.audioscore)
    if args.ratings or args.exclude_rater or here.part:
        stop("--audioscore: not with --ratings, --exclude-rater or --part, since nothing is fitted")
    if file.resolve() == (run / "02_audioscore.pt").resolve():
        stop(f"--audioscore {file}: is this run's own; name another run's")
    audioscore = AudioScore.load(file)
    weights = weights_of(file)
    scorers = common.scorers_of(run, args.weights)
    ours = {name: scorers.digest(name) for name in scorers.of_audioscore}
    for name in dict.fromkeys([*ours, *weights]):
        fitted = weights.get(name, "absent")
        found = ours.get(name, "absent")
        if fitted != found:
            stop(
                f"{file}: fitted on other scorers, the weights of {name} are {fitted} there and "
                f"{found} here; put those into {scorers.root}, or have audios of this run rated"
            )
    # 01_samples is no input: this AudioScore depends on no audio of this run, and also serves a run
    # without train clips.
    with record.stage(run, "02", [], outputs, args.redo) as stage:
        stage.claim({"audioscore": list(SCORES), "audioscore_file": files.digest(file)})
        if here.first:
            rows.write(run / "02_scores.jsonl", [])
            taken = {"audioscore": audioscore.state_dict(), "weights": weights}
            files.save_pt(run / "02_audioscore.pt", taken)
    print(f"took {file}: the scorers' weights here are those that it was fitted on")
    print("no held-out accuracy: no ratings of this run say how well it fits its audios")
    print(f"wrote {run / '02_audioscore.pt'}")
    following = "03_mine_pairs.py" if inputs.shards_of(run) else "07_evaluate.py"
    print(f"next: python {following} {run_flag(run)}")


def weights_of(file):
    """{scorer: digest of its files} for the scorers that an AudioScore was fitted on."""
    weights = files.load_pt(file).get("weights")
    if isinstance(weights, dict) and all(isinstance(held, str) for held in weights.values()):
        return weights
    stop(
        f"{file}: does not say which weights its scorers had, as those of older versions; run "
        "02_fit_audioscore.py again there"
    )


def main(args):
    # -- setup
    here = ranks.setup(args.part)
    run = Path(args.run_dir)
    run_json = inputs.read_run(run)
    outputs = ["02_audioscore.pt", "02_scores.jsonl"]
    if args.audioscore:
        take_audioscore(run, outputs, here, args)
        return
    with record.stage(run, "02", ["01_samples"], outputs, args.redo, part=here.part) as stage:
        train = inputs.read_samples(run)
        of_split_rate = inputs.read_rate_split(run)
        samples = train | of_split_rate
        clips = inputs.read_clips(run, "train") + inputs.read_clips(run, rows.RATE_SPLIT)
        clips = {clip.id: clip for clip in clips}
        scorers = common.scorers_of(run, args.weights)

        # -- people rate
        order = drawn_order(train, args.seed)
        is_all_rated = args.num_rated_clips >= len(train)
        on_sheet = [*order[: args.num_rated_clips], *of_split_rate]
        with stage.one_at_a_time():
            answers = take_ratings(run, samples, clips, on_sheet, args)
        if not answers and here.part:
            stop("--part: nobody has rated yet, so that there is nothing to score; give --ratings")
        if not answers:
            print_how_to_rate(run, on_sheet, samples, is_all_rated, args.num_rated_clips)
            return  # the stage is not claimed: nothing is recorded
        kept = people.without_raters(answers, args.exclude_rater)
        counted = [answer for answer in kept if not answer.repeat]  # repeats tell agreement only
        if len({rated_video(clips[answer.clip]) for answer in counted}) < 2:
            source = people.names_of(args.ratings or [run / "02_ratings.jsonl"])
            needed = "at least 2 are needed, to fit AudioScore on some and check it on others"
            stop(f"{source}: all ratings are of one video; {needed}")
        settings = {
            "num_rated_clips": args.num_rated_clips,
            "seed": args.seed,
            "audioscore": list(SCORES),  # so that a changed list of scores needs --redo
            "exclude_rater": sorted(args.exclude_rater),
        }
        stage.claim(settings, ["02_ratings.jsonl"])

        # -- scores
        blocks = rated_blocks(run, order, samples, clips, counted)
        part = here.part_of(blocks)  # without --part: all
        scoring.score(part, scorers, scorers.of_audioscore, run_json.clip_s, here, args.workers)
        if not here.first or here.ends_part():  # the other ranks wait at the end of the stage
            return
        shares = shares_of(counted)
        rated = list(shares)  # the (clip, k) of the rated audios
        measured = read_measured(rated, blocks, scorers)
        target = torch.stack(list(shares.values()))
        truth = majority(target)

        # -- fit
        people.print_agreement(kept, class_of, "ordinal")  # Krippendorff's alpha
        rated_clips = {clip for clip, _ in rated}
        line = f"ratings: {len(counted)} of {len(shares)} audios of {len(rated_clips)} clips"
        for name, count in Counter(answer.rating for answer in counted).most_common():
            line += f", {count} {name}"
        print(line)
        videos = [rated_video(clips[clip]) for clip, _ in rated]
        p = cross_validate(measured, target, videos, args.seed)
        print_heldout(p, truth)
        audioscore = fit(measured, target, args.seed)

        # -- save
        write_scores(run, rated, audioscore.five_scores(measured), truth)
        fitted = {
            "audioscore": audioscore.state_dict(),
            "weights": {name: scorers.digest(name) for name in scorers.of_audioscore},
            "heldout": {"p": p, "rating": truth},
        }
        files.save_pt(run / "02_audioscore.pt", fitted)
    print(f"wrote {run / '02_audioscore.pt'}")
    print(f"next: python 03_mine_pairs.py {run_flag(run)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
