"""The toy world's model and scorers (docs/toy.md): every stage runs on a CPU in minutes.

00_toy_world.py draws the world's clips and trains the networks. This file defines the networks and
offers them to the other stages through the same interfaces as MMAudio and the real scorers: a
codec, encoders of picture and caption, the velocity network, and scorers.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio

from common import SILENT_PEAK, FlowModel, Scorer, files, media, stop, weight_file

# The networks are so small that a second thread is worth it only in training (`Toy.velocity`),
# where no other work needs the cores. torch has one such number for the whole process.
TRAINING_THREADS = min(2, torch.get_num_threads())
torch.set_num_threads(1)

RATE_HZ = 16000
CLIP_S = 2.0
FPS = 25
SAMPLES = int(RATE_HZ * CLIP_S)
FRAMES = int(FPS * CLIP_S)
PIXELS = 64  # of a stored frame; moments are taken from 32 x 32, the resolution of yuv420p's colour

N_FFT = 1024
HOP = 320  # samples: a mel frame is 20 ms, two per video frame
MELS = 64
MEL_FRAMES = SAMPLES // HOP  # 100

PATCH = 4  # mel frames to a token of the latent
TOKENS = MEL_FRAMES // PATCH  # 25
CHANNELS = 40  # numbers of a token

MOMENTS = 10  # numbers that describe a picture
EMBED = 32  # width of all embeddings of picture and caption

# {label: caption} of each class of sound. The place of a class in this dict is its `kind`, 0 to 7.
# The object that makes the sound has outline kind // 2 and colour kind % 2 (00_toy_world.py draws
# it).
CAPTIONS = {
    "bell ringing": "a bell ringing",
    "wood block knocking": "knocking on a wood block",
    "snare drum": "a snare drum being hit",
    "water dripping": "water dripping into a sink",
    "synthesizer": "an electronic synthesizer bleep",
    "person speaking": "a person speaking single syllables",
    "bass drum": "the deep thump of a bass drum",
    "hi-hat": "a closed hi-hat ticking",
}
LABELS = list(CAPTIONS)
SPEECH = LABELS.index("person speaking")
OPENINGS = ("", "the sound of ", "we hear ", "close-up: ")  # of captions
VOCABULARY = sorted(set(" ".join([*CAPTIONS.values(), *OPENINGS]).split()))

OTHER_VERSION = "is of another version of 00_toy_world.py; make the run folder anew"


def load_parts(parts, state, path):
    """Loads the networks, {name: network}, from `state`, the content of stage 00's file `path`."""
    if state.get("vocabulary") != VOCABULARY:
        stop(f"{path}: {OTHER_VERSION}")
    for name, network in parts.items():
        files.load_weights(network, state.get(name), path, OTHER_VERSION)


# --------------------------------------------------------------------------------------------------
# Codec: log-mel, PCA of patches, Griffin-Lim
# --------------------------------------------------------------------------------------------------


@functools.cache
def mel_filters():
    """Mel filters (513, 64) and their pseudo-inverse (64, 513)."""
    bins = N_FFT // 2 + 1
    filters = torchaudio.functional.melscale_fbanks(bins, 30.0, RATE_HZ / 2, MELS, RATE_HZ)
    return filters, torch.linalg.pinv(filters)


