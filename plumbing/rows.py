"""The rows of every file that stages pass on or people bring: the name of each field, its unit and
its range.

This is the contract between the stages. `read` returns a list of one of the types below, whose
fields are attributes (`pair.winner`). Where a line does not fit the type, the stage stops with one
line that names file, line and field. A field with a default may be missing in a file, or null.
Further fields in a file are ignored.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from plumbing import files
from plumbing.files import stop

# --------------------------------------------------------------------------------------------------
# What a field may hold
# --------------------------------------------------------------------------------------------------


def text(meaning, pattern):
    """The type of texts that match a pattern. `meaning` goes into the pattern as a comment, and a
    person reads it in the message about a text that does not match."""
    return Annotated[str, Meta(pattern=rf"(?#{meaning})^(?:{pattern})\Z")]


def one_of(*words):
    return text(f"one of {', '.join(words)}", "|".join(words))


Text = text("text", files.TEXT)
Name = text("a name that a file can have, of at most 200 bytes", files.NAME)
# Bytes that are not UTF-8 are lone surrogates; `files.inside` checks the rest of a path.
FilePath = text("a path", r"[^\0\ud800-\udc7f\udd00-\udfff]{1,3999}")
Index = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=10**9)]
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Share = Annotated[float, Meta(ge=0, le=1)]
Signed = Annotated[float, Meta(ge=-1, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
ClipSeconds = Annotated[float, Meta(ge=0.1, le=3600)]
Probabilities = tuple[Share, Share, Share]  # of Good, Medium, Bad

SPLITS = ("train", "val", "test")
RATE_SPLIT = "rate"  # the split of clips that are used only to have their given audio rated
Split = one_of(*SPLITS, RATE_SPLIT)
Rating = one_of("Good", "Medium", "Bad")


class Row(Struct):
    """A line of a .jsonl, or an object of a .json."""


# --------------------------------------------------------------------------------------------------
# run.json; clips.jsonl and stage 01's lines
# --------------------------------------------------------------------------------------------------


class Defaults(Row):
    """The part of run.json that every stage reads first. defaults: {stage: {flag: what replaces the
    paper's number}}."""

    defaults: dict[str, dict[str, Number]] = {}


class Sampler(Row):
    steps: Count  # of Euler's method
    guidance: Number  # gamma; 1 = no guidance


class World(Defaults, kw_only=True, omit_defaults=True):
    """run.json as stage 00 leaves it. Stage 01 completes it to a `Run`."""

    model: Text  # as given to --model
    # The velocity network's file, or `upstream` for the one below --weights.
    checkpoint: FilePath
    checkpoint_digest: Text  # identifies the network, wherever its file lies
    video_root: FilePath  # absolute, or relative to the run folder
    clip_s: ClipSeconds  # seconds of video that one audio belongs to
    scorers: one_of("real", "toy") = "real"  # the set of frozen scorers
    scorers_root: FilePath | None = None  # the folder of their files, if not --weights
    cavp_root: FilePath | None = None  # Frieren only: the folder of its features
    # Sources of audio that the model did not make, in the order in which stage 01 was given them.
    # For train clips, k is num_samples plus the place of the source in `given`; for clips of the
    # split rate, k is its place in `given_to_rate`.
    given: list[Name] = []
    given_to_rate: list[Name] = []
    # Toy world only: its size, its seed, a factor on its raters' noise, and how many slight faults
    # the raters overlook.
    size: Text | None = None
    world_seed: Index | None = None
    rater_noise: Number | None = None
    rater_overlooks: Index = 0


class Run(World, kw_only=True, omit_defaults=True):
    """run.json as stage 01 leaves it."""

    latent_shape: tuple[Count, Count]  # (T, C)
    sample_rate_hz: Count
    sampler: Sampler
    num_samples: Index  # audios per clip that the model made
    seed: Index
    max_clips: Index
    clips_digest: Text  # of clips.jsonl


class Clip(Row, kw_only=True):
    """clips.jsonl; 01_to_rate.jsonl: clips to rate."""

    id: Name
    video: FilePath  # below the video root
    caption: Text | None = None
    label: Text | None = None
    split: Split


class ListedClip(Row, kw_only=True):
    """A line of a user's --clips FILE.jsonl."""

    id: Name
    video: FilePath | None = None  # below --videos; without it <id>.mp4, or with another suffix
    caption: Text | None = None
    label: Text | None = None
    split: Split = "train"

    def __post_init__(self):
        if not files.is_name(self.id):  # the type counts characters, this counts bytes
            raise ValueError("field 'id': Expected a name of at most 200 bytes")


class MissingClip(Row):
    """01_missing.jsonl: a listed clip whose video does not exist."""

    id: Name
    split: Split
    reason: Text


class SkippedClip(Row):
    """01_samples/00012.skipped.jsonl: a clip whose video cannot be used; 00012.NAME.skipped.jsonl:
    a clip without usable audio of that source."""

    clip: Name
    reason: Text


class Sample(Row):
    """01_samples/00012.jsonl: an audio that the model made; 00012.NAME.jsonl: an audio that was
    given."""

    clip: Name
    k: Index  # its number among the clip's audios
    seed: Index  # of its initial noise; 0 for given audio
    wav: Text  # 01_audio/<clip>_<k>.wav
    row: Index  # of its latent in the .pt beside
    digest: Text  # of the wav
    finite: bool  # whether wave and latent are; otherwise the audio is in no pair
    peak: Share  # of full scale
    clipped: Share  # of the samples are at full scale
    source: Name = "model"  # or NAME of --given


# --------------------------------------------------------------------------------------------------
# 02 to 04: what people answered, scores, pairs
# --------------------------------------------------------------------------------------------------


class Answer(Row, kw_only=True, omit_defaults=True):
    """The fields that every answer of a person may have."""

    rater: Text = ""
    # 1: the same question was asked again, to see how steady the rater is.
    repeat: Annotated[int, Meta(ge=0, le=1)] = 0
    seconds: Seconds | None = None  # that the answer took
    comment: Text | None = None


class RatingAnswer(Answer, kw_only=True):
    """02_ratings.jsonl: one person's rating of one audio."""

    clip: Name
    k: Index
    rating: Rating


class ChoiceAnswer(Answer, kw_only=True):
    """03_human_choices.jsonl, and the answers to `08_listen.py blind`, where a and b are
    systems."""

    clip: Name
    a: Index | Name
    b: Index | Name
    choice: one_of("a", "b", "tie")


class FiveScores(Row, kw_only=True):
    """An audio's five scores (Sec. 2.1), null where one does not apply."""

    clip: Name
    k: Index
    ib: Number | None = None  # cosine
    clap: Number | None = None  # cosine
    desync_s: Number | None = None  # seconds
    is_nats: Number | None = None  # nats
    pesq: Number | None = None  # MOS-LQO, 1.0 to 4.64


def score_fields(names, scores):
    """The five scores (5,) of an audio as fields of a row, None where one does not apply."""
    fields = {}
    for name, value in zip(names, scores.tolist()):
        fields[name] = None if math.isnan(value) else round(value, 6)
    return fields


class Score(FiveScores, kw_only=True):
    """03_scores/00012.jsonl: the scores of every audio, with p (Eq. 1)."""

    p: Probabilities


class RatedScore(FiveScores, kw_only=True):
    """02_scores.jsonl: the scores of a rated audio, with the rating of the raters' majority; of a
    tie the worse one."""

    rating: Rating


class Pair(Row):
    """03_pairs.jsonl, 03_human_pairs.jsonl: two audios of a clip."""

    clip: Name
    winner: Index  # k
    loser: Index  # k
    p_winner: Probabilities
    p_loser: Probabilities

    def __post_init__(self):
        for field in ("p_winner", "p_loser"):
            if abs(sum(getattr(self, field)) - 1) > 1e-3:
                raise ValueError(f"field '{field}': Expected three numbers whose sum is 1")


class SplitPair(Row):
    """04_stage1.jsonl, 04_stage2.jsonl: a pair with its score_c."""

    clip: Name
    winner: Index
    loser: Index
    score_c: Signed  # Eq. 3; high = an easy pair
    source: one_of("auto", "human")


# --------------------------------------------------------------------------------------------------
# 05 and 06: the policy folder
# --------------------------------------------------------------------------------------------------


class Policy(Row):
    """policy.json: what the policy.pt beside it was tuned from, and how."""

    model: Text
    base_digest: Text  # of the checkpoint that was tuned
    method: one_of("flow_dpo", "ddpo")
    steps: Count
    commit: Text | None = None  # of this code; null outside of git
    computed_with: dict[str, Text | None] = {}  # the CPU, and the kernels that were asked for


class Step(Row, kw_only=True):
    """log.jsonl of a policy's folder: one optimizer step (docs/results.md, docs/curves.md)."""

    step: Index
    grad_norm: Number  # before it is clipped at 1
    lr: Number
    seconds: Number
    forwards: Index  # rows that have gone through policy and reference so far
    forwards_grad: Index  # those of them that had a backward pass
    peak_gb: Number | None = None  # memory of the GPU, GiB


class FlowDpoStep(Step, kw_only=True):
    """05_flow_dpo/log.jsonl; means over the global batch."""

    stage: Annotated[int, Meta(ge=1, le=2)]
    loss: Number  # Eq. 5, log 2 at step 0; plus the term of --sft-weight
    accuracy: Share  # of the pairs whose winner the implicit reward prefers; a tie counts 1/2
    gap_w: Number  # the winner's error minus the reference's
    gap_l: Number  # the loser's
    ref_w: Number  # the reference's error of the winner
    saturated: Share  # of the pairs have a logit above 5: below 1 % of the largest gradient
    opposed: Share  # of the pairs have a logit below -5: almost the largest gradient
    weight: Share  # mean factor of a pair's gradient, sigmoid(-logit)
    weight_wrong: Share  # the same, with 0 for pairs whose logit is not below 0
    gap_w_t: list[Number | None]  # gap_w for each quarter of t; null for one without a pair
    gap_l_t: list[Number | None]  # gap_l for each quarter of t


class DdpoStep(Step, kw_only=True):
    """06_ddpo/log.jsonl; the last three are means over the round's audios."""

    round: Index
    reward: Number  # mean P(Good) of the round's audios
    reward_std: Number  # standard deviation within a prompt, mean over prompts
    no_spread: Share  # of the round's prompts have equal rewards, up to rounding
    ratio: Number  # of the policy's probability to that of the policy that sampled
    clipped: Share  # of the ratios are outside 1 plus or minus --clip-range
    approx_kl: Number  # half the squared log-ratio


# --------------------------------------------------------------------------------------------------
# 07 and 08: results
# --------------------------------------------------------------------------------------------------


class Result(Row, kw_only=True):
    """07_results.jsonl: one metric of one system; intervals are of 95 %."""

    system: Name
    metric: Text
    better: one_of("higher", "lower")
    value: Number | None = None
    low: Number | None = None
    high: Number | None = None
    n: Index  # clips
    diff: Number | None = None  # value minus the value of base (or of --against), null for itself
    diff_low: Number | None = None
    diff_high: Number | None = None
    verdict: one_of("better", "worse") | None = None  # null where the interval of diff holds 0


class System(Row, kw_only=True):
    """A system of 07_systems.json."""

    name: Name
    folder: FilePath | None = None  # of a policy or of audio files; null for base and ground truth
    audio: dict[Name, FilePath]  # {clip: file}


class ShownMetric(Row):
    """How a metric of 07_systems.json is shown."""

    column: Text
    better: one_of("higher", "lower") = "higher"
    decimals: Index = 3
    times: Count = 1  # the factor by which the value is multiplied for display


class PaperTable(Row):
    """Table 1 as text: the paper's rows and, where they can be compared, ours and ours minus the
    paper's."""

    columns: list[Text]
    rows: list[tuple[Text, list[Text]]]
    remark: Text


class Systems(Row):
    """07_systems.json: what was evaluated, and how it is shown."""

    split: Split
    guidance: Number
    steps: Count
    systems: list[System]
    metrics: dict[Text, ShownMetric]  # in the table's order
    clap: Text | None = None  # the file of CLAP's weights, of which several are published
    paper: PaperTable | None = None  # null where the split is not the paper's


class BlindResult(Row, kw_only=True):
    """08_blind.jsonl: two systems, compared by people who did not know which one they heard."""

    a: Name
    b: Name
    win_rate: Share  # of a; a tie is half a win
    low: Number | None = None  # 95 %
    high: Number | None = None
    n: Index  # answers
    ties: Index
    clips: Index
    raters: Index


# --------------------------------------------------------------------------------------------------
# Every stage: the record of what its output was made from
# --------------------------------------------------------------------------------------------------


class Record(Row):
    """NN_settings.json, or settings.json in a policy's folder (plumbing/record.py)."""

    settings: dict[str, Any]
    inputs: dict[FilePath, Text]  # {name below the run folder: digest}
    outputs: dict[FilePath, Text] = {}


class WeightFile(Row):
    stamp: Text  # size and time
    digest: Text


class Weights(Row):
    """weights.json: the files of scorers that were read, {path: WeightFile}."""

    files: dict[FilePath, WeightFile]


# --------------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------------


def read(path, row_type, hint="", cut=False):
    """A .jsonl as a list of rows. hint: advice that ends every refusal. cut: drops the last line if
    a kill or a full disk has cut it short."""
    found = []
    lines = files.lines_of(path, hint)
    if cut and lines and not lines[-1].endswith("}"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        found.append(typed(files.parse_json(line, where, hint), row_type, where, hint))
    return found


def read_if_there(path, row_type, hint=""):
    return read(path, row_type, hint) if Path(path).exists() else []


def read_json(path, row_type, hint=""):
    """A .json as one row."""
    return typed(files.parse_json(files.read_text(path, hint), path, hint), row_type, path, hint)


def typed(value, row_type, where, hint=""):
    """A value that was read from JSON, as a row; stops in one line where it does not fit. A field
    that is null counts as absent."""
    if isinstance(value, dict):
        value = {name: held for name, held in value.items() if held is not None}
    try:
        return msgspec.convert(value, row_type)
    except UnicodeEncodeError as error:  # half of a surrogate pair
        stop(f"{where}: {error.object[:60]!a} is not text{hint}")
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.sampler.steps`" and "Object missing required field `x`"
        said = re.sub(r"`str` matching regex '\(\?#(.*?)\).*'", r"\1", str(error))
        said = re.sub(r"(.*) - at .*`\$\.(.*)`", r"field '\2': \1", said)
        said = re.sub(r"Object missing required field `(.*)`", r"field '\1' is missing", said)
        stop(f"{where}, {said}{hint}")


def as_dict(row):
    return msgspec.to_builtins(row)


def write(path, lines):
    """Writes a .jsonl. lines: rows of one of the types above, or dicts."""
    files.write_text(path, "".join(json_line(line) for line in lines))


def append(path, line):
    with files.writing(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json_line(line))


def json_line(line):
    return json.dumps(as_dict(line), ensure_ascii=False) + "\n"


def write_json(path, row):
    files.write_text(path, json.dumps(as_dict(row), indent=1, ensure_ascii=False) + "\n")
