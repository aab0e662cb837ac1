"""Stage 03: omni-preference pairs, best versus worst by AudioScore, and human choices (Sec. 2.2,
Eq. 1-2).

Run:
    python 03_mine_pairs.py                                   # toy world: simulated choices
    python 03_mine_pairs.py --run-dir runs/vgg                # writes 03_to_choose.csv for people, goes on without
    python 03_mine_pairs.py --run-dir runs/vgg --choices ann.csv packs/choose_*.csv --redo
    torchrun --standalone --nproc_per_node 8 03_mine_pairs.py ...        # scoring is divided over the GPUs

Reads:
    01_samples/, 01_audio/      stage 01's audios
    02_audioscore.pt, 02_scores.jsonl    AudioScore; the rated clips, which are not mined, and their ratings
    --choices or 03_human_choices.jsonl   clip, a, b (two k of the clip), choice (a, b or tie), rater;
                                if known repeat (1: asked once more, to see how steady the rater is), seconds, comment
Writes:
    03_scores/00012.*.pt        what every scorer said, by shard of stage 01
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
from common import AudioScore, number, people, ranks, record, rows, scoring, stop

CLIPPED_SHARE = 0.01  # of samples at full scale: from here on an audio is clipped, and may not win


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument(
        "--choices",
        nargs="+",
        help="answers to 03_to_choose.csv (.csv, .jsonl); else those this run has",
    )
    io.add_argument(
        "--exclude-rater",
        nargs="+",
        action="extend",
        default=[],
        help="names whose answers do not count",
    )
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    io.add_argument(
        "--redo", action="store_true", help="replace this stage's outputs; what is scored stays"
    )
    paper = parser.paper
    paper.add_argument(
        "--num-human-pairs", type=number(int, 0), default=2000, help="pairs for people [Sec. 2.2]"
    )
    paper.add_argument(
        "--min-score-c",
        type=number(float, -1, 1),
        default=0.0,
        help="drop weaker pairs; paper silent",
    )
    engineering = parser.engineering
    engineering.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the draw of comparisons"
    )
    common.workers_flag(parser)
    return common.parse(parser, argv, "03")


# --------------------------------------------------------------------------------------------------
# p of every audio (Eq. 1)
# --------------------------------------------------------------------------------------------------


def apply_audioscore(blocks, scorers, audioscore):
    """Writes 03_scores/00012.jsonl of every block; returns {clip: {k: p}}, p = (Good, Medium,
    Bad)."""
    p_of = defaultdict(dict)
    for block in tqdm(blocks, desc="AudioScore", unit="shard"):
        said = scorers.five(scoring.read_scores([block], scorers, scorers.of_audioscore))
        scores = audioscore.five_scores(said)
        lines = []
        for audio, five, p in zip(block.audios, scores, audioscore(scores).tolist()):
            lines.append(
                rows.Score(clip=audio.clip.id, k=audio.k, p=p, **common.score_fields(five))
            )
            p_of[audio.clip.id][audio.k] = tuple(p)
        rows.write(block.scores / f"{block.name}.jsonl", lines)
    return p_of


# --------------------------------------------------------------------------------------------------
# Best versus worst (Eq. 2)
# --------------------------------------------------------------------------------------------------


def may_win(audio):
    """Silent and clipped audio may lose, but not win. audio: rows.Sample."""
    return audio.finite and audio.peak >= common.SILENT_PEAK and audio.clipped < CLIPPED_SHARE


def select_pair(p, winners, losers):
    """Eq. 2: winner = argmax P(Good), loser = argmax P(Bad).

    p: {k: (Good, Medium, Bad)} of one clip's audios; winners, losers: the k that may be one.
    Returns (winner, loser), or the reason why the clip makes no pair.
    """
    if len(losers) < 2 or not winners:
        return "fewer than two usable audios"
    p_good = {k: p[k][0] for k in winners}
    p_bad = {k: p[k][2] for k in losers}
    winner = max(p_good, key=p_good.get)
    loser = max(p_bad, key=p_bad.get)
    # Paper silent: ties. An audio that ties with another is not the best or the worst.
    if (
        list(p_good.values()).count(p_good[winner]) > 1
        or list(p_bad.values()).count(p_bad[loser]) > 1
    ):
        return "tie"
    if winner == loser:
        return "winner is loser"
    return winner, loser


def mine(samples, p_of, rated, min_score_c):
    """Pairs of all clips that were not rated, and a count of the clips that make none, by
    reason."""
    pairs = []
    dropped = Counter()
    for clip, audios in samples.items():
        if clip in rated:
            dropped["rated by people"] += 1  # Paper silent: AudioScore was fitted on these clips
            continue
        winners = [audio.k for audio in audios if may_win(audio)]
        losers = [audio.k for audio in audios if audio.finite]
        chosen = select_pair(p_of[clip], winners, losers)
        if isinstance(chosen, str):
            dropped[chosen] += 1
            continue
        pair = pair_of(clip, *chosen, p_of)
        if common.score_c(pair.p_winner, pair.p_loser) < min_score_c:
            dropped[f"score_c below {min_score_c}"] += 1
            continue
        pairs.append(pair)
    return pairs, dropped


def pair_of(clip, winner, loser, p_of):
    p = p_of[clip]
    return rows.Pair(clip=clip, winner=winner, loser=loser, p_winner=p[winner], p_loser=p[loser])


# --------------------------------------------------------------------------------------------------
# What people choose (Sec. 2.2)
# --------------------------------------------------------------------------------------------------


def comparisons(samples, ratings, count, seed):
    """Pairs of one rated clip's audios with the same rating, which AudioScore's classes cannot tell
    apart: what is left to prefer is the aesthetic appeal. ratings: of rows.RatedScore. Returns
    [(clip, a, b), ...], sorted, of as many clips as possible."""
    rating_of = defaultdict(dict)
    for row in ratings:
        rating_of[row.clip][row.k] = row.rating
    rng = random.Random(seed)
    rounds = defaultdict(list)  # the first comparison of every clip, the second, ...
    for clip in sorted(rating_of):
        rating = rating_of[clip]
        usable = [audio.k for audio in samples.get(clip, []) if audio.finite and audio.k in rating]
        equal = [(clip, a, b) for a, b in combinations(sorted(usable), 2) if rating[a] == rating[b]]
        rng.shuffle(equal)
        for i, comparison in enumerate(equal):
            rounds[i].append(comparison)
    drawn = []
    for i in sorted(rounds):
        rng.shuffle(rounds[i])
        drawn += rounds[i]
    return sorted(drawn[:count])


def write_choice_sheet(run, asked, wav_of, clips):
    """03_to_choose.csv."""
    lines = []
    for clip, a, b in asked:
        lines.append((clip, a, b, wav_of[clip, a], wav_of[clip, b], clips[clip].path, "", ""))
    columns = ("clip", "a", "b", "wav_a", "wav_b", "video", "choice", "rater")
    people.write_sheet(run / "03_to_choose.csv", columns, lines, "choice")


def read_choices(paths, samples):
    """Every answer, a list of rows.ChoiceAnswer, each proved to be about two audios of a clip of
    this run."""

    def checked(line, where):
        a = common.known_k(line, samples, where, "a")
        b = common.known_k(line, samples, where, "b")
        if a == b:
            stop(f"{where}: a and b are the same audio (k {a})")
        choice = people.meant(line["choice"], ("a", "b", "tie"), where, "choice")
        return people.typed_answer(dict(line, a=a, b=b, choice=choice), rows.ChoiceAnswer, where)

    return people.read_answers(paths, "choice", checked)


def take_choices(run, samples, clips, ratings, args):
    """Writes the sheet, and returns the answers: of --choices, of simulated people, or those that
    the run has; none where nobody has chosen."""
    file = run / "03_human_choices.jsonl"
    if ranks.is_first():
        asked = comparisons(samples, ratings, args.num_human_pairs, args.seed)
        wav_of = {
            (audio.clip, audio.k): audio.wav for audios in samples.values() for audio in audios
        }
        write_choice_sheet(run, asked, wav_of, clips)
        if not args.choices and common.to_simulate(run, file, asked, args.redo):
            audios = [
                (clips[clip], a, b, run / wav_of[clip, a], run / wav_of[clip, b])
                for clip, a, b in asked
            ]
            rows.write(file, common.people_of(run).simulated_choices(run, audios, args.seed))
    ranks.barrier()
    if not args.choices and not file.exists():
        return []
    answers = read_choices(args.choices or [file], samples)
    if args.choices and ranks.is_first():
        people.keep_answers(file, answers, args.choices, args.redo)
    return answers


def preference(answer):
    """1 where the audio of smaller k is preferred, -1 where the other is, 0 for a tie."""
    if answer.choice == "tie":
        return 0
    preferred, other = (answer.a, answer.b) if answer.choice == "a" else (answer.b, answer.a)
    return 1 if preferred < other else -1


def human_pairs(answers, p_of):
    """The majority's pairs; a tie of votes makes none."""
    votes = Counter()
    for answer in answers:
        votes[people.question_of(answer)] += preference(answer)
    pairs = []
    for (clip, first, second), vote in sorted(votes.items()):
        if vote > 0:
            pairs.append(pair_of(clip, first, second, p_of))
        elif vote < 0:
            pairs.append(pair_of(clip, second, first, p_of))
    return pairs


