"""Stage 07: the metrics of Tables 1 and 2, with intervals (Sec. 3.1-3.2). Stage 08 makes the page.

Run:
    python 07_evaluate.py                                      # ground truth, base, Flow-DPO, DDPO on the test split
    python 07_evaluate.py --split val --systems ground_truth base no_human=05_no_human     # exactly these
    python 07_evaluate.py --run-dir runs/vgg --systems ground_truth thinksound=DIR         # a folder of audio files
    torchrun --standalone --nproc_per_node 8 07_evaluate.py --run-dir runs/vgg

Reads:
    clips.jsonl, 01_missing.jsonl, 02_audioscore.pt, policy folders of the run, and folders of audio named by clip id
    (any common format)
Writes:
    07_clips/<split>_00003.*.pt      what encoders and scorers saw of the clips' videos, once for all systems
    07_audio/<system>/<clip>.wav     one audio per clip, from the clip's own seed: systems share their noise
    07_scores/<system>/<split>_00003.*.pt    what every scorer said, by block of 32 clips
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
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

import common
from common import AudioScore, files, media, number, ranks, record, rows, scoring, stop, training

DEFAULT_SYSTEMS = {"ground_truth": None, "base": None, "flow_dpo": "05_flow_dpo", "ddpo": "06_ddpo"}
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4", ".opus")
TIE = 1e-6  # of P(Good): what rounding may make of one and the same audio


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io = parser.io
    io.add_argument(
        "--split", choices=("val", "test"), default="test", help="val is for your own choices"
    )
    described = "exactly these: ground_truth, base, a policy folder of the run, a folder of audio named by clip id"
    io.add_argument("--systems", nargs="+", default=[], metavar="NAME[=DIR]", help=described)
    io.add_argument(
        "--against",
        default="base",
        metavar="NAME",
        help="the system that the others are compared with",
    )
    io.add_argument(
        "--allow-missing",
        action="store_true",
        help="evaluate a system that lacks audio for some clips",
    )
    described = (
        "a scorer outside AudioScore, since a policy may gain on AudioScore's own alone: audiobox"
    )
    io.add_argument("--judge", nargs="+", default=[], metavar="NAME", help=described)
    described = (
        "check systems and weights, print what audio there is, and end before any is made or scored"
    )
    io.add_argument("--dry-run", action="store_true", help=described)
    io.add_argument("--weights", default="weights", help="folder of downloaded files")
    parser.paper.add_argument(
        "--guidance", type=number(float, 0), default=4.5, help="guidance scale gamma [Sec. 3.1]"
    )
    engineering = parser.engineering
    engineering.add_argument(
        "--batch-clips", type=number(int, 1), default=16, help="clips sampled together"
    )
    common.compile_flag(parser)
    common.workers_flag(parser)
    return common.parse(parser, argv, "07")


# --------------------------------------------------------------------------------------------------
# Metrics, to av-benchmark's definitions
# --------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """FD between Gaussians fitted to a (n, d) and b (m, d): |mu_a - mu_b|^2 + tr(A + B - 2 (A
    B)^(1/2)), unbiased covariances, float64. Fewer audios than dimensions: defined, biased upwards.
    None below two audios."""
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    if len(a) < 2 or len(b) < 2:
        return None
    cov_a = a.T.cov().reshape(a.shape[1], a.shape[1])
    cov_b = b.T.cov().reshape(b.shape[1], b.shape[1])
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = (
        torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    )  # tr (A B)^(1/2), by similarity
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.item()


def kl_divergence(truth, generated):
    """KL(ground truth || generated) of the softmax class distributions, per clip; logits (n,
    classes) -> (n,) nats."""
    log_p = torch.as_tensor(truth).double().log_softmax(dim=1)
    log_q = torch.as_tensor(generated).double().log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy()


def shuffled(n, seed=2020):
    return np.random.RandomState(seed).permutation(n)  # noqa: NPY002, av-benchmark's generator


def inception_score(logits, splits=10, order=None):
    """exp of the mean KL(p(y|a) || p(y)), per split of a seeded shuffle, mean over splits. None
    below 10 audios."""
    order = shuffled(len(logits)) if order is None else order
    if len(order) < splits:
        return None
    log_p = torch.as_tensor(logits)[order].double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        marginal = part.logsumexp(dim=0) - np.log(len(part))
        divergence = (part.exp() * (part - marginal)).nan_to_num(0.0).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


def bootstrap(values, resamples=2000, seed=0):
    """95 % percentile interval of the mean over clips; values (n,), nan = the metric does not apply
    to the clip. None below two clips, which have no spread."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, (100, n))].mean(axis=1) for _ in range(resamples // 100)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def jackknife(statistic, n, blocks=20, seed=0):
    """95 % interval of a set metric by deleting one of 20 blocks of clips at a time (a bootstrap of
    FD would exclude its own value: resampled sets have fewer distinct clips). statistic: indices of
    clips -> float or None. Returns its value for all n clips, low and high."""
    value = statistic(np.arange(n))
    block = np.random.default_rng(seed).permutation(n) % blocks
    parts = [statistic(np.flatnonzero(block != i)) for i in range(min(blocks, n))]
    if value is None or len(parts) < 2 or any(part is None for part in parts):
        return value, None, None
    parts = np.array(parts)
    error = np.sqrt((len(parts) - 1) / len(parts) * np.square(parts - parts.mean()).sum())
    reach = float(stats.t.ppf(0.975, len(parts) - 1) * error)
    return value, value - reach, value + reach


