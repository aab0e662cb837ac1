"""The real scorers of common.py: values equal to upstream's own functions on the same clips and files, the files' real
form, and what happens when one is missing, foreign or malicious. Random weights throughout."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from upstream_files import bursts, film, write_clap, write_imagebind, write_panns

import common

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = os.environ.get("UPSTREAM_DIR")
SPEECH = "male speech, man speaking"


def needs_clones(test):
    return pytest.mark.upstream(pytest.mark.skipif(not UPSTREAM, reason="needs UPSTREAM_DIR")(test))


# Clips, audio and files ---------------------------------------------------------------------------------------


def waves(rate_hz):
    """(4, 8.1 s): syllables, noise with a direct-current offset, silence, and nothing finite."""
    length = int(8.1 * rate_hz)
    noise = 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(1)) + 0.05
    voice = torch.from_numpy(bursts(8.1, rate_hz)).float()[:length]
    return torch.stack([voice, noise, torch.zeros(length), torch.full((length,), torch.nan)])


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Two clips with different caption, label and picture."""
    folder = tmp_path_factory.mktemp("clips")
    films = [film(folder / "a0.mp4"), film(folder / "a1.mp4", rate=Fraction(30), size=(90, 160))]
    captions, labels = ("a man talks", None), (SPEECH, "dog barking")
    return [dict(id=p.stem, path=p, caption=c, label=x) for p, c, x in zip(films, captions, labels, strict=True)]


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect or to resolve a name is a failure of the test."""

    def refuse(*_, **__):
        raise AssertionError("a scorer reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def stops(capsys, call):
    """Runs what must end as a user error and returns its only line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        call()
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


def finite(scored):
    return all(torch.isfinite(value).all() for value in scored.values())


def forward(scorer, waves, clips):
    """All waves against each clip: {key: (clips, waves, ...)}."""
    rows = [scorer(waves, [clip] * len(waves)) for clip in clips]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# av-benchmark's own code, with what it cannot import here replaced -----------------------------------------------


class Decoder:
    """torio's StreamingMediaDecoder as av-benchmark uses it: the same ffmpeg filters, through PyAV."""

    def __init__(self, path):
        self.path, self.chunks = path, []

    def add_basic_video_stream(self, frames_per_chunk, frame_rate, format):
        frames = []
        with av.open(str(self.path)) as container:
            stream, graph = container.streams.video[0], av.filter.Graph()
            steps = graph.add("fps", str(frame_rate)), graph.add("format", format), graph.add("buffersink")
            graph.link_nodes(graph.add_buffer(template=stream), *steps).configure()
            for frame in [*container.decode(stream), None]:
                graph.push(frame)
                try:
                    while True:
                        frames.append(torch.from_numpy(graph.vpull().to_ndarray()).permute(2, 0, 1))
                except (BlockingIOError, EOFError):
                    pass
        self.chunks.append(torch.stack(frames[:frames_per_chunk]))

    def fill_buffer(self):
        pass

    def pop_chunks(self):
        return self.chunks


class Sampler:
    """pytorchvideo's ConstantClipsPerVideoSampler at the commit that av-benchmark pins: the last window ends the
    file."""

    def __init__(self, clip_duration, clips_per_video):
        self.length, self.count, self.index = clip_duration, clips_per_video, 0

    def __call__(self, last_end, duration, annotation):
        start = Fraction(duration - self.length) * self.index / max(self.count - 1, 1)
        self.index += 1
        return start, start + self.length, 0, 0, self.index == self.count


def load(path):
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(wave.T), rate


