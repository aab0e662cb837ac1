"""The evidence of docs/evidence.md: the paper's claims in toy worlds of size `large`, each judged
once (Sec. 3.2).

Run:
    python docs/evidence.py pilot              # val split, four worlds: which settings, and what explains their spread
    python docs/evidence.py explore            # val split, four worlds: budgets, guidance, noise, a second round, LoRA
    python docs/evidence.py recipe --size default      # val split, four worlds, five seeds: averaged weights, stratified t
    python docs/evidence.py claims             # test split, twelve worlds: Tables 1 and 2 in miniature
    python docs/evidence.py asked --size default # val split, four worlds: the recording as a candidate, Eq. 5 as printed, mild raters
    python docs/evidence.py fresh              # test split, twelve other worlds, four seeds: Flow-DPO against DDPO
    python docs/evidence.py claims --worlds 0  # a study's tables and figures again, from its csv, in seconds
    python docs/evidence.py tables > docs/tables.md    # the tables of all studies, from their csvs
    python docs/evidence.py curves             # trainings of Flow-DPO, well and ill, for docs/curves.md
    python docs/evidence.py claims --worlds 2 --size tiny --runs DIR --csv FILE      # a try, minutes
A world is `00_toy_world.py --seed w --size large`: its clips, base model, scorers and people are its own, and what
follows has its seed. What a stage does is a command of that stage, noted with its CPU seconds in the
run's commands.jsonl. What the csv holds is not made again; audio is deleted once it is judged; an interrupted command
goes on.

What the fresh worlds are asked stands in FRESH_CLAIMS, committed before the first of them was made.
What is claimed, and by which one metric it is decided, stands in CLAIMS, written before any of
these worlds' test splits was judged (commit 6dcd877, which holds the pilot of worlds 0 and 1 on
val). A value is a mean over worlds, its 95 % interval Student's t over them; differences are taken
within a world, on the same clips and noise. The p values of one table are Holm's, corrected for
their number.

Writes:
    docs/evidence.csv, pilot.csv, recipe.csv, explored.csv, asked.csv, fresh.csv
        every number, a world at a time: world, arm, seed, budget (rows through the network in training), metric, value,
        n (clips; 0: of the training); in newer ones the commit, the CPU, the CPU seconds of the training (base: of the
        world) too
    docs/evidence.png, pilot.png, compute.png, curves.png  the figures; the tables are printed
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
COLUMNS = ("world", "arm", "seed", "budget", "metric", "value", "n", "commit", "cpu", "cpu_s")


class World(NamedTuple):
    seed: int
    noise: float = 1.0  # the simulated people's, times what it usually is
    round: int = 1  # 2: its base model is what Flow-DPO made of the plain world's
    given: bool = False  # the clip's own sound is a sixth candidate
    overlooks: int = 0  # slight faults that the simulated people overlook

    @property
    def name(self):
        name = str(self.seed)
        if self.noise != 1:
            name += f" noise {self.noise:g}"
        if self.round == 2:
            name += " round 2"
        if self.given:
            name += " given"
        if self.overlooks:
            name += f" mild {self.overlooks}"
        return name


class Arm(NamedTuple):
    name: str
    stage: str  # 05 or 06; "": base, not trained
    flags: str = (
        ""  # {share:0.45} becomes the threshold at which that share of the mined pairs is easy
    )
    seeds: tuple = (None,)  # of the training; None: the world's
    guidance: float | None = None  # of the evaluation alone; None: the world's

    @property
    def label(self):
        return self.name if self.guidance is None else f"{self.name} at guidance {self.guidance:g}"

    def out(self, seed):
        return f"{self.name}_{seed}" if self.stage else self.name


# The pilot
# --------------------------------------------------------------------------------------------------

BETAS = (20, 60, 200, 600, 1000)
RATES = (7e-5, 2e-4)
SEEDS = (0, 1, 2)
GRID = [
    Arm(f"beta{b}_lr{lr:.0e}", "05", f"--beta {b} --lr {lr}", SEEDS) for b in BETAS for lr in RATES
]
SCALED = [
    Arm(f"beta{b}_scaled", "05", f"--beta {b} --lr {7e-5 * 60 / b:.2e}", SEEDS)
    for b in BETAS
    if b != 60
]
NOISY = [arm for arm in GRID if arm.name in ("beta60_lr7e-05", "beta600_lr7e-05")]
DDPO = [Arm(f"ddpo_lr{lr:.0e}_clip{clip:.0e}", "06", f"--lr {lr} --clip-range {clip}", (0,))
        for lr in (1e-4, 3e-4, 6e-4) for clip in (1e-3, 5e-3)]  # fmt: skip
PILOT = {World(0): [*GRID, *SCALED, *DDPO]} | {World(w): GRID for w in (1, 2, 3)}
PILOT |= {World(0, 0.0): NOISY, World(0, 3.0): NOISY}

# The recipe: the default run's, on worlds of its size. Chosen is, of 05, the arm of the smallest FD
# minus base plus its deviation over seeds (means over the worlds) among those whose P(Good) is
# within .01 of the largest; of 06 the better by the same rule.
# --------------------------------------------------------------------------------------------------

FIVE = (0, 1, 2, 3, 4)
RECIPE = [
    Arm("last", "05", "--ema 0 --no-stratified-t", FIVE),
    Arm("average", "05", "--ema 0.2 --no-stratified-t", FIVE),
    Arm("stratified", "05", "--ema 0 --stratified-t", FIVE),
    Arm("both", "05", "--ema 0.2 --stratified-t", FIVE),
    Arm("both_low_lr", "05", "--ema 0.2 --stratified-t --lr 3.5e-5", FIVE),
    Arm("ddpo_last", "06", "--ema 0", FIVE[:2]),
    Arm("ddpo_average", "06", "--ema 0.2", FIVE[:2]),
]

# The curves: what is wrong in each, and what makes it so
# -----------------------------------------------------

CURVES = {
    "healthy": "--beta 60 --lr 7e-05",
    "too few pairs": "--beta 60 --lr 7e-05 --steps 1500",
    "lr too high": "--beta 60 --lr 1e-3",
    "beta too large": "--beta 1000 --lr 0.0002",
    "beta too small": "--beta 2 --lr 7e-05",
    "winner's error rises": "--beta 20 --lr 0.0002",
}

# The claims
# --------------------------------------------------------------------------------------------------

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
TRIED = [
    arm for arm in ARMS if arm.name in ("flow_dpo", "ddpo", "sft", "beta600")
]  # on val too, to compare with
MORE = [
    Arm("sum600", "05", "--beta 600000"),  # the sum over the toy's latent of 25 x 40
    *(Arm(f"lora{rank}{name}", "05", f"--lora {rank}{lr}") for rank in (16, 64)
      for name, lr in (("", ""), ("_lr1e-03", " --lr 1e-3"))),
    *(Arm(f"{arm.name}_steps{n}", arm.stage, f"{arm.flags} --steps {n}") for arm in TRIED[:3] for n in (60, 125, 500)),
    *(Arm(name, number, "", guidance=guidance) for guidance in (1, 3, 4.5)
      for name, number in (("base", ""), ("flow_dpo", "05"), ("ddpo", "06"))),
]  # fmt: skip
EXPLORED = {World(w): [*TRIED, *MORE] for w in range(4)} | {
    World(w, round=2): TRIED[:1] for w in range(4)
}
EXPLORED |= {World(w, noise): TRIED[::3] for noise in (0.0, 3.0) for w in range(4)}
CLAIMS = {  # table: (claim, system, against, the metric that decides)
    "Table 1": (
        (
            "Flow-DPO improves on the pre-trained model (Sys. 11 against 9)",
            "flow_dpo",
            "base",
            "fd",
        ),
        ("... by a judge that no one trained on", "flow_dpo", "base", "judge_semantic"),
        ("DDPO improves on the pre-trained model (10 against 9)", "ddpo", "base", "fd"),
        ("Flow-DPO is better than DDPO (11 against 10)", "flow_dpo", "ddpo", "fd"),
        ("... in synchrony", "flow_dpo", "ddpo", "judge_sync_s"),
        ("... with equal information: no human pairs", "no_human", "ddpo", "fd"),
        (
            "Human pairs add the aesthetic appeal (Sec. 2.2)",
            "flow_dpo",
            "no_human",
            "judge_aesthetic",
        ),
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

# What readers ask
# --------------------------------------------------------------------------------------------------

ASKED_ARMS = (FLOW_DPO, Arm("ddpo", "06"), Arm("printed", "05", "--printed-brackets"))
ASKED = {World(w): ASKED_ARMS for w in range(4)}
ASKED |= {World(w, given=True): ASKED_ARMS[:1] for w in range(4)}
ASKED |= {World(w, overlooks=1): ASKED_ARMS[:2] for w in range(4)}

# Fresh worlds: what the claims above left open between Flow-DPO and DDPO, by three columns of the
# paper. Two-sided, Holm over the three of each table. `equal` where the difference is less than
# MARGIN of what DDPO gains on the base model, world by world, on the same metric and scale.
# --------------------------------------------------------------------------------------------------

MARGIN = 0.18  # the smaller of the paper's two extras: FD of Frieren
FRESH_SEEDS = (0, 1, 2, 3)
FRESH = [
    Arm("flow_dpo", "05", seeds=FRESH_SEEDS),
    Arm("no_human", "05", "--no-human", FRESH_SEEDS),
    Arm("ddpo", "06", seeds=FRESH_SEEDS),
    Arm("ddpo_16x4", "06", "--prompts 16 --group-size 4", FRESH_SEEDS),
]
FRESH_METRICS = ("is", "ib", "log_fd_twin")
FRESH_CLAIMS = {  # the first two decide; the others say whether more prompts would help DDPO
    "Flow-DPO against DDPO": ("flow_dpo", "ddpo"),
    "... with equal information: no human pairs": ("no_human", "ddpo"),
    "Flow-DPO against DDPO of 16 prompts": ("flow_dpo", "ddpo_16x4"),
    "... with equal information: no human pairs, 16 prompts": ("no_human", "ddpo_16x4"),
}

# metric: (heading, which way is better, decimals, shown times)
METRICS = {
    "fd": ("FD", -1, 0, 1), "log_fd_twin": ("log FD, twin tagger", -1, 2, 1), "kl": ("KL", -1, 2, 1), "is": ("IS", 1, 2, 1), "ib": ("IB x100", 1, 1, 100),
    "clap": ("CLAP x100", 1, 1, 100), "desync_s": ("DeSync ms", -1, 0, 1000), "p_good": ("P(Good)", 1, 3, 1),
    "win_rate": ("wins", 1, 2, 1), "fd_twin": ("FD by the twin", -1, 0, 1),
    "is_twin": ("IS by the twin", 1, 2, 1), "judge_semantic": ("judge: semantic", 1, 3, 1),
    "judge_sync_s": ("judge: sync ms", -1, 0, 1000), "judge_aesthetic": ("judge: aesthetic", 1, 3, 1),
    "oracle_semantic": ("oracle: semantic", 1, 3, 1), "oracle_sync_s": ("oracle: sync ms", -1, 0, 1000),
    "oracle_floor_db": ("oracle: floor dB", -1, 1, 1), "oracle_aesthetic": ("oracle: aesthetic", 1, 3, 1),
}  # fmt: skip
LOGGED = (
    "loss",
    "accuracy",
    "gap_w",
    "gap_l",
    "ref_w",
    "saturated",
    "opposed",
    "weight",
    "weight_wrong",
)  # of 05


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=(*STUDIES, "tables", "curves"))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/evidence"), help="folder of all runs"
    )
    parser.add_argument("--csv", type=Path, help="default: the study's, in docs")
    parser.add_argument(
        "--worlds",
        type=int,
        help="how many of the study's worlds; 0: what the csv holds. Claims: 12",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="worlds, then trainings, at a time; one core each"
    )
    parser.add_argument(
        "--size", choices=("large", "default", "tiny"), default="large", help="of the toy worlds"
    )
    args = parser.parse_args(argv)
    args.csv = args.csv or ROOT / "docs" / (
        STUDIES[args.study].csv if args.study in STUDIES else "curves.csv"
    )
    return args


# --------------------------------------------------------------------------------------------------
# Making what is missing
# --------------------------------------------------------------------------------------------------


def command(folder, number, flags):
    """Runs a stage, notes its command and CPU seconds, and stops with its output when it fails."""
    line = [sys.executable, STAGES[number], "--run-dir", str(folder), *shlex.split(flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{shlex.join(line)} ended with {done.returncode}: {said[-1]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with open(folder / "commands.jsonl", "a", encoding="utf-8") as log:
        log.write(
            json.dumps({"command": f"{STAGES[number]} {flags}", "cpu_s": round(seconds, 1)}) + "\n"
        )


def folder_of(args, world):
    return args.runs / f"{args.size}_{world.name.replace(' ', '_')}"


def make_world(job):
    """Stages 00 to 04. People of another noise answer about the audios of the world that they
    share. A second round keeps the world's people and AudioScore: its audios come from the tuned
    policy, and pairs from them."""
    args, world = job
    folder = folder_of(args, world)
    plain = folder_of(args, World(world.seed))
    if folder != plain and not (folder / "run.json").exists():
        copy_world(world, plain, folder)
    folder.mkdir(parents=True, exist_ok=True)
    seed = f"--seed {world.seed}"
    steps = (  # a stage, a file that is there when it is done, its flags
        ("00", "run.json", f"{seed} --size {args.size}"),
        # 02 writes this file first.
        ("01", "02_to_rate.csv", f"{seed} --given ground_truth" if world.given else seed),
        ("02", "02_audioscore.pt", seed),
        ("03", "03_human_pairs.jsonl", seed),
        ("04", "04_settings.json", ""),
    )
    for number, made, flags in steps:
        if not (folder / made).exists():
            command(folder, number, flags)


SHARED = {  # what a twin shares with the plain world, by its round
    1: ("00_*", "clips.jsonl", "01_*", "02_scores", "03_scores"),
    2: ("00_*", "clips.jsonl", "02_audioscore.pt", "02_scores.jsonl", "02_settings.json"),
}


def copy_world(world, plain, folder):
    """A twin's folder; its run.json comes last."""
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted copy
    folder.mkdir()
    for pattern in SHARED[world.round]:
        for path in plain.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=os.link)
            else:
                shutil.copy(path, folder)
    run_json = json.loads((plain / "run.json").read_text())
    run_json["rater_noise"] = world.noise
    run_json["rater_overlooks"] = world.overlooks
    if world.round == 2:
        files = stage("common").files
        base = folder / "00_base.pt"
        tuned = files.load_pt(plain / FLOW_DPO.out(world.seed) / "policy.pt")
        files.save_pt(base, files.load_pt(base) | {"net": tuned})
        run_json["checkpoint_digest"] = files.digest(base)
        made = json.loads((folder / "02_settings.json").read_text())
        made["inputs"] = {}  # they are of the first round
        (folder / "02_settings.json").write_text(json.dumps(made))
    (folder / "run.json").write_text(json.dumps(run_json))


