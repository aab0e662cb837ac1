"""The evidence of docs/evidence.md: Tables 1 and 2 in miniature, over several toy worlds and seeds (Sec. 3.2).

Run:
    python docs/evidence.py table1         # base, Flow-DPO, DDPO, SFT on winners, ... : who is better than whom
    python docs/evidence.py table2         # beta, the curriculum's threshold, and readings of Eq. 5
    python docs/evidence.py guidance       # the same policies at other guidance scales
    python docs/evidence.py table1 --bases 2 --seeds 1 --size tiny        # a try, minutes
Everything is a stage's own command, written to <runs>/base<b>_seed<s>/commands.jsonl: 00 with --seed b makes the world,
its base model, scorers and raters; 01 to 06 with --seed s make audios, ratings, pairs and policies on it; 07 judges on
the test split. What is there is not made again.

A number is the mean over bases of the mean over seeds; its 95 % interval is Student's t over the base means, which
differ by clips, seeds, pre-training and scorers alike, so all of these are in it. Differences are taken within one base
and seed, on the same clips and noise.

Writes:
    <runs>/<table>.md      the tables, ready for docs/evidence.md; and prints them
Takes: see docs/evidence.md.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
STAGES = {path.name[:2]: path.name for path in sorted(ROOT.glob("0?_*.py"))}

# Arms: name -> (stage, flags). {share:0.45} becomes the threshold at which that share of the mined pairs is easy.
DPO = {"flow_dpo": ("05", "")}
TABLE_1 = DPO | {
    "ddpo": ("06", ""),
    "no_human": ("05", "--no-human"),
    "sft": ("05", "--beta 0 --sft-weight 1"),
    "dpo_sft2": ("05", "--sft-weight 2"),
}
BETAS = (20, 200, 600, 1000)  # besides the toy world's own, 60
SHARES = (0.89, 0.81, 0.45, 0.08, 0.0)  # Table 2's
TABLE_2 = DPO | {f"beta{beta}": ("05", f"--beta {beta}") for beta in BETAS}
TABLE_2 |= {
    "beta600sum": ("05", "--beta 600000"),  # the sum over 25 x 40 latent values instead of their mean
    "beta1000printed": ("05", "--beta 1000 --printed-brackets"),
}
TABLE_2 |= {f"share{100 * share:.0f}": ("05", f"--threshold {{share:{share}}}") for share in SHARES}
TABLE_2 |= {"hard_first": ("05", "--hard-first")}
GUIDANCE = {"flow_dpo": TABLE_1["flow_dpo"], "ddpo": TABLE_1["ddpo"]}
ARMS = {"table1": TABLE_1, "table2": TABLE_2, "guidance": GUIDANCE}
SCALES = (1.0, 3.0, 4.5)  # besides the toy world's own, 1.5, which is Table 1
COUNTS = ("forwards_grad", "forwards")  # of the logs of 05 and 06

# metric: (heading, which way is better, decimals, shown times)
METRICS = {
    "fd": ("FD", -1, 0, 1), "kl": ("KL", -1, 2, 1), "is": ("IS", 1, 2, 1), "ib": ("IB x100", 1, 1, 100),
    "clap": ("CLAP x100", 1, 1, 100), "desync_s": ("DeSync ms", -1, 0, 1000), "p_good": ("P(Good)", 1, 3, 1),
    "win_rate": ("wins", 1, 2, 1), "oracle_semantic": ("oracle: semantic", 1, 3, 1),
    "oracle_sync_s": ("oracle: sync ms", -1, 0, 1000), "oracle_floor_db": ("oracle: floor dB", -1, 1, 1),
    "oracle_aesthetic": ("oracle: aesthetic", 1, 3, 1),
}  # fmt: skip
PAPERS = ("fd", "kl", "is", "ib", "desync_s")  # Table 1's six columns, with one KL
ORACLE = ("oracle_semantic", "oracle_sync_s", "oracle_floor_db", "oracle_aesthetic")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of all runs")
    parser.add_argument("--bases", type=int, default=3, help="worlds, each with its own base model, at least 2")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of everything after stage 00, on each base")
    parser.add_argument("--jobs", type=int, default=2, help="bases, then cells, at a time; one core each")
    parser.add_argument("--size", choices=("default", "tiny"), default="default", help="of the toy world")
    args = parser.parse_args(argv)
    if args.bases < 2 or args.seeds < 1:
        parser.error("--bases must be at least 2 (an interval needs a spread), --seeds at least 1")
    return args


# ------------------------------------------------------------------------------------------------------------
# Making what is missing
# ------------------------------------------------------------------------------------------------------------


def command(cell, number, flags):
    """Runs a stage, notes its command and CPU seconds, and stops with its output when it fails."""
    line = [sys.executable, STAGES[number], "--run-dir", str(cell), *shlex.split(flags)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{shlex.join(line)} ended with {done.returncode}: {said[0]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with open(cell / "commands.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"command": f"{STAGES[number]} {flags}", "cpu_s": round(seconds, 1)}) + "\n")


def make_base(job):
    folder, base, size = job
    if not (folder / "run.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command(folder, "00", f"--seed {base} --size {size}")


def make_cell(job):
    """One base and seed: pairs, policies, results."""
    folder, base_folder, seed, table = job
    if not (folder / "run.json").exists():
        shutil.copytree(base_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("commands.jsonl"))
    for number, made in (("01", "02_to_rate.csv"), ("02", "02_audioscore.pt"), ("03", "03_human_pairs.jsonl")):
        if not (folder / made).exists():
            command(folder, number, f"--seed {seed}")
    if not (folder / "04_settings.json").exists():
        command(folder, "04", "")
    for name, (number, flags) in ARMS[table].items():
        if not (folder / name / "policy.json").exists():
            command(folder, number, f"--seed {seed} --out {name} {flags_at(folder, flags)}")
    systems = "--only --systems ground_truth base " + " ".join(f"{name}={name}" for name in ARMS[table])
    for scale in SCALES if table == "guidance" else [1.5]:
        results = folder / result_file(table, scale)
        if not results.exists():
            command(folder, "07", f"{systems} --guidance {scale:g}")
            shutil.copy(folder / "07_results.jsonl", results)


def flags_at(folder, flags):
    """{share:0.45} -> the threshold at which 45 % of this run's mined pairs are easy, as stage 04 prints it."""
    if "{share:" not in flags:
        return flags
    head, share = flags.rstrip("}").split("{share:")
    pairs = [pair for i in (1, 2) for pair in lines(folder / f"04_stage{i}.jsonl") if pair["source"] == "auto"]
    value = 1.0 if float(share) == 0 else np.quantile([pair["score_c"] for pair in pairs], 1 - float(share))
    return f"{head}{value:.6f}"