@pytest.fixture
def av_bench(monkeypatch):
    """av-benchmark's modules; audio files are read by soundfile, as torchaudio.load needs torchcodec now."""

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    monkeypatch.syspath_prepend(str(Path(UPSTREAM) / "av-benchmark"))
    module("torio")
    module("torio.io", StreamingMediaDecoder=Decoder)
    module("pytorchvideo")
    module("pytorchvideo.data")
    module("pytorchvideo.data.clip_sampling", ConstantClipsPerVideoSampler=Sampler)
    module("colorlog", ColoredFormatter=lambda *_: None)
    module("av_bench.extraction_models", ExtractionModels=None)
    monkeypatch.setattr(torchaudio, "load", load)
    with common.upstream("ImageBind"), common.without_init("imagebind"):
        import imagebind.models.imagebind_model  # noqa: F401
        from av_bench import evaluate, extract
        from av_bench.data import audio_dataset, video_dataset

        script = Path(UPSTREAM) / "av-benchmark/extract_video.py"
        spec = importlib.util.spec_from_file_location("extract_video", script)
        extract_video = importlib.util.module_from_spec(spec)
        monkeypatch.setattr("logging.root.level", 30)
        spec.loader.exec_module(extract_video)
    return types.SimpleNamespace(
        evaluate=evaluate, extract=extract, audio=audio_dataset, video=video_dataset, extract_video=extract_video
    )


def written(folder, waves, rate_hz):
    """The waves as files that av-benchmark reads: the first 8 s, since its ImageBind reads the whole file."""
    paths = []
    for i, wave in enumerate(waves):
        paths.append(folder / f"b{i}.wav")
        soundfile.write(paths[-1], torch.nan_to_num(wave)[: 8 * rate_hz].numpy(), rate_hz, subtype="FLOAT")
    return paths


# Frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(43, 2), Fraction(30000, 1001), Fraction(30), Fraction(12)])
@pytest.mark.parametrize("fps", [0.5, 25])
def test_frames_are_those_of_ffmpegs_fps_filter(tmp_path, rate, fps):
    path, decoder = film(tmp_path / "a.mp4", rate=rate, sound=None), Decoder(tmp_path / "a.mp4")
    decoder.add_basic_video_stream(round(8 * fps), fps, "rgb24")
    assert torch.equal(common.nearest_frames(path, fps, torch.clone), decoder.chunks[0])


def test_frames_of_a_short_missing_or_soundonly_file_skip_the_clip(tmp_path):
    just_short = film(tmp_path / "a.mp4", seconds=7.8, rate=Fraction(20), sound=None)
    assert len(common.nearest_frames(just_short, 25, lambda x: x[:, :1, :1])) == 200
    soundfile.write(tmp_path / "c.wav", np.zeros(160000), 16000)
    for path in (film(tmp_path / "b.mp4", seconds=7.0, sound=None), tmp_path / "c.wav", tmp_path / "none.mp4"):
        with pytest.raises(common.SkipClip):
            common.nearest_frames(path, 25, torch.clone)


# ImageBind ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_imagebind(monkeypatch, tmp_path):
    return write_imagebind(tmp_path, monkeypatch)


@needs_clones
def test_ib_equals_av_benchmark(tiny_imagebind, av_bench, clips, tmp_path, no_network):
    scorer = common.SCORERS["imagebind"](tmp_path, "cpu")
    ours = forward(scorer, waves(16000), clips)["ib"]
    videos = av_bench.video.VideoDataset([clip["path"] for clip in clips])
    pictures = torch.stack([videos.sample(i)["ib_video"] for i in range(len(clips))])
    files = av_bench.audio.ImageBindAudioDataset(written(tmp_path, waves(16000), 16000))
    mels = torch.stack([files[i][0].squeeze(1)[0] for i in range(4)])
    with torch.inference_mode():
        video = av_bench.extract_video.encode_video_with_imagebind(tiny_imagebind, pictures)
        audio = tiny_imagebind({"audio": mels})["audio"]
    theirs = torch.cosine_similarity(video[:, None], audio[None], dim=-1)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert ours.std(dim=0).min() > 1e-4 and ours[:, :3].std(dim=1).min() > 1e-4  # clips and sounds are told apart
    assert {name.split(".")[1] for name, _ in scorer.net.named_parameters()} == {"vision", "audio"}