def train(job):
    args, world, arm, seed = job
    folder = folder_of(args, world)
    if arm.stage and not (folder / arm.out(seed) / "policy.json").exists():
        command(
            folder, arm.stage, f"--seed {seed} --out {arm.out(seed)} {flags_at(folder, arm.flags)}"
        )


def judge(job):
    """All policies of a world, by one command of stage 07 for each guidance. Returns the lines of
    the csv."""
    args, world, arms, split = job
    folder = folder_of(args, world)
    rows = []
    for guidance in dict.fromkeys(arm.guidance for arm, _ in arms):
        systems = {}
        for name in ("ground_truth", "base"):
            systems[name] = (Arm(name, "", guidance=guidance), 0)
        for arm, seed in arms:
            if arm.guidance == guidance:
                systems[arm.out(seed)] = (arm, seed)
        flags = f"--split {split} --systems {' '.join(systems)}"
        if guidance is not None:
            flags += f" --guidance {guidance}"
        command(folder, "07", flags)
        rows += lines_of(world, folder, systems, split, guidance)
        for out in systems:
            audio = out if guidance is None else f"{out}@{guidance:g}"
            shutil.rmtree(folder / "07_audio" / audio, ignore_errors=True)
    return rows


def lines_of(world, folder, systems, split, guidance):
    """The lines of the csv at one guidance. systems: {folder of the policy: (arm, seed)}."""
    results = lines(
        folder / ("07_results.jsonl" if split == "test" else f"07_results_{split}.jsonl")
    )
    common = stage("common")
    made_by = (common.record.commit(), common.digits.used()["cpu"])
    rows = []
    for out, (arm, seed) in systems.items():
        log = lines(folder / out / "log.jsonl") if arm.stage else []
        budget = log[-1]["forwards"] if log else 0
        cpu_s = training_cost(folder, out) if arm.stage else all_costs(folder)
        found = [(row["metric"], row["value"], row["n"]) for row in results if row["system"] == out]
        if guidance is None:
            for key, value in known_of(folder, out, arm, log).items():
                found.append((key, value, 0))
        for metric, value, n in found:
            if value is not None:
                key = (world.name, arm.label, seed, budget, metric)
                rows.append((*key, f"{value:.6g}", n, *made_by, f"{cpu_s:.1f}"))
    return rows


