"""Builds the toy world: a small audio-visual world with a flow model, scorers and raters, all trained here.

Stands in for what the paper takes from elsewhere: VGGSound (Sec. 2.1), a pre-trained V2A model (Sec. 3.1), the frozen
scorers of AudioScore and the human raters. It plays the part of an upstream repository that happens to ship with this
one: `common` loads it late, as it loads the package of a real backbone, and no stage imports it.

Run:   python 00_toy_world.py
       python 00_toy_world.py --run-dir runs/small --size tiny       (seconds; for the tests)
Takes: 77 s on 2 cores in two processes, no GPU. Tiny: about 20 s in one.
Writes, in --run-dir:
  run.json         model "toy", checkpoint, its digest, size, world_seed, rater_noise, scorers, video_root, clip_s
                   (seconds), and `defaults`: this world's replacements for the paper's numbers, by stage
  clips.jsonl      id, video, caption (or null), label, split (train, val, test)
  00_truth.jsonl   id, class, hits_s (seconds), wet (amplitude): read only by the simulated people and the oracle
  00_base.pt       net (the velocity network), encoder, codec, vocabulary
  00_scorers.pt    imagebind, clap, synchformer, panns (state dicts), codec, vocabulary
  00_oracle.pt     the oracle's classifier; read only by simulated_ratings, simulated_choices and oracle_scores
  00_judge.pt      the second judge's: mean of each class and precision; read only by oracle_scores
  00_videos/*.mp4  64 x 64, 25 frames per second, 2 s, H.264 (yuv420p) and AAC
  00_settings.json what the folder was made with

The world (docs/toy.md). An object bounces; every time it touches the ground it sounds. Outline and colour together
decide which of eight sounds: a model must look (semantic match), and at the right moment (synchrony). All randomness of
a clip comes from (seed, corpus, index). The pre-training data are imperfect: a tenth of their sounds belongs to another
class, a third comes too early or too late, a third is noisy. A model that fits them makes the same errors, at random,
in its own samples; a preference can tell. Some clips are reverberant, the hidden axis: the simulated raters like that,
no scorer is meant to hear it, so only the pairs chosen by people carry it (Sec. 2.2).

Two measure against the truth. The oracle's classifier is trained on clips that no scorer saw, but the simulated people
answer by its measures: what learns from them learns from it. The judge is for stage 07 alone: another kind of
classifier, other measures, clips of its own. All pictures go through one encoder and one reader.
"""

import functools
import math
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

import common

# Networks so small that a second thread pays in training alone, where no other work is waiting for the cores.
THREADS = min(2, torch.get_num_threads())
torch.set_num_threads(1)
RATE_HZ, CLIP_S, FPS = 16000, 2.0, 25
SAMPLES, FRAMES = int(RATE_HZ * CLIP_S), int(FPS * CLIP_S)
PIXELS = 64  # on file; the moments are taken at half of it, where yuv420p has kept all colour
N_FFT, HOP, MELS = 1024, 320, 64  # a mel frame is 20 ms, two per video frame
MEL_FRAMES, PATCH, TOKENS, CHANNELS = 100, 4, 25, 40  # latent: 25 tokens of 4 mel frames, 40 numbers each
MOMENTS, EMBED = 10, 32

# label, words of the caption; class k has outline k // 2 (disc, ring, wide bar, tall bar), warm or cool by k % 2.
CLASSES = (
    ("bell ringing", "a bell ringing"), ("wood block knocking", "knocking on a wood block"),
    ("snare drum", "a snare drum being hit"), ("water dripping", "water dripping into a sink"),
    ("synthesizer", "an electronic synthesizer bleep"), ("person speaking", "a person speaking single syllables"),
    ("bass drum", "the deep thump of a bass drum"), ("hi-hat", "a closed hi-hat ticking"),
)  # fmt: skip
OPENINGS = ("", "the sound of ", "we hear ", "close-up: ")
LABELS = [label for label, _ in CLASSES]
SPEECH = LABELS.index("person speaking")
VOCABULARY = sorted({w for _, text in CLASSES for w in text.split()} | {w for o in OPENINGS for w in o.split()})

# Whether the stage ends before its trainings have: they run beside the main thread, which would wait for them.
ENDS = SimpleNamespace(value=False)

# Clips and optimizer steps of each size; processes besides the main one.
SIZES = {
    "default": dict(train=720, val=100, test=200, pretrain=1500, scorer=700, oracle=300, judge=300, processes=2,
                    batch=64, encoder_steps=300, base_steps=750, scorer_steps=200, sync_steps=400),
    "tiny": dict(train=20, val=6, test=8, pretrain=96, scorer=32, oracle=48, judge=64, processes=0, batch=16,
                 encoder_steps=120, base_steps=400, scorer_steps=60, sync_steps=80),
}  # fmt: skip
SIZES["large"] = SIZES["default"] | dict(train=2400, val=200)
# This world's replacements for the paper's numbers, chosen on its val split: {size: {stage: {argument: value}}}.
DEFAULTS = {
    "default": {
        "01": dict(guidance=1.5, sampling_steps=8, batch_clips=8), "02": dict(num_rated_clips=180),
        "03": dict(num_human_pairs=180), "04": dict(threshold=0.35),
        "05": dict(lr=7e-5, warmup=20, steps=160, global_batch=32, beta=20.0, save_every=40),
        "06": dict(lr=1e-4, steps=160, prompts=4, group_size=16, sampling_steps=10, updates=8, eta=1.0, micro_batch=32,
                   save_every=5), "07": dict(guidance=1.5),
    },
    "tiny": {
        "01": dict(guidance=1.5, sampling_steps=8), "02": dict(num_rated_clips=8), "03": dict(num_human_pairs=12),
        "04": dict(threshold=0.1), "05": dict(lr=1e-4, warmup=2, steps=8, global_batch=4, beta=20.0),
        "06": dict(lr=3e-4, steps=4, prompts=2, group_size=3, sampling_steps=4, updates=2), "07": dict(guidance=1.5),
    },
}  # fmt: skip
DEFAULTS["large"] = DEFAULTS["default"] | {"02": dict(num_rated_clips=400), "03": dict(num_human_pairs=400)}
DEFAULTS["large"] |= {x: DEFAULTS["default"][x] | dict(steps=250) for x in ("05", "06")}  # each pair below four times
OTHER = "made by another version of 00_toy_world.py; make the run folder anew"
CORPORA = ("train", "val", "test", "pretrain", "scorer", "oracle", "judge")  # the index is part of every clip's seed


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.engineering.add_argument("--seed", type=common.number(int, 0), default=0, help="of every clip and network")
    parser.engineering.add_argument("--size", choices=list(SIZES), default="default", help="tiny: seconds, for tests")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# One clip: script, sound, picture
# ------------------------------------------------------------------------------------------------------------


