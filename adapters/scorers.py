"""The real scorers: AudioScore's five, and the networks behind FD, KL and IS (docs/adapters.md).

All numbers are computed as in av-benchmark (github.com/hkchengrex/av-benchmark), the code behind
the metrics of MMAudio, which the paper uses: "the same metrics in [8]" (Sec. 3.1). Every network
scores the first 8 s of an audio file. Samples that are not finite count as silence, so that a
silent or broken audio gets ordinary finite scores and raises no error.
"""

import contextlib
import functools
import importlib.util
import io
import math
import sys
import types
import warnings

import torch
import torch.nn.functional as F
import torchaudio
from torchvision.transforms import InterpolationMode, v2

from common import HUMAN_SPEECH_CLASSES, Scorer, files, media, stop, upstream, weight_file

# The length that upstream's networks are used with: Synchformer sees 24 segments, ImageBind 4
# frames.
SCORED_S = 8.0


def scored_part(waves, sample_rate_hz, centred=False):
    """(B, S) waves -> (B, 8 s), cut or padded with silence; `centred` first subtracts the mean of
    the whole wave, as av-benchmark's loader does for CLAP, PANNs and PaSST."""
    # Resampling may overshoot 1; a float file from elsewhere may hold 1e30, which would overflow.
    waves = torch.nan_to_num(waves.float(), 0, 0, 0).clamp(-2, 2)
    if centred:
        waves = waves - waves.mean(dim=-1, keepdim=True)
    return media.fit_length(waves, round(SCORED_S * sample_rate_hz))


def in_batches(network, device, *tensors, size=16):
    """network(*tensors), computed on the device for a few rows at a time; float32 on the CPU."""
    found = []
    for parts in zip(*[tensor.split(size) for tensor in tensors]):
        found.append(network(*[part.to(device) for part in parts]).float().cpu())
    return torch.cat(found)


@contextlib.contextmanager
def without_init(package):
    """In this context, modules of a package are imported without its __init__.py. Those of
    panns_inference and laion_clap download files, and that of imagebind imports packages which its
    networks do not need."""
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


def frozen(net, state, path, device, **options):
    """The network with these weights, in eval mode, on the device; stops in one line where the file
    is another network's."""
    other = f"not the weights of {type(net).__name__}; download it again"
    files.load_weights(net, state, path, other, finite=False, **options)
    return net.to(device).eval().requires_grad_(False)


class ImageBindScorer(Scorer):
    """score_1, `ib`: cosine of ImageBind's video and audio embeddings, in [-1, 1].

    Video: 4 frames (0.5 a second), 3 pairs of neighbours, 3 crops of each along the longer side.
    Audio: windows of 2 s at 0, 3 and 6 s (av-benchmark spreads them over the whole file if it
    exceeds 8 s). ImageBind itself averages the unit embeddings of the 9 crops and of the 3 windows.
    We take this average for that of Sec. 2.1's "average cosine similarity", as av-benchmark does.
    """

    sample_rate_hz = 16000
    files = ("imagebind_huge.pth",)
    reads = ("video",)
    video_shapes = {"embedding": (1024,)}

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with upstream("ImageBind"), without_init("imagebind"):
            from imagebind.models import imagebind_model
        # The file of 4.8 GB is memory-mapped, not copied. 2 GB of it, for text and other
        # modalities, are dropped.
        net = imagebind_model.imagebind_huge(pretrained=False)
        net = frozen(net, files.load_pt(path, mmap=True), path, "cpu", assign=True)
        for name in ("preprocessors", "trunks", "heads", "postprocessors"):
            parts = getattr(net, f"modality_{name}")
            for modality in set(parts) - {"vision", "audio"}:
                del parts[modality]
        self.device = device
        self.net = net.to(device)
        resize = v2.Resize(224, interpolation=InterpolationMode.BICUBIC)
        scale = v2.ToDtype(torch.float32, scale=True)
        normalize = v2.Normalize(
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        )
        self.frames = (0.5, v2.Compose([resize, scale, normalize]))

    @staticmethod
    def crops(frames):
        """(4, 3, H, W), shorter side 224 -> (9, 3, 2, 224, 224): 3 pairs of frames, 3 crops of
        each."""
        height, width = frames.shape[-2:]
        squares = []
        for share in (0, 0.5, 1):
            top = math.ceil(share * (height - 224))
            left = math.ceil(share * (width - 224))
            squares.append(frames[..., top : top + 224, left : left + 224])
        pairs = []
        for i in range(3):
            for square in squares:
                pairs.append(square[i : i + 2])
        return torch.stack(pairs).transpose(1, 2)

    def embed_video(self, frames):
        """frames: (4, 3, H, W)."""
        crops = self.crops(frames).to(self.device)
        embedding = self.net({"vision": crops[None]})["vision"][0]
        return {"embedding": embedding.cpu()}

    @staticmethod
    def spectrograms(windows):
        """(B, 3, 32000) -> (B, 3, 1, 128, 204): Kaldi's log mel filter bank, padded with 0, then
        normalised."""
        # One call for all windows, laid end to end. A frame of 400 samples begins every 160
        # samples, so 200 begin in each window; the last two reach into the next window and are
        # dropped.
        line = (windows - windows.mean(dim=-1, keepdim=True)).reshape(1, -1)
        fbank = torchaudio.compliance.kaldi.fbank(
            line, sample_frequency=16000, num_mel_bins=128, frame_length=25, frame_shift=10,
            window_type="hanning", htk_compat=True, use_energy=False, dither=0.0,
        )  # fmt: skip
        fbank = F.pad(fbank, (0, 0, 0, 2)).view(*windows.shape[:2], 200, 128)[:, :, :198]
        return (media.fit_length(fbank.transpose(2, 3), 204)[:, :, None] + 4.268) / 9.138

    def embed_audio(self, windows):
        """(B, 3, 32000) -> (B, 1024)."""
        return self.net({"audio": self.spectrograms(windows)})["audio"]

    def score(self, waves, clips, videos):
        windows = scored_part(waves, 16000).unfold(-1, 32000, 48000)  # (B, 3, 32000)
        audio = in_batches(self.embed_audio, self.device, windows)
        return {"ib": F.cosine_similarity(videos["embedding"], audio, dim=-1)}


