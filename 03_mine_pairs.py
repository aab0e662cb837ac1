"""Stage 03: omni-preference pairs, best versus worst by AudioScore, and human choices (Sec. 2.2, Eq. 1-2).

Run:
    python 03_mine_pairs.py                                   # toy world: simulated choices
    python 03_mine_pairs.py --run-dir runs/vgg                    # writes 03_to_choose.csv for people, goes on without
    python 03_mine_pairs.py --run-dir runs/vgg --choices ann.csv packs/choose_*.csv --redo
    torchrun --standalone --nproc_per_node 8 03_mine_pairs.py ...        # scoring is divided over the GPUs

Reads:
    01_samples/, 02_audioscore.pt, 02_scores.jsonl (the ratings), scores/; 01_audio/ for what is not scored yet
    --choices or 03_human_choices.jsonl   clip, a, b (two k of the clip), choice (a, b or tie), rater;
                                if known repeat (1: asked once more, to see how steady the rater is), seconds, comment
Writes:
    scores/*.pt                 what every scorer said, by shard of stage 01; what stage 02 scored is there already
    03_scores/00012.jsonl       clip, k, the five scores (null where one does not apply), p: [Good, Medium, Bad]
    03_pairs.jsonl              clip, winner, loser (k), p_winner, p_loser: [Good, Medium, Bad]
    03_to_choose.csv            pairs of equally rated audios for people: clip, a, b, wav_a, wav_b, video, choice
    03_human_choices.jsonl, 03_human_pairs.jsonl   the answers, validated; the pairs they make, as 03_pairs.jsonl
Takes: toy 16 s on 2 cores.
"""

import random
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import RATINGS, AudioScore, number, stop

CLIPPED_SHARE = 0.01  # of samples at full scale


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument("--choices", nargs="+", help="answers to 03_to_choose.csv (.csv, .jsonl); else those this run has")
    io.add_argument("--exclude-rater", nargs="+", action="extend", default=[], help="names whose answers do not count")
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    io.add_argument("--redo", action="store_true", help="replace this stage's outputs; what is scored stays cached")
    paper = parser.paper
    paper.add_argument("--num-human-pairs", type=number(int, 0), default=2000, help="pairs for people [Sec. 2.2]")
    paper.add_argument("--min-score-c", type=number(float, -1, 1), default=0.0, help="drop weaker pairs; paper silent")
    engineering = parser.engineering
    engineering.add_argument("--seed", type=number(int, 0), default=0, help="of the draw of comparisons")
    common.workers_flag(parser)
    return common.parse(parser, argv, "03")


# ------------------------------------------------------------------------------------------------------------
# Best versus worst (Eq. 2)
# ------------------------------------------------------------------------------------------------------------


def fault(row):
    """Why an audio may not win: `silent`, `clipped` or None. row: its line of stage 01."""
    if row["peak"] < common.SILENT_PEAK:
        return "silent"
    return "clipped" if row["clipped"] >= CLIPPED_SHARE else None


def select_pair(p, may_win, may_lose):
    """Eq. 2: winner = argmax P(Good), loser = argmax P(Bad). p: [(Good, Medium, Bad), ...] of one clip's N audios;
    may_win, may_lose: indices. Returns (winner, loser) or the reason why the clip makes no pair."""
    if len(may_lose) < 2 or not may_win:
        return "fewer than two usable audios"
    good, bad = max(p[i][0] for i in may_win), max(p[i][2] for i in may_lose)
    winners = [i for i in may_win if p[i][0] == good]
    losers = [i for i in may_lose if p[i][2] == bad]
    if len(winners) > 1 or len(losers) > 1:
        return "tie"
    if winners == losers:
        return "winner is loser"
    return winners[0], losers[0]


def mine(samples, p_of, rated, min_score_c):
    """Pairs of all clips that were not rated, and how many were dropped why."""
    pairs, dropped = [], Counter()
    for clip, rows in samples.items():
        if clip in rated:
            dropped["rated by people"] += 1  # Paper silent: AudioScore was fitted on these clips
            continue
        may_lose = [row["k"] for row in rows if row["finite"]]
        may_win = [row["k"] for row in rows if row["finite"] and fault(row) is None]
        pair = select_pair({row["k"]: p_of[clip, row["k"]] for row in rows}, may_win, may_lose)
        if isinstance(pair, str):
            dropped[pair] += 1
        elif common.score_c(p_of[clip, pair[0]], p_of[clip, pair[1]]) < min_score_c:
            dropped[f"score_c below {min_score_c}"] += 1
        else:
            pairs.append(as_pair(clip, *pair, p_of))
    return pairs, dropped