@needs_clones
def test_imagebind_runs_the_video_tower_once_per_clip(tiny_imagebind, clips, tmp_path, monkeypatch):
    scorer, calls = common.SCORERS["imagebind"](tmp_path, "cpu"), []
    monkeypatch.setattr(scorer, "clip_side", lambda clip, real=scorer.clip_side: calls.append(clip["id"]) or real(clip))
    for _ in range(2):
        scorer(waves(16000)[:2], [clips[0], clips[0]])
    assert calls == ["a0"]


# CLAP -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def clap_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    return folder, write_clap(folder)


@pytest.fixture
def clap(clap_files, monkeypatch, no_network):
    folder, roberta = clap_files
    monkeypatch.setattr(common.ClapScorer, "roberta", roberta)
    return folder


def test_clap_file_of_the_official_form_is_not_plain_tensors(clap, capsys):
    assert "cannot be read" in stops(capsys, lambda: common.load_pt(clap / FILES["clap"]))


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


@needs_clones  # no clone is read, but importing laion_clap in full takes its time
def test_clap_equals_laion_clap(clap, clips, tmp_path):
    """Against CLAP_Module and its load_ckpt, in a process whose hub cache holds three small models."""
    scorer = common.SCORERS["clap"](clap, "cpu")
    spoken = [dict(clips[0]), dict(clips[1], caption="dogs in the rain")]
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
    torch.save((heard - heard.mean(dim=-1, keepdim=True))[:, : 8 * 48000], tmp_path / "waves.pt")  # AudioDataset
    arguments = [clap / "music_speech_audioset_epoch_15_esc_89.98.pt", tmp_path / "waves.pt", tmp_path / "out.pt"]
    env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", UPSTREAM_CLAP, *map(str, arguments)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    audio, text = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(ours, torch.cosine_similarity(text[:, None], audio[None], dim=-1), atol=2e-6, rtol=0)
    assert ours[0, 0] != ours[1, 0] and finite({"clap": ours})


def test_clap_is_nan_without_a_caption(clap, clips):
    scorer = common.SCORERS["clap"](clap, "cpu")
    score = scorer(waves(48000)[:3], [clips[0], clips[1], dict(clips[0], id="b", caption="")])["clap"]
    assert torch.isnan(score).tolist() == [False, True, True]


def test_short_or_broken_tokenizer_file_is_one_line(clap, capsys, tmp_path):
    for text, word in (('{"<s>": 0, "a": 1}', "2 tokens instead of"), ('{"<s>": 0', "not valid JSON")):
        shutil.copytree(clap, tmp_path / "w", dirs_exist_ok=True)
        (tmp_path / "w/roberta-base/vocab.json").write_text(text)
        assert word in stops(capsys, lambda: common.SCORERS["clap"](tmp_path / "w", "cpu"))


# Synchformer ----------------------------------------------------------------------------------------------------