class ClapScorer(Scorer):
    """score_2, `clap`: cosine of LAION-CLAP's caption and audio embeddings, in [-1, 1]; nan without
    a caption. Differs from the paper, whose CLAP [10] is Microsoft's; av-benchmark reports both.

    The network is laion_clap's own, but built and loaded here: the package would download three
    tokenizers when it is imported and RoBERTa's weights when the network is built, and its
    load_ckpt unpickles, which could run code.
    """

    sample_rate_hz = 48000
    reads = ("caption",)
    files = (
        "music_speech_audioset_epoch_15_esc_89.98.pt",
        "roberta-base/vocab.json",
        "roberta-base/merges.txt",
    )
    roberta = dict(  # roberta-base
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )

    def __init__(self, weights, device):
        from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

        path, vocab, merges = (weight_file(weights, name) for name in self.files)
        tokens = len(files.parse_json(files.read_text(vocab), vocab))
        # With too few tokens every caption would silently get the same ids.
        if tokens != self.roberta["vocab_size"]:
            stop(
                f"{vocab}: {tokens} tokens instead of {self.roberta['vocab_size']}; download it "
                "again"
            )
        self.tokenizer = RobertaTokenizer(str(vocab), str(merges))
        with without_init("laion_clap"):
            from laion_clap.clap_module import factory, model
        # The constructor would download 500 MB of RoBERTa's weights, which the checkpoint replaces.
        empty = RobertaModel(RobertaConfig(**self.roberta))
        model.RobertaModel = types.SimpleNamespace(from_pretrained=lambda name: empty)
        try:
            net, _ = factory.create_model(
                "HTSAT-base", "roberta", device="cpu", enable_fusion=False
            )
        finally:
            model.RobertaModel = RobertaModel
        content = files.load_pt(path, {"state_dict": dict}, ignore=files.NUMPY)
        state = {key.removeprefix("module."): x for key, x in content["state_dict"].items()}
        # A constant that newer versions of transformers do not store.
        state.pop("text_branch.embeddings.position_ids", None)
        self.device = device
        self.net = frozen(net, state, path, device)

    @functools.lru_cache(maxsize=512)  # noqa: B019, a clip's audios follow each other
    def embed_caption(self, caption):
        """(512,)"""
        length = {"padding": "max_length", "truncation": True, "max_length": 77}
        tokens = self.tokenizer([caption], return_tensors="pt", **length)
        return self.net.get_text_embedding(dict(tokens))[0].cpu()

    def embed_audio(self, waves):
        """(B, 480000) -> (B, 512)."""
        return self.net.get_audio_embedding([{"waveform": wave} for wave in waves])

    def score(self, waves, clips, videos):
        score = torch.full((len(waves),), math.nan)
        captioned = [i for i, clip in enumerate(clips) if clip.caption]
        if captioned:
            waves = scored_part(waves[captioned], 48000, centred=True)
            waves = media.fit_length(waves, 480000)  # 10 s, as laion_clap pads
            audio = in_batches(self.embed_audio, self.device, waves)
            captions = torch.stack([self.embed_caption(clips[i].caption) for i in captioned])
            score[captioned] = F.cosine_similarity(captions, audio, dim=-1)
        return {"clap": score}


