"""Stage 05: Flow-DPO with the two-stage curriculum (Sec. 2.3, Eq. 5).

Run:
    torchrun --nproc_per_node 8 05_train_flow_dpo.py           # one node, the paper's 8 GPUs
    python 05_train_flow_dpo.py                                # toy world, CPU
    torchrun --standalone --nproc_per_node 8 05_train_flow_dpo.py --run-dir runs/vgg
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        05_train_flow_dpo.py --run-dir runs/vgg                # two nodes, a shared run folder
With --standalone several jobs of one node can run at once, which else want one port. The number of
GPUs must divide the global batch; pairs, times and noise of every step are the same on any such
number. Running the command of a finished training again leaves its policy as it is.

Reads:
    01_samples/                        latents and features, memory-mapped
    04_stage1.jsonl, 04_stage2.jsonl   clip, winner, loser (k), score_c, source
Writes, in <run>/<--out>:
    policy.pt        the tuned network in its upstream's own format, nothing else
    policy.json      model, digest of the base checkpoint, method, steps, commit of this code (null
                     outside of git), the CPU, and the environment variables that choose its kernels
                     (docs/toy.md)
    checkpoint.pt    step, trained weights, optimizer; the same command resumes exactly from here.
                     With --ema also the average of the weights, which policy.pt then holds (its
                     width is a share of all steps, in the toy run .2; by default there is none)
    log.jsonl        a line per step, rows.FlowDpoStep, measured in `pair_loss`; docs/results.md
                     explains its fields
    settings.json    the settings that this folder was made with
Takes: toy 20 s on 2 cores.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

import common
from common import command, inputs, ranks, rows, run_flag, stop, training

T_BINS = 4  # the log shows error gaps for each quarter of t
SATURATED = 5.0  # a logit; above it a pair's gradient is below 1 % of its largest possible


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    # --out, --weights, --seed, --precision and others, which 06 has too; --lora and --ema, off by
    # default, are among them
    command.training_flags(parser, out="05_flow_dpo")
    paper = parser.paper
    paper.add_argument(
        "--beta", type=command.number(0), default=600.0, help="KL strength [Sec. 3.1, Tab. 2]"
    )
    paper.add_argument(
        "--lr",
        type=command.number(0),
        default=5e-6,
        help="learning rate after the warm-up [Sec. 3.1]",
    )
    paper.add_argument(
        "--warmup", type=command.whole(0), default=1000, help="linear warm-up steps [Sec. 3.1]"
    )
    paper.add_argument(
        "--steps",
        type=command.whole(1),
        default=12_000,
        help="optimizer steps [Sec. 3.1]; paper silent: of both stages together",
    )
    paper.add_argument(
        "--global-batch",
        type=command.whole(1),
        default=8,
        help="pairs per step on all GPUs together [Sec. 3.1]",
    )
    paper.add_argument(
        "--threshold",
        type=command.number(0, 1),
        help="score_delta, to split the pairs by another one than stage 04's [Tab. 2]",
    )
    paper.add_argument("--hard-first", action="store_true", help="ablation: stage 2 before stage 1")
    paper.add_argument("--no-human", action="store_true", help="ablation: without the human pairs")
    paper.add_argument(
        "--printed-brackets",
        action="store_true",
        help="ablation: Eq. 5's brackets as printed, -beta/2 W - L, instead of Eq. 4's",
    )
    paper.add_argument(
        "--sft-weight",
        type=command.number(0),
        default=0.0,
        help="adds the winner's own error to the loss with this weight; paper: 0; with --beta 0 "
        "this is SFT on the winners",
    )
    paper.add_argument(
        "--stratified-t",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw the n times t of a step from n equal parts of [0, 1], one from each; the t of "
        "each pair is still uniform; paper silent",
    )
    engineering = parser.engineering
    engineering.add_argument(
        "--micro-batch",
        type=command.whole(1),
        default=32,
        help="pairs per forward pass on one GPU; fewer need less memory",
    )
    engineering.add_argument(
        "--save-every", type=command.whole(1), default=500, help="steps between checkpoints"
    )
    return command.parse(parser, argv, "05")


# --------------------------------------------------------------------------------------------------
# Curriculum (Sec. 2.3)
# --------------------------------------------------------------------------------------------------


def read_stages(run, shards, args):
    """The pairs of the two stages, in the order in which they are trained: with --hard-first what
    04 calls stage 2 is the first."""
    hint = "; rerun 04_curriculum_split.py --redo"
    easy = inputs.read_pairs(run / "04_stage1.jsonl", rows.SplitPair, hint)
    hard = inputs.read_pairs(run / "04_stage2.jsonl", rows.SplitPair, hint)
    if args.threshold is not None:
        easy, hard = common.split(easy + hard, args.threshold)
    if args.no_human:
        hard = [pair for pair in hard if pair.source != "human"]
    for pair in easy + hard:
        for k in (pair.winner, pair.loser):
            if (pair.clip, k) not in shards.place_of_audio:
                stop(f"{run}: {pair.clip} has no audio {k} in 01_samples{hint}")
    if not easy + hard:
        stop(f"{run}: no pairs to train on; see the counts of stages 03 and 04")
    return [hard, easy] if args.hard_first else [easy, hard]


def divide_steps(stages, steps):
    """Paper silent: how many steps each stage has. Ours are in proportion to the pairs, so that all
    pairs are seen equally often."""
    first = round(steps * len(stages[0]) / sum(map(len, stages)))
    return [first, steps - first]


def batch_at(step, stages, stage_steps, args):
    """The place in `stages` of the stage that a step is in, 0 or 1, and the step's pairs. They
    depend on the seed and the step alone. A stage goes through its pairs in one random order after
    another, and a step may hold the end of one and the beginning of the next."""
    stage = 0
    if step >= stage_steps[0]:
        stage = 1
        step -= stage_steps[0]
    start = step * args.global_batch
    seed = f"{args.seed}/{stage}"
    return stage, training.from_shuffled_epochs(stages[stage], start, args.global_batch, seed)


def draw_t_and_noise(step, model, args):
    """One t and one eps per pair of the global batch, (pairs,) and (pairs, T, C), shared by winner
    and loser as in Eq. 5.

    t ~ U(0, 1) as below Eq. 5, not as the backbones were pre-trained. It is then moved to a time
    that the network knows (Frieren knows 1000).
    """
    pairs = args.global_batch
    generator = torch.Generator().manual_seed(common.seed_of(args.seed, "step", step))
    t = torch.rand(pairs, generator=generator)
    if args.stratified_t:
        t = (torch.randperm(pairs, generator=generator) + t) / pairs
    t = model.snap_t(t)
    eps = torch.randn(pairs, *model.latent_shape, generator=generator)
    return t, eps


# --------------------------------------------------------------------------------------------------
# A batch of pairs
# --------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B pairs on the device, this rank's share of a step's."""

    stage: int  # 0 or 1, as `batch_at` returns it; logged as 1 or 2
    a_0: torch.Tensor  # (2, B, T, C): latents of the winners, then of the losers
    features: dict  # of their clips, B rows
    t: torch.Tensor  # (B,)
    eps: torch.Tensor  # (B, T, C)


