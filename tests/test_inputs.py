"""What a user can get wrong: every number that a flag takes, every file that is read, every field
of every typed row, wrong in each way that its kind can be. Exit code 2 and one line on stderr that
names the flag, or file, line and field; nothing that was written is lost."""

import json
import math
import re
import shutil
import types
import typing
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import STAGES, Malicious, call, read, stage, stopped, write
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from adapters.toy_people import Truth
from common import files, rows

MISSING, NAN, LONG, NUL, SURROGATE = object(), math.nan, "x" * 300, "a\0b", "\ud800"


def said(line, *parts):
    """The line names all of these."""
    assert [part for part in map(str, parts) if part not in line] == [], line


# Every field of every typed row
# ------------------------------------------------------------------------------

ROWS = [
    kind for kind in vars(rows).values() if isinstance(kind, type) and issubclass(kind, rows.Row)
][1:] + [Truth]
RIGHT = {str: "a", rows.Text: "a", rows.Name: "a", rows.FilePath: "a/b.mp4", bool: True}
RIGHT[rows.Probabilities] = [0.2, 0.3, 0.5]
NO_TEXT = (7, ["a"], {"a": 1}, True, NUL, SURROGATE)
NO_NUMBER = (True, "1", NAN, math.inf, 10**400, [], {})
WRONG_TEXT = {str: (7, ["a"]), rows.Text: NO_TEXT, rows.FilePath: (*NO_TEXT, "", "x/" * 2000)}
WRONG_TEXT[rows.Name] = (*NO_TEXT, "", ".", "..", "../x", "/x", "a\\b", "a\nb", LONG)
WRONG_TEXT[rows.Probabilities] = (0.5, [1, 0], [1, 0, "0"], [NAN, 0, 1], [-1, 1, 1], {})


def bounds(kind):
    """The base type of an annotated number, and its least and largest value."""
    base, *metas = typing.get_args(kind)
    limits = {name: getattr(meta, name) for meta in metas for name in ("ge", "le", "lt")}
    return base, limits["ge"], limits["le"] if limits["lt"] is None else limits["lt"] - 1


def is_one_of_words(kind):
    return typing.get_origin(kind) is typing.Annotated and kind.__metadata__[0].pattern is not None


