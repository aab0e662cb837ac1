"""The real scorers: values equal to upstream's own functions on the same clips and files, the
files' real form, and what happens when one is missing, foreign or malicious. Random weights
throughout."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT, SCORES, Malicious, a_clip, close, judged, said, stopped, videos_of
from upstream_files import (
    TORIO,
    bursts,
    film,
    shrink_cnn14,
    stand_ins,
    weights_row,
    write_clap,
    write_imagebind,
    write_panns,
)

import common
from adapters import scorers

pytestmark = pytest.mark.usefixtures("no_network")
SPEECH = "male speech, man speaking"
FILES = {name: scorer.files[0] for name, scorer in scorers.SCORERS.items() if scorer.files}


# Clips, audio and files


def waves(rate_hz):
    """(4, 8.1 s): syllables, noise with a direct-current offset, silence, and nothing finite."""
    length = int(8.1 * rate_hz)
    noise = 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(1)) + 0.05
    voice = torch.from_numpy(bursts(8.1, rate_hz)).float()[:length]
    return torch.stack([voice, noise, torch.zeros(length), torch.full((length,), torch.nan)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips with different caption, label and picture."""
    folder = tmp_path_factory.mktemp("clips")
    talk, dog = film(folder / "a0.mp4"), film(folder / "a1.mp4", rate=Fraction(30), size=(90, 160))
    return [a_clip(talk, "a0", "a man talks", SPEECH), a_clip(dog, "a1", None, "dog barking")]


def load(name, folder):
    return scorers.SCORERS[name](folder, "cpu")


def forward(scorer, waves, clips):
    """All waves against each clip: {key: (clips, waves, ...)}."""
    rows = [judged(scorer, waves, [clip] * len(waves)) for clip in clips]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# av-benchmark's own code, with what it cannot import here replaced


class Sampler:
    """pytorchvideo's ConstantClipsPerVideoSampler at the commit that av-benchmark pins: the last
    window ends the file."""

    def __init__(self, clip_duration, clips_per_video):
        self.length, self.count, self.index = clip_duration, clips_per_video, 0

    def __call__(self, last_end, duration, annotation):
        start = Fraction(duration - self.length) * self.index / max(self.count - 1, 1)
        self.index += 1
        return start, start + self.length, 0, 0, self.index == self.count


def read_wav(path):
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(wave.T), rate