def known_of(folder, out, arm, log):
    """What the csv holds of a training, or of the world, beside the metrics."""
    if out == "base":
        return world_costs(folder)
    if not arm.stage:
        return {}
    known = {}
    for key in LOGGED if arm.stage == "05" else ("reward",):
        known[key] = mean_of(log[-50:], key)
    known["cpu_s"] = training_cost(folder, out)
    if arm.stage == "05":
        known["norm_wrong"] = norm_wrong(folder, out)
    return known


def training_cost(folder, out):
    """CPU seconds, if it was not interrupted: what a stopped command spent is not known."""
    total = 0
    for row in lines(folder / "commands.jsonl"):
        if f"--out {out} " in f"{row['command']} ":
            total += row["cpu_s"]
    return total


def all_costs(folder):
    """CPU seconds of all finished commands of a world."""
    return sum(row["cpu_s"] for row in lines(folder / "commands.jsonl"))


def world_costs(folder):
    """CPU seconds of the stages; the pool of audios, its rated ones, and its rows through the
    network, which guidance doubles."""
    steps = json.loads((folder / "run.json").read_text())["sampler"]["steps"]
    audios = sum(len(lines(file)) for file in (folder / "01_samples").glob("?????.jsonl"))
    costs = {
        "pool_audios": audios,
        "pool_rated": len(lines(folder / "02_scores.jsonl")),
        "pool_forwards": 2 * steps * audios,
    }
    costs |= spread_of_p(folder)
    for number in STAGES:
        costs[f"cpu_s_{number}"] = 0
    for row in lines(folder / "commands.jsonl"):
        costs[f"cpu_s_{row['command'][:2]}"] += row["cpu_s"]
    return costs