def read_batches(done, stages, stage_steps, shards, model, here, args):
    """Yields the batch of every step from step `done` on. here: this process among all,
    ranks.Ranks."""
    for step in range(done, args.steps):
        stage, pairs = batch_at(step, stages, stage_steps, args)
        a_0, features = load_pairs(here.share(pairs), shards)
        t, eps = draw_t_and_noise(step, model, args)
        t = training.send(here.share(t), here.device)
        eps = training.send(here.share(eps), here.device)
        yield Batch(stage, a_0, features, t, eps)


def load_pairs(pairs, shards):
    """The latents (2, B, T, C) of the winners, then of the losers, and their clips' features, B
    rows, all on the device of the model."""
    winners = shards.latents([(pair.clip, pair.winner) for pair in pairs])
    losers = shards.latents([(pair.clip, pair.loser) for pair in pairs])
    return torch.stack([winners, losers]), shards.features([pair.clip for pair in pairs])


# --------------------------------------------------------------------------------------------------
# One step (Eq. 5)
# --------------------------------------------------------------------------------------------------


def pair_errors(network, features, a_0, eps, t):
    """Errors of winners and losers from one forward pass. The network projects the conditions once
    per pair, and repeats them for the loser (FlowModel.velocity, with R = 2 rows of each clip).

    a_0: (2, B, T, C), winners, then losers; eps: (B, T, C); t: (B,) -> err_w, err_l: (B,) float32.
    """
    t_twice = t.repeat(2)
    a_t, v = common.interpolate(a_0.flatten(0, 1), eps.repeat(2, 1, 1), t_twice)  # (2B, T, C)
    u = network(a_t, t_twice, features)
    err_w, err_l = common.flow_error(v, u).chunk(2)
    return err_w, err_l


