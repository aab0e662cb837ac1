"""The real scorers: AudioScore's five, and the networks behind FD, KL and IS (docs/adapters.md).

Numbers follow av-benchmark (github.com/hkchengrex/av-benchmark), the code behind the metrics of MMAudio, "the same
metrics in [8]" (Sec. 3.1). Every network judges the first 8 s of the audio as stage 01 writes it, where what is not
finite is silence: a silent or broken audio has an ordinary finite value everywhere, and never raises.
"""

import contextlib
import importlib.util
import math
import os
import sys
import types
import warnings

import torch
import torch.nn.functional as F
import torchaudio
from torchvision.transforms import InterpolationMode, v2

from common import (
    ANY,
    HUMAN_SPEECH_CLASSES,
    NUMBER,
    NUMPY,
    TENSOR,
    NoAudio,
    Scorer,
    dict_of,
    fit_length,
    load_pt,
    pesq_scores,
    read_audio,
    read_json,
    stop,
    upstream,
    weight_file,
    with_fields,
)

JUDGED_S = 8.0


def judged(waves, sample_rate_hz, centred=False):
    """(B, S) waves -> (B, 8 s), cut or padded with silence; `centred` takes off the whole wave's mean first."""
    waves = torch.nan_to_num(waves.float(), 0, 0, 0).clamp(-2, 2)  # resampling may overshoot 1; 1e30 would overflow
    if centred:
        waves = waves - waves.mean(dim=-1, keepdim=True)
    return fit_length(waves, round(JUDGED_S * sample_rate_hz))


def in_batches(network, rows, device, size=16):
    """network(rows) on the device, a few rows at a time -> float32 on the CPU."""
    return torch.cat([network(part.to(device)).float().cpu() for part in rows.split(size)])


@contextlib.contextmanager
def without_init(package):
    """While it lasts, modules of a package are imported without its __init__: panns_inference's and laion_clap's reach
    for the network, imagebind's needs packages that its networks do not."""
    if package in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = list(spec.submodule_search_locations)
    try:
        yield
    finally:
        del sys.modules[package]


def load_weights(net, state, path, device, **options):
    """Strict; a file of another network ends in one line. Returns the network frozen, in eval mode, on the device."""
    try:
        net.load_state_dict(state, **options)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        stop(f"{path}: not the weights of {type(net).__name__} ({reason}); download it again")
    return net.to(device).eval().requires_grad_(False)


class ImageBindScorer(Scorer):
    """score_1, `ib`: cosine of ImageBind's video and audio embeddings, in [-1, 1].

    Video: 4 frames, 3 crops along the longer side, 3 pairs of neighbouring frames; the 9 unit embeddings are averaged.
    Audio: windows of 2 s at 0, 3 and 6 s, averaged (av-benchmark spreads them over the whole file if it exceeds 8 s).
    """

    sample_rate_hz, files, reads, gives, gib = 16000, ("imagebind_huge.pth",), "video", "ib", 3.1

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with upstream("ImageBind"), without_init("imagebind"):
            from imagebind.models import imagebind_model
        net = imagebind_model.imagebind_huge(pretrained=False)  # 4.8 GB: the file is mapped, never copied
        net = load_weights(net, load_pt(path, mmap=True), path, "cpu", assign=True)
        for parts in (net.modality_preprocessors, net.modality_trunks, net.modality_heads, net.modality_postprocessors):
            for modality in set(parts) - {"vision", "audio"}:
                del parts[modality]  # 0.5 of 1.2e9 parameters
        self.device, self.net = device, net.to(device)
        self.frames = 0.5, v2.Compose([
            v2.Resize(224, interpolation=InterpolationMode.BICUBIC),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ])  # fmt: skip

    @staticmethod
    def crops(frames):
        """(4, 3, H, W), shorter side 224 -> (9, 3, 2, 224, 224): 3 pairs of frames, 3 crops of each."""
        height, width = frames.shape[-2:]
        tops, lefts = ([0, math.ceil((side - 224) / 2), side - 224] for side in (height, width))
        squares = [frames[..., top : top + 224, left : left + 224] for top, left in zip(tops, lefts, strict=True)]
        return torch.stack([square[i : i + 2] for i in range(3) for square in squares]).transpose(1, 2)

    @torch.inference_mode()
    def embed_clip(self, clip, frames):
        """frames: (4, 3, H, W) -> (1024,)."""
        return self.net({"vision": self.crops(frames)[None].to(self.device)})["vision"][0].cpu()

    @staticmethod
    def spectrograms(windows):
        """(B, 3, 32000) -> (B, 3, 1, 128, 204): Kaldi's log mel filter bank, padded with 0, then normalised. In one
        call, windows end to end: each has 198 whole frames, the next one begins where the 201st would."""
        line = (windows - windows.mean(dim=-1, keepdim=True)).reshape(1, -1)
        fbank = torchaudio.compliance.kaldi.fbank(
            line, sample_frequency=16000, num_mel_bins=128, frame_length=25, frame_shift=10,
            window_type="hanning", htk_compat=True, use_energy=False, dither=0.0,
        )  # fmt: skip
        fbank = F.pad(fbank, (0, 0, 0, 2)).view(*windows.shape[:2], 200, 128)[:, :, :198]
        return (fit_length(fbank.transpose(2, 3), 204)[:, :, None] + 4.268) / 9.138

    def score_audio(self, waves, clips, sides):
        windows = judged(waves, 16000).unfold(-1, 32000, 48000)  # (B, 3, 32000)
        audio = in_batches(lambda x: self.net({"audio": self.spectrograms(x)})["audio"], windows, self.device)
        return {"ib": F.cosine_similarity(torch.stack(sides), audio, dim=-1)}