def spread_of_p(folder):
    """What AudioScore makes of the candidates: the largest P(Good), the share of which Good is the
    most probable, and that of the clips whose best audio is also the least bad: where it is 1, the
    two heads of Eq. 2 say the same."""
    p_of = defaultdict(list)
    for file in sorted((folder / "03_scores").glob("*.jsonl")):
        for row in lines(file):
            p_of[row["clip"]].append(row["p"])
    every = np.concatenate([np.array(p) for p in p_of.values()])
    alike = [np.argmax(p, axis=0)[0] == np.argmin(p, axis=0)[2] for p in p_of.values()]
    return {
        "p_good_largest": float(every[:, 0].max()),
        "p_good_first": float((every.argmax(axis=1) == 0).mean()),
        "best_is_least_bad": float(np.mean(alike)),
    }


def stage(name):
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def norm_wrong(folder, out, count=128):
    """Of Eq. 5's gradient at a policy, on pairs of stage 1: the norm of what the wrongly ordered
    ones give, over the sum of both norms. None at beta 0, where Eq. 5 has no gradient."""
    common = stage("common")
    stage_05 = stage(STAGES["05"].removesuffix(".py"))
    torch = stage_05.torch
    settings = json.loads((folder / out / "settings.json").read_text())["settings"]
    model = common.load_base_model(folder)
    reference = common.training.frozen_copy(model, bf16=False)
    shards = common.training.Shards(folder, common.inputs.read_samples(folder), model)
    model.load_policy(folder / out / "policy.pt")
    pairs = common.rows.read(folder / "04_stage1.jsonl", common.rows.SplitPair)[:count]
    a_0, features = stage_05.load_pairs(pairs, shards)
    args = argparse.Namespace(seed=settings["seed"], global_batch=len(pairs), stratified_t=False)
    t, eps = stage_05.draw_t_and_noise(0, model, args)
    with torch.no_grad():
        ref_err_w, ref_err_l = stage_05.pair_errors(reference, features, a_0, eps, t)
    err_w, err_l = stage_05.pair_errors(model, features, a_0, eps, t)
    loss, logits = common.flow_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, settings["beta"])
    norms = []
    for chosen in (logits < 0, logits >= 0):
        gradients = torch.autograd.grad(
            (loss * chosen).sum(), model.trainable_parameters(), retain_graph=True
        )
        norms.append(sum(gradient.square().sum() for gradient in gradients).sqrt().item())
    return norms[0] / sum(norms) if any(norms) else None


def mean_of(rows, key):
    return float(np.mean([row[key] for row in rows]))


def flags_at(folder, flags):
    """{share:0.45} -> the threshold at which 45 % of this run's mined pairs are easy, as stage 04
    prints it."""
    if "{share:" not in flags:
        return flags
    head, share = flags.rstrip("}").split("{share:")
    if float(share) == 0:
        return f"{head}{1:.6f}"
    pairs = lines(folder / "04_stage1.jsonl") + lines(folder / "04_stage2.jsonl")
    mined = [pair["score_c"] for pair in pairs if pair["source"] == "auto"]
    return f"{head}{np.quantile(mined, 1 - float(share)):.6f}"


def lines(path):
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def make(args, study, split):
    """study: {World: arms}. Worlds are made, trained and judged some at a time; each is then whole
    in the csv."""
    done = keys_of(args.csv)
    todo = {}
    for world, arms in study.items():
        missing = []
        for arm in arms:
            for asked in arm.seeds:
                seed = world.seed if asked is None else asked
                if (world.name, arm.label, seed) not in done:
                    missing.append((arm, seed))
        if missing:
            todo[world] = missing
    worlds = list(todo)
    with ProcessPoolExecutor(args.jobs) as pool:
        for start in range(0, len(worlds), args.jobs):
            make_some(pool, args, worlds[start : start + args.jobs], todo, split)


def make_some(pool, args, worlds, todo, split):
    """Makes, trains and judges these worlds, as many at a time as the pool has processes."""
    plain = [World(seed) for seed in dict.fromkeys(world.seed for world in worlds)]
    twins = [world for world in worlds if world not in plain]
    second_rounds = {world.seed for world in worlds if world.round == 2}
    tuned = [world for world in plain if world.seed in second_rounds]
    trainings = {}  # one for all guidances
    for world in worlds:
        for arm, seed in todo[world]:
            trainings[world, arm.out(seed)] = (args, world, arm, seed)
    names = ", ".join(world.name for world in worlds)
    work(pool, make_world, [(args, world) for world in plain], names)
    work(pool, train, [(args, world, FLOW_DPO, world.seed) for world in tuned], names)
    work(pool, make_world, [(args, world) for world in twins], names)
    work(pool, train, list(trainings.values()), names)
    for rows in pool.map(judge, [(args, world, todo[world], split) for world in worlds]):
        append(args.csv, rows)


def work(pool, function, jobs, names):
    done = pool.map(function, jobs, chunksize=1)
    for _ in tqdm(done, f"{function.__name__} {names}", total=len(jobs), disable=not jobs):
        pass


def read(path):
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["seed"] = int(row["seed"])
        row["value"] = float(row["value"])
    return rows


def keys_of(path):
    """The (world, arm, seed) of which the csv has lines."""
    return {(row["world"], row["arm"], row["seed"]) for row in read(path)}