def verdict(better, diff, low, high):
    """`better`, `worse`, or None where the interval of the difference is absent or holds 0."""
    if low is None or low <= 0 <= high:
        return None
    return "better" if (diff > 0) == (better == "higher") else "worse"


# --------------------------------------------------------------------------------------------------
# How they are shown, and the paper's Table 1
# --------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    column: str
    better: str = "higher"
    decimals: int = 3
    times: int = 1  # shown times this

    def text(self, value, sign=""):
        return "-" if value is None else f"{value * self.times:{sign}.{self.decimals}f}"


METRICS = {
    "fd_passt": Metric("FD_PaSST", "lower", 2),
    "fd": Metric("FD", "lower", 2),
    "kl_panns": Metric("KL_PANNs", "lower", 2),
    "kl_passt": Metric("KL_PaSST", "lower", 2),
    "kl": Metric("KL", "lower", 2),
    "is": Metric("IS", "higher", 2),
    "ib": Metric("IB x100", "higher", 2, 100),
    "clap": Metric("CLAP x100", "higher", 2, 100),
    "desync_s": Metric("DeSync s", "lower"),
    "p_good": Metric("P(Good)"),
    "win_rate": Metric("wins"),
    "audiobox_pq": Metric("audiobox PQ", "higher", 2),
    "audiobox_pc": Metric("audiobox PC", "lower", 2),
    "audiobox_ce": Metric("audiobox CE", "higher", 2),
    "audiobox_cu": Metric("audiobox CU", "higher", 2),
    "judge_semantic": Metric("judge: semantic"),
    "judge_sync_s": Metric("judge: sync s", "lower", 4),
    "judge_aesthetic": Metric("judge: aesthetic"),
    "oracle_semantic": Metric("oracle: semantic"),
    "oracle_sync_s": Metric("oracle: sync s", "lower", 4),
    "oracle_floor_db": Metric("oracle: floor dB", "lower", 2),
    "oracle_aesthetic": Metric("oracle: aesthetic"),
}
PAPER_COLUMNS = ("fd_passt", "kl_panns", "kl_passt", "is", "ib", "desync_s")
PAPER = {  # Table 1, VGGSound test
    "Seeing&Hearing": (219.01, 2.26, 2.30, 8.58, 33.99, 1.20),
    "V-AURA": (218.50, 2.42, 2.07, 10.08, 27.64, 0.65),
    "FoleyCrafter": (140.09, 2.30, 2.23, 15.68, 25.68, 1.23),
    "V2A-Mapper": (84.57, 2.69, 2.56, 12.47, 22.58, 1.23),
    "ThinkSound": (54.92, 1.32, 1.52, 16.03, 34.13, 0.46),
    "Frieren": (106.10, 2.73, 2.86, 12.25, 22.78, 0.85),
    "Frieren-DDPO": (75.41, 2.58, 2.61, 13.12, 23.19, 0.65),
    "Frieren-DPO": (69.98, 2.55, 2.63, 13.98, 24.11, 0.62),
    "MMAudio": (60.60, 1.65, 1.40, 17.40, 33.22, 0.44),
    "MMAudio-DDPO": (54.81, 1.42, 1.36, 18.34, 33.89, 0.39),
    "MMAudio-DPO": (51.38, 1.38, 1.34, 19.21, 34.08, 0.35),
}
TOLERANCE = "tolerance: a repeated evaluation of one MMAudio model drifted by 0.69 FD_PaSST and 0.006 s DeSync"


