"""Stage 07: the metrics of Tables 1 and 2, with intervals (Sec. 3.1-3.2). Stage 08 makes the page.

Run:
    python 07_evaluate.py                                      # ground truth, base, Flow-DPO, DDPO on the test split
    python 07_evaluate.py --split val --systems no_human=05_no_human      # another policy folder of the run
    python 07_evaluate.py --run-dir runs/vgg --only --systems ground_truth thinksound=DIR   # a folder of audio files
    torchrun --standalone --nproc_per_node 8 07_evaluate.py --run-dir runs/vgg

Reads:
    clips.jsonl, 01_missing.jsonl, 02_audioscore.pt, policy folders of the run, and folders of audio named by clip id
    (any common format); a rerun evaluates again what the last run of this split did
Writes:
    07_audio/<system>/<clip>.wav     one audio per clip, from the clip's own seed: systems share their noise
    scores/*.pt, heard.json          what every scorer said, by block of 32 clips; the encoders' features of the
                                     split; the peak of every audio
    07_results.jsonl                 system, metric, better (higher or lower), value, low, high (95 %), n (clips), and
                                     diff, diff_low, diff_high: value minus base's (--against: another's), paired, never
                                     sign-flipped, null for itself; verdict: better or worse where that excludes 0
    07_systems.json                  what was evaluated: split, guidance, steps; systems: for each its folder and the
                                     audio of each clip; how it is shown: metrics (column, better, decimals, times, by),
                                     in the table's order, paper (columns, rows, remark: Table 1's rows)
With --split val the last two are 07_results_val.jsonl and 07_systems_val.json, with --against NAME ..._NAME.
Takes: toy 20 s on 2 cores.
"""

from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import common
from common import METRICS, PAPER_COLUMNS, AudioScore, Metric, describe, number, stop

DEFAULTS = {"ground_truth": None, "base": None, "flow_dpo": "05_flow_dpo", "ddpo": "06_ddpo"}
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4", ".opus")
BLOCK_CLIPS = 32  # clips per cached file
TIE = 1e-6  # of P(Good): what rounding in batches of other sizes may make of one and the same audio


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument("--split", choices=("val", "test"), default="test", help="val is for your own choices")
    described = "more systems: a policy folder of the run, or a folder of audio files named by clip id"
    io.add_argument("--systems", nargs="+", default=[], metavar="NAME[=DIR]", help=described)
    io.add_argument("--only", action="store_true", help="--systems alone, without the default four and the last run's")
    io.add_argument("--against", default="base", metavar="NAME", help="the system that the others are compared with")
    io.add_argument("--allow-missing", action="store_true", help="evaluate a system that lacks audio for some clips")
    described = "a scorer outside AudioScore, for a policy may gain on those alone: audiobox"
    io.add_argument("--judge", nargs="+", default=[], metavar="NAME", help=described)
    described = "check systems and weights, print what audio there is, and end before any is made or scored"
    io.add_argument("--dry-run", action="store_true", help=described)
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    parser.paper.add_argument("--guidance", type=number(float, 0), default=4.5, help="guidance scale gamma [Sec. 3.1]")
    engineering = parser.engineering
    engineering.add_argument("--compile", action="store_true", help="torch.compile the network that samples")
    engineering.add_argument("--batch-clips", type=number(int, 1), default=16, help="clips sampled together")
    common.workers_flag(parser)
    return common.parse(parser, argv, "07")


