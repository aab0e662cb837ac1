"""Stage 03: omni-preference pairs by AudioScore, and human choices (Sec. 2.2, Eq. 1-2).

Run:
    python 03_mine_pairs.py                     # toy world: simulated choices
    python 03_mine_pairs.py --run-dir runs/vgg  # writes 03_to_choose.csv, goes on without answers
    python 03_mine_pairs.py --run-dir runs/vgg --choices ann.csv packs/choose_*.csv --redo
    torchrun --standalone --nproc_per_node 8 03_mine_pairs.py ...  # scoring, over the GPUs

Reads:
    01_samples/, 01_audio/      stage 01's audios, the model's and those that were given
    02_audioscore.pt, 02_scores.jsonl    AudioScore; the rated clips, which are not mined, and their
                                ratings
    --choices or 03_human_choices.jsonl   clip, a, b (the k of two audios of the clip), choice (a, b
                                or tie), rater; if known repeat (1: the question was asked again, to
                                see how steady the rater is), seconds, comment
Writes:
    03_scores/00012.*.pt        what every scorer measured, one file for each shard of stage 01
    03_scores/00012.jsonl       clip, k, the five scores (null where one does not apply), p: [Good,
                                Medium, Bad]
    03_pairs.jsonl              clip, winner, loser (k), p_winner, p_loser: [Good, Medium, Bad]
    03_to_choose.csv            pairs of equally rated audios for people: clip, a, b, wav_a, wav_b,
                                video, choice, rater
    03_human_choices.jsonl, 03_human_pairs.jsonl   the answers, validated; the pairs that they make,
                                with the fields of 03_pairs.jsonl
Takes: toy 43 s on 2 cores.
"""

import random
from collections import Counter, defaultdict
from itertools import combinations, zip_longest
from pathlib import Path

import torch

import common
from common import (
    SCORES,
    AudioScore,
    command,
    inputs,
    people,
    ranks,
    record,
    rows,
    run_flag,
    scoring,
    stop,
)

CLIPPED_SHARE = 0.01  # an audio with this share of its samples at full scale may not win


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    flag = parser.io.add_argument
    described = "files with people's choices (.csv, .jsonl); without it, 03_human_choices.jsonl"
    flag("--choices", nargs="+", help=described)
    described = "names of raters whose choices do not count"
    flag("--exclude-rater", nargs="+", action="extend", default=[], help=described)
    flag("--weights", default="weights", help="folder of the downloaded weights")
    described = "replace this stage's results; scores that are still valid are kept"
    flag("--redo", action="store_true", help=described)
    described = "mine pairs of the model's audios only, or of all audios, those of 01 --given too"
    flag("--mine", choices=("model", "all"), default="all", help=described)
    flag = parser.paper.add_argument
    described = "comparisons that people are asked to make [Sec. 2.2]; a tie makes no pair"
    flag("--num-human-pairs", type=command.whole(0), default=2000, help=described)
    described = "drop mined pairs whose score_c (Eq. 3) is below this; 0 drops few; paper silent"
    flag("--min-score-c", type=command.number(-1, 1), default=0.0, help=described)
    flag = parser.engineering.add_argument
    flag("--seed", type=command.whole(0), default=0, help="seed of the draw of comparisons")
    command.workers_flag(parser)
    command.part_flag(parser)
    return command.parse(parser, argv, "03")


# --------------------------------------------------------------------------------------------------
# p of every audio (Eq. 1)
# --------------------------------------------------------------------------------------------------


def apply_audioscore(blocks, scorers, audioscore):
    """p of every audio (Eq. 1), {clip: {k: (Good, Medium, Bad)}}, written with its five scores to
    03_scores/00012.jsonl of each block."""
    p_of = defaultdict(dict)
    for block in blocks:
        by_scorer = scoring.read_scores([block], scorers, scorers.of_audioscore)
        # (n, 5), in the order of block.audios
        scores = audioscore.five_scores(scorers.audioscore_inputs(by_scorer))
        lines = []
        for audio, five, p in zip(block.audios, scores, audioscore(scores).tolist()):
            clip = audio.clip.id
            fields = rows.score_fields(SCORES, five)
            lines.append(rows.Score(clip=clip, k=audio.k, p=p, **fields))
            p_of[clip][audio.k] = tuple(p)
        rows.write(block.scores_folder / f"{block.name}.jsonl", lines)
    return p_of


