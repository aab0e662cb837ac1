"""Stage 07: the metrics of Tables 1 and 2, with intervals (Sec. 3.1-3.2). Stage 08 makes the page.

Run:
    python 07_evaluate.py                            # ground truth, base, Flow-DPO, DDPO: Table 1
    python 07_evaluate.py --systems ground_truth base 05_beta200 05_beta1000     # Table 2: what 05
                                                     # made with --beta 200 --out 05_beta200 ...
    python 07_evaluate.py --split val --systems base no_human=05_no_human  # to choose settings by
    python 07_evaluate.py --against ddpo             # each system's difference to DDPO
    python 07_evaluate.py --run-dir runs/vgg --systems ground_truth thinksound=DIR     # audio files
    torchrun --standalone --nproc_per_node 8 07_evaluate.py --run-dir runs/vgg

A command replaces the numbers of the last one of the same split and --against. Which clips are val
and test says stage 01's list (--test-list: MMAudio's test set, as in the paper).

The six metrics, and CLAP (networks: adapters/scorers.py; the toy world's own: adapters/toy.py):

    fd_passt             Frechet distance of PaSST's embeddings to those of the clips' own sounds
    kl_panns, kl_passt   KL(own sound || audio) of the tags of PANNs at 16 kHz, of PaSST; mean over
                         the clips
    is                   inception score, the tags of PANNs at 16 kHz
    ib, clap, desync_s   as AudioScore has them (stage 02); mean over the clips
FD and KL need the clips' own sound, which is the system ground_truth: give it among --systems.
The paper names the metrics and takes "the same metrics in [8]", MMAudio's; so everything else about
them is av-benchmark's, one audio for each clip too. Ours are the intervals, and what is no column
of the paper: P(Good) and wins, the toy world's twin, judge and oracle, and audiobox.

Reads:
    run.json, clips.jsonl, 01_missing.jsonl, 02_audioscore.pt, the clips' videos and own sound
    policy folders of the run, and folders of audio named by clip id (any common format)
  toy world only:
    00_truth.jsonl      what happens in each clip, and when
    00_oracle.pt        the oracle's measures of an audio against that truth; the simulated people
                        rate and choose by them, so that training moves policies towards them
    00_judge.pt         the judge's measures of the same; nobody and nothing was trained by them
    00_twin.pt          a second tagger, for FD and IS; like the real scorers' PaSST it is no part
                        of AudioScore
Writes:
    07_clips/<split>_00003.*.pt    embeddings of the videos by encoders and scorers, which all
                                   systems share
    07_audio/<system>/<clip>.wav   one audio per clip, from the clip's own seed, so that all systems
                                   start from the same noise; in <system>@3 with --guidance 3, where
                                   that of stage 01 is another
    07_audio/<system>/settings.json    policy, guidance, steps and seed of that audio
    07_scores/<system>/<split>_00003.*.pt    what every scorer measured, and the peaks, one file
                                   for each block of 32 clips, here the fourth
    07_results.jsonl    system, metric, better (higher or lower), n (clips that count), value, low,
                        high (95 % interval); diff, diff_low, diff_high: the system's value minus
                        that of base (or of --against), over the same clips, null for base itself;
                        verdict: better or worse where the interval of diff excludes 0
    07_systems.json     what was evaluated: split, guidance, steps; each system's folder and its
                        audio of each clip; how metrics are shown, in the table's order; the file of
                        LAION's CLAP, of which there are several; the rows of Table 1
The last two are called 07_results[_val][_NAME].jsonl and 07_systems[_val][_NAME].json: _val with
--split val (without Table 1, which is of the test split), _NAME with --against NAME.
Takes: toy 36 s on 2 cores.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import common
from common import (
    AudioScore,
    command,
    files,
    inputs,
    media,
    ranks,
    record,
    rows,
    run_flag,
    scoring,
    stop,
    training,
)

ShownMetric = rows.ShownMetric

POLICIES = {"flow_dpo": "05_flow_dpo", "ddpo": "06_ddpo"}  # evaluated without --systems
# For `win_rate`: P(Good) of identical audio may differ by this much, by rounding, where two systems
# had it scored in blocks of other sizes.
TIE = 1e-6


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    io = parser.io.add_argument
    io("--split", choices=("val", "test"), default="test", help="choose settings on val only")
    io(
        "--systems",
        nargs="+",
        default=[],
        metavar="NAME[=DIR]",
        help="exactly these: ground_truth (FD and KL need it), base, policy folders of the run, "
        "folders of audio named by clip id; without it ground_truth, base, flow_dpo and ddpo",
    )
    io("--against", default="base", metavar="NAME", help="the system that others are compared with")
    io(
        "--allow-missing",
        action="store_true",
        help="evaluate also systems that lack the audio of some clips, on the clips that they have",
    )
    io(
        "--judge",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also ask these scorers, which are asked nowhere else, so that no policy was trained "
        "towards them: audiobox",
    )
    io(
        "--dry-run",
        action="store_true",
        help="only check the systems and the scorers' files, print what audio there is, then end",
    )
    io("--weights", default="weights", help="folder of the downloaded weights")
    paper = parser.paper.add_argument
    paper("--guidance", type=command.number(0), default=4.5, help="scale gamma [Sec. 3.1]")
    engineering = parser.engineering.add_argument
    engineering("--batch-clips", type=command.whole(1), default=16, help="clips sampled together")
    command.compile_flag(parser)
    command.workers_flag(parser)
    command.part_flag(parser)
    return command.parse(parser, argv, "07")


# --------------------------------------------------------------------------------------------------
# Metrics, as av-benchmark defines them
# --------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """FD between Gaussians fitted to a (n, d) and b (m, d), in float64; None where one of them has
    fewer than two audios.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), with unbiased covariances. With fewer audios than
    dimensions it still has a value, which is biased upwards.
    """
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    if len(a) < 2 or len(b) < 2:
        return None
    cov_a = torch.atleast_2d(a.T.cov())
    cov_b = torch.atleast_2d(b.T.cov())
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # root_a B root_a is symmetric and has the eigenvalues of A B.
    product = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_of_root = product.clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


def kl_divergence(truth, generated):
    """KL(ground truth || generated) between the softmax class distributions of each clip's two
    audios, in nats. Logits (n, classes) -> (n,)."""
    log_p = torch.as_tensor(truth).double().log_softmax(dim=1)
    log_q = torch.as_tensor(generated).double().log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy()


def inception_score(logits, splits=10):
    """exp of the mean KL(p(y|a) || p(y)) over each split's audios, then the mean over splits; None
    below 10 audios. logits: (n, classes), already in av-benchmark's order (`shuffled`)."""
    if len(logits) < splits:
        return None
    log_p = torch.as_tensor(logits).double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        log_p_y = part.logsumexp(dim=0) - np.log(len(part))
        scores.append((part.exp() * (part - log_p_y)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores))