class Pool(torch.nn.Module):
    """In place of Synchformer's video tower, which costs a minute a clip: (B, S, 3, 16, 224, 224) -> (B, S, 8, 768)."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3 * 4 * 4, 768)

    def forward(self, x):
        cells = torch.nn.functional.adaptive_avg_pool3d(x.flatten(0, 1), (8, 4, 4)).transpose(1, 2)
        return self.out(cells.flatten(2)).unflatten(0, x.shape[:2])


@needs_clones
def test_desync_equals_av_benchmark(av_bench, clips, tmp_path, monkeypatch, no_network):
    """Upstream's network, its towers cut down, its extraction and its evaluate() from files."""
    from av_bench.synchformer import synchformer

    class Small(synchformer.Synchformer):
        def __init__(self):
            super().__init__()
            self.vfeat_extractor = Pool()
            layers = self.afeat_extractor.ast.encoder.layer
            self.afeat_extractor.ast.encoder.layer = layers[:1]

    torch.manual_seed(0)
    net, dataset = Small().eval(), av_bench.video.VideoDataset([clip["path"] for clip in clips])
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    files = av_bench.audio.SynchformerAudioDataset(written(tmp_path, waves(16000), 16000))
    mel = torchaudio.transforms.MelSpectrogram(16000, win_length=400, hop_length=160, n_fft=1024, n_mels=128)
    with torch.inference_mode():
        pictures = torch.stack([dataset.sample(i)["sync_video"] for i in range(len(clips))])
        video = torch.cat([av_bench.extract_video.encode_video_with_sync(net, x[None]) for x in pictures])
        audio = av_bench.extract.encode_audio_with_sync(net, torch.stack([files[i][0] for i in range(4)]), mel)
        pairs = [(v, a) for v in range(2) for a in range(4)]
        logits = torch.cat([net.compare_v_a(video[[v], :14], audio[[a], :14]) for v, a in pairs])
        net.transformer.off_head.bias -= logits.mean(dim=0)  # or one class would always win
    monkeypatch.setattr(synchformer, "Synchformer", Small)
    monkeypatch.setattr(av_bench.evaluate, "Synchformer", Small)
    monkeypatch.setattr(av_bench.evaluate, "device", "cpu")
    monkeypatch.setattr(av_bench.evaluate, "_syncformer_ckpt_path", tmp_path / "synchformer_state_dict.pth")
    torch.save(net.state_dict(), tmp_path / "synchformer_state_dict.pth")

    scorer = common.SCORERS["synchformer"](tmp_path, "cpu")
    ours = forward(scorer, waves(16000), clips)["desync_s"]
    torch.testing.assert_close(torch.stack(list(scorer.memo.values())), video, atol=1e-4, rtol=1e-4)

    def theirs(rows):
        named = {f"x{v}{a}": (video[v], audio[a]) for v, a in rows}
        noise = {name: torch.randn(4) for name in named}
        for side in ("gt", "pred"):
            (tmp_path / side).mkdir(exist_ok=True)
            torch.save({n: {"2048": x, "logits": x} for n, x in noise.items()}, tmp_path / side / "pann_features.pth")
            torch.save({n: x[None] for n, x in noise.items()}, tmp_path / side / "vggish_features.pth")
            for file in ("passt_features_embed", "passt_logits", "imagebind_video", "imagebind_audio"):
                torch.save(noise, tmp_path / side / f"{file}.pth")
            torch.save({n: x[0] for n, x in named.items()}, tmp_path / side / "synchformer_video.pth")
            torch.save({n: x[1] for n, x in named.items()}, tmp_path / side / "synchformer_audio.pth")
        return av_bench.evaluate.evaluate(tmp_path / "gt", tmp_path / "pred", skip_clap=True)["DeSync"]

    assert ours.unique().numel() > 2 and ours.min() >= 0 and ours.max() <= 2
    assert theirs(pairs) == pytest.approx(ours.mean().item(), abs=1e-6)
    assert theirs(pairs[:2]) == pytest.approx(ours[0, :2].mean().item(), abs=1e-6)


@needs_clones
def test_full_size_synchformer_file_loads_strictly(tmp_path, capsys):
    with common.upstream("av-benchmark"):
        from av_bench.synchformer.synchformer import Synchformer
    state = Synchformer().state_dict()
    torch.save(state, tmp_path / "synchformer_state_dict.pth")
    assert len(state) == 513
    scorer = common.SCORERS["synchformer"](tmp_path, "cpu")
    scorer.memo["a"] = torch.randn(24, 8, 768)
    assert 0 <= scorer(waves(16000)[:1], [dict(id="a")])["desync_s"].item() <= 2
    with torch.inference_mode():
        assert scorer.net.extract_vfeats(torch.zeros(1, 1, 16, 3, 224, 224)).shape == (1, 1, 8, 768)


# PANNs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def panns_files(tmp_path):
    write_panns(tmp_path)
    return tmp_path


def test_panns_logits_belong_to_the_embedding_and_nothing_is_downloaded(panns_files, monkeypatch, no_network):
    monkeypatch.setenv("HOME", str(panns_files / "home"))
    scorer = common.SCORERS["panns_16k"](panns_files, "cpu")
    scored = scorer(waves(16000), [dict(id="a")] * 4)
    with torch.inference_mode():
        assert torch.equal(scored["logits"], scorer.net.fc_audioset(scored["embedding"]))
    assert finite(scored) and scored["logits"].shape == (4, 527) and scored["embedding"].shape == (4, 2048)
    assert torch.equal(scored["logits"][2], scored["logits"][3])  # what is not finite is silence
    assert not (panns_files / "home").exists() and "panns_inference.config" not in sys.modules


