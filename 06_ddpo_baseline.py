"""Stage 06: DDPO, the paper's baseline, with P(Good) of AudioScore as reward (Sec. 3.1).

Run:
    python 06_ddpo_baseline.py                                             # toy world, CPU
    torchrun --standalone --nproc_per_node 8 06_ddpo_baseline.py --run-dir runs/vgg

Each round draws --prompts clips, samples --group-size audios of each with an SDE whose marginals
are the ODE's, scores them, and makes --updates optimizer steps. An audio is sampled in M =
--sampling-steps steps from noise to data: M - 1 noisy transitions between M states, then a last
step without noise to a_0. Each optimizer step of a round trains one of the M - 1 transitions of
every audio, each time another. --steps counts the optimizer steps, as in stage 05.

Paper silent: which form of DDPO. Ours is DDPO-IS (arXiv 2305.13301), which has PPO's clipped ratio.
From Flow-GRPO (arXiv 2505.05470) we take the SDE of a flow, and advantages among the audios of one
prompt. There is no KL term and no warm-up, as in DDPO's code. docs/choices.md lists all choices.

Reads:
    01_samples/           features of the train clips
    02_audioscore.pt      the reward model, on top of the five scorers
    02_scores.jsonl       the rated clips, which are no prompts: AudioScore was fitted on them
    03_scores/            the scorers' embeddings of the prompts' videos; each file says from which
                          videos and weights it was made, which is checked
    clips.jsonl           the prompts' captions, labels and videos
    the videos            their own sound, against which PESQ compares
Writes, in <run>/<--out>:
    policy.pt, policy.json, checkpoint.pt, settings.json
                          as of stage 05; the same command resumes at the last whole round
    log.jsonl             a line per step, rows.DdpoStep; docs/results.md explains its fields
Takes: toy 45 s on 2 cores.
"""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import torchaudio
from tqdm import tqdm

import common
from common import (
    AudioScore,
    command,
    inputs,
    media,
    ranks,
    rows,
    run_flag,
    scoring,
    speed,
    stop,
    training,
)

# Where the rewards of a prompt have a smaller standard deviation, we treat them as equal. Rounding
# alone moves P(Good) by up to 2e-5 (measured in the toy world); divided by its own standard
# deviation, such rounding would become large advantages.
MIN_SPREAD = 1e-4


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    command.training_flags(parser, out="06_ddpo")  # the flags that 05 has too, such as --out, --ema
    paper = parser.paper
    paper.description = (
        "Paper silent: whether Sec. 3.1's settings hold for DDPO too. Steps and lr are those of "
        "stage 05; there is no warm-up, as in DDPO's code."
    )
    paper.add_argument(
        "--lr", type=command.number(0), default=5e-6, help="learning rate, after a warm-up if any"
    )
    paper.add_argument("--warmup", type=command.whole(0), default=0, help="linear warm-up steps")
    paper.add_argument("--steps", type=command.whole(1), default=12_000, help="optimizer updates")
    paper.add_argument(
        "--prompts",
        type=command.whole(1),
        default=8,
        help="clips per round on all GPUs together",
    )
    paper.add_argument(
        "--group-size", type=command.whole(2), default=8, help="audios per clip and round"
    )
    paper.add_argument(
        "--sampling-steps", type=command.whole(2), default=10, help="SDE steps of a trajectory"
    )
    paper.add_argument(
        "--updates", type=command.whole(1), default=8, help="optimizer updates per round"
    )
    paper.add_argument(
        "--eta", type=command.number(1e-3), default=0.7, help="SDE noise, s = eta sqrt(t / (1 - t))"
    )
    paper.add_argument(
        "--clip-range",
        type=command.number(0),
        default=1e-3,
        help="PPO clips the ratio to 1 plus or minus this",
    )
    engineering = parser.engineering
    engineering.add_argument(
        "--micro-batch",
        type=command.whole(1),
        default=16,
        help="audios per backward pass on one GPU, and per rollout, which has at least one whole "
        "group; fewer need less memory",
    )
    engineering.add_argument(
        "--save-every", type=command.whole(1), default=20, help="rounds between checkpoints"
    )
    command.workers_flag(parser)
    args = command.parse(parser, argv, "06")
    if args.updates >= args.sampling_steps:
        stop(
            f"--updates {args.updates}: at most {args.sampling_steps - 1}, the stochastic steps of "
            "a trajectory"
        )
    return args


