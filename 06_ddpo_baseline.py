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
    clips.jsonl           and the prompts' videos, for the scorers
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
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torchaudio
from tqdm import tqdm

import common
from common import AudioScore, number, stop

# Of P(Good): audios of a prompt whose rewards have a smaller standard deviation are equally good.
# Rounding alone makes a network's scores differ by a factor of 1 +- 2e-6 between batches and machines,
# which moves P(Good) by up to 2e-5 (measured in the toy world). Divided by its own deviation, such
# noise would become advantages of +-1.
MIN_SPREAD = 1e-4


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument("--out", default="06_ddpo", help="name of the output folder inside the run")
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    paper = parser.paper
    paper.description = "Silent on DDPO's settings: as many steps and the same lr as stage 05."
    paper.add_argument("--lr", type=number(float, 0), default=5e-6, help="learning rate, constant after the warm-up")
    paper.add_argument("--warmup", type=number(int, 0), default=0, help="linear warm-up steps")
    paper.add_argument("--steps", type=number(int, 1), default=12_000, help="optimizer updates")
    paper.add_argument("--prompts", type=number(int, 1), default=8, help="clips per round over all GPUs")
    paper.add_argument("--group-size", type=number(int, 2), default=8, help="audios per clip and round")
    paper.add_argument("--sampling-steps", type=number(int, 2), default=10, help="SDE steps of a trajectory")
    paper.add_argument("--updates", type=number(int, 1), default=8, help="optimizer updates per round")
    paper.add_argument("--eta", type=number(float, 0), default=0.7, help="SDE noise, s = eta sqrt(t / (1 - t))")
    paper.add_argument("--clip-range", type=number(float, 0), default=1e-3, help="the ratio is clipped to 1 +- this")
    engineering = parser.engineering
    engineering.add_argument("--micro-batch", type=number(int, 1), default=16, help="audios per backward pass, one GPU")
    engineering.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    engineering.add_argument("--gradient-checkpointing", action="store_true", help="recompute blocks, saves memory")
    described = "rank of adapters on every linear and convolution layer, trained instead of the weights; 0: the weights"
    engineering.add_argument("--lora", type=number(int, 0, 4096), default=0, help=described)
    engineering.add_argument("--save-every", type=number(int, 1), default=20, help="rounds between checkpoints")
    engineering.add_argument("--seed", type=number(int, 0), default=0, help="of prompts and noise")
    common.workers_flag(parser)
    args = common.parse(parser, argv, "06")
    if not 1 <= args.updates <= args.sampling_steps - 1:
        stop(f"--updates {args.updates}: from 1 to {args.sampling_steps - 1}, the stochastic steps of a trajectory")
    return args


def lr_at(step, args):
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup))


# ------------------------------------------------------------------------------------------------------------
# The policy as an SDE
# ------------------------------------------------------------------------------------------------------------


def sde_step(a_t, u, t, t_next, eta):
    """One step of the SDE with the ODE's marginals, from t towards the data.

    a_t, u: (B, T, C); t, t_next: (B,), t > t_next > 0. eps_hat = a_t + (1 - t) u is the expected noise, so the score of
    the marginal is -eps_hat / t. Returns mean (B, T, C) and std (B, 1, 1) of a_{t_next} given a_t.
    """
    t, t_next = t[:, None, None], t_next[:, None, None]
    dt, below_1 = t - t_next, torch.where(t == 1, t_next, t)  # at t = 1, s is infinite: take the next grid time in it
    s = eta * (below_1 / (1 - below_1)).sqrt()
    mean = a_t - (u + s**2 / (2 * t) * (a_t + (1 - t) * u)) * dt
    return mean, s * dt.sqrt()