def as_pair(clip, winner, loser, p_of):
    p_w, p_l = p_of[clip, winner], p_of[clip, loser]
    return {"clip": clip, "winner": winner, "loser": loser, "p_winner": list(p_w), "p_loser": list(p_l)}


# ------------------------------------------------------------------------------------------------------------
# What people compare
# ------------------------------------------------------------------------------------------------------------


def comparisons(samples, ratings, count, seed):
    """Pairs of one rated clip's audios with the same rating, which AudioScore's classes cannot tell apart: what is left
    to prefer is the aesthetic appeal. As many clips as possible first. ratings: lines of 02_scores.jsonl. Returns
    [(clip, a, b), ...]."""
    rating_of = defaultdict(dict)
    for row in ratings:
        rating_of[row["clip"]][row["k"]] = row["rating"]
    usable = {clip: {row["k"] for row in rows if row["finite"]} for clip, rows in samples.items()}
    rng, rounds = random.Random(seed), defaultdict(list)
    for clip in sorted(rating_of):
        equal = [
            (clip, a, b)
            for a, b in combinations(sorted(rating_of[clip]), 2)
            if rating_of[clip][a] == rating_of[clip][b] and {a, b} <= usable.get(clip, set())
        ]
        rng.shuffle(equal)
        for i, pair in enumerate(equal):
            rounds[i].append(pair)
    for i in rounds:
        rng.shuffle(rounds[i])
    return sorted([pair for i in sorted(rounds) for pair in rounds[i]][:count])


def choice_sheet(pairs, samples, clips):
    """Header and rows of 03_to_choose.csv."""
    wav = {(clip, row["k"]): row["wav"] for clip, rows in samples.items() for row in rows}
    rows = [(clip, a, b, wav[clip, a], wav[clip, b], clips[clip]["path"], "", "") for clip, a, b in pairs]
    return ("clip", "a", "b", "wav_a", "wav_b", "video", "choice", "rater"), rows


def read_choices(paths, samples):
    """Every answer, checked: [{clip, a, b, choice, rater, and what is known of repeat, seconds, comment}]."""

    def answer(row, where):
        a, b = (common.sample_index(row, samples, where, x) for x in "ab")
        if a == b:
            stop(f"{where}: a and b are the same audio (k {a})")
        choice = common.meant(row["choice"], ("a", "b", "tie"), where, "choice")
        about = {"clip": row["clip"], "a": a, "b": b, "choice": choice}
        return compared(about), about

    return common.read_answers(paths, "choice", answer)


def compared(answer):
    return answer["clip"], *sorted((answer["a"], answer["b"]))


def chosen(answer):
    """1 for the audio of smaller k, -1 for the other, 0 for a tie."""
    return {"a": 1, "b": -1, "tie": 0}[answer["choice"]] * (1 if answer["a"] < answer["b"] else -1)


def human_pairs(answers, p_of):
    """Majority over raters; ties make no pair."""
    votes = defaultdict(int)
    for answer in answers:
        votes[compared(answer)] += chosen(answer)
    decided = sorted((key, vote) for key, vote in votes.items() if vote != 0)
    return [as_pair(clip, *((a, b) if vote > 0 else (b, a)), p_of) for (clip, a, b), vote in decided]


def judge_everything(run, samples, clips, audioscore, args, ranks):
    """Writes the five scores and p of every audio, shard by shard; returns {(clip, k): p}, on rank 0 alone."""
    shards, p_of, names = defaultdict(list), {}, common.AUDIOSCORE_SCORERS
    for clip, rows in samples.items():
        for row in rows:
            audio = common.Audio(clips[clip], run / row["wav"], row["digest"], row["shard"])
            shards[row["shard"]].append((row["k"], audio))
    audios = [audio for shard in shards.values() for _, audio in shard]
    common.fill_store(run, audios, names, args.weights, ranks, args.workers)
    for shard, rows in tqdm(shards.items(), desc="judge", unit="shard") if ranks.rank == 0 else ():
        scores = common.five_scores(common.stored_scores(run, [a for _, a in rows], names, args.weights), audioscore)
        lines = []
        for (k, audio), row, p in zip(rows, scores, audioscore(scores).tolist()):
            lines.append(common.score_line(audio.clip["id"], k, row, p=p))
            p_of[audio.clip["id"], k] = tuple(p)
        common.write_jsonl(run / "03_scores" / f"{shard}.jsonl", lines)
    return p_of