def shuffled(n):
    """av-benchmark's order of n audios, which decides in which of the ten splits of IS each is."""
    return np.random.RandomState(2020).permutation(n)  # noqa: NPY002, av-benchmark's generator


def win_rate(p_good, against):
    """1 where this system's P(Good) is the higher one, 1/2 for a tie, 0 where it is the lower one;
    nan where a system has no audio. All are (clips,)."""
    wins = (p_good > against + TIE) + 0.5 * (np.abs(p_good - against) <= TIE)
    return np.where(np.isfinite(p_good - against), wins, np.nan)


# --------------------------------------------------------------------------------------------------
# From what the scorers measured to rows of 07_results.jsonl
#
# Of each system, for example:
#
#   read_scores   {scorer: {tensor: array}}   {"passt": {"embedding": (audios, 768)}, ...}
#   by_metric     {metric: array}             {"fd_passt": (audios, 768), ...}
#   aligned       {metric: array}             {"fd_passt": (clips, 768), ...}, nan without audio
#   clip_values   {metric: values}            {"fd_passt": (clips, 2, 768), ...}
#
# `values` of a metric are what each clip of the split contributes to it, nan where the system has
# no audio or the metric does not apply. Their shape says what the metric makes of them, and how its
# interval is found:
#
#   (clips,)             the mean over clips (KL too)               bootstrap
#   (clips, classes)     IS, of logits                              jackknife
#   (clips, 2, d)        FD, of embeddings: audio, own sound        jackknife
# --------------------------------------------------------------------------------------------------


def measures_asked(scorers, judges):
    """{metric: (how, scorer, tensor)}, such as {"fd_passt": ("fd", "passt", "embedding")}, without
    those of scorers that only --judge asks; and the names of the scorers that these metrics and
    AudioScore need. Each adapter's MEASURES lists its own."""
    for name in judges:
        if name not in scorers.judges:
            stop(
                f"--judge {name}: the scorers of this run know no such judge "
                f"({', '.join(scorers.judges)})"
            )
    unasked = set(scorers.judges) - set(judges)
    measures = {}
    names = dict.fromkeys(scorers.of_audioscore)
    for metric, measure in scorers.measures.items():
        _, scorer, _ = measure
        if scorer not in unasked:
            measures[metric] = measure
            names[scorer] = None
    return measures, list(names)


def by_metric(by_scorer, measures, scorers, audioscore):
    """{metric: (audios, ...)}, with P(Good) of Eq. 1. by_scorer: {scorer: {tensor: (audios,
    ...)}}; audioscore: AudioScore, or None, which leaves out P(Good)."""
    measured = {}
    for metric, (_, scorer, tensor) in measures.items():
        measured[metric] = by_scorer[scorer][tensor]
    if audioscore is not None:
        five = audioscore.five_scores(scorers.audioscore_inputs(by_scorer))
        measured["p_good"] = audioscore(five)[:, 0]
    return measured