def right(kind):
    """A value that fits."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in RIGHT:
        return RIGHT[kind]
    if is_one_of_words(kind):
        return re.search(r"one of (\w+)", kind.__metadata__[0].pattern)[1]
    if origin is typing.Literal:
        return parts[0]
    if origin in (types.UnionType, typing.Union):
        return right(parts[0])
    if origin is tuple:
        return [*map(right, parts)]
    if origin is list:
        return [right(parts[0])]
    if origin is dict:
        return {right(parts[0]): {} if parts[1] is typing.Any else right(parts[1])}
    if origin is typing.Annotated:
        return right(parts[0]) if typing.get_origin(parts[0]) is list else bounds(kind)[1]
    return {info.encode_name: right(info.type) for info in msgspec.structs.fields(kind)}


def wrong(kind):
    """Values of each way in which one can be wrong."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in WRONG_TEXT:
        return WRONG_TEXT[kind]
    if kind is bool:
        return (0, 1, "false", [])
    if is_one_of_words(kind):
        return (["a"], {}, True, "none of them", right(kind) + "\n", "", SURROGATE, 3, -1)
    if origin is typing.Literal:
        return (["a"], {}, True, "none of them", SURROGATE, 3, -1)
    if origin in (types.UnionType, typing.Union):  # null stands for an absent field
        kinds = [part for part in parts if part is not types.NoneType]
        return (
            wrong(kinds[0]) if len(kinds) == 1 else (True, [], {}, 1.5, NAN, NUL, "", -1)
        )  # a number or a name
    if origin is tuple:
        whole = [right(part) for part in parts]
        return (7, "ab", {}, whole[1:], [*whole, 1], [*whole[:-1], wrong(parts[-1])[0]])
    if origin is list:
        return (7, "ab", {}, *([value] for value in wrong(parts[0])))
    if origin is dict:
        names = [
            {name: right(kind)[right(parts[0])]}
            for name in wrong(parts[0])
            if isinstance(name, str)
        ]
        values = (
            []
            if parts[1] is typing.Any
            else [{right(parts[0]): value} for value in wrong(parts[1])]
        )
        return (7, "ab", [[]], *names, *values)
    if origin is typing.Annotated and typing.get_origin(parts[0]) is list:
        return (*wrong(parts[0]), [])
    if origin is typing.Annotated:
        base, least, most = bounds(kind)
        beyond = (least - 1, most + 1) if base is int else (2 * least - 1, 2 * most + 1)
        return (*NO_NUMBER, *beyond, *([1.5] if base is int else []))
    return (7, "ab", [[]], {})


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_one_wrong_field_of_a_row_is_named_with_what_it_is_and_what_it_should_be(kind, tmp_path):
    file, whole = tmp_path / "x.jsonl", right(kind)
    fields = {info.encode_name: info for info in msgspec.structs.fields(kind)}
    write(file, [whole, whole])
    assert len(rows.read(file, kind)) == 2
    passed = []
    for name, info in fields.items():
        less = {key: value for key, value in whole.items() if key != name}
        for absent in (less, less | {name: None}):
            write(file, [whole, absent])
            if info.required:
                said(stopped(rows.read, file, kind), f"{file}, line 2, field '{name}' is missing")
            else:
                default = (
                    info.default_factory() if info.default is msgspec.NODEFAULT else info.default
                )
                assert getattr(rows.read(file, kind)[1], info.name) == default
        for value in wrong(info.type):
            write(file, [whole, whole | {name: value}])
            try:
                passed.append((name, value, rows.read(file, kind)[1]))
            except common.Stop as error:
                assert str(error).startswith(f"{file}, line 2, field '{name}")
                words = ": Expected |: Number out of range|' is missing$"
                assert re.search(words, str(error)) and "regex" not in str(error), error
    assert passed == []


@pytest.mark.parametrize("field", ["p_winner", "p_loser"])
def test_the_probabilities_of_a_pair_have_the_sum_1(field, tmp_path):
    write(tmp_path / "x.jsonl", [right(rows.Pair) | {field: [1, 1, 1]}])
    line = stopped(rows.read, tmp_path / "x.jsonl", rows.Pair)
    assert line.endswith(f"x.jsonl, line 1, field '{field}': Expected three numbers whose sum is 1")


def test_a_listed_clips_name_has_at_most_200_bytes_however_many_characters(tmp_path):
    write(tmp_path / "x.jsonl", [{"id": "é" * 100}, {"id": "é" * 101}])
    line = stopped(rows.read, tmp_path / "x.jsonl", rows.ListedClip)
    assert line.endswith("x.jsonl, line 2, field 'id': Expected a name of at most 200 bytes")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "x.jsonl"


@st.composite
def contents(draw):
    """A type of row and bytes: of any kind, or lines of that type with fields changed and bytes cut
    out."""
    kind = draw(st.sampled_from(ROWS))
    if draw(st.booleans()):
        return kind, draw(st.binary(max_size=200))
    lines = []
    for _ in range(draw(st.integers(0, 3))):
        changed = draw(
            st.dictionaries(st.sampled_from([*kind.__struct_encode_fields__]), ANY_JSON, max_size=2)
        )
        lines.append(json.dumps(right(kind) | changed).encode())
    whole = b"\n".join(lines)
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    return kind, whole if draw(st.booleans()) else whole[:start] + draw(
        st.binary(max_size=3)
    ) + whole[end:]


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
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


