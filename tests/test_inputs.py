"""What a user can get wrong: every number that a flag takes, every file that is read, every field
of every typed row, wrong in each way that its kind can be. Exit code 2 and one line on stderr that
names the flag, or file, line and field; nothing that was written is lost."""

import copy
import json
import math
import os
import re
import shutil
import types
import typing
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import (
    STAGES,
    Malicious,
    call,
    cells,
    files_of,
    read,
    read_json,
    remove,
    said,
    set_rating,
    stage,
    stopped,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from adapters.toy_people import Truth
from common import command, files, rows

MISSING, NAN, LONG, NUL, SURROGATE = object(), math.nan, "x" * 300, "a\0b", "\ud800"
DERANDOMIZED = dict(derandomize=True, database=None, deadline=None)

# Every field of every typed row

KINDS = [kind for kind in vars(rows).values() if isinstance(kind, type)]
KINDS = [kind for kind in KINDS if issubclass(kind, rows.Row) and kind is not rows.Row] + [Truth]
NO_TEXT = (7, ["a"], {"a": 1}, True, NUL, SURROGATE)
NO_PATH = (*NO_TEXT, "", "x/" * 2000)
NO_NAME = (*NO_PATH, LONG, ".", "..", "../x", "/x", "a\\b", "a\nb")
NO_NUMBER = (True, "1", NAN, math.inf, 10**400, [], {})
UNFIT = {  # by hand
    rows.Text: NO_TEXT,
    rows.FilePath: NO_PATH,
    rows.Name: NO_NAME,
    rows.Index: (*NO_NUMBER, -1, 1.5, 2**63),
    rows.Count: (*NO_NUMBER, 0, 1.5, 10**9 + 1),
    rows.Number: (*NO_NUMBER, -1e301, 1e301),
    rows.Share: (*NO_NUMBER, -0.1, 1.1),
    rows.Signed: (*NO_NUMBER, -1.1, 1.1),
    rows.Seconds: (*NO_NUMBER, -0.1, 1.1e6),
    rows.ClipSeconds: (*NO_NUMBER, 0, 3601),
    rows.Probabilities: (0.5, [1, 0], [1, 0, "0"], [NAN, 0, 1], [-1, 1, 1], {}),
    rows.Split: (["a"], {}, True, "none of them", SURROGATE, 3),
    typing.Annotated[int, msgspec.Meta(ge=0, le=1)]: (True, "0", 2, -1, [], {}),
    bool: (0, 1, "false", []),
    rows.Index | rows.Name: (True, [], {}, 1.5, NAN, NUL, "", -1),
    tuple[rows.Count, rows.Count]: (7, "ab", {}, [1], [1, 1, 1], [1, 0]),
    list[rows.Text]: (7, "ab", {}, [7], [NUL]),
    dict[rows.Name, rows.FilePath]: (7, "ab", [[]], {"../x": "a"}, {"a": 7}, {"a": ""}),
    rows.Sampler: (7, "ab", [[]], {}, {"steps": 0, "guidance": 1}),
}
ODD = [None, "a", 0.5, 0, 1, {"a": {"a": 1}}, *(x for values in UNFIT.values() for x in values)]


def right(kind):
    """A JSON value that fits."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind == rows.Probabilities:
        return [0.2, 0.3, 0.5]
    if kind is str:
        return "b"
    if origin is typing.Annotated and parts[0] is str:
        words = re.match(r"\(\?#one of (\w+)", parts[1].pattern)
        return words[1] if words else "b"
    if kind is bool:
        return True
    if origin is typing.Literal:
        return parts[0]
    if origin in (types.UnionType, typing.Union):
        return right(parts[0])
    if origin is tuple:
        return [right(part) for part in parts]
    if origin is list:
        return [right(parts[0])]
    if origin is dict:
        return {"b": {} if parts[1] is typing.Any else right(parts[1])}
    if origin is typing.Annotated and parts[0] in (int, float):
        return next(meta.ge for meta in parts[1:] if meta.ge is not None)
    if origin is typing.Annotated:
        return right(parts[0])
    return {info.encode_name: right(info.type) for info in msgspec.structs.fields(kind)}


@st.composite
def damaged(draw, value):
    """A JSON value of which one part is another, is gone, or has another beside it."""
    if not isinstance(value, (list, dict)) or not value or draw(st.booleans()):
        return draw(st.sampled_from(ODD))
    value = copy.deepcopy(value)
    at = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
    how = draw(st.sampled_from(("another", "gone", "more")))
    if how == "another":
        value[at] = draw(damaged(value[at]))
    elif how == "gone":
        del value[at]
    elif isinstance(value, dict):
        value[draw(st.sampled_from(NO_NAME[4:]))] = value[at]
    else:
        value.append(value[at])
    return value


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "x.jsonl"


def says_what(line):
    """Whether the line says what is wrong, without a regular expression."""
    return re.search("Expected |Number out|is missing$|is not text$", line) and "regex" not in line


@pytest.mark.parametrize("kind", UNFIT, ids=lambda kind: re.sub(r"[^\w ]+", " ", str(kind))[:30])
def test_what_a_field_must_not_hold_is_named_with_the_line_and_the_field(kind, file):
    held = msgspec.defstruct("Held", [("x", kind)], bases=(rows.Row,))
    for value in UNFIT[kind]:
        write(file, [{"x": value}])
        line = stopped(rows.read, file, held)
        assert line.startswith(f"{file}, line 1") and "field 'x" in line and says_what(line)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=60, **DERANDOMIZED)
@given(data=st.data())
def test_a_row_with_one_field_changed_is_read_as_it_is_or_the_field_is_named(kind, file, data):
    whole = right(kind)
    field = data.draw(st.sampled_from(msgspec.structs.fields(kind)))
    name = field.encode_name
    value = data.draw(st.one_of(st.none(), damaged(whole[name])))
    write(file, [whole, whole | {name: value}])
    try:
        found = rows.read(file, kind)[1]
    except common.Stop as error:
        line = str(error)
        assert line.startswith(f"{file}, line 2") and says_what(line)
        assert f"field '{name}" in line or f"{SURROGATE!a} is not text" in line
    else:
        assert value is not None or not field.required
        less = {key: held for key, held in (whole | {name: value}).items() if held is not None}
        assert repr(found) == repr(msgspec.convert(less, kind))  # nan is nan


@st.composite
def contents(draw):
    """A type of row and bytes: lines of that type, each with something wrong, some bytes of them
    replaced."""
    kind = draw(st.sampled_from(KINDS))
    lines = draw(st.lists(damaged(right(kind)), max_size=3))
    whole = b"\n".join(json.dumps(line).encode() for line in lines)
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    return kind, whole[:start] + draw(st.binary(max_size=50)) + whole[end:]


@settings(max_examples=300, **DERANDOMIZED)
@given(content=contents())
def test_any_bytes_give_rows_or_one_line(content, file):
    kind, content = content
    file.write_bytes(content)
    try:
        found = rows.read(file, kind)
    except common.Stop as error:
        line = str(error)
        assert line.startswith(str(file)) and "\n" not in line and len(line) < 600, line
        return
    rows.write(file, found)
    assert rows.read(file, kind) == found


@pytest.mark.parametrize("field", ["p_winner", "p_loser"])
def test_the_probabilities_of_a_pair_have_the_sum_1(field, file):
    write(file, [right(rows.Pair) | {field: [1, 1, 1]}])
    line = stopped(rows.read, file, rows.Pair)
    assert line.endswith(f"x.jsonl, line 1, field '{field}': Expected three numbers whose sum is 1")


def test_a_listed_clips_name_has_at_most_200_bytes_however_many_characters(file):
    write(file, [{"id": "é" * 100}, {"id": "é" * 101}])
    line = stopped(rows.read, file, rows.ListedClip)
    assert line.endswith("x.jsonl, line 2, field 'id': Expected a name of at most 200 bytes")


def test_a_line_separator_inside_a_caption_ends_no_line(file):
    clips = [rows.ListedClip(id="a", caption="a\u2028b\x85c"), rows.ListedClip(id="b", caption="d")]
    rows.write(file, clips)
    assert rows.read(file, rows.ListedClip) == clips


def test_a_blank_line_is_named_and_trailing_ones_do_not_matter(file):
    file.write_text('{"id": "a"}\r\n{"id": "b"}\r\n\n')
    assert [clip.id for clip in rows.read(file, rows.ListedClip)] == ["a", "b"]
    file.write_text('{"id": "a"}\n\n{"id": "b"}\n')
    said(stopped(rows.read, file, rows.ListedClip), "x.jsonl, line 2: not valid JSON")


# Every file and every flag, by the stage that reads it

WRONG = {  # kind of an entry of a .pt: what it must not be
    "text": (MISSING, 7, ["a"], {"a": 1}, True),
    "whole": (MISSING, -1, 1.5, True, "1", NAN, 10**30, []),
    "list": (MISSING, 7, "ab", {}, [[]]),
    "record": (MISSING, 7, "ab", [[]], {"x": 7}),
    "tensor": (MISSING, 7, [1.0], {}, torch.zeros(3), torch.tensor(1.0)),
    "weights": (MISSING, 7, [1.0], {"x": 7}, {"x": torch.zeros(3)}),
}
SHARD = {"latents": "tensor", "digests": "list", "features": "record", "crc32": "record"}
SHARD |= {"crc32/latents": "list", "features/frames": "tensor", "features/pooled": "tensor"}
SHARD |= {"features/text": "tensor"}
CHECKPOINT = {"step": "whole", "settings": "text", "model": "weights", "optimizer": "weights"}
CHECKPOINT |= {
    "average": "weights",
    "optimizer/state": "weights",
    "optimizer/state/0/exp_avg": "tensor",
}
AUDIOSCORE = {"audioscore": "weights", "audioscore/p_y": "tensor", "audioscore/mean": "tensor"}
BASE = dict(kind="text", vocabulary="list", net="weights", encoder="weights", codec="weights")
SCORERS = dict(kind="text", vocabulary="list", clap="weights", panns="weights")
OUT = ("--out", "x")
TOY = ("--model", "toy", "--checkpoint", "{run}/00_base.pt", "--videos", "{run}/00_videos")
TOY = ("--run-dir", "{run}/new", *TOY)
TO_CLIPS = (*TOY, "--clips", "{run}/list.jsonl")

# File: the stage that reads it, its flags, its type or (a/b is b of a) the entries of a .pt, what
# must be gone.
FILES = {
    "run.json": ("04", (), rows.Run),
    "clips.jsonl": ("06", OUT, rows.Clip),
    "list.jsonl": ("01", TO_CLIPS, rows.ListedClip),
    "01_samples/00000.jsonl": ("02", (), rows.Sample),
    "01_samples/00000.skipped.jsonl": ("02", (), rows.SkippedClip),
    "02_ratings.jsonl": ("02", (), rows.RatingAnswer),
    "rated.jsonl": ("02", ("--ratings", "{run}/rated.jsonl"), rows.RatingAnswer),
    "02_scores.jsonl": ("03", (), rows.RatedScore),
    "03_human_choices.jsonl": ("03", (), rows.ChoiceAnswer),
    "chosen.jsonl": ("03", ("--choices", "{run}/chosen.jsonl"), rows.ChoiceAnswer),
    "03_pairs.jsonl": ("04", (), rows.Pair),
    "03_human_pairs.jsonl": ("04", (), rows.Pair),
    "04_stage1.jsonl": ("05", OUT, rows.SplitPair),
    "04_stage2.jsonl": ("05", OUT, rows.SplitPair),
    "05_flow_dpo/policy.json": ("07", (), rows.Policy),
    "05_flow_dpo/log.jsonl": ("05", (), rows.FlowDpoStep),
    "06_ddpo/log.jsonl": ("06", (), rows.DdpoStep),
    "02_settings.json": ("03", (), rows.Record),
    "04_settings.json": ("05", OUT, rows.Record),
    "05_flow_dpo/settings.json": ("05", (), rows.Record),
    "01_missing.jsonl": ("07", (), rows.MissingClip),
    "01_to_rate.jsonl": ("02", (), rows.Clip),
    "weights.json": ("02", (), rows.Weights),
    "00_truth.jsonl": ("02", (), Truth, "02_ratings.jsonl"),
    "01_samples/00000.pt": ("05", OUT, SHARD),
    "02_audioscore.pt": ("03", (), AUDIOSCORE),
    "05_flow_dpo/policy.pt": ("07", (), {"out.bias": "tensor"}),
    "05_flow_dpo/checkpoint.pt": ("05", (), CHECKPOINT),
    "02_scores/00000.toy.pt": ("02", (), {"clap": "tensor", "logits": "tensor"}),
    "03_scores/00000.toy_video.pt": ("06", OUT, {"key": "text", "ib": "tensor", "sync": "tensor"}),
    "07_clips/test_00000.features_video.pt": ("07", (), {"pooled": "tensor", "frames": "tensor"}),
    "07_scores/base/test_00000.toy.pt": ("07", (), {"ib": "tensor", "embedding": "tensor"}),
    "00_base.pt": ("05", OUT, BASE),
    "00_scorers.pt": ("06", OUT, SCORERS),
    "00_oracle.pt": ("02", (), {"classifier": "weights"}, "02_ratings.jsonl"),
    "00_twin.pt": ("07", (), {"tagger": "weights"}),
}
NEW = {  # a file that a whole run lacks: what it is made from
    "01_samples/00000.skipped.jsonl": [dict(clip="train00000", reason="too short")] * 2,
    "01_to_rate.jsonl": [dict(id="other", video="test00000.mp4", split="rate")] * 2,
    "01_missing.jsonl": [dict(id="lost", split="test", reason="no lost.mp4")] * 2,
    "list.jsonl": "clips.jsonl",
    "rated.jsonl": "02_ratings.jsonl",
    "chosen.jsonl": "03_human_choices.jsonl",
}
BROKEN = {
    ".pt": ("", "{}", "PK\3\4", "half"),
    ".json": ("{", "[1]", "7", '{"a": 1, "a": 2}', '{"\\ud800": 1}', "{\0}"),
}
BROKEN[".jsonl"] = ("\n\n{}", *BROKEN[".json"], "PK\3\4")

# Table: the stage that reads it, its flags, its rows, and by column what a cell of the last must
# not be.
RATED = "clip,k,rating,rater,repeat,seconds,comment\n"
RATED += "train00000,0,Good,x,0,7.5,\ntrain00001,1,Bad,x,,,noisy\n"
CHOSEN = "clip,a,b,choice\ntrain00000,0,1,a\ntrain00001,1,0,b\n"
NO_ID = ("../x", "", NUL, LONG)
TABLES = {
    "rated.csv": (
        "02", ("--ratings", "{run}/rated.csv"), RATED,
        {0: ("../x", NUL, ""), 1: ("7", "x", "", "²"), 2: ("Great", NUL), 3: (NUL,),
         4: ("2", "yes"), 5: ("-1", "nan", "1e9", "fast"), 6: (NUL,)}),
    "chosen.csv": (
        "03", ("--choices", "{run}/chosen.csv"), CHOSEN,
        {0: ("nobody", NUL, ""), 1: ("9", "0"), 2: ("x", "", "1"), 3: ("both", NUL)}),
    "list.csv": (
        "01", (*TOY, "--clips", "{run}/list.csv"), "train0,10,dog,train\ntrain1,20,cat,test\n",
        {0: NO_ID, 1: ("ten", "-1", "1" * 5000, "", "1.5"), 2: (NUL,), 3: ("dev", "", NUL)}),
    "list.tsv": (
        "01", (*TOY, "--clips", "{run}/list.tsv"), "id\tlabel\ntrain00000\tdog\ntrain00001\tcat\n",
        {0: NO_ID, 1: (NUL,)}),
    "vgg-test.tsv": (
        "01", (*TOY, "--clips", "{run}/clips.jsonl", "--test-list", "{run}/vgg-test.tsv"),
        "id\tlabel\ntest00000\tdog\ntest00001\tcat\n", {0: NO_ID, 1: (NUL,)}),
}  # fmt: skip


# What no single field shows

NO_FOLDER = ("../x", "/x", ".", "..", "a/b", "01_samples", "07_audio", LONG)
NO_SYSTEM = ("mine", "mine=nowhere", "../x=05_flow_dpo", LONG, "base=05_flow_dpo")
FLAGS = [  # stage, flags, what the line must name; of a whole run
    ("01", "--videos .", "--videos"), ("01", "--model sora", "sora"),
    ("01", "--model toy:large", "toy"), ("01", "--cavp .", "--cavp"),
    ("01", "--part 5/4", "I/N"), ("02", "--part 0/4", "I/N"), ("07", "--part 1of4", "I/N"),
    ("03", "--part 1/4 --redo", "--redo"), ("05", "--part 1/4", "--part"),
    ("05", "--bet 7", "--bet"), ("05", "--bta 7", "--bta"), ("05", "--global 4", "--global"),
    ("05", "--beta high", "--beta"), ("06", "--updates 9 --sampling-steps 4", "--updates"),
    ("06", "--eta 0", "--eta"),
    ("05", "--out clips.jsonl", "is a file"), ("06", "--out run.json", "is a file"),
    ("05", "--out=", "--out: is empty"),
    ("06", "--out=", "--out: is empty"),
    *[("05", f"--out={x}", "folder name") for x in NO_FOLDER],
    *[("06", f"--out={x}", "folder name") for x in NO_FOLDER],
    *[("07", f"--systems {x}", x) for x in NO_SYSTEM],
    ("07", "--systems a=05_flow_dpo a=06_ddpo", "twice"), ("07", "--split train", "--split"),
    ("07", "--systems ground_truth=06_ddpo", "run itself"),
    ("07", "--judge audiobox", "--judge audiobox"),  # the toy world's scorers have none
    ("07", "--against mine", "none of the systems (ground_truth, base, flow_dpo, ddpo)"),
    ("02", "--ratings {run}/nobody.csv", "/nobody.csv: no such file"),
    ("02", "--ratings {run}/nobody.jsonl", "/nobody.jsonl: no such file"),
    ("02", "--ratings {run}/01_samples", "/01_samples: no such file"),
    ("02", "--exclude-rater bob --redo", "--exclude-rater bob"),
    ("02", "--audioscore {run}/none.pt", "/none.pt: no such file"),
    ("02", "--audioscore {run}/02_audioscore.pt", "02_audioscore.pt: is this run's own"),
    *[("02", f"--audioscore x.pt {other}", "--audioscore: not with --ratings")
      for other in ("--ratings x.csv", "--exclude-rater bob", "--part 1/2")],
    ("03", "--exclude-rater bob --redo", "--exclude-rater bob"),
    ("02", "--exclude-rater simulated --redo", "at least 2"),
    ("03", "--choices {run}/03_to_choose.csv --redo", "no choice"),
    ("08", "choose --guide {run}/none.txt", "no such file"),
    ("08", "blind --systems best", "--systems best: is no system"),
    ("08", "blind --systems base", "compares two systems"),
    # other settings than the record's
    ("00", "--size tiny --seed 1", "seed=0, now 1; use another --run-dir"),
    ("01", "--guidance 3", "sampler=", "now", "use another --run-dir"),
    ("01", "--seed 4", "seed=0, now 4; use another --run-dir"),
    ("01", "--num-samples 4", "num_samples=5, now 4; use another --run-dir"),
    ("02", "--num-rated-clips 7", "num_rated_clips=", "now 7; use --redo"),
    ("03", "--min-score-c 0.1", "min_score_c=", "now 0.1; use --redo"),
    ("04", "--threshold 0.11", "threshold=", "now 0.11; use --redo"),
    ("05", "--beta 7", "beta=", "now 7", "use another --out"),
    ("05", "--hard-first", "hard_first=", "now", "use another --out"),
    ("06", "--lr 1", "lr=", "now 1", "use another --out"),
]  # fmt: skip
LISTS = [  # lines of --clips, what is wrong with them
    ([dict(id="x"), dict(id="x", split="test")], "x occurs in both train and test"),
    ([dict(id="x"), dict(id="x")], "clip 2, field 'id': x occurs twice"),
    ([dict(id="x")], "none of the 1 clips"),
    ([dict(id="x", video="../y.mp4")], "'../y.mp4' points outside"),
    ([dict(id="x", video="/etc/passwd.mp4")], "'/etc/passwd.mp4' points outside"),
    ([dict(id="x", video="a/../../y.mp4")], "'a/../../y.mp4' points outside"),
]  # fmt: skip
NEEDED = {  # by a stage that runs anew
    "01": ("00_base.pt", "clips.jsonl"),
    "02": ("01_samples/00000.jsonl", "00_scorers.pt"),
    "03": ("02_audioscore.pt", "02_ratings.jsonl", "01_samples/00000.jsonl"),
    "04": ("03_pairs.jsonl", "03_human_pairs.jsonl"),
    "05": ("04_stage1.jsonl", "04_stage2.jsonl", "01_samples/00000.pt", "00_base.pt"),
    "06": ("02_audioscore.pt",),
    "07": ("clips.jsonl", "05_flow_dpo/policy.pt", "05_flow_dpo/policy.json"),
}
MADE, READ = "not the file that was written here", "changed after it was read for"
CHANGED = [  # an input, a later stage, why it is refused, the stage to rerun
    ("02_audioscore.pt", "03", MADE, "02_fit_audioscore.py"),
    ("03_pairs.jsonl", "04", MADE, "03_mine_pairs.py"),
    ("04_stage1.jsonl", "05", MADE, "04_curriculum_split.py"),
    ("02_scores.jsonl", "06", MADE, "02_fit_audioscore.py"),
    ("01_samples/00000.jsonl", "03", READ, "02_fit_audioscore.py"),
    ("03_human_choices.jsonl", "05", READ, "03_mine_pairs.py"),
    *[("02_ratings.jsonl", f"0{i}", READ, "02_fit_audioscore.py") for i in range(3, 8)],
]
TAKEN = [  # an entry of another run's 02_audioscore.pt, what it is, what the line must name
    (None, "", "cannot be read"), (None, "half", "cannot be read"),
    ("audioscore", MISSING, "'audioscore' is missing"),
    ("audioscore/p_y", MISSING, "is not an AudioScore"),
    ("audioscore/mean", torch.full((5,), NAN), "not finite"),
    ("audioscore/std", torch.ones(6), "is not an AudioScore"),
    *[("weights", held, "does not say which weights its scorers had, as those of older versions")
      for held in (MISSING, 7, ["toy"], {"toy": 7}, {"toy": torch.zeros(2, 2)})],
    ("weights/toy", "0123456789abcdef", "the weights of toy are 0123456789abcdef there and"),
    ("weights", {}, "the weights of toy are absent there and"),
    ("weights/clap", "0123456789abcdef", "clap are 0123456789abcdef there and absent here"),
]  # fmt: skip
BLIND = [  # clip, a, b, choice, rater; what is wrong with it
    (("test00000", "base", "best", "a", "x"), "field 'b': 'best' is no system"),
    (("test09999", "base", "ddpo", "a", "x"), "answers of another run"),
    (("test00000", "base", "ddpo", "c", "x"), "field 'choice'"),
    (("test00000", "base", "base", "a", "x"), "two systems"),
]


def removed(*patterns):
    return lambda run: remove(run, *patterns)


def lines(to, source, changed):
    """changed: a function of the list of rows in `source`, dicts, that writes `to`."""
    return lambda run: write(run / to, changed(read(run / source)))


def text(to, content):
    return lambda run: (run / to).write_text(content)


def both(first, second):
    return lambda run: (first(run), second(run))


def saved(file, value):
    return lambda run: files.save_pt(run / file, value)


def changed(file, field, value):
    return lambda run: change(run / file, field, value)


def copied(file, to, field, value):
    """A changed copy."""
    return lambda run: (shutil.copy(run / file, run / to), change(run / to, field, value))


def zeroed(file, start, end):
    """A part of a file, as shares of its length, that a disk has lost."""

    def edit(run):
        content = bytearray((run / file).read_bytes())
        start_byte, end_byte = round(start * len(content)), round(end * len(content))
        content[start_byte:end_byte] = bytes(end_byte - start_byte)
        (run / file).write_bytes(content)

    return edit


def appended(name):
    return lambda run: (run / name).write_bytes((run / name).read_bytes() + b"\n")


def first_of_sheet(column):
    """The file that the first row of 02's sheet names is gone."""
    return lambda run: (run / cells(run / "02_to_rate.csv")[0][column]).unlink()


def base_moved(run):
    base = files.load_pt(run / "00_base.pt")
    base["net"]["out.bias"] += 1
    files.save_pt(run / "00_base.pt", base)


def never_finished(run):
    (run / "05_flow_dpo").rename(run / "05_mine")
    (run / "05_mine" / "policy.json").unlink()


def base_alone(run):
    (run / "alone").mkdir()
    shutil.copy(run / "00_base.pt", run / "alone")


def second_part(rows):
    """What another file may add to the first 20 answers, but for one that stands in both."""
    return [*rows[20:], rows[4] | {"repeat": 1}, rows[4], rows[4] | {"rater": "another"}]


def every_second_wrong(rows):
    wrong = {"rating": "Great", "k": 9}
    return [row | (wrong if i % 2 else {}) for i, row in enumerate(rows)]


def malicious(name):
    """The policy is gone, so that 05 trains; unpickled, the file would make another."""
    save = lambda run: torch.save({"audioscore": Malicious(run / "mark")}, run / name)  # noqa: E731
    return both(removed("05_flow_dpo/policy.*"), save)


def scenes():
    """Rows: stage, flags, what is done to the run, what the line must name."""
    for number in sorted(STAGES)[1:]:
        named = ("nowhere", "stage 01" if number > "01" else "--model")
        yield number, ("--run-dir", "{run}/nowhere"), None, named
    for number, names in NEEDED.items():
        for name in names:
            edit = both(removed(f"{number}_*"), removed(name))
            yield number, (), edit, (name.split("/")[0],)
    for name, number, reason, script in CHANGED:
        named = (name.split("/")[0], reason, f"rerun {script} --run-dir ", "--redo")
        edit = (lambda run: set_rating(run)) if name == "02_ratings.jsonl" else appended(name)
        yield number, OUT if number in ("05", "06") else (), edit, named
    yield from answers()
    yield from of_08()
    for field, value, named in TAKEN:
        flags = ("--audioscore", "{run}/other.pt", "--redo")
        yield "02", flags, copied("02_audioscore.pt", "other.pt", field, value), ("other.pt", named)
    edit = copied("02_audioscore.pt", "other.pt", "heldout", {})
    yield "02", flags[:2], edit, ("02_settings.json", "audioscore_file=None, now", "use --redo")
    # models, policies, videos
    yield "07", ("--systems", "mine=05_mine"), never_finished, ("05_mine", "not finished")
    policy = "05_flow_dpo/policy.json"
    for field, value in (("model", "frieren"), ("base_digest", "0123456789abcdef")):
        yield "07", (), changed(policy, field, value), ("05_flow_dpo", "another base")
    other = {"weight": torch.zeros(3)}
    edit = both(removed("07_audio/flow_dpo"), saved("05_flow_dpo/policy.pt", other))
    yield "07", (), edit, ("05_flow_dpo/policy.pt", MADE)
    yield "07", ("--systems", "mine={run}/05_flow_dpo"), edit, ("05_flow_dpo/policy.pt", MADE)
    edit = removed("07_audio/flow_dpo/settings.json")
    yield "07", (), edit, ("07_audio/flow_dpo: holds audio that stage 07 did not make",)
    yield "01", TOY, saved("00_base.pt", other), ("00_base.pt", "not a toy base")
    yield "05", OUT, base_moved, ("00_base.pt", "stage 01")
    alone = [flag.replace("00_base", "alone/00_base") for flag in TOY]
    yield "01", alone, base_alone, ("alone/00_base.pt", "00_scorers.pt", "beside it")
    outside = lambda found: [found[0] | {"video": "../00_base.pt"}, *found[1:]]  # noqa: E731
    named = ("clips.jsonl", "line 1", "'video'", "../00_base.pt")
    yield "06", (), lines("clips.jsonl", "clips.jsonl", outside), named
    edit = lambda run: os.utime(run / "00_videos/train00003.mp4")  # noqa: E731
    named = ("03_scores/00000.toy_video.pt: was made from other audio, videos or weights",)
    yield "06", (*OUT, "--steps", "2"), edit, named
    yield "06", OUT, malicious("02_audioscore.pt"), ("02_audioscore.pt", "not the file")
    for name in ("00_base.pt", "05_flow_dpo/checkpoint.pt", "01_samples/00000.pt"):
        yield "05", () if "checkpoint" in name else OUT, malicious(name), (name, "plain tensors")
    # pairs, checkpoints, shards
    easy, none = "04_stage1.jsonl", "is no pair, or stands here twice"
    for columns in ({}, {"winner": "loser", "loser": "winner"}, {"winner": "loser"}):
        twin = lambda r, x=columns: [r[0], r[0] | {a: r[0][b] for a, b in x.items()}]  # noqa: E731
        yield "05", OUT, both(lines(easy, easy, twin), vouch), (f"{easy}, line 2: ", none)
    state = "05_flow_dpo/checkpoint.pt"
    of_06 = lambda run: shutil.copy(run / "06_ddpo/checkpoint.pt", run / state)  # noqa: E731
    other = changed(state, "settings", "0123456789abcdef")
    for edit in (of_06, other, changed(state, "step", 1_000_000)):
        yield "05", (), edit, (f"{state}: belongs to another training",)
    for start, end in ((0.1, 0.35), (0.4, 0.65), (0.65, 0.9)):
        named = ("00000.pt", "of clip train", "remove both 00000.pt and 00000.jsonl, rerun 01_gen")
        yield "05", OUT, zeroed("01_samples/00000.pt", start, end), named
    named = ("01_samples/00000.pt: cannot be read",)
    yield "05", OUT, zeroed("01_samples/00000.pt", 0.9, 1), named


def answers():
    """Scenes of what people bring to 02 and 03."""
    to, given, flags = "answers.jsonl", "02_ratings.jsonl", ("--ratings", "{run}/answers.jsonl")
    named = ("line 41", "train", "twice", "line 3")
    yield "02", flags, lines(to, given, lambda r: [*r, r[2]]), named
    edit = both(lines(to, given, lambda r: r[:20]), lines("b.jsonl", given, second_part))
    named = ("1 of 43 rows", "/b.jsonl, line 22", "twice", "/answers.jsonl, line 5")
    yield "02", (*flags, "{run}/b.jsonl"), edit, named
    edit = both(lines(to, given, lambda r: r[:5]), removed("0[2-9]_*"))
    yield "02", flags, edit, (to, "one video", "at least 2")
    yield "02", flags, lines(to, given, lambda r: r[:-1]), (to, "--redo")
    first_ten = [f"line {i}," for i in range(2, 21, 2)]
    yield (
        "02",
        flags,
        lines(to, given, every_second_wrong),
        (to, "20 of 40 rows are wrong", *first_ten, "..."),
    )
    edit = text("rated.csv", "clip,k,rating\ntrain00000,0,\n")
    yield "02", ("--ratings", "{run}/rated.csv"), edit, ("rated.csv", "no rating")
    turned = lambda r: [r[0], r[0] | {"a": r[0]["b"], "b": r[0]["a"]}, *r[1:]]  # noqa: E731
    edit = lines(to, "03_human_choices.jsonl", turned)
    yield "03", ("--choices", "{run}/answers.jsonl", "--redo"), edit, ("line 2", "twice", "line 1)")


def of_08():
    """Scenes of what the pages are made from."""
    edit = text("guide.txt", "Which?\nA: this\nB: that\n")
    yield "08", ("choose", "--guide", "{run}/guide.txt"), edit, ("'Tie: ...'",)
    yield "08", ("rate",), first_of_sheet("wav"), ("/01_audio/", ".wav: gone")
    yield "08", ("rate",), first_of_sheet("video"), ("/00_videos/", ".mp4: gone")
    edit = text("03_to_choose.csv", "clip,a,b,choice\ntrain09999,0,1,\n")
    yield "08", ("choose",), edit, ("line 2, field 'clip'",)
    for sheet, what, script in (
        ("03_to_choose.csv", ("choose",), "03_mine_pairs.py"),
        ("07_systems.json", ("blind",), "07_evaluate.py"),
        ("07_results.jsonl", (), "07_evaluate.py"),
    ):
        yield "08", what, removed(sheet), (f"{sheet}: no such file; run {script} --run-dir ",)
    for gone in ("07_audio/flow_dpo/test00000.wav", "00_videos/test00000.mp4"):
        yield "08", (), removed(gone), (f"/{gone}: gone, ", "found for test00000", "07_evaluate.py")
    three = lambda found: [row for row in found if row["system"] != "ddpo"]  # noqa: E731
    edit = lines("07_results.jsonl", "07_results.jsonl", three)
    yield "08", (), edit, ("07_systems.json: not of 07_results.jsonl; run 07_evaluate.py",)
    for row, named in BLIND:
        named_row = dict(zip(("clip", "a", "b", "choice", "rater"), row))
        edit = lambda run, row=named_row: write(run / "answers.jsonl", [row])  # noqa: E731
        yield "08", ("blind", "--answers", "{run}/answers.jsonl"), edit, (named, "line 1")


def spoiled(text):
    """Ways to save a table that none should be read from: [(how, content, what the line must
    name)]."""
    mark, other = ("\t", ",") if "\t" in text else (",", "\t")
    head, first, *rest = text.splitlines(keepends=True)
    german = text.replace("train", "tr\xe4in").replace("test", "t\xe4st")
    late = head + '"' + first + "".join(rest)
    yield from [(repr(m), text.replace(mark, m), f"separated by {m!r}") for m in (";", other)]
    for code in ("utf-16", "utf-16-le", "utf-16-be"):
        yield code, text.encode(code), "UTF-16"
    yield "a workbook", b"PK\3\4" + text.encode(), ".xlsx"
    yield "latin-1", german.encode("latin-1"), "UTF-8"
    yield "a stray quote", late, "line 2"
    yield "a quote that closes later", late + '"' + first, "line 2"
    yield "a long field", head + "x" * 200_000 + first + "".join(rest), "line 2"
    yield "a field too many", head + first[:-1] + mark + "\n", "line 2"
    if mark == "," and "clip" in text:
        twice = head[:-1] + ",clip\n" + first[:-1] + ",x\n"
        yield "a column twice", twice, "'clip' occurs twice"
        less = [line.partition(",")[2] for line in (head, first, *rest)]
        yield "a column less", "".join(less), "'clip' is missing"


def flags_of(number):
    """The numeric flags of a stage, by its own parser."""

    def caught(parser, *_):
        raise LookupError([action.option_strings[0] for action in parser._actions if action.type])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError) as found:
        patch.setattr(command.Parser, "parse_args", caught)
        stage(number).parse_args([])
    return found.value.args[0]


