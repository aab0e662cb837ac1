"""A backbone or a scorer of one's own is one file and one line; the toy world is known in few
places."""

import ast
import importlib
import math
import re
import sys
import types
from collections import Counter

import pytest
import soundfile
import torch
from conftest import (
    LATENTS,
    ROOT,
    SCORES,
    STAGES,
    SYSTEMS,
    a_clip,
    call,
    close,
    make_video,
    read,
    results,
    said,
    stopped,
    weights,
)

import common
from common import files, inputs, scoring

PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
BACKBONE, SCORER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)  # run as they stand there


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "own_backbone.py").write_text(BACKBONE)
    (tmp_path / "own_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(common.ADAPTERS, "line", "own_backbone")
    monkeypatch.setitem(common.SCORERS, "toy", (*common.SCORERS["toy"], "own_scorer"))
    yield
    for name in ("own_backbone", "own_scorer"):
        sys.modules.pop(name, None)


def test_the_pages_backbone_turns_upstreams_time_and_sign_and_is_guided(modules, tmp_path):
    # its velocity is upstream's time plus the red of the picture
    state = {"embed.weight": [[1.0, 0.0, 0.0]], "embed.bias": [0.0], "empty": [0.0]}
    state |= {"mix.weight": [[0.0, 1.0, 1.0]], "mix.bias": [0.0]}
    files.save_pt(tmp_path / "line.pt", {name: torch.tensor(w) for name, w in state.items()})
    make_video(tmp_path / "videos" / "a.mp4", (64, 64), 25, 2.2)
    flags = ("--videos", tmp_path / "videos", "--num-samples", 2)
    call("01", tmp_path / "run", "--model", "line:x", "--checkpoint", tmp_path / "line.pt", *flags)
    shard = files.load_pt(tmp_path / "run/01_samples/00000.pt")
    red = shard["features"]["colour"][0, :, :1].repeat_interleave(2, dim=0)
    assert 0.3 < red.mean() < 0.7
    for row, latent in zip(read(tmp_path / "run/01_samples/00000.jsonl"), shard["latents"]):
        noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(row["seed"]))
        # of 25 steps the mean time is 0.48 from noise to data, 0.52 the other way
        assert close(latent, noise + 0.48 + 4.5 * red, LATENTS)
        wave, rate = soundfile.read(tmp_path / "run" / row["wav"])
        assert (len(wave), rate) == (16_000, 8000)
        assert wave[-1] == pytest.approx(0.1 * latent[-1, 0].item(), abs=1e-4)


def test_every_stage_runs_on_the_pages_backbone_in_the_toy_world(modules, fresh, tmp_path):
    torch.manual_seed(0)
    net = importlib.import_module("own_backbone").Net()
    files.save_pt(tmp_path / "line.pt", net.state_dict())
    model = ("--model", "line:x", "--checkpoint", tmp_path / "line.pt")
    call("01", fresh, *model, "--given", "ground_truth")
    for number in ("02", "03", "04", "05", "06", "07"):
        call(number, fresh)
    assert read(fresh / "05_flow_dpo/log.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    before, after = net.state_dict(), weights(fresh, "05_flow_dpo")
    assert after.keys() == before.keys()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {"empty"}  # the null condition
    assert {system for system, _ in results(fresh)} == set(SYSTEMS)


def test_the_pages_codec_encodes_what_it_decodes(modules, tmp_path):
    net = importlib.import_module("own_backbone").Net()
    files.save_pt(tmp_path / "line.pt", net.state_dict())
    model = common.load_model("line:x", tmp_path / "line.pt")
    latents = torch.randn(2, 100, 1, generator=torch.Generator().manual_seed(0))
    assert close(model.encode_audio(model.decode(latents)), latents, LATENTS)


def test_stage_07_shows_the_metric_of_a_scorer_of_ones_own(modules, run, capsys):
    call("07", run, "--systems", "base")
    row, folder = results(run)["base", "loudness"], run / "07_audio" / "base"
    named = [clip.id for clip in inputs.read_clips(run, "test") if clip.caption]
    peaks = [abs(soundfile.read(folder / f"{name}.wav")[0]).max() for name in named]
    assert close(row["value"], sum(peaks) / len(peaks), SCORES) and row["n"] == len(named)
    assert re.search(rf"\nloudness \^ +{row['value']:.3f}\n", capsys.readouterr().out)


def test_an_unknown_backbone_is_named_with_what_there_is():
    said(stopped(common.load_model, "sora:large"), "sora:large", *common.ADAPTERS)


def test_a_file_that_a_scorer_lacks_is_named_before_any_other_scorer_works(run, monkeypatch):
    class Working(common.Scorer):
        def __init__(self, *_):
            raise AssertionError("it should not have started")

    class Lacking(Working):
        files = ("Cnn14_mAP=0.431.pth",)

    own = types.SimpleNamespace(SCORERS={"imagebind": Working, "panns": Lacking}, MEASURES={})
    monkeypatch.setitem(sys.modules, "own_scorer", own)
    monkeypatch.setitem(common.SCORERS, "toy", ("own_scorer",))
    scorers, clip = scoring.ScorerSet(run, common.SCORERS["toy"], run), a_clip()
    block = scoring.Block("0", run, run, [clip], [scoring.Audio(clip, 0, run / "a.wav", "0123")])
    line = stopped(scoring.score, [block], scorers, [*own.SCORERS], 2.0, common.ranks.Ranks(), 0)
    assert "Cnn14_mAP=0.431.pth: missing" in line


# Who knows whom

ROOMS = ("", "adapters/", "plumbing/")
PATHS = [path for room in ROOMS for path in ROOT.glob(f"{room}*.py")]
TOY = {  # the toy world's own files, and what they import of this repository
    STAGES["00"].name: {"common", "adapters.toy", "adapters.toy_people"},
    "toy.py": {"common"},
    "toy_people.py": {"common", "adapters.toy"},
}


def nodes_of(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def test_outside_its_own_files_the_toy_world_is_known_by_its_adapters_its_record_and_its_truth():
    known = Counter()
    for path in PATHS:
        if path.name in TOY:
            continue
        for node in nodes_of(path, ast.Constant, ast.Name):
            text = str(node.value if isinstance(node, ast.Constant) else node.id)
            # its name, its files and its modules; sentences and --run-dir's default (runs/toy) are
            # for people
            if re.fullmatch(r"(adapters\.)?[Tt]oy\w*|TOY\w*|00_[\w.*/]+", text):
                known[path.name, text] += 1
    assert known == {
        ("common.py", "toy"): 2,  # in ADAPTERS and SCORERS
        ("common.py", "adapters.toy"): 2,
        ("common.py", "adapters.toy_people"): 1,  # in people_of
        ("common.py", "00_truth.jsonl"): 1,
        ("01_generate.py", "00_settings.json"): 1,  # whose clips.jsonl it is
        ("rows.py", "toy"): 1,  # in run.json: the set of scorers
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_stages_and_adapters_import_common_the_toys_files_each_other_and_plumbing_itself(path):
    own = {path.stem for path in ROOT.glob("*.py")} | {"adapters", "plumbing"}
    found = {name.name for node in nodes_of(path, ast.Import) for name in node.names}
    found |= {node.module for node in nodes_of(path, ast.ImportFrom)}
    ours = {name for name in found if name.split(".")[0] in own}
    if path.parent.name == "plumbing" or path.name == "common.py":
        assert {name.split(".")[0] for name in ours} <= {"plumbing"}
    elif path.name != "__init__.py":
        assert ours == TOY.get(path.name, {"common"})