def result_file(table, scale):
    return f"results_{table}_{scale:g}.jsonl" if table == "guidance" else f"results_{table}.jsonl"


def lines(path):
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


# ------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------


def over_bases(values):
    """values: (bases, seeds) -> mean and half the width of its 95 % interval, Student's t over the base means."""
    means = np.asarray(values, float).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean()), float(stats.t.ppf(0.975, len(means) - 1) * error)


def verdict(mean, half, better):
    """A claim that a difference goes the better way (better: 1 or -1)."""
    if mean - half <= 0 <= mean + half:
        return "not decidable here"
    return "holds" if mean * better > 0 else "does not hold"


class Results:
    """Values of every cell: self[system, metric] is (bases, seeds)."""

    def __init__(self, cells, file):
        rows = [[{(r["system"], r["metric"]): r["value"] for r in lines(c / file)} for c in base] for base in cells]
        values = {key: [[cell[key] for cell in base] for base in rows] for key in rows[0][0]}
        self.values = {key: np.array(value) for key, value in values.items() if None not in sum(value, [])}

    def gap(self, system, against, metric):
        """Difference within each cell: mean, half width, and in how many cells it has the mean's sign."""
        gaps = self.values[system, metric] - self.values[against, metric]
        mean, half = over_bases(gaps)
        return mean, half, int((np.sign(gaps) == np.sign(mean)).sum())

    def metrics(self):
        return [metric for metric in METRICS if ("base", metric) in self.values]