def pair_loss(policy, reference, features, a_0, eps, t, args):
    """Eq. 5 for B pairs; features, a_0, eps, t: as for `pair_errors`. Paper silent: guidance and
    dropout in training. Here are neither: the network predicts with all conditions, in eval mode.
    Returns the loss (B,), and what is logged of each pair, {name: (B,)}; rows.FlowDpoStep has a
    line on each name."""
    with training.autocast(t.device, args.precision):
        with torch.no_grad():
            ref_err_w, ref_err_l = pair_errors(reference, features, a_0, eps, t)
        err_w, err_l = pair_errors(policy, features, a_0, eps, t)
    loss, logits = common.flow_dpo_loss(
        err_w, err_l, ref_err_w, ref_err_l, args.beta, args.printed_brackets
    )
    loss = loss + args.sft_weight * err_w

    with torch.no_grad():
        weight = torch.sigmoid(-logits)  # the factor of the pair's gradient
        logged = {
            "pairs": torch.ones_like(loss),  # its sum is the number of pairs, for `means_of`
            "loss": loss,
            "accuracy": (logits > 0).float() + 0.5 * (logits == 0).float(),
            "gap_w": err_w - ref_err_w,
            "gap_l": err_l - ref_err_l,
            "ref_w": ref_err_w,
            "saturated": logits > SATURATED,
            "opposed": logits < -SATURATED,
            "weight": weight,
            "weight_wrong": weight * (logits < 0),  # the implicit reward prefers the loser
        }
    return loss, logged


def train_step(policy, reference, batch, args):
    """Accumulates the gradient over this rank's share of the global batch. Returns sums over its
    pairs for the log, {name: (T_BINS,) float64}, one for each quarter of t; they stay on the
    device, so that the host need not wait for them."""
    pairs = len(batch.t)
    sums = {}
    for start in range(0, pairs, args.micro_batch):
        micro = slice(start, start + args.micro_batch)
        features = {name: value[micro] for name, value in batch.features.items()}
        t = batch.t[micro]
        policy.require_backward_grad_sync = micro.stop >= pairs  # DDP: one all-reduce per step
        loss, logged = pair_loss(
            policy, reference, features, batch.a_0[:, micro], batch.eps[micro], t, args
        )
        (loss.sum() / pairs).backward()  # DDP averages over ranks, which have equally many pairs
        for name, value in sum_by_quarter(logged, t).items():
            sums[name] = sums.get(name, 0) + value
    return sums


@torch.no_grad()
def sum_by_quarter(measured, t):
    """{name: (B,)} -> {name: (T_BINS,) float64}: for each quarter of t the sum over its pairs."""
    quarter = (t * T_BINS).long().clamp(max=T_BINS - 1)  # (B,)
    stacked = torch.stack([value.double() for value in measured.values()])  # (names, B)
    sums = torch.zeros(len(measured), T_BINS, dtype=torch.float64, device=t.device)
    return dict(zip(measured, sums.index_add_(1, quarter, stacked)))


def means_of(sums):
    """The means over the global batch that are logged. sums: {name: (T_BINS,)}. gap_w_t and gap_l_t
    are lists of the means in each quarter of t, None for a quarter without a pair."""
    pairs = sums.pop("pairs")
    means = {name: (value.sum() / pairs.sum()).item() for name, value in sums.items()}
    for name in ("gap_w", "gap_l"):
        by_quarter = (sums[name] / pairs).tolist()
        means[f"{name}_t"] = [None if math.isnan(gap) else gap for gap in by_quarter]
    return means