def metric_of(name):
    """One that a scorer of the user's brings is shown as it comes."""
    return METRICS.get(name, Metric(name))


def in_order(names):
    """Metrics in the table's order, those of a user's own scorer last."""
    names = dict.fromkeys(names)
    return [name for name in METRICS if name in names] + [
        name for name in names if name not in METRICS
    ]


def print_table(results, systems, against="base"):
    """Values, then differences to one of the systems with 95 % intervals; better and worse mark
    intervals without 0."""
    cell = {(row.metric, row.system): row for row in results}
    metrics = in_order(row.metric for row in results)
    print("\n" + f"{'':<18}" + "".join(f"{system[:14]:>15}" for system in systems))
    for name in metrics:
        metric = metric_of(name)
        arrow = "^" if metric.better == "higher" else "v"
        line = f"{metric.column + ' ' + arrow:<18}"
        for system in systems:
            text = metric.text(cell[name, system].value) if (name, system) in cell else ""
            line += f"{text:>15}"
        print(line)
    others = [system for system in systems if system not in (against, "ground_truth")]
    if against not in systems or not others:
        return
    print(
        f"\n{f'minus {against[:14]}, 95 % interval':<29}"
        + "".join(f"{system[:24]:>36}" for system in others)
    )
    for name in metrics:
        line = f"{metric_of(name).column:<29}"
        for system in others:
            line += f"{difference_text(cell.get((name, system))):>36}"
        print(line)
    print(
        "intervals over clips, one training seed: another seed may move a policy by more than they "
        "are wide"
    )


def difference_text(row):
    if row is None or row.diff is None:
        return ""
    metric = metric_of(row.metric)
    diff = metric.text(row.diff, "+")
    low = metric.text(row.diff_low, "+")
    high = metric.text(row.diff_high, "+")
    return f"{diff} [{low}, {high}] {row.verdict or '':<6}"


def print_hacked(results, systems):
    """A line for each system that gains on AudioScore and loses by who is no part of it: a judge,
    the toy's oracle."""
    for system in systems:
        own = [row for row in results if row.system == system]
        gains = any(row.metric == "p_good" and row.verdict == "better" for row in own)
        lost = [row.metric for row in own if row.verdict == "worse" and is_outside(row.metric)]
        if gains and lost:
            print(
                f"warning: {system} gains on AudioScore and loses on {', '.join(lost)}: is it "
                "gaming its reward?"
            )


def is_outside(metric):
    """Whether it is no part of AudioScore."""
    return metric.startswith(("audiobox_", "judge_", "oracle_"))


def paper_twin(system, model):
    """The row of Table 1 that a system repeats: base, flow_dpo and ddpo of the two models that the
    paper tunes, and any system named like a row (mmaudio=DIR). None for others."""
    family = {"mmaudio:large_44k": "MMAudio", "frieren": "Frieren"}.get(model)
    ending = {"base": "", "flow_dpo": "-DPO", "ddpo": "-DDPO"}.get(system)
    if family is not None and ending is not None:
        return family + ending
    for name in PAPER:
        if letters(name) == letters(system):
            return name
    return None


def letters(name):
    return "".join(filter(str.isalnum, name)).lower()


def table_1(run_json, results, systems):
    """The paper's rows, then ours, then each of ours minus the paper's own: [(label, six texts)],
    and a remark. In the toy world only MMAudio's rows, without ours: only the signs of the
    differences compare."""
    of_paper = [(name, [f"{value:.2f}" for value in row]) for name, row in PAPER.items()]
    if run_json.scorers != "real":  # not the paper's
        shown = [row for row in of_paper if row[0].startswith("MMAudio")]
        return (
            shown,
            "another world and other scorers: compare the signs of the differences, not the "
            "numbers",
        )
    value = {(row.system, row.metric): row.value for row in results}
    shown = of_paper
    for system in systems:
        if system == "ground_truth":
            continue
        ours = [value.get((system, metric)) for metric in PAPER_COLUMNS]
        shown.append((f"here: {system}", [METRICS[m].text(x) for m, x in zip(PAPER_COLUMNS, ours)]))
        twin = paper_twin(system, run_json.model)
        if twin is not None:
            texts = []
            for metric, mine, printed in zip(PAPER_COLUMNS, ours, PAPER[twin]):
                drift = None if mine is None else mine - printed / METRICS[metric].times
                texts.append(METRICS[metric].text(drift, "+"))
            shown.append((f"  minus the paper's {twin}", texts))
    return shown, TOLERANCE