def append(path, rows):
    known = keys_of(path)  # ground truth and base recur
    columns = COLUMNS
    if path.exists():
        with open(path, encoding="utf-8", newline="") as stream:
            columns = next(csv.reader(stream))  # an older file has fewer
    with open(path, "a", encoding="utf-8", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        if stream.tell() == 0:
            out.writerow(columns)
        for row in rows:
            if row[:3] not in known:
                out.writerow(row[: len(columns)])


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


class Results:
    """The csv: mean[arm, metric] is {world: mean over its seeds}. What another noise or round made
    of a world is an arm of that world: `flow_dpo, round 2`."""

    def __init__(self, rows):
        self.rows = rows
        self.each = defaultdict(lambda: defaultdict(list))  # as mean, but the values of all seeds
        for row in rows:
            world, _, other = row["world"].partition(" ")
            arm = f"{row['arm']}, {other}" if other else row["arm"]
            self.each[arm, row["metric"]][world].append(row["value"])
            if row["metric"] == "fd_twin":
                self.each[arm, "log_fd_twin"][world].append(float(np.log(row["value"])))
        self.mean = {}
        for key, worlds in self.each.items():
            self.mean[key] = {world: float(np.mean(values)) for world, values in worlds.items()}

    def gaps(self, system, against, metric):
        """System minus another in each world that has both."""
        ours = self.mean.get((system, metric), {})
        theirs = self.mean.get((against, metric), {})
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
    adjusted = np.zeros(len(p_values))
    least = 0.0
    for i, place in enumerate(np.argsort(p_values)):
        p = min(1.0, (len(p_values) - i) * p_values[place])
        least = max(least, p)
        adjusted[place] = least
    return adjusted


def shown(metric, mean, half=None, sign="+"):
    _, _, decimals, times = METRICS[metric]
    text = f"{mean * times:{sign}.{decimals}f}"
    return text if half is None else f"{text} ± {half * times:.{decimals}f}"


def heading(metric):
    name, better, _, _ = METRICS[metric]
    return f"{name} {'↑' if better > 0 else '↓'}"


def table(head, rows):
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def claim_table(results, claims):
    """One row per claim: the difference by its one metric, p after Holm, the verdict."""
    found = []
    for claim in claims:
        gaps = results.gaps(*claim[1:])
        if len(gaps) > 1:
            found.append((claim, gaps))
    adjusted = holm([interval(gaps)[2] for _, gaps in found])
    rows = []
    for (claim, gaps), p in zip(found, adjusted):
        text, system, against, metric = claim
        name, better, _, _ = METRICS[metric]
        mean, half, _ = interval(gaps)
        verdict = "holds" if mean * better > 0 else "does not hold"
        if p > 0.05:
            verdict = "not decided"
        agree = int((np.sign(gaps) == np.sign(mean)).sum())
        difference = f"{name} {shown(metric, mean, half)}"
        rows.append(
            [text, f"{system} - {against}", difference, f"{agree}/{len(gaps)}", f"{p:.3f}", verdict]
        )
    return table(["claim", "difference", "by", "worlds of this sign", "p (Holm)", "verdict"], rows)


def fresh_table(results, system, against):
    """A row for each of FRESH_METRICS: the difference, p after Holm, whether one is ahead or both
    are equal within MARGIN; deviations between worlds, of their means, and between seeds."""
    gaps = [results.gaps(system, against, metric) for metric in FRESH_METRICS]
    adjusted = holm([interval(gap)[2] for gap in gaps])
    rows = []
    for metric, gap, p in zip(FRESH_METRICS, gaps, adjusted):
        mean, half, _ = interval(gap)
        gained = results.gaps(against, "base", metric)
        equal = is_equal(gap, gained)
        verdict = f"{system if mean * METRICS[metric][1] > 0 else against} ahead"
        if p > 0.05:
            verdict = "not decided"
        if equal <= 0.05:
            verdict += f", equal within {MARGIN:.0%}"
        seeds = [spread(results, arm, metric) for arm in (system, against)]
        rows.append(
            [
                heading(metric),
                shown(metric, mean, half),
                f"{p:.3f}",
                shown(metric, MARGIN * abs(gained.mean()), sign=""),
                f"{equal:.3f}",
                verdict,
                shown(metric, gap.std(ddof=1), sign=""),
                ", ".join(shown(metric, deviation, sign="") for deviation in seeds),
            ]
        )
    head = [f"{system} - {against}", "difference", "p (Holm)", "margin", "p (equal)", "verdict"]
    return table([*head, "SD between worlds", "SD between seeds, of each"], rows)


def is_equal(gaps, gained):
    """The larger p of two one-sided t tests over worlds, that a difference is neither MARGIN of a
    gain above 0 nor as much below."""
    margin = MARGIN * gained * np.sign(gained.mean())
    p_values = []
    for inside in (margin - gaps, margin + gaps):
        mean, _, p = interval(inside)
        p_values.append(p / 2 if mean > 0 else 1 - p / 2)
    return max(p_values)


def mean_and_half(metric, values, sign="+"):
    """A cell of a table: mean over worlds with its interval."""
    mean, half, _ = interval(values)
    return shown(metric, mean, half, sign)


def difference_table(results, systems, metrics):
    """Base's value, then every system minus base; a row for each system that is there."""
    metrics = [metric for metric in metrics if ("base", metric) in results.mean]
    base = ["base"]
    for metric in metrics:
        base.append(mean_and_half(metric, list(results.mean["base", metric].values()), sign=""))
    rows = [base]
    for system in systems:
        if (system, metrics[0]) in results.mean:
            gaps = [results.gaps(system, "base", metric) for metric in metrics]
            cells = [mean_and_half(metric, gap) for metric, gap in zip(metrics, gaps)]
            rows.append([system, *cells])
    return table(["", *map(heading, metrics)], rows)


# --------------------------------------------------------------------------------------------------
# What is said of a study
# --------------------------------------------------------------------------------------------------


MEANS = "means over the worlds with 95 % intervals (Student's t)"


def show(block):
    """Prints a paragraph or a table, and an empty line."""
    print(f"{block}\n")


def pair_table(results, pairs):
    """The difference of each pair of systems; a row for each metric."""
    rows = []
    for metric in METRICS:
        if ("base", metric) in results.mean:
            gaps = [results.gaps(system, against, metric) for system, against in pairs]
            rows.append([heading(metric), *[mean_and_half(metric, of_pair) for of_pair in gaps]])
    return table(["", *[f"{system} - {against}" for system, against in pairs]], rows)


def show_differences(results, arms):
    """In two tables: the metrics of stage 07, then those that know the truth."""
    by_truth = [metric for metric in METRICS if metric.startswith(("judge", "oracle"))]
    others = [metric for metric in METRICS if metric not in by_truth]
    for metrics in (others, by_truth):
        show(difference_table(results, [arm.name for arm in arms], metrics))


def tell_claims(results):
    """The claims, a table for each of the paper's, then all numbers."""
    for name, claims in CLAIMS.items():
        show(f"{name} of the paper:\n\n{claim_table(results, claims)}")
    worlds = len(results.mean["base", "fd"])
    show(f"Base, and every arm minus base: {MEANS}, {worlds} worlds, test split.")
    show_differences(results, ARMS)


SHOWN = ("fd", "p_good", "judge_semantic", "judge_sync_s", "judge_aesthetic")


def minus_base(results, system, base="base"):
    """Cells of a table: mean over the worlds of system minus base, with its interval; of one world,
    with the deviation over training seeds; None if it is not there yet."""
    cells = []
    for metric in SHOWN:
        gaps = results.gaps(system, base, metric)
        if len(gaps) == 0:
            return None
        if len(gaps) == 1:
            cells.append(shown(metric, gaps[0], spread(results, system, metric)))
        else:
            cells.append(mean_and_half(metric, gaps))
    return cells


def spread(results, arm, metric):
    """Standard deviation over training seeds, pooled over the worlds."""
    variances = []
    for values in results.each[arm, metric].values():
        if len(values) > 1:
            variances.append(np.var(values, ddof=1))
    return float(np.sqrt(np.mean(variances))) if variances else None


def logged(results, arm, key):
    values = results.mean.get((arm, key), {}).values()
    return f"{np.mean([*values]):.2f}" if values else ""


def head_and_base(results):
    """The first two rows of a table: headings, and base's values."""
    worlds = sorted(results.mean["base", "fd"])
    head = [f"worlds {', '.join(worlds)}; val"]
    base = ["base"]
    for metric in SHOWN:
        values = [results.mean["base", metric][world] for world in worlds]
        head.append(heading(metric))
        base.append(shown(metric, np.mean(values), sign=""))
    return head, base


LOGGED_CELLS = ("FD, seeds", "accuracy", "saturated", "gradient of wrong pairs")
LAST_COLUMNS = """The last four columns: FD's
deviation over training seeds; means over the last 50 steps, which are of stage 2; and, of Eq. 5's gradient at the
trained policy on 128 pairs of stage 1, the norm of what the pairs with a negative logit give, over the sum of both
norms."""


def pilot_rows(results, arms, other=""):
    """Rows of those arms that are there; other: `, noise 3`, of a world with other people."""
    rows = []
    for arm in arms:
        name = arm.name + other
        cells = minus_base(results, name, f"base{other}")
        if cells is None:
            continue
        deviation = spread(results, name, "fd")
        row = [name, *cells, "" if deviation is None else f"{deviation:.0f}"]
        for key in ("accuracy", "saturated", "norm_wrong"):
            row.append(logged(results, name, key))
        rows.append(row)
    return rows


def tell_pilot(results):
    """Tables of the worlds that have their rows so far."""
    head, base = head_and_base(results)
    show(f"Minus base: {MEANS}. {LAST_COLUMNS}")
    base += [""] * len(LOGGED_CELLS)
    show(table([*head, *LOGGED_CELLS], [base, *pilot_rows(results, GRID)]))
    alone = pilot_rows(results, [*SCALED, *DDPO])
    for other in (", noise 0", ", noise 3"):
        alone += pilot_rows(results, NOISY, other)
    show(
        "World 0 alone: minus base, with the deviation over training seeds; noise 0 are steady "
        "people, noise 3\npeople three times as unsteady as usual."
    )
    show(table(["", *head[1:], *LOGGED_CELLS], alone))


def tell_asked(results):
    head, base = head_and_base(results)
    show(f"Minus base: {MEANS}.")
    against_base = []
    for other in ("", ", given", ", mild 1"):
        for arm in ASKED_ARMS:
            cells = minus_base(results, arm.name + other, f"base{other}")
            if cells:
                against_base.append([arm.name + other, *cells])
    show(table(head, [base, *against_base]))
    pairs = [
        ("flow_dpo", "ddpo"),
        ("printed", "flow_dpo"),
        ("flow_dpo, given", "flow_dpo"),
        ("flow_dpo, mild 1", "ddpo, mild 1"),
    ]
    show(f"By every metric: {MEANS}.")
    show(pair_table(results, pairs))
    spread_rows = []
    for other in ("", ", given", ", mild 1"):
        row = [f"worlds{other}"]
        for key in ("p_good_largest", "p_good_first", "best_is_least_bad"):
            row.append(logged(results, f"base{other}", key))
        spread_rows.append(row)
    show("What AudioScore says of all candidates:")
    head = ["", "largest P(Good)", "Good most probable", "best is least bad, share of clips"]
    show(table(head, spread_rows))


def tell_fresh(results):
    worlds = len(results.mean["base", "fd"])
    named = len(STUDIES["fresh"].worlds)
    if worlds < named:
        show(f"{worlds} of {named} worlds so far. Nothing is decided before all are judged.")
    for text, (system, against) in FRESH_CLAIMS.items():
        show(f"{text}:\n\n{fresh_table(results, system, against)}")
    pairs = [("flow_dpo", "ddpo"), ("no_human", "ddpo"), ("flow_dpo", "no_human")]
    show(f"By every metric, of which only those three were named beforehand: {MEANS}.")
    show(pair_table(results, pairs))
    show(f"Base, and every arm minus base: {MEANS}, {worlds} worlds, test split.")
    show_differences(results, FRESH)


def tell_recipe(results):
    head, base = head_and_base(results)
    show(f"Minus base: {MEANS}. {LAST_COLUMNS}")
    base += [""] * len(LOGGED_CELLS)
    show(table([*head, *LOGGED_CELLS], [base, *pilot_rows(results, RECIPE)]))


def tell_explored(results):
    head, base = head_and_base(results)
    show(f"Minus base: {MEANS}.")
    against_base = []
    against_flow_dpo = []
    for name, its_base in explored_arms():
        cells = minus_base(results, name, its_base)
        if cells:
            against_base.append([name, *cells])
        cells = minus_base(results, name, "flow_dpo")
        if cells and "noise" not in name and name != "flow_dpo":
            against_flow_dpo.append([name, *cells])
    show(table(head, [base, *against_base]))
    show("The same, minus `flow_dpo`:")
    show(table(head, against_flow_dpo))
    show("The same policies, trained at guidance 1.5, sampled at others:")
    show(table(head, guidance_rows(results)))
    if ("flow_dpo_steps60", "fd") in results.mean:
        show(
            "Against compute. Each row is a whole training of its own length. Flow-DPO and SFT are "
            "charged for the whole\npool, DDPO for the audios that AudioScore was fitted on."
        )
        show(compute_table(results))


def explored_arms():
    """[(arm, the base model of its world), ...] in the order of the table."""
    arms = [(arm.name, "base") for arm in [*TRIED, *MORE] if arm.guidance is None]
    for other in ("noise 0", "noise 3"):
        for arm in TRIED[::3]:
            arms.append((f"{arm.name}, {other}", f"base, {other}"))
    return [*arms, ("flow_dpo, round 2", "base")]


def guidance_rows(results):
    """Base, Flow-DPO and DDPO at each guidance; 1.5 is the world's own."""
    rows = []
    for guidance in (1, 1.5, 3, 4.5):
        at = "" if guidance == 1.5 else f" at guidance {guidance:g}"
        base = f"base{at}"
        flow_dpo = minus_base(results, f"flow_dpo{at}", base)
        if flow_dpo is None:
            continue
        row = [f"base, guidance {guidance:g}"]
        for metric in SHOWN:
            row.append(mean_and_half(metric, list(results.mean[base, metric].values()), sign=""))
        rows.append(row)
        rows.append(["flow_dpo minus base", *flow_dpo])
        rows.append(["ddpo minus base", *minus_base(results, f"ddpo{at}", base)])
    return rows


STEPS = (60, 125, 250, 500)  # the third: a large world's own


class Cost(NamedTuple):
    """Of an arm, means over the worlds."""

    arm: str
    rows: float  # through the network in training
    rows_with_pool: float
    cpu_s: float  # of the training
    cpu_s_with_pool: float


def cost_of(results, arm, steps):
    """The Cost of an arm, None if it is not there. All need AudioScore and the audios that were
    rated for it; DDPO alone needs no others."""
    name = arm if steps == STEPS[2] else f"{arm}_steps{steps}"
    budgets = []
    for row in results.rows:
        if row["arm"] == name and row["metric"] == "fd" and " " not in row["world"]:
            budgets.append(float(row["budget"]))
    if not budgets:
        return None
    of_base = {}
    for key in ("pool_rated", "pool_audios", "pool_forwards", "cpu_s_01", "cpu_s_02", "cpu_s_03"):
        of_base[key] = float(np.mean(list(results.mean["base", key].values())))
    share = of_base["pool_rated"] / of_base["pool_audios"] if arm == "ddpo" else 1
    pool_s = share * of_base["cpu_s_01"] + of_base["cpu_s_02"]
    if arm != "ddpo":
        pool_s += of_base["cpu_s_03"]
    rows = np.mean(budgets)
    cpu_s = float(np.mean(list(results.mean[name, "cpu_s"].values())))
    return Cost(name, rows, rows + share * of_base["pool_forwards"], cpu_s, cpu_s + pool_s)


def compute_table(results):
    rows = []
    for arm in TRIED[:3]:
        for steps in STEPS:
            cost = cost_of(results, arm.name, steps)
            if cost is None:
                continue
            numbers = [f"{number:,.0f}" for number in cost[1:]]
            rows.append([arm.name, steps, *numbers, *minus_base(results, cost.arm)])
    head = [
        "",
        "steps",
        "rows in training",
        "with the pool",
        "CPU s in training",
        "with pool and scoring",
    ]
    return table([*head, *map(heading, SHOWN)], rows)


def draw_compute(args, results):
    if ("flow_dpo_steps60", "fd") not in results.mean:
        return
    figure, axes = canvas(2, 3, figsize=(11, 6), sharex=True)
    metrics = ("fd", "judge_semantic", "judge_sync_s", "p_good", "oracle_semantic", "oracle_sync_s")
    for axis, metric in zip(axes.flat, metrics):
        _, better, _, times = METRICS[metric]
        for color, arm in zip(("C0", "C1", "C2"), TRIED):
            at = []
            gaps = []
            for steps in STEPS:
                cost = cost_of(results, arm.name, steps)
                if cost is not None:
                    at.append(cost.cpu_s_with_pool)
                    gaps.append(results.gaps(cost.arm, "base", metric) * times)
            means = [gap.mean() for gap in gaps]
            bars = [interval(gap)[1] for gap in gaps]
            axis.errorbar(
                at, means, bars, color=color, label=arm.name, marker="o", markersize=4, capsize=2
            )
            axis.plot(at, gaps, color=color, lw=0.5, alpha=0.4)
        axis.axhline(0, color="#444", lw=0.8)
        axis.set(xscale="log", xticks=(100, 200, 300), xticklabels=(100, 200, 300))
        axis.set_title(f"{heading(metric)} minus base")
        axis.minorticks_off()
        if better < 0:
            axis.invert_yaxis()  # up is better everywhere
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel(
        "CPU seconds of a training, with its share of the pool of audios and of scoring", fontsize=9
    )
    figure.savefig(args.csv.with_name("compute.png"), dpi=110)


def draw_pilot(args, results):
    """Every training's difference to base; a line for each learning rate joins the means over the
    worlds."""
    figure, axes = canvas(1, 3, figsize=(11, 3.2))
    for axis, metric in zip(axes, ("fd", "judge_semantic", "judge_sync_s")):
        for r in range(len(RATES)):
            draw_rate(axis, results, metric, r)
        axis.axhline(0, color="#444", lw=0.8)
        axis.set(
            xscale="log",
            xticks=BETAS,
            xticklabels=BETAS,
            xlabel="beta",
            title=f"{heading(metric)} minus base",
        )
        axis.minorticks_off()
        axis.tick_params(axis="x", labelsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)


def draw_rate(axis, results, metric, r):
    """The r-th learning rate in one plot."""
    base = results.mean["base", metric]
    worlds = sorted(results.mean["base", "fd"])
    betas = []
    means = []
    for beta in BETAS:
        means_of_worlds = []
        for world, values in results.each.get((f"beta{beta}_lr{RATES[r]:.0e}", metric), {}).items():
            gaps = (np.array(values) - base[world]) * METRICS[metric][3]
            place = worlds.index(world)
            at = np.full(len(gaps), beta * (0.9 + 0.05 * place + 0.025 * r))
            label = f"lr {RATES[r]:.0e}, world {world}" if beta == BETAS[0] else None
            axis.plot(at, gaps, f"C{r}{'osD^'[place]}", markersize=4, fillstyle="none", label=label)
            means_of_worlds.append(gaps.mean())
        if means_of_worlds:
            betas.append(beta)
            means.append(np.mean(means_of_worlds))
    axis.plot(betas, means, color=f"C{r}", lw=1)


def draw_claims(args, results):
    """Every claim's difference in units of its deviation over worlds, up = as the paper says; a dot
    per world."""
    if len(results.mean["base", "fd"]) < 2:
        return
    tables = {}
    for name, claims in CLAIMS.items():
        tables[name] = [claim for claim in claims if len(results.gaps(*claim[1:])) > 1]
    counts = [len(claims) for claims in tables.values()]
    size = (9, 1.2 + 0.36 * sum(counts))
    figure, axes = canvas(len(tables), 1, figsize=size, gridspec_kw={"height_ratios": counts})
    for axis, name in zip(axes, tables):
        texts = []
        for place, (text, system, against, metric) in enumerate(reversed(tables[name])):
            label, better, _, _ = METRICS[metric]
            draw_claim(axis, place, results.gaps(system, against, metric) * better)
            texts.append(f"{text} [{label}]")
        axis.axvline(0, color="#444", lw=0.8)
        axis.set_yticks(range(len(texts)), texts, fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
    axes[-1].set_xlabel("difference in the claim's direction, in standard deviations over worlds")
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)


def draw_claim(axis, place, gaps):
    gaps = gaps / (gaps.std(ddof=1) or 1)
    mean, half, _ = interval(gaps)
    axis.plot(gaps, np.full(len(gaps), place), "o", ms=3, color="#999", mfc="none")
    color = "C0" if mean > 0 else "C3"
    axis.errorbar(mean, place, xerr=half, color=color, marker="o", ms=5, capsize=3, lw=1.5)


def canvas(rows, columns, **layout):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, constrained_layout=True, **layout)