# ------------------------------------------------------------------------------------------------------------
# Metrics, to av-benchmark's definitions
# ------------------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """FD between Gaussians fitted to a (n, d) and b (m, d): |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), unbiased
    covariances, float64. Fewer audios than dimensions: defined, biased upwards. None below two audios."""
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    if len(a) < 2 or len(b) < 2:
        return None
    cov_a = a.T.cov().reshape(a.shape[1], a.shape[1])
    cov_b = b.T.cov().reshape(b.shape[1], b.shape[1])
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()  # tr (A B)^(1/2), by similarity
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.item()


def kl_divergence(truth, generated):
    """KL(ground truth || generated) of the softmax class distributions, per clip; logits (n, classes) -> (n,) nats."""
    log_p, log_q = (torch.as_tensor(x).double().log_softmax(dim=1) for x in (truth, generated))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy()


def shuffled(n, seed=2020):
    return np.random.RandomState(seed).permutation(n)  # noqa: NPY002, av-benchmark's generator


def inception_score(logits, splits=10, order=None):
    """exp of the mean KL(p(y|a) || p(y)), per split of a seeded shuffle, mean over splits. None below 10 audios."""
    order = shuffled(len(logits)) if order is None else order
    if len(order) < splits:
        return None
    log_p = torch.as_tensor(logits)[order].double().log_softmax(dim=1)
    edges = [i * len(log_p) // splits for i in range(splits + 1)]
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
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(0, n, (100, n))].mean(axis=1) for _ in range(resamples // 100)]
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
    systems |= {} if args.only else evaluated_before(run, args)
    asked = [item.partition("=")[0] for item in args.systems]
    for item in args.systems:
        name, _, folder = item.partition("=")
        if not name.replace("_", "").replace("-", "").isalnum() or not common.file_name(name):
            stop(f"--systems {item}: a name has letters, digits, _ and -, and at most 200 bytes")
        if asked.count(name) > 1:
            stop(f"--systems {item}: the name {name} is given twice; choose another for one of them")
        if folder and name in ("ground_truth", "base"):
            stop(f"--systems {item}: {name} comes from the run itself; choose another name")
        if folder:
            systems[name] = run / folder if (run / folder).is_dir() else Path(folder)
        elif name in DEFAULTS:
            systems[name] = DEFAULTS[name] and run / DEFAULTS[name]
        elif (run / name / "policy.json").exists():
            systems[name] = run / name
        else:
            stop(f"--systems {item}: give NAME=DIR, or the name of a policy folder of {run}")
        if systems[name] is not None and not systems[name].is_dir():
            stop(f"--systems {item}: {systems[name]} is no folder")
    run_json, own = common.read_run(run), dict(model=common.TEXT, base_digest=common.TEXT)
    for folder in filter(None, systems.values()):
        if (folder / "log.jsonl").exists() and not (folder / "policy.json").exists():
            stop(f"{folder}: no policy.json, its training has not finished; run the same command of 05 or 06 again")
        about = common.read_json(folder / "policy.json", own) if (folder / "policy.json").exists() else None
        if about and (about["model"], about["base_digest"]) != (run_json["model"], run_json["checkpoint_digest"]):
            stop(f"{folder}: a policy of {about['model']} tuned from another base than this run's; use its own run")
        if about and folder.parent == run:
            common.require(run, f"{folder.name}/policy.pt")
    for name, folder in DEFAULTS.items():
        if not args.only and name not in systems:
            print(f"{name}: left out, {run / folder} does not exist")
    if not systems:
        stop("--only: give --systems too, at least one")
    if args.against not in ("base", *systems):
        stop(f"--against {args.against}: is none of the systems ({', '.join(systems)}); name it under --systems too")
    return {name: systems[name] for name in sorted(systems, key=[*DEFAULTS, *systems].index)}


def evaluated_before(run, args):
    """Systems besides the default four that the last evaluation of this split had, and whose folders are there."""
    file = run / f"07_systems{'' if args.split == 'test' else f'_{args.split}'}.json"
    fields = dict(name=common.NAME, folder=common.maybe(common.PATH))
    rows = common.read_json(file, {"systems": common.LIST})["systems"] if file.exists() else []
    rows = [common.check(row, fields, file) for row in rows]
    found = {row["name"]: run / row["folder"] for row in rows if row.get("folder") and row["name"] not in DEFAULTS}
    return {name: folder for name, folder in found.items() if folder.is_dir()}


def is_policy(name, folder):
    return name == "base" or (folder is not None and (folder / "policy.json").exists())


def block_of(clips):
    """{clip id: name of its block}, for files that hold several clips."""
    return {clip["id"]: f"{clip['split']}_{i // BLOCK_CLIPS:05d}" for i, clip in enumerate(clips)}


def encode_clips(model, run, clips, measures, args, ranks):
    """Features of these clips, memory-mapped from the store, after encoding what is not there yet, groups divided over
    the ranks: {clip id: dict}. The scorers' video towers see a video in the same pass, so that it is decoded once."""
    groups = {}
    for clip, group in zip(clips, block_of(clips).values()):
        groups.setdefault(group, []).append(clip)
    names = scorers_asked(measures) if model.reads_video else ()
    mine = dict(list(groups.items())[ranks.rank :: ranks.world])
    common.see(run, mine, names, args.weights, ranks, args.workers, model=model)
    return common.embedded(run, groups, common.MODEL, args.weights, model)