def print_table_1(shown, remark):
    columns = "".join(f"{METRICS[metric].column:>11}" for metric in PAPER_COLUMNS)
    print(f"\nthe paper (Table 1, VGGSound test){columns}")
    for name, texts in shown:
        print(f"{name[:34]:<34}" + "".join(f"{text:>11}" for text in texts))
    print(f"({remark})")


# --------------------------------------------------------------------------------------------------
# Systems and their audio
# --------------------------------------------------------------------------------------------------


def choose_systems(run, args):
    """{name: folder, or None for ground truth and base}, in the order of the table."""
    systems = {}
    for item in args.systems:
        name, _, folder = item.partition("=")
        if not name.replace("_", "").replace("-", "").isalnum() or not files.is_name(name):
            stop(
                f"--systems {item}: a name has letters, digits, _ and -, and at most "
                f"{files.LONGEST_NAME} bytes"
            )
        if name in systems:
            stop(
                f"--systems {item}: the name {name} is given twice; choose another for one of them"
            )
        if folder and name in ("ground_truth", "base"):
            stop(f"--systems {item}: {name} comes from the run itself; choose another name")
        systems[name] = folder_of(run, item, name, folder)
    if not systems:
        for name, folder in DEFAULT_SYSTEMS.items():
            if folder is None or (run / folder).is_dir():
                systems[name] = folder and run / folder
            else:
                print(f"{name}: left out, {run / folder} does not exist")
    if args.against not in ("base", *systems):
        stop(
            f"--against {args.against}: is none of the systems ({', '.join(systems)}); name it "
            "under --systems too"
        )
    return {name: systems[name] for name in sorted(systems, key=[*DEFAULT_SYSTEMS, *systems].index)}


def folder_of(run, item, name, folder):
    """What `NAME` or `NAME=DIR` of --systems means."""
    if name in ("ground_truth", "base"):
        return None
    if folder:
        path = run / folder if (run / folder).is_dir() else Path(folder)
    elif name in DEFAULT_SYSTEMS:
        path = run / DEFAULT_SYSTEMS[name]
    elif (run / name / "policy.json").exists():
        path = run / name
    else:
        stop(f"--systems {item}: give NAME=DIR, or the name of a policy folder of {run}")
    if not path.is_dir():
        stop(f"--systems {item}: {path} is no folder")
    return path


def check_policies(run, run_json, systems):
    """Every policy among the systems is finished and tuned from this run's model. Returns the names
    of those of this run, whose records are followed."""
    names = []
    for folder in systems.values():
        if folder is None:
            continue
        if (folder / "log.jsonl").exists() and not (folder / "policy.json").exists():
            stop(
                f"{folder}: no policy.json, its training has not finished; run the same command of "
                "05 or 06 again"
            )
        if not (folder / "policy.json").exists():
            continue
        policy = rows.read_json(folder / "policy.json", rows.Policy)
        if (policy.model, policy.base_digest) != (run_json.model, run_json.checkpoint_digest):
            stop(
                f"{folder}: a policy of {policy.model} tuned from another base than this run's; "
                "use its own run"
            )
        if folder.parent == run:
            names.append(f"{folder.name}/policy.pt")
    return names


def is_policy(name, folder):
    return name == "base" or (folder is not None and (folder / "policy.json").exists())


def audio_folder(run, run_json, name, guidance):
    """Audio at another guidance than the run's is kept apart."""
    usual = guidance == run_json.sampler.guidance
    return run / "07_audio" / (name if usual else f"{name}@{guidance:g}")