CURVES_SHOWN = (
    ("loss",),
    ("accuracy", "saturated", "opposed"),
    ("gap_w", "gap_l"),
)  # from the top down
CURVES_TOLD = (*LOGGED[:4], *LOGGED[5:7])


def draw_curves(args):
    """Every training of CURVES: smoothed logs as a figure, means of the last 50 steps as a
    table."""
    arms = [Arm(f"curve{i}", "05", flags) for i, flags in enumerate(CURVES.values())]
    world = World(0)
    make_world((args, world))
    with ProcessPoolExecutor(args.jobs) as pool:
        work(pool, train, [(args, world, arm, 0) for arm in arms], "curves")
    figure, axes = canvas(3, len(arms), figsize=(15, 6), sharex="col")
    rows = []
    for column, title, arm in zip(axes.T, CURVES, arms):
        log = lines(folder_of(args, world) / arm.out(0) / "log.jsonl")
        draw_log(column, log, f"{title}\n{CURVES[title]}")
        rows.append(curve_row(log, title))
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.savefig(args.csv.with_suffix(".png"), dpi=110)
    head = [*CURVES_TOLD, "gap_w / ref_w", "weight on wrong pairs"]
    print(table(["", "flags, stage 1's last 50 steps", *head], rows))


def draw_log(column, log, title):
    """A training in a column of three plots. The stages are smoothed apart."""
    switch = sum(row["stage"] == 1 for row in log)
    for axis, keys in zip(column, CURVES_SHOWN):
        for i, key in enumerate(keys):
            values = np.array([row[key] for row in log])
            draw_smooth(axis, values[:switch], 0, f"C{i}", key)
            draw_smooth(axis, values[switch:], switch, f"C{i}", None)
        axis.axvline(switch, color="#bbb", lw=0.8, ls=":")
        axis.tick_params(labelsize=7)
    loss, shares, gaps = column
    loss.axhline(np.log(2), color="#444", lw=0.6, ls="--")
    loss.set_title(title, fontsize=8)
    shares.set_ylim(0, 1)
    gaps.axhline(0, color="#444", lw=0.6)