# --------------------------------------------------------------------------------------------------
# What the curves show
# --------------------------------------------------------------------------------------------------


def share_backwards(stages):
    """The share of the mined pairs whose winner AudioScore likes less than their loser."""
    mined = [pair.score_c for pair in stages[0] + stages[1] if pair.source == "auto"]
    return sum(score_c < 0 for score_c in mined) / max(1, len(mined))


def diagnosis(accuracy, saturated, error_rise, wrong_share, backwards):
    """What may be wrong with a training, the first case that fits, and what to do. docs/curves.md
    has a table of the cases; the limits separate the six trainings that it shows. In all six the
    errors of winner and loser both rise, the loser's more, though the paragraph below Eq. 5 has the
    winner's fall; here it may rise to three times the reference's.

    accuracy, saturated: as logged; error_rise: how much larger the winner's error is than the
    reference's, as a share of it, so that 1 means twice as large; wrong_share: the share of the
    gradient's weight that wrongly ordered pairs have; backwards: see `share_backwards`.
    """
    negative = f"score_c is negative for {backwards:.0%} of the mined pairs"
    negative += ", whose winner is the worse audio"
    again = "mine them anew: 03 with --redo --min-score-c 0, then 04 --redo, then 05 --out NAME"
    if backwards > 0.5:  # then good curves mean that the policy has learned worse audio
        return "pairs are backwards", f"{negative}; {again}"
    if accuracy < 0.6:
        return "has hardly learned", "give more --steps or a higher --lr"
    if error_rise > 10:
        return "beta too small", "nothing holds the policy to the reference; raise --beta"
    if wrong_share > 0.85 and error_rise > 1:
        return "lr too high", "lower --lr"
    if wrong_share > 0.85:
        return "beta too large", "the few wrong pairs alone move it; lower --beta or --lr"
    if saturated > 0.95:
        return "too few pairs", "they are learned by heart; give fewer --steps or more pairs"
    if error_rise > 2:
        return "winner's error rises", "lower --lr, raise --beta, or give --sft-weight 2"
    if backwards > 0:
        return "some pairs are backwards", f"{negative}; {again}"
    return "healthy", "nothing to change"


def reading(log, backwards):
    """What the last 50 steps of the longer stage show, in one line: of a short one they would tell
    little. log: a list of rows.FlowDpoStep."""
    stages = [[step for step in log if step.stage == stage] for stage in (1, 2)]
    last = max(stages, key=len)[-50:]
    mean = {}
    for name in ("loss", "accuracy", "saturated", "gap_w", "ref_w", "weight", "weight_wrong"):
        mean[name] = fmean(getattr(step, name) for step in last)
    error_rise = mean["gap_w"] / max(mean["ref_w"], 1e-12)
    wrong_share = mean["weight_wrong"] / max(mean["weight"], 1e-12)
    case, advice = diagnosis(
        mean["accuracy"], mean["saturated"], error_rise, wrong_share, backwards
    )
    return (
        f"curves: {case}: {advice} (loss {mean['loss']:.2f}, accuracy {mean['accuracy']:.2f}, "
        f"saturated {mean['saturated']:.2f}, {wrong_share:.0%} of the gradient's weight on "
        f"wrongly ordered pairs, winner's error {error_rise:+.0%}; docs/curves.md)"
    )


def print_plan(model, stages, stage_steps, done, here, args):
    names = ["hard + human", "easy"] if args.hard_first else ["easy", "hard + human"]
    for i, name in enumerate(names):
        pairs = len(stages[i])
        print(
            f"stage {i + 1} ({name}): {pairs} pairs, {stage_steps[i]} steps of {args.global_batch}"
        )
    total = sum(map(len, stages))
    passes = args.steps * args.global_batch / total
    print(
        f"every pair is seen {passes:.1f} times on average ({args.steps} steps of "
        f"{args.global_batch} pairs over {total}); in the paper 2 times"
    )
    size = model.latent_shape[0] * model.latent_shape[1]
    print(
        f"beta {args.beta:g} multiplies an error that is a mean over {size} latent values; with "
        f"the sum over them, the same strength would be beta {args.beta / size:g}"
    )
    trained = sum(p.numel() for p in model.trainable_parameters())
    print(
        f"trained parameters: {trained:,}; {done} of {args.steps} steps are done; {here.world} "
        "process(es)"
    )