# --------------------------------------------------------------------------------------------------
# Report, main
# --------------------------------------------------------------------------------------------------


def print_mined(run, samples, pairs, dropped):
    print(f"clips: {len(samples)} in, {len(pairs)} pairs kept, dropped: ", end="")
    print(", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none")
    if not pairs:
        stop(
            f"{run}: no pair could be mined, see above; give 01 more clips, or 02 a lower "
            "--num-rated-clips"
        )
    values = torch.tensor([common.score_c(pair.p_winner, pair.p_loser) for pair in pairs])
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(f"score_c: median {median:.3f}, 90 % between {low:.3f} and {high:.3f}")
    negative = int((values < 0).sum())
    if negative:
        print(
            f"warning: {negative} of {len(pairs)} pairs have a negative score_c: AudioScore likes "
            "their winner "
            "less than their loser; give --min-score-c 0"
        )
    print(
        f"  --min-score-c {values.quantile(0.08):.3f} would drop 8 %, the paper's share (50K to "
        "about 46K)"
    )


def print_chosen(run, kept, counted, pairs, ratings):
    if counted:
        people.print_agreement(kept, preference, "nominal")
        ties = sum(answer.choice == "tie" for answer in counted)
        print(f"human choices: {len(counted)} in ({ties} ties), {len(pairs)} pairs")
    elif ratings:
        print(
            f"no human choices: to add some, fill {run / '03_to_choose.csv'}, or have pages made "
            "for it:"
        )
        print(
            f"      python 08_listen.py choose --run-dir {run}; then rerun with --choices FILE "
            "--redo"
        )
    else:
        print("no human choices: they compare rated audios, and none of this run's own is rated")