@needs_clones
@pytest.mark.parametrize("name", ["panns", "panns_16k"])
def test_panns_equals_av_benchmark(panns_files, av_bench, name, monkeypatch):
    from av_bench.panns import Cnn14

    scorer = common.SCORERS[name](panns_files, "cpu")
    rate = scorer.sample_rate_hz
    monkeypatch.setenv("HOME", str(panns_files))  # av-benchmark's class loads its own file from ~
    (panns_files / ".cache/audioldm_eval").mkdir(parents=True)
    (panns_files / ".cache/audioldm_eval/ckpt").symlink_to(panns_files)
    theirs = Cnn14(["2048", "logits"], sample_rate=rate, mel_bins=64, classes_num=527, **scorer.stft).eval()
    sounds = waves(rate)[:2]
    path = panns_files / "whole.wav"
    ours = scorer(sounds, [dict(id="a")] * 2)
    for i, sound in enumerate(sounds):
        soundfile.write(path, sound.numpy(), rate, subtype="FLOAT")
        with torch.inference_mode():
            expected = theirs(av_bench.audio.AudioDataset([path], sr=rate)[0][0])
        torch.testing.assert_close(ours["logits"][i], expected["logits"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours["embedding"][i], expected["2048"][0], atol=1e-5, rtol=1e-5)


# PaSST ----------------------------------------------------------------------------------------------------------


def test_passt_equals_hear21passt_and_is_quiet(tmp_path, monkeypatch, capfd, no_network, recwarn):
    """A file of full size, two of the 12 blocks run. Upstream finds it in $TORCH_HOME; as in av-benchmark it hears 8 s,
    centred, then padded to 10 s."""
    import hear21passt.base
    from hear21passt.models.passt import get_model

    torch.manual_seed(0)
    name = "passt-s-f128-p16-s10-ap.476-swa.pt"
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False).state_dict(), tmp_path / name)
    (tmp_path / "hub/checkpoints" / name).symlink_to(tmp_path / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    sounds = waves(32000)[[1, 3]]
    capfd.readouterr()
    recwarn.clear()
    scorer = common.SCORERS["passt"](tmp_path, "cpu")
    scorer.net.blocks = scorer.net.blocks[:2]
    ours = scorer(sounds, [dict(id="a")] * 2)
    assert capfd.readouterr().out == "" and not recwarn.list
    theirs = hear21passt.base.get_basic_model(mode="all").eval()
    theirs.net.blocks = theirs.net.blocks[:2]
    wave = (sounds[:1] - sounds[:1].mean())[:, :256000]
    with torch.inference_mode():
        both = theirs(torch.nn.functional.pad(wave, (0, 64000)))
    torch.testing.assert_close(torch.cat([ours["logits"], ours["embedding"]], dim=1)[:1], both, atol=1e-5, rtol=1e-5)
    assert finite(ours)


# PESQ -----------------------------------------------------------------------------------------------------------


def test_pesq_rules(tmp_path):
    talk, quiet, mute = (film(tmp_path / f"{s}.mp4", sound=s) for s in ("bursts", "silence", None))
    scorer = common.SCORERS["pesq"](tmp_path, "cpu")
    own = common.read_audio(talk, 16000)[: int(8.1 * 16000)]
    noise = torch.randn(len(own), generator=torch.Generator().manual_seed(0))
    clip = dict(id="talk", path=talk, caption=None, label=SPEECH)
    broken = own.clone()
    broken[500] = torch.inf
    constant = torch.full_like(own, 0.5)
    sounds = [own, own + 0.003 * noise, own + 0.03 * noise, constant, 0 * own, 1e-5 * noise, own * torch.nan, broken]
    score = scorer(torch.stack(sounds), [clip] * len(sounds))["pesq"]
    assert score[0] == pytest.approx(4.6439, abs=1e-3)  # the scale's top: identical
    assert 1.0 < score[2] < score[1] < 4.6
    assert 1.0 <= score[3] < 1.5 and score[4:].tolist() == [1.0] * 4
    for other in (dict(label="dog barking"), dict(label=None), dict(path=quiet), dict(path=mute)):
        assert torch.isnan(scorer(own[None], [dict(clip, id=str(other), **other)])["pesq"]).all(), other
    assert scorer(own[None, : 16000 * 5], [clip])["pesq"].item() == pytest.approx(4.6439, abs=1e-3)  # common length


@needs_clones
def test_speech_classes_are_labels_of_vggsound():
    lines = (Path(UPSTREAM) / "MMAudio/sets/vgg-test.tsv").read_text().splitlines()[1:]
    labels = {line.split("\t")[1] for line in lines}
    assert len(labels) == 309 and set(common.HUMAN_SPEECH_CLASSES) <= labels
    assert {label for label in labels if "speech" in label} <= set(common.HUMAN_SPEECH_CLASSES)


# Files that are missing, foreign or malicious -------------------------------------------------------------------

FILES = {
    "imagebind": "imagebind_huge.pth",
    "clap": "music_speech_audioset_epoch_15_esc_89.98.pt",
    "synchformer": "synchformer_state_dict.pth",
    "panns": "Cnn14_mAP=0.431.pth",
    "panns_16k": "Cnn14_16k_mAP=0.438.pth",
    "passt": "passt-s-f128-p16-s10-ap.476-swa.pt",
}


@pytest.mark.parametrize("name", FILES)
def test_missing_weight_file_is_one_line_with_its_table_row(name, tmp_path, capsys, no_network):
    line = stops(capsys, lambda: common.SCORERS[name](tmp_path, "cpu"))
    assert all(word in line for word in (str(tmp_path / FILES[name]), *common.WEIGHTS[FILES[name]]))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("name", ["clap", "panns", "passt"])
def test_malicious_file_is_refused_in_one_line_and_not_run(name, clap, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clap / "roberta-base", tmp_path / "roberta-base")
    scalar = np.float64(0.1)
    torch.save({"state_dict": {}, "model": {}, "lr": scalar, "evil": Evil()}, tmp_path / FILES[name])
    line = stops(capsys, lambda: common.SCORERS[name](tmp_path, "cpu"))
    assert FILES[name] in line and "cannot be read" in line and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["clap", "panns", "passt"])