def main(args):
    # -- setup
    here = ranks.setup()
    run = Path(args.run_dir)
    run_json = inputs.read_run(run)
    training.refuse_uneven("--global-batch", args.global_batch, here.world)

    sources = ["01_samples", "04_stage1.jsonl", "04_stage2.jsonl"]
    with training.output(run, args.out, sources) as output:
        # -- data
        model = common.load_base_model(run, here.device, args.weights)
        shards = training.Shards(run, inputs.read_samples(run), model)  # latents and features
        stages = read_stages(run, shards, args)
        stage_steps = divide_steps(stages, args.steps)

        # -- model
        bf16 = training.in_bf16(here.device, args.precision)
        # The reference is the pre-trained model, in stage 2 as in stage 1. Where u is computed in
        # bf16, autocast rounds weights whenever it uses them; so frozen ones are stored rounded, in
        # half the memory. Those that are trained never are.
        if args.lora:
            training.add_lora(model, args.lora, common.seed_of(args.seed, "lora"), bf16)
            reference = training.lora_reference(model)  # the model itself without its adapters
        else:
            reference = training.frozen_copy(model, bf16)
        args.compile = training.compiles(model, args)  # so that settings.json says what was done
        if args.compile:
            training.compile_both(model, reference)
        # The trainer holds the optimizer and what the run has reached: its steps() are those left.
        trainer = training.Trainer(output, model, rows.FlowDpoStep, args.save_every, here, args)
        print_plan(model, stages, stage_steps, trainer.done, here, args)

        # -- loop: AdamW (the trainer's), a linear warm-up, then a constant lr [Sec. 3.1], which go
        # on from stage 1 into stage 2. trainer.policy is the model, on several GPUs in DDP. Paper
        # silent: weight decay 1e-6, betas (0.9, 0.95) and the gradient's bound of 1 are MMAudio's.
        batches = read_batches(trainer.done, stages, stage_steps, shards, model, here, args)
        upcoming = next(batches, None)
        for step in trainer.steps():
            batch = upcoming
            trainer.optimizer.zero_grad(set_to_none=True)
            sums = train_step(trainer.policy, reference, batch, args)
            upcoming = next(batches, None)  # read and sent while a GPU is still at work
            grad_norm = training.clip_gradient(model)  # to norm 1
            # Stops where one of them is not finite, and names the folder's checkpoint.
            sums, grad_norm = training.sum_step_over_ranks(step, sums, grad_norm, trainer.folder)
            means = means_of(sums)
            if step == 0 and args.sft_weight == 0 and abs(means["loss"] - math.log(2)) > 1e-3:
                stop(
                    f"step 0: the loss is {means['loss']:.4f}, not log 2, so the reference "
                    "differs; use --no-compile or --precision fp32"
                )
            lr = training.lr_at(step, args)
            training.take_step(trainer.optimizer, lr)
            trainer.bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            trainer.finish_step(
                step,
                stage=batch.stage + 1,
                **means,
                grad_norm=grad_norm,
                lr=lr,
                forwards=4 * args.global_batch * (step + 1),  # policy and reference, two each
                forwards_grad=2 * args.global_batch * (step + 1),  # the policy's
            )

        # -- save
        if here.first:
            log = rows.read(trainer.folder / "log.jsonl", rows.FlowDpoStep)
            print(reading(log, share_backwards(stages)))
            trainer.save_policy(run_json, "flow_dpo")
    print(f"next: python 06_ddpo_baseline.py {run_flag(run)}  # the paper's baseline")
    print(f"  or: python 07_evaluate.py {run_flag(run)}{training.systems_flag(args.out)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