def log_mel(waves):
    """(B, S) -> (B, 100, 64), about zero mean and unit standard deviation.

    Waves are cut or padded to 2 s; samples that are not finite count as silence.
    """
    waves = torch.nan_to_num(waves.float(), 0, 0, 0)
    waves = media.fit_length(waves, SAMPLES)
    padded = F.pad(waves, (N_FFT // 2, N_FFT // 2), "reflect")
    window = torch.hann_window(N_FFT)
    filters, _ = mel_filters()
    mels = []
    for part in padded.split(4):  # as many as fit into the CPU's cache
        frames = part.unfold(1, N_FFT, HOP)[:, :MEL_FRAMES]
        spectrum = torch.fft.rfft(frames * window)
        power = torch.view_as_real(spectrum).square().sum(-1)
        level = (power @ filters + 1e-4).log()
        mels.append((level + 2.5) / 4)
    return torch.cat(mels)


def magnitudes(mel):
    """The inverse of `log_mel` without phases: (B, 100, 64) -> magnitudes (B, 101, 513), a frame
    every 20 ms, the last at 2 s."""
    _, inverse_filters = mel_filters()
    level = 4 * mel.clamp(max=3.5) - 2.5
    power = (level.exp() - 1e-4).clamp(min=0) @ inverse_filters
    power = torch.cat([power, power[:, -1:]], dim=1)
    return power.clamp(min=0).sqrt()


def overlap_add(frames):
    """Adds up overlapping frames (B, F, 1024), one every 320 samples -> (B, (F - 1) * 320 +
    1024)."""
    length = (frames.shape[1] - 1) * HOP + N_FFT
    return F.fold(frames.mT, (1, length), (1, N_FFT), stride=(1, HOP)).flatten(1)


def griffin_lim(magnitude, steps=4, momentum=0.5):
    """(B, 101, 513) magnitudes -> (B, 32000), starting from zero phase.

    The same algorithm as torchaudio's, in less than half of its time, since it computes no angles
    and treats frames side by side. After 4 steps the oracle's measures are within 2 ms and 0.1 dB
    of those after 8.
    """
    window = torch.hann_window(N_FFT)
    windows = window.square().expand(1, magnitude.shape[1], N_FFT)
    envelope = overlap_add(windows).clamp(min=1e-3)

    def synthesise(spectrum):
        frames = torch.fft.irfft(spectrum, N_FFT)
        return overlap_add(frames * window) / envelope

    spectrum = magnitude + 0j
    previous = 0
    for _ in range(steps):
        frames = synthesise(spectrum).unfold(1, N_FFT, HOP)
        analysed = torch.fft.rfft(frames * window)
        hurried = analysed - momentum * previous
        previous = analysed
        power = torch.view_as_real(hurried).square().sum(-1)
        scale = magnitude * (power + 1e-12).rsqrt()
        spectrum = hurried * scale  # keeps the phase of `hurried`, takes the given magnitude
    wave = synthesise(spectrum)
    return wave[:, N_FFT // 2 :][:, :SAMPLES]


class Codec(nn.Module):
    """Waveform <-> latent (B, 25, 40) with unit standard deviation: PCA of log-mel patches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(PATCH * MELS))
        self.register_buffer("down", torch.zeros(PATCH * MELS, CHANNELS))
        self.register_buffer("up", torch.zeros(CHANNELS, PATCH * MELS))

    def encode(self, mel):
        """(B, 100, 64) -> (B, 25, 40)."""
        patches = mel.reshape(len(mel), TOKENS, PATCH * MELS)
        return (patches - self.mean) @ self.down

    def mel(self, latents):
        """Latents (B, 25, 40) -> log-mel (B, 100, 64)."""
        patches = latents @ self.up + self.mean
        return patches.reshape(len(latents), MEL_FRAMES, MELS)

    @torch.no_grad()
    def decode(self, latents):
        """(B, 25, 40) -> (B, 32000) on the CPU, by Griffin-Lim without randomness."""
        waves = []
        for part in latents.float().cpu().split(4):  # as many as fit into the CPU's cache
            waves.append(griffin_lim(magnitudes(self.mel(part))))
        return torch.cat(waves)


# --------------------------------------------------------------------------------------------------
# Frozen encoders of picture and caption
# --------------------------------------------------------------------------------------------------


def frame_transform(frame):
    """(3, H, W) uint8 of any size -> (64, 64, 3) uint8: the central square, averaged down."""
    _, height, width = frame.shape
    if (height, width) != (PIXELS, PIXELS):
        side = min(height, width)
        top = (height - side) // 2
        left = (width - side) // 2
        square = frame[:, top : top + side, left : left + side].float()
        frame = F.adaptive_avg_pool2d(square, PIXELS).round().to(torch.uint8)
    return frame.permute(1, 2, 0)


def picture_moments(frames):
    """(50, 64, 64, 3) uint8 -> (50, 10) float32: where the object is, and what it looks like.

    The object is what differs from the background, whose colour is the median. The ten numbers are
    its mass, place (2), extent (2), solidity, whether it is there, and colour (3), each scaled to
    about 1.
    """
    # Every second pixel and its diagonal neighbour, averaged: (50, 32, 32, 3) in [0, 1].
    frames = (frames[:, ::2, ::2].float() + frames[:, 1::2, 1::2]) / 510
    ground = frames.reshape(-1, 3)[::7].median(dim=0).values  # a seventh of the pixels is enough
    difference = frames - ground
    weight = (difference.abs().sum(-1) - 0.25).clamp(min=0)
    mass = weight.sum((1, 2))
    # The share of the object's mass that each pixel has, (50, 32, 32): time, y, x.
    share = weight / mass.clamp(min=1e-3)[:, None, None]
    grid = (torch.arange(PIXELS // 2) + 0.5) / (PIXELS // 2)

    def along(share):
        """For shares (50, 32) along an axis: their centre, their extent, and each pixel's squared
        distance from the centre."""
        centre = (share * grid).sum(-1)
        squares = (grid - centre[:, None]) ** 2
        return centre, (share * squares).sum(-1).sqrt(), squares

    centre_x, extent_x, squares_x = along(share.sum(1))
    centre_y, extent_y, squares_y = along(share.sum(2))
    squared_distance = squares_x[:, None, :] + squares_y[:, :, None]
    near_centre = torch.exp(-(squared_distance / 0.002))
    in_the_middle = (share * near_centre).sum((1, 2))  # little for a ring, which is hollow
    colour = (share[..., None] * difference).sum((1, 2))

    columns = [
        mass / 30,
        2 * centre_x - 1,
        2 * centre_y - 1,
        10 * extent_x,
        10 * extent_y,
        4 * in_the_middle,
        (mass > 0.5).float(),
    ]
    return torch.cat([torch.stack(columns, dim=1), 2 * colour], dim=1)


def words(caption):
    """Bag of words (V,) float32. Unknown words are dropped; without a caption it is all zeros."""
    said = (caption or "").lower().split()
    return torch.tensor([float(word in said) for word in VOCABULARY])


class VideoTower(nn.Module):
    """Moments (B, 50, 10) -> an embedding of the video (B, 32)."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(MOMENTS, EMBED, 5, padding=2)
        self.two = nn.Conv1d(EMBED, EMBED, 5, padding=2)
        self.pool = nn.Linear(2 * EMBED, EMBED)

    def both(self, moments):
        """Returns an embedding of every frame (B, 50, 32), and one of the video (B, 32)."""
        x = F.relu(self.one(moments.transpose(1, 2)))
        x = F.relu(self.two(x))
        per_frame = x.transpose(1, 2)
        pooled = torch.cat([x.mean(-1), x.amax(-1)], dim=-1)
        return per_frame, self.pool(pooled)

    def forward(self, moments):
        _, of_video = self.both(moments)
        return of_video


class VideoEncoder(nn.Module):
    """The base model's own frozen video encoder: moments (B, 50, 10) -> an embedding of every frame
    (B, 50, 32), and of the video (B, 32). Stage 00 trains it by two heads: `strike` marks the hits,
    `kind` names the class."""

    def __init__(self):
        super().__init__()
        self.tower = VideoTower()
        self.strike = nn.Linear(EMBED, 1)
        self.kind = nn.Linear(EMBED, len(LABELS))

    def forward(self, moments):
        return self.tower.both(moments)


# --------------------------------------------------------------------------------------------------
# The velocity network: a small diffusion transformer
# --------------------------------------------------------------------------------------------------


def zero_linear(inputs, outputs):
    """A linear layer that starts with zero weights, so that it adds nothing before training."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Attention and an MLP, both scaled, shifted and gated by the condition c."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.modulation = zero_linear(width, 6 * width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        # A bias of the keys has a true gradient of 0, and Adam would amplify its rounding errors.
        self.key = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width),
            nn.GELU(),
            nn.Linear(3 * width, width),
        )

    def split_heads(self, x):
        """(B, T, width) -> (B, heads, T, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, c):
        """x: (B, T, width); c: (B, width) -> (B, T, width)."""
        modulation = self.modulation(F.silu(c))[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)

        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a
        q = self.split_heads(self.query(y))
        k = self.split_heads(self.key(y))
        v = self.split_heads(self.value(y))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_a * self.out(attended)

        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(y)


class ToyNet(nn.Module):
    """u(a_t, t, video, text) in the paper's convention: t = 1 is noise, the target is eps - a_0.

    a_t: (B, 25, 40); frames: (B, 25, 64), two video frames to a token; pooled: (B, 32);
    text: (B, V).
    """

    def __init__(self, width=96, depth=3, heads=4):
        super().__init__()
        self.latent_in = nn.Linear(CHANNELS, width)
        self.frames_in = nn.Linear(2 * EMBED, width)
        self.pooled_in = nn.Linear(EMBED, width)
        self.text_in = nn.Linear(len(VOCABULARY), width)
        self.place = nn.Parameter(0.02 * torch.randn(1, TOKENS, width))
        self.null_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.null_vector = nn.Parameter(torch.zeros(1, width))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.last = zero_linear(width, 2 * width)
        self.out = zero_linear(width, CHANNELS)
        frequencies = 1000 * torch.exp(-math.log(1e4) * torch.arange(32) / 32)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def condition(self, frames, pooled, text):
        """Returns `tokens` (B, 25, width), one for each token of the latent, and `vector`
        (B, width)."""
        return {
            "tokens": self.frames_in(frames),
            "vector": self.pooled_in(pooled) + self.text_in(text),
        }

    def null(self, conditions):
        """The unconditional counterpart of `conditions`, with as many rows."""
        return {
            "tokens": self.null_tokens.expand_as(conditions["tokens"]),
            "vector": self.null_vector.expand_as(conditions["vector"]),
        }

    def forward(self, a_t, t, conditions):
        phase = t.float()[:, None] * self.frequencies
        time = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        c = time + conditions["vector"]
        x = self.latent_in(a_t) + conditions["tokens"] + self.place
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.last(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.out(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


class Toy(FlowModel):
    """The pre-trained toy model: `net` is trainable, encoder and codec are frozen.

    Its network already uses the paper's time and sign.
    """

    sample_rate_hz = RATE_HZ
    clip_s = CLIP_S
    latent_shape = (TOKENS, CHANNELS)
    feature_shapes = {
        "frames": (TOKENS, 2 * EMBED),
        "pooled": (EMBED,),
        "text": (len(VOCABULARY),),
    }
    reads_video = True
    compiles = False  # the network is so small that compiling takes longer than it saves

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        if variant:
            stop(f"--model toy:{variant}: the toy model has no variants; give --model toy")
        if checkpoint is None:
            advice = "give --checkpoint runs/toy/00_base.pt, which stage 00 writes"
            stop(f"--model toy: needs its weights; {advice}")
        self.checkpoint = Path(checkpoint)
        state = files.load_pt(checkpoint)
        if not isinstance(state, dict) or state.get("kind") != "toy base":
            advice = "give the 00_base.pt that 00_toy_world.py writes"
            stop(f"{checkpoint}: is not a toy base model; {advice}")
        # Stage 01 takes over these files' content for the later stages.
        for name in ("00_scorers.pt", "run.json"):
            if not self.checkpoint.with_name(name).is_file():
                stop(f"--checkpoint {checkpoint}: {name} of stage 00 must lie beside it")

        self.net = ToyNet()
        # In a dict they are no submodules: training and saving do not touch them. A copy of the
        # model copies them too, which costs nothing at this size.
        self.frozen = {"encoder": VideoEncoder(), "codec": Codec()}
        load_parts(self.frozen, state, checkpoint)
        # finite=False: a network that a training has broken may be evaluated; its audio is counted
        # as broken.
        files.load_weights(self.net, state.get("net"), checkpoint, OTHER_VERSION, finite=False)
        self.net.null_tokens.requires_grad_(False)
        self.net.null_vector.requires_grad_(False)

    def read(self, clip, others=()):
        """Moments (50, 10), then the frames that `others` ask for."""
        wanted = [(FPS, frame_transform), *others]
        frames, *for_others = media.read_frames(clip.path, wanted, CLIP_S)
        return [picture_moments(frames), *for_others]

    @torch.no_grad()
    def encode(self, clip, tensors):
        moments = tensors[0]
        per_frame, pooled = self.frozen["encoder"](moments[None])
        return {
            "frames": per_frame.reshape(TOKENS, 2 * EMBED),
            "pooled": pooled[0],
            "text": words(clip.caption),
        }

    def project(self, features):
        moved = {name: value.to(self.device) for name, value in features.items()}
        return self.net.condition(**moved)

    def null_conditions(self, conditions):
        return self.net.null(conditions)

    def velocity(self, *given):
        torch.set_num_threads(TRAINING_THREADS if torch.is_grad_enabled() else 1)
        return super().velocity(*given)

    def predict(self, a_t, t, conditions):
        return self.net(a_t, t, conditions)

    def decode(self, latents):
        return self.frozen["codec"].decode(latents)

    @torch.no_grad()
    def encode_audio(self, waves):
        return self.frozen["codec"].encode(log_mel(waves))

    def blocks(self):
        return self.net.blocks

    def policy_state(self):
        return {key: value.cpu().clone() for key, value in self.net.state_dict().items()}

    def load_policy(self, path):
        """path: policy.pt, a bare state dict of ToyNet."""
        advice = "give the policy.pt of a run whose --model is toy"
        otherwise = f"is not a policy of the toy model; {advice}"
        files.load_weights(self.net, files.load_pt(path), path, otherwise, finite=False)


ADAPTER = Toy


# --------------------------------------------------------------------------------------------------
# Networks of the scorers
# --------------------------------------------------------------------------------------------------


class AudioTower(nn.Module):
    """log-mel (B, 100, 64) -> (B, out), and before that an embedding (B, 64)."""

    def __init__(self, out, width=64):
        super().__init__()
        self.one = nn.Conv1d(MELS, width, 5, stride=2, padding=2)
        self.two = nn.Conv1d(width, width, 5, padding=2)
        self.three = nn.Conv1d(width, width, 5, padding=2)
        self.mix = nn.Linear(3 * width, 64)
        self.head = nn.Linear(64, out)

    def embedding(self, mel):
        x = F.relu(self.one(mel.transpose(1, 2)))
        x = F.relu(self.two(x))
        x = F.relu(self.three(x))
        # The minimum over time reacts to constant noise, but not to reverberant tails.
        pooled = torch.cat([x.mean(-1), x.amax(-1), x.amin(-1)], dim=-1)
        return self.mix(pooled)

    def classify(self, embedding):
        return self.head(F.relu(embedding))

    def forward(self, mel):
        return self.classify(self.embedding(mel))


class Match(nn.Module):
    """Two towers, one for sound and one for video or caption, whose embeddings are compared by
    their cosine."""

    def __init__(self, other):
        super().__init__()
        self.sound = AudioTower(EMBED)
        self.other = other


def channels(width, stride):
    """(B, width, T) -> eight channels (B, 8, T / stride)."""
    return nn.Sequential(
        nn.Conv1d(width, 32, 5, stride=stride, padding=2),
        nn.ReLU(),
        nn.Conv1d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.Conv1d(32, 8, 1),
    )


class SyncNet(nn.Module):
    """The offset of sound against picture: a softmax over the correlation of eight learned channels
    at 21 lags of 40 ms.
    """

    LAGS = 10  # video frames, to either side

    def __init__(self):
        super().__init__()
        self.sound = channels(MELS, stride=2)
        self.sight = channels(MOMENTS, stride=1)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def embed_picture(self, moments):
        """(B, 50, 10) -> (B, 8, 50) with unit norm."""
        return F.normalize(self.sight(moments.transpose(1, 2)), dim=(1, 2))

    def forward(self, mel, picture):
        """mel: (B, 100, 64); picture: (B, 8, 50) -> logits of the lag (B, 21), from -10 to 10 video
        frames; positive when the sound comes late."""
        sound = F.normalize(self.sound(mel.transpose(1, 2)), dim=(1, 2))
        padded = F.pad(sound, (self.LAGS, self.LAGS))
        # (B, 8, 21, 50): at [lag + 10, t] the sound of frame t + lag
        shifted = padded.unfold(2, FRAMES, 1)
        return self.scale * (shifted * picture[:, :, None]).sum((1, 3))

    def desync_s(self, logits):
        """E|offset| in seconds, (B,)."""
        offset_s = torch.arange(-self.LAGS, self.LAGS + 1).abs() / FPS
        return logits.softmax(-1) @ offset_s


def scorer_networks():
    """The four learned scorers, untrained, in the order in which stage 00 draws them."""
    return {
        "imagebind": Match(VideoTower()),
        "clap": Match(
            nn.Sequential(nn.Linear(len(VOCABULARY), EMBED), nn.ReLU(), nn.Linear(EMBED, EMBED))
        ),
        "synchformer": SyncNet(),
        "panns": AudioTower(len(LABELS)),
    }


# --------------------------------------------------------------------------------------------------
# Scorers
# --------------------------------------------------------------------------------------------------


class ToyScorer(Scorer):
    """One scorer for all five scores of AudioScore and for most metrics of stage 07: its networks
    are so small that they are all run at once.

    ib: cosine of video and sound; clap: cosine of caption and sound, nan without a caption;
    desync_s: expected |offset| of sound against picture in seconds; logits (B, 8) and embedding
    (B, 64) of the tagger, for score_4 and for FD, KL, IS; pesq: by the real package.
    """

    sample_rate_hz = RATE_HZ
    files = ("00_scorers.pt",)
    reads = ("caption", "video", "reference")
    compared = ("pesq",)
    frames = (FPS, frame_transform)
    video_shapes = {"ib": (EMBED,), "sync": (8, FRAMES)}

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        state = files.load_pt(path, {"kind": str, "vocabulary": list})
        self.networks = scorer_networks()
        self.codec = Codec()
        load_parts(self.networks | {"codec": self.codec}, state, path)

    def embed_video(self, frames):
        moments = picture_moments(frames)[None]
        return {
            "ib": self.networks["imagebind"].other(moments)[0],
            "sync": self.networks["synchformer"].embed_picture(moments)[0],
        }

    def score(self, waves, clips, videos):
        imagebind = self.networks["imagebind"]
        clap = self.networks["clap"]
        synchformer = self.networks["synchformer"]
        panns = self.networks["panns"]
        mel = log_mel(waves)
        embedding = panns.embedding(mel)
        captions = torch.full((len(clips), EMBED), math.nan)
        for row, clip in enumerate(clips):
            if clip.caption is not None:
                captions[row] = clap.other(words(clip.caption)[None])[0]
        references = {}
        for clip in clips:
            if clip.id not in references:  # the audios of a clip share one
                references[clip.id] = self.reference(clip)
        return {
            "ib": F.cosine_similarity(imagebind.sound(mel), videos["ib"]),
            "clap": F.cosine_similarity(clap.sound(mel), captions),
            "desync_s": synchformer.desync_s(synchformer(mel, videos["sync"])),
            "logits": panns.classify(embedding),
            "embedding": embedding,
            "pesq": media.pesq_scores([references[clip.id] for clip in clips], waves, self.workers),
        }

    def reference(self, clip):
        """The clip's own sound, (32000,); None where PESQ does not apply: the clip is not of speech
        or has no sound.

        The sound goes through the codec. Compared with the original, Griffin-Lim's phases alone
        would lower PESQ so much that it would react to nothing else.
        """
        if clip.label != LABELS[SPEECH]:
            return None
        wave = media.clip_sound(clip.path, RATE_HZ, CLIP_S)
        if wave is None:
            return None
        latents = self.codec.encode(log_mel(wave[None]))
        sound = self.codec.decode(latents)[0]
        return None if sound.abs().max() <= SILENT_PEAK else sound


class TwinScorer(Scorer):
    """The tagger's twin: the same network, trained on other clips. Like PaSST in the paper, it is
    no part of AudioScore. `logits` (B, 8) and `embedding` (B, 64)."""

    sample_rate_hz = RATE_HZ
    files = ("00_twin.pt",)

    def __init__(self, weights, device):
        path = weight_file(weights, self.files[0])
        state = files.load_pt(path, {"tagger": dict})
        self.tagger = AudioTower(len(LABELS))
        files.load_weights(self.tagger, state["tagger"], path, OTHER_VERSION)

    def score(self, waves, clips, videos):
        embedding = self.tagger.embedding(log_mel(waves))
        return {"logits": self.tagger.classify(embedding), "embedding": embedding}


SCORERS = {"toy": ToyScorer, "twin": TwinScorer}

# Where AudioScore's five scores come from: {name: (scorer, tensor)}.
AUDIOSCORE = {
    "ib": ("toy", "ib"),
    "clap": ("toy", "clap"),
    "desync_s": ("toy", "desync_s"),
    "tag_logits": ("toy", "logits"),
    "pesq": ("toy", "pesq"),
}

# The metrics of stage 07: {metric: (how, scorer, tensor)}. How is `mean` over clips, or the name of
# a formula over all audios.
MEASURES = {
    "fd": ("fd", "toy", "embedding"),
    "kl": ("kl", "toy", "logits"),
    "is": ("is", "toy", "logits"),
    "fd_twin": ("fd", "twin", "embedding"),
    "is_twin": ("is", "twin", "logits"),
    "ib": ("mean", "toy", "ib"),
    "clap": ("mean", "toy", "clap"),
    "desync_s": ("mean", "toy", "desync_s"),
}
