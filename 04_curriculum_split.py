"""Stage 04: the complexity score and the two stages of the curriculum (Sec. 2.3, Eq. 3).

Run:
    python 04_curriculum_split.py
    python 04_curriculum_split.py --run-dir runs/vgg --threshold 0.7

Reads:
    03_pairs.jsonl, 03_human_pairs.jsonl
        clip, winner, loser (k, the number of the audio among those of the clip, from 0 on),
        p_winner, p_loser: [Good, Medium, Bad], of which score_c is made; human pairs have them too,
        but their score_c is 0
Writes:
    04_stage1.jsonl     easy pairs, score_c above the threshold
    04_stage2.jsonl     hard pairs, then human pairs
        both: clip, winner, loser, score_c, source (auto or human)
Takes: seconds.
"""

from pathlib import Path

import torch

import common
from common import command, inputs, record, rows, run_flag

# Table 2: {threshold: % of easy pairs, which it calls simple}. Paper silent: whether that is the
# share of all pairs, or of the mined ones. We print both of ours, and advise by the mined ones.
PAPER_SHARES = {0.9: 8, 0.8: 45, 0.7: 81, 0.6: 89}


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    parser.io.add_argument("--redo", action="store_true", help="replace this stage's results")
    parser.paper.add_argument(
        "--threshold",
        type=command.number(0, 1),
        default=0.7,
        help="score_delta: pairs with a higher score_c are easy, stage 1 [Sec. 3.1, Tab. 2]",
    )
    return command.parse(parser, argv, "04")


def with_score_c(pair):
    """A mined pair, rows.Pair, with the score_c of Eq. 3, as rows.SplitPair: six decimals, as many
    as the file holds, so that 05 --threshold, which splits anew, splits by the same number."""
    score_c = round(common.score_c(pair.p_winner, pair.p_loser), 6)
    return rows.SplitPair(pair.clip, pair.winner, pair.loser, score_c, "auto")


def of_people(pair):
    """A human pair, whose score_c the paper sets to 0, so that it is in stage 2 at any
    threshold."""
    return rows.SplitPair(pair.clip, pair.winner, pair.loser, 0.0, "human")


def threshold_of_paper_share(score_c):
    """The threshold that makes 81 % of the mined pairs easy, as the paper's 0.7 does, with as many
    digits as are printed. Not below 0, the lowest --threshold. score_c: (n,) of the mined pairs, n
    at least 1."""
    return round(score_c.quantile(1 - PAPER_SHARES[0.7] / 100).clamp(min=0).item(), 3)


def print_shares(score_c, num_human):
    """Shares of easy pairs beside Table 2's, and a warning where winners are the worse audios.
    score_c: (n,) of the mined pairs, n at least 1."""
    for delta, paper in PAPER_SHARES.items():
        percent = 100 * (score_c > delta).double().mean().item()
        of_all = percent * len(score_c) / (len(score_c) + num_human)
        print(
            f"score_c above {delta}: {percent:.1f} % of the mined pairs, {of_all:.1f} % of all; "
            f"Table 2: {paper} %"
        )
    threshold = threshold_of_paper_share(score_c)
    print(f"  --threshold {threshold:.3f} would make 81 % of the mined pairs easy, as in the paper")
    # Eq. 2 alone makes no negative score_c: its winner has the largest P(Good), its loser the
    # largest P(Bad). Where 03 kept a silent or clipped audio from winning, the next best wins, and
    # may be worse than the loser. 03 drops such pairs, unless its --min-score-c is negative. From
    # them Flow-DPO would learn to make worse audio, and its curves would still look healthy.
    negative = int((score_c < 0).sum())
    if negative:
        print(
            f"warning: {negative} of {len(score_c)} mined pairs have a negative score_c: "
            "AudioScore likes their winner less than their loser; 03 was given a negative "
            "--min-score-c, or another program has exchanged winner and loser; rerun "
            "03_mine_pairs.py --redo --min-score-c 0"
        )


def main(args):
    run = Path(args.run_dir)
    inputs.read_run(run)  # stops where there is none
    sources = ["03_pairs.jsonl", "03_human_pairs.jsonl"]
    outputs = ["04_stage1.jsonl", "04_stage2.jsonl"]
    with record.stage(run, "04", sources, outputs, args.redo) as output:
        hint = "; rerun 03_mine_pairs.py --redo"
        pairs = inputs.read_pairs(run / "03_pairs.jsonl", rows.Pair, hint)
        chosen = inputs.read_pairs(run / "03_human_pairs.jsonl", rows.Pair, hint)
        mined = [with_score_c(pair) for pair in pairs]
        human = [of_people(pair) for pair in chosen]
        # Stops where the files there were made with another threshold; --redo removes them first.
        output.claim({"threshold": args.threshold})
        stage1, stage2 = common.split(mined + human, args.threshold)
        rows.write(run / "04_stage1.jsonl", stage1)
        rows.write(run / "04_stage2.jsonl", stage2)

    print(
        f"pairs: {len(mined) + len(human)} in; stage 1: {len(stage1)} easy; stage 2: "
        f"{len(stage2) - len(human)} hard + {len(human)} human"
    )
    score_c = torch.tensor([pair.score_c for pair in mined])
    if mined:
        print_shares(score_c, len(human))
    if not stage1:
        print(
            f"stage 1 is empty: no score_c is above the threshold {args.threshold}, so 05 trains "
            "on stage 2 alone, without a curriculum"
        )
        threshold = threshold_of_paper_share(score_c) if mined else 1.0
        if mined and score_c.max() > threshold:  # so that it puts any pair into stage 1
            flags = f"--redo --threshold {threshold:.3f}"
            print("for 81 % of the mined pairs in stage 1, as in the paper:")
            print(f"      python 04_curriculum_split.py {run_flag(run)} {flags}")
    print(f"next: python 05_train_flow_dpo.py {run_flag(run)}")
    print(f"  or: torchrun --standalone --nproc_per_node 8 05_train_flow_dpo.py {run_flag(run)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