def test_a_line_separator_inside_a_caption_ends_no_line(tmp_path):
    clips = [rows.ListedClip(id="a", caption="a\u2028b\x85c"), rows.ListedClip(id="b", caption="d")]
    rows.write(tmp_path / "x.jsonl", clips)
    assert rows.read(tmp_path / "x.jsonl", rows.ListedClip) == clips


def test_a_blank_line_is_named_and_trailing_ones_do_not_matter(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a"}\r\n{"id": "b"}\r\n\n')
    assert [clip.id for clip in rows.read(tmp_path / "x.jsonl", rows.ListedClip)] == ["a", "b"]
    (tmp_path / "x.jsonl").write_text('{"id": "a"}\n\n{"id": "b"}\n')
    said(
        stopped(rows.read, tmp_path / "x.jsonl", rows.ListedClip), "x.jsonl, line 2: not valid JSON"
    )


# Every file and every flag, by the stage that reads it
# --------------------------------------------------------

WRONG = {  # kind of an entry of a .pt: what it must not be
    "text": (MISSING, 7, ["a"], {"a": 1}, True),
    "whole": (MISSING, -1, 1.5, True, "1", NAN, 10**30, []),
    "list": (MISSING, 7, "ab", {}, [[]]),
    "record": (MISSING, 7, "ab", [[]], {"x": 7}),
    "tensor": (MISSING, 7, [1.0], {}, torch.zeros(3), torch.tensor(1.0)),
    "weights": (MISSING, 7, [1.0], {"x": 7}, {"x": torch.zeros(3)}),
}
SHARD = {
    "latents": "tensor",
    "digests": "list",
    "features": "record",
    "crc32": "record",
    "crc32/latents": "list",
}
FEATURES = dict.fromkeys(("features/frames", "features/pooled", "features/text"), "tensor")
OPTIMIZER = {
    "optimizer": "weights",
    "optimizer/state": "weights",
    "optimizer/state/0/exp_avg": "tensor",
}
OUT = ("--out", "x")
TOY = (
    "--run-dir",
    "{run}/new",
    "--model",
    "toy",
    "--checkpoint",
    "{run}/00_base.pt",
    "--videos",
    "{run}/00_videos",
)
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
    "weights.json": ("02", (), rows.Weights),
    "00_truth.jsonl": ("02", (), Truth, "02_ratings.jsonl"),
    "01_samples/00000.pt": ("05", OUT, SHARD | FEATURES),
    "02_audioscore.pt": ("03", (), {"audioscore": "weights", "audioscore/p_y": "tensor", "audioscore/mean": "tensor"}),
    "05_flow_dpo/policy.pt": ("07", (), {"out.bias": "tensor"}),
    "05_flow_dpo/checkpoint.pt": ("05", (), {"step": "whole", "settings": "text", "model": "weights"} | OPTIMIZER),
    "02_scores/00000.toy.pt": ("02", (), {"clap": "tensor", "logits": "tensor"}),
    "03_scores/00000.toy_video.pt": ("06", OUT, {"key": "text", "ib": "tensor", "sync": "tensor"}),
    "07_clips/test_00000.features_video.pt": ("07", (), {"pooled": "tensor", "frames": "tensor"}),
    "07_scores/base/test_00000.toy.pt": ("07", (), {"ib": "tensor", "embedding": "tensor"}),
    "00_base.pt": ("05", OUT, dict(kind="text", vocabulary="list", net="weights", encoder="weights", codec="weights")),
    "00_scorers.pt": ("06", OUT, {"kind": "text", "vocabulary": "list", "clap": "weights", "panns": "weights"}),
    "00_oracle.pt": ("02", (), {"classifier": "weights"}, "02_ratings.jsonl"),
}  # fmt: skip
NEW = {"01_samples/00000.skipped.jsonl": [dict(clip="train00000", reason="too short")] * 2}
NEW |= {
    "01_missing.jsonl": [dict(id="lost", split="test", reason="no lost.mp4")] * 2,
    "list.jsonl": "clips.jsonl",
}
NEW |= {"rated.jsonl": "02_ratings.jsonl", "chosen.jsonl": "03_human_choices.jsonl"}
BROKEN = {
    ".pt": ("", "{}", "PK\3\4", "half"),
    ".json": ("{", "[1]", "7", '{"a": 1, "a": 2}', '{"\\ud800": 1}', "{\0}"),
}
BROKEN[".jsonl"] = ("\n\n{}", *BROKEN[".json"], "PK\3\4")

