"""The evidence of docs/evidence.md: the paper's claims in toy worlds of size `large`, each judged once (Sec. 3.2).

Run:
    python docs/evidence.py pilot              # val split, two worlds: which settings, and what explains their spread
    python docs/evidence.py claims             # test split, twelve worlds: Tables 1 and 2 in miniature
    python docs/evidence.py claims --worlds 0  # the tables and figures again, from the csv, in seconds
    python docs/evidence.py curves             # trainings of Flow-DPO, well and ill, for docs/curves.md
    python docs/evidence.py claims --worlds 2 --size tiny --runs DIR --csv FILE      # a try, minutes
A world is `00_toy_world.py --seed w --size large`: its clips, base model, scorers and people are its own, and what
follows has its seed. Everything is a stage's own command, noted with its CPU seconds in the run's commands.jsonl. What
the csv holds is not made again; audio is deleted once it is judged; an interrupted command goes on.

What is claimed, and by which one metric it is decided, stands in CLAIMS, written before the worlds were made. A value
is a mean over worlds, its 95 % interval Student's t over them; differences are taken within a world, on the same clips
and noise. The p values of one table are Holm's, corrected for their number.

Writes:
    docs/pilot.csv, docs/evidence.csv    world, arm, seed, budget (rows through the network in training), metric, value,
                                         n (clips; 0: from the training's log): every number, a world at a time
    docs/pilot.png, docs/curves.png      the figures; the tables are printed, for docs/evidence.md and docs/curves.md
Takes: see docs/evidence.md.
"""

import argparse
import csv
import importlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
STAGES = {path.name[:2]: path.name for path in sorted(ROOT.glob("0?_*.py"))}
COLUMNS = ("world", "arm", "seed", "budget", "metric", "value", "n")


class World(NamedTuple):
    seed: int
    noise: float = 1.0  # the simulated people's, times what it usually is

    @property
    def name(self):
        return f"{self.seed}" if self.noise == 1 else f"{self.seed} noise {self.noise:g}"


class Arm(NamedTuple):
    name: str
    stage: str  # 05 or 06
    flags: str = ""  # {share:0.45} becomes the threshold at which that share of the mined pairs is easy
    seeds: tuple = (None,)  # of the training; None: the world's

    def out(self, seed):
        return f"{self.name}_{seed}"


# The pilot ---------------------------------------------------------------------------------------------------

BETAS, RATES, SEEDS = (20, 60, 200, 600, 1000), (7e-5, 2e-4), (0, 1, 2)
GRID = [Arm(f"beta{b}_lr{lr:.0e}", "05", f"--beta {b} --lr {lr}", SEEDS) for b in BETAS for lr in RATES]
SCALED = [Arm(f"beta{b}_scaled", "05", f"--beta {b} --lr {7e-5 * 60 / b:.2e}", SEEDS) for b in BETAS if b != 60]
NOISY = [arm for arm in GRID if arm.name in ("beta60_lr7e-05", "beta600_lr7e-05")]
DDPO = [Arm(f"ddpo_lr{lr:.0e}_clip{clip:.0e}", "06", f"--lr {lr} --clip-range {clip}", (0,))
        for lr in (1e-4, 3e-4, 6e-4) for clip in (1e-3, 5e-3)]  # fmt: skip
PILOT = {World(0): [*GRID, *SCALED, *DDPO], World(1): GRID, World(0, 0.0): NOISY, World(0, 3.0): NOISY}

# The curves: what is wrong in each, and what makes it so -----------------------------------------------------

CURVES = {
    "healthy": "--beta 60 --lr 7e-05",
    "too few pairs": "--beta 60 --lr 7e-05 --steps 1500",
    "lr too high": "--beta 60 --lr 1e-3",
    "beta too large": "--beta 1000 --lr 0.0002",
    "beta too small": "--beta 2 --lr 7e-05",
    "winner's error rises": "--beta 20 --lr 0.0002",
}

# The claims --------------------------------------------------------------------------------------------------

