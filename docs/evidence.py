"""The evidence of docs/evidence.md: the paper's claims in toy worlds of size `large`, each judged once (Sec. 3.2).

Run:
    python docs/evidence.py pilot              # val split, four worlds: which settings, and what explains their spread
    python docs/evidence.py explore            # val split, four worlds: budgets, guidance, noise, a second round, LoRA
    python docs/evidence.py claims             # test split, twelve worlds: Tables 1 and 2 in miniature
    python docs/evidence.py claims --worlds 0  # the tables and figures again, from the csv, in seconds
    python docs/evidence.py curves             # trainings of Flow-DPO, well and ill, for docs/curves.md
    python docs/evidence.py claims --worlds 2 --size tiny --runs DIR --csv FILE      # a try, minutes
A world is `00_toy_world.py --seed w --size large`: its clips, base model, scorers and people are its own, and what
follows has its seed. What a stage does is a command of that stage, noted with its CPU seconds in the
run's commands.jsonl. What the csv holds is not made again; audio is deleted once it is judged; an interrupted command
goes on.

What is claimed, and by which one metric it is decided, stands in CLAIMS, written before the worlds were made. A value
is a mean over worlds, its 95 % interval Student's t over them; differences are taken within a world, on the same clips
and noise. The p values of one table are Holm's, corrected for their number.

Writes:
    docs/evidence.csv, pilot.csv, explored.csv  world, arm, seed, budget (rows through the network in training), metric,
                                                value, n (clips; 0: of the training): every number, a world at a time
    docs/evidence.png, pilot.png, compute.png, curves.png  the figures; the tables are printed, for docs/*.md
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
from collections.abc import Callable
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
    round: int = 1  # 2: its base model is what Flow-DPO made of the plain world's

    @property
    def name(self):
        return f"{self.seed}{f' noise {self.noise:g}' * (self.noise != 1)}{' round 2' * (self.round == 2)}"


class Arm(NamedTuple):
    name: str
    stage: str  # 05 or 06; "": base, not trained
    flags: str = ""  # {share:0.45} becomes the threshold at which that share of the mined pairs is easy
    seeds: tuple = (None,)  # of the training; None: the world's
    guidance: float | None = None  # of the evaluation alone; None: the world's

    @property
    def label(self):
        return self.name if self.guidance is None else f"{self.name} at guidance {self.guidance:g}"

    def out(self, seed):
        return f"{self.name}_{seed}" if self.stage else self.name


# The pilot ---------------------------------------------------------------------------------------------------

BETAS, RATES, SEEDS = (20, 60, 200, 600, 1000), (7e-5, 2e-4), (0, 1, 2)
GRID = [Arm(f"beta{b}_lr{lr:.0e}", "05", f"--beta {b} --lr {lr}", SEEDS) for b in BETAS for lr in RATES]
SCALED = [Arm(f"beta{b}_scaled", "05", f"--beta {b} --lr {7e-5 * 60 / b:.2e}", SEEDS) for b in BETAS if b != 60]
NOISY = [arm for arm in GRID if arm.name in ("beta60_lr7e-05", "beta600_lr7e-05")]
DDPO = [Arm(f"ddpo_lr{lr:.0e}_clip{clip:.0e}", "06", f"--lr {lr} --clip-range {clip}", (0,))
        for lr in (1e-4, 3e-4, 6e-4) for clip in (1e-3, 5e-3)]  # fmt: skip
PILOT = {World(0): [*GRID, *SCALED, *DDPO]} | {World(w): GRID for w in (1, 2, 3)}
PILOT |= {World(0, 0.0): NOISY, World(0, 3.0): NOISY}

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

FLOW_DPO = Arm("flow_dpo", "05")
ARMS = (
    FLOW_DPO, Arm("ddpo", "06"), Arm("no_human", "05", "--no-human"),
    Arm("sft", "05", "--beta 0 --sft-weight 1"), Arm("dpo_sft", "05", "--sft-weight 2"),
    Arm("beta600", "05", "--beta 600"), Arm("beta1000", "05", "--beta 1000"),
    Arm("share81", "05", "--threshold {share:0.81}"), Arm("share0", "05", "--threshold {share:0}"),
    Arm("hard_first", "05", "--hard-first"),
    Arm("share81_no_human", "05", "--no-human --threshold {share:0.81}"),
    Arm("share0_no_human", "05", "--no-human --threshold {share:0}"),
    Arm("hard_first_no_human", "05", "--no-human --hard-first"),
)  # fmt: skip
TRIED = [arm for arm in ARMS if arm.name in ("flow_dpo", "ddpo", "sft", "beta600")]  # on val too, to compare with
MORE = [
    Arm("sum600", "05", "--beta 600000"),  # the sum over the toy's latent of 25 x 40
    *(Arm(f"lora{rank}{name}", "05", f"--lora {rank}{lr}") for rank in (16, 64)
      for name, lr in (("", ""), ("_lr1e-03", " --lr 1e-3"))),
    *(Arm(f"{arm.name}_steps{n}", arm.stage, f"{arm.flags} --steps {n}") for arm in TRIED[:3] for n in (60, 125, 500)),
    *(Arm(name, number, "", guidance=guidance) for guidance in (1, 3, 4.5)
      for name, number in (("base", ""), ("flow_dpo", "05"), ("ddpo", "06"))),
]  # fmt: skip
EXPLORED = {World(w): [*TRIED, *MORE] for w in range(4)} | {World(w, round=2): TRIED[:1] for w in range(4)}
EXPLORED |= {World(w, noise): TRIED[::3] for noise in (0.0, 3.0) for w in range(4)}
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
    parser.add_argument("study", choices=(*STUDIES, "curves"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of all runs")
    parser.add_argument("--csv", type=Path, help="default: the study's, in docs")
    parser.add_argument("--worlds", type=int, help="how many of the study's worlds; 0: what the csv holds. Claims: 12")
    parser.add_argument("--jobs", type=int, default=2, help="worlds, then trainings, at a time; one core each")
    parser.add_argument("--size", choices=("large", "default", "tiny"), default="large", help="of the toy worlds")
    args = parser.parse_args(argv)
    args.csv = args.csv or ROOT / "docs" / (STUDIES[args.study].csv if args.study in STUDIES else "curves.csv")
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
    """Stages 00 to 04. People of another noise answer about the audios of the world that they share. A second round
    keeps the world's people and AudioScore: its audios come from the tuned policy, and pairs from them."""
    args, world = job
    folder, plain = folder_of(args, world), folder_of(args, World(world.seed))
    if folder != plain and not (folder / "run.json").exists():
        copy_world(world, plain, folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [("00", "run.json", f" --size {args.size}"), ("01", "02_to_rate.csv", ""), ("02", "02_audioscore.pt", "")]
    for number, made, more in (*steps, ("03", "03_human_pairs.jsonl", ""), ("04", "04_settings.json", None)):
        if not (folder / made).exists():
            command(folder, number, "" if more is None else f"--seed {world.seed}{more}")


def copy_world(world, plain, folder):
    """What a twin shares with the plain world; its run.json comes last."""
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted copy
    folder.mkdir()
    keep = ("00_*", "clips.jsonl", *(("01_*", "scores") if world.round == 1 else ("02_[as]*",)))
    for path in (path for pattern in keep for path in plain.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=os.link)
        else:
            shutil.copy(path, folder)
    about = json.loads((plain / "run.json").read_text()) | {"rater_noise": world.noise}
    if world.round == 2:
        common, base = stage("common"), folder / "00_base.pt"
        tuned = common.load_pt(plain / FLOW_DPO.out(world.seed) / "policy.pt")
        common.save_pt(base, common.load_pt(base) | {"net": tuned})
        about |= {"checkpoint_digest": common.digest(base)}
        record = json.loads((folder / "02_settings.json").read_text()) | {"inputs": {}}  # of the first round
        (folder / "02_settings.json").write_text(json.dumps(record))
    (folder / "run.json").write_text(json.dumps(about))


def train(job):
    args, world, arm, seed = job
    folder = folder_of(args, world)
    if arm.stage and not (folder / arm.out(seed) / "policy.json").exists():
        command(folder, arm.stage, f"--seed {seed} --out {arm.out(seed)} {flags_at(folder, arm.flags)}")


def judge(job):
    """All policies of a world, by one command of stage 07 for each guidance. Returns the lines of the csv."""
    args, world, arms, split = job
    folder, rows, logs = folder_of(args, world), [], {}
    for guidance in dict.fromkeys(arm.guidance for arm, _ in arms):
        names = {arm.out(seed): (arm, seed) for arm, seed in arms if arm.guidance == guidance}
        names = {x: (Arm(x, "", guidance=guidance), 0) for x in ("ground_truth", "base")} | names
        more = "" if guidance is None else f" --guidance {guidance}"
        command(folder, "07", f"--split {split} --only --systems {' '.join(names)}{more}")
        logs |= {out: lines(folder / out / "log.jsonl") for out, (arm, _) in names.items() if arm.stage}
        budgets = {out: log[-1]["forwards"] for out, log in logs.items()}
        for result in lines(folder / f"07_results{'' if split == 'test' else '_val'}.jsonl"):
            arm, seed = names[out := result["system"]]
            value = result["metric"], result["value"], result["n"]
            rows.append((world.name, arm.label, seed, budgets.get(out, 0), *value))
        for out, (arm, seed) in names.items():
            known = []
            if arm.stage and guidance is None:
                keys = LOGGED if arm.stage == "05" else ("reward",)
                known = [*((key, mean_of(logs[out][-50:], key)) for key in keys), ("cpu_s", training_cost(folder, out))]
                if arm.stage == "05":
                    known.append(("norm_wrong", norm_wrong(folder, out)))
            elif out == "base" and guidance is None:
                known = world_costs(folder).items()
            rows += [(world.name, arm.label, seed, budgets.get(out, 0), *pair, 0) for pair in known]
            shutil.rmtree(folder / "07_audio" / f"{out}{f'@{guidance:g}' if guidance else ''}", ignore_errors=True)
    return [row for row in rows if row[5] is not None]


def training_cost(folder, out):
    """CPU seconds, if it was not interrupted: what a stopped command spent is not known."""
    spent = lines(folder / "commands.jsonl")
    return sum(row["cpu_s"] for row in spent if f"--out {out} " in f"{row['command']} ")


def world_costs(folder):
    """CPU seconds of the stages; the pool of audios, its rated ones, and its rows through the network, which guidance
    doubles."""
    spent = lines(folder / "commands.jsonl")
    stages = {f"cpu_s_{n}": sum(row["cpu_s"] for row in spent if row["command"][:2] == n) for n in STAGES}
    steps = json.loads((folder / "run.json").read_text())["sampler"]["steps"]
    audios = sum(len(lines(file)) for file in (folder / "01_samples").glob("?????.jsonl"))
    rated = len(lines(folder / "02_scores.jsonl"))
    return dict(pool_audios=audios, pool_rated=rated, pool_forwards=2 * steps * audios) | stages


def stage(name):
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def norm_wrong(folder, out, count=128):
    """Of Eq. 5's gradient at a policy, on pairs of stage 1: the norm of what the wrongly ordered ones give, over the
    sum of both norms. None at beta 0, where Eq. 5 has no gradient."""
    common, training = stage("common"), stage(STAGES["05"].removesuffix(".py"))
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
    todo = {w: [(a, s) for a, s in arms if (w.name, a.label, s) not in done] for w, arms in todo.items()}
    worlds = [world for world, arms in todo.items() if arms]
    with ProcessPoolExecutor(args.jobs) as pool:
        for some in (worlds[i : i + args.jobs] for i in range(0, len(worlds), args.jobs)):
            plain = [World(seed) for seed in dict.fromkeys(world.seed for world in some)]
            twins = [world for world in some if world not in plain]
            tuned = [world for world in plain if any((w.seed, w.round) == (world.seed, 2) for w in some)]
            arms = {(w, a.out(seed)): (args, w, a, seed) for w in some for a, seed in todo[w]}  # one for all guidances
            for work, jobs in (
                (make_world, [(args, world) for world in plain]),
                (train, [(args, world, FLOW_DPO, world.seed) for world in tuned]),
                (make_world, [(args, world) for world in twins]),
                (train, [*arms.values()]),
            ):
                title = f"{work.__name__} {', '.join(world.name for world in some)}"
                list(tqdm(pool.map(work, jobs, chunksize=1), title, total=len(jobs), disable=not jobs))
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
    """The csv: mean[arm, metric] is {world: mean over its seeds}. What another noise or round made of a world is an arm
    of that world: `flow_dpo, round 2`."""

    def __init__(self, rows):
        found = defaultdict(lambda: defaultdict(list))
        for row in rows:
            world, _, other = row["world"].partition(" ")
            found[row["arm"] + f", {other}" * bool(other), row["metric"]][world].append(row["value"])
        self.rows, self.each = rows, found
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
    """How many worlds like these, more than there are, would decide a difference of this size with this power (paired
    t, normal quantiles and two worlds more)."""
    values = np.asarray(values, float)
    effect = max(abs(values.mean()) / values.std(ddof=1), 0.01)
    needed = int(np.ceil(((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) / effect) ** 2)) + 2
    return max(needed, len(values) + 1)


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
            verdict = f"not decidable: {worlds_needed(gaps, 0.05 / len(found)):,} worlds would"
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
    if len(worlds) > 1:
        draw_claims(args, results)


SHOWN = ("fd", "p_good", "judge_semantic", "judge_sync_s", "judge_aesthetic")


def minus_base(results, system, base="base"):
    """Cells of a table: mean over the worlds of system minus base, with its interval; of one world, with the deviation
    over training seeds; None if it is not there yet."""
    gaps = [results.gaps(system, base, metric) for metric in SHOWN]
    if len(gaps[0]) == 1:
        return [shown(metric, gap[0], spread(results, system, metric)) for metric, gap in zip(SHOWN, gaps)]
    return [shown(metric, *interval(gap)[:2]) for metric, gap in zip(SHOWN, gaps)] if len(gaps[0]) else None


def spread(results, arm, metric):
    """Standard deviation over training seeds, pooled over the worlds."""
    seeds = [values for values in results.each[arm, metric].values() if len(values) > 1]
    return float(np.sqrt(np.mean([np.var(values, ddof=1) for values in seeds]))) if seeds else None


def logged(results, arm, key):
    values = results.mean.get((arm, key), {}).values()
    return f"{np.mean([*values]):.2f}" if values else ""


def head_and_base(results):
    worlds = sorted(results.mean["base", "fd"])
    values = [[results.mean["base", metric][world] for world in worlds] for metric in SHOWN]
    base = ["base", *(shown(metric, np.mean(value), sign="") for metric, value in zip(SHOWN, values))]
    return [f"worlds {', '.join(worlds)}; val", *map(heading, SHOWN)], base


def tell_pilot(args, results):
    """Tables of the worlds that have their rows so far."""
    (head, base), more = head_and_base(results), ("FD, seeds", "accuracy", "saturated", "gradient of wrong pairs")

    def row(name, other=""):
        if cells := minus_base(results, name + other, f"base{other}"):
            seeds = spread(results, name + other, "fd")
            keys = (logged(results, name + other, key) for key in ("accuracy", "saturated", "norm_wrong"))
            yield [name + other, *cells, "" if seeds is None else f"{seeds:.0f}", *keys]

    print("Minus base, mean over worlds with its 95 % interval; seeds: FD's deviation over training seeds\n")
    print(table([*head, *more], [base + [""] * len(more), *(line for arm in GRID for line in row(arm.name))]), "\n")
    alone = [line for arm in [*SCALED, *DDPO] for line in row(arm.name)]
    alone += [line for other in (", noise 0", ", noise 3") for arm in NOISY for line in row(arm.name, other)]
    print("World 0 alone: minus base, with the deviation over training seeds\n")
    print(table(["", *map(heading, SHOWN), *more], alone))
    draw_pilot(args, results)


def tell_explored(args, results):
    (head, base), rows = head_and_base(results), []
    for arm in [*TRIED, *(arm for arm in MORE if arm.guidance is None)]:
        rows.append((arm.name, arm.name, "base"))
    for other in ("noise 0", "noise 3"):
        rows += [(f"{arm.name}, {other}", f"{arm.name}, {other}", f"base, {other}") for arm in TRIED[::3]]
    rows.append(("flow_dpo, round 2", "flow_dpo, round 2", "base"))
    told = [(name, minus_base(results, *pair)) for name, *pair in rows]
    print(table(head, [base, *([name, *cells] for name, cells in told if cells)]), "\n")
    against = [(name, minus_base(results, system, "flow_dpo")) for name, system, _ in rows if "noise" not in name]
    print("Minus flow_dpo\n")
    print(table(head, [[name, *cells] for name, cells in against if cells and name != "flow_dpo"]), "\n")

    rows = []
    for guidance in (1, 1.5, 3, 4.5):
        at = "" if guidance == 1.5 else f" at guidance {guidance:g}"
        if cells := minus_base(results, f"flow_dpo{at}", f"base{at}"):
            ours = [interval([*results.mean[f"base{at}", metric].values()])[:2] for metric in SHOWN]
            rows.append([f"base, guidance {guidance:g}", *(shown(m, *pair, sign="") for m, pair in zip(SHOWN, ours))])
            rows.append(["flow_dpo minus base", *cells])
            rows.append(["ddpo minus base", *minus_base(results, f"ddpo{at}", f"base{at}")])
    print(table(head, rows), "\n")
    if ("flow_dpo_steps60", "fd") in results.mean:
        print(compute_table(results), "\n")
        draw_compute(args, results)


STEPS = (60, 125, 250, 500)  # the third: a large world's own


def cost_of(results, arm, steps):
    """(name of the arm; rows through the network in training, and with the pool of audios; CPU seconds likewise), means
    over the worlds. All need AudioScore and the audios that were rated for it; DDPO alone needs no others."""
    name = arm if steps == STEPS[2] else f"{arm}_steps{steps}"
    budget = [row for row in results.rows if row["arm"] == name and row["metric"] == "fd" and " " not in row["world"]]
    if not budget:
        return None
    mean = lambda key, of="base": float(np.mean([*results.mean[of, key].values()]))  # noqa: E731
    share = mean("pool_rated") / mean("pool_audios") if arm == "ddpo" else 1
    rows, seconds = np.mean([float(row["budget"]) for row in budget]), mean("cpu_s", name)
    pool_s = share * mean("cpu_s_01") + mean("cpu_s_02") + mean("cpu_s_03") * (arm != "ddpo")
    return name, rows, rows + share * mean("pool_forwards"), seconds, seconds + pool_s


def compute_table(results):
    rows = []
    for arm in (arm.name for arm in TRIED[:3]):
        for steps in STEPS:
            if found := cost_of(results, arm, steps):
                name, *costs = found
                rows.append([arm, steps, *(f"{cost:,.0f}" for cost in costs), *minus_base(results, name)])
    head = ["", "steps", "rows in training", "with the pool", "CPU s in training", "with pool and scoring"]
    return table([*head, *map(heading, SHOWN)], rows)


def draw_compute(args, results):
    figure, axes = canvas(2, 3, figsize=(11, 6), sharex=True)
    metrics = ("fd", "judge_semantic", "judge_sync_s", "p_good", "oracle_semantic", "oracle_sync_s")
    for axis, metric in zip(axes.flat, metrics):
        for color, arm in zip(("C0", "C1", "C2"), TRIED):
            found = [x for x in (cost_of(results, arm.name, steps) for steps in STEPS) if x]
            at, gaps = [x[-1] for x in found], [results.gaps(x[0], "base", metric) * METRICS[metric][3] for x in found]
            bars, style = [interval(gap)[1] for gap in gaps], dict(marker="o", markersize=4, capsize=2)
            axis.errorbar(at, [gap.mean() for gap in gaps], bars, color=color, label=arm.name, **style)
            axis.plot(at, gaps, color=color, lw=0.5, alpha=0.4)
        axis.axhline(0, color="#444", lw=0.8)
        axis.set(
            xscale="log", xticks=(100, 200, 300), xticklabels=(100, 200, 300), title=f"{heading(metric)} minus base"
        )
        axis.minorticks_off()
        if METRICS[metric][1] < 0:
            axis.invert_yaxis()  # up is better everywhere
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("CPU seconds of a training, with its share of the pool of audios and of scoring", fontsize=9)
    figure.savefig(args.csv.with_name("compute.png"), dpi=110)


def draw_pilot(args, results):
    figure, axes = canvas(1, 3, figsize=(11, 3.2))
    worlds = sorted(results.mean["base", "fd"])
    for axis, metric in zip(axes, ("fd", "judge_semantic", "judge_sync_s")):
        base = results.mean["base", metric]
        for r, rate in enumerate(RATES):
            points = {beta: results.each.get((f"beta{beta}_lr{rate:.0e}", metric), {}) for beta in BETAS}
            means = []
            for beta, found in points.items():
                gaps = {w: (np.array(v) - base[w]) * METRICS[metric][3] for w, v in found.items()}
                for world, values in gaps.items():
                    place = worlds.index(world)
                    at = np.full(len(values), beta * (0.9 + 0.05 * place + 0.025 * r))
                    label = f"lr {rate:.0e}, world {world}" if beta == BETAS[0] else None
                    axis.plot(at, values, f"C{r}{'osD^'[place]}", markersize=4, fillstyle="none", label=label)
                means += [(beta, np.mean([*map(np.mean, gaps.values())]))] if gaps else []
            axis.plot([b for b, _ in means], [m for _, m in means], color=f"C{r}", lw=1)
        axis.axhline(0, color="#444", lw=0.8)
        axis.set(xscale="log", xticks=BETAS, xticklabels=BETAS, xlabel="beta", title=f"{heading(metric)} minus base")
        axis.minorticks_off()
        axis.tick_params(axis="x", labelsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)


def draw_claims(args, results):
    """Every claim's difference in units of its deviation over worlds, up = as the paper says; a dot per world."""
    tables = {name: [c for c in claims if len(results.gaps(*c[1:])) > 1] for name, claims in CLAIMS.items()}
    counts = [len(claims) for claims in tables.values()]
    figure, axes = canvas(len(tables), 1, figsize=(9, 1.2 + 0.36 * sum(counts)), height_ratios=counts)
    for axis, (name, claims) in zip(axes, tables.items()):
        for place, (_, system, against, metric) in enumerate(reversed(claims)):
            gaps = results.gaps(system, against, metric) * METRICS[metric][1]
            gaps = gaps / (gaps.std(ddof=1) or 1)
            mean, half, _ = interval(gaps)
            axis.plot(gaps, np.full(len(gaps), place), "o", ms=3, color="#999", mfc="none")
            axis.errorbar(mean, place, xerr=half, color="C0" if mean > 0 else "C3", marker="o", ms=5, capsize=3, lw=1.5)
        axis.axvline(0, color="#444", lw=0.8)
        texts = [f"{text} [{METRICS[metric][0]}]" for text, _, _, metric in reversed(claims)]
        axis.set_yticks(range(len(claims)), texts, fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
    axes[-1].set_xlabel("difference in the claim's direction, in standard deviations over worlds")
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)


def canvas(rows, columns, **layout):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if heights := layout.pop("height_ratios", None):
        layout["gridspec_kw"] = {"height_ratios": heights}
    return plt.subplots(rows, columns, constrained_layout=True, **layout)


def draw_curves(args):
    """Every training of CURVES: smoothed logs as a figure, means of the last 50 steps as a table."""
    arms = [Arm(f"curve{i}", "05", flags) for i, flags in enumerate(CURVES.values())]
    make_world((args, World(0)))
    with ProcessPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train, [(args, World(0), arm, 0) for arm in arms]), "curves", total=len(arms)))
    figure, axes = canvas(3, len(arms), figsize=(15, 6), sharex="col")
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


class Study(NamedTuple):
    worlds: dict  # {World: arms}
    split: str
    tell: Callable
    csv: str


STUDIES = {
    "pilot": Study(PILOT, "val", tell_pilot, "pilot.csv"),
    "explore": Study(EXPLORED, "val", tell_explored, "explored.csv"),
    "claims": Study({World(seed): ARMS for seed in range(12)}, "test", tell_claims, "evidence.csv"),
}


def main(args):
    args.runs = args.runs.resolve()
    if args.study == "curves":
        return draw_curves(args)
    study = STUDIES[args.study]
    make(args, dict(list(study.worlds.items())[: args.worlds]), study.split)
    rows = read(args.csv)
    if not rows:
        raise RuntimeError(f"{args.csv}: is not there yet; give --worlds 1 or more")
    study.tell(args, Results(rows))


if __name__ == "__main__":
    try:
        main(parse_args())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