def edited(file, field, value, gone=()):
    """What `change` does to a file, which may be new, as if the stages had written it so."""

    def edit(run):
        for name in gone:
            (run / name).unlink()
        if file in NEW:
            write(run / file, read(run / NEW[file]) if isinstance(NEW[file], str) else NEW[file])
        change(run / file, field, value)
        if not file.endswith("settings.json"):
            vouch(run)

    return edit


def of_files():
    """Cases of every file that is read: broken, and with a wrong field or entry."""
    turn = 0
    for file, (number, flags, kind, *gone) in FILES.items():
        named = [Path(file).name]
        for content in BROKEN[Path(file).suffix]:
            edit = edited(file, None, content, gone)
            yield f"{file} {content!r}", number, flags, edit, named
        wrong = []
        if file.endswith(".pt"):
            for field, entry in kind.items():
                first, *others = WRONG[entry]  # of the others every second, in turn: time
                wrong += [(field, value) for value in (first, *others[turn % 2 :: 2])]
                turn += 1
        else:  # every field of its type is wrong in every way above
            last = [info for info in msgspec.structs.fields(kind) if info.required][-1]
            named = [*named, last.encode_name, *(["line 2"] if file.endswith(".jsonl") else [])]
            wrong += [(last.encode_name, MISSING), (last.encode_name, {"a": {"a": NAN}})]
        for field, value in wrong:
            how = "missing" if value is MISSING else f"{type(value).__name__} {str(value)[:9]!r}"
            yield f"{file} {field} {how}", number, flags, edited(file, field, value, gone), named