def main(args):
    # -- setup
    ranks = common.setup_ranks()
    run = Path(args.run_dir)
    common.read_run(run)
    common.hold(run, "03", ranks)
    common.require(run, "02_audioscore.pt", "02_scores.jsonl")
    samples = common.read_samples(run)
    clips = {clip["id"]: clip for clip in common.read_clips(run, "train")}
    hint = "; rerun 02_fit_audioscore.py --redo"
    fields = dict(clip=common.NAME, k=common.INDEX, rating=common.one_of(*RATINGS))
    ratings = common.read_jsonl(run / "02_scores.jsonl", fields, hint)
    audioscore = AudioScore.load(run / "02_audioscore.pt")

    # -- data: who chooses
    answers_file = run / "03_human_choices.jsonl"
    sources = args.choices or [answers_file]
    if ranks.rank == 0:
        asked = comparisons(samples, ratings, args.num_human_pairs, args.seed)
        common.write_sheet(run / "03_to_choose.csv", *choice_sheet(asked, samples, clips), "choice")
        if not args.choices and common.to_simulate(run, answers_file, set(asked), ("clip", "a", "b"), args.redo):
            wav = {(clip, row["k"]): run / row["wav"] for clip, rows in samples.items() for row in rows}
            asked = [(clips[clip], a, b, wav[clip, a], wav[clip, b]) for clip, a, b in asked]
            common.write_jsonl(answers_file, common.people_of(run).simulated_choices(run, asked, args.seed))
    common.barrier()
    answers = read_choices(sources, samples) if args.choices or answers_file.exists() else []
    heard = common.without_raters(answers, args.exclude_rater)
    counted = [answer for answer in heard if "repeat" not in answer]
    if ranks.rank == 0:
        if args.choices:
            common.keep_answers(answers_file, answers, sources, args.redo)
        settings = dict(num_human_pairs=args.num_human_pairs, min_score_c=args.min_score_c, seed=args.seed)
        settings |= dict(exclude_rater=sorted(args.exclude_rater) or None)
        inputs = ["01_samples", "02_audioscore.pt", "02_scores.jsonl"] + ["03_human_choices.jsonl"] * bool(answers)
        outputs = ("03_pairs.jsonl", "03_human_pairs.jsonl")
        common.claim(run, "03_settings.json", settings, inputs, args.redo, outputs=outputs)

    # -- scores, then pairs
    p_of = judge_everything(run, samples, clips, audioscore, args, ranks)
    if ranks.rank > 0:
        return
    pairs, dropped = mine(samples, p_of, {row["clip"] for row in ratings}, args.min_score_c)
    people = human_pairs(counted, p_of)
    common.write_jsonl(run / "03_pairs.jsonl", pairs)
    common.write_jsonl(run / "03_human_pairs.jsonl", people)
    common.seal(run, "03_settings.json", ("03_pairs.jsonl", "03_human_pairs.jsonl"))

    # -- report
    print(f"clips: {len(samples)} in, {len(pairs)} pairs kept, dropped: ", end="")
    print(", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none")
    if not pairs:
        stop(f"{run}: no pair could be mined, see above; give 01 more clips, or 02 a lower --num-rated-clips")
    values = torch.tensor([common.score_c(pair["p_winner"], pair["p_loser"]) for pair in pairs])
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(f"score_c: median {median:.3f}, 90 % between {low:.3f} and {high:.3f}")
    negative = int((values < 0).sum())
    if negative:
        print(
            f"warning: {negative} of {len(pairs)} pairs have a negative score_c: AudioScore likes their winner "
            "less than their loser; give --min-score-c 0"
        )
    print(f"  --min-score-c {values.quantile(0.08):.3f} would drop 8 %, the paper's share (50K to about 46K)")
    if counted:
        common.report_raters(heard, compared, chosen, "nominal")
        ties = sum(a["choice"] == "tie" for a in counted)
        print(f"human choices: {len(counted)} in ({ties} ties), {len(people)} pairs")
    elif ratings:
        print(f"no human choices: to add some, fill {run / '03_to_choose.csv'}, or have pages made for it:")
        print(f"      python 08_listen.py choose --run-dir {run}; then rerun with --choices FILE --redo")
    else:
        print("no human choices: they compare rated audios, and none of this run's own is rated")
    print(f"next: python 04_curriculum_split.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