def generate(run, name, folder, model, features, clips, args, ranks):
    """One audio per clip of a policy, 07_audio/<name>/<clip>.wav; what exists from the same policy is kept."""
    rank, world, device = ranks
    run_json, out = common.read_run(run), audio_folder(run, name, args)
    policy = run_json["checkpoint_digest"] if folder is None else common.digest(folder / "policy.pt")
    settings = dict(policy=policy, guidance=args.guidance, steps=run_json["sampler"]["steps"], seed=run_json["seed"])
    record, wavs = out / "settings.json", {c["id"]: out / f"{c['id']}.wav" for c in clips}
    old = [wav for wav in wavs.values() if wav.exists()]
    if old and not record.exists():
        stop(f"{out}: holds audio that stage 07 did not make; move it away, or evaluate it as --systems NAME=DIR")
    stale = old if old and common.read_json(record) != settings else []  # of another policy
    todo = [c for c in clips if c["id"] in features and (stale or not wavs[c["id"]].exists())]
    if folder is not None and todo:
        model.load_policy(folder / "policy.pt")
    common.barrier()  # every rank has seen the same
    if rank == 0:
        for wav in stale:
            wav.unlink()
        common.write_json(record, settings)
    common.barrier()
    todo = todo[rank::world]
    bar = tqdm(range(0, len(todo), args.batch_clips), desc=name, unit="batch", disable=rank > 0 or not todo)

    def write(batch, a_0):  # while the next batch is sampled
        for clip, wave in zip(batch, model.decode(a_0)):
            common.write_audio(wavs[clip["id"]], wave, model.sample_rate_hz)

    def batches():
        for start in bar:
            batch = todo[start : start + args.batch_clips]
            stacked = {
                k: torch.stack([features[c["id"]][k] for c in batch]).to(device) for k in features[batch[0]["id"]]
            }
            seeds = [common.seed_of(run_json["seed"], c["id"], 0) for c in batch]
            yield batch, common.sample(model, stacked, seeds, run_json["sampler"]["steps"], args.guidance)

    for _ in common.in_threads(lambda made: write(*made), batches(), 1):
        pass
    common.barrier()


def audio_folder(run, name, args):
    """Audio at another guidance than the run's is kept apart."""
    usual = common.read_run(run)["sampler"]["guidance"]
    return run / "07_audio" / (name if args.guidance == usual else f"{name}@{args.guidance:g}")


def audio_files(run, name, folder, clips, args):
    """{clip id: audio path} of what a system has."""
    if name == "ground_truth":
        return {clip["id"]: clip["path"] for clip in clips}
    if not is_policy(name, folder):
        suffixes = [case for suffix in AUDIO_SUFFIXES for case in (suffix, suffix.upper())]
        names = {c["id"]: [folder / (c["id"] + suffix) for suffix in suffixes] for c in clips}
        found = {clip: next((path for path in paths if path.exists()), None) for clip, paths in names.items()}
        return {clip: path for clip, path in found.items() if path}
    out = audio_folder(run, name, args)
    return {c["id"]: out / f"{c['id']}.wav" for c in clips if (out / f"{c['id']}.wav").exists()}


