"""Stage 07: the metrics of Tables 1 and 2, with intervals, and the report (Sec. 3.1-3.2).

Run:
    python 07_evaluate.py                                      # ground truth, base, Flow-DPO, DDPO on the test split
    python 07_evaluate.py --split val --systems no_human=05_no_human      # another policy folder of the run
    python 07_evaluate.py --run runs/vgg --only --systems ground_truth thinksound=DIR   # a folder of audio files
    torchrun --nproc_per_node 8 -- 07_evaluate.py --run runs/vgg

Reads:
    clips.jsonl, 02_audioscore.pt, policy folders of the run, folders of audio named by clip id (any common format)
Writes:
    07_audio/<system>/<clip>.wav     one audio per clip, from the clip's own seed: systems share their noise
    07_conditions/*.pt               the encoders' features of the split
    07_scores/*.pt                   what every scorer said, under clip and digest of the audio
    07_results.jsonl                 system, metric, better (higher or lower), value, low, high (95 %), n (clips), and
                                     diff, diff_low, diff_high: value minus base's, paired, never sign-flipped, null
                                     for base
    07_report.html                   one self-contained page; --split val writes 07_results_val.jsonl and no page
Takes: toy 42 s on 2 cores.
"""

import base64
import html
import io
import json
import shutil
import string
import sys
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure  # no pyplot: nothing global, no window
from scipy import stats
from tqdm import tqdm

import common
from common import AudioScore, SkipClip, stop

DEFAULTS = {"ground_truth": None, "base": None, "flow_dpo": "05_flow_dpo", "ddpo": "06_ddpo"}
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4", ".opus")
BLOCK_CLIPS = 32  # clips per cached file
LISTEN = 6  # clips on the page

# metric: (column, better, decimals, shown times)
METRICS = {
    "fd_passt": ("FD_PaSST", "lower", 2, 1), "fd": ("FD", "lower", 2, 1),
    "kl_panns": ("KL_PANNs", "lower", 2, 1), "kl_passt": ("KL_PaSST", "lower", 2, 1), "kl": ("KL", "lower", 2, 1),
    "is": ("IS", "higher", 2, 1), "ib": ("IB x100", "higher", 2, 100), "clap": ("CLAP x100", "higher", 2, 100),
    "desync_s": ("DeSync s", "lower", 3, 1), "p_good": ("P(Good)", "higher", 3, 1),
    "win_rate": ("wins against base", "higher", 3, 1),
    "oracle_semantic": ("oracle: semantic", "higher", 3, 1), "oracle_sync_s": ("oracle: sync s", "lower", 4, 1),
    "oracle_floor_db": ("oracle: floor dB", "lower", 2, 1), "oracle_aesthetic": ("oracle: aesthetic", "higher", 3, 1),
}  # fmt: skip
SET_METRICS = ("fd_passt", "fd", "is")
PAPER_COLUMNS = ("fd_passt", "kl_panns", "kl_passt", "is", "ib", "desync_s")
PAPER = {  # Table 1, VGGSound test
    "Seeing&Hearing": (219.01, 2.26, 2.30, 8.58, 33.99, 1.20), "V-AURA": (218.50, 2.42, 2.07, 10.08, 27.64, 0.65),
    "FoleyCrafter": (140.09, 2.30, 2.23, 15.68, 25.68, 1.23), "V2A-Mapper": (84.57, 2.69, 2.56, 12.47, 22.58, 1.23),
    "ThinkSound": (54.92, 1.32, 1.52, 16.03, 34.13, 0.46), "Frieren": (106.10, 2.73, 2.86, 12.25, 22.78, 0.85),
    "Frieren-DDPO": (75.41, 2.58, 2.61, 13.12, 23.19, 0.65), "Frieren-DPO": (69.98, 2.55, 2.63, 13.98, 24.11, 0.62),
    "MMAudio": (60.60, 1.65, 1.40, 17.40, 33.22, 0.44), "MMAudio-DDPO": (54.81, 1.42, 1.36, 18.34, 33.89, 0.39),
    "MMAudio-DPO": (51.38, 1.38, 1.34, 19.21, 34.08, 0.35),
}  # fmt: skip
TOLERANCE = "tolerance: a repeated evaluation of one MMAudio model drifted by 0.69 FD_PaSST and 0.006 s DeSync"


def parse_args(argv=None):
    parser = common.argument_parser(__doc__)
    files = parser.add_argument_group("io")
    files.add_argument("--run", default="runs/toy", help="run folder")
    files.add_argument("--split", choices=("val", "test"), default="test", help="val is for your own choices")
    described = "more systems: a policy folder of the run, or a folder of audio files named by clip id"
    files.add_argument("--systems", nargs="+", default=[], metavar="NAME[=DIR]", help=described)
    files.add_argument("--only", action="store_true", help="evaluate --systems alone, not the default four too")
    files.add_argument("--allow-missing", action="store_true", help="evaluate a system that lacks audio for some clips")
    files.add_argument("--weights", default="weights", help="folder of downloaded files")
    paper = parser.add_argument_group("paper")
    paper.add_argument("--guidance", type=float, default=4.5, help="guidance scale gamma [Sec. 3.1]")
    engineering = parser.add_argument_group("engineering")
    engineering.add_argument("--batch-clips", type=int, default=16, help="clips sampled together")
    return common.parse(parser, argv, "07")


