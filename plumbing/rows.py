"""The rows of every file that stages pass on or people bring: what each field is called, its unit
and its range.

This is the contract between the stages. `read` gives a list of one of the types below, whose fields
are attributes (`pair.winner`); what does not fit ends in one line that names the file, the line and
the field. A field with a default may be missing in a file, or null. Lines may hold further fields,
which nobody reads.
"""

import functools
import json
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from plumbing import files
from plumbing.files import stop

# --------------------------------------------------------------------------------------------------
# What a field may hold; the description is what a person reads where something else is found
# --------------------------------------------------------------------------------------------------

Text = Annotated[str, Meta(description="text")]
Name = Annotated[
    str, Meta(description=f"a name that a file can have, of at most {files.LONGEST_NAME} bytes")
]
FilePath = Annotated[
    str,
    Meta(description="a path that a file can have: below 4000 bytes, none of its names above 255"),
]
Index = Annotated[int, Meta(ge=0, le=2**63 - 1, description="a whole number from 0")]
Count = Annotated[int, Meta(ge=1, le=10**9, description="a whole number from 1 to 1e+09")]
Number = Annotated[float, Meta(ge=-1e300, le=1e300, description="a finite number")]
Share = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
Signed = Annotated[float, Meta(ge=-1, le=1, description="a number from -1 to 1")]
Seconds = Annotated[float, Meta(ge=0, le=1e6, description="a number from 0 to 1e+06")]
ClipSeconds = Annotated[float, Meta(ge=0.1, le=3600, description="a number from 0.1 to 3600")]
Probabilities = Annotated[
    tuple[Share, Share, Share],
    Meta(description="three probabilities"),  # of Good, Medium, Bad
]

SPLITS = ("train", "val", "test")
Split = Literal["train", "val", "test"]
Rating = Literal["Good", "Medium", "Bad"]
Choice = Literal["a", "b", "tie"]


class Row(Struct):
    """A line of a .jsonl, or an object of a .json."""

    def __post_init__(self):
        for field, fits in checks_of(type(self)):
            if not fits(getattr(self, field)):
                raise ValueError(f"{field} does not fit")


@functools.cache
def checks_of(row_type):
    """What msgspec cannot say of the fields: [(name, check), ...]."""
    kinds = typing.get_type_hints(row_type, include_extras=True)
    checks = {field: check_of(kind) for field, kind in kinds.items()}
    return [(field, check) for field, check in checks.items() if check is not None]


def check_of(kind):
    """What msgspec cannot say of a value of this kind, also inside a list or a dict: a function,
    value -> whether it fits. None where msgspec says all."""
    for known, fits in ((Text, files.is_text), (Name, files.is_name), (FilePath, files.is_path)):
        if kind == known:
            return lambda value: not isinstance(value, str) or fits(value)
    if kind == Probabilities:
        return lambda value: abs(sum(value) - 1) < 1e-3
    origin = typing.get_origin(kind)
    checks = [check_of(part) for part in typing.get_args(kind)] if origin is not Annotated else []
    if not any(checks):
        return None
    always = lambda value: True  # noqa: E731
    checks = [check or always for check in checks]
    if origin is dict:
        return lambda value: all(
            checks[0](name) and checks[1](held) for name, held in value.items()
        )
    if origin is list:
        return lambda value: all(map(checks[0], value))
    if origin is tuple:
        return lambda value: all(check(item) for check, item in zip(checks, value))
    return lambda value: all(
        check(value) for check in checks
    )  # of a union, whose other kinds are no text


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


class World(Row, kw_only=True, omit_defaults=True):
    """run.json as stage 00 leaves it. Stage 01 completes it to a `Run`."""

    model: Text  # as given to --model
    checkpoint: FilePath  # for people: the velocity network's file, or `upstream` for the one under --weights
    checkpoint_digest: Text  # what counts
    video_root: FilePath  # absolute, or relative to the run folder
    clip_s: ClipSeconds  # seconds of video that one audio belongs to
    defaults: dict[
        str, dict[str, Number]
    ] = {}  # {stage: {flag: this run's replacement for the paper's number}}
    scorers: Literal["real", "toy"] = "real"  # the set of frozen scorers
    scorers_root: FilePath | None = None  # the folder of their files, if not --weights
    cavp_root: FilePath | None = None  # Frieren alone: the folder of its features
    size: Text | None = (
        None  # the toy world alone: its size, its seed, its raters' noise as a factor
    )
    world_seed: Index | None = None
    rater_noise: Number | None = None


class Run(World, kw_only=True, omit_defaults=True):
    """run.json as stage 01 leaves it."""

    latent_shape: tuple[Count, Count]  # (T, C)
    sample_rate_hz: Count
    sampler: Sampler
    num_samples: Count  # audios per clip that the model made
    seed: Index
    max_clips: Index
    clips_digest: Text  # of clips.jsonl