# --------------------------------------------------------------------------------------------------
# The policy as an SDE (Flow-GRPO, arXiv 2505.05470)
# --------------------------------------------------------------------------------------------------


def sde_step(a_t, u, t, t_next, eta):
    """One step of the SDE with the ODE's marginals, from t towards the data, dt = t - t_next.

    a_t = (1 - t) a_0 + t eps, and u estimates eps - a_0. So the noise that a_t is expected to hold
    is eps_hat = a_t + (1 - t) u, and the gradient of the marginal's log-density, which is called
    its score, is -eps_hat / t. Time runs backwards, and so the SDE's drift is the ODE's, u, minus
    s^2 / 2 times that score:

        a_next = a_t - (u + s^2 / (2 t) eps_hat) dt + s sqrt(dt) z,  s = eta sqrt(t / (1 - t))

    At t = 1 s would be infinite, and we take it at t_next: eta sqrt(t_next / (1 - t_next)). (In
    flow_grpo's code it is eta sqrt(1 / (1 - t_next)) there, with 10 steps 1.05 times as much.)

    a_t, u: (B, T, C); t, t_next: (B,), t > t_next > 0. Returns mean (B, T, C) and std (B, 1, 1) of
    a_next given a_t.
    """
    t = t[:, None, None]
    t_next = t_next[:, None, None]
    dt = t - t_next
    t_of_s = torch.where(t == 1, t_next, t)
    s = eta * (t_of_s / (1 - t_of_s)).sqrt()
    eps_hat = a_t + (1 - t) * u
    mean = a_t - (u + s**2 / (2 * t) * eps_hat) * dt
    return mean, s * dt.sqrt()