@pytest.fixture
def av_bench(monkeypatch):
    """av-benchmark's modules; audio files are read by soundfile, as torchaudio.load needs
    torchcodec now."""
    clone = Path(os.environ["UPSTREAM_DIR"]) / "av-benchmark"
    made = {"pytorchvideo": {}, "pytorchvideo.data": {}}
    made["pytorchvideo.data.clip_sampling"] = {"ConstantClipsPerVideoSampler": Sampler}
    monkeypatch.setattr(torchaudio, "load", read_wav)
    monkeypatch.setattr("logging.root.level", 30)
    monkeypatch.syspath_prepend(str(clone))
    with common.upstream("ImageBind"), scorers.without_init("imagebind"), stand_ins(TORIO | made):
        import imagebind.models.imagebind_model  # noqa: F401

        models = SimpleNamespace(ExtractionModels=None)
        monkeypatch.setitem(sys.modules, "av_bench.extraction_models", models)
        from av_bench import evaluate, extract
        from av_bench.data import audio_dataset, video_dataset

        spec = importlib.util.spec_from_file_location("extract_video", clone / "extract_video.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
    made = dict(evaluate=evaluate, extract=extract, extract_video=script)
    return SimpleNamespace(**made, audio=audio_dataset, video=video_dataset)


def written(folder, waves, rate_hz):
    """The waves as files that av-benchmark reads: the first 8 s, since its ImageBind reads the
    whole file."""
    paths = [folder / f"b{i}.wav" for i in range(len(waves))]
    for path, wave in zip(paths, torch.nan_to_num(waves)[:, : 8 * rate_hz]):
        soundfile.write(path, wave.numpy(), rate_hz, subtype="FLOAT")
    return paths


# ImageBind


@pytest.fixture
def tiny_imagebind(monkeypatch, tmp_path):
    return write_imagebind(tmp_path, monkeypatch)


@pytest.mark.upstream
def test_ib_equals_av_benchmark(tiny_imagebind, av_bench, clips, tmp_path):
    scorer = load("imagebind", tmp_path)
    ours = forward(scorer, waves(16000), clips)["ib"]
    videos = av_bench.video.VideoDataset([clip.path for clip in clips])
    pictures = torch.stack([videos.sample(i)["ib_video"] for i in range(len(clips))])
    files = av_bench.audio.ImageBindAudioDataset(written(tmp_path, waves(16000), 16000))
    mels = torch.stack([files[i][0].squeeze(1)[0] for i in range(4)])
    with torch.inference_mode():
        video = av_bench.extract_video.encode_video_with_imagebind(tiny_imagebind, pictures)
        audio = tiny_imagebind({"audio": mels})["audio"]
    theirs = torch.cosine_similarity(video[:, None], audio[None], dim=-1)
    torch.testing.assert_close(ours, theirs, **SCORES)
    # clips and sounds are told apart
    assert ours.std(dim=0).min() > 1e-4 and ours[:, :3].std(dim=1).min() > 1e-4
    assert {name.split(".")[1] for name, _ in scorer.net.named_parameters()} == {"vision", "audio"}


# CLAP


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    with pytest.MonkeyPatch.context() as patch:
        write_clap(folder, patch)
        yield folder


def test_clap_file_of_the_official_form_is_not_plain_tensors(clap):
    assert "cannot be read" in stopped(common.files.load_pt, clap / FILES["clap"])


UPSTREAM_CLAP = """
import sys, torch, laion_clap
clap = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-base", device="cpu").eval()
clap.load_ckpt(sys.argv[1], verbose=False)
waves = torch.load(sys.argv[2])
with torch.no_grad():
    audio = clap.get_audio_embedding_from_data(waves, use_tensor=True)
    text = clap.get_text_embedding(["a man talks", "dogs in the rain"], use_tensor=True)
torch.save((audio, text), sys.argv[3])
"""


@pytest.mark.upstream  # no clone is read, but importing laion_clap in full takes its time
def test_clap_equals_laion_clap(clap, clips, tmp_path):
    """Against CLAP_Module and its load_ckpt, in a process whose hub cache holds three small
    models."""
    scorer = load("clap", clap)
    spoken = [clips[0], a_clip(id="dogs", caption="dogs in the rain")]
    sounds = waves(48000)
    ours = forward(scorer, sounds, spoken)["clap"]

    from transformers import RobertaConfig, RobertaModel

    for name in ("roberta-base", "bert-base-uncased", "facebook--bart-base"):
        cache = tmp_path / "hub" / f"models--{name}"
        snapshot = cache / "snapshots" / ("0" * 40)
        shutil.copytree(clap / "roberta-base", snapshot)
        (snapshot / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0" * 40)
    text_tower = RobertaModel(RobertaConfig(**scorer.roberta))
    text_tower.save_pretrained(tmp_path / "hub/models--roberta-base/snapshots" / ("0" * 40))
    heard = torch.nan_to_num(sounds)
    centred = heard - heard.mean(dim=-1, keepdim=True)  # as AudioDataset does
    torch.save(centred[:, : 8 * 48000], tmp_path / "waves.pt")
    arguments = [clap / FILES["clap"], tmp_path / "waves.pt", tmp_path / "out.pt"]
    env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", UPSTREAM_CLAP, *map(str, arguments)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    audio, text = torch.load(tmp_path / "out.pt")
    theirs = torch.cosine_similarity(text[:, None], audio[None], dim=-1)
    torch.testing.assert_close(ours, theirs, **SCORES)
    assert ours[0, 0] != ours[1, 0] and ours.isfinite().all()


def test_clap_is_nan_without_a_caption(clap, clips):
    scorer = load("clap", clap)
    score = judged(scorer, waves(48000)[:3], [clips[0], clips[1], a_clip(caption="")])["clap"]
    assert torch.isnan(score).tolist() == [False, True, True]


@pytest.mark.parametrize("text, word", [
    ('{"<s>": 0, "a": 1}', "2 tokens instead of"), ('{"<s>": 0', "not valid JSON"),
])  # fmt: skip
def test_short_or_broken_tokenizer_file_is_one_line(text, word, clap, tmp_path):
    shutil.copytree(clap, tmp_path / "w")
    (tmp_path / "w/roberta-base/vocab.json").write_text(text)
    assert word in stopped(load, "clap", tmp_path / "w")


# Synchformer


class Pool(torch.nn.Module):
    """In place of Synchformer's video tower, which costs a minute a clip: (B, S, 3, 16, 224, 224)
    -> (B, S, 8, 768)."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3 * 4 * 4, 768)

    def forward(self, x):
        cells = torch.nn.functional.adaptive_avg_pool3d(x.flatten(0, 1), (8, 4, 4)).transpose(1, 2)
        return self.out(cells.flatten(2)).unflatten(0, x.shape[:2])


def write_features(folder, named):
    """What av-benchmark's evaluate() reads of both sides: {name: (video, audio)}, and noise."""
    noise = {name: torch.randn(4) for name in named}
    made = {"pann_features": {name: {"2048": x, "logits": x} for name, x in noise.items()}}
    made["vggish_features"] = {name: x[None] for name, x in noise.items()}
    made |= dict.fromkeys(("passt_features_embed", "passt_logits"), noise)
    made |= dict.fromkeys(("imagebind_video", "imagebind_audio"), noise)
    made["synchformer_video"] = {name: video for name, (video, _) in named.items()}
    made["synchformer_audio"] = {name: audio for name, (_, audio) in named.items()}
    for side in ("gt", "pred"):
        (folder / side).mkdir(exist_ok=True)
        for name, features in made.items():
            torch.save(features, folder / side / f"{name}.pth")


@pytest.mark.upstream
def test_desync_equals_av_benchmark(av_bench, clips, tmp_path, monkeypatch):
    """Upstream's network, its towers cut down, its extraction and its evaluate() from files."""
    from av_bench.synchformer import synchformer

    class Small(synchformer.Synchformer):
        def __init__(self):
            super().__init__()
            self.vfeat_extractor = Pool()
            layers = self.afeat_extractor.ast.encoder.layer
            self.afeat_extractor.ast.encoder.layer = layers[:1]

    torch.manual_seed(0)
    net, dataset = Small().eval(), av_bench.video.VideoDataset([clip.path for clip in clips])
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    files = av_bench.audio.SynchformerAudioDataset(written(tmp_path, waves(16000), 16000))
    mel = torchaudio.transforms.MelSpectrogram(
        16000, win_length=400, hop_length=160, n_fft=1024, n_mels=128
    )
    encode_video = av_bench.extract_video.encode_video_with_sync
    with torch.inference_mode():
        pictures = [dataset.sample(i)["sync_video"] for i in range(len(clips))]
        video = torch.cat([encode_video(net, x[None]) for x in pictures])
        sounds = torch.stack([files[i][0] for i in range(4)])
        audio = av_bench.extract.encode_audio_with_sync(net, sounds, mel)
        pairs = [(v, a) for v in range(2) for a in range(4)]
        logits = torch.cat([net.compare_v_a(video[[v], :14], audio[[a], :14]) for v, a in pairs])
        net.transformer.off_head.bias -= logits.mean(dim=0)  # or one class would always win
    checkpoint = tmp_path / "synchformer_state_dict.pth"
    monkeypatch.setattr(synchformer, "Synchformer", Small)
    monkeypatch.setattr(av_bench.evaluate, "Synchformer", Small)
    monkeypatch.setattr(av_bench.evaluate, "device", "cpu")
    monkeypatch.setattr(av_bench.evaluate, "_syncformer_ckpt_path", checkpoint)
    torch.save(net.state_dict(), checkpoint)

    scorer = load("synchformer", tmp_path)
    ours = forward(scorer, waves(16000), clips)["desync_s"]
    segments = torch.stack([seen["segments"] for seen in videos_of(scorer, clips).values()])
    torch.testing.assert_close(segments, video, atol=1e-4, rtol=1e-4)
    assert ours.unique().numel() > 2 and ours.min() >= 0 and ours.max() <= 2
    for rows, expected in ((pairs, ours.mean()), (pairs[:2], ours[0, :2].mean())):
        write_features(tmp_path, {f"x{v}{a}": (video[v], audio[a]) for v, a in rows})
        theirs = av_bench.evaluate.evaluate(tmp_path / "gt", tmp_path / "pred", skip_clap=True)
        assert close(theirs["DeSync"], expected, SCORES)


@pytest.mark.upstream
def test_full_size_synchformer_file_loads_strictly(tmp_path):
    with common.upstream("av-benchmark"):
        from av_bench.synchformer.synchformer import Synchformer
    state = Synchformer().state_dict()
    torch.save(state, tmp_path / "synchformer_state_dict.pth")
    assert len(state) == 513
    scorer = load("synchformer", tmp_path)
    videos = {"x": {"segments": torch.randn(24, 8, 768)}}
    scores = common.scoring.score_waves(scorer, waves(16000)[:1], [a_clip()], videos)
    assert 0 <= scores["desync_s"].item() <= 2
    with torch.inference_mode():
        assert scorer.net.extract_vfeats(torch.zeros(1, 1, 16, 3, 224, 224)).shape == (1, 1, 8, 768)


# PANNs


def test_panns_logits_are_those_of_its_tags_and_nothing_is_downloaded(tmp_path, monkeypatch):
    shrink_cnn14(monkeypatch)
    write_panns(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    scorer, sounds = load("panns_16k", tmp_path), waves(16000)
    (key, logits), *others = judged(scorer, sounds, [a_clip()] * 4).items()
    with torch.inference_mode():
        tags = scorer.net(scorers.scored_part(sounds, 16000, centred=True))["clipwise_output"]
    assert key == "logits" and logits.shape == (4, 527) and logits.isfinite().all() and not others
    torch.testing.assert_close(logits.sigmoid(), tags, **SCORES)
    relative = logits / logits.abs().max()
    assert close(relative[2], relative[3], SCORES)  # what is not finite is silence
    assert not close(relative[1], relative[3], SCORES)
    assert not (tmp_path / "home").exists() and "panns_inference.config" not in sys.modules


@pytest.mark.upstream
@pytest.mark.parametrize("name", ["panns", "panns_16k"])
def test_panns_equals_av_benchmark(tmp_path, av_bench, name, monkeypatch):
    from av_bench.panns import Cnn14

    write_panns(tmp_path)
    scorer, path = load(name, tmp_path), tmp_path / "whole.wav"
    rate = scorer.sample_rate_hz
    monkeypatch.setenv("HOME", str(tmp_path))  # av-benchmark's class loads its own file from ~
    (tmp_path / ".cache/audioldm_eval").mkdir(parents=True)
    (tmp_path / ".cache/audioldm_eval/ckpt").symlink_to(tmp_path)
    sizes = dict(sample_rate=rate, mel_bins=64, classes_num=527)
    theirs = Cnn14(["2048", "logits"], **sizes, **scorer.stft).eval()
    sounds = waves(rate)[:2]
    ours = judged(scorer, sounds, [a_clip()] * 2)["logits"]
    for i, sound in enumerate(sounds):
        soundfile.write(path, sound.numpy(), rate, subtype="FLOAT")
        with torch.inference_mode():
            expected = theirs(av_bench.audio.AudioDataset([path], sr=rate)[0][0])
        torch.testing.assert_close(ours[i], expected["logits"][0], **SCORES)


# PaSST


def test_passt_equals_hear21passt_and_is_quiet(tmp_path, monkeypatch, capfd, recwarn):
    """A file of full size, two of the 12 blocks run. Upstream finds it in $TORCH_HOME; as in
    av-benchmark it hears 8 s, centred, then padded to 10 s."""
    import hear21passt.base
    from hear21passt.models.passt import get_model

    torch.manual_seed(0)
    name = "passt-s-f128-p16-s10-ap.476-swa.pt"
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    net = get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False)
    torch.save(net.state_dict(), tmp_path / name)
    (tmp_path / "hub/checkpoints" / name).symlink_to(tmp_path / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    sounds = waves(32000)[[1, 3]]
    capfd.readouterr()
    recwarn.clear()
    scorer = load("passt", tmp_path)
    scorer.net.blocks = scorer.net.blocks[:2]
    ours = judged(scorer, sounds, [a_clip()] * 2)
    assert capfd.readouterr().out == "" and not recwarn.list
    theirs = hear21passt.base.get_basic_model(mode="all").eval()
    theirs.net.blocks = theirs.net.blocks[:2]
    wave = (sounds[:1] - sounds[:1].mean())[:, :256000]
    with torch.inference_mode():
        both = theirs(torch.nn.functional.pad(wave, (0, 64000)))
    whole = torch.cat([ours["logits"], ours["embedding"]], dim=1)
    torch.testing.assert_close(whole[:1], both, **SCORES)
    assert all(value.isfinite().all() for value in ours.values())


# AudioBox-Aesthetics


@pytest.mark.upstream  # no clone is read, but `pip install --no-deps audiobox-aesthetics`
def test_the_judges_axes_equal_audiobox_aesthetics_own_predictor(tmp_path, monkeypatch):
    pytest.importorskip("audiobox_aesthetics")
    with stand_ins({"submitit": {}, "tqdm.rich": {"tqdm": None}}):
        from audiobox_aesthetics import infer
        from audiobox_aesthetics.model import aes
    monkeypatch.setattr(aes.DEFAULT_AUDIO_CFG, "encoder_layers", 2)
    shape = dict(proj_num_layer=5, proj_ln=True, proj_act_fn="gelu", proj_dropout=0.0, nth_layer=3)
    shape |= dict(use_weighted_layer_sum=True, precision="32", normalize_embed=True, output_dim=1)
    torch.manual_seed(0)
    state = aes.AesMultiOutput(**shape).state_dict()
    weights = {f"model.{key}": value for key, value in state.items()}
    scale = {axis: dict(mean=5.0 + i, std=1.0 + i) for i, axis in enumerate(infer.AXES_NAME)}
    file = tmp_path / FILES["audiobox"]
    whole = dict(state_dict=weights, model_cfg=dict(shape, other=1), target_transform=scale)
    torch.save(whole, file)
    sounds = waves(16000)
    ours = judged(load("audiobox", tmp_path), sounds, [a_clip()] * 4)
    given = [{"path": wave[None, :128000], "sample_rate": 16000} for wave in sounds[:3]]
    theirs = infer.AesPredictor(str(file)).forward(given)
    for i, row in enumerate(theirs):
        assert {axis: ours[axis.lower()][i].item() for axis in row} == pytest.approx(row, abs=1e-4)
    assert ours["pq"][:3].std() > 1e-4 and all(value.isfinite().all() for value in ours.values())
    torch.save(whole | {"model_cfg": {}}, file)
    assert FILES["audiobox"] in stopped(load, "audiobox", tmp_path)


# PESQ


def test_pesq_rules(tmp_path):
    talk, quiet, mute = (film(tmp_path / f"{s}.mp4", sound=s) for s in ("bursts", "silence", None))
    scorer, clip = load("pesq", tmp_path), a_clip(talk, label=SPEECH)
    own = common.media.read_audio(talk, 16000)[: int(8.1 * 16000)]
    noise = torch.randn(len(own), generator=torch.Generator().manual_seed(0))
    broken = own.clone()
    broken[500] = torch.inf
    sounds = [own, own + 0.003 * noise, own + 0.03 * noise, torch.full_like(own, 0.5)]
    sounds += [0 * own, 1e-5 * noise, own * torch.nan, broken]

    def pesq(waves, clip=clip):
        return judged(scorer, waves, [clip] * len(waves))["pesq"]

    score = pesq(torch.stack(sounds))
    assert score[0] == pytest.approx(4.6439, abs=1e-3)  # the scale's top: identical
    assert 1.0 < score[2] < score[1] < 4.6
    assert 1.0 <= score[3] < 1.5 and score[4:].tolist() == [1.0] * 4
    scorer.workers = 2
    assert torch.equal(pesq(torch.stack(sounds)), score)  # in two processes
    for path, label in ((talk, "dog barking"), (talk, None), (quiet, SPEECH), (mute, SPEECH)):
        assert pesq(own[None], a_clip(path, label=label)).isnan().all(), (path, label)
    shorter = pesq(own[None, : 16000 * 5])  # both are cut to the common length
    assert shorter.item() == pytest.approx(4.6439, abs=1e-3)


@pytest.mark.upstream
def test_speech_classes_are_labels_of_vggsound():
    test_list = Path(os.environ["UPSTREAM_DIR"]) / "MMAudio/sets/vgg-test.tsv"
    labels = {line.split("\t")[1] for line in test_list.read_text().splitlines()[1:]}
    assert len(labels) == 309 and set(scorers.HUMAN_SPEECH_CLASSES) <= labels
    assert {label for label in labels if "speech" in label} <= set(scorers.HUMAN_SPEECH_CLASSES)


# Files that are missing, foreign or malicious


@pytest.mark.parametrize("name", FILES)
def test_missing_weight_file_is_one_line_with_its_table_row(name, tmp_path):
    said(stopped(load, name, tmp_path), tmp_path / FILES[name], *weights_row(FILES[name]))


@pytest.mark.parametrize("name", ["clap", "panns", "passt"])
def test_malicious_file_is_refused_in_one_line_and_not_run(name, clap, tmp_path):
    shutil.copytree(clap / "roberta-base", tmp_path / "roberta-base")
    content, mark = {"state_dict": {}, "model": {}, "lr": np.float64(0.1)}, tmp_path / "mark"
    torch.save(content | {"evil": Malicious(mark)}, tmp_path / FILES[name])
    said(stopped(load, name, tmp_path), FILES[name], "cannot be read")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["clap", "panns", "passt"])
def test_file_of_another_network_is_one_line(name, clap, tmp_path):
    shutil.copytree(clap / "roberta-base", tmp_path / "roberta-base")
    for content in ({"model": {"fc1.weight": torch.zeros(2)}}, [1, 2]):
        torch.save(content, tmp_path / FILES[name])
        line = stopped(load, name, tmp_path)
        assert FILES[name] in line and re.search("not the weights of|field '.*' is missing", line)


def test_missing_upstream_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("UPSTREAM_DIR", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "imagebind_huge.pth").touch()
    said(stopped(load, "imagebind", tmp_path), "ImageBind", "UPSTREAM_DIR")


def test_missing_tokenizer_file_is_one_line_in_seconds_when_the_hub_is_unreachable(clap, tmp_path):
    """A fresh process without HF_HUB_OFFLINE, an empty cache, and a proxy that no one answers."""
    (tmp_path / FILES["clap"]).symlink_to(clap / FILES["clap"])
    env = {x: y for x, y in os.environ.items() if not x.startswith(("HF_", "TRANSFORMERS_"))}
    env |= dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "http://192.0.2.1:9")
    env["HF_HOME"] = str(tmp_path / "hf")
    code = "import sys; from common import command; from adapters.scorers import ClapScorer\n"
    code += "command.launch(lambda folder: ClapScorer(folder, 'cpu'), lambda: sys.argv[1])"
    began = time.monotonic()
    command = [sys.executable, "-c", code, tmp_path]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and time.monotonic() - began < 60
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "roberta-base/vocab.json: missing" in ended.stderr
