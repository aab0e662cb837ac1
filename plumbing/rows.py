"""The rows of every file that stages pass on or people bring: what each field is called, its unit
and its range.

This is the contract between the stages. `read` gives a list of one of the types below, whose fields
are attributes (`pair.winner`); what does not fit ends in one line that names the file, the line and
the field. A field with a default may be missing in a file, or null. Lines may hold further fields,
which nobody reads.
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
    """The type of texts that match a pattern. Its meaning, a comment in the pattern, is what a
    person reads of one that does not."""
    return Annotated[str, Meta(pattern=rf"(?#{meaning})^(?:{pattern})\Z")]


def one_of(*words):
    return text(f"one of {', '.join(words)}", "|".join(words))


Text = text("text", files.TEXT)
Name = text("a name that a file can have, of at most 200 bytes", files.NAME)
# Bytes that are no UTF-8 are lone surrogates; `files.inside` knows what else a path may not be.
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
TO_RATE = "rate"  # the split of clips whose given audio is rated, and nothing else
Split = one_of(*SPLITS, TO_RATE)
Rating = one_of("Good", "Medium", "Bad")


class Row(Struct):
    """A line of a .jsonl, or an object of a .json."""


# --------------------------------------------------------------------------------------------------
# run.json; clips.jsonl and stage 01's lines
# --------------------------------------------------------------------------------------------------


class Defaults(Row):
    """The part of run.json that every stage reads first: {stage: {flag: a replacement for the
    paper's number}}."""

    defaults: dict[str, dict[str, Number]] = {}


class Sampler(Row):
    steps: Count  # of Euler's method
    guidance: Number  # gamma; 1 = no guidance


class World(Defaults, kw_only=True, omit_defaults=True):
    """run.json as stage 00 leaves it. Stage 01 completes it to a `Run`."""

    model: Text  # as given to --model
    # For people: the velocity network's file, or `upstream` for the one under --weights.
    checkpoint: FilePath
    checkpoint_digest: Text  # what counts
    video_root: FilePath  # absolute, or relative to the run folder
    clip_s: ClipSeconds  # seconds of video that one audio belongs to
    scorers: one_of("real", "toy") = "real"  # the set of frozen scorers
    scorers_root: FilePath | None = None  # the folder of their files, if not --weights
    cavp_root: FilePath | None = None  # Frieren alone: the folder of its features
    # Sources of candidates that the model did not make, in the order in which stage 01 was given
    # them: the k of such an audio is num_samples and the place of its source. Of clips to rate it
    # is the place in a list of their own.
    given: list[Name] = []
    given_to_rate: list[Name] = []
    # The toy world alone: its size, its seed, its raters' noise as a factor, and how many slight
    # faults they overlook.
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
    video: FilePath | None = None  # below --videos; if not given, <id>.mp4 or another suffix
    caption: Text | None = None
    label: Text | None = None
    split: Split = "train"

    def __post_init__(self):
        if not files.is_name(self.id):  # longer in bytes than in characters
            raise ValueError("field 'id': Expected a name of at most 200 bytes")


class MissingClip(Row):
    """01_missing.jsonl: a listed clip whose video does not exist."""

    id: Name
    split: Split
    reason: Text


class SkippedClip(Row):
    """01_samples/00012.skipped.jsonl: a clip whose video cannot be used; 00012.NAME.skipped.jsonl:
    one without an audio of that source."""

    clip: Name
    reason: Text


class Sample(Row):
    """01_samples/00012.jsonl: an audio that the model made; 00012.NAME.jsonl: one that was
    given."""

    clip: Name
    k: Index  # the k-th of its clip
    seed: Index  # of its initial noise; 0 of one that was given
    wav: Text  # 01_audio/<clip>_<k>.wav
    row: Index  # of the latents in the .pt beside
    digest: Text  # of the wav
    finite: bool  # wave and latent; what is not is never in a pair
    peak: Share  # of full scale
    clipped: Share  # of the samples, at full scale
    source: Name = "model"  # or the name that was given


# --------------------------------------------------------------------------------------------------
# 02 to 04: what people answered, scores, pairs
# --------------------------------------------------------------------------------------------------


class Answer(Row, kw_only=True, omit_defaults=True):
    """What every answer of a person may hold."""

    rater: Text = ""
    # 1: the same was asked once more, to see how steady the rater is.
    repeat: Annotated[int, Meta(ge=0, le=1)] = 0
    seconds: Seconds | None = None  # that the answer took
    comment: Text | None = None


class RatingAnswer(Answer, kw_only=True):
    """02_ratings.jsonl: what one person said of one audio."""

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
    """03_scores/00012.jsonl: of every audio, with p (Eq. 1)."""

    p: Probabilities


class RatedScore(FiveScores, kw_only=True):
    """02_scores.jsonl: of a rated audio, with the raters' majority, the worse of a tie."""

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
    """04_stage1.jsonl, 04_stage2.jsonl."""

    clip: Name
    winner: Index
    loser: Index
    score_c: Signed  # Eq. 3; high = an easy pair
    source: one_of("auto", "human")


# --------------------------------------------------------------------------------------------------
# 05 and 06: the policy folder
# --------------------------------------------------------------------------------------------------


class Policy(Row):
    """policy.json: whose policy.pt it is."""

    model: Text
    base_digest: Text  # of the checkpoint that was tuned
    method: one_of("flow_dpo", "ddpo")
    steps: Count
    commit: Text | None = None  # of this code; null outside of git
    computed_with: dict[str, Text | None] = {}  # the CPU, and the kernels that were asked for


class Step(Row, kw_only=True):
    """log.jsonl of a policy's folder: an optimizer step. docs/curves.md reads them."""

    step: Index
    grad_norm: Number  # before it is clipped at 1
    lr: Number
    seconds: Number
    forwards: Index  # rows through policy and reference so far
    forwards_grad: Index  # those with a backward pass
    peak_gb: Number | None = None  # of the GPU, GiB


class FlowDpoStep(Step, kw_only=True):
    """05_flow_dpo/log.jsonl; means over the global batch."""

    stage: Annotated[int, Meta(ge=1, le=2)]
    loss: Number  # Eq. 5, log 2 at step 0; with --sft-weight also that part
    accuracy: Share  # of the pairs whose winner the implicit reward prefers; 1/2 for a tie
    gap_w: Number  # the winner's error minus the reference's
    gap_l: Number  # the loser's
    ref_w: Number  # the reference's error of the winner
    saturated: Share  # logits above 5: their gradient is below 1 % of its largest
    opposed: Share  # logits below -5: their gradient is full
    weight: Share  # of a pair's gradient, sigmoid(-logit)
    weight_wrong: Share  # that of pairs with a logit below 0, 0 for others
    gap_w_t: list[Number | None]  # by quarter of t; null where a quarter has no pair
    gap_l_t: list[Number | None]


class DdpoStep(Step, kw_only=True):
    """06_ddpo/log.jsonl."""

    round: Index
    reward: Number  # mean P(Good) of the round's audios
    reward_std: Number  # within a prompt, mean over prompts
    no_spread: Share  # of the round's prompts whose audios all have one reward, up to rounding
    ratio: Number  # mean over the audios
    clipped: Share
    approx_kl: Number


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
    times: Count = 1  # shown times this


class PaperTable(Row):
    """Rows of the paper's Table 1 and, where they compare, ours and ours minus theirs, as text."""

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
    clap: Text | None = None  # the file of CLAP, of which there are several
    paper: PaperTable | None = None  # null where the split is another than the paper's


class BlindResult(Row, kw_only=True):
    """08_blind.jsonl: two systems, compared by people who did not know which was which."""

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
    """NN_settings.json, or settings.json of a policy's folder (plumbing/record.py)."""

    settings: dict[str, Any]
    inputs: dict[FilePath, Text]  # {name below the run folder: digest}
    outputs: dict[FilePath, Text] = {}


class WeightFile(Row):
    stamp: Text  # size and time
    digest: Text


class Weights(Row):
    """weights.json: the scorers' files that were read, by path."""

    files: dict[FilePath, WeightFile]


# --------------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------------


def read(path, row_type, hint="", cut=False):
    """A .jsonl as a list of rows. hint: what to do, the end of every refusal. cut: drops a last
    line that a kill or a full disk has cut."""
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
    """A .json that is one row."""
    return typed(files.parse_json(files.read_text(path, hint), path, hint), row_type, path, hint)


def typed(value, row_type, where, hint=""):
    """value, as read from JSON, as a row; one line says where it does not fit. A field that is null
    is absent."""
    if isinstance(value, dict):
        value = {name: held for name, held in value.items() if held is not None}
    try:
        return msgspec.convert(value, row_type)
    except UnicodeEncodeError as error:  # half of a surrogate pair where a word is looked for
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
    """lines: rows of one of the types above, or dicts (of a log)."""
    files.write_text(path, "".join(json_line(line) for line in lines))


def append(path, line):
    with files.writing(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json_line(line))


def json_line(line):
    return json.dumps(as_dict(line), ensure_ascii=False) + "\n"


def write_json(path, row):
    files.write_text(path, json.dumps(as_dict(row), indent=1, ensure_ascii=False) + "\n")