def generate(run, run_json, name, folder, model, features, clips, here, args):
    """One audio per clip of a policy, 07_audio/<name>/<clip>.wav; what is there of the same policy
    is kept.

    features: {clip id: its features}, of the clips whose video can be used.
    """
    out = audio_folder(run, run_json, name, args.guidance)
    policy = run_json.checkpoint_digest if folder is None else files.digest(folder / "policy.pt")
    settings = {
        "policy": policy,
        "guidance": args.guidance,
        "steps": run_json.sampler.steps,
        "seed": run_json.seed,
    }
    made = rows.Record(settings=settings, inputs={})
    file = out / "settings.json"
    wav_of = {clip.id: out / f"{clip.id}.wav" for clip in clips}
    old = [wav for wav in wav_of.values() if wav.exists()]
    if old and not file.exists():
        stop(
            f"{out}: holds audio that stage 07 did not make; move it away, or evaluate it as "
            "--systems NAME=DIR"
        )
    stale = (
        old if old and rows.read_json(file, rows.Record) != made else []
    )  # of another policy, or sampled otherwise
    todo = [
        clip for clip in clips if clip.id in features and (stale or not wav_of[clip.id].exists())
    ]
    if todo and folder is not None:
        model.load_policy(folder / "policy.pt")  # before any audio goes: it may be another model's
    ranks.barrier()  # every rank has seen the same
    if here.first:
        for wav in stale:
            wav.unlink()
        rows.write_json(file, made)
    ranks.barrier()
    batches = [todo[i : i + args.batch_clips] for i in range(0, len(todo), args.batch_clips)]
    todo = [
        clip for batch in here.share(batches) for clip in batch
    ]  # whole ones: other sizes may round otherwise

    def write(clip, latents, waves):
        media.write_audio(wav_of[clip.id], waves[0], model.sample_rate_hz)

    def seeds_of(clip):
        return [common.seed_of(run_json.seed, clip.id, 0)]

    sampler = rows.Sampler(steps=run_json.sampler.steps, guidance=args.guidance)
    title = name if here.first and todo else None
    for _ in common.sample_clips(
        model, todo, features, seeds_of, write, sampler, args.batch_clips, title
    ):
        pass
    ranks.barrier()


def audio_files(run, run_json, name, folder, clips, guidance):
    """[(clip, audio file), ...] of what a system has."""
    if name == "ground_truth":
        return [(clip, clip.path) for clip in clips]
    suffixes = [".wav"]
    if is_policy(name, folder):
        folder = audio_folder(run, run_json, name, guidance)
    else:
        suffixes = [*AUDIO_SUFFIXES, *map(str.upper, AUDIO_SUFFIXES)]
    found = []
    for clip in clips:
        for suffix in suffixes:
            file = folder / f"{clip.id}{suffix}"
            if file.exists():
                found.append((clip, file))
                break
    return found


def rehearse(run, run_json, systems, clips, scorers, names, args):
    """What an evaluation would find: audio of each system for the clips of the split, and files
    that are missing."""
    ids = {clip.id for clip in clips}
    for name, folder in systems.items():
        have = audio_files(run, run_json, name, folder, clips, args.guidance)
        line = f"{name}: audio for {len(have)} of {len(clips)} {args.split} clips"
        if is_policy(name, folder):
            line += f", {len(clips) - len(have)} will be generated"
        elif folder is not None:
            named = {
                file.stem for file in folder.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES
            }
            foreign = sorted(named - ids)
            if foreign:
                line += f"; {len(foreign)} files name no clip of this split, first {foreign[0]}"
        print(line)
    wanted = [file for name in names for file in scorers.classes[name].files]
    common.print_missing(scorers.root, wanted)


# --------------------------------------------------------------------------------------------------
# Numbers: arrays whose rows are the clips of the split, nan where a system has no audio or a metric does not apply
# --------------------------------------------------------------------------------------------------


def clip_blocks(run, name, clips, audio_of, split):
    """A system's audios in blocks of 32 clips of the split. audio_of: {clip id: scoring.Audio}."""
    blocks = []
    for start in range(0, len(clips), scoring.BLOCK_CLIPS):
        part = clips[start : start + scoring.BLOCK_CLIPS]
        audios = [audio_of[clip.id] for clip in part if clip.id in audio_of]
        block = f"{split}_{start // scoring.BLOCK_CLIPS:05d}"
        blocks.append(
            scoring.Block(block, run / "07_scores" / name, run / "07_clips", part, audios)
        )
    return blocks


def aligned(values, places, n):
    """(m, ...) values of the clips at `places` -> (n, ...) float64 array, nan for the other
    clips."""
    full = np.full((n, *values.shape[1:]), np.nan)
    full[places] = values
    return full


def read_said(blocks, scorers, names, clips):
    """What the scorers said of a system's audios: {scorer: {name: (clips, ...) array}}."""
    place_of = {clip.id: i for i, clip in enumerate(clips)}
    places = [place_of[audio.clip.id] for block in blocks for audio in block.audios]
    said = scoring.read_scores(blocks, scorers, names)
    for columns in said.values():
        for column, values in columns.items():
            columns[column] = aligned(values.numpy(), places, len(clips))
    return said


