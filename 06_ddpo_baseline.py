"""Stage 06: DDPO, the paper's baseline, with P(Good) of AudioScore as reward (Sec. 3.1).

Run:
    python 06_ddpo_baseline.py                                             # toy world, CPU
    torchrun --standalone --nproc_per_node 8 06_ddpo_baseline.py --run-dir runs/vgg
Each round draws --prompts clips, samples --group-size audios of each with an SDE whose marginals are the ODE's, scores
them, and makes --updates optimizer steps on the stored transitions; one step = one optimizer update, as in stage 05.

Reads:
    01_samples/           features of the train clips
    02_audioscore.pt      the reward model, on top of the five scorers
    02_scores.jsonl       the rated clips, which are no prompts: AudioScore was fitted on them
    03_scores/            what the scorers saw of the prompts' videos
    clips.jsonl           and the prompts' own sound, for PESQ
Writes, in <run>/<--out>:
    policy.pt, policy.json, checkpoint.pt, settings.json     as stage 05; a rerun resumes at the last whole round
    log.jsonl             per step: round, reward (mean P(Good) of the round's samples), reward_std (within
                          prompts), no_spread (share of the round's prompts whose audios all have one reward, up to
                          rounding; at 1 the round changes nothing), ratio, clipped (share), approx_kl, grad_norm, lr,
                          seconds, forwards (rows through the network so far, sampling and training), forwards_grad
                          (with a backward pass), peak_gb
Takes: toy 35 s on 2 cores.
"""

import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torchaudio
from tqdm import tqdm

import common
from common import AudioScore, media, number, ranks, record, rows, scoring, speed, stop, training

# Of P(Good): audios of a prompt whose rewards have a smaller standard deviation are equally good.
# Rounding alone makes a network's scores differ by a factor of 1 +- 2e-6 between batches and
# machines, which moves P(Good) by up to 2e-5 (measured in the toy world). Divided by its own
# deviation, such noise would become advantages of +-1.
MIN_SPREAD = 1e-4


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument("--out", default="06_ddpo", help="name of the output folder inside the run")
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    paper = parser.paper
    paper.description = "Silent on DDPO's settings: as many steps and the same lr as stage 05."
    paper.add_argument(
        "--lr",
        type=number(float, 0),
        default=5e-6,
        help="learning rate, constant after the warm-up",
    )
    paper.add_argument("--warmup", type=number(int, 0), default=0, help="linear warm-up steps")
    paper.add_argument("--steps", type=number(int, 1), default=12_000, help="optimizer updates")
    paper.add_argument(
        "--prompts", type=number(int, 1), default=8, help="clips per round over all GPUs"
    )
    paper.add_argument(
        "--group-size", type=number(int, 2), default=8, help="audios per clip and round"
    )
    paper.add_argument(
        "--sampling-steps", type=number(int, 2), default=10, help="SDE steps of a trajectory"
    )
    paper.add_argument(
        "--updates", type=number(int, 1), default=8, help="optimizer updates per round"
    )
    paper.add_argument(
        "--eta", type=number(float, 0), default=0.7, help="SDE noise, s = eta sqrt(t / (1 - t))"
    )
    paper.add_argument(
        "--clip-range",
        type=number(float, 0),
        default=1e-3,
        help="the ratio is clipped to 1 +- this",
    )
    engineering = parser.engineering
    engineering.add_argument(
        "--micro-batch", type=number(int, 1), default=16, help="audios per backward pass, one GPU"
    )
    engineering.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA"
    )
    engineering.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute blocks, saves memory"
    )
    described = "rank of adapters on every linear and convolution layer, trained instead of the weights; 0: the weights"
    engineering.add_argument("--lora", type=number(int, 0, 4096), default=0, help=described)
    engineering.add_argument(
        "--save-every", type=number(int, 1), default=20, help="rounds between checkpoints"
    )
    engineering.add_argument("--seed", type=number(int, 0), default=0, help="of prompts and noise")
    common.compile_flag(parser)
    common.workers_flag(parser)
    args = common.parse(parser, argv, "06")
    args.compile = args.compile and not args.lora  # as in stage 05
    if not 1 <= args.updates <= args.sampling_steps - 1:
        stop(
            f"--updates {args.updates}: from 1 to {args.sampling_steps - 1}, the stochastic steps "
            "of a trajectory"
        )
    return args


def lr_at(step, args):
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup))