class ClapScorer(Scorer):
    """score_2, `clap`: cosine of LAION-CLAP's caption and audio embeddings, in [-1, 1]; nan without a caption.

    laion_clap's own network, built and loaded by our lines: its package downloads three tokenizers when imported and
    RoBERTa's weights, which its checkpoint replaces, when built; its load_ckpt unpickles.
    """

    sample_rate_hz, reads, gives, gib = 48000, "caption", "clap", 1.4
    files = ("music_speech_audioset_epoch_15_esc_89.98.pt", "roberta-base/vocab.json", "roberta-base/merges.txt")
    roberta = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)  # -base

    def __init__(self, weights, device):
        from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

        path, vocab, merges = (weight_file(weights, name) for name in self.files)
        tokens = len(read_json(vocab))  # too few would silently map every caption to the same ids
        if tokens != self.roberta["vocab_size"]:
            stop(f"{vocab}: {tokens} tokens instead of {self.roberta['vocab_size']}; download it again")
        self.tokenizer = RobertaTokenizer(str(vocab), str(merges))
        with without_init("laion_clap"):
            from laion_clap.clap_module import factory, model
        empty = RobertaModel(RobertaConfig(**self.roberta))
        model.RobertaModel = types.SimpleNamespace(from_pretrained=lambda name: empty)
        try:
            net, _ = factory.create_model("HTSAT-base", "roberta", device="cpu", enable_fusion=False)
        finally:
            model.RobertaModel = RobertaModel
        state = load_pt(path, ignore=NUMPY)  # learning rates
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state.pop("text_branch.embeddings.position_ids", None)  # a constant that newer transformers do not store
        self.device, self.net = device, load_weights(net, state, path, device)

    @torch.inference_mode()
    def embed_clip(self, clip):
        if not clip["caption"]:
            return None
        length = dict(padding="max_length", truncation=True, max_length=77)
        tokens = self.tokenizer([clip["caption"]], return_tensors="pt", **length)
        return self.net.get_text_embedding(dict(tokens))[0].cpu()

    def score_audio(self, waves, clips, sides):
        score, rows = torch.full((len(waves),), math.nan), [i for i, side in enumerate(sides) if side is not None]
        if rows:
            waves = fit_length(judged(waves[rows], 48000, centred=True), 480000)  # 10 s, as laion_clap pads
            embed = self.net.get_audio_embedding
            audio = in_batches(lambda x: embed([{"waveform": wave} for wave in x]), waves, self.device)
            score[rows] = F.cosine_similarity(torch.stack([sides[i] for i in rows]), audio, dim=-1)
        return {"clap": score}