# Table: the stage that reads it, its flags, two rows (and their names), and by column what a cell
# must not be.
RATED = "clip,k,rating,rater,repeat,seconds,comment\ntrain00000,0,Good,x,0,7.5,\ntrain00001,1,Bad,x,,,noisy\n"
OTHER = "audio,video,caption,label,rating\n01_audio/train00000_0.wav,00_videos/train00000.mp4,a dog,,Good\n"
OTHER += "01_audio/train00001_0.wav,00_videos/train00001.mp4,,,Bad\n"
CHOSEN = "clip,a,b,choice\ntrain00000,0,1,a\n"
TABLES = {
    "rated.csv": ("02", ("--ratings", "{run}/rated.csv"), RATED,
                  {0: ("../x", NUL, ""), 1: ("7", "x", "", "²"), 2: ("Great", NUL), 3: (NUL,),
                    4: ("2", "yes"), 5: ("-1", "nan", "1e9", "fast"), 6: (NUL,)}),
    "other.csv": ("02", ("--ratings", "{run}/other.csv", "--ratings-root", "{run}"), OTHER,
                  {0: ("../x.wav", "/etc/hostname", "01_audio", "none.wav", NUL, LONG), 1: ("", "../x", "none.mp4"),
                   2: (NUL,), 3: (NUL,), 4: ("4.5",)}),
    "chosen.csv": ("03", ("--choices", "{run}/chosen.csv"), CHOSEN + "train00001,1,0,b\n",
                   {0: ("nobody", NUL, ""), 1: ("9", "0"), 2: ("x", "", "1"), 3: ("both", NUL)}),
    "list.csv": ("01", (*TOY, "--clips", "{run}/list.csv"), "train0,10,dog,train\ntrain1,20,cat,test\n",
                 {0: ("../x", "", NUL, LONG), 1: ("ten", "-1", "1" * 5000, "", "1.5"), 2: (NUL,), 3: ("dev", "", NUL)}),
    "list.tsv": ("01", (*TOY, "--clips", "{run}/list.tsv"), "id\tlabel\ntrain00000\tdog\ntrain00001\tcat\n",
                 {0: ("../x", "", NUL, LONG), 1: (NUL,)}),
    "vgg-test.tsv": ("01", (*TOY, "--clips", "{run}/clips.jsonl", "--test-list", "{run}/vgg-test.tsv"),
                     "id\tlabel\ntest00000\tdog\ntest00001\tcat\n", {0: ("../x", "", NUL, LONG), 1: (NUL,)}),
}  # fmt: skip


# What no single field shows: a stage, its flags, what the line must name; with a list, the flags of
# --clips and it.
FLAGS = [("01", "--videos .", "--videos"), ("01", "--model sora", "sora")]
FLAGS += [
    ("01", "--model toy:large", "toy"),
    ("01", "--cavp .", "--cavp"),
    ("05", "--bet 7", "--bet"),
]
FLAGS += [
    ("06", "--updates 9 --sampling-steps 4", "--updates"),
    ("05", "--out clips.jsonl", "is a file"),
]
FLAGS += [
    ("07", f"--systems {x}", x)
    for x in ("mine", "mine=nowhere", "../x=05_flow_dpo", LONG, "base=05_flow_dpo")
]
FLAGS += [
    ("07", "--systems a=05_flow_dpo a=06_ddpo", "twice"),
    ("07", "--systems ground_truth=06_ddpo", "run itself"),
]
OUTS = ("../x", "/x", ".", "..", "a/b", "", "01_samples", "07_audio", LONG)
FLAGS += [(number, f"--out={x}", "folder name") for number in ("05", "06") for x in OUTS]
FLAGS += [("06", "--out run.json", "is a file")]
FLAGS += [
    ("05", "--beta high", "--beta"),
    ("05", "--global 4", "--global"),
    ("07", "--split train", "--split"),
]
LISTS = [
    (
        [dict(id="x"), dict(id="x", split="test")],
        "clip 2, field 'id': x occurs in both train and test",
    )
]
LISTS += [
    ([dict(id="x"), dict(id="x")], "clip 2, field 'id': x occurs twice"),
    ([dict(id="x")], "none of the 1 clips"),
]
LISTS += [
    ([dict(id="x", video=f"{x}.mp4")], f"'{x}.mp4' points outside")
    for x in ("../y", "/etc/passwd", "a/../../y")
]