def draw_script(seed, corpus, index):
    """What happens in a clip. Returns a dict with the truth (`kind`, `hits_s`), the caption, what is heard
    (`heard_kind`, `heard_s`, `wet`, `noise`: the last two are amplitudes) and the clip's own generator."""
    rng = np.random.default_rng([seed, CORPORA.index(corpus), index])
    kind, count = int(rng.integers(len(CLASSES))), int(rng.choice([2, 3, 4], p=[0.6, 0.3, 0.1]))
    first, last, gap = 0.34, 1.56, 0.38  # seconds; the floor is read before the first hit
    hits = first + np.sort(rng.uniform(0, last - first - gap * (count - 1), count)) + gap * np.arange(count)
    text = OPENINGS[rng.integers(len(OPENINGS))] + CLASSES[kind][1]
    caption = None if rng.random() < 0.1 else text
    script = dict(kind=kind, hits_s=hits, caption=caption, heard_kind=kind, heard_s=hits, wet=0.0, noise=2e-4, rng=rng)
    draw = rng.random(4)
    if corpus == "pretrain":  # the imperfect data
        if draw[0] < 0.10:
            script["heard_kind"] = int((kind + rng.integers(1, len(CLASSES))) % len(CLASSES))
        if draw[1] < 0.35:
            shift = rng.uniform(0.1, 0.45) * rng.choice([-1, 1])
            shift = -shift if hits[-1] + shift > 1.7 or hits[0] + shift < 0.04 else shift
            script["heard_s"] = np.clip(hits + shift, 0.04, 1.7)
        if draw[2] < 0.35:
            script["noise"] = 10 ** rng.uniform(-2.3, -1.5)
        if draw[3] < 0.30:
            script["wet"] = rng.uniform(0.5, 0.9)
    elif corpus in ("scorer", "oracle", "judge"):  # right, but in every acoustic condition
        if draw[2] < 0.5:
            script["noise"] = 10 ** rng.uniform(-3.2, -1.5)
        if draw[3] < 0.5:
            script["wet"] = rng.uniform(0.3, 1.0)
    elif draw[3] < 0.5:
        script["wet"] = rng.uniform(0.5, 0.9)
    return script


EVENT_S = np.arange(int(0.35 * RATE_HZ)) / RATE_HZ


def draw_event(kind, pitch, rng):
    """One hit of a class: (5600,) samples, peak 1. pitch: a factor on all frequencies."""
    t, w = EVENT_S, 2 * np.pi * pitch * EVENT_S
    if kind == 0:  # bell
        partials = ((620, 0.06, 1), (1710, 0.045, 0.6), (2930, 0.03, 0.4))
        y = sum(a * np.sin(f * w) * np.exp(-t / d) for f, d, a in partials)
    elif kind == 1:  # wood
        y = np.sin(310 * w) * np.exp(-t / 0.02) + 0.7 * np.sin(830 * w) * np.exp(-t / 0.012)
        y[:32] += 0.5 * rng.standard_normal(32)
    elif kind == 2:  # snare
        y = rng.standard_normal(len(t)) * np.exp(-t / 0.03) + np.sin(190 * w) * np.exp(-t / 0.04)
    elif kind == 3:  # drip
        y = np.sin(700 * w * (1 + 9 * t)) * np.exp(-t / 0.035)
    elif kind == 4:  # FM
        y = np.sin(440 * w + 6 * np.exp(-t / 0.05) * np.sin(1150 * w)) * np.exp(-t / 0.045)
    elif kind == SPEECH:  # one vowel with hard edges, 0.26 s: PESQ finds no utterance in soft or shorter ones
        formants, h = ((700, 130, 1), (1220, 150, 0.6), (2600, 200, 0.3)), np.arange(1, 28)[:, None]
        gains = sum(a * np.exp(-(((130 * h - f) / b) ** 2)) for f, b, a in formants)
        y = (gains * np.sin(130 * h * w + h * h)).sum(axis=0)
        y *= np.clip(np.minimum(t, 0.26 - t) / 0.006, 0, 1)
    elif kind == 6:  # bass drum
        y = np.sin(2 * np.pi * (55 * t + 3.2 * (1 - np.exp(-t / 0.025))) * pitch) * np.exp(-t / 0.05)
    else:  # hi-hat
        y = np.diff(rng.standard_normal(len(t) + 2), n=2) * np.exp(-t / 0.012)
    y = y * np.clip((0.35 - t) / 0.05, 0, 1)
    return y / np.abs(y).max()


def draw_sound(script):
    """The clip's soundtrack: (32000,) float32."""
    rng, wave = script["rng"], np.zeros(SAMPLES + len(EVENT_S))
    kind, semitones = script["heard_kind"], rng.uniform(-2, 2)
    pitch = 2 ** (semitones * (0.1 if kind == SPEECH else 1) / 12)  # one speaker: PESQ compares
    for hit in script["heard_s"]:
        start = round(hit * RATE_HZ)
        wave[start : start + len(EVENT_S)] += 0.5 * rng.uniform(0.7, 1) * draw_event(kind, pitch, rng)
    wave = wave[:SAMPLES]
    if script["wet"]:  # a room: exponentially decaying noise of unit energy
        t, size = np.arange(int(0.6 * RATE_HZ)) / RATE_HZ, 1 << 16
        room = rng.standard_normal(len(t)) * np.exp(-t / 0.13) * (t > 0.01)
        room *= script["wet"] / np.sqrt((room**2).sum())
        wave = wave + np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)[:SAMPLES]
    wave = wave + script["noise"] * rng.standard_normal(SAMPLES)
    wave = wave / max(1.0, np.abs(wave).max() / 0.95)
    return np.round(wave * 2**15).astype(np.float32) / 2**15  # of 16 bits: below them sin and exp differ between CPUs


def draw_picture(script):
    """(50, 64, 64, 3) uint8. The object flies in parabolas; its lowest points are the hits, and nothing else is."""
    rng, hits = script["rng"], script["hits_s"]
    touch = np.concatenate([[-0.2], hits, [CLIP_S + 0.2]])  # no lowest point inside the clip that would be silent
    t = np.arange(FRAMES) / FPS
    i = np.clip(np.searchsorted(touch, t, side="right") - 1, 0, len(touch) - 2)
    gap = touch[i + 1] - touch[i]
    u = (t - touch[i]) / gap
    cy = 0.8 - np.minimum(0.6, 0.25 + 0.5 * gap) * 4 * u * (1 - u)
    cx = rng.uniform(0.3, 0.7) + rng.uniform(-0.1, 0.1) * t
    r = rng.uniform(0.09, 0.14)
    grid = ((np.arange(PIXELS) + 0.5) / PIXELS).astype(np.float32)
    dx = np.abs(grid - cx[:, None])[:, None, :].astype(np.float32)
    dy = np.abs(grid - cy[:, None])[:, :, None].astype(np.float32)
    outline = script["kind"] // 2
    if outline < 2:
        d = np.sqrt(dx * dx + dy * dy)
        d = d - r if outline == 0 else np.abs(d - r) - 0.3 * r
    else:
        d = np.maximum(dx - (1.5 if outline == 2 else 0.55) * r, dy - (0.55 if outline == 2 else 1.5) * r)
    mask = np.clip(np.float32(0.5) - d * PIXELS, 0, 1)
    warm = script["kind"] % 2 == 0
    colour = 255 * (np.array([0.8, 0.4, 0.2] if warm else [0.2, 0.45, 0.8]) + rng.uniform(-0.1, 0.1, 3))
    ground = np.float32(255 * rng.uniform(0.1, 0.35))
    grain = np.frombuffer(rng.bytes(mask.size), np.uint8).reshape(mask.shape) >> 4
    picture = np.empty((*mask.shape, 3), np.uint8)
    for channel in range(3):
        picture[..., channel] = (ground + mask * np.float32(colour[channel] - ground)).astype(np.uint8) + grain
    return picture