class SynchformerScorer(Scorer):
    """score_3, `desync_s`: |audio-video offset| in seconds that Synchformer predicts, mean of the first and the last
    4.8 s, in [0, 2], lower is better. An offset is the most probable of 21 classes, -2 to 2 s in steps of 0.2 s."""

    sample_rate_hz, files, reads, gives = 16000, ("synchformer_state_dict.pth",), "video", "desync_s"
    gib = 2.0

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with upstream("av-benchmark"):
            from av_bench.synchformer.synchformer import Synchformer, make_class_grid
        self.device, self.net = device, load_weights(Synchformer(), load_pt(path), path, device)
        self.offset_s = make_class_grid(-2, 2, 21)
        mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=1024, win_length=400, hop_length=160, n_mels=128)
        self.mel = mel.to(device)
        self.frames = 25, v2.Compose([v2.Resize(224, InterpolationMode.BICUBIC), v2.CenterCrop(224)])
        float32, centre = v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True)
        self.values = v2.Compose([float32, centre])

    @torch.inference_mode()
    def embed_clip(self, clip, frames):
        """frames: (200, 3, 224, 224) -> (24, 8, 768): 24 segments of 16 frames (0.64 s), every 8 frames."""
        frames = self.values(frames.to(self.device))
        segments = torch.stack([frames[i : i + 16] for i in range(0, 185, 8)])[:, None]
        return in_batches(self.net.extract_vfeats, segments, self.device, size=8)[:, 0]

    def score_audio(self, waves, clips, sides):
        segments = judged(waves, 16000).unfold(-1, 10240, 5120)  # (B, 24, 10240)
        audio, video = in_batches(self.hear, segments, self.device), torch.stack(sides)
        offsets = []
        for part in (slice(0, 14), slice(-14, None)):  # the network compares exactly 14 segments
            both = torch.cat([video[:, part], audio[:, part]], dim=2)  # (B, 14, 8 + 6, 768)
            logits = in_batches(lambda x: self.net.compare_v_a(x[:, :, :8], x[:, :, 8:]), both, self.device)
            offsets.append(self.offset_s[logits.argmax(dim=-1)].abs())
        return {"desync_s": torch.stack(offsets).mean(dim=0)}

    def hear(self, segments):
        """(B, 24, 10240) -> (B, 24, 6, 768)."""
        mels = fit_length(torch.log(self.mel(segments) + 1e-6), 66)  # padded with 0 after the log, as upstream
        return self.net.extract_afeats(((mels + 4.2677393) / (2 * 4.5689974))[:, :, None])  # (B, 24, 1, 128, 66)


class PannsScorer(Scorer):
    """The tagger of score_4, PANNs' Cnn14 at 32 kHz: `logits` (B, 527) over AudioSet's classes, before the sigmoid."""

    sample_rate_hz, files, gib = 32000, ("Cnn14_mAP=0.431.pth",), 0.9
    stft = dict(window_size=1024, hop_size=320, fmin=50, fmax=14000)

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with without_init("panns_inference"):
            from panns_inference.models import Cnn14
        state = load_pt(path, ignore=NUMPY)  # the state of its sampler
        state = state.get("model") if isinstance(state, dict) else None
        net = Cnn14(sample_rate=self.sample_rate_hz, mel_bins=64, classes_num=527, **self.stft)
        self.device, self.net = device, load_weights(net, state, path, device)

    def score_audio(self, waves, clips, sides):
        waves = judged(waves, self.sample_rate_hz, centred=True)
        return {"logits": in_batches(lambda x: self.net.fc_audioset(self.net(x)["embedding"]), waves, self.device)}


class Panns16kScorer(PannsScorer):
    """The variant of av-benchmark's KL_PANNs and IS."""

    sample_rate_hz, files = 16000, ("Cnn14_16k_mAP=0.438.pth",)
    stft = dict(window_size=512, hop_size=160, fmin=50, fmax=8000)


class PasstScorer(Scorer):
    """`logits` (B, 527) and `embedding` (B, 768) of PaSST at 32 kHz, for FD_PaSST and KL_PaSST: 8 s, padded to 10 s."""

    sample_rate_hz, files = 32000, ("passt-s-f128-p16-s10-ap.476-swa.pt",)

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        from hear21passt.models.passt import get_model
        from hear21passt.models.preprocess import AugmentMelSTFT

        with self.quiet():
            net = get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False)
            self.mel = AugmentMelSTFT(freqm=48, timem=192, fmin_aug_range=10, fmax_aug_range=2000).to(device).eval()
        self.device, self.net = device, load_weights(net, load_pt(path), path, device)

    @staticmethod
    @contextlib.contextmanager
    def quiet():
        """hear21passt prints its shapes, and warns about 998 frames of its 1000."""
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def score_audio(self, waves, clips, sides):
        waves = fit_length(judged(waves, 32000, centred=True), 320000)
        with self.quiet():
            both = in_batches(lambda x: torch.cat(self.net(self.mel(x)[:, None]), dim=1), waves, self.device)
        return {"logits": both[:, :527], "embedding": both[:, 527:]}