def shown(metric, mean, half, sign="+"):
    _, better, decimals, times = METRICS[metric]
    text = f"{mean * times:{sign}.{decimals}f} ± {half * times:.{decimals}f}"
    return text if sign == "" or verdict(mean, half, better) != "holds" else f"**{text}**"


def table(head, rows):
    width = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(width)


def difference_table(results, systems, by_metric):
    """Base's value, then every system minus base; rows are metrics (Table 1) or systems (Table 2)."""
    head = {m: f"{METRICS[m][0]} {'↑' if METRICS[m][1] > 0 else '↓'}" for m in results.metrics()}
    base = {m: shown(m, *over_bases(results.values["base", m]), sign="") for m in head}
    cells = {(s, m): shown(m, *results.gap(s, "base", m)[:2]) for s in systems for m in head}
    if by_metric:
        return table(["", "base", *systems], [[head[m], base[m], *(cells[s, m] for s in systems)] for m in head])
    columns = [m for m in ("fd", "is", "ib", "desync_s", "p_good", *ORACLE) if m in head]
    rows = [["base", *(base[m] for m in columns)], *([s, *(cells[s, m] for m in columns)] for s in systems)]
    return table(["", *(head[m] for m in columns)], rows)


def claim_table(results, claims):
    """claims: (text, system, against, metrics). One row per claim, its metrics sorted by verdict; in brackets, in how
    many of the cells the difference has its mean's sign."""
    rows = []
    for text, system, against, metrics in claims:
        found = {"holds": [], "does not hold": [], "not decidable here": []}
        for metric in (m for m in metrics if m in results.metrics()):
            mean, half, agree = results.gap(system, against, metric)
            number = shown(metric, mean, half).strip("*")
            count = f"{agree}/{results.values[system, metric].size}"
            found[verdict(mean, half, METRICS[metric][1])].append(f"{METRICS[metric][0]} {number} ({count})")
        rows.append([text, *("; ".join(part) or "-" for part in found.values())])
    return table(["claim", *found], rows)


def cost_table(cells, arms):
    """Rows through the network, with and without gradient, and CPU seconds of training, means over cells."""
    everything = [cell for base in cells for cell in base]
    rows = []
    for name, (number, _) in arms.items():
        last = [lines(cell / name / "log.jsonl")[-1] for cell in everything]
        spent = [c["cpu_s"] for cell in everything for c in lines(cell / "commands.jsonl")
                 if c["command"].startswith(STAGES[number]) and f"--out {name} " in c["command"]]  # fmt: skip
        counts = [np.mean([row[key] for row in last]) for key in COUNTS]
        rows.append([name, *(f"{count:,.0f}" for count in counts), f"{np.mean(spent):.0f}"])
    pool = [sum(c["cpu_s"] for c in lines(cell / "commands.jsonl") if c["command"][:2] in ("01", "03"))
            for cell in everything]  # fmt: skip
    samples = [json.loads((cell / "run.json").read_text()) for cell in everything]
    audios = [sum(len(lines(f)) for f in (cell / "01_samples").glob("[0-9]*[0-9].jsonl")) for cell in everything]
    guided = np.mean([2 * n * s["sampler"]["steps"] for n, s in zip(audios, samples)])
    rows.append(["the pool of audios that all but DDPO need", "0", f"{guided:,.0f}", f"{np.mean(pool):.0f}"])
    return table(["arm", "rows with gradient", "rows in all", "CPU seconds"], rows)