# --------------------------------------------------------------------------------------------------
# Best versus worst (Eq. 2)
# --------------------------------------------------------------------------------------------------


def is_good_enough(audio):
    """Paper silent: which audio may win. Ours must be finite, not silent and not clipped; silent
    and clipped audio may still lose. audio: rows.Sample."""
    return audio.finite and audio.peak >= common.SILENT_PEAK and audio.clipped < CLIPPED_SHARE


def select_pair(p, may_win, may_lose):
    """Eq. 2: winner = argmax P(Good), loser = argmax P(Bad).

    p: {k: (Good, Medium, Bad)} of one clip's audios; may_win, may_lose: the k of the audios that
    may. Returns (winner, loser), or the reason why the clip makes no pair.
    """
    if len(may_lose) < 2:
        return "fewer than two audios can be used"
    if not may_win:
        return "all audios are silent or clipped"
    winner = argmax({k: p[k][0] for k in may_win})  # Eq. 2
    loser = argmax({k: p[k][2] for k in may_lose})
    if winner is None or loser is None:
        return "two audios tie for the best or the worst"
    if winner == loser:
        return "one audio is both the best and the worst"
    return winner, loser


def argmax(values):
    """The key of the largest value; None where two keys have it. Paper silent: ties. Where two
    audios tie, we take neither for the best or the worst."""
    first, *others = sorted(values, key=values.get, reverse=True)
    return None if others and values[others[0]] == values[first] else first


def mine(samples, p_of, rated, min_score_c):
    """The pairs of all clips that nobody has rated; and, by reason, how many clips make none.

    samples: {clip: a list of its rows.Sample}; p_of: {clip: {k: p}}; rated: a set of clips. Paper
    silent: what its "re-filtering" of 50K clips to 46K pairs is. Here a clip makes no pair for the
    reasons of `select_pair`, or where score_c is below min_score_c. By Eq. 2 the winner has the
    largest P(Good) and the loser the largest P(Bad), so that score_c is not below 0, unless the
    audio with the largest P(Good) may not win, being silent or clipped.
    """
    pairs = []
    dropped = Counter()
    for clip, audios in samples.items():
        if clip in rated:
            # Paper silent: whether rated clips are mined. Ours are not: AudioScore was fitted on
            # them.
            dropped["are set aside, since people rated them"] += 1
            continue
        may_win = [audio.k for audio in audios if is_good_enough(audio)]
        may_lose = [audio.k for audio in audios if audio.finite]
        chosen = select_pair(p_of[clip], may_win, may_lose)
        if isinstance(chosen, str):
            dropped[f"make none, since {chosen}"] += 1
            continue
        pair = pair_of(clip, *chosen, p_of)
        if common.score_c(pair.p_winner, pair.p_loser) < min_score_c:
            dropped[f"make none, since score_c is below {min_score_c}"] += 1
            continue
        pairs.append(pair)
    return pairs, dropped


def of_model(samples):
    """The audios of every clip, without those that were given."""
    found = {}
    for clip, audios in samples.items():
        found[clip] = [audio for audio in audios if audio.source == inputs.MODEL]
    return found


def pair_of(clip, winner, loser, p_of):
    p = p_of[clip]
    return rows.Pair(clip=clip, winner=winner, loser=loser, p_winner=p[winner], p_loser=p[loser])


# --------------------------------------------------------------------------------------------------
# What people choose (Sec. 2.2)
# --------------------------------------------------------------------------------------------------


def comparisons(samples, ratings, count, seed):
    """[(clip, a, b), ...], sorted: two audios of one rated clip that have the same rating, from as
    many clips as possible. ratings: a list of rows.RatedScore.

    Paper silent: what people compare. The ratings that AudioScore is fitted to do not tell these
    two audios apart, so that what is left to prefer is mainly the aesthetic appeal.
    """
    rating_of = defaultdict(dict)
    for row in ratings:
        rating_of[row.clip][row.k] = row.rating
    rng = random.Random(seed)
    of_clips = []
    for clip in sorted(rating_of):
        rating = rating_of[clip]
        usable = [audio.k for audio in samples.get(clip, []) if audio.finite and audio.k in rating]
        equal = [(clip, a, b) for a, b in combinations(sorted(usable), 2) if rating[a] == rating[b]]
        rng.shuffle(equal)
        of_clips.append(equal)
    drawn = []
    # The first comparison of every clip, then the second of every clip, and so on, each time with
    # the clips in random order, so that `count` of them come from as many clips as possible.
    for nth in zip_longest(*of_clips):
        of_round = [comparison for comparison in nth if comparison is not None]
        rng.shuffle(of_round)
        drawn += of_round
    return sorted(drawn[:count])