def test_file_of_another_network_is_one_line(name, clap, tmp_path, capsys):
    shutil.copytree(clap / "roberta-base", tmp_path / "roberta-base")
    torch.save({"model": {"fc1.weight": torch.zeros(2)}}, tmp_path / FILES[name])
    assert "not the weights of" in stops(capsys, lambda: common.SCORERS[name](tmp_path, "cpu"))


def test_missing_upstream_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("UPSTREAM_DIR", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "imagebind_huge.pth").touch()
    line = stops(capsys, lambda: common.SCORERS["imagebind"](tmp_path, "cpu"))
    assert "ImageBind" in line and "UPSTREAM_DIR" in line


def test_missing_tokenizer_file_is_one_line_in_seconds_when_the_hub_is_unreachable(clap_files, tmp_path):
    """A fresh process without HF_HUB_OFFLINE, an empty cache, and a proxy that no one answers."""
    file = "music_speech_audioset_epoch_15_esc_89.98.pt"
    (tmp_path / file).symlink_to(clap_files[0] / file)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HTTPS_PROXY": "http://192.0.2.1:9", "HTTP_PROXY": "http://192.0.2.1:9"}
    code = f"import common; common.SCORERS['clap']({str(tmp_path)!r}, 'cpu')"
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and time.monotonic() - began < 60
    assert ended.stderr.count("\n") == 1 and "roberta-base/vocab.json: missing" in ended.stderr, ended.stderr