ANSWERS = ("--ratings", "{run}/answers.jsonl")
NEEDED = {
    "01": ("00_base.pt", "clips.jsonl"),
    "02": ("01_samples/00000.jsonl", "00_scorers.pt"),
    "03": ("02_audioscore.pt", "02_ratings.jsonl", "01_samples/00000.jsonl"),
    "04": ("03_pairs.jsonl", "03_human_pairs.jsonl"),
    "05": ("04_stage1.jsonl", "04_stage2.jsonl", "01_samples/00000.pt", "00_base.pt"),
    "06": ("02_audioscore.pt",),
    "07": ("clips.jsonl", "05_flow_dpo/policy.pt", "05_flow_dpo/policy.json"),
}
CHANGED = [
    ("00", "--size tiny --seed 1", "seed", "--run-dir"),
    ("01", "--guidance 3", "sampler", "--run-dir"),
]
CHANGED += [
    ("01", "--seed 4", "seed", "--run-dir"),
    ("01", "--num-samples 4", "num_samples", "--run-dir"),
]
CHANGED += [
    ("02", "--num-rated-clips 7", "num_rated_clips", "--redo"),
    ("05", "--beta 7", "beta", "another --out"),
]
CHANGED += [
    ("03", "--min-score-c 0.1", "min_score_c", "--redo"),
    ("04", "--threshold 0.11", "threshold", "--redo"),
]
CHANGED += [
    ("05", "--hard-first", "hard_first", "another --out"),
    ("06", "--lr 1", "lr", "another --out"),
]


def remove(*patterns):
    def edit(run):
        for pattern in patterns:
            for path in run.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def lines(to, source, changed):
    """changed: a function of the list of rows in `source`, dicts, that writes `to`."""
    return lambda run: write(run / to, changed(read(run / source)))


def both(first, second):
    return lambda run: (first(run), second(run))


def saved(file, value):
    return lambda run: files.save_pt(run / file, value)


def first_line(**changes):
    return lambda found: [found[0] | changes, *found[1:]]


def other_rating(found):
    return first_line(rating="Good" if found[0]["rating"] != "Good" else "Bad")(found)


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


def malicious(name):
    """The policy is gone, so that 05 trains; unpickled, the file would make another."""
    save = lambda run: torch.save({"audioscore": Malicious(run / "mark")}, run / name)  # noqa: E731
    return both(remove("05_flow_dpo/policy.*"), save)