ARMS = (
    Arm("flow_dpo", "05"), Arm("ddpo", "06"), Arm("no_human", "05", "--no-human"),
    Arm("sft", "05", "--beta 0 --sft-weight 1"), Arm("dpo_sft", "05", "--sft-weight 2"),
    Arm("beta600", "05", "--beta 600"), Arm("beta1000", "05", "--beta 1000"),
    Arm("share81", "05", "--threshold {share:0.81}"), Arm("share0", "05", "--threshold {share:0}"),
    Arm("hard_first", "05", "--hard-first"),
    Arm("share81_no_human", "05", "--no-human --threshold {share:0.81}"),
    Arm("share0_no_human", "05", "--no-human --threshold {share:0}"),
    Arm("hard_first_no_human", "05", "--no-human --hard-first"),
)  # fmt: skip
CLAIMS = {  # table: (claim, system, against, the metric that decides)
    "Table 1": (
        ("Flow-DPO improves on the pre-trained model (Sys. 11 against 9)", "flow_dpo", "base", "fd"),
        ("... by a judge that no one trained on", "flow_dpo", "base", "judge_semantic"),
        ("DDPO improves on the pre-trained model (10 against 9)", "ddpo", "base", "fd"),
        ("Flow-DPO is better than DDPO (11 against 10)", "flow_dpo", "ddpo", "fd"),
        ("... in synchrony", "flow_dpo", "ddpo", "judge_sync_s"),
        ("... with equal information: no human pairs", "no_human", "ddpo", "fd"),
        ("Human pairs add the aesthetic appeal (Sec. 2.2)", "flow_dpo", "no_human", "judge_aesthetic"),
        ("Preference learning does more than SFT on the winners", "flow_dpo", "sft", "fd"),
        ("A winner's term helps Flow-DPO", "dpo_sft", "flow_dpo", "fd"),
    ),
    "Table 2": (
        ("Beta 600 is better than beta 1000", "beta600", "beta1000", "fd"),
        ("At beta 1000 training hurts: the base model is better", "base", "beta1000", "fd"),
        ("The curriculum (81 %) is better than shuffled pairs", "share81", "share0", "fd"),
        ("... without human pairs", "share81_no_human", "share0_no_human", "fd"),
        ("Easy pairs first is better than hard pairs first", "flow_dpo", "hard_first", "fd"),
        ("... without human pairs", "no_human", "hard_first_no_human", "fd"),
    ),
}