class SynchformerScorer(Scorer):
    """score_3, `desync_s`: the |audio-video offset| in seconds that Synchformer predicts, in
    [0, 2], lower is better; the mean of two predictions, for the first and for the last 4.8 s. A
    prediction is the most probable of 21 classes, from -2 to 2 s in steps of 0.2 s."""

    sample_rate_hz = 16000
    files = ("synchformer_state_dict.pth",)
    reads = ("video",)
    video_shapes = {"segments": (24, 8, 768)}

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with upstream("av-benchmark"):
            from av_bench.synchformer.synchformer import Synchformer, make_class_grid
        self.device = device
        self.net = frozen(Synchformer(), files.load_pt(path), path, device)
        self.offset_s = make_class_grid(-2, 2, 21)
        mel = torchaudio.transforms.MelSpectrogram(
            16000, n_fft=1024, win_length=400, hop_length=160, n_mels=128
        )
        self.mel = mel.to(device)
        resize = v2.Resize(224, InterpolationMode.BICUBIC)
        self.frames = (25, v2.Compose([resize, v2.CenterCrop(224)]))
        # Applied on the device, since copying uint8 takes a quarter of the bytes.
        scale = v2.ToDtype(torch.float32, scale=True)
        self.to_float = v2.Compose([scale, v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True)])

    def embed_video(self, frames):
        """frames: (200, 3, 224, 224); 24 segments of 16 frames (0.64 s), every 8 frames."""
        frames = self.to_float(frames.to(self.device))
        segments = torch.stack([frames[i : i + 16] for i in range(0, 185, 8)])[:, None]
        embeddings = in_batches(self.net.extract_vfeats, self.device, segments, size=8)
        return {"segments": embeddings[:, 0]}  # (24, 8, 768)

    def embed_audio(self, segments):
        """(B, 24, 10240) -> (B, 24, 6, 768)."""
        mels = torch.log(self.mel(segments) + 1e-6)
        mels = media.fit_length(mels, 66)  # padded with 0 after the log, as upstream
        mels = (mels + 4.2677393) / (2 * 4.5689974)
        return self.net.extract_afeats(mels[:, :, None])  # (B, 24, 1, 128, 66)

    def score(self, waves, clips, videos):
        video = videos["segments"]  # (B, 24, 8, 768)
        segments = scored_part(waves, 16000).unfold(-1, 10240, 5120)  # (B, 24, 10240)
        audio = in_batches(self.embed_audio, self.device, segments)
        offsets = []
        for part in (slice(0, 14), slice(-14, None)):  # the network compares exactly 14 segments
            compare = self.net.compare_v_a
            logits = in_batches(compare, self.device, video[:, part], audio[:, part])  # (B, 21)
            offsets.append(self.offset_s[logits.argmax(dim=-1)].abs())
        unseen = video.flatten(1).isnan().any(dim=1)  # for these argmax would still give an offset
        desync_s = torch.stack(offsets).mean(dim=0)
        return {"desync_s": desync_s.masked_fill(unseen, math.nan)}


class PannsScorer(Scorer):
    """The tagger of score_4, PANNs' Cnn14 at 32 kHz: `logits` (B, 527) over AudioSet's classes,
    before the sigmoid. Paper silent: which of PANNs' taggers. This is the default of
    panns-inference. Stage 07's IS and KL_PANNs use the one at 16 kHz, as av-benchmark does."""

    sample_rate_hz = 32000
    files = ("Cnn14_mAP=0.431.pth",)
    stft = dict(window_size=1024, hop_size=320, fmin=50, fmax=14000)

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with without_init("panns_inference"):
            from panns_inference.models import Cnn14
        state = files.load_pt(path, {"model": dict}, ignore=files.NUMPY)["model"]
        net = Cnn14(sample_rate=self.sample_rate_hz, mel_bins=64, classes_num=527, **self.stft)
        self.device = device
        self.net = frozen(net, state, path, device)

    def tag(self, waves):
        return self.net.fc_audioset(self.net(waves)["embedding"])

    def score(self, waves, clips, videos):
        waves = scored_part(waves, self.sample_rate_hz, centred=True)
        return {"logits": in_batches(self.tag, self.device, waves)}


class Panns16kScorer(PannsScorer):
    """The tagger of stage 07's KL_PANNs and IS: Cnn14 at 16 kHz, as in av-benchmark."""

    sample_rate_hz = 16000
    files = ("Cnn14_16k_mAP=0.438.pth",)
    stft = dict(window_size=512, hop_size=160, fmin=50, fmax=8000)