def of_tables():
    for file, (number, flags, text, columns) in TABLES.items():
        for how, content, named in spoiled(text):
            yield f"{file} {how}", number, flags, edited(file, None, content), (file, named)
        mark, (*head, last) = "\t" if "\t" in text else ",", text.splitlines()
        named = (file, f"line {len(head) + 1}")
        for column, values in columns.items():
            for value in values:
                line = last.split(mark)
                line[column] = value
                edit = edited(file, None, "\n".join([*head, mark.join(line)]))
                yield f"{file} column {column} {value[:9]!r}", number, flags, edit, named


def cases():
    """Rows: name, stage, flags, what is done to the run or None, what the line must name."""
    for number in STAGES:
        for flag in flags_of(number):
            for value in ("-2", "nan", "1e400", "1" * 5000, "x", ""):
                yield f"{number} {flag} {value[:9]}", number, (f"{flag}={value}",), None, (flag,)
    for number, flags, *named in FLAGS:
        yield f"{number} {flags[:40]}", number, flags.split(), None, named
    for number, flags, edit, named in scenes():
        yield f"{number} {' '.join(flags)[:40]} {named[0]}", number, flags, edit, named
    for clips, named in LISTS:
        edit = edited("list.jsonl", None, "".join(json.dumps(clip) + "\n" for clip in clips))
        yield f"list of clips, {named[:30]}", "01", TO_CLIPS, edit, ("list.jsonl", named)
    yield from of_files()
    yield from of_tables()


