"""A backbone or a scorer of one's own is one file and one line; the toy world is known in few places."""

import ast
import re
import sys
import types

import pytest
import soundfile
import torch
from conftest import LATENTS, ROOT, SCORES, STAGES, call, close, make_video, read, stopped

import common

BACKBONE = """
import torch
import common

class Line(common.FlowModel):
    latent_shape, sample_rate_hz, clip_s, feature_shapes = (50, 1), 8000, 1.0, {"letters": (1,)}
    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        self.net, self.checkpoint, self.loudness = torch.nn.Linear(1, 1), checkpoint, {"quiet": 0.01}[variant]
        self.load_policy(checkpoint)
    def encode(self, clip, seen):
        return {"letters": torch.tensor([float(len(clip["id"]))])}
    def project(self, features):
        return features
    def null_conditions(self, conditions):
        return {"letters": torch.zeros_like(conditions["letters"])}
    def predict(self, a_t, t, conditions):
        return self.net(a_t) + conditions["letters"][:, None]
    def decode(self, latents):
        return self.loudness * latents[..., 0].repeat_interleave(160, dim=1)
    def policy_state(self):
        return self.net.state_dict()
    def load_policy(self, path):
        self.net.load_state_dict(common.load_pt(path))

ADAPTER = Line
"""

SCORER = """
import torch
import common

class Loud(common.Scorer):
    sample_rate_hz, reads, gives = 16000, "caption", "peak"
    def embed_clip(self, clip):
        return clip["caption"]
    def score_audio(self, waves, clips, sides):
        silent = torch.tensor([side is None for side in sides])
        return {"peak": waves.abs().amax(dim=1).masked_fill(silent, torch.nan)}

SCORERS, MEASURES, AT_A_TIME = {"loud": Loud}, {"loudness": ("mean", "loud", "peak")}, 1
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "own_backbone.py").write_text(BACKBONE)
    (tmp_path / "own_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(common.ADAPTERS, "own", "own_backbone")
    monkeypatch.setitem(common.SCORERS, "toy", (*common.SCORERS["toy"], "own_scorer"))
    yield
    for name in ("own_backbone", "own_scorer"):
        sys.modules.pop(name, None)


def test_stage_01_generates_with_a_backbone_of_ones_own(modules, tmp_path):
    make_video(tmp_path / "videos" / "four.mp4", (64, 64), 25, 1.2)
    common.save_pt(tmp_path / "own.pt", {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    flags = ("--videos", tmp_path / "videos", "--num-samples", 2)
    call("01", tmp_path / "run", "--model", "own:quiet", "--checkpoint", tmp_path / "own.pt", *flags)
    rows, shard = (read(tmp_path / "run/01_samples/00000.jsonl"), common.load_pt(tmp_path / "run/01_samples/00000.pt"))
    for row, latent in zip(rows, shard["latents"]):  # u is 4.5 times the 4 letters, all the way from noise to data
        noise = torch.randn(50, 1, generator=torch.Generator().manual_seed(row["seed"]))
        assert close(latent, noise - 18, LATENTS)
        wave, rate = soundfile.read(tmp_path / "run" / row["wav"])
        assert (len(wave), rate) == (8000, 8000) and wave[-1] == pytest.approx(0.01 * latent[-1, 0].item(), abs=1e-4)


def test_stage_07_shows_the_metric_of_a_scorer_of_ones_own(modules, run, capsys):
    call("07", run, "--only", "--systems", "base")
    (row,) = [row for row in read(run / "07_results.jsonl") if row["metric"] == "loudness"]
    named = [clip["id"] for clip in read(run / "clips.jsonl") if clip["split"] == "test" and clip["caption"]]
    peaks = [abs(soundfile.read(run / "07_audio" / "base" / f"{name}.wav")[0]).max() for name in named]
    assert close(row["value"], sum(peaks) / len(peaks), SCORES) and row["n"] == len(named)
    assert re.search(rf"\nloudness \^ +{row['value']:.3f}\n", capsys.readouterr().out)


def test_an_unknown_backbone_is_named_with_what_there_is():
    line = stopped(common.load_model, "sora:large")
    assert "sora:large" in line and all(name in line for name in common.ADAPTERS)


def test_a_file_that_a_scorer_lacks_is_named_before_any_other_scorer_works(run, monkeypatch):
    class Working(common.Scorer):
        def __init__(self, *_):
            raise AssertionError("it should not have started")

    class Lacking(Working):
        files = ("Cnn14_mAP=0.431.pth",)

    own = types.SimpleNamespace(SCORERS={"imagebind": Working, "panns": Lacking}, MEASURES={}, AT_A_TIME=1)
    monkeypatch.setitem(sys.modules, "own_scorer", own)
    monkeypatch.setitem(common.SCORERS, "toy", ("own_scorer",))
    audio = common.Audio({"id": "a", "caption": None, "label": None}, run / "a.wav", "0123", "0")
    assert "Cnn14_mAP=0.431.pth: missing" in stopped(common.fill_store, run, [audio], own.SCORERS, run)


# Who knows whom ----------------------------------------------------------------------------------------------

ROOMS = ("", "adapters/", "plumbing/")
SOURCES = {p.name: ast.parse(p.read_text()) for room in ROOMS for p in ROOT.glob(f"{room}*.py")}


def test_at_most_four_lines_outside_stage_00_know_of_the_toy_world():
    known = set()
    for file, tree in SOURCES.items():
        for node in ast.walk(tree) if file != STAGES["00"].name else ():
            text = getattr(node, "value", None) if isinstance(node, ast.Constant) else getattr(node, "id", None)
            # its name, its files and its module; sentences and --run-dir's default (runs/toy) are for people
            if isinstance(text, str) and re.fullmatch(r"[Tt]oy\w*|TOY\w*|00_[\w.*/]+", text):
                known.add((file, node.lineno))
    assert 2 <= len(known) <= 4, known


def test_stages_and_adapters_import_common_alone_of_this_repository_and_common_its_plumbing():
    own = {path.stem for path in ROOT.glob("*.py")} | {"adapters", "plumbing"}
    allowed = {"ahead.py": {"plumbing.files"}, "media.py": {"plumbing.ahead", "plumbing.files"}}
    allowed |= {"people.py": {"plumbing.files"}, "files.py": set(), "tables.py": set()}
    rooms = ("ahead", "cores", "files", "media", "people", "tables")
    allowed["common.py"] = {"plumbing", *(f"plumbing.{name}" for name in rooms)}  # the first for `digits`
    allowed["cores.py"] = allowed["digits.py"] = set()
    for file, tree in SOURCES.items():
        found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {name for name in found if name.split(".")[0] in own}
        assert ours == (set() if file == "__init__.py" else allowed.get(file, {"common"})), file