class PasstScorer(Scorer):
    """`logits` (B, 527) and `embedding` (B, 768) of PaSST at 32 kHz, for FD_PaSST and KL_PaSST. It
    gets 8 s of audio, padded to 10 s."""

    sample_rate_hz = 32000
    files = ("passt-s-f128-p16-s10-ap.476-swa.pt",)

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        from hear21passt.models.passt import get_model
        from hear21passt.models.preprocess import AugmentMelSTFT

        with self.quiet():
            net = get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False)
            mel = AugmentMelSTFT(freqm=48, timem=192, fmin_aug_range=10, fmax_aug_range=2000)
        self.mel = mel.to(device).eval()
        self.device = device
        self.net = frozen(net, files.load_pt(path), path, device)

    @staticmethod
    @contextlib.contextmanager
    def quiet():
        """hear21passt prints shapes, and warns that it gets 998 frames instead of 1000."""
        silent = contextlib.redirect_stdout(io.StringIO())
        with silent, warnings.catch_warnings(action="ignore"):
            yield

    def tag(self, waves):
        """(B, 320000) -> (B, 527 + 768), logits, then embedding."""
        mels = self.mel(waves)
        return torch.cat(self.net(mels[:, None]), dim=1)

    def score(self, waves, clips, videos):
        waves = media.fit_length(scored_part(waves, 32000, centred=True), 320000)
        with self.quiet():
            found = in_batches(self.tag, self.device, waves)
        return {"logits": found[:, :527], "embedding": found[:, 527:]}


class PesqScorer(Scorer):
    """score_5, `pesq`: wide-band PESQ at 16 kHz against the clip's own audio, both cut to the
    shorter one, at most 8 s. nan where it does not apply: the clip's class is not human speech, it
    has no audio track, or PESQ finds no utterance in it."""

    sample_rate_hz = 16000
    reads = ("reference",)
    compared = ("pesq",)

    def reference(self, clip):
        return self.sound_of(clip.path) if clip.label in HUMAN_SPEECH_CLASSES else None

    @functools.lru_cache(maxsize=64)  # noqa: B019, a clip's audios follow each other
    def sound_of(self, path):
        return media.clip_sound(path, 16000, SCORED_S, pad=False)

    def score(self, waves, clips, videos):
        references = [self.reference(clip) for clip in clips]
        return {"pesq": media.pesq_scores(references, waves, self.workers)}


class AudioboxScorer(Scorer):
    """AudioBox-Aesthetics, a judge that is no part of AudioScore: `pq` production quality, `pc`
    production complexity, `ce` content enjoyment and `cu` content usefulness, each (B,), on the
    scale of its raters, 1 to 10. It gets 8 s of audio, padded to its windows of 10 s, and a mask
    for the padding."""

    sample_rate_hz = 16000
    files = ("audiobox_aesthetics.pt",)
    axes = ("PQ", "PC", "CE", "CU")
    shape = ["proj_num_layer", "proj_ln", "proj_act_fn", "proj_dropout", "nth_layer"]
    shape += ["use_weighted_layer_sum", "precision", "normalize_embed", "output_dim"]

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        with upstream("audiobox-aesthetics", "src"):
            from audiobox_aesthetics.model.aes import AesMultiOutput
        fields = {"state_dict": dict, "model_cfg": dict, "target_transform": dict}
        content = files.load_pt(path, fields, ignore=files.NUMPY)
        state = {key.removeprefix("model."): value for key, value in content["state_dict"].items()}
        try:
            net = AesMultiOutput(**{key: content["model_cfg"][key] for key in self.shape})
            scales = [content["target_transform"][axis] for axis in self.axes]
            self.mean = torch.tensor([float(scale["mean"]) for scale in scales])
            self.std = torch.tensor([float(scale["std"]) for scale in scales])
        except (KeyError, TypeError, ValueError) as error:
            stop(f"{path}: not audiobox-aesthetics' checkpoint ({error!r:.80}); download it again")
        self.device = device
        self.net = frozen(net, state, path, device)

    def standardised(self, waves, mask):
        """waves, mask: (B, 1, 160000); the mask is 1 where there is audio and 0 in the padding.
        Returns (B, 4), the four axes as the network was trained on them: standardised."""
        found = self.net({"wav": waves, "mask": mask > 0})
        return torch.stack([found[axis].float() for axis in self.axes], dim=1)

    def score(self, waves, clips, videos):
        waves = scored_part(waves, 16000)[:, None]
        mask = media.fit_length(torch.ones_like(waves), 160000)
        waves = media.fit_length(waves, 160000)
        scores = in_batches(self.standardised, self.device, waves, mask) * self.std + self.mean
        return {axis.lower(): scores[:, i] for i, axis in enumerate(self.axes)}


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

# The metrics of stage 07: {metric: (how, scorer, tensor)}. How is `mean` over clips, or the name of
# a formula over all audios.
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

# Where AudioScore's five scores come from: {name: (scorer, tensor)}.
AUDIOSCORE = {
    "ib": ("imagebind", "ib"),
    "clap": ("clap", "clap"),
    "desync_s": ("synchformer", "desync_s"),
    "tag_logits": ("panns", "logits"),
    "pesq": ("pesq", "pesq"),
}