def below(run, path):
    """A path as the files of a run name it: relative to the run folder, absolute where it lies elsewhere."""
    path, run = Path(path).resolve(), run.resolve()
    return str(path.relative_to(run) if path.is_relative_to(run) else path)


# ------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------


def measures_asked(run, args):
    """{metric: (how, scorer, key)}, without the judges that nobody asked."""
    scorers = common.scorers_of(run, args.weights)
    if unknown := set(args.judge) - set(scorers.judges):
        stop(f"--judge {unknown.pop()}: the scorers of this run know no such judge ({', '.join(scorers.judges)})")
    return {m: x for m, x in scorers.measures.items() if x[1] not in scorers.judges or x[1] in args.judge}


def scorers_asked(measures):
    return list(dict.fromkeys([*common.AUDIOSCORE_SCORERS, *(scorer for _, scorer, _ in measures.values())]))


def rehearse(run, systems, clips, measures, args):
    """What an evaluation would find: audio of each system for the clips of the split, and files that are missing."""
    for name, folder in systems.items():
        have, named = audio_files(run, name, folder, clips, args), set()
        if folder and not is_policy(name, folder):
            named = {file.stem for file in folder.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES}
        foreign = sorted(named - {clip["id"] for clip in clips})
        made = f", {len(clips) - len(have)} will be generated" if is_policy(name, folder) else ""
        other = f"; {len(foreign)} files name no clip of this split, first {foreign[0]}" if foreign else ""
        print(f"{name}: audio for {len(have)} of {len(clips)} {args.split} clips{made}{other}")
    scorers = common.scorers_of(run, args.weights)
    common.print_missing(scorers.root, [f for name in scorers_asked(measures) for f in scorers.classes[name].files])


def score_systems(run, files, clips, measures, args, ranks):
    """Everything the scorers say of every system: {system: {scorer: {key: (n, ...)}}}, rows in the order of
    files[system]; each audio once, each video tower once per clip."""
    names = scorers_asked(measures)
    group, by_id = block_of(clips), {clip["id"]: clip for clip in clips}
    audios = {
        system: {c: common.Audio(by_id[c], path, common.digest(path), group[c]) for c, path in paths.items()}
        for system, paths in files.items()
    }
    # clip by clip: a video tower runs once for all systems
    by_clip = [part[clip] for clip in by_id for part in audios.values() if clip in part]
    common.fill_store(run, by_clip, names, args.weights, ranks, args.workers)
    if ranks.rank > 0:
        return {}
    return {s: common.stored_scores(run, [*part.values()], names, args.weights) for s, part in audios.items()}


def per_clip(run, found, clips, files, measures, against="base"):
    """Metrics that are means over clips: {system: {metric: (n,) float64, nan where absent}}, rows = clips; and what
    the set metrics need: {system: {metric: (embedding or logits, row of each clip or -1)}}."""
    people, judge = common.people_of(run), run / "02_audioscore.pt"
    audioscore = AudioScore.load(judge) if judge.exists() else None
    means, sets = {}, {}
    for system, part in found.items():
        row = {clip: i for i, clip in enumerate(files[system])}
        rows = np.array([row.get(clip["id"], -1) for clip in clips])
        values = {metric: part[scorer][key] for metric, (how, scorer, key) in measures.items() if how == "mean"}
        if audioscore:
            values["p_good"] = audioscore(common.five_scores(part, audioscore))[:, 0]
        if people:
            by_id = {clip["id"]: clip for clip in clips}
            oracle = people.oracle_scores(run, [(by_id[clip], path) for clip, path in files[system].items()])
            values |= {metric: value for metric, value in oracle.items() if metric in METRICS}
        means[system] = {m: np.where(rows >= 0, np.asarray(v, np.float64)[rows], np.nan) for m, v in values.items()}
        of_set = {metric: part[scorer][key] for metric, (how, scorer, key) in measures.items() if how in ("fd", "is")}
        sets[system] = {metric: (value.numpy(), rows) for metric, value in of_set.items()}
    for system, part in found.items():
        if "ground_truth" in found and system != "ground_truth":
            truth, both = found["ground_truth"], {s: sets[s]["is"][1] for s in ("ground_truth", system)}
            have = np.flatnonzero((both["ground_truth"] >= 0) & (both[system] >= 0))
            a, b = both["ground_truth"][have], both[system][have]
            for metric, (how, scorer, key) in measures.items():
                if how == "kl":
                    means[system][metric] = np.full(len(clips), np.nan)
                    means[system][metric][have] = kl_divergence(truth[scorer][key][a], part[scorer][key][b])
        if "p_good" in means[system] and against in means:
            ours, theirs = means[system]["p_good"], means[against]["p_good"]
            wins = (ours > theirs + TIE) + 0.5 * (np.abs(ours - theirs) <= TIE)
            means[system]["win_rate"] = np.where(np.isfinite(ours) & np.isfinite(theirs), wins, np.nan)
    return means, sets