def log_prob(a_next, mean, std):
    """Gaussian log-density, averaged over the latent as in DDPO's code, (B,). So the ratio is the
    true one to the power of 1 / (T C). Its spread falls with the square root of T C: for the 13,800
    values of MMAudio at 44.1 kHz it is 3.7 times smaller than for the toy's 1,000, and the same
    --clip-range clips less. The default was chosen in the toy world (docs/choices.md)."""
    density = -0.5 * ((a_next - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=(1, 2))


def draw_transitions(seeds, args):
    """Which of a trajectory's M - 1 transitions each update trains, none of them twice. Returns
    (updates, R * B), one column for each seed."""
    drawn = []
    for seed in seeds:
        drawn.append(random.Random(seed).sample(range(args.sampling_steps - 1), args.updates))
    return torch.tensor(drawn).T


@dataclass
class Batch:
    """The transitions that a round trains, of R trajectories of each of B prompts: each update
    trains one transition of every trajectory."""

    features: dict  # B rows
    a_t: torch.Tensor  # (updates, R * B, T, C)
    a_next: torch.Tensor  # (updates, R * B, T, C)
    t: torch.Tensor  # (updates, R * B)
    t_next: torch.Tensor  # (updates, R * B)
    log_probs: torch.Tensor  # (updates, R * B), under the policy that sampled them
    advantages: torch.Tensor | None = None  # (R * B,), filled in when the rewards are known


@torch.no_grad()
def rollout(model, features, seeds, guidance, args):
    """Samples trajectories of M steps: M - 1 with noise, and a last one to t = 0 without.
    features: B rows; seeds: R * B. Returns a Batch, and a_0 (R * B, T, C).

    The toy's and MMAudio's networks know every time. Frieren's knows multiples of 1/1000, to which
    t is rounded up (`snap_t`); here the state then moves between rounded times, so that training
    asks for u at the very time of the transition. common.sample keeps its even steps.
    """
    times = model.snap_t(torch.linspace(1, 0, args.sampling_steps + 1)[:-1])  # (M,)
    times = training.send(times, model.device)
    generators = [torch.Generator().manual_seed(common.seed_of(seed, "sde", 0)) for seed in seeds]
    a_t = common.initial_noise(model, seeds)
    states = [a_t]
    log_probs = []
    # The ratio starts at 1 only where u is rounded as in training: in the same precision, and where
    # the model is compiled, by the same graph. torch.compile makes one graph with gradients and one
    # without, which round differently; so a compiled model samples by the former, and we detach.
    with training.autocast(model.device, args.precision), torch.set_grad_enabled(model.compiled):
        conditions = model.project(features)
        for t, t_next in pairwise(times[:, None].repeat(1, len(seeds))):  # each (R * B,)
            u = model.velocity(a_t, t, conditions, guidance).float().detach()
            mean, std = sde_step(a_t, u, t, t_next, args.eta)
            z = torch.stack([torch.randn(model.latent_shape, generator=own) for own in generators])
            a_t = mean + std * training.send(z, model.device)
            states.append(a_t)
            log_probs.append(log_prob(a_t, mean, std))
        last = times[-1].repeat(len(seeds))
        u = model.velocity(a_t, last, conditions, guidance).float().detach()
    a_0 = a_t - times[-1] * u

    states = torch.stack(states)  # (M, R * B, T, C)
    log_probs = torch.stack(log_probs)  # (M - 1, R * B)
    transition = training.send(draw_transitions(seeds, args), model.device)  # (updates, R * B)
    row = torch.arange(len(seeds), device=model.device)  # (R * B,)
    batch = Batch(
        features,
        a_t=states[transition, row],
        a_next=states[transition + 1, row],
        t=times[transition],
        t_next=times[transition + 1],
        log_probs=log_probs[transition, row],
    )
    return batch, a_0


# --------------------------------------------------------------------------------------------------
# Reward and advantage
# --------------------------------------------------------------------------------------------------


class Reward:
    """P(Good) of generated audio. The scorers' audio networks stay loaded; their embeddings of the
    videos are those that stage 03 stored, in one file for each scorer and block of clips. A silent
    audio is rewarded as AudioScore scores it; only stage 03 keeps it from winning a pair.
    """

    def __init__(self, run, scorers, blocks, device, workers):
        self.audioscore = AudioScore.load(run / "02_audioscore.pt")
        self.scorers = scorers  # the run's set, of which those of AudioScore are loaded
        self.block_of = {clip.id: block for block in blocks for clip in block.clips}
        self.loaded = {name: scorers.load(name, device, workers) for name in scorers.of_audioscore}

    def videos(self, name, clips):
        """{clip id: this scorer's embeddings of its video} for these clips, and for all others in
        the same blocks."""
        seen = {}
        for clip in clips:
            if clip.id in seen:
                continue
            block = self.block_of[clip.id]
            file = block.video_file(name)
            if not file.exists():
                stop(f"{file}: no such file; run 03_mine_pairs.py first, it looks at the videos")
            key = scoring.video_key(self.scorers, name, block.clips)
            seen |= scoring.read_videos(block, key, name, self.loaded[name].video_shapes)
        return seen

    def __call__(self, model, a_0, clips):
        """a_0: (R * B, T, C); clips: one for each row -> (R * B,) float64 in [0, 1]; 0 for audio
        that is not finite."""
        waves = model.decode(a_0)
        finite = waves.isfinite().all(dim=1)
        waves = torch.nan_to_num(waves, 0.0, 0.0, 0.0).clamp(-1, 1)
        by_scorer = {}
        for name, scorer in self.loaded.items():
            rate_hz = scorer.sample_rate_hz
            resampled = torchaudio.functional.resample(waves, model.sample_rate_hz, rate_hz)
            resampled = media.fit_length(resampled, round(model.clip_s * rate_hz))
            videos = self.videos(name, clips) if "video" in scorer.reads else None
            by_scorer[name] = scoring.score_waves(scorer, resampled, clips, videos)
        measured = self.scorers.audioscore_inputs(by_scorer)  # {ib, clap, ...: (R * B,)}
        p = self.audioscore(self.audioscore.five_scores(measured))
        p_good = p[:, 0]
        return p_good * finite


def group_advantages(rewards, group_size):
    """How much better an audio is than the mean of its prompt's audios, in standard deviations of
    their rewards.

    rewards: (R * B,) float64, R = group_size. Returns advantages (R * B,), (r - mean) / std, 0
    where std is below MIN_SPREAD; and std (B,).
    """
    rewards = rewards.view(group_size, -1)
    std, mean = torch.std_mean(rewards, dim=0)
    advantages = torch.where(std < MIN_SPREAD, 0.0, (rewards - mean) / std)
    return advantages.flatten(), std


def ppo_loss(ratio, advantage, clip_range):
    """The clipped surrogate of PPO for each transition, (B,) -> (B,). This is DDPO-IS, the one of
    DDPO's two forms (arXiv 2305.13301) that makes several updates per round."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage)


# --------------------------------------------------------------------------------------------------
# One round
# --------------------------------------------------------------------------------------------------


def collect(model, reward, shards, clips, round_, guidance, args):
    """Samples and scores this rank's prompts, as many clips at a time as --micro-batch allows.

    Returns the batches, and what is logged: {name: () float64}, sums on all ranks over the round's
    audios (reward) and over its prompts (reward_std, no_spread).
    """
    # Clips in a batch: as many whole groups as fit, or a single one that is larger.
    per_batch = max(1, args.micro_batch // args.group_size)
    batches = []
    futures = []
    # Audios are scored in a thread while the next prompts are sampled. It is a new one each round:
    # between rounds an idle thread would slow down torch's own.
    with ThreadPoolExecutor(1) as scoring_thread:
        for start in range(0, len(clips), per_batch):
            prompts = clips[start : start + per_batch]
            features = shards.features([clip.id for clip in prompts])
            seeds = []
            for k in range(args.group_size):
                seeds += [common.seed_of(args.seed, "ddpo", round_, clip.id, k) for clip in prompts]
            batch, a_0 = rollout(model, features, seeds, guidance, args)
            batches.append(batch)
            clips_of_rows = prompts * args.group_size  # row r * B + b is of clip b
            futures.append(scoring_thread.submit(reward, model, a_0, clips_of_rows))

    sums = {}
    for batch, future in zip(batches, futures):
        rewards = future.result()  # on the CPU
        advantages, std = group_advantages(rewards, args.group_size)
        batch.advantages = advantages.float().to(model.device)
        add_sums(sums, {"reward": rewards, "reward_std": std, "no_spread": std < MIN_SPREAD})
    return batches, training.sum_dict_over_ranks(sums, model.device)


def add_sums(sums, measured):
    """Adds the sum over every tensor of `measured`, in float64, to the entry of that name."""
    for name, value in measured.items():
        sums[name] = sums.get(name, 0) + value.double().sum()


def train_step(policy, batches, update, guidance, args):
    """Accumulates the gradient of one update, over one transition of every trajectory that this
    rank sampled. Returns sums over them for the log, {name: () float64}; they stay on the device,
    so that the host need not wait for them."""
    passes = []
    for batch in batches:
        # Either --micro-batch holds all rows of a batch, or the batch is of one prompt (`collect`),
        # whose one row of features serves any slice of its audios.
        for start in range(0, len(batch.advantages), args.micro_batch):
            passes.append((batch, slice(start, start + args.micro_batch)))
    audios = sum(len(batch.advantages) for batch in batches)
    sums = {}
    for i, (batch, micro) in enumerate(passes):
        a_t = batch.a_t[update, micro]
        t = batch.t[update, micro]
        policy.require_backward_grad_sync = i == len(passes) - 1  # DDP: one all-reduce per step
        with training.autocast(t.device, args.precision):
            u_theta = policy(a_t, t, batch.features, guidance)
        mean, std = sde_step(a_t, u_theta.float(), t, batch.t_next[update, micro], args.eta)
        log_prob_now = log_prob(batch.a_next[update, micro], mean, std)
        log_ratio = log_prob_now - batch.log_probs[update, micro]
        ratio = log_ratio.exp()
        loss = ppo_loss(ratio, batch.advantages[micro], args.clip_range)
        (loss.sum() / audios).backward()  # DDP averages over ranks, which have equally many audios

        with torch.no_grad():
            measured = {
                "ratio": ratio,
                "clipped": (ratio - 1).abs() > args.clip_range,
                "approx_kl": 0.5 * log_ratio.square(),
            }
            add_sums(sums, measured)
    return sums


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def find_prompts(run, clips, samples):
    """The train clips that may be prompts: stage 01 has sampled them and nobody has rated them."""
    rated = {row.clip for row in rows.read(run / "02_scores.jsonl", rows.RatedScore)}
    prompts = [clip for clip in clips if clip.id in samples and clip.id not in rated]
    if not prompts:
        stop(
            f"{run}: every clip was rated, and AudioScore was fitted on those; rate fewer (02 "
            "--num-rated-clips)"
        )
    return prompts


def draw_prompts(clips, round_, args):
    """The clips of a round, which depend on the seed and the round alone."""
    start = round_ * args.prompts
    return training.from_shuffled_epochs(clips, start, args.prompts, args.seed)


def print_rewards(log):
    rewards = [step.reward for step in log]
    fifth = max(1, len(log) // 5)
    first = fmean(rewards[:fifth])
    last = fmean(rewards[-fifth:])
    print(
        f"reward, the mean P(Good) of what was sampled: {first:.3f} in the first fifth of the "
        f"steps, {last:.3f} in the last"
    )
    no_spread = fmean(step.no_spread for step in log)
    if no_spread > 0.5:
        print(
            f"warning: {no_spread:.0%} of the prompts taught nothing, since all their audios had "
            "one reward (no_spread in log.jsonl); check in 02's report that AudioScore tells "
            "audios apart, or give a larger --group-size"
        )


def main(args):
    # -- setup
    here = ranks.setup()
    run = Path(args.run_dir)
    run_json = inputs.read_run(run)
    training.refuse_uneven("--prompts", args.prompts, here.world)

    # 03_scores is not listed: each of its files says what it was made from (`Reward.videos`).
    sources = ["01_samples", "02_audioscore.pt", "02_scores.jsonl"]
    with training.output(run, args.out, sources) as output:
        # -- data
        model = common.load_base_model(run, here.device, args.weights)
        samples = inputs.read_samples(run)
        shards = training.Shards(run, samples, model)
        clips = inputs.read_clips(run, "train")
        prompts = find_prompts(run, clips, samples)
        blocks = inputs.shard_blocks(run, samples, clips)
        scorers = common.scorers_of(run, args.weights)
        reward = Reward(run, scorers, blocks, here.device, args.workers)

        # -- model
        bf16 = training.in_bf16(here.device, args.precision)
        if args.lora:
            training.add_lora(model, args.lora, common.seed_of(args.seed, "lora"), bf16)
        args.compile = training.compiles(model, args)  # so that settings.json says what was done
        if args.compile:
            speed.compile_models(model)
        save_every = args.save_every * args.updates  # steps; a training resumes at whole rounds
        trainer = training.Trainer(output, model, rows.DdpoStep, save_every, here, args)
        # Paper silent: the policy's guidance. Here the policy is the guided velocity by which 01
        # samples, in sampling and in training, since rewards are of guided audio. Stage 05 compares
        # errors of the network itself, and trains without guidance.
        guidance = run_json.sampler.guidance
        audios = args.prompts * args.group_size  # of a round, on all ranks
        inputs_per_pass = audios if guidance == 1 else 2 * audios  # guidance doubles them
        print(
            f"a round: {args.group_size} audios of each of {args.prompts} clips at guidance "
            f"{guidance}, then {args.updates} updates"
        )
        print(
            f"{trainer.done} of {args.steps} steps are done; {here.world} process(es) on "
            f"{here.device}"
        )

        # -- loop: AdamW and its settings are stage 05's
        for step in trainer.steps():
            round_, update = divmod(step, args.updates)
            if update == 0:
                own = here.share(draw_prompts(prompts, round_, args))
                batches, reward_sums = collect(model, reward, shards, own, round_, guidance, args)
            trainer.optimizer.zero_grad(set_to_none=True)
            sums = train_step(trainer.policy, batches, update, guidance, args)
            grad_norm = training.clip_gradient(model)  # to norm 1
            # Stops where one of them is not finite, and names the folder's checkpoint.
            sums, grad_norm = training.sum_step_over_ranks(step, sums, grad_norm, trainer.folder)
            means = {name: value.item() / audios for name, value in sums.items()}
            # In the first step of this process no update has moved the policy: the ratio is 1.
            if step == trainer.done and means["clipped"]:
                tqdm.write(
                    f"warning: rounding alone clips {means['clipped']:.0%} of the ratios; give "
                    "--no-compile or --precision fp32"
                )
            lr = training.lr_at(step, args)
            # Where no prompt has any spread, all gradients are 0, but AdamW's momentum and weight
            # decay would still move the weights.
            if reward_sums["no_spread"] < args.prompts:
                training.take_step(trainer.optimizer, lr)
            mean_reward = reward_sums["reward"].item() / audios
            trainer.bar.set_postfix(reward=f"{mean_reward:.3f}", refresh=False)
            trainer.finish_step(
                step,
                round=round_,
                reward=mean_reward,
                reward_std=reward_sums["reward_std"].item() / args.prompts,
                no_spread=reward_sums["no_spread"].item() / args.prompts,
                **means,
                grad_norm=grad_norm,
                lr=lr,
                # Rows that the network was given: once in each update, M times in each round.
                forwards=inputs_per_pass * (step + 1 + (round_ + 1) * args.sampling_steps),
                forwards_grad=inputs_per_pass * (step + 1),
            )

        # -- save
        if here.first:
            print_rewards(rows.read(trainer.folder / "log.jsonl", rows.DdpoStep))
            trainer.save_policy(run_json, "ddpo")
    print(f"next: python 07_evaluate.py {run_flag(run)}{training.systems_flag(args.out)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