def write_choice_sheet(run, asked, samples, clips):
    """03_to_choose.csv."""
    lines = []
    for clip, a, b in asked:
        wav_a = inputs.find_sample(samples, clip, a).wav
        wav_b = inputs.find_sample(samples, clip, b).wav
        lines.append((clip, a, b, wav_a, wav_b, clips[clip].path, "", ""))
    columns = ("clip", "a", "b", "wav_a", "wav_b", "video", "choice", "rater")
    people.write_sheet(run / "03_to_choose.csv", columns, lines, "choice")


def take_choices(run, samples, clips, asked, args):
    """Writes the sheet of the comparisons in `asked`. In the toy world simulated people answer it.
    Returns all answers, a list of rows.ChoiceAnswer, after checking that each is about two audios
    of one clip of this run; [] where nobody has chosen yet."""
    file = run / "03_human_choices.jsonl"
    if ranks.is_first():
        write_choice_sheet(run, asked, samples, clips)
        simulated = common.people_of(run)
        if simulated and not args.choices and people.must_simulate(file, asked, args.redo):
            audios = []
            for clip, a, b in asked:
                wav_a = run / inputs.find_sample(samples, clip, a).wav
                wav_b = run / inputs.find_sample(samples, clip, b).wav
                audios.append((clips[clip], a, b, wav_a, wav_b))
            rows.write(file, simulated.simulated_choices(run, audios, args.seed))

    def checked(line, where):
        a = people.known_k(line, samples, where, "a")
        b = people.known_k(line, samples, where, "b")
        if a == b:
            stop(f"{where}: a and b are the same audio (k {a})")
        choice = people.meant(line["choice"], ("a", "b", "tie"), where, "choice")
        return people.typed_answer(dict(line, a=a, b=b, choice=choice), rows.ChoiceAnswer, where)

    return people.take_answers(file, args.choices, "choice", checked, args.redo)


def preference(answer):
    """1 where the audio with the smaller k is preferred, -1 where the other is, 0 for a tie."""
    of_a = {"a": 1, "b": -1, "tie": 0}[answer.choice]
    return of_a if answer.a < answer.b else -of_a


def human_pairs(answers, p_of):
    """The pairs that a majority of the raters prefers; a tie of votes makes no pair. Their p are
    written for the reader alone: stage 04 sets their score_c to 0 (Sec. 2.3)."""
    votes = Counter()
    for answer in answers:
        votes[people.question_of(answer)] += preference(answer)
    pairs = []
    for (clip, smaller_k, larger_k), vote in sorted(votes.items()):  # as question_of has them
        if vote > 0:
            pairs.append(pair_of(clip, smaller_k, larger_k, p_of))
        elif vote < 0:
            pairs.append(pair_of(clip, larger_k, smaller_k, p_of))
    return pairs


# --------------------------------------------------------------------------------------------------
# Report, main
# --------------------------------------------------------------------------------------------------


def print_mined(run, samples, pairs, dropped):
    line = f"clips: {len(samples)} in; {len(pairs)} make a pair"
    for reason, count in dropped.most_common():
        line += f"; {count} {reason}"
    print(line)
    if not pairs:
        stop(
            f"{run}: no clip makes a pair, for the reasons above; give 01 more clips, or 02 a "
            "lower --num-rated-clips"
        )
    values = torch.tensor([common.score_c(pair.p_winner, pair.p_loser) for pair in pairs])
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(
        f"score_c of the pairs: median {median:.3f}; 90 % of them lie between {low:.3f} and "
        f"{high:.3f}"
    )
    negative = int((values < 0).sum())
    if negative:
        print(
            f"warning: {negative} of {len(pairs)} pairs have a negative score_c: AudioScore likes "
            "their winner less than their loser; --min-score-c 0, the default, drops them"
        )
    print(
        f"  --min-score-c {values.quantile(0.04):.3f} would drop 4 % of these pairs; the paper "
        "keeps 46K pairs of 50K clips, which drops 8 %, or 4 % of 48K if its 2K rated clips are "
        "among the 50K and make none"
    )