def write_mp4(path, picture, sound=None):
    """H.264 and AAC in one file. One encoder thread: the bytes must not depend on the number of cores."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "23", "threads": "1"})
        video.width, video.height, video.pix_fmt = PIXELS, PIXELS, "yuv420p"
        if sound is not None:
            options = {"b": "64000", "aac_coder": "fast"}
            audio = container.add_stream("aac", rate=RATE_HZ, layout="mono", options=options)
        for image in picture:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        if sound is None:
            return
        for start in range(0, SAMPLES, 1024):
            piece = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = RATE_HZ, start, Fraction(1, RATE_HZ)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))


def write_clip(job):
    """Pool job: one video of the train, val or test split, unless it is there. Returns its lines of clips.jsonl and
    00_truth.jsonl."""
    folder, seed, split, index = job
    name, script = f"{split}{index:05d}", draw_script(seed, split, index)
    hits, label = [round(float(hit), 4) for hit in script["hits_s"]], LABELS[script["kind"]]
    truth = {"id": name, "class": script["kind"], "hits_s": hits, "wet": round(float(script["wet"]), 4)}
    path = Path(folder) / f"{name}.mp4"
    if not path.exists():
        sound, picture = draw_sound(script), draw_picture(script)
        with common.replacing(path) as temporary:
            write_mp4(temporary, picture, sound)
    return dict(id=name, video=path.name, caption=script["caption"], label=label, split=split), truth


def corpus_clip(job):
    """Pool job: one clip that only trains networks, its picture through the same encoder and reader as the files'."""
    seed, corpus, index = job
    script = draw_script(seed, corpus, index)
    if corpus == "judge":
        return dict(wave=draw_sound(script), kind=script["kind"])
    wave = torch.from_numpy(draw_sound(script))
    noise = np.clip((np.log10(script["noise"]) + 3.2) / 1.7, 0, 1)  # 0 none, 1 the loudest
    row = dict(mel=log_mel(wave[None])[0].numpy(), kind=script["kind"], noise=np.float32(noise))
    if corpus == "oracle":
        return row
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, draw_picture(script))
        look = moments(common.read_frames(path, [(FPS, frame_transform)], CLIP_S)[0])
    strike = np.exp(-0.5 * ((np.arange(FRAMES)[:, None] / FPS - script["hits_s"]) / 0.03) ** 2).max(axis=1)
    return dict(row, look=look.numpy(), text=words(script["caption"]).numpy(), strike=strike.astype(np.float32))


# ------------------------------------------------------------------------------------------------------------
# Codec: log-mel, PCA of patches, Griffin-Lim
# ------------------------------------------------------------------------------------------------------------