# --------------------------------------------------------------------------------------------------
# The policy as an SDE
# --------------------------------------------------------------------------------------------------


def sde_step(a_t, u, t, t_next, eta):
    """One step of the SDE with the ODE's marginals, from t towards the data.

    a_t, u: (B, T, C); t, t_next: (B,), t > t_next > 0. eps_hat = a_t + (1 - t) u is the expected
    noise, so the score of the marginal is -eps_hat / t. Returns mean (B, T, C) and std (B, 1, 1) of
    a_{t_next} given a_t.
    """
    t = t[:, None, None]
    t_next = t_next[:, None, None]
    dt = t - t_next
    below_1 = torch.where(
        t == 1, t_next, t
    )  # at t = 1, s is infinite: take the next grid time in it
    s = eta * (below_1 / (1 - below_1)).sqrt()
    mean = a_t - (u + s**2 / (2 * t) * (a_t + (1 - t) * u)) * dt
    return mean, s * dt.sqrt()


def log_prob(a_next, mean, std):
    """Gaussian log-density averaged over the latent (B,), so that --clip-range does not depend on
    its size."""
    density = -0.5 * ((a_next - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=(1, 2))


def grid(model, steps):
    return model.snap_t(torch.linspace(1, 0, steps + 1)[:-1]).tolist() + [0.0]


@torch.no_grad()
def rollout(model, features, seeds, guidance, args, device):
    """Samples trajectories. features: B rows; seeds: R * B (row r * B + b belongs to clip b).

    Returns states (S, R * B, T, C): a_t at every grid time and the step after the last stochastic
    one, the log-probs (S - 1, R * B) at sampling time, and a_0 (R * B, T, C). The last step is
    deterministic and has no log-probability.
    """
    times = grid(model, args.sampling_steps)
    # As in training: under bf16, or through another compiled graph than one that needs gradients,
    # the ratio would not start at 1.
    with training.autocast(device, args.precision), torch.set_grad_enabled(args.compile):
        conditions = model.project(features)

    def velocity(a_t, t):
        with training.autocast(device, args.precision), torch.set_grad_enabled(args.compile):
            return model.velocity(a_t, t, conditions, guidance).float().detach()

    generators = [torch.Generator().manual_seed(common.seed_of(seed, "sde", 0)) for seed in seeds]
    a_t = common.initial_noise(model, seeds)
    states = [a_t]
    log_probs = []
    for time_now, time_next in zip(times[:-2], times[1:-1]):
        t = torch.full((len(seeds),), time_now, device=device)
        t_next = torch.full((len(seeds),), time_next, device=device)
        mean, std = sde_step(a_t, velocity(a_t, t), t, t_next, args.eta)
        z = torch.stack(
            [torch.randn(model.latent_shape, generator=generator) for generator in generators]
        )
        a_t = mean + std * z.to(device, non_blocking=True)
        states.append(a_t)
        log_probs.append(log_prob(a_t, mean, std))
    t = torch.full((len(seeds),), times[-2], device=device)
    a_0 = a_t - times[-2] * velocity(a_t, t)
    return torch.stack(states), torch.stack(log_probs), a_0


# --------------------------------------------------------------------------------------------------
# Reward and advantage
# --------------------------------------------------------------------------------------------------


class Reward:
    """P(Good) of generated audio. The scorers' audio networks stay loaded; what they saw of the
    videos is stage 03's.

    blocks: those of stage 03, by clip.
    """

    def __init__(self, run, scorers, blocks, device, workers):
        self.audioscore = AudioScore.load(run / "02_audioscore.pt")
        self.set = scorers
        self.blocks = blocks
        self.scorers = {name: scorers.load(name, device, workers) for name in scorers.of_audioscore}

    def videos(self, name, clips):
        """{clip id: what this scorer saw of its video}."""
        seen = {}
        for clip in clips:
            if clip.id not in seen:
                block = self.blocks[clip.id]
                if not block.video_file(name).exists():
                    stop(
                        f"{block.video_file(name)}: no such file; run 03_mine_pairs.py first, it "
                        "looks at the videos"
                    )
                key = scoring.video_key(self.set, name, block.clips)
                seen |= scoring.read_videos(block, key, name, self.scorers[name].video_shapes)
        return seen

    def __call__(self, model, a_0, clips):
        """a_0: (B, T, C), clips: B clips -> (B,) float64 in [0, 1]; 0 for audio that is not
        finite."""
        waves = model.decode(a_0)
        finite = waves.isfinite().all(dim=1)
        waves = torch.nan_to_num(waves, 0.0, 0.0, 0.0).clamp(-1, 1)
        said = {}
        for name, scorer in self.scorers.items():
            resampled = torchaudio.functional.resample(
                waves, model.sample_rate_hz, scorer.sample_rate_hz
            )
            resampled = media.fit_length(resampled, round(model.clip_s * scorer.sample_rate_hz))
            videos = self.videos(name, clips) if "video" in scorer.reads else None
            said[name] = scoring.score_waves(scorer, resampled, clips, videos)
        scores = self.audioscore.five_scores(self.set.five(said))
        p_good = self.audioscore(scores)[:, 0]
        return p_good * finite


def group_advantages(rewards, groups):
    """How much better an audio is than the others of its prompt, in standard deviations of their
    rewards.

    rewards: (R * B,) float64, B = groups; row r * B + b is prompt b's. Returns advantages (R * B,),
    (r - mean) / std, 0 where std is below MIN_SPREAD; and std (B,).
    """
    rewards = rewards.view(-1, groups)
    std, mean = torch.std_mean(rewards, dim=0)
    advantages = torch.where(std < MIN_SPREAD, 0.0, (rewards - mean) / std)
    return advantages.flatten(), std


def ppo_loss(ratio, advantage, clip_range):
    """DDPO-IS: the clipped surrogate per transition, (B,) -> (B,)."""
    return -torch.minimum(
        ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    )


# --------------------------------------------------------------------------------------------------
# One round
# --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Trajectories of B prompts, R of each; row r * B + b is prompt b's."""

    features: dict  # B rows
    states: torch.Tensor  # (S, R * B, T, C)
    log_probs: torch.Tensor  # (S - 1, R * B), when they were sampled
    advantages: torch.Tensor  # (R * B,)
    chosen: torch.Tensor  # (updates, R * B): the step that each update trains


def draw_prompts(clips, number, args):
    """The round's clips: epochs of seeded permutations, a function of the round alone."""
    drawn = []
    for i in range(number * args.prompts, (number + 1) * args.prompts):
        order = training.shuffled(f"{args.seed}/{i // len(clips)}", len(clips))
        drawn.append(clips[order[i % len(clips)]])
    return drawn


def draw_times(seeds, args):
    """Which stochastic step each update trains, per trajectory: (updates, B), without
    repetition."""
    rows = [
        random.Random(seed).sample(range(args.sampling_steps - 1), args.updates) for seed in seeds
    ]
    return torch.tensor(rows).T


def collect(model, reward, shards, clips, number, guidance, args, device):
    """Samples and scores this rank's prompts, as many clips at a time as --micro-batch allows.

    Returns the batches, and this rank's sums for the log: reward over its audios; reward_std and
    no_spread over its prompts.
    """
    per_batch = max(1, args.micro_batch // args.group_size)
    sampled = []
    # This thread ends with the round: as long as one lives, OpenMP's own fall asleep between two
    # operations.
    with ThreadPoolExecutor(1) as scoring_thread:
        for start in range(0, len(clips), per_batch):
            prompts = clips[start : start + per_batch]
            features = shards.features([clip.id for clip in prompts], device)
            names = [(clip.id, k) for k in range(args.group_size) for clip in prompts]
            seeds = [common.seed_of(args.seed, "ddpo", number, clip_id, k) for clip_id, k in names]
            states, log_probs, a_0 = rollout(model, features, seeds, guidance, args, device)
            # While the next prompts are sampled:
            rewards = scoring_thread.submit(reward, model, a_0, prompts * args.group_size)
            sampled.append((len(prompts), seeds, features, states, log_probs, rewards))

    batches = []
    sums = {"reward": 0.0, "reward_std": 0.0, "no_spread": 0.0}
    for prompts, seeds, features, states, log_probs, rewards in sampled:
        rewards = rewards.result()  # on the CPU
        advantages, std = group_advantages(rewards, prompts)
        chosen = draw_times(seeds, args).to(device)
        batches.append(Batch(features, states, log_probs, advantages.float().to(device), chosen))
        sums["reward"] += rewards.sum().item()
        sums["reward_std"] += std.sum().item()
        sums["no_spread"] += (std < MIN_SPREAD).sum().item()
    return batches, sums


def over_all_ranks(sums, device):
    """The same sums over the prompts of all ranks: every rank then knows whether the round teaches
    anything."""
    tensors = {
        name: torch.tensor(value, dtype=torch.float64, device=device)
        for name, value in sums.items()
    }
    return {name: value.item() for name, value in training.sum_dict_over_ranks(tensors).items()}


def train_step(policy, batches, update, times, guidance, world, args, device):
    """Accumulates the gradient of one update: one chosen transition of every trajectory of the
    round. Returns this rank's sums for the log, {name: () float64 on the device}, for which nothing
    here waits."""
    audios = args.prompts * args.group_size
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = {"ratio": zero, "clipped": zero, "approx_kl": zero}
    parts = [(batch, part) for batch in batches for part in split_trajectories(batch, args, device)]
    for i, (batch, part) in enumerate(parts):
        policy.require_backward_grad_sync = i == len(parts) - 1  # DDP: one all-reduce per step
        at = batch.chosen[update][part]
        a_t = batch.states[at, part]
        a_next = batch.states[at + 1, part]
        t = times[at]
        t_next = times[at + 1]
        with training.autocast(device, args.precision):
            u_theta = policy(a_t, t, batch.features, guidance)
        mean, std = sde_step(a_t, u_theta.float(), t, t_next, args.eta)
        log_ratio = log_prob(a_next, mean, std) - batch.log_probs[at, part]
        ratio = log_ratio.exp()
        loss = ppo_loss(ratio, batch.advantages[part], args.clip_range)
        (loss.sum() / audios * world).backward()
        with torch.no_grad():
            clipped = (ratio - 1).abs() > args.clip_range
            sums["ratio"] = sums["ratio"] + ratio.double().sum()
            sums["clipped"] = sums["clipped"] + clipped.double().sum()
            sums["approx_kl"] = sums["approx_kl"] + 0.5 * log_ratio.square().double().sum()
    return sums


def split_trajectories(batch, args, device):
    """Rows of a batch for one backward pass each: whole repeats of the prompts, so that row r * B +
    b keeps to prompt b, and at most --micro-batch where that is possible."""
    prompts = len(next(iter(batch.features.values())))
    repeats = max(1, args.micro_batch // prompts)
    return torch.arange(len(batch.advantages), device=device).split(repeats * prompts)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def find_prompts(run, samples):
    """The train clips that may be drawn: those with features that were not rated."""
    rated = {row.clip for row in rows.read(run / "02_scores.jsonl", rows.RatedScore)}
    clips = common.read_clips(run, "train")
    prompts = [clip for clip in clips if clip.id in samples and clip.id not in rated]
    if not prompts:
        stop(
            f"{run}: every clip was rated, and AudioScore was fitted on those; rate fewer (02 "
            "--num-rated-clips)"
        )
    return prompts


def print_rewards(log):
    fifth = max(1, len(log) // 5)
    first = sum(step.reward for step in log[:fifth]) / fifth
    last = sum(step.reward for step in log[-fifth:]) / fifth
    print(f"reward while training: first fifth {first:.3f}, last fifth {last:.3f}")
    no_spread = sum(step.no_spread for step in log) / len(log)
    if no_spread > 0.5:
        print(
            f"warning: {no_spread:.0%} of the prompts taught nothing, since all their audios had "
            "one reward "
            "(no_spread in log.jsonl): see in 02's report whether AudioScore tells audios apart, "
            "or give a "
            "larger --group-size"
        )


def main(args):
    # -- setup
    here = ranks.setup()
    device = here.device
    run = Path(args.run_dir)
    run_json = common.read_run(run)
    folder = training.output_folder(run, args.out)
    if args.prompts % here.world:
        stop(
            f"--prompts {args.prompts} cannot be divided over {here.world} processes; start as "
            "many as divide it"
        )

    inputs = ["01_samples", "02_audioscore.pt", "02_scores.jsonl"]
    with record.stage(
        run, args.out, inputs, [f"{args.out}/policy.pt"], advice=training.ADVICE
    ) as stage:
        stage.claim(training.settings_of(args))

        # -- data
        model = common.load_base_model(run, device, args.weights)
        samples = common.read_samples(run)
        shards = training.Shards(run, samples, model)
        prompts = find_prompts(run, samples)
        blocks = common.shard_blocks(run, samples, common.read_clips(run, "train"))
        block_of = {clip.id: block for block in blocks for clip in block.clips}
        reward = Reward(run, common.scorers_of(run, args.weights), block_of, device, args.workers)
        guidance = run_json.sampler.guidance  # guidance is inside the policy

        # -- model
        bf16 = training.in_bf16(device, args.precision)
        lora = (
            training.Lora(model, args.lora, common.seed_of(args.seed, "lora"), bf16)
            if args.lora
            else None
        )
        if args.compile:
            speed.compile_models(model)
        if args.gradient_checkpointing:
            training.checkpoint_blocks(model)
        optimizer = torch.optim.AdamW(
            model.trainable_parameters(),
            lr=args.lr,
            betas=(0.9, 0.95),
            weight_decay=1e-6,
            fused=device != "cpu",
        )
        done = training.resume(folder, model, optimizer, args.steps, stage.digest(), rows.DdpoStep)
        policy = training.data_parallel(model, device)
        times = torch.tensor(grid(model, args.sampling_steps), device=device)
        audios = args.prompts * args.group_size
        forwards = audios * (
            2 if guidance != 1 else 1
        )  # rows of one guided evaluation of a round's audios
        if here.first:
            print(
                f"{audios} audios per round, {args.updates} updates each; guidance {guidance} "
                "inside the policy"
            )
            print(f"step {done} of {args.steps}; {here.world} process(es) on {device}")

        # -- loop
        bar = tqdm(
            range(done, args.steps),
            initial=done,
            total=args.steps,
            unit="step",
            disable=not here.first,
        )
        for step in bar:
            began = time.time()
            number_of_round, update = divmod(step, args.updates)
            if update == 0:
                mine = here.share(draw_prompts(prompts, number_of_round, args))
                batches, rewards = collect(
                    model, reward, shards, mine, number_of_round, guidance, args, device
                )
                rewards = over_all_ranks(rewards, device)
            optimizer.zero_grad(set_to_none=True)
            sums = train_step(policy, batches, update, times, guidance, here.world, args, device)
            norm = torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
            sums, grad_norm = training.read_step(sums, norm)
            means = {name: value.item() / audios for name, value in sums.items()}
            if not (all(map(math.isfinite, means.values())) and math.isfinite(grad_norm)):
                last_good = f"{folder}/checkpoint.pt holds the last good round"
                stop(f"step {step}: the ratio is not finite; {last_good}; lower --lr")
            lr = lr_at(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Without any spread all gradients are 0, but AdamW's momentum and weight decay would
            # still move weights.
            if rewards["no_spread"] < args.prompts:
                optimizer.step()

            if here.first:
                logged = rows.DdpoStep(
                    step=step,
                    round=number_of_round,
                    reward=rewards["reward"] / audios,
                    reward_std=rewards["reward_std"] / args.prompts,
                    no_spread=rewards["no_spread"] / args.prompts,
                    **means,
                    grad_norm=grad_norm,
                    lr=lr,
                    seconds=time.time() - began,
                    forwards=forwards * (step + 1 + (number_of_round + 1) * args.sampling_steps),
                    forwards_grad=forwards * (step + 1),
                    peak_gb=training.peak_gb(device),
                )
                rows.append(folder / "log.jsonl", logged)
                if step == done and logged.clipped:  # the network is still the one that sampled
                    clipped = f"rounding alone clips {logged.clipped:.0%} of the ratios"
                    tqdm.write(f"warning: {clipped}; give --no-compile or --precision fp32")
                bar.set_postfix(
                    reward=f"{logged.reward:.3f}", clipped=f"{logged.clipped:.2f}", refresh=False
                )
                whole_round = update == args.updates - 1
                if (
                    whole_round and (number_of_round + 1) % args.save_every == 0
                ) or step + 1 == args.steps:
                    if lora and lr > 0 and optimizer.state:
                        lora.check_moved()
                    training.save_checkpoint(folder, step + 1, model, optimizer, stage.digest())

        # -- save
        if here.first:
            print_rewards(rows.read(folder / "log.jsonl", rows.DdpoStep))
            if lora:
                lora.merge()
            training.save_policy(run, args.out, model, run_json, "ddpo", args.steps)
    if here.first:
        print(f"next: python 07_evaluate.py --run-dir {run}{training.systems_flag(args.out)}")


if __name__ == "__main__":
    common.launch(main, parse_args)