def print_sources(samples, pairs):
    """How often the audios of each source win and lose; nothing where all are the model's."""
    wins = Counter()
    losses = Counter()
    for pair in pairs:
        wins[inputs.find_sample(samples, pair.clip, pair.winner).source] += 1
        losses[inputs.find_sample(samples, pair.clip, pair.loser).source] += 1
    audios = Counter(audio.source for audios in samples.values() for audio in audios)
    if audios.keys() == {inputs.MODEL}:
        return
    for source, count in audios.items():
        print(
            f"  {source}: {count} audios, which win {wins[source]} pairs and lose {losses[source]}"
        )


def print_chosen(run, kept, counted, pairs, ratings, asked):
    if counted:
        people.print_agreement(kept, preference, "nominal")
        ties = sum(answer.choice == "tie" for answer in counted)
        print(
            f"human choices: {len(counted)} answers, {ties} of them ties, make {len(pairs)} human "
            "pairs"
        )
    elif asked:
        print(
            f"no human choices yet, so no human pairs. Fill in {run / '03_to_choose.csv'}, or make "
            "pages to choose on, and give the answers back:"
        )
        print(f"      python 08_listen.py choose {run_flag(run)}")
        print(f"      python 03_mine_pairs.py {run_flag(run)} --redo --choices FILE")
    elif ratings:
        print(
            "no human choices, and nothing to choose: --num-human-pairs is 0, or no two audios of "
            "a rated clip have the same rating"
        )
    else:
        print(
            "no human choices: people compare two audios of a rated clip, and none of this run's "
            "own clips is rated"
        )


def main(args):
    # -- setup
    here = ranks.setup(args.part)
    run = Path(args.run_dir)
    run_json = inputs.read_run(run)
    sources = ["01_samples", "02_audioscore.pt", "02_scores.jsonl"]
    outputs = ["03_pairs.jsonl", "03_human_pairs.jsonl"]
    with record.stage(run, "03", sources, outputs, args.redo, part=here.part) as stage:
        samples = inputs.read_samples(run)
        clips = {clip.id: clip for clip in inputs.read_clips(run, "train")}
        ratings = rows.read(
            run / "02_scores.jsonl", rows.RatedScore, "; rerun 02_fit_audioscore.py --redo"
        )
        ratings = [row for row in ratings if row.clip in samples]  # of train clips alone
        audioscore = AudioScore.load(run / "02_audioscore.pt")
        scorers = common.scorers_of(run, args.weights)

        # -- people choose; the answers are an input, and so are taken before the stage is claimed
        with stage.one_at_a_time():
            asked = comparisons(samples, ratings, args.num_human_pairs, args.seed)
            answers = take_choices(run, samples, clips, asked, args)
        kept = people.without_raters(answers, args.exclude_rater)
        counted = [answer for answer in kept if not answer.repeat]
        settings = {
            "mine": args.mine,
            "num_human_pairs": args.num_human_pairs,
            "min_score_c": args.min_score_c,
            "seed": args.seed,
            "exclude_rater": sorted(args.exclude_rater),
        }
        stage.claim(settings, ["03_human_choices.jsonl"] if answers else [])

        # -- scores, then pairs. Whole shards are scored, with the rated clips in them, so that
        # 03_human_pairs.jsonl can show what AudioScore says of the pairs that people made.
        blocks = inputs.shard_blocks(run, samples, clips.values())
        part = here.part_of(blocks)  # without --part: all
        scoring.score(part, scorers, scorers.of_audioscore, run_json.clip_s, here, args.workers)
        if not here.first or here.ends_part():  # the other ranks wait at the end of the stage
            return
        p_of = apply_audioscore(blocks, scorers, audioscore)
        rated = {row.clip for row in ratings}
        minable = samples if args.mine == "all" else of_model(samples)
        pairs, dropped = mine(minable, p_of, rated, args.min_score_c)
        chosen = human_pairs(counted, p_of)
        rows.write(run / "03_pairs.jsonl", pairs)
        rows.write(run / "03_human_pairs.jsonl", chosen)

    print_mined(run, samples, pairs, dropped)
    print_sources(samples, pairs)
    print_chosen(run, kept, counted, chosen, ratings, asked)
    print(f"next: python 04_curriculum_split.py {run_flag(run)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