def draw_smooth(axis, values, first, color, label):
    """A stage's values as means over 15 steps, the first at step `first`."""
    wide = min(15, len(values))
    smooth = np.convolve(values, np.full(wide, 1 / wide), "valid")
    at = first + wide - 1 + np.arange(len(smooth))
    axis.plot(at, smooth, color=color, label=label, lw=1)


def curve_row(log, title):
    """Means of the last 50 steps of stage 1, of the mined pairs."""
    last = [row for row in log if row["stage"] == 1][-50:]
    mean = {key: mean_of(last, key) for key in LOGGED}
    rise = mean["gap_w"] / mean["ref_w"]
    wrong = mean["weight_wrong"] / mean["weight"]
    told = [f"{mean[key]:.3f}" for key in CURVES_TOLD]
    return [title, f"`{CURVES[title]}`", *told, f"{rise:.2f}", f"{wrong:.2f}"]


class Study(NamedTuple):
    title: str
    worlds: dict  # {World: arms}
    split: str
    csv: str
    tell: Callable  # prints tables
    draw: Callable | None = None  # a figure


STUDIES = {
    "fresh": Study(
        "Fresh worlds: Flow-DPO against DDPO",
        {World(seed): FRESH for seed in range(12, 24)},
        "test",
        "fresh.csv",
        tell_fresh,
    ),
    "claims": Study(
        "The claims",
        {World(seed): ARMS for seed in range(12)},
        "test",
        "evidence.csv",
        tell_claims,
        draw_claims,
    ),
    "recipe": Study(
        "The recipe",
        {World(seed): RECIPE for seed in range(4)},
        "val",
        "recipe.csv",
        tell_recipe,
    ),
    "asked": Study("What readers ask", ASKED, "val", "asked.csv", tell_asked),
    "explore": Study(
        "Budgets, guidance, adapters, noise, a second round",
        EXPLORED,
        "val",
        "explored.csv",
        tell_explored,
        draw_compute,
    ),
    "pilot": Study("The pilot", PILOT, "val", "pilot.csv", tell_pilot, draw_pilot),
}