# ------------------------------------------------------------------------------------------------------------
# Tables and claims
# ------------------------------------------------------------------------------------------------------------

CLAIMS_1 = (
    ("Flow-DPO improves on the pre-trained model (Sys. 11 against 9)", "flow_dpo", "base", (*PAPERS, *ORACLE)),
    ("DDPO improves on the pre-trained model (10 against 9)", "ddpo", "base", (*PAPERS, *ORACLE)),
    ("Flow-DPO is better than DDPO (11 against 10)", "flow_dpo", "ddpo", (*PAPERS, *ORACLE)),
    ("... with equal information: no human pairs", "no_human", "ddpo", (*PAPERS, *ORACLE)),
    ("Human pairs add the aesthetic appeal (Sec. 2.2)", "flow_dpo", "no_human", ("oracle_aesthetic",)),
    ("... and improve the rest too", "flow_dpo", "no_human", ("fd", *ORACLE[:3])),
    ("Preference learning does more than SFT on the winners", "flow_dpo", "sft", (*PAPERS, *ORACLE)),
)
CLAIMS_2 = (
    ("The default beta is better than a third of it", "flow_dpo", "beta20", ("fd", "is", "ib", "desync_s", *ORACLE)),
    ("... and than 600", "flow_dpo", "beta600", ("fd", "is", "ib", "desync_s", *ORACLE)),
    ("At beta 1000 training hurts: the base model is better", "base", "beta1000", ("fd", "is", "ib", "desync_s")),
    ("... with the sum over the latent", "base", "beta600sum", ("fd", "is", "ib", "desync_s")),
    ("... with Eq. 5's brackets as printed", "base", "beta1000printed", ("fd", "is", "ib", "desync_s")),
    ("The curriculum (81 %) is better than shuffled pairs (0 %)", "share81", "share0",
     ("fd", "is", "ib", "desync_s", *ORACLE)),
    ("Easy pairs first is better than hard pairs first", "flow_dpo", "hard_first",
     ("fd", "is", "ib", "desync_s", *ORACLE)),
)  # fmt: skip


def write_tables(args, cells):
    name, systems = args.table, list(ARMS[args.table])
    number = f"{args.bases} bases x {args.seeds} seeds, test split"
    if name == "guidance":
        parts = [f"{number}. Base's value, then minus base, all at one guidance scale."]
        for scale in SCALES:
            results = Results(cells, result_file(name, scale))
            parts.append(f"guidance {scale:g}\n\n{difference_table(results, systems, by_metric=False)}")
    else:
        results = Results(cells, result_file(name, None))
        parts = [f"{number}. Base's value, then minus base; bold: better, the interval excludes 0."]
        parts.append(difference_table(results, systems, by_metric=name == "table1"))
        parts.append(claim_table(results, CLAIMS_1 if name == "table1" else CLAIMS_2))
        if name == "table1":
            parts.append(cost_table(cells, ARMS[name]))
    text = "\n\n".join(parts) + "\n"
    (args.runs / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def main(args):
    args.runs = args.runs.resolve()
    bases = [args.runs / f"base{base}" for base in range(args.bases)]
    cells = [[args.runs / f"base{base}_seed{seed}" for seed in range(args.seeds)] for base in range(args.bases)]
    jobs = [(cells[b][s], bases[b], s, args.table) for s in range(args.seeds) for b in range(args.bases)]
    with ProcessPoolExecutor(args.jobs) as pool:
        for work, todo in ((make_base, [(f, b, args.size) for b, f in enumerate(bases)]), (make_cell, jobs)):
            unit = work.__name__.removeprefix("make_")
            list(tqdm(pool.map(work, todo, chunksize=1), total=len(todo), desc=args.table, unit=unit))
    write_tables(args, cells)


if __name__ == "__main__":
    try:
        main(parse_args())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