def main(args):
    # -- setup
    here = ranks.setup()
    run = Path(args.run_dir)
    run_json = common.read_run(run)
    inputs = ["01_samples", "02_audioscore.pt", "02_scores.jsonl"]
    outputs = ["03_pairs.jsonl", "03_human_pairs.jsonl"]
    with record.stage(run, "03", inputs, outputs, args.redo) as stage:
        samples = common.read_samples(run)
        clips = {clip.id: clip for clip in common.read_clips(run, "train")}
        ratings = rows.read(
            run / "02_scores.jsonl", rows.RatedScore, "; rerun 02_fit_audioscore.py --redo"
        )
        audioscore = AudioScore.load(run / "02_audioscore.pt")
        scorers = common.scorers_of(run, args.weights)

        # -- people choose
        answers = take_choices(run, samples, clips, ratings, args)
        kept = people.without_raters(answers, args.exclude_rater)
        counted = [answer for answer in kept if not answer.repeat]
        settings = {
            "num_human_pairs": args.num_human_pairs,
            "min_score_c": args.min_score_c,
            "seed": args.seed,
            "exclude_rater": sorted(args.exclude_rater),
        }
        stage.claim(settings, ["03_human_choices.jsonl"] if answers else [])

        # -- scores, then pairs
        blocks = common.shard_blocks(run, samples, clips.values())
        known = common.seen_by_model(run, samples, clips)
        names = scorers.of_audioscore
        scoring.score(blocks, scorers, names, run_json.clip_s, here, args.workers, known)
        if not here.first:
            return
        p_of = apply_audioscore(blocks, scorers, audioscore)
        rated = {row.clip for row in ratings}
        pairs, dropped = mine(samples, p_of, rated, args.min_score_c)
        chosen = human_pairs(counted, p_of)
        rows.write(run / "03_pairs.jsonl", pairs)
        rows.write(run / "03_human_pairs.jsonl", chosen)

    print_mined(run, samples, pairs, dropped)
    print_chosen(run, kept, counted, chosen, ratings)
    print(f"next: python 04_curriculum_split.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