# ------------------------------------------------------------------------------------------------------------
# Metrics, to av-benchmark's definitions
# ------------------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """FD between Gaussians fitted to a (n, d) and b (m, d): |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), unbiased
    covariances, float64. Fewer audios than dimensions: defined, biased upwards. None below two audios."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or len(b) < 2:
        return None
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()  # tr (A B)^(1/2), by similarity
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kl_divergence(truth, generated):
    """KL(ground truth || generated) of the softmax class distributions, per clip; logits (n, classes) -> (n,) nats."""
    log_p, log_q = (torch.as_tensor(x).double().log_softmax(dim=1) for x in (truth, generated))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy()


def inception_score(logits, splits=10, seed=2020):
    """exp of the mean KL(p(y|a) || p(y)), per split of a seeded shuffle, mean over splits. None below 10 audios."""
    if len(logits) < splits:
        return None
    order = np.random.RandomState(seed).permutation(len(logits))  # noqa: NPY002, av-benchmark's generator
    log_p = torch.as_tensor(logits)[order].double().log_softmax(dim=1)
    edges = [i * len(order) // splits for i in range(splits + 1)]
    scores = []
    for part in (log_p[low:high] for low, high in zip(edges[:-1], edges[1:])):
        marginal = part.logsumexp(dim=0) - np.log(len(part))
        scores.append((part.exp() * (part - marginal)).nan_to_num(0.0).sum(dim=1).mean().exp().item())
    return float(np.mean(scores))


def bootstrap(values, resamples=2000, seed=0):
    """95 % percentile interval of the mean over clips; values (n,), nan = the metric does not apply to the clip. None
    below two clips, which have no spread."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return tuple(float(q) for q in np.percentile(means, (2.5, 97.5)))


def jackknife(statistic, n, blocks=20, seed=0):
    """95 % interval of a set metric by deleting one of 20 blocks of clips at a time (a bootstrap of FD would exclude
    its own value: resampled sets have fewer distinct clips). statistic: indices -> float or None."""
    value, block = statistic(np.arange(n)), np.random.default_rng(seed).permutation(n) % blocks
    parts = [statistic(np.flatnonzero(block != i)) for i in range(min(blocks, n))]
    if value is None or len(parts) < 2 or any(part is None for part in parts):
        return value, None, None
    parts = np.array(parts)
    error = np.sqrt((len(parts) - 1) / len(parts) * np.square(parts - parts.mean()).sum())
    reach = float(stats.t.ppf(0.975, len(parts) - 1) * error)
    return value, value - reach, value + reach


# ------------------------------------------------------------------------------------------------------------
# Audio of every system
# ------------------------------------------------------------------------------------------------------------


def choose_systems(run, args):
    """{name: folder, or None for ground truth and base}, in the order of the table."""
    systems = {} if args.only else {k: v and run / v for k, v in DEFAULTS.items() if v is None or (run / v).is_dir()}
    for item in args.systems:
        name, _, folder = item.partition("=")
        if not name.replace("_", "").replace("-", "").isalnum():
            stop(f"--systems {item}: a name has letters, digits, _ and -")
        if folder and name in ("ground_truth", "base"):
            stop(f"--systems {item}: {name} comes from the run itself; choose another name")
        if folder:
            systems[name] = run / folder if (run / folder).is_dir() else Path(folder)
        elif name in DEFAULTS:
            systems[name] = DEFAULTS[name] and run / DEFAULTS[name]
        else:
            stop(f"--systems {item}: give NAME=DIR; known without DIR are {', '.join(DEFAULTS)}")
        if systems[name] is not None and not systems[name].is_dir():
            stop(f"--systems {item}: {systems[name]} is no folder")
    for folder in filter(None, systems.values()):
        if (folder / "log.jsonl").exists() and not (folder / "policy.json").exists():
            stop(f"{folder}: no policy.json, its training has not finished; run the same command of 05 or 06 again")
    for name, folder in DEFAULTS.items():
        if not args.only and name not in systems:
            print(f"{name}: left out, {run / folder} does not exist")
    if not systems:
        stop("--only: name at least one of the --systems")
    return dict(sorted(systems.items(), key=lambda item: list(DEFAULTS).index(item[0]) if item[0] in DEFAULTS else 9))


def is_policy(name, folder):
    return name == "base" or (folder is not None and (folder / "policy.json").exists())


def read_features(model, run, clips, ranks):
    """Features of these clips, memory-mapped from 07_conditions/, after encoding what is not there yet, its blocks
    divided over the ranks: {clip id: dict}."""
    rank, world, _ = ranks
    blocks = [clips[i : i + BLOCK_CLIPS] for i in range(0, len(clips), BLOCK_CLIPS)]
    files = [run / "07_conditions" / f"{clips[0]['split']}_{i:05d}.pt" for i in range(len(blocks))]
    for block, file in tqdm(list(zip(blocks, files))[rank::world], desc="encode", unit="block", disable=rank > 0):
        cached, new = common.load_pt(file, mmap=True) if file.exists() else {}, {}
        for clip in block:
            if clip["id"] not in cached:
                try:
                    new[clip["id"]] = model.encode(clip)
                except SkipClip as reason:
                    tqdm.write(f"{clip['id']}: {reason}; no policy can sound it", file=sys.stderr)
        if new:
            common.save_pt(file, cached | new)
    common.barrier()
    return {name: value for file in files if file.exists() for name, value in common.load_pt(file, mmap=True).items()}


def generate(run, name, folder, model, features, clips, args, ranks):
    """One audio per clip of a policy, 07_audio/<name>/<clip>.wav; what exists from the same policy is kept."""
    rank, world, device = ranks
    run_json, out = common.read_run(run), audio_folder(run, name, args)
    policy = run_json["checkpoint_digest"] if folder is None else common.digest(folder / "policy.pt")
    settings = dict(policy=policy, guidance=args.guidance, steps=run_json["sampler"]["steps"], seed=run_json["seed"])
    if rank == 0:
        record = out / "settings.json"
        if out.exists() and (not record.exists() or common.read_json(record) != settings):
            shutil.rmtree(out)  # a cache of another policy
        common.write_text(record, json.dumps(settings) + "\n")
    common.barrier()
    todo = [c for c in clips if c["id"] in features and not (out / f"{c['id']}.wav").exists()][rank::world]
    if folder is not None:
        common.check_record(folder / "settings.json", "its training, into another --out")
        about = common.read_json(folder / "policy.json")
        if about["model"] != run_json["model"] or about["base_digest"] != run_json["checkpoint_digest"]:
            stop(f"{folder}: a policy of {about['model']} tuned from another base than this run's; use its own run")
    if folder is not None and todo:
        model.load_policy(folder / "policy.pt")
    for start in tqdm(range(0, len(todo), args.batch_clips), desc=name, unit="batch", disable=rank > 0 or not todo):
        batch = todo[start : start + args.batch_clips]
        stacked = {k: torch.stack([features[c["id"]][k] for c in batch]).to(device) for k in features[batch[0]["id"]]}
        seeds = [common.audio_seed(run_json["seed"], c["id"], 0) for c in batch]
        a_0 = common.sample(model, stacked, seeds, run_json["sampler"]["steps"], args.guidance)
        for clip, wave in zip(batch, model.decode(a_0)):
            common.write_audio(out / f"{clip['id']}.wav", wave, model.sample_rate_hz)
    common.barrier()


def audio_folder(run, name, args):
    """Audio at another guidance than the run's is kept apart."""
    usual = common.read_run(run)["sampler"]["guidance"]
    return run / "07_audio" / (name if args.guidance == usual else f"{name}@{args.guidance:g}")


def audio_files(run, name, folder, clips, args):
    """{clip id: audio path} of what a system has."""
    if name == "ground_truth":
        return {c["id"]: c["path"] for c in clips if has_audio(c["path"])}
    if not is_policy(name, folder):
        names = {c["id"]: [folder / (c["id"] + suffix) for suffix in AUDIO_SUFFIXES] for c in clips}
        found = {clip: next((path for path in paths if path.exists()), None) for clip, paths in names.items()}
        return {clip: path for clip, path in found.items() if path}
    out = audio_folder(run, name, args)
    return {c["id"]: out / f"{c['id']}.wav" for c in clips if (out / f"{c['id']}.wav").exists()}


def has_audio(path):
    try:
        with common.open_media(path) as container:
            return next(iter(container.decode(audio=0)), None) is not None
    except (OSError, IndexError, av.error.FFmpegError):
        return False


# ------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------


def score_systems(run, files, clips, args, ranks):
    """Everything the scorers say of every system: {system: {scorer: {key: (n, ...)}}}, rows in the order of
    files[system]; each audio once, each video tower once per clip."""
    toy = "scorers" in common.read_run(run)
    names = [*common.AUDIOSCORE_SCORERS, *(() if toy else ("panns_16k", "passt"))]
    groups, mine = {}, {system: {} for system in files}
    for i, clip in enumerate(clips):
        group = f"{clip['split']}_{i // BLOCK_CLIPS:05d}"
        for system, paths in files.items():
            if clip["id"] in paths:
                audio = (clip, paths[clip["id"]], f"{clip['id']}/{common.digest(paths[clip['id']])}")
                groups.setdefault(group, {})[audio[2]] = audio  # equal audio of two systems is scored once
                mine[system].setdefault(group, []).append(audio)
    groups = {group: list(audios.values()) for group, audios in groups.items()}
    common.score_groups(run, run / "07_scores", groups, names, args.weights, ranks)
    return {system: common.merge_scores(run / "07_scores", mine[system], names) for system in files}


def per_clip_values(run, found, clips, files):
    """Metrics that are means over clips: {system: {metric: (n,) float64, nan where absent}}, rows = clips; and what
    the set metrics need: {system: {metric: (embedding or logits, row of each clip or -1)}}."""
    toy = "scorers" in common.read_run(run)
    kl_from = {"kl": "panns"} if toy else {"kl_panns": "panns_16k", "kl_passt": "passt"}
    sets_from = {"fd": ("panns", "embedding"), "is": ("panns", "logits")}
    if not toy:
        sets_from = {"fd_passt": ("passt", "embedding"), "is": ("panns_16k", "logits")}
    judge = run / "02_audioscore.pt"
    audioscore = AudioScore.load(judge) if judge.exists() else None
    means, sets = {}, {}
    for system, part in found.items():
        row = dict(zip(files[system], range(len(files[system]))))
        rows = np.array([row.get(clip["id"], -1) for clip in clips])

        def spread(values, rows=rows):
            return np.where(rows >= 0, np.asarray(values, np.float64)[rows], np.nan)

        values = {"ib": part["imagebind"]["ib"], "clap": part["clap"]["clap"]}
        values["desync_s"] = part["synchformer"]["desync_s"]
        if audioscore:
            values["p_good"] = audioscore(common.five_scores(part, audioscore))[:, 0]
        if toy and (run / "00_oracle.pt").exists():
            by_id = {clip["id"]: clip for clip in clips}
            audios = [(by_id[clip], path) for clip, path in files[system].items()]
            values |= common.toy_world().oracle_scores(run, audios)
        means[system] = {metric: spread(v) for metric, v in values.items() if metric in METRICS}
        sets[system] = {metric: (part[s][key].numpy(), rows) for metric, (s, key) in sets_from.items()}
    truth = found.get("ground_truth")
    for system, part in found.items():
        if truth and system != "ground_truth":
            have = [i for i, c in enumerate(clips) if c["id"] in files[system] and c["id"] in files["ground_truth"]]
            a, b = (sets[s]["is"][1][have] for s in ("ground_truth", system))
            for metric, scorer in kl_from.items():
                values = np.full(len(clips), np.nan)
                values[have] = kl_divergence(truth[scorer]["logits"][a], part[scorer]["logits"][b])
                means[system][metric] = values
        if "p_good" in means[system] and "base" in means:
            ours, base = means[system]["p_good"], means["base"]["p_good"]
            wins = (ours > base) + 0.5 * (ours == base)
            means[system]["win_rate"] = np.where(np.isfinite(ours) & np.isfinite(base), wins, np.nan)
    return means, sets


def results_of(means, sets, n):
    """Lines of 07_results.jsonl."""
    lines, truth = [], sets.get("ground_truth")
    for system in means:
        against = system != "base" and "base" in means

        def line(metric, value, low, high, count, diff, system=system):
            keys = ("value", "low", "high", "n", "diff", "diff_low", "diff_high")
            numbers = dict(zip(keys, (value, low, high, count, *diff)))
            return {"system": system, "metric": metric, "better": METRICS[metric][1], **numbers}

        for metric, values in means[system].items():
            value = float(np.nanmean(values)) if np.isfinite(values).any() else None
            diff = (None, None, None)
            if against and metric in means["base"]:
                gap = values - means["base"][metric]
                if np.isfinite(gap).any():
                    diff = (float(np.nanmean(gap)), *bootstrap(gap))
            lines.append(line(metric, value, *bootstrap(values), int(np.isfinite(values).sum()), diff))
        for metric in sets[system]:
            if metric != "is" and (truth is None or system == "ground_truth"):
                continue

            def statistic(index, metric=metric, system=system):
                embedding, rows = sets[system][metric]
                mine = embedding[rows[index][rows[index] >= 0]]
                if metric == "is":
                    return inception_score(mine)
                reference, rows = truth[metric]
                return frechet_distance(mine, reference[rows[index][rows[index] >= 0]])

            def difference(index, statistic=statistic, metric=metric, system=system):
                both = (sets[system][metric][1][index] >= 0) & (sets["base"][metric][1][index] >= 0)  # paired
                ours, base = statistic(index[both]), statistic(index[both], system="base")
                return None if ours is None or base is None else ours - base

            count = int((sets[system][metric][1] >= 0).sum())
            diff = jackknife(difference, n) if against else (None, None, None)
            lines.append(line(metric, *jackknife(statistic, n), count, diff))
    order = list(METRICS)
    return sorted(lines, key=lambda row: (list(means).index(row["system"]), order.index(row["metric"])))


def shown(metric, value, sign=""):
    _, _, decimals, times = METRICS[metric]
    return "-" if value is None else f"{value * times:{sign}.{decimals}f}"


def verdict(row):
    """`better`, `worse` or `` by whether the interval of the difference excludes 0."""
    if row["diff_low"] is None or row["diff_low"] <= 0 <= row["diff_high"]:
        return ""
    return "better" if (row["diff"] > 0) == (row["better"] == "higher") else "worse"


def print_table(results, systems):
    """Values, then differences to base with 95 % intervals; better and worse mark intervals that exclude 0."""
    cell = {(row["metric"], row["system"]): row for row in results}
    metrics = [m for m in METRICS if any((m, s) in cell for s in systems)]
    print("\n" + f"{'':<18}" + "".join(f"{s[:14]:>15}" for s in systems))
    for metric in metrics:
        arrow = "^" if METRICS[metric][1] == "higher" else "v"
        values = [shown(metric, cell[metric, s]["value"]) if (metric, s) in cell else "" for s in systems]
        print(f"{METRICS[metric][0] + ' ' + arrow:<18}" + "".join(f"{v:>15}" for v in values))
    others = [s for s in systems if s not in ("base", "ground_truth")]
    if "base" in systems and others:
        print("\nminus base, 95 % interval" + " " * 4 + "".join(f"{s[:24]:>36}" for s in others))
        for metric in metrics:
            text = f"{METRICS[metric][0]:<29}"
            for row in (cell.get((metric, s)) for s in others):
                if row is None or row["diff"] is None:
                    text += " " * 36
                    continue
                low, high = (shown(metric, row[k], "+") for k in ("diff_low", "diff_high"))
                mark = {"better": " better", "worse": " worse "}.get(verdict(row), "       ")
                text += f"{shown(metric, row['diff'], '+') + ' [' + low + ', ' + high + ']' + mark:>36}"
            print(text)


def paper_twin(system, run_json):
    """The row of Table 1 that a system repeats: base, flow_dpo and ddpo of the two models that the paper tunes, and any
    system named like a row (mmaudio=DIR)."""
    family = {"mmaudio:large_44k": "MMAudio", "frieren": "Frieren"}.get(run_json["model"])
    if family and system in ("base", "flow_dpo", "ddpo"):
        return family + {"base": "", "flow_dpo": "-DPO", "ddpo": "-DDPO"}[system]
    plain = {"".join(filter(str.isalnum, name)).lower(): name for name in PAPER}
    return plain.get("".join(filter(str.isalnum, system)).lower())


def table_1(run_json, results, systems):
    """The paper's rows, then ours, then each of ours minus the paper's own: [(label, six texts)], and a remark. In the
    toy world only MMAudio's rows, without ours: only the signs of the differences compare."""
    if "scorers" in run_json:
        rows = [(name, [f"{x:.2f}" for x in row]) for name, row in PAPER.items() if name.startswith("MMAudio")]
        return rows, "another world and other scorers: compare the signs of the differences, not the numbers"
    value = {(row["system"], row["metric"]): row["value"] for row in results}
    rows = [(name, [f"{x:.2f}" for x in row]) for name, row in PAPER.items()]
    for system in (s for s in systems if s != "ground_truth"):
        ours = [value.get((system, metric)) for metric in PAPER_COLUMNS]
        rows.append((f"here: {system}", [shown(m, x) for m, x in zip(PAPER_COLUMNS, ours)]))
        if twin := paper_twin(system, run_json):
            drift = [None if x is None else x - y / METRICS[m][3] for m, x, y in zip(PAPER_COLUMNS, ours, PAPER[twin])]
            rows.append((f"  minus the paper's {twin}", [shown(m, x, "+") for m, x in zip(PAPER_COLUMNS, drift)]))
    return rows, TOLERANCE


def print_table_1(run_json, results, systems):
    rows, remark = table_1(run_json, results, systems)
    print("\nthe paper (Table 1, VGGSound test)" + "".join(f"{METRICS[m][0]:>11}" for m in PAPER_COLUMNS))
    for name, texts in rows:
        print(f"{name[:34]:<34}" + "".join(f"{text:>11}" for text in texts))
    print(f"({remark})")


def main(args):
    # -- setup
    ranks = rank, _, device = common.setup_ranks()
    run = Path(args.run)
    run_json = common.read_run(run)
    clips = common.read_clips(run, args.split)
    if not clips:
        stop(f"{run}/clips.jsonl has no clip of the split {args.split}; give some that split in stage 01's --clips")
    systems = choose_systems(run, args)
    if (run / "02_settings.json").exists():
        common.check_chain(run, "02")

    # -- audio
    if any(is_policy(name, folder) for name, folder in systems.items()):
        model = common.load_base_model(run, device, args.weights)
        features = read_features(model, run, clips, ranks)
        for name, folder in systems.items():  # base comes before any policy replaces its weights
            if is_policy(name, folder):
                generate(run, name, folder, model, features, clips, args, ranks)
        del model
    files = {name: audio_files(run, name, folder, clips, args) for name, folder in systems.items()}
    for name, paths in files.items():
        if len(paths) < len(clips):
            missing = next(c["id"] for c in clips if c["id"] not in paths)
            said = f"{name}: audio for {len(paths)} of {len(clips)} {args.split} clips, first missing {missing}"
            if not paths or not args.allow_missing:
                stop(f"{said}; complete it, or evaluate what there is with --allow-missing")
            print(said)

    # -- numbers
    found = score_systems(run, files, clips, args, ranks)
    if rank > 0:
        return
    means, sets = per_clip_values(run, found, clips, files)
    results = results_of(means, sets, len(clips))
    suffix = "" if args.split == "test" else f"_{args.split}"
    common.write_jsonl(run / f"07_results{suffix}.jsonl", results)
    coverage = ", ".join(f"{name} {len(paths)}/{len(clips)}" for name, paths in files.items())
    print(f"{args.split} split, guidance {args.guidance:g}; clips with audio: {coverage}")
    missing = run / "01_missing.jsonl"
    if gone := missing.exists() and sum(row["split"] == args.split for row in common.read_jsonl(missing)):
        print(f"{gone} more listed {args.split} clips have no video (01_missing.jsonl), so no system is judged on them")
    print_table(results, list(systems))
    print_table_1(run_json, results, list(systems))
    print(f"\nwrote {run / f'07_results{suffix}.jsonl'}")
    if args.split == "test":
        write_report(run, run_json, results, systems, files, clips, args)
        print(f"open {run / '07_report.html'}")


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def picture(draw, *about, box="tight"):
    """What draw(figure, *about) draws, as an <img> with its data inside."""
    figure, stream = Figure(), io.BytesIO()
    draw(figure, *about)
    figure.savefig(stream, format="png", dpi=110, bbox_inches=box)
    return f'<img src="{data_uri("image/png", stream.getvalue())}" alt="">'


def data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def draw_differences(figure, results, systems):
    """One small plot per metric: difference to base with its 95 % interval, green better, red worse, grey undecided."""
    cell = {(row["metric"], row["system"]): row for row in results if row["diff_low"] is not None}
    metrics = [m for m in METRICS if any((m, s) in cell for s in systems)]
    figure.set_size_inches(11, 1.0 + (0.28 * len(systems) + 0.75) * -(-len(metrics) // 4))
    for i, metric in enumerate(metrics):
        axis = figure.add_subplot(-(-len(metrics) // 4), 4, i + 1)
        for y, system in enumerate(reversed(systems)):
            if row := cell.get((metric, system)):
                colour = {"better": "#2a7f3f", "worse": "#b3261e"}.get(verdict(row), "#777777")
                times = METRICS[metric][3]
                axis.plot([row["diff_low"] * times, row["diff_high"] * times], [y, y], color=colour, lw=2)
                axis.plot(row["diff"] * times, y, "o", color=colour, ms=5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(systems)), reversed(systems) if i % 4 == 0 else [""] * len(systems), fontsize=8)
        axis.set_ylim(-0.6, len(systems) - 0.4)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{METRICS[metric][0]} ({METRICS[metric][1]} is better)", fontsize=8)
    figure.tight_layout()


def plot_smooth(axis, values, style="-", label="", width=15):
    """A running mean, at the middle of its window."""
    width = max(1, min(width, len(values) // 4))
    mean = np.convolve(np.asarray(values, float), np.ones(width) / width, mode="valid")
    axis.plot(np.arange(len(mean)) + (width - 1) / 2, mean, style, label=label)


def draw_training(figure, folders):
    """Loss, implicit accuracy, error gaps of every Flow-DPO folder; reward of every DDPO folder."""
    figure.set_size_inches(11, 2.6)
    titles = ("loss", "implicit accuracy", "error gap (policy - reference)", "DDPO: reward P(Good)")
    axes = dict(zip(("loss", "accuracy", "gap", "reward"), figure.subplots(1, 4)))
    for axis, title in zip(axes.values(), titles):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    for name, folder in folders.items():
        log = common.read_jsonl(folder / "log.jsonl")
        if "reward" in log[0]:
            plot_smooth(axes["reward"], [row["reward"] for row in log], label=name)
            continue
        plot_smooth(axes["loss"], [row["loss"] for row in log], label=name)
        plot_smooth(axes["accuracy"], [row["accuracy"] for row in log], label=name)
        for key, style, side in (("gap_w", "-", "winner"), ("gap_l", "--", "loser")):
            plot_smooth(axes["gap"], [row[key] for row in log], style, f"{name}, {side}")
        switch = sum(row["stage"] == log[0]["stage"] for row in log)
        for key in ("loss", "accuracy", "gap"):
            axes[key].axvline(switch, color="grey", lw=0.7, ls=":")
    for axis in axes.values():
        if axis.lines:
            axis.legend(fontsize=6)
    figure.tight_layout()


def draw_audioscore(figure, run):
    """Reliability of P(Good) on held-out clips, and the pairs' score_c with the threshold."""
    figure.set_size_inches(8, 2.8)
    left, right = figure.subplots(1, 2)
    heldout = common.load_pt(run / "02_audioscore.pt")["heldout"]
    p, good = heldout["p"][:, 0].numpy(), (heldout["rating"] == 0).numpy()
    bins = np.digitize(p, np.linspace(0, 1, 11)[1:-1])
    points = [(p[bins == i].mean(), good[bins == i].mean(), (bins == i).sum()) for i in range(10) if (bins == i).any()]
    left.plot([0, 1], [0, 1], color="grey", lw=0.8)
    left.scatter(*zip(*[(x, y) for x, y, _ in points]), s=[20 + 200 * n / len(p) for *_, n in points])
    left.set(xlabel="predicted P(Good)", ylabel="share rated Good")
    left.set_title("AudioScore on held-out clips", fontsize=9)
    pairs = [row for i in (1, 2) for row in common.read_jsonl(run / f"04_stage{i}.jsonl") if row["source"] == "auto"]
    threshold = common.read_json(run / "04_settings.json")["settings"]["threshold"]
    right.hist([row["score_c"] for row in pairs], bins=30, color="#4a6fa5")
    right.axvline(threshold, color="#b3261e")
    right.set(xlabel="score_c (high = easy)", ylabel="pairs")
    right.set_title(f"Complexity of the mined pairs, score_delta {threshold:g}", fontsize=9)
    figure.tight_layout()


def draw_spectrogram(figure, wave, rate, events):
    figure.set_size_inches(3.2, 1.3)
    axis = figure.add_axes((0, 0, 1, 1))
    with np.errstate(divide="ignore"):  # silence has no level
        axis.specgram(wave.numpy() + 1e-7, NFFT=512, Fs=rate, noverlap=384, vmin=-140, vmax=-30, cmap="magma")
    for second in events:
        axis.axvline(second, color="white", lw=0.8, ls="--")
    axis.set_axis_off()


# ------------------------------------------------------------------------------------------------------------
# The page: builder and template
# ------------------------------------------------------------------------------------------------------------


def playable_video(clip, seconds):
    """The silent picture as H.264 that every browser plays (4:2:0, 240 to 360 pixels high), `seconds` long."""
    fps, stream = 25, io.BytesIO()

    def resized(frame):  # at once: 8 s of full-size frames are a gigabyte
        height = min(max(frame.shape[0], 240), 360)
        width = 2 * round(frame.shape[1] * height / frame.shape[0] / 2)
        image = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
        image = image.reformat(width, height - height % 2, "rgb24", interpolation="POINT")
        return torch.from_numpy(image.to_ndarray())

    (frames,) = common.read_frames(clip["path"], [(fps, resized)], seconds)
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "26", "preset": "veryfast"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames.numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    return data_uri("video/mp4", stream.getvalue())


def listening_card(clip, systems, files, seconds, rate):
    """Video, one button per system that plays its audio in sync, and spectrograms (toy: true events dashed)."""
    events, cells = clip.get("oracle", {}).get("hits_s", []), ""
    for system in systems:
        if clip["id"] not in files[system]:
            continue
        wave, flac = common.read_audio(files[system][clip["id"]], rate, seconds), io.BytesIO()
        soundfile.write(flac, wave.numpy(), rate, format="FLAC")
        image = picture(draw_spectrogram, wave, rate, events, box=None)
        audio = f'<audio preload="auto" src="{data_uri("audio/flac", flac.getvalue())}"></audio>'
        cells += f'<div class="s"><button>{html.escape(system)}</button>{audio}{image}</div>'
    about = html.escape(f"{clip['id']}: {clip.get('caption') or clip.get('label') or 'no caption'}")
    video = f'<video muted playsinline preload="auto" src="{playable_video(clip, seconds)}"></video>'
    row = f'<div class="row">{video}<div class="grid">{cells}</div></div>'
    return f'<section class="card"><h3>{about}</h3>{row}</section>'


def html_table(results, systems, run_json):
    """Rows = metrics, columns = systems; a cell has the value, its interval, and the difference to base."""
    cell = {(row["metric"], row["system"]): row for row in results}
    head = "".join(f"<th>{html.escape(system)}</th>" for system in systems)
    body = ""
    for metric in (m for m in METRICS if any((m, s) in cell for s in systems)):
        label, better, *_ = METRICS[metric]
        body += f"<tr><th>{label} {'&uarr;' if better == 'higher' else '&darr;'}</th>"
        for system in systems:
            row = cell.get((metric, system))
            if row is None or row["value"] is None:
                body += "<td>-</td>"
                continue
            tested = system != "ground_truth" and row["diff"] is not None
            span = f"[{shown(metric, row['low'])}, {shown(metric, row['high'])}]"
            gap = f"<i>{shown(metric, row['diff'], '+')}</i>" if tested else ""
            mark = verdict(row) if tested else ""
            body += f'<td class="{mark}">{shown(metric, row["value"])}<small>{span}</small>{gap}</td>'
        body += "</tr>"
    rows, remark = table_1(run_json, results, systems)
    cells = [(html.escape(name), "".join(f"<td>{text}</td>" for text in texts)) for name, texts in rows]
    paper = "".join(f"<tr><th>{name}</th>{row}</tr>" for name, row in cells)
    columns = "".join(f"<th>{METRICS[m][0]}</th>" for m in PAPER_COLUMNS)
    return (
        f"<table><tr><th></th>{head}</tr>{body}</table><h3>The paper, Table 1 (VGGSound test)</h3>"
        f"<table><tr><th></th>{columns}</tr>{paper}</table><p>{html.escape(remark)}</p>"
    )


def write_report(run, run_json, results, systems, files, clips, args):
    names, compared = list(systems), [name for name in systems if name not in ("base", "ground_truth")]
    folders = {name: folder for name, folder in systems.items() if folder and (folder / "log.jsonl").exists()}
    parts = {"table": html_table(results, names, run_json), "differences": ""}
    parts["training"], parts["audioscore"] = "<p>No policy was trained.</p>", "<p>AudioScore was not fitted.</p>"
    if compared:
        parts["differences"] = picture(draw_differences, results, compared)
    if folders:
        parts["training"] = picture(draw_training, folders)
    if (run / "04_settings.json").exists():
        parts["audioscore"] = picture(draw_audioscore, run)
    chosen = [clips[i] for i in np.linspace(0, len(clips) - 1, min(LISTEN, len(clips))).astype(int)]
    seconds, rate = run_json["clip_s"], run_json["sample_rate_hz"]
    parts["cards"] = ""
    for clip in tqdm(chosen, desc="page", unit="clip"):
        with suppress(SkipClip):  # a video that cannot be read has been said above
            parts["cards"] += listening_card(clip, names, files, seconds, rate) + "\n"
    sampler = f"{run_json['sampler']['steps']} Euler steps, guidance {args.guidance:g}"
    parts["about"] = html.escape(f"{run_json['model']}, {len(clips)} test clips, {sampler}")
    common.write_text(run / "07_report.html", string.Template(PAGE).substitute(parts))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>V2A-DPO: results</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
img{max-width:100%} h2{margin-top:2.2rem} table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child{text-align:left} td small,td i{display:block;color:#777;font-style:normal;font-size:11px}
.better{background:#e6f4ea} .worse{background:#fce8e6} .note{color:#666}
.card{border:1px solid #ddd;border-radius:8px;padding:.6rem 1rem;margin:1rem 0}
.card h3{margin:.2rem 0 .6rem;font-size:15px} .row{display:flex;gap:1rem;flex-wrap:wrap}
video{width:300px;background:#000;border-radius:4px;align-self:flex-start}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:.6rem;flex:1;min-width:260px}
.s img{width:100%;display:block;border-radius:4px} button.on{background:#1a56b0;color:#fff}
button{width:100%;padding:.35rem;border:1px solid #bbb;border-radius:4px;background:#f6f6f6;cursor:pointer;font:inherit}
</style>
<h1>V2A-DPO: results</h1>
<p class="note">$about. Intervals are 95 %: percentile bootstrap over clips for means, delete-a-block
jackknife for FD and IS. Green or red: the paired difference to base excludes 0.</p>
<h2>Results</h2>$table
<h2>Differences to base</h2>$differences
<h2>Training</h2><p class="note">Dotted line: the switch from stage 1 to stage 2.</p>$training
<h2>AudioScore and the curriculum</h2>$audioscore
<h2>Listen</h2><p class="note">A button plays a system's audio in sync with the silent video. Dashed lines: true events
(toy world).</p>
$cards
<script>
let playing = null;
function stopAll() {
  document.querySelectorAll("audio,video").forEach(m => m.pause());
  document.querySelectorAll("button.on").forEach(b => b.classList.remove("on"));
}
document.querySelectorAll(".card").forEach(card => {
  const video = card.querySelector("video");
  card.querySelectorAll("button").forEach(button => {
    const audio = button.parentElement.querySelector("audio");
    audio.addEventListener("ended", () => { if (playing === button) { stopAll(); playing = null; } });
    button.addEventListener("click", () => {
      const again = playing === button;
      stopAll();
      playing = again ? null : button;
      if (again) return;
      button.classList.add("on");
      video.currentTime = 0;
      audio.currentTime = 0;
      Promise.all([video.play(), audio.play()]).catch(() => {});
    });
  });
});
</script>
</html>
"""


if __name__ == "__main__":
    common.launch(main, parse_args)