def scenes():
    """Rows: stage, flags, what is done to the run, what the line must name."""
    yield from [(number, ("--run-dir", "{run}/nowhere"), None, ("nowhere", "stage 01" if number > "01" else "--model"))
                for number in sorted(STAGES)[1:]]  # fmt: skip
    for number, names in NEEDED.items():  # the stage runs anew
        yield from [
            (number, (), both(remove(f"{number}_*"), remove(name)), (name.split("/")[0],))
            for name in names
        ]
    for number, flags, field, advice in CHANGED:
        yield number, flags.split(), None, (f"{field}=", "now", "use ", advice)
    for number in ("03", "04", "05", "06", "07"):
        edit = lines("02_ratings.jsonl", "02_ratings.jsonl", other_rating)
        yield number, (), edit, ("02_ratings.jsonl", "changed", "02_fit_audioscore.py", "--redo")
    # answers
    given = "02_ratings.jsonl"
    yield (
        "02",
        ANSWERS,
        lines("answers.jsonl", given, lambda r: [*r, r[2]]),
        ("line 41", "train", "twice", "line 3"),
    )
    second = lambda r: [*r[20:], r[4] | {"repeat": 1}, r[4], r[4] | {"rater": "another"}]  # noqa: E731
    edit = both(lines("answers.jsonl", given, lambda r: r[:20]), lines("b.jsonl", given, second))
    named = ("1 of 43 rows", "/b.jsonl, line 22", "twice", "/answers.jsonl, line 5")
    yield "02", (*ANSWERS, "{run}/b.jsonl"), edit, named
    edit = both(lines("answers.jsonl", given, lambda r: r[:5]), remove("0[2-9]_*"))
    yield "02", ANSWERS, edit, ("answers.jsonl", "one video", "at least 2")
    yield (
        "02",
        ANSWERS,
        lines("answers.jsonl", given, lambda r: r[:-1]),
        ("answers.jsonl", "--redo"),
    )
    for name in ("nobody.csv", "nobody.jsonl", "01_samples"):
        yield "02", ("--ratings", f"{{run}}/{name}"), None, (f"/{name}", "no such file")
    edit = lambda run: (run / "rated.csv").write_text("clip,k,rating\ntrain00000,0,\n")  # noqa: E731
    yield "02", ("--ratings", "{run}/rated.csv"), edit, ("rated.csv", "no rating")
    for number in ("02", "03"):
        yield (
            number,
            ("--exclude-rater", "bob", "--redo"),
            None,
            ("--exclude-rater bob", "simulated"),
        )
    yield "02", ("--exclude-rater", "simulated", "--redo"), None, ("at least 2",)
    turned = lambda r: [r[0], r[0] | {"a": r[0]["b"], "b": r[0]["a"]}, *r[1:]]  # noqa: E731
    edit = lines("answers.jsonl", "03_human_choices.jsonl", turned)
    yield "03", ("--choices", "{run}/answers.jsonl", "--redo"), edit, ("line 2", "twice", "line 1)")
    # models, policies, videos
    yield "07", ("--systems", "mine=05_mine"), never_finished, ("05_mine", "not finished")
    about = "05_flow_dpo/policy.json"
    for field, value in (("model", "frieren"), ("base_digest", "0123456789abcdef")):
        yield (
            "07",
            (),
            lambda run, f=field, v=value: change(run / about, f, v),
            ("05_flow_dpo", "another base"),
        )
    other = {"weight": torch.zeros(3)}
    edit = both(remove("07_audio/flow_dpo"), saved("05_flow_dpo/policy.pt", other))
    yield "07", (), edit, ("05_flow_dpo/policy.pt", "not the file that was written here")
    yield "01", TOY, saved("00_base.pt", other), ("00_base.pt", "not a toy base")
    yield "05", OUT, base_moved, ("00_base.pt", "stage 01")
    alone = [flag.replace("00_base", "alone/00_base") for flag in TOY]
    yield "01", alone, base_alone, ("alone/00_base.pt", "00_scorers.pt", "beside it")
    edit = lines("clips.jsonl", "clips.jsonl", first_line(video="../00_base.pt"))
    yield "06", (), edit, ("clips.jsonl", "line 1", "'video'", "../00_base.pt")
    yield "06", OUT, malicious("02_audioscore.pt"), ("02_audioscore.pt", "not the file")
    for name in ("00_base.pt", "05_flow_dpo/checkpoint.pt", "01_samples/00000.pt"):
        yield "05", () if "checkpoint" in name else OUT, malicious(name), (name, "plain tensors")