def clip_values(said, measures, scorers, audioscore, truth):
    """Metrics that are means over clips: {metric: (clips,) array}. truth: as said, of the ground
    truth, or None."""
    values = {}
    for metric, (how, scorer, column) in measures.items():
        if how == "mean":
            values[metric] = said[scorer][column]
        elif how == "kl" and truth is not None:
            values[metric] = kl_divergence(truth[scorer][column], said[scorer][column])
    if audioscore is not None:
        five = {
            name: torch.from_numpy(column).float() for name, column in scorers.five(said).items()
        }
        p_good = audioscore(audioscore.five_scores(five))[:, 0].numpy()
        has_audio = (
            five["logits"].isfinite().all(dim=1).numpy()
        )  # the one score that applies to every audio
        values["p_good"] = np.where(has_audio, p_good, np.nan)
    return values


def oracle_values(run, people, audio_of, clips):
    """What the toy world's oracle and judge say, {metric: (clips,) array}; people: the world's, or
    None."""
    if people is None:
        return {}
    places = [i for i, clip in enumerate(clips) if clip.id in audio_of]
    said = people.oracle_scores(run, [(clips[i], audio_of[clips[i].id].path) for i in places])
    return {
        metric: aligned(values, places, len(clips))
        for metric, values in said.items()
        if metric in METRICS
    }


def win_rate(p_good, against):
    """Per clip: 1 where this system's P(Good) is higher, 1/2 for a tie; nan where one of the two is
    absent."""
    wins = (p_good > against + TIE) + 0.5 * (np.abs(p_good - against) <= TIE)
    return np.where(np.isfinite(p_good) & np.isfinite(against), wins, np.nan)


def set_value(how, ours, truth, chosen):
    """FD (of the clips that both sides have) or IS of the chosen clips. ours, truth: (clips, d)
    arrays; chosen: indices of clips. None where there are too few."""
    has_ours = np.isfinite(ours).all(axis=1)
    if how == "is":
        # Shuffled once, then clips are left out: with fresh shuffles every replicate would have
        # other splits.
        have = np.flatnonzero(has_ours)
        order = have[shuffled(len(have))]
        return inception_score(ours, order=order[np.isin(order, chosen)])
    both = chosen[has_ours[chosen] & np.isfinite(truth[chosen]).all(axis=1)]  # as av-benchmark
    return frechet_distance(ours[both], truth[both])


def mean_result(system, metric, values, against):
    """A metric that is a mean over clips. values: (clips,); against: the other system's, None for
    itself."""
    value = float(np.nanmean(values)) if np.isfinite(values).any() else None
    low, high = bootstrap(values)
    diff = (None, None, None)
    if against is not None and np.isfinite(values - against).any():
        gap = values - against
        diff = (float(np.nanmean(gap)), *bootstrap(gap))
    return result(system, metric, (value, low, high), diff, np.isfinite(values).sum())


def set_result(system, metric, how, ours, truth, against):
    """A metric of the whole set. ours, truth, against: (clips, d); against: the other system's,
    None for itself."""
    n = len(ours)

    def value(chosen):
        return set_value(how, ours, truth, chosen)

    def difference(chosen):
        both = chosen[
            np.isfinite(ours[chosen]).all(axis=1) & np.isfinite(against[chosen]).all(axis=1)
        ]  # paired
        mine = set_value(how, ours, truth, both)
        other = set_value(how, against, truth, both)
        return None if mine is None or other is None else mine - other

    diff = (None, None, None) if against is None else jackknife(difference, n)
    return result(system, metric, jackknife(value, n), diff, np.isfinite(ours).all(axis=1).sum())


def result(system, metric, value, diff, n):
    """A row of 07_results.jsonl. value, diff: (value, low, high)."""
    better = metric_of(metric).better
    return rows.Result(
        system=system,
        metric=metric,
        better=better,
        value=value[0],
        low=value[1],
        high=value[2],
        n=int(n),
        diff=diff[0],
        diff_low=diff[1],
        diff_high=diff[2],
        verdict=verdict(better, *diff),
    )