def change(path, field, value):
    """Sets a field of a json, of the second line of a jsonl, or of a .pt; without field, value is
    the content."""
    if field is None:
        value = path.read_bytes()[: path.stat().st_size // 2] if value == "half" else value
        return path.write_bytes(value.encode() if isinstance(value, str) else value)
    whole = {".pt": files.load_pt, ".jsonl": read, ".json": read_json}[path.suffix](path)
    place, (*outer, last) = whole[1] if path.suffix == ".jsonl" else whole, field.split("/")
    for name in outer:
        place = place[int(name) if name.isdecimal() else name]
    place.pop(last, None) if value is MISSING else place.update({last: value})
    if path.suffix == ".pt":
        torch.save(whole, path)
    elif path.suffix == ".jsonl":
        write(path, whole)
    else:
        path.write_text(json.dumps(whole))


def vouch(run):
    """As if the stages had written what is there now: their records name its digests."""
    for file in (*run.glob("0[2-5]_settings.json"), *run.glob("*/settings.json")):
        record = read_json(file)
        for part in ("inputs", "outputs"):
            there = [name for name in record.get(part, ()) if (run / name).exists()]
            record.get(part, {}).update({name: files.digest(run / name) for name in there})
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def times_of(run):
    """{name: time} of its files, locks aside."""
    times = {}
    for folder, _, names in os.walk(run):
        for name in names:
            path = os.path.join(folder, name)
            if not name.endswith(".lock"):
                times[os.path.relpath(path, run)] = os.lstat(path).st_mtime_ns
    return times


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """A run to damage, one to mend it from, and the times of its files."""
    folder = tmp_path_factory.mktemp("place")
    run = shutil.copytree(finished, folder / "run")
    for number in ("02", "03"):
        call(number, run)  # sheets and records name this place from now on
    return run, shutil.copytree(run, folder / "whole"), times_of(run)


def mend(run, whole, times):
    """Puts everything back."""
    now = times_of(run)
    for name in now.keys() - times.keys():
        (run / name).unlink()
    for name in times:
        if now.get(name) != times[name]:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(whole / name, run / name)
    for path in run.iterdir():
        if path.is_dir() and not (whole / path.name).exists():
            shutil.rmtree(path)


# Sheets hold no answers; weights.json the digest of any file, a damaged one too.
HARMLESS = {"02_to_rate.csv", "03_to_choose.csv", "weights.json"}
CASES = [pytest.param(*row, id=name) for name, *row in cases()]


@pytest.mark.parametrize("number, flags, edit, named", CASES)
def test_what_is_wrong_is_named(number, flags, edit, named, place, refused, without_pictures):
    run, whole, times = place
    try:
        if edit:
            edit(run)
        before = times_of(run)
        line = refused(number, run, *(flag.replace("{run}", str(run)) for flag in flags))
        said(line, *named)
        assert line.count(", field ") <= 10  # of many wrong rows the first ten
        after = times_of(run)
        written = {x for x in times if before.get(x) == times[x] != after.get(x)} - HARMLESS
        ours, theirs = ({x: files_of(one, x) for x in written} for one in (run, whole))
        assert ours == theirs
        assert not [*run.glob("08_*/"), *run.glob("mark"), *run.glob("nowhere")]
    finally:
        mend(run, whole, times)