class Clip(Row, kw_only=True):
    """clips.jsonl."""

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


class MissingClip(Row):
    """01_missing.jsonl: a listed clip whose video does not exist."""

    id: Name
    split: Split
    reason: Text


class SkippedClip(Row):
    """01_samples/00012.skipped.jsonl: a clip whose video cannot be used."""

    clip: Name
    reason: Text


class Sample(Row):
    """01_samples/00012.jsonl: an audio."""

    clip: Name
    k: Index  # the k-th of its clip
    seed: Index  # of its initial noise
    wav: Text  # 01_audio/<clip>_<k>.wav
    row: Index  # of the latents in 00012.pt
    digest: Text  # of the wav
    finite: bool  # wave and latent; what is not is never in a pair
    peak: Share  # of full scale
    clipped: Share  # of the samples, at full scale


# --------------------------------------------------------------------------------------------------
# 02 to 04: what people answered, scores, pairs
# --------------------------------------------------------------------------------------------------


class Answer(Row, kw_only=True, omit_defaults=True):
    """What every answer of a person may hold."""

    rater: Text = ""
    repeat: Literal[0, 1] = 0  # 1: the same was asked once more, to see how steady the rater is
    seconds: Seconds | None = None  # that the answer took
    comment: Text | None = None


class RatingAnswer(Answer, kw_only=True):
    """02_ratings.jsonl: what one person said of one audio. Of audio from elsewhere, `clip` is a
    name for its video, caption and label, and `k` the path of the audio below --ratings-root."""

    clip: Name
    k: Index | FilePath
    rating: Rating
    audio: FilePath | None = None
    video: FilePath | None = None
    caption: Text | None = None
    label: Text | None = None


class ChoiceAnswer(Answer, kw_only=True):
    """03_human_choices.jsonl, and the answers to `08_listen.py blind`, where a and b are
    systems."""

    clip: Name
    a: Index | Name
    b: Index | Name
    choice: Choice


class Score(Row, kw_only=True):
    """03_scores/00012.jsonl: the five scores of an audio (Sec. 2.1), null where one does not apply,
    and p (Eq. 1)."""

    clip: Name
    k: Index
    ib: Number | None = None  # cosine
    clap: Number | None = None  # cosine
    desync_s: Number | None = None  # seconds
    is_nats: Number | None = None  # nats
    pesq: Number | None = None  # MOS-LQO, 1.0 to 4.64
    p: Probabilities


class RatedScore(Row, kw_only=True):
    """02_scores.jsonl: the five scores of a rated audio, and the raters' majority, the worse of a
    tie."""

    clip: Name
    k: Index
    ib: Number | None = None
    clap: Number | None = None
    desync_s: Number | None = None
    is_nats: Number | None = None
    pesq: Number | None = None
    rating: Rating


class ElsewhereScore(RatedScore, kw_only=True):
    """02_elsewhere.jsonl: the same of an audio from elsewhere."""

    k: FilePath  # the audio, below --ratings-root


class Pair(Row):
    """03_pairs.jsonl, 03_human_pairs.jsonl: two audios of a clip."""

    clip: Name
    winner: Index  # k
    loser: Index  # k
    p_winner: Probabilities
    p_loser: Probabilities


class SplitPair(Row):
    """04_stage1.jsonl, 04_stage2.jsonl."""

    clip: Name
    winner: Index
    loser: Index
    score_c: Signed  # Eq. 3; high = an easy pair
    source: Literal["auto", "human"]


# --------------------------------------------------------------------------------------------------
# 05 and 06: the policy folder
# --------------------------------------------------------------------------------------------------


class Policy(Row):
    """policy.json: whose policy.pt it is."""

    model: Text
    base_digest: Text  # of the checkpoint that was tuned
    method: Literal["flow_dpo", "ddpo"]
    steps: Count
    commit: Text | None = None  # of this code; null outside of git
    computed_with: dict[str, Text | None] = {}  # the CPU, and the kernels that were asked for


class FlowDpoStep(Row):
    """05_flow_dpo/log.jsonl: an optimizer step; means over the global batch. docs/curves.md reads
    them."""

    step: Index
    stage: Literal[1, 2]
    loss: Number  # Eq. 5, log 2 at step 0
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
    grad_norm: Number  # before it is clipped at 1
    lr: Number
    seconds: Number
    forwards: Index  # rows through policy and reference so far
    forwards_grad: Index  # those with a backward pass
    peak_gb: Number | None = None  # of the GPU, GiB