def spoiled(text):
    """Ways to save a table that none should be read from: [(how, content, what the line must
    name)]."""
    mark, lines = "\t" if "\t" in text else ",", text.splitlines(keepends=True)
    other = "," if mark == "\t" else "\t"
    yield from [(repr(m), text.replace(mark, m), f"separated by {m!r}") for m in (";", other)]
    yield from [
        (code, text.encode(code), "UTF-16") for code in ("utf-16", "utf-16-le", "utf-16-be")
    ]
    yield "a workbook", b"PK\3\4" + text.encode(), ".xlsx"
    yield (
        "latin-1",
        text.replace("train", "tr\xe4in").replace("test", "t\xe4st").encode("latin-1"),
        "UTF-8",
    )
    yield "a stray quote", lines[0] + '"' + "".join(lines[1:]), "line 2"
    yield (
        "a quote that closes later",
        lines[0] + '"' + "".join(lines[1:]) + '"' + lines[1],
        "line 2",
    )
    yield "a long field", lines[0] + "x" * 200_000 + "".join(lines[1:]), "line 2"
    yield "a field too many", lines[0] + lines[1][:-1] + mark + "\n", "line 2"
    if mark == "," and "clip" in text:
        yield (
            "a column twice",
            lines[0][:-1] + ",clip\n" + lines[1][:-1] + ",x\n",
            "'clip' occurs twice",
        )
        yield (
            "a column less",
            "".join(line.partition(",")[2] for line in lines),
            "'clip' is missing",
        )


def flags_of(number):
    """The numeric flags of a stage, by its own parser."""

    def caught(parser, *_):
        raise LookupError([action.option_strings[0] for action in parser._actions if action.type])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError) as found:
        patch.setattr(common.Parser, "parse_args", caught)
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


def cases():
    """Rows: name, stage, flags, what is done to the run or None, what the line must name."""
    for number in STAGES:
        for flag in flags_of(number):
            for value in ("-2", "nan", "1e400", "1" * 5000, "x", ""):
                yield f"{number} {flag} {value[:9]}", number, (f"{flag}={value}",), None, (flag,)
    for number, flags, named in FLAGS:
        yield f"{number} {flags[:40]}", number, flags.split(), None, (named,)
    for number, flags, edit, named in scenes():
        yield f"{number} {' '.join(flags)[:40]} {named[0]}", number, flags, edit, named
    for clips, named in LISTS:
        content = "".join(json.dumps(clip) + "\n" for clip in clips)
        edit = edited("list.jsonl", None, content)
        yield f"list of clips, {named[:30]}", "01", TO_CLIPS, edit, ("list.jsonl", named)
    turn = 0
    for file, (number, flags, kind, *gone) in FILES.items():
        for content in BROKEN[Path(file).suffix]:
            yield (
                f"{file} {content!r}",
                number,
                flags,
                edited(file, None, content, gone),
                [Path(file).name],
            )
        if not file.endswith(".pt"):  # every field of its type is wrong in every way above
            *_, (name, info) = [
                (info.encode_name, info) for info in msgspec.structs.fields(kind) if info.required
            ]
            named = [Path(file).name, name, *(["line 2"] if file.endswith(".jsonl") else [])]
            for value in (MISSING, wrong(info.type)[0]):
                yield (
                    f"{file} {name} {value!r:.9}",
                    number,
                    flags,
                    edited(file, name, value, gone),
                    named,
                )
            continue
        for field, entry in kind.items():
            first, *others = WRONG[entry]
            for value in (first, *others[turn % 2 :: 2]):  # every second one, in turn, to save time
                text = (
                    "missing" if value is MISSING else f"{type(value).__name__} {str(value)[:9]!r}"
                )
                yield (
                    f"{file} {field} {text}",
                    number,
                    flags,
                    edited(file, field, value, gone),
                    [Path(file).name],
                )
            turn += 1
    for file, (number, flags, text, columns) in TABLES.items():
        for how, content, named in spoiled(text):
            yield f"{file} {how}", number, flags, edited(file, None, content), (file, named)
        mark, (*head, last) = "\t" if "\t" in text else ",", text.splitlines()
        for column, value in (
            (column, value) for column, values in columns.items() for value in values
        ):
            cells = last.split(mark)
            cells[column] = value
            edit = edited(file, None, "\n".join([*head, mark.join(cells)]))
            yield (
                f"{file} column {column} {value[:9]!r}",
                number,
                flags,
                edit,
                (file, f"line {len(head) + 1}"),
            )


