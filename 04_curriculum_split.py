"""Stage 04: the complexity score and the two stages of the curriculum (Sec. 2.3, Eq. 3).

Run:
    python 04_curriculum_split.py
    python 04_curriculum_split.py --run-dir runs/vgg --threshold 0.7

Reads:
    03_pairs.jsonl, 03_human_pairs.jsonl     clip, winner, loser (k), p_winner, p_loser: [Good, Medium, Bad]
Writes:
    04_stage1.jsonl     easy pairs, score_c above the threshold
    04_stage2.jsonl     hard pairs, then human pairs; both files: clip, winner, loser, score_c, source (auto or human)
Takes: seconds.
"""

from pathlib import Path

import torch

import common
from common import number, record, rows

PAPER_SHARES = {1.0: 0, 0.9: 8, 0.8: 45, 0.7: 81, 0.6: 89}  # threshold: % of simple pairs [Tab. 2]


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument("--redo", action="store_true", help="replace this stage's outputs")
    paper = parser.paper
    paper.add_argument(
        "--threshold", type=number(float, 0, 1), default=0.7, help="score_delta [Sec. 3.1, Tab. 2]"
    )
    return common.parse(parser, argv, "04")


def with_score_c(pairs, human):
    """Every pair with its score_c; human pairs have 0, so that they are in stage 2 at any threshold
    >= 0."""
    found = []
    for pair in pairs:
        score_c = round(common.score_c(pair.p_winner, pair.p_loser), 6)
        found.append(split_pair(pair, score_c, "auto"))
    for pair in human:
        found.append(split_pair(pair, 0.0, "human"))
    return found


def split_pair(pair, score_c, source):
    return rows.SplitPair(
        clip=pair.clip, winner=pair.winner, loser=pair.loser, score_c=score_c, source=source
    )


def split(pairs, threshold):
    """Stage 1: easy pairs, score_c above the threshold; stage 2: the rest."""
    easy = [pair for pair in pairs if pair.score_c > threshold]
    hard = [pair for pair in pairs if pair.score_c <= threshold]
    return easy, hard


def print_shares(score_c, num_human):
    """Share of easy pairs at Table 2's thresholds, and the thresholds that give its shares here."""
    print(
        "threshold   easy here (with human pairs)   easy in Table 2   threshold for that share here"
    )
    for threshold, paper in PAPER_SHARES.items():
        easy = int((score_c > threshold).sum())
        here = "-" if paper == 0 else f"{score_c.quantile(1 - paper / 100):.3f}"
        share = 100 * easy / len(score_c)
        with_human = 100 * easy / (len(score_c) + num_human)
        print(f"{threshold:>9}   {share:>6.1f} % ({with_human:.1f} %) {paper:>22} % {here:>25}")


def warn_of_backwards(score_c):
    """Names mined pairs whose winner is the worse audio: on them Flow-DPO learns what nobody wants,
    and its curves look healthy. score_c: of the mined pairs; human pairs have none of their own."""
    negative = sum(value < 0 for value in score_c)
    if negative:
        print(
            f"warning: {negative} of {len(score_c)} mined pairs have a negative score_c: "
            "AudioScore likes their winner "
            "less than their loser; in 03_pairs.jsonl winner and loser are exchanged, or Good and "
            "Bad in p_winner and "
            "p_loser, or 03 was given a negative --min-score-c"
        )


def main(args):
    run = Path(args.run_dir)
    common.read_run(run)
    inputs = ["03_pairs.jsonl", "03_human_pairs.jsonl"]
    outputs = ["04_stage1.jsonl", "04_stage2.jsonl"]
    with record.stage(run, "04", inputs, outputs, args.redo) as stage:
        hint = "; rerun 03_mine_pairs.py --redo"
        pairs = common.read_pairs(run / "03_pairs.jsonl", rows.Pair, hint)
        human = common.read_pairs(run / "03_human_pairs.jsonl", rows.Pair, hint)
        stage.claim({"threshold": args.threshold})

        scored = with_score_c(pairs, human)
        stage1, stage2 = split(scored, args.threshold)
        rows.write(run / "04_stage1.jsonl", stage1)
        rows.write(run / "04_stage2.jsonl", stage2)

    hard = len(stage2) - len(human)
    print(
        f"pairs: {len(scored)} in; stage 1: {len(stage1)} easy; stage 2: {hard} hard + "
        f"{len(human)} human"
    )
    if pairs:
        mined = [pair.score_c for pair in scored if pair.source == "auto"]
        print_shares(torch.tensor(mined), len(human))
        warn_of_backwards(mined)
    if not stage1:
        print(
            f"stage 1 is empty: no score_c is above the threshold {args.threshold}, so 05 trains "
            "on stage 2 alone, "
            "without a curriculum"
        )
    print(f"next: python 05_train_flow_dpo.py --run-dir {run}")
    print(f"      torchrun --standalone --nproc_per_node 8 05_train_flow_dpo.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