def results_of(means, sets, measures, against="base"):
    """The rows of 07_results.jsonl. means: {system: {metric: (clips,)}}; sets: {system: {metric:
    (clips, d)}}."""
    found = []
    for system in means:
        compared = against if system != against and against in means else None
        lines = []
        for metric, values in means[system].items():
            other = means[compared].get(metric) if compared else None
            lines.append(mean_result(system, metric, values, other))
        for metric, values in sets[system].items():
            how = measures[metric][0]
            truth = sets.get("ground_truth", {}).get(metric)
            if how == "fd" and (truth is None or system == "ground_truth"):
                continue
            other = sets[compared][metric] if compared else None
            lines.append(set_result(system, metric, how, values, truth, other))
        order = in_order(row.metric for row in lines)
        found += sorted(lines, key=lambda row: order.index(row.metric))
    return found


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def measures_asked(scorers, judges):
    """{metric: (how, scorer, column)}, without the judges that nobody asked; and the scorers that
    they and AudioScore need."""
    for name in judges:
        if name not in scorers.judges:
            stop(
                f"--judge {name}: the scorers of this run know no such judge "
                f"({', '.join(scorers.judges)})"
            )
    measures = {}
    for metric, (how, scorer, column) in scorers.measures.items():
        if scorer not in scorers.judges or scorer in judges:
            measures[metric] = (how, scorer, column)
    names = dict.fromkeys([*scorers.of_audioscore, *(scorer for _, scorer, _ in measures.values())])
    return measures, list(names)


def make_audio(run, run_json, systems, clips, scorers, names, here, args):
    """The audio of every policy among the systems. The model's encoders and the scorers see a video
    in one decode. Returns a function of a clip: what the encoders saw as scorers would."""
    model = common.load_base_model(run, here.device, args.weights)
    training.only_sample(model, args.compile)
    blocks = clip_blocks(run, "base", clips, {}, args.split)
    seers = [name for name in names if model.reads_video and name not in model.seen_as]
    scoring.embed_videos(
        here.share(blocks), scorers, seers, run_json.clip_s, here.device, args.workers, model
    )
    ranks.barrier()
    features = {}
    for block in blocks:
        key = scoring.features_key(model, block.clips)
        for clip_id, found in scoring.read_videos(
            block, key, scoring.FEATURES, model.feature_shapes
        ).items():
            if all(value.isfinite().all() for value in found.values()):
                features[clip_id] = found
    for name, folder in systems.items():  # base comes before any policy replaces its weights
        if is_policy(name, folder):
            generate(run, run_json, name, folder, model, features, clips, here, args)

    def known(clip):
        found = features.get(clip.id)
        return common.seen_as_scorers(model, found.__getitem__) if found else {}

    return known


def find_audio(run, run_json, systems, clips, here, args):
    """{system: {clip id: scoring.Audio}} of the audios that can be used, {system: how many of them
    are silent}."""
    usable = {}
    silent = {}
    for name, folder in systems.items():
        audio_of = {}
        for clip, file in audio_files(run, run_json, name, folder, clips, args.guidance):
            audio_of[clip.id] = scoring.Audio(clip, 0, file, files.digest(file))
        blocks = clip_blocks(run, name, clips, audio_of, args.split)
        scoring.find_peaks(here.share(blocks), run_json.clip_s)
        ranks.barrier()
        peaks = scoring.read_peaks(blocks, run_json.clip_s)
        audios = [audio for block in blocks for audio in block.audios]
        usable[name] = {
            audio.clip.id: audio for audio, peak in zip(audios, peaks) if peak.isfinite()
        }
        silent[name] = int((peaks < common.SILENT_PEAK).sum())
        missing = [clip.id for clip in clips if clip.id not in usable[name]]
        if missing:
            said = f"{name}: audio for {len(usable[name])} of {len(clips)} {args.split} clips"
            said += f", first missing {missing[0]}"
            if not usable[name] or not args.allow_missing:
                stop(f"{said}; complete it, or evaluate what there is with --allow-missing")
            print(said)
    return usable, silent


def describe_run(run, run_json, systems, usable, results, clap_file, args):
    """07_systems.json."""
    shown, remark = table_1(run_json, results, list(systems))
    listed = []
    for name, folder in systems.items():
        audio = {clip_id: files.below(run, audio.path) for clip_id, audio in usable[name].items()}
        listed.append(
            rows.System(name=name, folder=folder and files.below(run, folder), audio=audio)
        )
    metrics = {}
    for name in in_order(row.metric for row in results):
        metrics[name] = rows.ShownMetric(
            **metric_of(name)._asdict(), by=clap_file if name == "clap" else None
        )
    columns = [METRICS[metric].column for metric in PAPER_COLUMNS]
    return rows.Systems(
        split=args.split,
        guidance=args.guidance,
        steps=run_json.sampler.steps,
        systems=listed,
        metrics=metrics,
        paper=rows.PaperTable(columns=columns, rows=shown, remark=remark),
    )