# metric: (heading, which way is better, decimals, shown times)
METRICS = {
    "fd": ("FD", -1, 0, 1), "kl": ("KL", -1, 2, 1), "is": ("IS", 1, 2, 1), "ib": ("IB x100", 1, 1, 100),
    "clap": ("CLAP x100", 1, 1, 100), "desync_s": ("DeSync ms", -1, 0, 1000), "p_good": ("P(Good)", 1, 3, 1),
    "win_rate": ("wins", 1, 2, 1), "judge_semantic": ("judge: semantic", 1, 3, 1),
    "judge_sync_s": ("judge: sync ms", -1, 0, 1000), "judge_aesthetic": ("judge: aesthetic", 1, 3, 1),
    "oracle_semantic": ("oracle: semantic", 1, 3, 1), "oracle_sync_s": ("oracle: sync ms", -1, 0, 1000),
    "oracle_floor_db": ("oracle: floor dB", -1, 1, 1), "oracle_aesthetic": ("oracle: aesthetic", 1, 3, 1),
}  # fmt: skip
LOGGED = ("loss", "accuracy", "gap_w", "gap_l", "ref_w", "saturated", "opposed", "weight", "weight_wrong")  # of 05


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("pilot", "claims", "curves"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of all runs")
    parser.add_argument("--csv", type=Path, help="default docs/pilot.csv or docs/evidence.csv")
    parser.add_argument("--worlds", type=int, help="how many of the study's worlds; 0: what the csv holds. Claims: 12")
    parser.add_argument("--jobs", type=int, default=2, help="worlds, then trainings, at a time; one core each")
    parser.add_argument("--size", choices=("large", "default", "tiny"), default="large", help="of the toy worlds")
    args = parser.parse_args(argv)
    args.csv = args.csv or ROOT / "docs" / ("evidence.csv" if args.study == "claims" else f"{args.study}.csv")
    return args


# ------------------------------------------------------------------------------------------------------------
# Making what is missing
# ------------------------------------------------------------------------------------------------------------


def command(folder, number, flags):
    """Runs a stage, notes its command and CPU seconds, and stops with its output when it fails."""
    line = [sys.executable, STAGES[number], "--run-dir", str(folder), *shlex.split(flags)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{shlex.join(line)} ended with {done.returncode}: {said[0]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with open(folder / "commands.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"command": f"{STAGES[number]} {flags}", "cpu_s": round(seconds, 1)}) + "\n")


def folder_of(args, world):
    return args.runs / f"{args.size}_{world.name.replace(' ', '_')}"


def make_world(job):
    """Stages 00 to 04. People of another noise answer about the audios of the world that they share."""
    args, world = job
    folder, plain = folder_of(args, world), folder_of(args, world._replace(noise=1.0))
    if not (folder / "run.json").exists() and world.noise != 1:
        skip = shutil.ignore_patterns("0[2-7]*", "scores", "commands.jsonl", "run.json", "beta*", "ddpo*", ".*")
        shutil.copytree(plain, folder, copy_function=os.link, ignore=skip, dirs_exist_ok=True)
        about = json.loads((plain / "run.json").read_text()) | {"rater_noise": world.noise}
        (folder / "run.json").write_text(json.dumps(about))
    folder.mkdir(parents=True, exist_ok=True)
    steps = [("00", "run.json", f" --size {args.size}"), ("01", "02_to_rate.csv", ""), ("02", "02_audioscore.pt", "")]
    for number, made, more in (*steps, ("03", "03_human_pairs.jsonl", ""), ("04", "04_settings.json", None)):
        if not (folder / made).exists():
            command(folder, number, "" if more is None else f"--seed {world.seed}{more}")


def train(job):
    args, world, arm, seed = job
    folder = folder_of(args, world)
    if not (folder / arm.out(seed) / "policy.json").exists():
        command(folder, arm.stage, f"--seed {seed} --out {arm.out(seed)} {flags_at(folder, arm.flags)}")


def judge(job):
    """All policies of a world by one command of stage 07. Returns the lines of the csv."""
    args, world, arms, split = job
    folder = folder_of(args, world)
    names = {arm.out(seed): (arm, seed) for arm, seed in arms}
    command(folder, "07", f"--split {split} --only --systems ground_truth base {' '.join(names)}")
    results, rows = lines(folder / f"07_results{'' if split == 'test' else '_val'}.jsonl"), []
    for result in results:
        arm, seed = names.get(result["system"], (None, 0))
        budget = lines(folder / result["system"] / "log.jsonl")[-1]["forwards"] if arm else 0
        name = arm.name if arm else result["system"]
        rows.append((world.name, name, seed, budget, result["metric"], result["value"], result["n"]))
    for out, (arm, seed) in names.items():
        log = lines(folder / out / "log.jsonl")
        for key in LOGGED if arm.stage == "05" else ("reward",):
            rows.append((world.name, arm.name, seed, log[-1]["forwards"], key, mean_of(log[-50:], key), 0))
        if arm.stage == "05":
            rows.append((world.name, arm.name, seed, log[-1]["forwards"], "norm_wrong", norm_wrong(folder, out), 0))
        shutil.rmtree(folder / "07_audio" / out, ignore_errors=True)
    return [row for row in rows if row[5] is not None]


def norm_wrong(folder, out, count=128):
    """Of Eq. 5's gradient at a policy, on pairs of stage 1: the norm of what the wrongly ordered ones give, over the
    sum of both norms. None at beta 0, where Eq. 5 has no gradient."""
    sys.path.insert(0, str(ROOT))
    common, training = importlib.import_module("common"), importlib.import_module(STAGES["05"].removesuffix(".py"))
    torch = training.torch
    settings = json.loads((folder / out / "settings.json").read_text())
    args = argparse.Namespace(seed=settings["settings"]["seed"], global_batch=count)
    model = common.load_base_model(folder)
    reference, shards = model.reference(), common.Shards(folder, common.read_samples(folder), model)
    model.load_policy(folder / out / "policy.pt")
    pairs = lines(folder / "04_stage1.jsonl")[:count]
    args.global_batch = len(pairs)
    t, eps = training.draw_t_and_noise(0, model, args)
    features = shards.features([pair["clip"] for pair in pairs])
    audios = [(pair["clip"], pair[side]) for side in ("winner", "loser") for pair in pairs]
    inputs = features, shards.latents(audios).unflatten(0, (2, len(pairs))), eps, t
    with torch.no_grad():
        known = training.pair_errors(reference, *inputs)
    loss, logits = common.flow_dpo_loss(*training.pair_errors(model, *inputs), *known, settings["settings"]["beta"])
    norms = []
    for chosen in (logits < 0, logits >= 0):
        gradients = torch.autograd.grad((loss * chosen).sum(), model.trainable_parameters(), retain_graph=True)
        norms.append(sum(g.square().sum() for g in gradients).sqrt().item())
    return norms[0] / sum(norms) if any(norms) else None


def mean_of(rows, key):
    return float(np.mean([row[key] for row in rows]))


def flags_at(folder, flags):
    """{share:0.45} -> the threshold at which 45 % of this run's mined pairs are easy, as stage 04 prints it."""
    if "{share:" not in flags:
        return flags
    head, share = flags.rstrip("}").split("{share:")
    pairs = [pair for i in (1, 2) for pair in lines(folder / f"04_stage{i}.jsonl") if pair["source"] == "auto"]
    value = 1.0 if float(share) == 0 else np.quantile([pair["score_c"] for pair in pairs], 1 - float(share))
    return f"{head}{value:.6f}"


def lines(path):
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def make(args, study, split):
    """study: {World: arms}. Worlds are made, trained and judged some at a time; each is then whole in the csv."""
    done = {(row["world"], row["arm"], row["seed"]) for row in read(args.csv)}
    todo = {
        world: [(arm, seed) for arm in arms for seed in (world.seed if s is None else s for s in arm.seeds)]
        for world, arms in study.items()
    }
    todo = {w: [(a, s) for a, s in arms if (w.name, a.name, s) not in done] for w, arms in todo.items()}
    worlds = [world for world, arms in todo.items() if arms]
    with ProcessPoolExecutor(args.jobs) as pool:
        for some in (worlds[i : i + args.jobs] for i in range(0, len(worlds), args.jobs)):
            trainings = [(args, world, *arm) for world in some for arm in todo[world]]
            for work, jobs in ((make_world, [(args, world) for world in some]), (train, trainings)):
                title = f"{work.__name__} {', '.join(world.name for world in some)}"
                list(tqdm(pool.map(work, jobs, chunksize=1), title, total=len(jobs)))
            for rows in pool.map(judge, [(args, world, todo[world], split) for world in some]):
                append(args.csv, rows)


def read(path):
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row | {"seed": int(row["seed"]), "value": float(row["value"])} for row in rows]


def append(path, rows):
    known = {(row["world"], row["arm"], row["seed"]) for row in read(path)}  # ground truth and base recur
    new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        if new:
            out.writerow(COLUMNS)
        for world, arm, seed, budget, metric, value, n in rows:
            if (world, arm, seed) not in known:
                out.writerow((world, arm, seed, budget, metric, f"{value:.6g}", n))


# ------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------


class Results:
    """The csv: self[arm, metric] is {world: mean over its seeds}."""

    def __init__(self, rows):
        found = defaultdict(lambda: defaultdict(list))
        for row in rows:
            found[row["arm"], row["metric"]][row["world"]].append(row["value"])
        self.each = found
        self.mean = {key: {world: float(np.mean(v)) for world, v in worlds.items()} for key, worlds in found.items()}

    def gaps(self, system, against, metric):
        """System minus another in each world that has both."""
        ours, theirs = (self.mean.get((name, metric), {}) for name in (system, against))
        return np.array([ours[world] - theirs[world] for world in ours if world in theirs])


def interval(values):
    """Mean, half the width of its 95 % interval (Student's t), two-sided p of no difference."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / np.sqrt(len(values))
    if error == 0:
        return float(values.mean()), 0.0, 1.0 if values.mean() == 0 else 0.0
    p = 2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1)
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * error), float(p)


def holm(p_values):
    """Holm's step-down correction, in the order given."""
    order, adjusted, least = np.argsort(p_values), np.zeros(len(p_values)), 0.0
    for i, place in enumerate(order):
        least = adjusted[place] = max(least, min(1.0, (len(p_values) - i) * p_values[place]))
    return adjusted


def worlds_needed(values, alpha=0.05, power=0.8):
    """How many worlds like these decide a difference of this size with this power (paired t, normal quantiles)."""
    values = np.asarray(values, float)
    effect = max(abs(values.mean()) / values.std(ddof=1), 0.01)
    return int(np.ceil(((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) / effect) ** 2)) + 2


def shown(metric, mean, half=None, sign="+"):
    _, _, decimals, times = METRICS[metric]
    text = f"{mean * times:{sign}.{decimals}f}"
    return text if half is None else f"{text} ± {half * times:.{decimals}f}"


def heading(metric):
    return f"{METRICS[metric][0]} {'↑' if METRICS[metric][1] > 0 else '↓'}"


def table(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def claim_table(results, claims):
    """One row per claim: the difference by its one metric, p after Holm, the verdict."""
    found = [(claim, results.gaps(*claim[1:])) for claim in claims]
    found = [(claim, gaps) for claim, gaps in found if len(gaps) > 1]
    adjusted, rows = holm([interval(gaps)[2] for _, gaps in found]), []
    for ((text, system, against, metric), gaps), p in zip(found, adjusted):
        mean, half, _ = interval(gaps)
        right = mean * METRICS[metric][1] > 0
        verdict = "holds" if right else "does not hold"
        if p > 0.05:
            verdict = f"not decidable: {worlds_needed(gaps):,} worlds would"
        agree = int((np.sign(gaps) == np.sign(mean)).sum())
        difference = f"{METRICS[metric][0]} {shown(metric, mean, half)}"
        rows.append([text, f"{system} - {against}", difference, f"{agree}/{len(gaps)}", f"{p:.3f}", verdict])
    return table(["claim", "difference", "by", "worlds of this sign", "p (Holm)", "verdict"], rows)


def difference_table(results, systems):
    """Base's value, then every system minus base; a row for each metric."""
    metrics = [metric for metric in METRICS if ("base", metric) in results.mean]
    systems = [system for system in systems if (system, metrics[0]) in results.mean]
    rows = []
    for metric in metrics:
        base = interval(list(results.mean["base", metric].values()))
        gaps = [interval(results.gaps(system, "base", metric)) for system in systems]
        rows.append([heading(metric), shown(metric, *base[:2], sign=""), *(shown(metric, *gap[:2]) for gap in gaps)])
    return table(["", "base", *systems], rows)


# ------------------------------------------------------------------------------------------------------------
# What is said of a study
# ------------------------------------------------------------------------------------------------------------


def tell_claims(args, results):
    worlds = results.mean["base", "fd"]
    print(f"{len(worlds)} worlds, test split\n")
    print(difference_table(results, [arm.name for arm in ARMS]), "\n")
    for name, claims in CLAIMS.items():
        print(f"{name}\n\n{claim_table(results, claims)}\n")


SHOWN = ("fd", "p_good", "judge_semantic", "judge_sync_s", "judge_aesthetic")


def tell_pilot(args, results):
    """Mean and spread over the training seeds, minus base, in each world."""
    for world in PILOT:
        arms = [arm for arm in PILOT[world] if world.name in results.each.get((arm.name, "fd"), {})]
        if not arms:
            continue
        base = {metric: results.mean["base", metric][world.name] for metric in SHOWN}
        rows = [["base", *(shown(metric, base[metric], sign="") for metric in SHOWN), "", "", ""]]
        for arm in arms:
            value = {key: results.each[arm.name, key].get(world.name) for key in (*SHOWN, *LOGGED, "norm_wrong")}
            cells = []
            for metric in SHOWN:
                gaps = np.array(value[metric]) - base[metric]
                spread = gaps.std(ddof=1) if len(gaps) > 1 else None
                cells.append(shown(metric, gaps.mean(), spread))
            more = ("accuracy", "saturated", "norm_wrong")
            rows.append([arm.name, *cells, *(f"{np.mean(value[key]):.2f}" if value[key] else "" for key in more)])
        head = ["", *map(heading, SHOWN), "accuracy", "saturated", "gradient of wrong pairs"]
        print(f"world {world.name}, val split: minus base, ± standard deviation over training seeds\n")
        print(table(head, rows), "\n")
    draw_pilot(args, results)


def draw_pilot(args, results):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    for axis, metric in zip(axes, ("fd", "judge_semantic", "judge_sync_s")):
        for w, world in enumerate((World(0), World(1))):
            base = results.mean["base", metric].get(world.name)
            for r, rate in enumerate(RATES if base is not None else ()):
                points = [(beta, results.each.get((f"beta{beta}_lr{rate:.0e}", metric), {}).get(world.name, []))
                          for beta in BETAS]  # fmt: skip
                style = dict(color=f"C{r}", marker="os"[w], fillstyle=("full", "none")[w])
                at = [b * (0.94 + 0.08 * w + 0.04 * r) for b, values in points for _ in values]
                gaps = [(v - base) * METRICS[metric][3] for _, values in points for v in values]
                axis.plot(at, gaps, linestyle="", markersize=5, label=f"world {world.name}, lr {rate:.0e}", **style)
                means = [(b, np.mean(v) - base) for b, v in points if v]
                axis.plot([b for b, _ in means], [m * METRICS[metric][3] for _, m in means], color=f"C{r}", lw=0.8)
        axis.axhline(0, color="#444", lw=0.8)
        axis.set(xscale="log", xticks=BETAS, xticklabels=BETAS, xlabel="beta", title=f"{heading(metric)} minus base")
        axis.minorticks_off()
    axes[0].legend(fontsize=7)
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)


def draw_curves(args):
    """Every training of CURVES: smoothed logs as a figure, means of the last 50 steps as a table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [Arm(f"curve{i}", "05", flags) for i, flags in enumerate(CURVES.values())]
    make_world((args, World(0)))
    with ProcessPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train, [(args, World(0), arm, 0) for arm in arms]), "curves", total=len(arms)))
    figure, axes = plt.subplots(3, len(arms), figsize=(15, 6), sharex="col", constrained_layout=True)
    rows = []
    for column, (title, arm) in zip(axes.T, zip(CURVES, arms)):
        log = lines(folder_of(args, World(0)) / arm.out(0) / "log.jsonl")
        switch = sum(row["stage"] == 1 for row in log)
        for axis, keys in zip(column, (("loss",), ("accuracy", "saturated", "opposed"), ("gap_w", "gap_l"))):
            for key in keys:
                values = np.array([row[key] for row in log])
                for part in (slice(0, switch), slice(switch, len(log))):  # the stages are smoothed apart
                    wide = min(15, len(values[part]))
                    smooth = np.convolve(values[part], np.full(wide, 1 / wide), "valid")
                    at = np.arange(len(log))[part][wide - 1 :]
                    axis.plot(at, smooth, color=f"C{keys.index(key)}", label=key if part.start == 0 else None, lw=1)
            axis.axvline(switch, color="#bbb", lw=0.8, ls=":")
            axis.tick_params(labelsize=7)
        column[0].axhline(np.log(2), color="#444", lw=0.6, ls="--")
        column[2].axhline(0, color="#444", lw=0.6)
        column[1].set_ylim(0, 1)
        column[0].set_title(f"{title}\n{CURVES[title]}", fontsize=8)
        means = {key: mean_of(log[:switch][-50:], key) for key in LOGGED}  # of stage 1, the mined pairs
        wrong, rise = means["weight_wrong"] / means["weight"], means["gap_w"] / means["ref_w"]
        shown = [f"{means[key]:.3f}" for key in (*LOGGED[:4], *LOGGED[5:7])]
        rows.append([title, f"`{CURVES[title]}`", *shown, f"{rise:.2f}", f"{wrong:.2f}"])
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)
    head = [*LOGGED[:4], *LOGGED[5:7], "gap_w / ref_w", "weight on wrong pairs"]
    print(table(["", "flags, stage 1's last 50 steps", *head], rows))


def main(args):
    args.runs = args.runs.resolve()
    if args.study == "curves":
        return draw_curves(args)
    study = PILOT if args.study == "pilot" else {World(seed): ARMS for seed in range(12)}
    count = len(study) if args.worlds is None else args.worlds
    make(args, dict(list(study.items())[:count]), "val" if args.study == "pilot" else "test")
    rows = read(args.csv)
    if not rows:
        raise RuntimeError(f"{args.csv}: is not there yet; give --worlds 1 or more")
    (tell_pilot if args.study == "pilot" else tell_claims)(args, Results(rows))


if __name__ == "__main__":
    try:
        main(parse_args())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