TABLES_HEAD = """# Tables

All tables of [evidence.md](evidence.md), which says what they show: written by `python docs/evidence.py tables`, from
the csvs beside this page. `sft` fine-tunes on the winners alone (`--beta 0 --sft-weight 1`), `dpo_sft` is Flow-DPO with
`--sft-weight 2`, `no_human` leaves the human pairs out, which DDPO never sees either; `share81` moves score_delta to
where 81 % of the mined pairs are easy, `share0` is plain shuffled DPO; `sum600` has beta 600 on the sum over the
latent.
"""


def print_tables(folder):
    """docs/tables.md: the tables of every study whose csv is there."""
    print(TABLES_HEAD)
    for name, study in STUDIES.items():
        path = folder / study.csv
        if path.exists():
            show(f"## {study.title}\n\n`python docs/evidence.py {name}`, [csv]({path.name})")
            study.tell(Results(read(path)))


def main(args):
    args.runs = args.runs.resolve()
    if args.study == "curves":
        return draw_curves(args)
    if args.study == "tables":
        return print_tables(ROOT / "docs")
    study = STUDIES[args.study]
    make(args, dict(list(study.worlds.items())[: args.worlds]), study.split)
    rows = read(args.csv)
    if not rows:
        raise RuntimeError(f"{args.csv}: is not there yet; give --worlds 1 or more")
    study.tell(Results(rows))
    if study.draw:
        study.draw(args, Results(rows))


if __name__ == "__main__":
    try:
        main(parse_args())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