def results_of(means, sets, n, against="base"):
    """Lines of 07_results.jsonl."""
    lines, truth = [], sets.get("ground_truth")
    for system in means:
        compared = system != against and against in means

        def line(metric, value, low, high, count, diff, system=system):
            better = METRICS.get(metric, Metric(metric)).better
            keys = ("value", "low", "high", "n", "diff", "diff_low", "diff_high", "verdict")
            numbers = dict(zip(keys, (value, low, high, count, *diff, verdict(better, *diff))))
            return {"system": system, "metric": metric, "better": better, **numbers}

        for metric, values in means[system].items():
            value = float(np.nanmean(values)) if np.isfinite(values).any() else None
            diff = (None, None, None)
            if compared and metric in means[against]:
                gap = values - means[against][metric]
                if np.isfinite(gap).any():
                    diff = (float(np.nanmean(gap)), *bootstrap(gap))
            lines.append(line(metric, value, *bootstrap(values), int(np.isfinite(values).sum()), diff))
        for metric in sets[system]:
            if metric != "is" and (truth is None or system == "ground_truth"):
                continue

            def statistic(index, metric=metric, system=system):
                embedding, rows = sets[system][metric]
                if metric == "is":  # shuffled once, then clips are left out: else every replicate has other splits
                    have = np.flatnonzero(rows >= 0)[shuffled((rows >= 0).sum())]
                    return inception_score(embedding, order=rows[have[np.isin(have, index)]])
                reference, places = truth[metric]
                index = index[(rows[index] >= 0) & (places[index] >= 0)]  # av-benchmark: the clips that both have
                return frechet_distance(embedding[rows[index]], reference[places[index]])

            def difference(index, statistic=statistic, metric=metric, system=system):
                both = (sets[system][metric][1][index] >= 0) & (sets[against][metric][1][index] >= 0)  # paired
                ours, theirs = statistic(index[both]), statistic(index[both], system=against)
                return None if ours is None or theirs is None else ours - theirs

            count = int((sets[system][metric][1] >= 0).sum())
            diff = jackknife(difference, n) if compared else (None, None, None)
            lines.append(line(metric, *jackknife(statistic, n), count, diff))
    order = list(describe(row["metric"] for row in lines))
    return sorted(lines, key=lambda row: (list(means).index(row["system"]), order.index(row["metric"])))


def verdict(better, diff, low, high):
    """`better`, `worse`, or None where the interval of the difference is absent or holds 0."""
    if low is None or low <= 0 <= high:
        return None
    return "better" if (diff > 0) == (better == "higher") else "worse"