def main(args):
    # -- setup
    here = ranks.setup()
    run = Path(args.run_dir)
    run_json = common.read_run(run)
    clips = common.read_clips(run, args.split)
    if not clips:
        stop(
            f"{run}/clips.jsonl has no clip of the split {args.split}; give some that split in "
            "stage 01's --clips"
        )
    scorers = common.scorers_of(run, args.weights)
    measures, names = measures_asked(scorers, args.judge)
    systems = choose_systems(run, args)
    inputs = check_policies(run, run_json, systems)
    if (run / "02_settings.json").exists():
        inputs.append("02_audioscore.pt")

    with record.stage(run, "07", inputs):
        if args.dry_run:
            rehearse(run, run_json, systems, clips, scorers, names, args)
            return

        # -- audio
        known = None
        if any(is_policy(name, folder) for name, folder in systems.items()):
            known = make_audio(run, run_json, systems, clips, scorers, names, here, args)
        usable, silent = find_audio(run, run_json, systems, clips, here, args)

        # -- scores
        blocks_of = {}
        for name in systems:
            blocks = clip_blocks(run, name, clips, usable[name], args.split)
            blocks_of[name] = [block for block in blocks if block.audios]
        blocks = [block for name in systems for block in blocks_of[name]]
        scoring.score(blocks, scorers, names, run_json.clip_s, here, args.workers, known)
        if not here.first:
            return

        # -- numbers
        has_audioscore = (run / "02_audioscore.pt").exists()
        audioscore = AudioScore.load(run / "02_audioscore.pt") if has_audioscore else None
        said = {name: read_said(blocks_of[name], scorers, names, clips) for name in systems}
        means = {}
        sets = {}
        for name in systems:
            truth = said.get("ground_truth") if name != "ground_truth" else None
            means[name] = clip_values(said[name], measures, scorers, audioscore, truth)
            means[name] |= oracle_values(run, common.people_of(run), usable[name], clips)
            sets[name] = {}
            for metric, (how, scorer, column) in measures.items():
                if how in ("fd", "is"):
                    sets[name][metric] = said[name][scorer][column]
        if audioscore is not None and args.against in means:
            for name in systems:
                means[name]["win_rate"] = win_rate(
                    means[name]["p_good"], means[args.against]["p_good"]
                )
        results = results_of(means, sets, measures, args.against)

        # -- save
        suffix = "" if args.split == "test" else f"_{args.split}"
        if args.against != "base":
            suffix += f"_{args.against}"
        clap_file = clap_file_of(scorers)
        systems_json = describe_run(run, run_json, systems, usable, results, clap_file, args)
        rows.write(run / f"07_results{suffix}.jsonl", results)
        rows.write_json(run / f"07_systems{suffix}.json", systems_json)

    print_report(run, systems, clips, usable, silent, results, systems_json, args)
    print(f"CLAP by {clap_file}")
    print(f"\nwrote {run / f'07_results{suffix}.jsonl'}")
    if args.split == "test":
        print(f"next: python 08_listen.py --run-dir {run}")


def clap_file_of(scorers):
    """CLAP has several checkpoints: which one judged."""
    scorer, _ = scorers.audioscore["clap"]
    return scorers.classes[scorer].files[0]


def print_report(run, systems, clips, usable, silent, results, systems_json, args):
    coverage = []
    for name in systems:
        text = f"{name} {len(usable[name])}/{len(clips)}"
        if silent[name]:
            text += f" ({silent[name]} silent)"
        coverage.append(text)
    print(
        f"{args.split} split, guidance {args.guidance:g}; clips with audio: {', '.join(coverage)}"
    )
    missing = rows.read_if_there(run / "01_missing.jsonl", rows.MissingClip)
    gone = sum(clip.split == args.split for clip in missing)
    if gone:
        print(
            f"{gone} more listed {args.split} clips have no video (01_missing.jsonl), so no system "
            "is judged on them"
        )
    print_table(results, list(systems), args.against)
    tuned = [
        name
        for name, folder in systems.items()
        if name not in DEFAULT_SYSTEMS and is_policy(name, folder)
    ]
    if tuned and args.split == "test":
        print(
            f"warning: {', '.join(tuned)} on the test split; choose on --split val, test is for "
            "what is frozen"
        )
    print_hacked(results, systems)
    for name in systems:
        if name != "ground_truth" and silent[name] > 0.01 * len(usable[name]):
            broken = f"{silent[name]} of {len(usable[name])} audios of {name} are silent or broken"
            print(f"warning: {broken}, and scored as that")
    print_table_1(systems_json.paper.rows, systems_json.paper.remark)


if __name__ == "__main__":
    common.launch(main, parse_args)