def change(path, field, value):
    """Sets a field of a json, of the second line of a jsonl, or of a .pt; without field, value is
    the content."""
    if field is None:
        value = path.read_bytes()[: path.stat().st_size // 2] if value == "half" else value
        return path.write_bytes(value.encode() if isinstance(value, str) else value)
    readers = {
        ".pt": files.load_pt,
        ".jsonl": read,
        ".json": lambda path: json.loads(path.read_text()),
    }
    whole = readers[path.suffix](path)
    place, (*outer, last) = whole[1] if path.suffix == ".jsonl" else whole, field.split("/")
    for name in outer:
        place = place[int(name) if name.isdecimal() else name]
    place.pop(last, None) if value is MISSING else place.update({last: value})
    writers = {".pt": lambda path, x: torch.save(x, path), ".jsonl": write}
    writers.get(path.suffix, lambda path, x: path.write_text(json.dumps(x)))(path, whole)


def vouch(run):
    """As if the stages had written what is there now: their records name its digests."""
    for record in (*run.glob("0[2-5]_settings.json"), *run.glob("*/settings.json")):
        about = json.loads(record.read_text())
        for part in ("inputs", "outputs"):
            for name in about.get(part, ()):
                about[part][name] = (
                    files.digest(run / name) if (run / name).exists() else about[part][name]
                )
        record.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """A run to damage, and one to mend it from."""
    run, whole = (
        shutil.copytree(finished, tmp_path_factory.mktemp("place") / name)
        for name in ("run", "whole")
    )
    for number in ("02", "03"):
        call(number, run)  # sheets and records name this place from now on
    return run, shutil.copytree(run, whole, dirs_exist_ok=True)


def changed_in(run, whole):
    """Names of the files of `whole` that are not the same in `run`; locks aside."""
    found = set()
    for path in whole.rglob("*"):
        now = run / path.relative_to(whole)
        if path.is_dir() or path.name.endswith(".lock"):
            continue
        if not now.exists() or path.stat().st_mtime_ns != now.stat().st_mtime_ns:
            found.add(str(path.relative_to(whole)))
    return found


def mend(run, whole):
    """Puts everything back."""
    for name in changed_in(run, whole):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(whole / name, run / name)
    for path in sorted(run.rglob("*"), reverse=True):
        if not (whole / path.relative_to(run)).exists() and not path.name.endswith(".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


SHEETS = {"02_to_rate.csv", "03_to_choose.csv"}  # which hold no answers


@pytest.mark.parametrize(
    "number, flags, edit, named", [pytest.param(*row, id=name) for name, *row in cases()]
)
def test_what_is_wrong_is_named(number, flags, edit, named, place, refused):
    run, whole = place
    try:
        if edit:
            edit(run)
        before = changed_in(run, whole)
        said(refused(number, run, *(flag.replace("{run}", str(run)) for flag in flags)), *named)
        written = changed_in(run, whole) - before - SHEETS
        assert [name for name in written if not same_bytes(run / name, whole / name)] == []
        assert not (run / "mark").exists() and not (run / "nowhere").exists()
    finally:
        mend(run, whole)


def same_bytes(ours, theirs):
    return ours.exists() and ours.read_bytes() == theirs.read_bytes()