def log_prob(a_next, mean, std):
    """Gaussian log-density averaged over the latent (B,), so that --clip-range does not depend on its size."""
    density = -0.5 * ((a_next - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=(1, 2))


def grid(model, steps):
    return model.snap_t(torch.linspace(1, 0, steps + 1)[:-1]).tolist() + [0.0]


@torch.no_grad()
def rollout(model, features, seeds, guidance, args, device):
    """Samples trajectories. features: B rows; seeds: R * B (row r * B + b belongs to clip b).

    Returns states (S, R * B, T, C): a_t at every grid time and the step after the last stochastic one, the log-probs
    (S - 1, R * B) at sampling time, and a_0 (R * B, T, C). The last step is deterministic and has no log-probability.
    """
    times = grid(model, args.sampling_steps)
    with common.autocast(device, args.precision):
        conditions = model.project(features)  # as in training: under bf16 the ratio would not start at 1 otherwise
    generators = [torch.Generator().manual_seed(common.seed_of(seed, "sde", 0)) for seed in seeds]
    a_t = common.initial_noise(model, seeds)
    states, log_probs = [a_t], []
    for t, t_next in zip(times[:-2], times[1:-1]):
        t, t_next = (torch.full((len(seeds),), x, device=device) for x in (t, t_next))
        with common.autocast(device, args.precision):
            u = model.velocity(a_t, t, conditions, guidance)
        mean, std = sde_step(a_t, u.float(), t, t_next, args.eta)
        z = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
        a_t = mean + std * z.to(device, non_blocking=True)
        states.append(a_t)
        log_probs.append(log_prob(a_t, mean, std))
    t = torch.full((len(seeds),), times[-2], device=device)
    with common.autocast(device, args.precision):
        u = model.velocity(a_t, t, conditions, guidance)
    return torch.stack(states), torch.stack(log_probs), a_t - times[-2] * u.float()


# ------------------------------------------------------------------------------------------------------------
# Reward and advantage
# ------------------------------------------------------------------------------------------------------------


def by_shard(clips):
    groups = defaultdict(list)
    for clip in clips:
        groups[clip["shard"]].append(clip)
    return groups


class Reward:
    """P(Good) of generated audio. Audio towers stay loaded; embeddings of the videos come from the store."""

    def __init__(self, run, device, weights, workers):
        self.run, self.weights, self.audioscore = run, weights, AudioScore.load(run / "02_audioscore.pt")
        names = common.AUDIOSCORE_SCORERS
        self.scorers = {name: common.load_scorer(name, run, device, weights, workers) for name in names}
        self.at_a_time = common.scorers_of(run, weights).at_a_time

    def look(self, clips):
        """Takes in what the scorers need of the next round's clips."""
        groups, run, weights = by_shard(clips), self.run, self.weights
        self.sides = {n: common.sides_of(run, scorer, n, groups, weights) for n, scorer in self.scorers.items()}

    def __call__(self, model, a_0, clips, pool):
        """a_0: (B, T, C), clips: B lines of clips.jsonl -> (B,) float64 in [0, 1]; 0 for audio that is not finite."""
        waves = torch.cat(list(pool.map(model.decode, a_0.chunk(2))))
        finite = waves.isfinite().all(dim=1)
        waves = torch.nan_to_num(waves, 0.0, 0.0, 0.0).clamp(-1, 1)

        heard = {}
        for rate in {scorer.sample_rate_hz for scorer in self.scorers.values()}:
            resampled = torchaudio.functional.resample(waves, model.sample_rate_hz, rate)
            heard[rate] = common.fit_length(resampled, round(model.clip_s * rate))

        def judge(name):
            return self.scorers[name](heard[self.scorers[name].sample_rate_hz], clips, self.sides[name])

        found = dict(zip(self.scorers, pool.map(judge, self.scorers)))
        p_good = self.audioscore(common.five_scores(found, self.audioscore))[:, 0]
        return p_good * finite


def group_advantages(rewards, groups):
    """How much better an audio is than the others of its prompt, in standard deviations of their rewards.

    rewards: (R * B,) float64, B = groups; row r * B + b is prompt b's. Returns advantages (R * B,), (r - mean) / std, 0
    where std is below MIN_SPREAD; and std (B,).
    """
    rewards = rewards.view(-1, groups)
    std, mean = torch.std_mean(rewards, dim=0)
    advantages = torch.where(std < MIN_SPREAD, 0.0, (rewards - mean) / std)
    return advantages.flatten(), std


def ppo_loss(ratio, advantage, clip_range):
    """DDPO-IS: the clipped surrogate per transition, (B,) -> (B,)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


# ------------------------------------------------------------------------------------------------------------
# One round
# ------------------------------------------------------------------------------------------------------------


def draw_prompts(clips, number, args):
    """The round's clips: epochs of seeded permutations, a function of the round alone."""
    drawn = []
    for i in range(number * args.prompts, (number + 1) * args.prompts):
        order = common.shuffled(f"{args.seed}/{i // len(clips)}", len(clips))
        drawn.append(clips[order[i % len(clips)]])
    return drawn


def draw_times(seeds, args):
    """Which stochastic step each update trains, per trajectory: (updates, B), without repetition."""
    rows = [random.Random(seed).sample(range(args.sampling_steps - 1), args.updates) for seed in seeds]
    return torch.tensor(rows).T


def collect(model, reward, shards, clips, number, guidance, args, device):
    """Samples and scores this rank's prompts, as many clips at a time as --micro-batch allows.

    Returns a list of batches: features (B rows), states, log_probs, advantages (R * B), chosen (updates, R * B); and
    this rank's sums for the log: reward over its audios; reward_std and no_spread over its prompts.
    """
    batches, waiting = [], []
    sums = {"reward": 0.0, "reward_std": 0.0, "no_spread": 0.0}
    per_batch = max(1, args.micro_batch // args.group_size)
    reward.look(clips)
    # These threads end with the round: as long as one lives, OpenMP's own fall asleep between two operations.
    with ThreadPoolExecutor(reward.at_a_time) as pool, ThreadPoolExecutor(1) as ahead:
        for start in range(0, len(clips), per_batch):
            part = clips[start : start + per_batch]
            features = shards.features([clip["id"] for clip in part])
            features = {k: v.to(device, non_blocking=True) for k, v in features.items()}
            names = [(clip["id"], k) for k in range(args.group_size) for clip in part]
            seeds = [common.seed_of(args.seed, "ddpo", number, name, k) for name, k in names]
            states, log_probs, a_0 = rollout(model, features, seeds, guidance, args, device)
            rewards = ahead.submit(reward, model, a_0, part * args.group_size, pool)  # while the next is sampled
            waiting.append((part, seeds, features, states, log_probs, rewards))
    for part, seeds, features, states, log_probs, rewards in waiting:
        rewards = rewards.result()  # on the CPU
        advantages, std = group_advantages(rewards, len(part))
        advantages = advantages.float().to(device)
        batches.append((features, states, log_probs, advantages, draw_times(seeds, args).to(device)))
        sums["reward"] += rewards.sum().item()
        sums["reward_std"] += std.sum().item()
        sums["no_spread"] += (std < MIN_SPREAD).sum().item()
    return batches, sums


def over_all_ranks(sums, device):
    """The same sums over the prompts of all ranks: every rank then knows whether the round teaches anything."""
    values = torch.tensor([*sums.values()], dtype=torch.float64, device=device)
    return dict(zip(sums, common.sum_over_ranks(values).tolist()))


def train_step(policy, batches, update, times, guidance, world, args, device):
    """Accumulates the gradient of one update: one chosen transition of every trajectory of the round.

    Returns this rank's sums for the log, ratio, clipped, approx_kl, on the device, for which nothing here waits.
    """
    sums, audios = torch.zeros(3, dtype=torch.float64, device=device), args.prompts * args.group_size
    for i, (features, states, old_log_probs, advantages, chosen) in enumerate(batches):
        prompts = len(next(iter(features.values())))
        parts = torch.arange(len(advantages), device=device).split(max(1, args.micro_batch // prompts) * prompts)
        for j, row in enumerate(parts):  # whole repeats of the prompts, so that row r * B + b keeps to prompt b
            last = (i, j) == (len(batches) - 1, len(parts) - 1)
            policy.require_backward_grad_sync = last  # DDP: one all-reduce per step
            at = chosen[update][row]
            a_t, a_next = states[at, row], states[at + 1, row]
            t, t_next = times[at], times[at + 1]
            with common.autocast(device, args.precision):
                u_theta = policy(a_t, t, features, guidance)
            mean, std = sde_step(a_t, u_theta.float(), t, t_next, args.eta)
            log_ratio = log_prob(a_next, mean, std) - old_log_probs[at, row]
            ratio = log_ratio.exp()
            loss = ppo_loss(ratio, advantages[row], args.clip_range)
            (loss.sum() / audios * world).backward()
            with torch.no_grad():
                clipped = (ratio - 1).abs() > args.clip_range
                sums += torch.stack([ratio, clipped.float(), 0.5 * log_ratio.square()]).double().sum(dim=1)
    return sums


def main(args):
    # -- setup
    ranks = common.setup_ranks()
    rank, world, device = ranks
    run = Path(args.run_dir)
    run_json = common.read_run(run)
    folder = common.output_folder(run, args.out)
    if args.prompts % world:
        stop(f"--prompts {args.prompts} cannot be divided over {world} processes; start as many as divide it")
    inputs = ("01_samples", "02_audioscore.pt", "02_scores.jsonl")
    common.hold(run, args.out, ranks)
    common.require(run, *inputs)
    runtime = ("run_dir", "out", "weights", "micro_batch", "save_every", "gradient_checkpointing", "workers")
    settings = {key: value for key, value in vars(args).items() if key not in runtime}
    if rank == 0:
        advice = "use another --out, or remove this folder"
        common.claim(run, f"{args.out}/settings.json", settings, inputs, advice=advice)
    common.barrier()

    # -- data
    model, samples = common.load_base_model(run, device, args.weights), common.read_samples(run)
    shards = common.Shards(run, samples, model)
    rated = {row["clip"] for row in common.read_jsonl(run / "02_scores.jsonl", {"clip": common.NAME})}
    clips = [clip for clip in common.read_clips(run, "train") if clip["id"] in samples and clip["id"] not in rated]
    clips = [dict(clip, shard=samples[clip["id"]][0]["shard"]) for clip in clips]
    if not clips:
        stop(f"{run}: every clip was rated, and AudioScore was fitted on those; rate fewer (02 --num-rated-clips)")
    guidance = run_json["sampler"]["guidance"]  # guidance is inside the policy

    # -- model
    reward = Reward(run, device, args.weights, args.workers)
    rounds = range(-(-args.steps // args.updates))
    drawn = {clip["id"]: clip for number in rounds for clip in draw_prompts(clips, number, args)}
    unseen = dict(list(by_shard(drawn.values()).items())[rank::world])  # by stage 03
    common.see(run, unseen, reward.scorers, args.weights, ranks, args.workers, reward.scorers)
    if args.lora:
        model.add_lora(args.lora, args.seed, common.in_bf16(device, args.precision))
    if args.gradient_checkpointing:
        model.checkpoint_blocks()
    optimizer = torch.optim.AdamW(
        model.trainable_parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-6, fused=device != "cpu"
    )
    done = common.resume_training(folder, model, optimizer, args.steps, rank, ("reward", "no_spread"))
    policy = common.data_parallel(model, device)
    times = torch.tensor(grid(model, args.sampling_steps), device=device)
    audios, rows = args.prompts * args.group_size, 2 if guidance != 1 else 1  # rows of one guided evaluation
    if rank == 0:
        print(f"{audios} audios per round, {args.updates} updates each; guidance {guidance} inside the policy")
        print(f"step {done} of {args.steps}; {world} process(es) on {device}")
        trained = rows * min(args.micro_batch, audios // world)
        sampled = rows * min(max(args.micro_batch, args.group_size), audios // world)
        others = sum(scorer.gib for scorer in reward.scorers.values())
        common.say_memory(model, args, device, trained, sampled, frozen=("codec",), others=others)

    # -- loop
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, unit="step", disable=rank > 0)
    for step in bar:
        began = time.time()
        number, update = divmod(step, args.updates)
        if update == 0:
            prompts = draw_prompts(clips, number, args)[rank::world]
            batches, rewards = collect(model, reward, shards, prompts, number, guidance, args, device)
            rewards = over_all_ranks(rewards, device)
        optimizer.zero_grad(set_to_none=True)
        sums = train_step(policy, batches, update, times, guidance, world, args, device)
        sums = common.sum_over_ranks(sums).cpu()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
        if not (sums.isfinite().all() and grad_norm.isfinite()):
            stop(f"step {step}: the ratio is not finite; {folder}/checkpoint.pt holds the last good round; lower --lr")
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        # Without any spread all gradients are 0, but AdamW's momentum and weight decay would still move the weights.
        if rewards["no_spread"] < args.prompts:
            optimizer.step()

        if rank == 0:
            row = {"step": step, "round": number, "reward": rewards["reward"] / audios}
            row["reward_std"] = rewards["reward_std"] / args.prompts
            row["no_spread"] = rewards["no_spread"] / args.prompts
            row.update(zip(("ratio", "clipped", "approx_kl"), (sums / audios).tolist()))
            row.update(grad_norm=grad_norm.item(), lr=lr_at(step, args), seconds=time.time() - began)
            row["forwards_grad"] = rows * audios * (step + 1)
            row["forwards"] = row["forwards_grad"] + rows * audios * (number + 1) * args.sampling_steps
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else None
            common.append_jsonl(folder / "log.jsonl", row)
            if step == done and row["clipped"]:  # the network is still the one that sampled
                tqdm.write(f"warning: rounding alone clips {row['clipped']:.0%} of the ratios; give --precision fp32")
            bar.set_postfix(reward=f"{row['reward']:.3f}", clipped=f"{row['clipped']:.2f}", refresh=False)
            whole = update == args.updates - 1 and (number + 1) % args.save_every == 0
            if whole or step + 1 == args.steps:
                common.save_training(folder, step + 1, model, optimizer)

    # -- save
    if rank == 0:
        log = common.read_jsonl(folder / "log.jsonl")
        fifth = max(1, len(log) // 5)
        first, last = (sum(row["reward"] for row in part) / fifth for part in (log[:fifth], log[-fifth:]))
        print(f"reward while training: first fifth {first:.3f}, last fifth {last:.3f}")
        no_spread = sum(row["no_spread"] for row in log) / len(log)
        if no_spread > 0.5:
            print(
                f"warning: {no_spread:.0%} of the prompts taught nothing, since all their audios had one reward "
                "(no_spread in log.jsonl): see in 02's report whether AudioScore tells audios apart, or give a "
                "larger --group-size"
            )
        common.save_policy(run, args.out, model, run_json, method="ddpo", steps=args.steps)


if __name__ == "__main__":
    common.launch(main, parse_args)