def aligned(measured, audios, clips):
    """{metric: (audios, ...)} -> {metric: (clips, ...) float64}, nan where there is no audio.
    audios: {clip id: ...}, in the order of the clips, which is that of the rows of `measured`."""
    has_audio = [clip.id in audios for clip in clips]
    full = {}
    for metric, values in measured.items():
        full[metric] = np.full((len(clips), *values.shape[1:]), np.nan)
        full[metric][has_audio] = values
    return full


def clip_values(measured, of_own_sound, how_of):
    """The `values` of each metric of a system, {metric: array}.

    measured, of_own_sound: what the scorers measured on the system's audios and on the clips' own
    sound, {metric: (clips, ...)}; the latter is empty where there is no such sound to compare with,
    and the system then has no FD and KL. how_of: {metric: mean, kl, fd or is}; P(Good), judge and
    oracle are in none, and are means.
    """
    values = {}
    for metric, ours in measured.items():
        how = how_of.get(metric, "mean")
        if how not in ("kl", "fd"):
            values[metric] = ours
        elif metric in of_own_sound and how == "kl":
            values[metric] = kl_divergence(of_own_sound[metric], ours)
        elif metric in of_own_sound:  # fd
            values[metric] = np.stack([ours, of_own_sound[metric]], axis=1)
    return values


def is_whole(values):
    """(clips, ...) -> (clips,) bool: whether a clip contributes."""
    return np.isfinite(values).reshape(len(values), -1).all(axis=1)


def set_metric(values, chosen):
    """FD or IS over the chosen clips, a float, or None where they are too few. chosen: (clips,)
    bool."""
    if values.ndim == 3:  # FD
        return frechet_distance(values[chosen, 0], values[chosen, 1])
    # All clips are shuffled, then some are left out, so that the others keep their order.
    order = [clip for clip in shuffled(len(values)) if chosen[clip]]
    return inception_score(values[order])


def bootstrap(values, resamples=2000, seed=0):
    """The mean over clips and its 95 % percentile interval. values: (clips,). Returns value, low,
    high; all are None without any clip, low and high are None with a single one."""
    finite = values[np.isfinite(values)]
    n = len(finite)
    if n == 0:
        return None, None, None
    value = float(finite.mean())
    if n == 1:
        return value, None, None
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples // 100):  # 100 at a time; with 15,000 clips all would take 0.5 GB
        drawn = rng.integers(0, n, (100, n))
        means.append(finite[drawn].mean(axis=1))
    low, high = np.percentile(means, (2.5, 97.5))
    return value, float(low), float(high)


def jackknife(statistic, n, blocks=20, seed=0):
    """A metric of a whole set of n clips and its 95 % interval, found by leaving out one of 20
    blocks of clips at a time. statistic: a function of the chosen clips, (n,) bool, that returns a
    float or None. Returns value, low, high.

    A bootstrap does not serve FD: resampled sets have fewer distinct clips, which raises FD so much
    that the interval would exclude the value itself. For IS the interval is wider than it need be,
    since leaving clips out moves others between its ten parts: in simulation it covers the true
    value in .96 to .985 of all cases.
    """
    value = statistic(np.full(n, True))
    block = np.random.default_rng(seed).permutation(n) % blocks
    parts = [statistic(block != i) for i in range(min(blocks, n))]
    if value is None or len(parts) < 2 or None in parts:
        return value, None, None
    parts = np.array(parts)
    error = np.sqrt((len(parts) - 1) / len(parts) * np.square(parts - parts.mean()).sum())
    reach = float(stats.t.ppf(0.975, len(parts) - 1) * error)
    return value, value - reach, value + reach


def with_interval(values):
    """Value, low and high of a metric."""
    if values.ndim == 1:
        return bootstrap(values)
    whole = is_whole(values)
    return jackknife(lambda chosen: set_metric(values, chosen & whole), len(values))


def difference(values, others):
    """Value, low and high of a metric's difference to another system, over the clips that both
    have. others: that system's values."""
    if values.ndim == 1:
        return bootstrap(values - others)
    both = is_whole(values) & is_whole(others)

    def statistic(chosen):
        ours = set_metric(values, chosen & both)
        theirs = set_metric(others, chosen & both)
        return None if ours is None else ours - theirs

    return jackknife(statistic, len(values))


def verdict(better, diff, low, high):
    """`better`, `worse`, or None where the interval of the difference is absent or holds 0."""
    if low is None or low <= 0 <= high:
        return None
    return "better" if (diff > 0) == (better == "higher") else "worse"


def results_of(values, metrics, against="base"):
    """The rows of 07_results.jsonl. values: {system: what `clip_values` returns}; metrics: {metric:
    ShownMetric}, in the order of the table; against: the name of the system to compare with."""
    results = []
    for system in values:
        for metric, shown in metrics.items():
            if metric not in values[system]:
                continue
            ours = values[system][metric]
            value, low, high = with_interval(ours)
            diff = (None, None, None)
            if system != against and metric in values.get(against, {}):
                diff = difference(ours, values[against][metric])
            result = rows.Result(
                system=system,
                metric=metric,
                better=shown.better,
                value=value,
                low=low,
                high=high,
                n=int(is_whole(ours).sum()),
                diff=diff[0],
                diff_low=diff[1],
                diff_high=diff[2],
                verdict=verdict(shown.better, *diff),
            )
            results.append(result)
    return results