@functools.cache
def mel_banks():
    """mel filters (513, 64) and their pseudo-inverse (64, 513)."""
    banks = torchaudio.functional.melscale_fbanks(N_FFT // 2 + 1, 30.0, RATE_HZ / 2, MELS, RATE_HZ)
    return banks, torch.linalg.pinv(banks)


def log_mel(waves):
    """(B, S) -> (B, 100, 64), about zero mean and unit standard deviation. S is cut or padded to 2 s."""
    waves, mel = common.fit_length(torch.nan_to_num(waves.float(), 0, 0, 0), SAMPLES), []
    for part in F.pad(waves, (N_FFT // 2, N_FFT // 2), "reflect").split(4):  # what fits the cache
        frames = part.unfold(1, N_FFT, HOP)[:, :MEL_FRAMES] * torch.hann_window(N_FFT)
        power = torch.view_as_real(torch.fft.rfft(frames)).square().sum(-1)
        mel.append(((power @ mel_banks()[0] + 1e-4).log() + 2.5) / 4)
    return torch.cat(mel)


ONCE, last_mel = threading.Lock(), functools.lru_cache(1)(log_mel)  # for scorers that hear a tensor side by side


def heard(waves):
    with ONCE:
        return last_mel(waves)


def overlap_add(frames):
    """(B, F, 1024), one every 320 samples -> (B, (F + 3) * 320)."""
    parts = F.pad(frames, (0, 4 * HOP - N_FFT)).unflatten(2, (4, HOP))
    return sum(F.pad(parts[:, :, i], (0, 0, i, 3 - i)) for i in range(4)).flatten(1)


def griffin_lim(magnitude, steps=4, momentum=0.5):
    """(B, 101, 513) magnitudes -> (B, 32000), from zero phase. torchaudio's, in less than half of its time: without
    angles, frames side by side. After 4 steps the oracle hears what it hears after 8, within 2 ms and 0.1 dB."""
    window, count = torch.hann_window(N_FFT), magnitude.shape[1]
    envelope = overlap_add(window.square().expand(1, count, N_FFT)).clamp(min=1e-3)
    spectrum, before = magnitude + 0j, 0
    for i in range(steps + 1):
        wave = overlap_add(torch.fft.irfft(spectrum, N_FFT) * window) / envelope
        if i < steps:
            heard = torch.fft.rfft(wave.unfold(1, N_FFT, HOP)[:, :count] * window)
            ahead, before = heard - momentum * before, heard
            power = torch.view_as_real(ahead).square().sum(-1)
            spectrum = ahead * (magnitude * (power + 1e-12).rsqrt())
    return wave[:, N_FFT // 2 :][:, :SAMPLES]


class Codec(nn.Module):
    """Waveform <-> latent (B, 25, 40) with unit standard deviation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(PATCH * MELS))
        self.register_buffer("down", torch.zeros(PATCH * MELS, CHANNELS))
        self.register_buffer("up", torch.zeros(CHANNELS, PATCH * MELS))

    @classmethod
    def fit(cls, mel):
        """PCA of patches; components are divided by the root of their deviation, a compromise between whitening
        (the network would spend itself on inaudible ones) and none."""
        self, patches = cls(), mel.reshape(-1, PATCH * MELS).double()
        self.mean.copy_(patches.mean(0))
        values, vectors = torch.linalg.eigh(patches.T.cov())
        deviation, vectors = values.flip(0)[:CHANNELS].sqrt(), vectors.flip(1)[:, :CHANNELS]
        scale = (deviation * deviation.mean()).sqrt()  # the latent's overall variance becomes 1
        self.down.copy_(vectors / scale)
        self.up.copy_((vectors * scale).T)
        return self

    def encode(self, mel):
        return (mel.reshape(len(mel), TOKENS, PATCH * MELS) - self.mean) @ self.down

    def mel(self, latents):
        return (latents @ self.up + self.mean).reshape(len(latents), MEL_FRAMES, MELS)

    @torch.no_grad()
    def decode(self, latents):
        """(B, 25, 40) -> (B, 32000) on the CPU, by Griffin-Lim without randomness."""
        waves = []
        for part in latents.float().cpu().split(4):  # what fits the cache
            power = ((4 * self.mel(part).clamp(max=3.5) - 2.5).exp() - 1e-4).clamp(min=0) @ mel_banks()[1]
            waves.append(griffin_lim(torch.cat([power, power[:, -1:]], dim=1).clamp(min=0).sqrt()))
        return torch.cat(waves)

    def pass_half(self, mel):
        """Every second row as generated audio arrives: through latents, Griffin-Lim and the analysis again. Networks
        that never met the phases it invents mistake bells for synthesizers."""
        mel = mel.clone()
        mel[::2] = log_mel(self.decode(self.encode(mel[::2])))
        return mel


# ------------------------------------------------------------------------------------------------------------
# Frozen encoders of picture and caption
# ------------------------------------------------------------------------------------------------------------


def frame_transform(frame):
    """(3, H, W) uint8 of any size -> (64, 64, 3) uint8: the central square, averaged down."""
    _, height, width = frame.shape
    if (height, width) != (PIXELS, PIXELS):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = frame[:, top : top + side, left : left + side].float()
        frame = F.adaptive_avg_pool2d(square, PIXELS).round().to(torch.uint8)
    return frame.permute(1, 2, 0)


def moments(frames):
    """(50, 64, 64, 3) uint8 -> (50, 10) float32: of what differs from the ground, its mass, place, extent, colour."""
    frames = (frames[:, ::2, ::2].float() + frames[:, 1::2, 1::2]) / 510
    ground = frames.reshape(-1, 3)[::7].median(dim=0).values
    diff = frames - ground
    weight = (diff.abs().sum(-1) - 0.25).clamp(min=0)
    mass = weight.sum((1, 2))
    share = weight / mass.clamp(min=1e-3)[:, None, None]
    grid = (torch.arange(PIXELS // 2) + 0.5) / (PIXELS // 2)
    cx, cy = (share.sum(1) * grid).sum(-1), (share.sum(2) * grid).sum(-1)
    dx, dy = grid - cx[:, None], grid - cy[:, None]
    sx, sy = (share.sum(1) * dx**2).sum(-1).sqrt(), (share.sum(2) * dy**2).sum(-1).sqrt()
    centre = torch.exp(-((dx[:, None, :] ** 2 + dy[:, :, None] ** 2) / 0.002))  # a ring is hollow
    hollow = (share * centre).sum((1, 2))
    colour = (share[..., None] * diff).sum((1, 2))
    columns = [mass / 30, 2 * cx - 1, 2 * cy - 1, 10 * sx, 10 * sy, 4 * hollow, (mass > 0.5).float()]
    return torch.cat([torch.stack(columns, dim=1), 2 * colour], dim=1)


last_moments = functools.lru_cache(1)(moments)  # for scorers that see the same frames one after the other


def words(caption):
    """Bag of words (V,) over the world's captions; unknown words vanish, no caption is all zeros."""
    bag = torch.zeros(len(VOCABULARY))
    for word in (caption or "").lower().split():
        if word in VOCABULARY:
            bag[VOCABULARY.index(word)] = 1.0
    return bag


class VideoTower(nn.Module):
    """moments (B, 50, 10) -> per frame (B, 50, 32), and pooled (B, 32)."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(MOMENTS, EMBED, 5, padding=2), nn.Conv1d(EMBED, EMBED, 5, padding=2)
        self.pool = nn.Linear(2 * EMBED, EMBED)

    def forward(self, look):
        x = F.relu(self.two(F.relu(self.one(look.transpose(1, 2)))))
        return x.transpose(1, 2), self.pool(torch.cat([x.mean(-1), x.amax(-1)], dim=-1))


class Glance(VideoTower):
    """The pooled half alone: ImageBind's side of the picture."""

    def forward(self, look):
        return super().forward(look)[1]


class VideoEncoder(nn.Module):
    """The base model's own frozen video encoder, trained to name the class and to mark the hits."""

    def __init__(self):
        super().__init__()
        self.tower, self.strike, self.kind = VideoTower(), nn.Linear(EMBED, 1), nn.Linear(EMBED, len(CLASSES))

    def loss(self, look, strike, kind):
        frames, pooled = self.tower(look)
        marks = F.binary_cross_entropy_with_logits(self.strike(frames)[..., 0], strike, pos_weight=torch.tensor(4.0))
        return marks + F.cross_entropy(self.kind(pooled), kind)


# ------------------------------------------------------------------------------------------------------------
# The velocity network: a small diffusion transformer
# ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.query, self.value, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # a key bias has no true gradient: Adam would amplify rounding
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + gate_a * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(y)


class ToyNet(nn.Module):
    """u(a_t, t, video, text) in the paper's convention: t = 1 is noise, the target is eps - a_0.

    a_t: (B, 25, 40); frames: (B, 25, 64), two video frames to a token; pooled: (B, 32); text: (B, V).
    """

    def __init__(self, width=96, depth=3, heads=4):
        super().__init__()
        self.latent_in, self.frames_in = nn.Linear(CHANNELS, width), nn.Linear(2 * EMBED, width)
        self.pooled_in, self.text_in = nn.Linear(EMBED, width), nn.Linear(len(VOCABULARY), width)
        self.place = nn.Parameter(0.02 * torch.randn(1, TOKENS, width))
        self.null_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.null_vector = nn.Parameter(torch.zeros(1, width))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.last, self.out = nn.Linear(width, 2 * width), nn.Linear(width, CHANNELS)
        for layer in (self.last, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("frequencies", 1000 * torch.exp(-math.log(1e4) * torch.arange(32) / 32), persistent=False)

    def condition(self, frames, pooled, text):
        return {"tokens": self.frames_in(frames), "vector": self.pooled_in(pooled) + self.text_in(text)}

    def null(self, conditions):
        null = {"tokens": self.null_tokens, "vector": self.null_vector}
        return {key: null[key].expand_as(value) for key, value in conditions.items()}

    def forward(self, a_t, t, conditions):
        phase = t.float()[:, None] * self.frequencies
        c = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1)) + conditions["vector"]
        x = self.latent_in(a_t) + conditions["tokens"] + self.place
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.last(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.out(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


class Toy(common.FlowModel):
    """The pre-trained toy model; `net` is trainable, encoders and codec are frozen. Its time is the paper's already."""

    sample_rate_hz, clip_s, latent_shape = RATE_HZ, CLIP_S, (TOKENS, CHANNELS)
    feature_shapes = {"frames": (TOKENS, 2 * EMBED), "pooled": (EMBED,), "text": (len(VOCABULARY),)}
    reads_video = True

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        if variant:
            common.stop(f"--model toy:{variant}: the toy model has no variants; give --model toy")
        if checkpoint is None:
            common.stop("--model toy: needs its weights; give --checkpoint runs/toy/00_base.pt, which stage 00 writes")
        self.checkpoint, state = Path(checkpoint), common.load_pt(checkpoint)
        if not isinstance(state, dict) or state.get("kind") != "toy base":
            common.stop(f"{checkpoint}: is not a toy base model; give the 00_base.pt that 00_toy_world.py writes")
        if state.get("vocabulary") != VOCABULARY:
            common.stop(f"{checkpoint}: {OTHER}")
        for name in ("00_scorers.pt", "run.json"):
            if not self.checkpoint.with_name(name).is_file():
                common.stop(f"--checkpoint {checkpoint}: {name} of stage 00 must lie beside it")
        self.net, encoder, codec = ToyNet(), VideoEncoder(), Codec()
        for name, module in (("net", self.net), ("encoder", encoder), ("codec", codec)):
            common.load_weights(module, state.get(name), checkpoint, OTHER, finite=name != "net")
        self.net.null_tokens.requires_grad_(False)
        self.net.null_vector.requires_grad_(False)
        self.frozen = [encoder.requires_grad_(False), codec]  # in a list: no submodules

    def read(self, clip, others=()):
        frames, *more = common.read_frames(clip["path"], [(FPS, frame_transform), *others], CLIP_S)
        return [moments(frames), *more]

    @torch.no_grad()
    def encode(self, clip, seen):
        per_frame, pooled = self.frozen[0].tower(seen[0][None])
        return {"frames": per_frame.reshape(TOKENS, 2 * EMBED), "pooled": pooled[0], "text": words(clip["caption"])}

    def project(self, features):
        return self.net.condition(*(features[key].to(self.device).float() for key in ("frames", "pooled", "text")))

    def null_conditions(self, conditions):
        return self.net.null(conditions)

    def velocity(self, *given):
        torch.set_num_threads(THREADS if torch.is_grad_enabled() else 1)
        return super().velocity(*given)

    def predict(self, a_t, t, conditions):
        return self.net(a_t, t, conditions)

    def decode(self, latents):
        return self.frozen[1].decode(latents)

    def blocks(self):
        return self.net.blocks

    def policy_state(self):
        return {key: value.detach().cpu().clone() for key, value in self.net.state_dict().items()}

    def load_policy(self, path):
        """path: policy.pt, a bare state dict of ToyNet."""
        otherwise = "is not a policy of the toy model; give the policy.pt of a run whose --model is toy"
        common.load_weights(self.net, common.load_pt(path), path, otherwise, finite=False)


ADAPTER = Toy


# ------------------------------------------------------------------------------------------------------------
# Training of base model, scorers and oracle
# ------------------------------------------------------------------------------------------------------------


def fit(net, loss, rows, batch, steps, seed, title, place=0, after=lambda: None):
    """AdamW with a cosine schedule on random batches; loss(indices, generator) -> scalar."""
    generator, lr = torch.Generator().manual_seed(seed), 2e-3
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    for step in tqdm(range(steps), title, position=place, disable=None, mininterval=1):
        if ENDS.value:
            common.stop(f"{title}: interrupted")
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        value = loss(torch.randint(rows, (min(batch, rows),), generator=generator), generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        after()


def train_base(path, data, codec, size, seed):
    """The frozen video encoder, then rectified flow on the imperfect corpus, of which the average weights are kept."""
    torch.manual_seed(seed + 1)
    encoder, net, look = VideoEncoder(), ToyNet(), data["look"]
    strike, kind, batch, steps = data["strike"], data["kind"], size["batch"], size["encoder_steps"]
    fit(encoder, lambda i, _: encoder.loss(look[i], strike[i], kind[i]), len(look), batch, steps, seed, "video encoder")
    with torch.no_grad():
        latents, (per_frame, pooled) = codec.encode(data["mel"]), encoder.tower(look)
    per_frame = per_frame.reshape(-1, TOKENS, 2 * EMBED)
    kept, count = {key: value.clone() for key, value in net.state_dict().items()}, 0

    def loss(i, generator):
        a_0, t = latents[i], torch.sigmoid(torch.randn(len(i), generator=generator))  # logit-normal
        a_t, v = common.interpolate(a_0, torch.randn(a_0.shape, generator=generator), t)
        drop, drop_text = torch.rand(2, len(i), 1, generator=generator) < 0.1
        conditions = net.condition(per_frame[i], pooled[i], data["text"][i] * ~drop_text)
        null = net.null(conditions)
        conditions["tokens"] = torch.where(drop[..., None], null["tokens"], conditions["tokens"])
        conditions["vector"] = torch.where(drop, null["vector"], conditions["vector"])
        return common.flow_error(v, net(a_t, t, conditions)).mean()

    def average():
        nonlocal count
        count += 1
        for key, value in net.state_dict().items():
            kept[key].lerp_(value, max(0.005, 10 / (count + 10)))

    fit(net, loss, len(look), batch, size["base_steps"], seed, "base model", after=average)
    state = {"net": kept, "encoder": encoder.state_dict(), "codec": codec.state_dict()}
    common.save_pt(path, {"kind": "toy base", "vocabulary": VOCABULARY, **state})


class AudioTower(nn.Module):
    """log-mel (B, 100, 64) -> (B, out), and before that the embedding (B, 64)."""

    def __init__(self, out, width=64):
        super().__init__()
        self.one, self.two = nn.Conv1d(MELS, width, 5, 2, 2), nn.Conv1d(width, width, 5, 1, 2)
        self.three, self.mix, self.head = nn.Conv1d(width, width, 5, 1, 2), nn.Linear(3 * width, 64), nn.Linear(64, out)

    def embedding(self, mel):
        x = F.relu(self.three(F.relu(self.two(F.relu(self.one(mel.transpose(1, 2)))))))
        return self.mix(torch.cat([x.mean(-1), x.amax(-1), x.amin(-1)], dim=-1))  # amin hears noise, but no tails

    def forward(self, mel):
        return self.head(F.relu(self.embedding(mel)))


class Match(nn.Module):
    """Sound against something else by cosine. Trained contrastively, clips of one class being each other's positives:
    it asks what sounds, not when."""

    def __init__(self, other):
        super().__init__()
        self.sound, self.other = AudioTower(EMBED), other

    def loss(self, mel, other, kind):
        cosine = F.cosine_similarity(self.sound(mel)[:, None], self.other(other)[None], dim=-1)
        same = (kind[:, None] == kind).float()
        same = same / same.sum(1, keepdim=True)
        return -(same * ((10 * cosine).log_softmax(0) + (10 * cosine).log_softmax(1))).sum(1).mean()


def text_tower():
    return nn.Sequential(nn.Linear(len(VOCABULARY), EMBED), nn.ReLU(), nn.Linear(EMBED, EMBED))


class SyncNet(nn.Module):
    """Offset of sound against picture: correlation of eight learned channels over 21 lags of 40 ms, then softmax."""

    LAGS = 10

    def __init__(self):
        super().__init__()
        conv = nn.Conv1d
        self.sound = nn.Sequential(conv(MELS, 32, 5, 2, 2), nn.ReLU(), conv(32, 32, 5, 1, 2), nn.ReLU(), conv(32, 8, 1))
        see = conv(MOMENTS, 32, 5, 1, 2)
        self.sight = nn.Sequential(see, nn.ReLU(), conv(32, 32, 5, 1, 2), nn.ReLU(), conv(32, 8, 1))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def see(self, look):
        """(B, 50, 10) -> (B, 8, 50) with unit norm."""
        return F.normalize(self.sight(look.transpose(1, 2)), dim=(1, 2))

    def forward(self, mel, sight):
        """-> logits (B, 21) of the lag: positive when the sound comes late."""
        heard = F.pad(F.normalize(self.sound(mel.transpose(1, 2)), dim=(1, 2)), (self.LAGS, self.LAGS))
        return self.scale * (heard.unfold(2, FRAMES, 1) * sight[:, :, None]).sum((1, 3))

    def desync_s(self, logits):
        """E|offset| in seconds."""
        return logits.softmax(-1) @ (torch.arange(-self.LAGS, self.LAGS + 1).abs() / FPS)


def late(mel, lag, quiet):
    """Each row moved by lag (B,) video frames; what is uncovered is filled with quiet (B, 1, 64)."""
    place = torch.arange(MEL_FRAMES) - 2 * lag[:, None]
    moved = mel.gather(1, place.clamp(0, MEL_FRAMES - 1)[..., None].expand_as(mel))
    return torch.where(((place >= 0) & (place < MEL_FRAMES))[..., None], moved, quiet)


def train_scorers(path, oracle_path, data, other, codec, size, seed):
    """The four learned scorers from the scorer corpus, the oracle's classifier from its own."""
    torch.manual_seed(seed + 2)
    mel, look, text, kind = codec.pass_half(data["mel"]), data["look"], data["text"], data["kind"]
    nets = {"imagebind": Match(Glance()), "clap": Match(text_tower())}
    nets |= {"synchformer": SyncNet(), "panns": AudioTower(len(CLASSES))}
    captioned, quiet = text.any(1).nonzero()[:, 0], mel.quantile(0.1, dim=1, keepdim=True)
    # The tagger is less sure of a noisy sound: hard labels would make it deaf to noise, and score_4 with it.
    doubt = 0.9 * data["noise"][:, None]
    soft = F.one_hot(kind, len(CLASSES)) * (1 - doubt) + doubt / len(CLASSES)

    def synchronise(i, generator):
        lag = torch.randint(-SyncNet.LAGS, SyncNet.LAGS + 1, (len(i),), generator=generator)
        net = nets["synchformer"]
        return F.cross_entropy(net(late(mel[i], lag, quiet[i]), net.see(look[i])), lag + SyncNet.LAGS)

    losses = {
        "imagebind": lambda i, _: nets["imagebind"].loss(mel[i], look[i], kind[i]),
        "clap": lambda i, _: nets["clap"].loss(mel[captioned[i]], text[captioned[i]], kind[captioned[i]]),
        "synchformer": synchronise,
        "panns": lambda i, _: F.cross_entropy(nets["panns"](mel[i]), soft[i]),
    }
    for name, net in nets.items():
        steps = size["sync_steps" if name == "synchformer" else "scorer_steps"]
        rows = len(captioned if name == "clap" else mel)
        fit(net, losses[name], rows, size["batch"], steps, seed, name, 1)
    state = {name: net.state_dict() for name, net in nets.items()}
    common.save_pt(path, {"kind": "toy scorers", "vocabulary": VOCABULARY, "codec": codec.state_dict(), **state})

    oracle, heard, what = AudioTower(len(CLASSES)), codec.pass_half(other["mel"]), other["kind"]
    name_it = lambda i, _: F.cross_entropy(oracle(heard[i]), what[i])  # noqa: E731
    fit(oracle, name_it, len(heard), size["batch"], size["scorer_steps"], seed, "oracle", 1)
    common.save_pt(oracle_path, {"kind": "toy oracle", "classifier": oracle.state_dict()})


# ------------------------------------------------------------------------------------------------------------
# Scorers, as stages use them. Scorer.__call__ is in common.
# ------------------------------------------------------------------------------------------------------------


class ToyScorer(common.Scorer):
    """A scorer whose `part` of 00_scorers.pt `net` loads."""

    sample_rate_hz, files = RATE_HZ, ("00_scorers.pt",)
    part: str

    def __init__(self, weights, device):
        path = common.weight_file(weights, self.files[0])
        state = common.load_pt(path)
        if not isinstance(state, dict) or (state.get("kind"), state.get("vocabulary")) != ("toy scorers", VOCABULARY):
            common.stop(f"{path}: {OTHER}")
        self.net = self.build()
        common.load_weights(self.net, state.get(self.part), path, OTHER)
        self.net.requires_grad_(False)


class ImageBind(ToyScorer):
    """ib: cosine of video and sound (B,)."""

    part, reads, gives = "imagebind", "video", "ib"
    frames = FPS, frame_transform

    def build(self):
        return Match(Glance())

    def embed_clip(self, clip, frames):
        return self.net.other(last_moments(frames)[None])[0]

    def score_audio(self, waves, clips, sides):
        return {"ib": F.cosine_similarity(self.net.sound(heard(waves)), torch.stack(sides))}


class Clap(ToyScorer):
    """clap: cosine of caption and sound (B,), nan without caption."""

    part, reads, gives = "clap", "caption", "clap"

    def build(self):
        return Match(text_tower())

    def embed_clip(self, clip):
        return None if clip["caption"] is None else self.net.other(words(clip["caption"])[None])[0]

    def score_audio(self, waves, clips, sides):
        sides = torch.stack([torch.full((EMBED,), math.nan) if side is None else side for side in sides])
        return {"clap": F.cosine_similarity(self.net.sound(heard(waves)), sides)}


class Synchformer(ToyScorer):
    """desync_s: expected |offset| of sound against picture in seconds (B,)."""

    part, reads, gives = "synchformer", "video", "desync_s"
    frames = FPS, frame_transform

    def build(self):
        return SyncNet()

    def embed_clip(self, clip, frames):
        return self.net.see(last_moments(frames)[None])[0]

    def score_audio(self, waves, clips, sides):
        return {"desync_s": self.net.desync_s(self.net(heard(waves), torch.stack(sides)))}


class Panns(ToyScorer):
    """logits: (B, 8) of the tagger, for score_4."""

    part = "panns"

    def build(self):
        return AudioTower(len(CLASSES))

    def score_audio(self, waves, clips, sides):
        return {"logits": self.net(heard(waves))}


class Passt(Panns):
    """logits (B, 8) and embedding (B, 64) of the same tagger, for FD, KL and IS."""

    def score_audio(self, waves, clips, sides):
        embedding = self.net.embedding(heard(waves))
        return {"logits": self.net.head(F.relu(embedding)), "embedding": embedding}


class Pesq(ToyScorer):
    """pesq: wide-band PESQ against the clip's own sound (B,), by the real package; nan where it does not apply: no
    speech, no audio track, no utterance in the reference.

    The reference goes through the codec: against the untouched original, Griffin-Lim's phases alone cost so much that
    nothing else would be heard.
    """

    part, reads, gives = "codec", "reference", "pesq"

    def build(self):
        return Codec()

    def embed_clip(self, clip):
        if clip["label"] != LABELS[SPEECH]:
            return None
        try:
            wave = common.read_audio(clip["path"], RATE_HZ, CLIP_S)
        except common.NoAudio:  # a silent film
            return None
        reference = self.net.decode(self.net.encode(log_mel(wave[None])))[0]
        return reference if reference.abs().max() > 1e-3 else None

    def score_audio(self, waves, clips, sides):
        return {"pesq": common.pesq_scores(sides, waves, self.workers)}


SCORERS = {"imagebind": ImageBind, "clap": Clap, "synchformer": Synchformer, "panns": Panns, "pesq": Pesq}
SCORERS |= {"passt": Passt}
MEASURES = {"fd": ("fd", "passt", "embedding"), "kl": ("kl", "passt", "logits"), "is": ("is", "passt", "logits")}
MEASURES |= {"ib": ("mean", "imagebind", "ib"), "clap": ("mean", "clap", "clap")}
MEASURES |= {"desync_s": ("mean", "synchformer", "desync_s")}
AT_A_TIME = len(SCORERS)  # so small that they hear an audio together


# ------------------------------------------------------------------------------------------------------------
# The oracle: what is true. Only the functions of this section read 00_oracle.pt and 00_truth.jsonl.
# ------------------------------------------------------------------------------------------------------------

CLEAN_FLOOR_DB = -57.0  # of the world's own clean clips; below it nothing is gained
WET_DB = -32.0  # reverberant above this


def find_onsets(level_db):
    """level_db: (100,) energy of frames of 20 ms. Seconds at which it rises by 5 dB, within 18 dB of the loudest."""
    before = np.stack([np.roll(level_db, k) for k in (1, 2, 3)]).mean(0)
    after = np.stack([level_db, np.roll(level_db, -1)]).mean(0)
    before[:3] = level_db[:3].min()
    rise = after - before
    rise[-1] = 0
    peaks = [i for i in range(len(rise)) if rise[i] > 5 and rise[i] == rise[max(0, i - 5) : i + 6].max()]
    return np.array([i * HOP / RATE_HZ for i in peaks if level_db[i : i + 4].max() > level_db.max() - 18])


def measure(wave, hits_s):
    """The three measures of one audio (S,) that need no network: sync_s, floor_db, wet_db."""
    wave = common.fit_length(torch.nan_to_num(wave, 0, 0, 0), SAMPLES).numpy().astype(np.float64)
    padded = np.pad(wave, (HOP, HOP))
    energy = np.stack([padded[k * HOP : k * HOP + 2 * HOP] for k in range(MEL_FRAMES)]) ** 2  # centred at k * 20 ms
    energy = (energy * np.hanning(2 * HOP)).mean(1) + 1e-12
    onsets = find_onsets(10 * np.log10(energy))
    hits = np.asarray(hits_s)
    sync = 0.4
    if len(onsets):
        away = np.minimum(np.abs(onsets[:, None] - hits), 0.4)
        sync = 0.5 * (away.min(0).mean() + away.min(1).mean())
    peak = np.sort(energy)[-4:].mean()
    floor = np.sort(energy)[2:8].mean()
    # The tail 280 to 400 ms after an onset that no other follows within 420 ms; no such onset: counted as dry.
    ends = np.append(onsets[1:], CLIP_S)
    tails = [np.median(energy[round(a * 50) + 14 : round(a * 50) + 20]) for a, b in zip(onsets, ends) if b - a >= 0.42]
    tails = [tail - floor if tail > 3 * floor else 0.0 for tail in tails]  # a noisy floor's own ripple is no room
    wet = np.mean(tails) / peak if tails else 0.0
    return sync, max(CLEAN_FLOOR_DB, 10 * np.log10(floor / peak)), 10 * np.log10(max(wet, 1e-6))


TRUTH = {"id": common.NAME, "class": common.between(0, len(CLASSES) - 1, int)}
TRUTH |= {"hits_s": common.list_of(common.between(0, CLIP_S))}


def truth_of(run, audios=()):
    """The lines of 00_truth.jsonl by clip; those of all audios must be there."""
    file = Path(run) / "00_truth.jsonl"
    truth = {row["id"]: row for row in common.read_jsonl(file, TRUTH, f"; {OTHER}")}
    for clip, _ in audios:
        if clip["id"] not in truth:
            common.stop(f"{file}: has no line of {clip['id']}; {OTHER}")
    return truth


@torch.inference_mode()
def examine(run, audios):
    """audios: list of (clip line, wav path) -> arrays semantic (P of the true class), sync_s, floor_db, wet_db."""
    oracle, file = AudioTower(len(CLASSES)), Path(run) / "00_oracle.pt"
    common.load_weights(oracle, common.load_pt(file, {"classifier": common.DICT})["classifier"], file, OTHER)
    out, truths = {key: [] for key in ("semantic", "sync_s", "floor_db", "wet_db")}, truth_of(run, audios)
    for clip, path in audios:
        wave = common.read_audio(path, RATE_HZ)
        truth, chances = truths[clip["id"]], oracle(log_mel(wave[None])).softmax(-1)[0]
        for key, value in zip(out, (chances[truth["class"]].item(), *measure(wave, truth["hits_s"]))):
            out[key].append(value)
    return {key: np.array(values, dtype=np.float64) for key, values in out.items()}


def rater_noise(run):  # times what it usually is
    return common.read_json(Path(run) / "run.json", {"rater_noise": common.NUMBER}, f"; {OTHER}")["rater_noise"]


def simulated_ratings(run, audios, seed):
    """What a listener says (Sec. 2.1): one with three faults to look for, unsteady thresholds, and a taste for rooms.

    audios: list of (clip line, k, wav path). A rating depends on (seed, clip, k) and the audio, not on the order.
    """
    rows, seen, noise = [], examine(run, [(clip, path) for clip, _, path in audios]), rater_noise(run)
    for i, (clip, k, _) in enumerate(audios):
        rng = np.random.default_rng(common.seed_of(seed, "rater", clip["id"], k))
        a, b, c = rng.standard_normal(3)
        chance = rng.random()
        semantic, sync = seen["semantic"][i] + 0.05 * noise * a, seen["sync_s"][i] + 0.02 * noise * b
        floor = seen["floor_db"][i] + 3 * noise * c
        faults = [sum(bool(value > limit) for limit in limits) for value, limits in
                  ((1 - semantic, (0.2, 0.6)), (sync, (0.06, 0.15)), (floor, (-42, -30)))]  # fmt: skip
        rating = "Bad" if max(faults) == 2 else "Good" if sum(faults) == 0 else "Medium"
        if rating == "Good" and seen["wet_db"][i] < WET_DB and chance < 0.35:
            rating = "Medium"
        elif rating == "Medium" and sum(faults) == 1 and seen["wet_db"][i] > WET_DB + 4 and chance < 0.3:
            rating = "Good"
        rows.append({"clip": clip["id"], "k": k, "rating": rating, "rater": "simulated"})
    return rows


def simulated_choices(run, comparisons, seed):
    """Which of two audios of one clip and one rating a listener prefers (Sec. 2.2): the more reverberant, by 1 per dB
    with noise of 2; "tie" where they differ by 6 dB or less. comparisons: list of (clip line, a, b, wav a, wav b)."""
    first = examine(run, [(clip, path) for clip, _, _, path, _ in comparisons])["wet_db"]
    second = examine(run, [(clip, path) for clip, _, _, _, path in comparisons])["wet_db"]
    rows, noise = [], 2 * rater_noise(run)
    for (clip, a, b, _, _), wet_a, wet_b in zip(comparisons, first, second):
        rng = np.random.default_rng(common.seed_of(seed, "chooser", clip["id"], a, b))
        choice = "tie" if abs(wet_a - wet_b) <= 6 else "a" if wet_a - wet_b + noise * rng.standard_normal() > 0 else "b"
        rows.append({"clip": clip["id"], "a": a, "b": b, "choice": choice, "rater": "simulated"})
    return rows


# ------------------------------------------------------------------------------------------------------------
# The second judge, for stage 07 alone. It shares no network, no clip and no measure with raters, scorers and oracle.
# ------------------------------------------------------------------------------------------------------------

SPAN, STRIDE = 512, 128  # samples: windows of 32 ms, one every 8 ms
LATE_DB = -28.0  # reverberant above this; 5 % errors on the judge's own corpus


@functools.cache
def band_filters():
    """(20, 257): bands of equal width in octaves from 60 Hz, each of one bin at least."""
    edges, hz = np.geomspace(60, RATE_HZ / 2, 21), np.fft.rfftfreq(SPAN, 1 / RATE_HZ)
    nearest = np.abs(hz - np.sqrt(edges[:-1] * edges[1:])[:, None]).argmin(1)
    return (hz >= edges[:-1, None]) & (hz < edges[1:, None]) | (np.arange(len(hz)) == nearest[:, None])


def band_energy(wave):
    """(S,) tensor -> (251, 20)."""
    wave = common.fit_length(torch.nan_to_num(wave, 0, 0, 0), SAMPLES).numpy().astype(np.float64)
    parts = np.lib.stride_tricks.sliding_window_view(np.pad(wave, SPAN // 2), SPAN)[::STRIDE] * np.hanning(SPAN)
    return np.abs(np.fft.rfft(parts)) ** 2 @ band_filters().T + 1e-9


def attacks(energy):
    """Where all bands together rise most in 24 ms, 160 ms apart and within 20 dB of the loudest: window indices."""
    from scipy.signal import find_peaks

    level, total = np.log10(energy + 1e-4 * energy.sum(1).max()), energy.sum(1)
    rise = np.maximum(level[3:] - level[:-3], 0).sum(1)
    peaks, _ = find_peaks(rise, height=max(2.0, rise.max() / 4), distance=20)
    return np.array([i + 2 for i in peaks if total[i : i + 8].max() > total.max() / 100], dtype=int)


def attack_shape(energy, at):
    """(60,): the spectrum in three stretches of an attack, 224 ms in all, in dB of the first; mean of all attacks."""
    at, floor = at if len(at) else [energy.sum(1).argmax()], np.quantile(energy, 0.1, axis=0)
    cuts = [[energy[i + a : i + b].mean(0) for i in at if i + a < len(energy)] for a, b in ((0, 6), (6, 14), (14, 28))]
    parts = [np.maximum(np.mean(cut, 0) - floor, 0) if cut else 0 * floor for cut in cuts]
    return 10 * np.log10(np.concatenate(parts) / (parts[0].sum() + 1e-9) + 1e-4)


def late_db(energy, at):
    """Energy later than 272 ms after an attack over what came before, in dB, less the floor; attacks that no other
    follows within 416 ms; -50 where nothing is left."""
    total, shares = energy.sum(1), []
    floor = np.convolve(total, np.full(16, 1 / 16), "valid").min()
    for start, end in zip(at, np.append(at[1:], len(total))):
        if end - start >= 52:
            early, late = total[start : start + 34] - floor, total[start + 34 : min(end - 3, start + 62)] - floor
            heard = late.mean() > 0.3 * floor  # else the floor's own ripple
            shares.append(late.sum() / max(early.sum(), 1e-9) if heard else 0.0)
    return 10 * np.log10(max(np.mean(shares), 1e-5)) if shares else -50.0


def train_judge(path, data, codec, size, seed):
    """Linear discriminant analysis: a Gaussian of `attack_shape` for every class, of one covariance."""
    waves, kind = data["wave"].clone(), data["kind"].numpy()
    waves[::2] = codec.decode(codec.encode(log_mel(waves[::2])))  # half as generated audio arrives
    x = np.stack([attack_shape(energy, attacks(energy)) for energy in map(band_energy, waves)])
    mean = np.stack([x[kind == k].mean(0) if (kind == k).any() else x.mean(0) for k in range(len(CLASSES))])
    spread = np.cov((x - mean[kind]).T)
    precision = np.linalg.inv(0.9 * spread + 0.1 * np.trace(spread) / len(spread) * np.eye(len(spread)))
    common.save_pt(path, {"mean": torch.from_numpy(mean), "precision": torch.from_numpy(precision)})


def judge(run, audios):
    """audios: list of (clip line, wav path) -> dict of (n,) arrays: semantic, 1 where the class is recognised; sync_s,
    attacks and hits matched one to one, 0.4 s for each without a partner; aesthetic, 1 where reverberant."""
    from scipy.optimize import linear_sum_assignment

    state = common.load_pt(Path(run) / "00_judge.pt", {"mean": common.FLOATS, "precision": common.FLOATS})
    mean, precision = (state[name].numpy() for name in ("mean", "precision"))
    truths, rows = truth_of(run, audios), []
    for clip, path in audios:
        energy, truth = band_energy(common.read_audio(path, RATE_HZ)), truths[clip["id"]]
        at, hits = attacks(energy), np.array(truth["hits_s"])
        away = attack_shape(energy, at) - mean
        named = ((away @ precision) * away).sum(1).argmin()
        apart = np.minimum(np.abs(at[:, None] * STRIDE / RATE_HZ - hits), 0.4)
        matched = apart[linear_sum_assignment(apart)]
        sync = (matched.sum() + 0.4 * (max(apart.shape) - len(matched))) / max(apart.shape)
        rows.append((named == truth["class"], sync, float(late_db(energy, at) > LATE_DB)))
    return dict(zip(("semantic", "sync_s", "aesthetic"), np.array(rows).reshape(-1, 3).T))


def oracle_scores(run, audios):
    """audios: list of (clip line, wav path) -> dict of (n,) arrays for stage 07's oracle and judge columns."""
    seen = examine(run, audios)
    seen["aesthetic"] = (seen["wet_db"] > WET_DB).astype(np.float64)
    return {f"oracle_{k}": v for k, v in seen.items()} | {f"judge_{k}": v for k, v in judge(run, audios).items()}


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------


def build(run, pool, size, seed):
    """All that is not there yet, the longest training first. Returns lines of clips.jsonl, of the truth."""
    began, data = time.monotonic(), {}

    def each(function, jobs, title):
        return list(tqdm(pool.map(function, jobs), title, total=len(jobs), disable=None, mininterval=1))

    def draw(*corpora):
        rows = iter(each(corpus_clip, [(seed, name, i) for name in corpora for i in range(size[name])], corpora[0]))
        for name in corpora:
            part = [next(rows) for _ in range(size[name])]
            data[name] = {key: torch.from_numpy(np.stack([row[key] for row in part])) for key in part[0]}

    def train(function, files, *corpora):
        if not all(file.exists() for file in files):
            running.append(pool.submit(function, *files, *(data[name] for name in corpora), codec, size, seed))

    base, scorers, oracle, judged = files = [run / f"00_{x}.pt" for x in ("base", "scorers", "oracle", "judge")]
    todo, running = not all(file.exists() for file in files), []
    if todo:
        draw("pretrain")
        codec = Codec.fit(data["pretrain"]["mel"])
        print(f"pre-training clips: {size['pretrain']} ({time.monotonic() - began:.0f} s)", flush=True)
        train(train_base, [base], "pretrain")
        draw("scorer", "oracle", "judge")
        train(train_scorers, [scorers, oracle], "scorer", "oracle")
        train(train_judge, [judged], "judge")
    jobs = [(run / "00_videos", seed, split, i) for split in ("train", "val", "test") for i in range(size[split])]
    clips = each(write_clip, jobs, "videos")  # small jobs last, for whichever process has no training left
    print(f"videos: {len(clips)} files in {run / '00_videos'} ({time.monotonic() - began:.0f} s)", flush=True)
    for training in running:
        training.result()
    if todo:
        print(f"networks: base model, scorers, oracle, judge ({time.monotonic() - began:.0f} s)", flush=True)
    return clips


def begin(parent, ends):
    """In a process of the pool."""
    global ENDS
    ENDS = ends
    common.end_with(parent)


def start_pool(processes):
    """Of so many processes, or of a thread where there are none."""
    global ENDS
    ENDS = SimpleNamespace(value=False)
    if not processes:
        return ThreadPoolExecutor(1)
    spawn = multiprocessing.get_context("spawn")
    ENDS = spawn.RawValue("b", False)  # in memory that the processes share
    pool = ProcessPoolExecutor(processes, spawn, begin, (os.getpid(), ENDS))
    with common.deaf_to_ctrl_c():
        for _ in range(processes):
            pool.submit(os.getpid)  # each starts one
    return pool


def main(args):
    run, size = Path(args.run_dir), SIZES[args.size]
    settings = {"seed": args.seed, "size": args.size, **size}
    common.hold(run, "00", common.Ranks())
    common.claim(run, "00_settings.json", settings, advice="use another --run-dir")
    with start_pool(size["processes"]) as pool:
        try:
            clips, truths = zip(*build(run, pool, size, args.seed))
        except BaseException:
            ENDS.value = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for name, rows in (("00_truth.jsonl", truths), ("clips.jsonl", clips)):
        if not (run / name).exists():
            common.write_jsonl(run / name, rows)
    if not (run / "run.json").exists():  # stage 01 completes it later
        about = dict(model="toy", checkpoint="00_base.pt", checkpoint_digest=common.digest(run / "00_base.pt"))
        about |= dict(size=args.size, world_seed=args.seed, scorers="toy", scorers_root=".", video_root="00_videos")
        common.write_json(run / "run.json", about | dict(clip_s=CLIP_S, rater_noise=1.0, defaults=DEFAULTS[args.size]))
    splits = ", ".join(f"{size[split]} {split}" for split in ("train", "val", "test"))
    print(f"toy world ({args.size}, seed {args.seed}): {len(clips)} clips ({splits})")
    print(f"next: python 01_generate.py --run-dir {run}")


if __name__ == "__main__":
    common.launch(main, parse_args)