class PesqScorer(Scorer):
    """score_5, `pesq`: wide-band PESQ at 16 kHz against the clip's own audio, both cut to the shorter, at most 8 s. nan
    where it does not apply: another class, no audio track, a reference without utterance."""

    sample_rate_hz, reads, gives = 16000, "reference", "pesq"

    def embed_clip(self, clip):
        if clip["label"] not in HUMAN_SPEECH_CLASSES:
            return None
        try:
            return read_audio(clip["path"], 16000, JUDGED_S, pad=False)
        except NoAudio:  # a silent film
            return None

    def score_audio(self, waves, clips, sides):
        return {"pesq": pesq_scores(sides, waves, self.workers)}


class AudioboxScorer(Scorer):
    """AudioBox-Aesthetics, a judge that is no part of AudioScore: `pq` production quality, `pc` production complexity,
    `ce` content enjoyment and `cu` content usefulness, each (B,), on its raters' scale of 1 to 10. 8 s, padded to the
    10 s of its windows under its own mask."""

    sample_rate_hz, files = 16000, ("audiobox_aesthetics.pt",)
    axes = ("PQ", "PC", "CE", "CU")
    shape = ("proj_num_layer", "proj_ln", "proj_act_fn", "proj_dropout", "nth_layer", "use_weighted_layer_sum")
    shape += ("precision", "normalize_embed", "output_dim")

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with upstream("audiobox-aesthetics", "src"):
            from audiobox_aesthetics.model.aes import AesMultiOutput
        scale = dict_of(with_fields(mean=NUMBER, std=NUMBER))
        fields = dict(state_dict=dict_of(TENSOR), model_cfg=with_fields(**dict.fromkeys(self.shape, ANY)))
        state = load_pt(path, dict(fields, target_transform=scale), ignore=NUMPY)
        net = AesMultiOutput(**{key: state["model_cfg"][key] for key in self.shape})
        weights = {key.removeprefix("model."): value for key, value in state["state_dict"].items()}
        self.device, self.net = device, load_weights(net, weights, path, device)
        scales = [state["target_transform"][axis] for axis in self.axes]
        self.mean, self.std = (torch.tensor([float(scale[key]) for scale in scales]) for key in ("mean", "std"))

    def score_audio(self, waves, clips, sides):
        waves = judged(waves, 16000)[:, None]
        mask = torch.ones_like(waves, dtype=torch.bool)
        both = torch.stack([fit_length(waves, 160000), fit_length(mask, 160000)], dim=1)  # (B, 2, 1, 160000)

        def axes(x):
            found = self.net({"wav": x[:, 0], "mask": x[:, 1] > 0})
            return torch.stack([found[axis].float() for axis in self.axes], dim=1)

        scores = in_batches(axes, both, self.device) * self.std + self.mean
        return dict(zip(map(str.lower, self.axes), scores.unbind(dim=1)))


SCORERS = {
    "imagebind": ImageBindScorer,
    "clap": ClapScorer,
    "synchformer": SynchformerScorer,
    "panns": PannsScorer,
    "panns_16k": Panns16kScorer,
    "passt": PasstScorer,
    "pesq": PesqScorer,
    "audiobox": AudioboxScorer,
}

# What stage 07 makes of them: {metric: (how, scorer, key)}; `mean` over clips, or a formula over the set of audios.
MEASURES = {
    "fd_passt": ("fd", "passt", "embedding"),
    "kl_panns": ("kl", "panns_16k", "logits"),
    "kl_passt": ("kl", "passt", "logits"),
    "is": ("is", "panns_16k", "logits"),
    "ib": ("mean", "imagebind", "ib"),
    "clap": ("mean", "clap", "clap"),
    "desync_s": ("mean", "synchformer", "desync_s"),
    **{f"audiobox_{axis}": ("mean", "audiobox", axis) for axis in ("pq", "pc", "ce", "cu")},
}
JUDGES = ("audiobox",)  # scorers that stage 07 asks only when told to
AT_A_TIME = 1  # networks in memory