# --------------------------------------------------------------------------------------------------
# How they are shown, and the paper's Table 1
# --------------------------------------------------------------------------------------------------

METRICS = {
    # the paper's six, and CLAP; fd and kl are the toy world's, whose one network gives both
    "fd_passt": ShownMetric("FD_PaSST", "lower", decimals=2),
    "fd": ShownMetric("FD", "lower", decimals=2),
    "kl_panns": ShownMetric("KL_PANNs", "lower", decimals=2),
    "kl_passt": ShownMetric("KL_PaSST", "lower", decimals=2),
    "kl": ShownMetric("KL", "lower", decimals=2),
    "is": ShownMetric("IS", "higher", decimals=2),
    "ib": ShownMetric("IB x100", "higher", decimals=2, times=100),
    "clap": ShownMetric("CLAP x100", "higher", decimals=2, times=100),
    "desync_s": ShownMetric("DeSync s", "lower"),
    # AudioScore
    "p_good": ShownMetric("P(Good)", "higher"),
    "win_rate": ShownMetric("wins", "higher"),
    # the toy's second tagger
    "fd_twin": ShownMetric("FD by the twin", "lower", decimals=2),
    "is_twin": ShownMetric("IS by the twin", "higher", decimals=2),
    # AudioBox-Aesthetics: production quality, production complexity, content enjoyment and content
    # usefulness
    "audiobox_pq": ShownMetric("audiobox PQ", "higher", decimals=2),
    "audiobox_pc": ShownMetric("audiobox PC", "lower", decimals=2),
    "audiobox_ce": ShownMetric("audiobox CE", "higher", decimals=2),
    "audiobox_cu": ShownMetric("audiobox CU", "higher", decimals=2),
    # the toy's measures against the truth of a clip: the share with the right sound, seconds from
    # sounds to events, the noise floor, the share with audible reverberation
    "judge_semantic": ShownMetric("judge: semantic", "higher"),
    "judge_sync_s": ShownMetric("judge: sync s", "lower", decimals=4),
    "judge_aesthetic": ShownMetric("judge: aesthetic", "higher"),
    "oracle_semantic": ShownMetric("oracle: semantic", "higher"),
    "oracle_sync_s": ShownMetric("oracle: sync s", "lower", decimals=4),
    "oracle_floor_db": ShownMetric("oracle: floor dB", "lower", decimals=2),
    "oracle_aesthetic": ShownMetric("oracle: aesthetic", "higher"),
}
PAPER_METRICS = ("fd_passt", "kl_panns", "kl_passt", "is", "ib", "desync_s")
PAPER = {  # Table 1, VGGSound test, as printed: IB times 100
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
TOLERANCE = (
    "tolerance: a repeated evaluation of one MMAudio model drifted by 0.69 FD_PaSST and 0.006 s "
    "DeSync"
)
ANOTHER_WORLD = (
    "another world and other scorers: compare the signs of the differences, not the numbers"
)


def text_of(shown, value, sign=""):
    """A value as its column shows it. shown: ShownMetric; sign: "+" for differences, which are
    shown with their sign."""
    return "-" if value is None else f"{value * shown.times:{sign}.{shown.decimals}f}"


def difference_text(shown, row):
    """A difference with its interval and verdict. row: rows.Result, or None."""
    if row is None or row.diff is None:
        return ""
    diff = text_of(shown, row.diff, "+")
    interval = f"[{text_of(shown, row.diff_low, '+')}, {text_of(shown, row.diff_high, '+')}]"
    return f"{diff} {interval} {row.verdict or '':<6}"


def print_grid(head, lines):
    """Prints columns as wide as the longest text. head and each of lines: (name, a text for each
    column)."""
    lines = [head, *lines]
    name_width = max(len(name) for name, _ in lines)
    width = max(len(text) for _, texts in lines for text in texts)
    print()
    for name, texts in lines:
        line = f"{name:<{name_width}}"
        for text in texts:
            line += f"  {text:>{width}}"
        print(line)


def print_table(results, systems, metrics, against="base"):
    """Prints all values, then the differences to one system with 95 % intervals; better and worse
    mark intervals that exclude 0. systems: names; metrics: {metric: ShownMetric} of the metrics
    that have a value."""
    row_of = {(row.metric, row.system): row for row in results}
    values = []
    differences = []
    others = [system for system in systems if system not in (against, "ground_truth")]
    for metric, shown in metrics.items():
        arrow = "^" if shown.better == "higher" else "v"
        texts = []
        for system in systems:
            row = row_of.get((metric, system))
            texts.append("" if row is None else text_of(shown, row.value))
        values.append((f"{shown.column} {arrow}", texts))
        texts = [difference_text(shown, row_of.get((metric, system))) for system in others]
        differences.append((shown.column, texts))
    print_grid(("", systems), values)
    if against in systems and others:
        print_grid((f"minus {against}, 95 % interval", others), differences)
        print(
            "intervals over clips, one training seed: another seed may move a policy by more than "
            "they are wide"
        )


def print_hacked(results, systems, measures, of_audioscore):
    """Prints a warning for each system that is better by AudioScore but worse by a scorer outside
    of it or by the toy world's judge: of the real scorers FD, KL and IS, in the toy world those of
    the twin. measures: as of `measures_asked`; of_audioscore: the scorers of AudioScore."""
    independent = [metric for metric in METRICS if metric.startswith("judge_")]
    for metric, (_, scorer, _) in measures.items():
        if scorer not in of_audioscore:
            independent.append(metric)
    for system in systems:
        verdicts = {row.metric: row.verdict for row in results if row.system == system}
        lost = [metric for metric in independent if verdicts.get(metric) == "worse"]
        if verdicts.get("p_good") == "better" and lost:
            print(
                f"warning: {system} gains on AudioScore and loses on {', '.join(lost)}: is it "
                "gaming its reward?"
            )


def row_of_paper(system, model):
    """The name of the row of Table 1 that a system corresponds to: that of base, flow_dpo or ddpo
    where the model is one of the two that the paper tunes, or the row that the system is named
    after (mmaudio=DIR). None for other systems."""
    family = {"mmaudio:large_44k": "MMAudio", "frieren": "Frieren"}.get(model)
    ours = {"base": family, "flow_dpo": f"{family}-DPO", "ddpo": f"{family}-DDPO"}
    if system in ours:
        return ours[system] if family else None
    for name in PAPER:
        if letters(name) == letters(system):
            return name
    return None


def letters(name):
    """A name reduced to its letters and digits in lower case: V2A-Mapper becomes v2amapper."""
    return re.sub(r"[\W_]", "", name).lower()


def table_1(run_json, results, systems):
    """The paper's rows, then ours, each with its difference to the paper's corresponding row. In
    the toy world only the paper's rows of MMAudio, since only signs of differences compare."""
    shown = [METRICS[metric] for metric in PAPER_METRICS]
    columns = [metric.column for metric in shown]
    is_real = run_json.scorers == "real"
    table = []
    for name, printed in PAPER.items():
        if is_real or name.startswith("MMAudio"):
            table.append((name, [f"{value:.2f}" for value in printed]))
    if not is_real:
        return rows.PaperTable(columns, table, ANOTHER_WORLD)
    value_of = {(row.system, row.metric): row.value for row in results}
    for system in systems:
        if system == "ground_truth":
            continue
        ours = [value_of.get((system, metric)) for metric in PAPER_METRICS]
        table.append((f"here: {system}", list(map(text_of, shown, ours))))
        row = row_of_paper(system, run_json.model)
        if row is not None:
            texts = []
            for metric, value, printed in zip(shown, ours, PAPER[row]):
                minus_paper = None if value is None else value - printed / metric.times
                texts.append(text_of(metric, minus_paper, "+"))
            table.append((f"  minus the paper's {row}", texts))
    return rows.PaperTable(columns, table, TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Systems and their audio
# --------------------------------------------------------------------------------------------------


class System(NamedTuple):
    """A system that is evaluated."""

    name: str
    kind: str  # truth: the clips' own sound; policy: sampled here, as is base; files: audio files
    folder: Path | None  # of the policy or of the files; None for the truth and for base
    audio: Path | None  # the folder of its audio; None for the truth
    made_from: rows.Record | None = None  # of a policy: the settings.json beside its audio


def choose_systems(run, run_json, args):
    """The systems that --systems names; without it ground truth, base and the policies that this
    run has."""
    items = args.systems
    if not items:
        items = ["ground_truth", "base"]
        for name, folder in POLICIES.items():
            if (run / folder).is_dir():
                items.append(name)
            else:
                print(f"{name}: left out, {run / folder} does not exist")
    systems = {}
    for item in items:
        system = system_of(run, run_json, item, args.guidance)
        if system.name in systems:
            stop(f"--systems {item}: {system.name} is given twice; choose another name for one")
        systems[system.name] = system
    if args.against not in ("base", *systems):
        stop(
            f"--against {args.against}: is none of the systems ({', '.join(systems)}); name it "
            "under --systems too"
        )
    # Base comes before the policies, which replace its weights in the model.
    first = {"ground_truth": 0, "base": 1}
    return sorted(systems.values(), key=lambda system: first.get(system.name, 2))


def system_of(run, run_json, item, guidance):
    """What an item of --systems means:

    ground_truth, base       from the run itself
    flow_dpo, ddpo           the run's 05_flow_dpo, 06_ddpo
    NAME                     a policy folder of the run
    NAME=DIR                 a policy folder or audio files; below the run folder, or anywhere

    A policy must be finished, and tuned from this run's model."""
    name, _, folder = item.partition("=")
    if not re.fullmatch(r"[\w-]+", name) or not files.is_name(name):
        stop(
            f"--systems {item}: a name has letters, digits, _ and -, and at most "
            f"{files.LONGEST_NAME} bytes"
        )
    if name in ("ground_truth", "base") and folder:
        stop(f"--systems {item}: {name} comes from the run itself; choose another name")
    if name == "ground_truth":
        return System(name, "truth", None, None)
    at = "" if guidance == run_json.sampler.guidance else f"@{guidance:g}"
    sampled = run / "07_audio" / f"{name}{at}"
    if name == "base":
        made_from = sampled_from(run_json, run_json.checkpoint_digest, guidance)
        return System(name, "policy", None, sampled, made_from)
    if not folder and name not in POLICIES and not (run / name / "policy.json").exists():
        stop(f"--systems {item}: give NAME=DIR, or the name of a policy folder of {run}")
    path = run / (folder or POLICIES.get(name, name))
    if folder and not path.is_dir():
        path = Path(folder)
    if not path.is_dir():
        stop(f"--systems {item}: {path} is no folder")
    if (path / "policy.json").exists():
        policy = rows.read_json(path / "policy.json", rows.Policy)
        if (policy.model, policy.base_digest) != (run_json.model, run_json.checkpoint_digest):
            stop(
                f"{path}: a policy of {policy.model} tuned from another base than this run's; "
                "use its own run"
            )
        made_from = sampled_from(run_json, files.digest(path / "policy.pt"), guidance)
        return System(name, "policy", path, sampled, made_from)
    if (path / "log.jsonl").exists():
        stop(
            f"{path}: no policy.json, its training has not finished; run the same command of "
            "05 or 06 again"
        )
    return System(name, "files", path, path)


def sampled_from(run_json, policy_digest, guidance):
    """What a policy's audio is made from; this is written to the settings.json beside it."""
    settings = {
        "policy": policy_digest,
        "guidance": guidance,
        "steps": run_json.sampler.steps,
        "seed": run_json.seed,
    }
    return rows.Record(settings=settings, inputs={})


def inputs_of(run, systems):
    """The outputs of earlier stages that the evaluation uses; record.stage checks that they are up
    to date."""
    sources = []
    for system in systems:
        folder = system.folder
        is_own = folder is not None and folder.parent.resolve() == run.resolve()
        if is_own and system.kind == "policy":
            sources.append(f"{folder.name}/policy.pt")
    if (run / "02_settings.json").exists():  # a run that was only prepared has none
        sources.append("02_audioscore.pt")
    return sources


def clip_blocks(run, split, clips):
    """The clips of the split in blocks of 32, which have no audio yet."""
    blocks = []
    for start in range(0, len(clips), scoring.BLOCK_CLIPS):
        block = scoring.Block(
            name=f"{split}_{start // scoring.BLOCK_CLIPS:05d}",
            scores_folder=run / "07_scores",
            videos_folder=run / "07_clips",
            clips=clips[start : start + scoring.BLOCK_CLIPS],
            audios=[],
        )
        blocks.append(block)
    return blocks


def clip_features(run_json, model, blocks, scorers, scorer_names, here, args):
    """{clip id: the model's features} of the clips whose video can be used; stage 01 has those of
    train clips alone. Where the model reads videos, the scorers' embeddings of them are written too
    (for scoring.score, which otherwise makes them), so that each video is decoded once."""
    embedded_too = scorer_names if model.reads_video else ()
    scoring.embed_videos(
        here.share(blocks), scorers, embedded_too, run_json.clip_s, here.device, args.workers, model
    )
    ranks.barrier()
    features = {}
    for block in blocks:
        key = scoring.features_key(model, block.clips)
        found = scoring.read_videos(block, key, scoring.FEATURES, model.feature_shapes)
        for clip_id, of_clip in found.items():
            if all(value.isfinite().all() for value in of_clip.values()):
                features[clip_id] = of_clip
    return features


def is_kept(system):
    """Whether the audio that a policy already has was sampled with the settings of now."""
    file = system.audio / "settings.json"
    if not file.exists() and media.audio_files(system.audio):
        stop(
            f"{system.audio}: holds audio that stage 07 did not make; move it away, or evaluate it "
            "as --systems NAME=DIR"
        )
    return file.exists() and rows.read_json(file, rows.Record) == system.made_from


def found_audio(system, clips):
    """{clip id: file}: the audio that a system has; of a policy only what `is_kept`. clips: of the
    split; only of ground_truth are they needed, whose files are the clips' videos."""
    if system.kind == "truth":
        return {clip.id: clip.path for clip in clips}
    if system.kind == "policy" and not is_kept(system):
        return {}
    return media.audio_files(system.audio)


def batches_to_sample(system, features, blocks, batch_clips):
    """The batches in which any clip has no audio yet. A batch always has the same clips and is
    sampled as a whole, because in a batch of another size an audio may be rounded differently."""
    kept = found_audio(system, [])
    batches = []
    for block in blocks:
        usable = [clip for clip in block.clips if clip.id in features]
        for start in range(0, len(usable), batch_clips):
            batch = usable[start : start + batch_clips]
            if not all(clip.id in kept for clip in batch):
                batches.append(batch)
    return batches


def sample_audio(run_json, system, model, features, blocks, stage, here, args):
    """Samples a policy's audio, one per clip; audio of the same policy and settings is kept."""
    todo = batches_to_sample(system, features, blocks, args.batch_clips)
    if todo and system.folder is not None:
        # The model is this policy from here on; base comes first, and needs no load. A policy that
        # does not fit stops the stage here, before any audio is deleted.
        model.load_policy(system.folder / "policy.pt")
    ranks.barrier()  # all ranks have looked at the files before one deletes any
    with stage.one_at_a_time():
        if here.first and not is_kept(system):
            remove_other_audio(system, here)
            rows.write_json(system.audio / "settings.json", system.made_from)
    ranks.barrier()
    bar = tqdm(here.share(todo), system.name, unit="batch", disable=not (here.first and todo))

    def batches():
        for clips in bar:
            batch = []
            for clip in clips:
                seeds = [common.seed_of(run_json.seed, clip.id, 0)]  # of its one audio
                batch.append((clip, features[clip.id], seeds))
            yield batch

    sampler = rows.Sampler(steps=run_json.sampler.steps, guidance=args.guidance)
    for clip, _, waves in common.sample_clips(model, batches(), sampler):
        media.write_audio(system.audio / f"{clip.id}.wav", waves[0], model.sample_rate_hz)
    ranks.barrier()


def remove_other_audio(system, here):
    """Removes audio of another policy, guidance or seed."""
    if here.part and (system.audio / "settings.json").exists():
        stop(
            f"{system.audio}: holds audio of another policy, guidance or seed, which a part does "
            "not remove; remove it, or give the command without --part first"
        )
    for file in media.audio_files(system.audio).values():
        file.unlink()


def print_found(systems, clips, split):
    """Prints what audio each system has for the clips of the split, before any is generated."""
    ids = {clip.id for clip in clips}
    for system in systems:
        found = found_audio(system, clips)
        lacking = len(ids - found.keys())
        foreign = sorted(found.keys() - ids)
        line = f"{system.name}: audio for {len(ids) - lacking} of {len(ids)} {split} clips"
        if system.kind == "policy" and lacking:
            line += f", {lacking} will be generated"
        elif system.kind == "files" and foreign:
            line += f"; {len(foreign)} files name no clip of this split, first {foreign[0]}"
        print(line)


def usable_audio(run, run_json, system, blocks, here, args):
    """A system's audio that can be used, in blocks; blocks without any are left out. A file in
    which no sound can be read counts as missing. Silence, and samples that are not finite, count as
    sound: they are scored, and warned of."""
    file_of = found_audio(system, [clip for block in blocks for clip in block.clips])
    found = []
    for block in blocks:
        audios = []
        for clip in block.clips:
            if clip.id in file_of:
                file = file_of[clip.id]
                is_own = system.kind == "truth"
                audios.append(scoring.Audio(clip, 0, file, files.digest(file), is_own))
        found.append(block._replace(scores_folder=run / "07_scores" / system.name, audios=audios))
    scoring.find_peaks(here.share(found), run_json.clip_s)
    ranks.barrier()
    usable = []
    missing = []
    silent = 0
    for block in found:
        peaks = scoring.read_peaks([block], run_json.clip_s)
        audios = [audio for audio, peak in zip(block.audios, peaks) if peak.isfinite()]
        have = {audio.clip.id for audio in audios}
        missing += [clip.id for clip in block.clips if clip.id not in have]
        silent += int((peaks < common.SILENT_PEAK).sum())
        if audios:
            usable.append(block._replace(audios=audios))
    count = sum(len(block.audios) for block in usable)
    if missing:
        line = f"{system.name}: audio for {count} of {count + len(missing)} {args.split} clips"
        line += f", first missing {missing[0]}"
        none_at_all = not usable and here.part is None  # a part may have no audio of a system
        if not args.allow_missing or none_at_all:
            stop(f"{line}; complete it, or evaluate what there is with --allow-missing")
        print(line)
    if system.kind != "truth" and silent > 0.01 * count:
        print(
            f"warning: {silent} of {count} audios of {system.name} are silent or broken; they are "
            "scored as they are"
        )
    return usable


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def describe_run(run, run_json, scorers, systems, usable, results, metrics, args):
    """07_systems.json."""
    described = []
    for system in systems:
        audio = {}
        for clip_id, one in usable[system.name].items():
            audio[clip_id] = files.below(run, one.path)
        folder = None if system.folder is None else files.below(run, system.folder)
        described.append(rows.System(name=system.name, folder=folder, audio=audio))
    measured = {row.metric for row in results}
    clap_scorer, _ = scorers.audioscore_tensors["clap"]
    paper = None
    if args.split == "test":
        paper = table_1(run_json, results, [system.name for system in systems])
    return rows.Systems(
        split=args.split,
        guidance=args.guidance,
        steps=run_json.sampler.steps,
        systems=described,
        metrics={metric: shown for metric, shown in metrics.items() if metric in measured},
        clap=scorers.classes[clap_scorer].files[0],
        paper=paper,
    )


def main(args):
    # -- setup
    here = ranks.setup(args.part)
    run = Path(args.run_dir)
    run_json = inputs.read_run(run)
    clips = inputs.read_clips(run, args.split)
    if not clips:
        stop(
            f"{run}/clips.jsonl has no clip of the split {args.split}; give some that split in "
            "stage 01's --clips"
        )
    missing = rows.read_if_there(run / "01_missing.jsonl", rows.MissingClip)
    scorers = common.scorers_of(run, args.weights)
    measures, scorer_names = measures_asked(scorers, args.judge)
    systems = choose_systems(run, run_json, args)
    names = [system.name for system in systems]

    # There is no 07_settings.json: audio and scores are stored with what they were made from, and
    # the numbers are computed anew every time. The stage only checks its inputs, and locks the run.
    with record.stage(run, "07", inputs_of(run, systems), part=here.part) as stage:
        print_found(systems, clips, args.split)
        if args.dry_run:
            wanted = [file for name in scorer_names for file in scorers.classes[name].files]
            common.print_missing(scorers.root, wanted)
            return

        # -- audio
        blocks = here.part_of(clip_blocks(run, args.split, clips))
        policies = [system for system in systems if system.kind == "policy"]
        if policies:
            model = common.load_base_model(run, here.device, args.weights)
            training.only_sample(model, args.compile)
            features = clip_features(run_json, model, blocks, scorers, scorer_names, here, args)
            for system in policies:
                sample_audio(run_json, system, model, features, blocks, stage, here, args)
        blocks_of = {}
        for system in systems:
            blocks_of[system.name] = usable_audio(run, run_json, system, blocks, here, args)

        # -- scores
        all_blocks = [block for of_system in blocks_of.values() for block in of_system]
        scoring.score(all_blocks, scorers, scorer_names, run_json.clip_s, here, args.workers)
        if not here.first or here.ends_part():
            return

        # -- numbers
        audioscore = None
        if (run / "02_audioscore.pt").exists():
            audioscore = AudioScore.load(run / "02_audioscore.pt")
        simulated = common.people_of(run)  # the toy world's oracle and judge, who know the truth
        usable = {}  # {system: {clip id: its audio}}
        measured_of = {}  # {system: {metric: (clips, ...)}}
        for name in names:
            audios = [audio for block in blocks_of[name] for audio in block.audios]
            usable[name] = {audio.clip.id: audio for audio in audios}
            by_scorer = scoring.read_scores(blocks_of[name], scorers, scorer_names)
            measured = by_metric(by_scorer, measures, scorers, audioscore)
            if simulated is not None:
                waves = [(audio.clip, audio.path) for audio in audios]
                measured |= simulated.compared_with_truth(run, waves)
            measured_of[name] = aligned(measured, usable[name], clips)
        how_of = {metric: how for metric, (how, _, _) in measures.items()}
        values = {}
        for name, measured in measured_of.items():
            of_own_sound = {}
            if name != "ground_truth":
                of_own_sound = measured_of.get("ground_truth", {})
            values[name] = clip_values(measured, of_own_sound, how_of)
        if audioscore is not None and args.against in names:
            p_good = values[args.against]["p_good"]
            for name in names:
                values[name]["win_rate"] = win_rate(values[name]["p_good"], p_good)
        metrics = dict(METRICS)
        for metric in measures:
            metrics.setdefault(metric, ShownMetric(metric))  # of a user's own scorer
        results = results_of(values, metrics, args.against)

        # -- save
        suffix = "" if args.split == "test" else f"_{args.split}"
        if args.against != "base":
            suffix += f"_{args.against}"
        systems_json = describe_run(run, run_json, scorers, systems, usable, results, metrics, args)
        rows.write(run / f"07_results{suffix}.jsonl", results)
        rows.write_json(run / f"07_systems{suffix}.json", systems_json)

    # -- report
    gone = sum(clip.split == args.split for clip in missing)
    if gone:
        print(
            f"{gone} more listed {args.split} clips have no video (01_missing.jsonl), so no system "
            "is evaluated on them"
        )
    print(f"{args.split} split, guidance {args.guidance:g}")
    print_table(results, names, systems_json.metrics, args.against)
    print_hacked(results, names, measures, scorers.of_audioscore)
    other = [system.name for system in policies if system.name not in ("base", *POLICIES)]
    if other and args.split == "test":
        print(
            f"warning: {', '.join(other)} on the test split; choose settings on --split val, and "
            "use the test split once they are fixed"
        )
    if systems_json.paper is not None:
        table = systems_json.paper
        print_grid(("the paper (Table 1, VGGSound test)", table.columns), table.rows)
        print(f"({table.remark})")
    print(f"CLAP by {systems_json.clap}")
    print(f"\nwrote {run / f'07_results{suffix}.jsonl'}")
    if not suffix:
        print(f"next: python 08_listen.py {run_flag(run)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