class DdpoStep(Row):
    """06_ddpo/log.jsonl: an optimizer step."""

    step: Index
    round: Index
    reward: Number  # mean P(Good) of the round's audios
    reward_std: Number  # within a prompt, mean over prompts
    no_spread: Share  # of the round's prompts whose audios all have one reward, up to rounding
    ratio: Number  # mean over the audios
    clipped: Share
    approx_kl: Number
    grad_norm: Number
    lr: Number
    seconds: Number
    forwards: Index
    forwards_grad: Index
    peak_gb: Number | None = None


# --------------------------------------------------------------------------------------------------
# 07 and 08: results
# --------------------------------------------------------------------------------------------------


class Result(Row, kw_only=True):
    """07_results.jsonl: one metric of one system; intervals are of 95 %."""

    system: Name
    metric: Text
    better: Literal["higher", "lower"]
    value: Number | None = None
    low: Number | None = None
    high: Number | None = None
    n: Index  # clips
    diff: Number | None = None  # value minus the value of base (or of --against), null for itself
    diff_low: Number | None = None
    diff_high: Number | None = None
    verdict: Literal["better", "worse"] | None = None  # null where the interval of diff holds 0


class System(Row, kw_only=True):
    """A system of 07_systems.json."""

    name: Name
    folder: FilePath | None = None  # of a policy or of audio files; null for base and ground truth
    audio: dict[Name, FilePath]  # {clip: file}


class ShownMetric(Row):
    """How a metric of 07_systems.json is shown."""

    column: Text
    better: Literal["higher", "lower"] = "higher"
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


def typed(value, row_type, where, hint="", from_text=False):
    """value, as read from JSON, as a row; one line says where it does not fit. A field that is null
    is absent. from_text: numbers may be texts, as in a csv, where an empty cell is absent."""
    if isinstance(value, dict):
        absent = ("", None) if from_text else (None,)
        value = {name: held for name, held in value.items() if held not in absent}
    try:
        return msgspec.convert(value, row_type, strict=not from_text)
    except msgspec.ValidationError as error:
        stop(f"{where}{what_is_wrong(str(error), value, row_type)}{hint}")
    except (
        UnicodeEncodeError
    ) as error:  # half of a surrogate pair, where msgspec looks for a word or a name
        fields = [f", field '{name}'" for name, held in value.items() if held == error.object]
        stop(f"{where}{''.join(fields[:1])}: {error.object!a:.60} is not text{hint}")


def what_is_wrong(error, value, row_type):
    """msgspec's words for a person: the field, what it holds and what it should."""
    if not isinstance(value, dict):
        return f": {value!r:.60} is not a set of fields"
    place = re.search(r" - at .*`\$(.*)`$", error)
    place = place[1] if place else ""
    missing = re.match(r"Object missing required field `(.+?)`", error)
    own = re.match(r"(\w+) does not fit", error)  # Row's
    if own:
        place += f".{own[1]}"
    field, value, kind = follow(place, value, row_type)
    if missing:
        return f": field '{'.'.join(filter(None, (field, missing[1])))}' is missing"
    return f", field '{field}': {value!r:.60} is not {words_of(kind)}"


def follow(place, value, kind):
    """The field at msgspec's place, `.sampler.steps`, with what it holds and its kind; not beyond
    where msgspec names no name, `.files[...]`, or the kind has words of its own."""
    field = ""
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place):
        origin = typing.get_origin(kind)
        if name and isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Struct):
            kind = {info.encode_name: info.type for info in msgspec.structs.fields(kind)}[name]
            value = value.get(name)
            field += f".{name}" if field else name
        elif index.isdecimal() and origin in (list, tuple):
            kind = typing.get_args(kind)[int(index) if origin is tuple else 0]
            value = value[int(index)]
            field += f"[{index}]"
        else:
            break
    return field, value, kind


def words_of(kind):
    """What a value of this kind is, in a person's words."""
    origin = typing.get_origin(kind)
    parts = typing.get_args(kind)
    if origin is Annotated:
        return next(meta.description for meta in kind.__metadata__ if meta.description)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is list:
        return f"a list, each of it {words_of(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(map(words_of, parts))}"
    if origin is dict:
        return (
            f"a set of fields, each named by {words_of(parts[0])} and holding {words_of(parts[1])}"
        )
    if parts:  # a union
        return " or ".join(words_of(part) for part in parts if part is not type(None))
    plain = {str: "text", bool: "true or false", typing.Any: "anything", type(None): "null"}
    return plain.get(kind, "a set of fields")


def as_dict(row):
    return msgspec.to_builtins(row)


JSON = json.JSONEncoder(ensure_ascii=False)


def write(path, rows):
    """rows: of one of the types above, or dicts (the lines of a log)."""
    lines = [JSON.encode(as_dict(row)) + "\n" for row in rows]
    files.write_text(path, "".join(lines))


def append(path, row):
    with files.writing(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(as_dict(row)) + "\n")


def write_json(path, row):
    files.write_text(path, json.dumps(as_dict(row), indent=1, ensure_ascii=False) + "\n")
