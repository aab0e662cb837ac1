"""Every number that a flag takes and every field of every file that is read, wrong in each way that its kind can be:
exit code 2 and one line on stderr that names the flag, or file, line and field; nothing that was written is lost."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import STAGES, call, read, stage, write

import common

MISSING, NAN, LONG, NUL, SURROGATE = object(), math.nan, "x" * 300, "a\0b", "\ud800"
WRONG = {  # kind of a field: what it must not be
    "name": (MISSING, 7, ["a"], {}, "", "..", "../x", "/x", LONG, NUL, SURROGATE),
    "text": (MISSING, 7, ["a"], {"a": 1}, True, NUL, SURROGATE),
    "text or null": (7, ["a"], {"a": 1}, True, NUL, SURROGATE),
    "path": (MISSING, 7, ["a"], "", LONG, NUL, SURROGATE),
    "path or null": (7, ["a"], "", LONG, NUL, SURROGATE),
    "answer": (MISSING, 7, ["a"], {"a": 1}, "none of them", NUL, SURROGATE),
    "word or null": (7, ["a"], "", "none of them", SURROGATE),
    "word": (MISSING, 7, ["a"], "", "none of them", NUL, SURROGATE),
    "whole": (MISSING, -1, 1.5, True, "1", NAN, 10**30, []),
    "k": (MISSING, -1, 1.5, True, "x", "²", NAN, 10**30, []),  # in a csv it is text
    "number or null": (True, "1", NAN, math.inf, 10**400, [], {}),
    "number": (MISSING, True, "1", NAN, math.inf, 10**400, [], {}),
    "share": (MISSING, -0.1, 1.1, True, "1", NAN, math.inf, []),
    "flag": (MISSING, 0, "false", []),
    "list": (MISSING, 7, "ab", {}, [[]]),
    "dict": (MISSING, 7, "ab", [[]]),
    "three": (MISSING, 0.5, [1, 0], [1, 1, 1], [1, 0, "0"], [NAN, 0, 1], [-1, 1, 1], {}),
    "repeat or null": (2, -1, True, "yes", NAN, [], {}),
    "seconds or null": (-1, True, "long", NAN, math.inf, [], {}),
    "tensor": (MISSING, 7, [1.0], {}, torch.zeros(3), torch.tensor(1.0)),
    "weights": (MISSING, 7, [1.0], {"x": 7}, {"x": torch.zeros(3)}),
}
SAMPLE = dict(clip="name", k="whole", seed="whole", wav="path", row="whole", digest="text", finite="flag", peak="share")
SAMPLE |= dict(clipped="share")
CLIP = {"id": "name", "video": "path", "caption": "text or null", "label": "text or null", "split": "word"}
ASIDES = {"repeat": "repeat or null", "seconds": "seconds or null", "comment": "text or null"}
PAIR = dict(clip="name", winner="whole", loser="whole")
RECORD = {"settings": "dict", "inputs": "dict", "inputs/*": "text or null", "outputs": "record"}
SHARD = {"latents": "tensor", "digests": "list", "features": "record", "crc32": "record", "crc32/latents": "list"}
FEATURES = dict.fromkeys(("features/frames", "features/pooled", "features/text"), "tensor")
OPTIMIZER = {"optimizer": "weights", "optimizer/state": "weights", "optimizer/state/0/exp_avg": "tensor"}
WRONG["record"] = (7, "ab", [[]], {"x": 7}, {NUL: "x"})
RUN = {"model": "text", "checkpoint": "path", "video_root": "path", "clip_s": "number", "checkpoint_digest": "text"}
RUN |= {"num_samples": "whole", "seed": "whole", "max_clips": "whole", "sample_rate_hz": "whole", "sampler": "dict"}
RUN |= {"sampler/steps": "whole", "sampler/guidance": "number", "latent_shape": "list"}
RUN |= {"scorers": "word or null", "scorers_root": "path or null", "cavp_root": "path or null", "defaults": "defaults"}
WRONG["defaults"] = (7, [], {"04": 7}, {"04": {"threshold": "high"}}, {"04": {"threshold": 2}}, {"04": {"redo": 1}})
OUT = ("--out", "x")
TOY = ("--run-dir", "{run}/new", "--model", "toy", "--checkpoint", "{run}/00_base.pt", "--videos", "{run}/00_videos")
TO_CLIPS = (*TOY, "--clips", "{run}/list.jsonl")

# File: the stage that reads it, its flags, its fields (a/b is b of a, * whatever name there is), what must be gone.
FILES = {
    "run.json": ("04", (), RUN),
    "clips.jsonl": ("06", OUT, CLIP),
    "list.jsonl": ("01", TO_CLIPS, CLIP | dict(video="path or null", split="word or null")),
    "01_samples/00000.jsonl": ("02", (), SAMPLE),
    "01_samples/00000.skipped.jsonl": ("02", (), dict(clip="name", reason="text")),
    "02_ratings.jsonl": ("02", (), dict(clip="name", k="k", rating="answer", rater="text or null")),
    "rated.jsonl": ("02", ("--ratings", "{run}/rated.jsonl"), dict(clip="name", k="k", rating="answer") | ASIDES),
    "02_scores.jsonl": ("03", (), dict(clip="name", k="whole", rating="word")),
    "03_human_choices.jsonl": ("03", (), dict(clip="name", a="k", b="k", choice="answer")),
    "chosen.jsonl": ("03", ("--choices", "{run}/chosen.jsonl"), dict(a="k", choice="answer", rater="text or null")),
    "03_pairs.jsonl": ("04", (), PAIR | dict(p_winner="three", p_loser="three")),
    "03_human_pairs.jsonl": ("04", (), PAIR | dict(p_winner="three", p_loser="three")),
    "04_stage1.jsonl": ("05", OUT, PAIR | dict(score_c="number", source="word")),
    "04_stage2.jsonl": ("05", OUT, PAIR | dict(score_c="number", source="word")),
    "05_flow_dpo/policy.json": ("07", (), dict(model="text", base_digest="text")),
    "05_flow_dpo/log.jsonl": ("05", (), dict(step="whole", stage="number", loss="number", accuracy="number")),
    "06_ddpo/log.jsonl": ("06", (), dict(step="whole", reward="number", no_spread="number")),
    "02_settings.json": ("03", (), RECORD),
    "04_settings.json": ("05", OUT, RECORD),
    "05_flow_dpo/settings.json": ("05", (), {"settings": "dict", "inputs": "dict"}),
    "07_systems.json": ("07", (), {"systems": "list", "systems/0/name": "name", "systems/0/folder": "path or null"}),
    "01_missing.jsonl": ("07", (), dict(id="name", split="text", reason="text")),
    "scores/weights.json": ("02", (), {"*": "record", "*/stamp": "text", "*/digest": "text"}),
    "scores/heard.json": ("07", (), {"*": "record", "*/stamp": "text", "*/peak": "number or null"}),
    "00_truth.jsonl": ("02", (), {"id": "name", "class": "whole", "hits_s": "list"}, "02_ratings.jsonl"),
    "01_samples/00000.pt": ("05", OUT, SHARD | FEATURES),
    "02_audioscore.pt": ("03", (), {"audioscore": "weights", "audioscore/p_y": "tensor", "audioscore/mean": "tensor"}),
    "05_flow_dpo/policy.pt": ("07", (), {"out.bias": "tensor"}),
    "05_flow_dpo/checkpoint.pt": ("05", (), {"step": "whole", "settings": "text", "model": "weights"} | OPTIMIZER),
    "scores/00000.clap.pt": ("02", (), {"keys": "text", "clap": "tensor"}),
    "scores/test_00000.model_video.pt": ("07", (), {"keys": "text", "pooled": "tensor", "frames": "tensor"}),
    "00_base.pt": ("05", OUT, dict(kind="word", vocabulary="list", net="weights", encoder="weights", codec="weights")),
    "00_scorers.pt": ("06", OUT, {"kind": "word", "vocabulary": "list", "clap": "weights", "panns": "weights"}),
    "00_oracle.pt": ("02", (), {"classifier": "weights"}, "02_ratings.jsonl"),
}  # fmt: skip
NEW = {"01_samples/00000.skipped.jsonl": [dict(clip="train00000", reason="too short")] * 2}
NEW |= {"01_missing.jsonl": [dict(id="lost", split="test", reason="no lost.mp4")] * 2, "list.jsonl": "clips.jsonl"}
NEW |= {"rated.jsonl": "02_ratings.jsonl", "chosen.jsonl": "03_human_choices.jsonl"}
BROKEN = {".pt": ("", "{}", "PK\3\4", "half"), ".json": ("{", "[1]", "7", '{"a": 1, "a": 2}', '{"\\ud800": 1}', "{\0}")}
BROKEN[".jsonl"] = ("\n\n{}", *BROKEN[".json"], "PK\3\4")

# Table: the stage that reads it, its flags, two rows (and their names), and by column what a cell must not be.
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


# What no single field shows: a stage, its flags, what the line must name; with a list, the flags of --clips and it.
FLAGS = [("07", "--only", "--only"), ("01", "--videos .", "--videos"), ("01", "--model sora", "sora")]
FLAGS += [("01", "--model toy:large", "toy"), ("01", "--cavp .", "--cavp"), ("05", "--bet 7", "--bet")]
FLAGS += [("06", "--updates 9 --sampling-steps 4", "--updates"), ("05", "--out clips.jsonl", "is a file")]
FLAGS += [("07", f"--systems {x}", x) for x in ("mine", "mine=nowhere", "../x=05_flow_dpo", LONG, "base=05_flow_dpo")]
FLAGS += [("07", "--systems a=05_flow_dpo a=06_ddpo", "twice"), ("07", "--systems ground_truth=06_ddpo", "run itself")]
OUTS = ("../x", "/x", ".", "..", "a/b", "", "01_samples", "07_audio", LONG)
FLAGS += [(number, f"--out={x}", "folder name") for number in ("05", "06") for x in OUTS]
FLAGS += [("06", "--out run.json", "is a file")]
FLAGS += [("05", "--beta high", "--beta"), ("05", "--global 4", "--global"), ("07", "--split train", "--split")]
LISTS = [([dict(id="x"), dict(id="x", split="test")], "clip 2, field 'id': x occurs in both train and test")]
LISTS += [([dict(id="x"), dict(id="x")], "clip 2, field 'id': x occurs twice"), ([dict(id="x")], "none of the 1 clips")]
LISTS += [([dict(id="x", video=f"{x}.mp4")], f"'{x}.mp4' points outside") for x in ("../y", "/etc/passwd", "a/../../y")]


def spoiled(text):
    """Ways to save a table that none should be read from: [(how, content, what the line must name)]."""
    mark, lines = "\t" if "\t" in text else ",", text.splitlines(keepends=True)
    other = "," if mark == "\t" else "\t"
    yield from [(repr(m), text.replace(mark, m), f"separated by {m!r}") for m in (";", other)]
    yield from [(code, text.encode(code), "UTF-16") for code in ("utf-16", "utf-16-le", "utf-16-be")]
    yield "a workbook", b"PK\3\4" + text.encode(), ".xlsx"
    yield "latin-1", text.replace("train", "tr\xe4in").replace("test", "t\xe4st").encode("latin-1"), "UTF-8"
    yield "a stray quote", lines[0] + '"' + "".join(lines[1:]), "line 2"
    yield "a quote that closes later", lines[0] + '"' + "".join(lines[1:]) + '"' + lines[1], "line 2"
    yield "a long field", lines[0] + "x" * 200_000 + "".join(lines[1:]), "line 2"
    yield "a field too many", lines[0] + lines[1][:-1] + mark + "\n", "line 2"
    if mark == "," and "clip" in text:
        yield "a column twice", lines[0][:-1] + ",clip\n" + lines[1][:-1] + ",x\n", "'clip' occurs twice"
        yield "a column less", "".join(line.partition(",")[2] for line in lines), "'clip' is missing"


def flags_of(number):
    """The numeric flags of a stage, by its own parser."""

    def caught(parser, *_):
        raise LookupError([action.option_strings[0] for action in parser._actions if action.type])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError) as found:
        patch.setattr(common.Parser, "parse_args", caught)
        stage(number).parse_args([])
    return found.value.args[0]


def cases():
    """Rows: name, stage, flags, (file, field, value) or None, what is removed, what the line must name."""
    for number in STAGES:
        for flag in flags_of(number):
            for value in ("-2", "nan", "1e400", "1" * 5000, "x", ""):
                yield f"{number} {flag} {value[:9]}", number, (f"{flag}={value}",), None, (), (flag,)
    for number, flags, named in FLAGS:
        yield f"{number} {flags[:40]}", number, flags.split(), None, (), (named,)
    for rows, named in LISTS:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        yield f"list of clips, {named[:30]}", "01", TO_CLIPS, ("list.jsonl", None, content), (), ("list.jsonl", named)
    for turn, (file, field) in enumerate([(name, field) for name, row in FILES.items() for field in row[2]]):
        number, flags, fields, *gone = FILES[file]
        named = [Path(file).name, *(["line 2"] if file.endswith(".jsonl") else [])]
        named += [] if file.endswith(".pt") or "*" in field else [field.split("/")[0]]
        first, *others = WRONG[fields[field]]
        for value in (first, *others[turn % 2 :: 2]):  # every second one, in turn, to save time
            text = "missing" if value is MISSING else f"{type(value).__name__} {str(value)[:9]!r}"
            yield f"{file} {field} {text}", number, flags, (file, field, value), gone, named
    for file, (number, flags, _, *gone) in FILES.items():
        for content in BROKEN[Path(file).suffix]:
            yield f"{file} {content!r}", number, flags, (file, None, content), gone, [Path(file).name]
    for file, (number, flags, text, columns) in TABLES.items():
        for how, content, named in spoiled(text):
            yield f"{file} {how}", number, flags, (file, None, content), (), (file, named)
        mark, rows = "\t" if "\t" in text else ",", text.splitlines()
        for column, value in ((column, value) for column, values in columns.items() for value in values):
            cells = rows[-1].split(mark)
            content = "\n".join([*rows[:-1], mark.join([*cells[:column], value, *cells[column + 1 :]])])
            named = (file, f"line {len(rows)}")
            yield f"{file} column {column} {value[:9]!r}", number, flags, (file, None, content), (), named


def change(path, field, value):
    """Sets a field of a json, of the second line of a jsonl, or of a .pt; without field, value is the content."""
    if field is None:
        value = path.read_bytes()[: path.stat().st_size // 2] if value == "half" else value
        return path.write_bytes(value.encode() if isinstance(value, str) else value)
    readers = {".pt": common.load_pt, ".jsonl": read, ".json": lambda path: json.loads(path.read_text())}
    whole = readers[path.suffix](path)
    place, (*outer, last) = whole[1] if path.suffix == ".jsonl" else whole, field.split("/")
    for name in outer:
        place = place[key_of(place, name)]
    last = key_of(place, last)
    place.pop(last, None) if value is MISSING else place.update({last: value})
    writers = {".pt": lambda path, x: torch.save(x, path), ".jsonl": write}
    writers.get(path.suffix, lambda path, x: path.write_text(json.dumps(x)))(path, whole)


def key_of(place, name):
    return next(iter(place)) if name == "*" else int(name) if name not in place and name.isdecimal() else name


def vouch(run):
    """As if the stages had written what is there now: their records, which it returns, name its digests."""
    records = [*run.glob("0[2-5]_settings.json"), *run.glob("*/settings.json")]
    for record in records:
        about = json.loads(record.read_text())
        for part in ("inputs", "outputs"):
            for name in about.get(part, ()):
                about[part][name] = common.digest(run / name) if (run / name).exists() else about[part][name]
        record.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return [str(record.relative_to(run)) for record in records]


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """A run to damage, and one to mend it from."""
    run, whole = (shutil.copytree(finished, tmp_path_factory.mktemp("place") / name) for name in ("run", "whole"))
    for number in ("02", "03"):
        call(number, run)  # sheets and records name this place from now on
    return run, shutil.copytree(run, whole, dirs_exist_ok=True)


def mend(run, whole, touched):
    """Puts back what the row has changed, and returns what else is not as it was."""
    lost = []
    for path in whole.rglob("*"):
        name = str(path.relative_to(whole))
        if path.name.endswith(".lock") or path.is_dir():
            continue
        if not (run / name).exists() or path.stat().st_mtime_ns != (run / name).stat().st_mtime_ns:
            same = (run / name).exists() and (run / name).read_bytes() == path.read_bytes()
            lost += [] if same or name in touched else [name]
            shutil.copy2(path, run / name)
    for path in sorted(run.rglob("*"), reverse=True):
        if not (whole / path.relative_to(run)).exists() and not path.name.endswith(".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lost


@pytest.mark.parametrize("number, flags, changed, gone, named", [pytest.param(*row, id=name) for name, *row in cases()])
def test_what_is_wrong_is_named(number, flags, changed, gone, named, place, refused):
    run, whole = place
    touched = set(gone)
    try:
        for name in gone:
            (run / name).unlink()
        if changed:
            file, field, value = changed
            if file in NEW:
                write(run / file, read(run / NEW[file]) if isinstance(NEW[file], str) else NEW[file])
            change(run / file, field, value)
            touched |= {file, *(vouch(run) if not file.endswith("settings.json") else ())}
        line = refused(number, run, *(flag.replace("{run}", str(run)) for flag in flags))
        assert [part for part in named if part not in line] == []
    finally:
        lost = mend(run, whole, touched)
    assert lost == []