def main(args):
    # -- setup
    ranks = common.setup_ranks()
    run = Path(args.run_dir)
    run_json, clips = common.read_run(run), common.read_clips(run, args.split)
    if not clips:
        stop(f"{run}/clips.jsonl has no clip of the split {args.split}; give some that split in stage 01's --clips")
    common.hold(run, "07", ranks)
    systems, measures = choose_systems(run, args), measures_asked(run, args)
    if (run / "02_settings.json").exists():
        common.require(run, "02_audioscore.pt")
    unseen, fields = run / "01_missing.jsonl", dict(id=common.NAME, split=common.TEXT, reason=common.TEXT)
    unseen = common.read_jsonl(unseen, fields) if unseen.exists() else []

    # -- audio
    if args.dry_run:
        return rehearse(run, systems, clips, measures, args)
    if any(is_policy(name, folder) for name, folder in systems.items()):
        model = common.load_base_model(run, ranks.device, args.weights)
        if args.compile:
            model.compile_sampling()
        features = encode_clips(model, run, clips, measures, args, ranks)
        for name, folder in systems.items():  # base comes before any policy replaces its weights
            if is_policy(name, folder):
                generate(run, name, folder, model, features, clips, args, ranks)
        del model
    files = {name: audio_files(run, name, folder, clips, args) for name, folder in systems.items()}
    heard = common.listen(run, [path for paths in files.values() for path in paths.values()], run_json["clip_s"], ranks)
    files = {name: {c: p for c, p in paths.items() if heard[p] is not None} for name, paths in files.items()}
    for name, paths in files.items():
        if len(paths) < len(clips):
            missing = next(c["id"] for c in clips if c["id"] not in paths)
            said = f"{name}: audio for {len(paths)} of {len(clips)} {args.split} clips, first missing {missing}"
            if not paths or not args.allow_missing:
                stop(f"{said}; complete it, or evaluate what there is with --allow-missing")
            print(said)

    # -- numbers
    found = score_systems(run, files, clips, measures, args, ranks)
    if ranks.rank > 0:
        return
    results = results_of(*per_clip(run, found, clips, files, measures, args.against), len(clips), args.against)

    # -- save
    by = {"clap": " ".join(common.scorers_of(run, args.weights).classes["clap"].files[:1])}
    suffix = ("" if args.split == "test" else "_val") + ("" if args.against == "base" else f"_{args.against}")
    common.write_jsonl(run / f"07_results{suffix}.jsonl", results)
    rows, remark = common.table_1(run_json, results, list(systems))
    about = dict(split=args.split, guidance=args.guidance, steps=run_json["sampler"]["steps"])
    about["systems"] = [
        dict(name=name, folder=folder and below(run, folder), audio={c: below(run, p) for c, p in files[name].items()})
        for name, folder in systems.items()
    ]
    metrics = describe(row["metric"] for row in results)
    about["metrics"] = {name: metric._asdict() | {"by": by.get(name)} for name, metric in metrics.items()}
    about["paper"] = dict(columns=[METRICS[m].column for m in PAPER_COLUMNS], rows=rows, remark=remark)
    common.write_json(run / f"07_systems{suffix}.json", about)
    silent = {name: sum(heard[p] < common.SILENT_PEAK for p in paths.values()) for name, paths in files.items()}
    said = {name: f" ({count} silent)" if count else "" for name, count in silent.items()}
    coverage = [f"{name} {len(paths)}/{len(clips)}{said[name]}" for name, paths in files.items()]
    print(f"{args.split} split, guidance {args.guidance:g}; clips with audio: {', '.join(coverage)}")
    if gone := sum(row["split"] == args.split for row in unseen):
        print(f"{gone} more listed {args.split} clips have no video (01_missing.jsonl), so no system is judged on them")
    common.print_table(results, list(systems), args.against)
    tuned = [name for name, folder in systems.items() if name not in DEFAULTS and is_policy(name, folder)]
    if tuned and args.split == "test":
        print(f"warning: {', '.join(tuned)} on the test split; choose on --split val, test is for what is frozen")
    print(f"CLAP by {by['clap']}")
    for line in common.hacked(results):
        print(line)
    for name, count in silent.items():
        if name != "ground_truth" and count > 0.01 * len(files[name]):
            print(f"warning: {count} of {len(files[name])} audios of {name} are silent or broken, and scored as that")
    common.print_table_1(rows, remark)
    print(f"\nwrote {run / f'07_results{suffix}.jsonl'}")
    if args.split == "test":
        print(f"next: python 08_listen.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
