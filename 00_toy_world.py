"""Builds the toy world: a small audio-visual world, with a flow model and scorers trained on it.

Stands in for what the paper takes from elsewhere: VGGSound (Sec. 2.1), a pre-trained V2A model
(Sec. 3.1), the frozen scorers of AudioScore and the human raters. This stage draws the clips and
trains the networks. The networks themselves, as the other stages use them, are in adapters/toy.py.
In adapters/toy_people.py are the simulated people, who rate and choose by the measures of an
oracle, which knows the truth of each clip; and a judge, which measures the same in other ways, and
by which nobody rates, so that nothing is trained towards it.

Run:   python 00_toy_world.py
       python 00_toy_world.py --run-dir runs/small --size tiny       (for the tests)
Takes: 112 s on 2 cores in two processes, no GPU; --size tiny about 20 s in one process.
Writes, in --run-dir:
  run.json         model "toy", checkpoint, its digest, size, world_seed, rater_noise, scorers,
                   video_root, clip_s (seconds), and `defaults`: this world's replacements for the
                   paper's numbers, by stage (DEFAULTS below). rater_noise: how unsteady the
                   simulated people are; 1 is usual, 0 none
  clips.jsonl      id, video, caption (or null), label, split (train, val, test)
  00_truth.jsonl   id, class, hits_s (seconds): read only by oracle, judge and simulated people
  00_base.pt       net (the velocity network), encoder, codec, vocabulary
  00_scorers.pt    small networks in the places of imagebind, clap, synchformer and panns (state
                   dicts), codec, vocabulary; PESQ needs no network
  00_twin.pt       tagger: a second tagger that is no part of AudioScore, in the place of PaSST;
                   only stage 07 reads it
  00_oracle.pt     the oracle's classifier; only the simulated people and the oracle read it
  00_judge.pt      the judge's classifier: the mean of each class and the precision matrix
  00_videos/*.mp4  64 x 64, 25 frames per second, 2 s, H.264 (yuv420p) and AAC
  00_settings.json the settings that the folder was made with

The world (docs/toy.md). An object bounces, and every time it touches the ground it makes a sound.
Its outline and colour together decide which of eight sounds that is, so a model must see what the
object is (semantic consistency) and when it hits (temporal alignment). All randomness of a clip
comes from (seed, corpus, index), where a corpus is a set of clips of one use, such as pretrain or
test. The pre-training data are imperfect: a tenth of their sounds belongs to another class, a third
comes too early or too late, a third is noisy, each drawn by itself. A model that fits them makes
the same errors at random in its own samples, and preferences can tell these samples apart. Some
clips are reverberant. Reverberation stands for the aesthetic appeal of Sec. 2.2: the simulated
people like it, and no scorer is built to hear it, so that human pairs alone can teach it. Whether
they do is in docs/evidence.md.

All pictures, including those that only train networks, are written as H.264 and read back by the
same reader.
"""

import math
import multiprocessing
import os
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from adapters.toy import (
    CAPTIONS,
    CHANNELS,
    CLIP_S,
    EMBED,
    FPS,
    FRAMES,
    LABELS,
    MEL_FRAMES,
    MELS,
    OPENINGS,
    PATCH,
    PIXELS,
    RATE_HZ,
    SAMPLES,
    SPEECH,
    TOKENS,
    VOCABULARY,
    AudioTower,
    Codec,
    SyncNet,
    ToyNet,
    VideoEncoder,
    frame_transform,
    log_mel,
    picture_moments,
    scorer_networks,
    words,
)
from adapters.toy_people import Truth, attack_shape, band_energy, find_attacks
from common import ahead, command, files, media, record, rows, run_flag, stop

# For each size: how many clips, optimizer steps, and processes besides the main one.
SIZES = {
    "default": dict(
        train=720,
        val=100,
        test=200,
        pretrain=1500,
        scorer=700,
        oracle=300,
        judge=300,
        twin=300,
        processes=2,
        batch=64,
        encoder_steps=300,
        base_steps=750,
        scorer_steps=200,
        sync_steps=400,
    ),
    "tiny": dict(
        train=20,
        val=6,
        test=8,
        pretrain=96,
        scorer=32,
        oracle=48,
        judge=64,
        twin=32,
        processes=0,
        batch=16,
        encoder_steps=120,
        base_steps=400,
        scorer_steps=60,
        sync_steps=80,
    ),
}
SIZES["large"] = SIZES["default"] | dict(train=2400, val=200)

# This world's replacements for the paper's numbers, chosen on its val split:
# {size: {stage: {argument: value}}}.
DEFAULTS = {
    "default": {
        "01": dict(guidance=1.5, sampling_steps=8, batch_clips=8),
        "02": dict(num_rated_clips=180),
        "03": dict(num_human_pairs=180),
        "04": dict(threshold=0.35),
        "05": dict(
            lr=7e-5, warmup=20, steps=160, global_batch=32, beta=20.0, ema=0.2, save_every=40
        ),
        "06": dict(
            lr=1e-4,
            steps=160,
            prompts=4,
            group_size=16,
            sampling_steps=10,
            updates=8,
            eta=1.0,
            micro_batch=32,
            save_every=5,
        ),
        "07": dict(guidance=1.5),
    },
    "tiny": {
        "01": dict(guidance=1.5, sampling_steps=8),
        "02": dict(num_rated_clips=8),
        "03": dict(num_human_pairs=12),
        "04": dict(threshold=0.1),
        "05": dict(lr=1e-4, warmup=2, steps=8, global_batch=4, beta=20.0),
        "06": dict(lr=3e-4, steps=4, prompts=2, group_size=3, sampling_steps=4, updates=2),
        "07": dict(guidance=1.5),
    },
}
DEFAULTS["large"] = DEFAULTS["default"] | {
    "02": dict(num_rated_clips=400),
    "03": dict(num_human_pairs=400),
    "05": DEFAULTS["default"]["05"] | dict(steps=250),  # fewer than four passes
    "06": DEFAULTS["default"]["06"] | dict(steps=250),
}

# The clips of `rows.SPLITS` become files; those of the other corpora only train networks. The place
# of a corpus in this list is part of its clips' seeds, so the order must stay.
CORPORA = ("train", "val", "test", "pretrain", "scorer", "oracle", "judge", "twin")
NETWORKS = ("00_base.pt", "00_scorers.pt", "00_oracle.pt", "00_judge.pt", "00_twin.pt")


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    add = parser.engineering.add_argument
    add("--seed", type=command.whole(0), default=0, help="seed of every clip and network")
    add("--size", choices=list(SIZES), default="default", help="tiny: for tests; large: more clips")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# One clip: script, sound, picture
# --------------------------------------------------------------------------------------------------


@dataclass
class Script:
    """What happens in a clip. Amplitudes are shares of full scale."""

    kind: int  # class of the object that is seen, its place in LABELS
    hits_s: np.ndarray  # when it touches the ground, seconds
    caption: str | None
    sound_kind: int  # class of what is heard
    sound_s: np.ndarray  # when it is heard
    noise: float  # amplitude
    wet: float  # amplitude of a room's reverberation, 0: none
    rng: np.random.Generator  # of sound, then picture


def draw_script(seed, corpus, index):
    """Everything that happens in a clip; its samples and pixels are drawn from this."""
    rng = np.random.default_rng([seed, CORPORA.index(corpus), index])
    kind = int(rng.integers(len(LABELS)))
    count = int(rng.choice([2, 3, 4], p=[0.6, 0.3, 0.1]))
    first = 0.34  # seconds; a clip begins with silence
    last = 1.56
    gap = 0.38  # at least, between two hits
    spread = np.sort(rng.uniform(0, last - first - gap * (count - 1), count))
    hits_s = first + spread + gap * np.arange(count)
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    caption = opening + CAPTIONS[LABELS[kind]]
    if rng.random() < 0.1:
        caption = None
    script = Script(
        kind=kind,
        hits_s=hits_s,
        caption=caption,
        sound_kind=kind,
        sound_s=hits_s,
        noise=2e-4,
        wet=0.0,
        rng=rng,
    )

    class_chance, time_chance, noise_chance, room_chance = rng.random(4)
    if corpus == "pretrain":  # the imperfect data
        if class_chance < 0.10:
            script.sound_kind = int((kind + rng.integers(1, len(LABELS))) % len(LABELS))
        if time_chance < 0.35:
            shift = rng.uniform(0.1, 0.45) * rng.choice([-1, 1])
            if hits_s[-1] + shift > 1.7 or hits_s[0] + shift < 0.04:
                shift = -shift
            script.sound_s = np.clip(hits_s + shift, 0.04, 1.7)
        if noise_chance < 0.35:
            script.noise = 10 ** rng.uniform(-2.3, -1.5)
        if room_chance < 0.60:  # of fewer reverberant clips the base model hardly learns
            script.wet = rng.uniform(0.5, 0.9)
    elif corpus in ("scorer", "oracle", "judge", "twin"):  # right class and time, any acoustics
        if noise_chance < 0.5:
            script.noise = 10 ** rng.uniform(-3.2, -1.5)
        if room_chance < 0.5:
            script.wet = rng.uniform(0.3, 1.0)
    elif room_chance < 0.5:  # train, val, test: right and clean, half of them reverberant
        script.wet = rng.uniform(0.5, 0.9)
    return script


EVENT_S = np.arange(int(0.35 * RATE_HZ)) / RATE_HZ  # times of the samples of one hit


def decay(time_constant_s):
    return np.exp(-EVENT_S / time_constant_s)


def draw_syllable(phase):
    """One vowel with hard edges, 0.26 s: PESQ finds no utterance in soft or shorter ones."""
    harmonic = np.arange(1, 28)[:, None]
    hz = 130 * harmonic
    gains = 0
    for formant_hz, width_hz, gain in ((700, 130, 1), (1220, 150, 0.6), (2600, 200, 0.3)):
        gains = gains + gain * np.exp(-(((hz - formant_hz) / width_hz) ** 2))
    # Each harmonic begins at another phase, or their peaks would add up to a click.
    start = harmonic * harmonic
    y = (gains * np.sin(hz * phase + start)).sum(axis=0)
    edges = np.minimum(EVENT_S, 0.26 - EVENT_S) / 0.006
    return y * np.clip(edges, 0, 1)


def draw_event(kind, pitch, rng):
    """One hit of a class: (5600,) samples, peak 1. pitch: a factor on all frequencies."""
    t = EVENT_S
    phase = 2 * np.pi * pitch * t  # of a tone of 1 Hz

    def tone(hz, time_constant_s, gain=1.0):
        return gain * np.sin(hz * phase) * decay(time_constant_s)

    label = LABELS[kind]
    if label == "bell ringing":
        y = tone(620, 0.06) + tone(1710, 0.045, 0.6) + tone(2930, 0.03, 0.4)
    elif label == "wood block knocking":
        y = tone(310, 0.02) + tone(830, 0.012, 0.7)
        y[:32] += 0.5 * rng.standard_normal(32)
    elif label == "snare drum":
        y = rng.standard_normal(len(t)) * decay(0.03) + tone(190, 0.04)
    elif label == "water dripping":  # its pitch rises
        y = np.sin(700 * phase * (1 + 9 * t)) * decay(0.035)
    elif label == "synthesizer":  # frequency modulation
        modulation = 6 * decay(0.05) * np.sin(1150 * phase)
        y = np.sin(440 * phase + modulation) * decay(0.045)
    elif label == "person speaking":
        y = draw_syllable(phase)
    elif label == "bass drum":
        cycles = 55 * t + 3.2 * (1 - decay(0.025))  # up to time t; from 183 Hz down to 55 Hz
        y = np.sin(2 * np.pi * cycles * pitch) * decay(0.05)
    else:  # hi-hat
        y = np.diff(rng.standard_normal(len(t) + 2), n=2) * decay(0.012)
    y = y * np.clip((0.35 - t) / 0.05, 0, 1)
    return y / np.abs(y).max()


def draw_sound(script):
    """The clip's soundtrack: (32000,) float32."""
    rng = script.rng
    semitones = rng.uniform(-2, 2)
    if script.sound_kind == SPEECH:
        semitones *= 0.1  # one speaker, since PESQ compares with the clip's own sound
    pitch = 2 ** (semitones / 12)
    wave = np.zeros(SAMPLES + len(EVENT_S))
    for hit_s in script.sound_s:
        start = round(hit_s * RATE_HZ)
        amplitude = 0.5 * rng.uniform(0.7, 1)
        wave[start : start + len(EVENT_S)] += amplitude * draw_event(script.sound_kind, pitch, rng)
    wave = wave[:SAMPLES]
    if script.wet:
        wave = wave + reverberation(wave, script.wet, rng)
    wave = wave + script.noise * rng.standard_normal(SAMPLES)
    wave = wave / max(1.0, np.abs(wave).max() / 0.95)  # what is too loud is turned down
    # Rounded to 16 bits, because the finer digits of sin and exp differ between CPUs.
    return np.round(wave * 2**15).astype(np.float32) / 2**15


def reverberation(wave, wet, rng):
    """What a room adds: the wave through exponentially decaying noise of amplitude `wet`."""
    t = np.arange(int(0.6 * RATE_HZ)) / RATE_HZ
    room = rng.standard_normal(len(t)) * np.exp(-t / 0.13) * (t > 0.01)
    room *= wet / np.sqrt((room**2).sum())
    size = 1 << 16  # of the transform
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(room, size)
    return np.fft.irfft(spectrum, size)[:SAMPLES]


def draw_picture(script):
    """(50, 64, 64, 3) uint8. The object flies in parabolas, whose lowest points are the hits."""
    rng = script.rng
    t = np.arange(FRAMES) / FPS
    # The first flight begins before the clip and the last one ends after it, so that every lowest
    # point in the clip is a hit.
    touches = np.concatenate([[-0.2], script.hits_s, [CLIP_S + 0.2]])
    flight = np.searchsorted(touches, t, side="right") - 1
    gap = touches[flight + 1] - touches[flight]
    u = (t - touches[flight]) / gap  # 0 to 1 within a flight
    # 4 u (1 - u) is a parabola of height 1.
    centre_y = 0.8 - np.minimum(0.6, 0.25 + 0.5 * gap) * 4 * u * (1 - u)
    centre_x = rng.uniform(0.3, 0.7) + rng.uniform(-0.1, 0.1) * t
    radius = rng.uniform(0.09, 0.14)
    inside = object_mask(script.kind // 2, centre_x, centre_y, radius)

    warm = script.kind % 2 == 0
    colour = np.array([0.8, 0.4, 0.2] if warm else [0.2, 0.45, 0.8])
    colour = 255 * (colour + rng.uniform(-0.1, 0.1, 3))
    ground = np.float32(255 * rng.uniform(0.1, 0.35))
    grain = np.frombuffer(rng.bytes(inside.size), np.uint8).reshape(inside.shape) >> 4
    picture = np.empty((*inside.shape, 3), np.uint8)
    for channel in range(3):  # takes half the time of all three channels at once
        contrast = np.float32(colour[channel] - ground)
        picture[..., channel] = (ground + inside * contrast).astype(np.uint8) + grain
    return picture


def object_mask(outline, centre_x, centre_y, radius):
    """(50, 64, 64) float32: how much of each pixel is the object. centre_x, centre_y: (50,), shares
    of the picture; outline: 0 disc, 1 ring, 2 wide bar, 3 tall bar."""
    grid = ((np.arange(PIXELS) + 0.5) / PIXELS).astype(np.float32)
    dx = np.abs(grid - centre_x[:, None])[:, None, :].astype(np.float32)
    dy = np.abs(grid - centre_y[:, None])[:, :, None].astype(np.float32)
    if outline == 0:
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif outline == 1:
        distance = np.abs(np.sqrt(dx * dx + dy * dy) - radius) - 0.3 * radius
    elif outline == 2:
        distance = np.maximum(dx - 1.5 * radius, dy - 0.55 * radius)
    else:
        distance = np.maximum(dx - 0.55 * radius, dy - 1.5 * radius)
    return np.clip(np.float32(0.5) - distance * PIXELS, 0, 1)


def write_mp4(path, picture, sound=None):
    """H.264 and AAC in one file, by one encoder thread: the bytes must not depend on the number of
    cores."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": "23", "threads": "1"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        if sound is not None:
            options = {"b": "64000", "aac_coder": "fast"}
            audio = container.add_stream("aac", rate=RATE_HZ, layout="mono", options=options)
        media.encode_picture(container, video, picture)
        if sound is None:
            return
        for start in range(0, SAMPLES, 1024):
            samples = sound[None, start : start + 1024]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = RATE_HZ
            frame.pts = start
            frame.time_base = Fraction(1, RATE_HZ)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def write_clip(job):
    """Pool job: one video of the train, val or test split, unless it is there. Returns its lines of
    clips.jsonl and 00_truth.jsonl."""
    folder, seed, split, index = job
    script = draw_script(seed, split, index)
    name = f"{split}{index:05d}"
    path = Path(folder) / f"{name}.mp4"
    if not path.exists():
        sound = draw_sound(script)
        picture = draw_picture(script)
        with files.replacing(path) as temporary:
            write_mp4(temporary, picture, sound)
    clip = rows.Clip(
        id=name,
        video=path.name,
        caption=script.caption,
        label=LABELS[script.kind],
        split=split,
    )
    truth = Truth(
        id=name,
        kind=script.kind,
        hits_s=[round(float(hit), 4) for hit in script.hits_s],
    )
    return clip, truth


def corpus_clip(job):
    """Pool job: one clip that only trains networks. Returns a dict of arrays.

    The judge's corpus has kind and wave (32000,). The oracle's has kind and mel (100, 64). The
    twin's has these two and noisiness (0 to 1). All others have these three and moments (50, 10),
    text (V,) and strike (50,), which is 1 at a hit.
    """
    seed, corpus, index = job
    script = draw_script(seed, corpus, index)
    sound = draw_sound(script)
    if corpus == "judge":
        return {"kind": script.kind, "wave": sound}
    clip = {"kind": script.kind, "mel": log_mel(torch.from_numpy(sound)[None])[0].numpy()}
    if corpus == "oracle":
        return clip
    # `draw_script` draws noise between amplitudes of 10^-3.2 and 10^-1.5.
    noisiness = np.clip((np.log10(script.noise) + 3.2) / 1.7, 0, 1)
    clip["noisiness"] = np.float32(noisiness)
    if corpus == "twin":
        return clip
    with tempfile.TemporaryDirectory() as folder:  # through H.264, as the stages see their videos
        path = Path(folder) / "clip.mp4"
        write_mp4(path, draw_picture(script))
        (frames,) = media.read_frames(path, [(FPS, frame_transform)], CLIP_S)
    from_hits_s = np.arange(FRAMES)[:, None] / FPS - script.hits_s
    strike = np.exp(-0.5 * (from_hits_s / 0.03) ** 2).max(axis=1)
    clip["moments"] = picture_moments(frames).numpy()
    clip["text"] = words(script.caption).numpy()
    clip["strike"] = strike.astype(np.float32)
    return clip


# --------------------------------------------------------------------------------------------------
# Training. `clips` is a whole corpus: the arrays of `corpus_clip`, stacked. A loss takes a network,
# a random generator, and a batch: the same rows of each of some tensors
# --------------------------------------------------------------------------------------------------


def fit(title, net, loss, data, steps, batch, seed, bar_line=0):
    """AdamW on random batches of the clips: 20 steps of warm-up, then a cosine to zero; gradients
    are clipped at norm 1.

    data: tensors with a row for each clip; loss(net, generator, *their rows) -> scalar; bar_line:
    the terminal's line for the progress bar, since two processes train side by side. Returns {name:
    average weight} over the steps, in which step k of n counts as (k / n)^9, so that about the last
    tenth of the steps matters.
    """
    lr = 2e-3
    count = len(data[0])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    averages = {key: value.clone() for key, value in net.state_dict().items()}
    for step in tqdm(range(steps), title, position=bar_line, disable=None, mininterval=1):
        if signal.SIGINT in signal.sigpending():  # held back in the processes of `start_pool`
            stop(f"{title}: interrupted")
        warmup = min(1, (step + 1) / 20)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * warmup * cosine
        i = torch.randint(count, (min(batch, count),), generator=generator)
        value = loss(net, generator, *[tensor[i] for tensor in data])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for key, value in net.state_dict().items():
            averages[key].lerp_(value, 10 / (step + 11))
    return averages


def fit_codec(mel):
    """PCA of patches. mel: (N, 100, 64).

    Half-whitened: each component is divided by the square root of its deviation. That is a
    compromise between no whitening and full whitening, which would make the network spend its
    capacity on inaudible components. `deviation.mean()` makes the latent's overall variance 1.
    """
    codec = Codec()
    patches = mel.reshape(-1, PATCH * MELS).double()
    variances, vectors = torch.linalg.eigh(patches.T.cov())  # the largest last
    deviation = variances.flip(0)[:CHANNELS].sqrt()
    vectors = vectors.flip(1)[:, :CHANNELS]
    scale = (deviation * deviation.mean()).sqrt()
    codec.mean.copy_(patches.mean(0))
    codec.down.copy_(vectors / scale)
    codec.up.copy_((vectors * scale).T)
    return codec


def half_as_generated(mel, codec):
    """mel: (N, 100, 64). Every second row is passed through latents, Griffin-Lim and the analysis,
    as generated audio would be. Networks that never met the phases that Griffin-Lim invents mistake
    bells for synthesizers."""
    mel = mel.clone()
    mel[::2] = log_mel(codec.decode(codec.encode(mel[::2])))
    return mel


def encoder_loss(encoder, generator, moments, strike, kind):
    """The video encoder's loss: it is to mark the frames with a hit and to name the class."""
    per_frame, pooled = encoder(moments)
    marks = encoder.strike(per_frame)[..., 0]
    weight = torch.tensor(4.0)  # of frames with a hit, which are few
    mark_loss = F.binary_cross_entropy_with_logits(marks, strike, pos_weight=weight)
    return mark_loss + F.cross_entropy(encoder.kind(pooled), kind)


def flow_loss(net, generator, a_0, per_token, pooled, text):
    """The velocity network's loss."""
    # Logit-normal, as MMAudio was pre-trained; Flow-DPO draws t uniformly.
    t = torch.sigmoid(torch.randn(len(a_0), generator=generator))
    eps = torch.randn(a_0.shape, generator=generator)
    a_t, v = common.interpolate(a_0, eps, t)
    # A tenth of the clips are seen without conditions, which teaches the unconditional velocity
    # that guidance needs, and a tenth without text.
    drop, drop_text = torch.rand(2, len(a_0), 1, generator=generator) < 0.1
    given = net.condition(per_token, pooled, text * ~drop_text)
    null = net.null(given)
    conditions = {
        "tokens": torch.where(drop[..., None], null["tokens"], given["tokens"]),
        "vector": torch.where(drop, null["vector"], given["vector"]),
    }
    return common.flow_error(v, net(a_t, t, conditions)).mean()


def train_base(run, clips, codec, size, seed):
    """The frozen video encoder, then rectified flow on the imperfect corpus."""
    torch.manual_seed(seed + 1)
    encoder = VideoEncoder()
    net = ToyNet()
    batch = size["batch"]
    moments = clips["moments"]
    data = (moments, clips["strike"], clips["kind"])
    fit("video encoder", encoder, encoder_loss, data, size["encoder_steps"], batch, seed)

    with torch.no_grad():
        latents = codec.encode(clips["mel"])
        per_frame, pooled = encoder(moments)
    data = (latents, per_frame.reshape(-1, TOKENS, 2 * EMBED), pooled, clips["text"])
    averages = fit("base model", net, flow_loss, data, size["base_steps"], batch, seed)
    state = {
        "kind": "toy base",
        "vocabulary": VOCABULARY,
        "net": averages,
        "encoder": encoder.state_dict(),
        "codec": codec.state_dict(),
    }
    files.save_pt(run / "00_base.pt", state)


def match_loss(match, generator, mel, other, kind):
    """The contrastive loss of a `Match`, on B sounds (rows) and their videos or captions (columns).
    All clips of one class are positives of each other: a Match learns what sounds, not when."""
    sound = match.sound(mel)[:, None]
    cosine = F.cosine_similarity(sound, match.other(other)[None], dim=-1)
    same = (kind[:, None] == kind).float()
    same = same / same.sum(1, keepdim=True)  # columns sum to 1 as well: the matrix is symmetric
    both = (10 * cosine).log_softmax(0) + (10 * cosine).log_softmax(1)
    return -(same * both).sum(1).mean()


def tag_loss(tower, generator, mel, tags):
    return F.cross_entropy(tower(mel), tags)


def doubtful_tags(clips):
    """A tagger's targets, (N, 8): it is to be less sure of a noisier sound. With hard labels it
    would not react to noise, and neither would score_4."""
    doubt = 0.9 * clips["noisiness"][:, None]
    return F.one_hot(clips["kind"], len(LABELS)) * (1 - doubt) + doubt / len(LABELS)


def lag_loss(synchformer, generator, mel, moments, quiet):
    """The loss of a `SyncNet`: it is to say by how many video frames each sound was delayed."""
    most = SyncNet.LAGS
    lag = torch.randint(-most, most + 1, (len(mel),), generator=generator)
    late = shifted(mel, lag, quiet)
    logits = synchformer(late, synchformer.embed_picture(moments))
    return F.cross_entropy(logits, lag + most)


def shifted(mel, lag, quiet):
    """Each row of mel (B, 100, 64) delayed by lag (B,) video frames; the gap is filled with quiet
    (B, 1, 64)."""
    place = torch.arange(MEL_FRAMES) - MEL_FRAMES // FRAMES * lag[:, None]
    index = place.clamp(0, MEL_FRAMES - 1)[..., None].expand_as(mel)
    inside = (place >= 0) & (place < MEL_FRAMES)
    return torch.where(inside[..., None], mel.gather(1, index), quiet)


def train_scorers(run, clips, oracle_clips, codec, size, seed):
    """The four learned scorers, then the oracle's classifier, which has clips of its own."""
    torch.manual_seed(seed + 2)
    networks = scorer_networks()
    oracle = AudioTower(len(LABELS))

    mel = half_as_generated(clips["mel"], codec)
    moments = clips["moments"]
    text = clips["text"]
    kind = clips["kind"]
    quiet = mel.quantile(0.1, dim=1, keepdim=True)
    tags = doubtful_tags(clips)
    captioned = text.any(1)
    oracle_mel = half_as_generated(oracle_clips["mel"], codec)

    said = (mel[captioned], text[captioned], kind[captioned])
    heard = (oracle_mel, oracle_clips["kind"])
    few = size["scorer_steps"]
    more = size["sync_steps"]
    for name, network, loss, data, steps in (
        ("imagebind", networks["imagebind"], match_loss, (mel, moments, kind), few),
        ("clap", networks["clap"], match_loss, said, few),
        ("synchformer", networks["synchformer"], lag_loss, (mel, moments, quiet), more),
        ("panns", networks["panns"], tag_loss, (mel, tags), few),
        ("oracle", oracle, tag_loss, heard, few),
    ):
        fit(name, network, loss, data, steps, size["batch"], seed, bar_line=1)

    state = {"kind": "toy scorers", "vocabulary": VOCABULARY, "codec": codec.state_dict()}
    for name, network in networks.items():
        state[name] = network.state_dict()
    files.save_pt(run / "00_scorers.pt", state)
    files.save_pt(run / "00_oracle.pt", {"kind": "toy oracle", "classifier": oracle.state_dict()})


def train_twin(run, clips, codec, size, seed):
    """The tagger's twin: the same network and task, other clips and other initial weights."""
    torch.manual_seed(seed + 3)
    twin = AudioTower(len(LABELS))
    data = (half_as_generated(clips["mel"], codec), doubtful_tags(clips))
    fit("twin", twin, tag_loss, data, size["scorer_steps"], size["batch"], seed, bar_line=1)
    files.save_pt(run / "00_twin.pt", {"kind": "toy twin", "tagger": twin.state_dict()})


def train_judge(run, clips, codec):
    """Linear discriminant analysis: a Gaussian of `attack_shape` for every class, all of one
    covariance."""
    waves = clips["wave"].clone()
    kind = clips["kind"].numpy()
    waves[::2] = codec.decode(codec.encode(log_mel(waves[::2])))  # as in `half_as_generated`
    shapes = []
    for wave in waves:
        energy = band_energy(wave)
        shapes.append(attack_shape(energy, find_attacks(energy)))
    shapes = np.stack(shapes)
    means = []
    for k in range(len(LABELS)):
        own = shapes[kind == k]
        means.append(own.mean(0) if len(own) else shapes.mean(0))
    mean = np.stack(means)
    covariance = np.cov((shapes - mean[kind]).T)
    count = len(covariance)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / count * np.eye(count)
    precision = torch.linalg.inv(torch.from_numpy(shrunk))
    state = {"mean": torch.from_numpy(mean), "precision": precision}
    files.save_pt(run / "00_judge.pt", state)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


@contextmanager
def start_pool(processes):
    """Yields a pool of this many processes for clips and trainings; None for 0 of them: then this
    process does everything.

    Ctrl-C in a terminal reaches every process, but only this one is to answer it: the others hold
    it back (`in_pool`). When this process is interrupted or fails, it sends an interrupt to each of
    them, and `fit` ends a training as soon as it finds one held back.
    """
    if not processes:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, ahead.end_with, (os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
            raise


def in_pool(pool, function, jobs, title):
    """[function(job) for job in jobs], by the pool's processes if there is one."""
    if pool is None:
        results = map(function, jobs)
    else:
        with ahead.deaf_to_ctrl_c():  # the processes start with their first jobs
            results = pool.map(function, jobs)
    return list(tqdm(results, title, total=len(jobs), disable=None, mininterval=1))


def draw_corpus(pool, corpus, size, seed):
    """The clips of a corpus: {name: (N, ...) tensor}."""
    jobs = [(seed, corpus, index) for index in range(size[corpus])]
    drawn = in_pool(pool, corpus_clip, jobs, corpus)
    clips = {}
    for name in drawn[0]:
        clips[name] = torch.from_numpy(np.stack([clip[name] for clip in drawn]))
    return clips


def start_trainings(pool, run, size, seed):
    """Trains all networks, the longest training first. Returns the futures of the trainings that
    run in other processes."""
    trainings = []

    def start(training, *given):
        if pool is None:
            training(run, *given)
        else:
            trainings.append(pool.submit(training, run, *given))

    imperfect = draw_corpus(pool, "pretrain", size, seed)
    codec = fit_codec(imperfect["mel"])
    start(train_base, imperfect, codec, size, seed)
    for_scorers = draw_corpus(pool, "scorer", size, seed)
    for_oracle = draw_corpus(pool, "oracle", size, seed)
    start(train_scorers, for_scorers, for_oracle, codec, size, seed)
    start(train_judge, draw_corpus(pool, "judge", size, seed), codec)
    start(train_twin, draw_corpus(pool, "twin", size, seed), codec, size, seed)
    return trainings


def main(args):
    run = Path(args.run_dir)
    size = SIZES[args.size]
    videos = run / "00_videos"
    with record.stage(run, "00", advice="use another --run-dir") as stage:
        stage.claim({"seed": args.seed, "size": args.size, **size})
        with start_pool(size["processes"]) as pool:
            trainings = []
            if not all((run / name).exists() for name in NETWORKS):
                trainings = start_trainings(pool, run, size, args.seed)
            # The trainings now run in the pool's processes. Videos are small jobs, for whichever
            # process has no training left.
            jobs = []
            for split in rows.SPLITS:
                jobs += [(videos, args.seed, split, index) for index in range(size[split])]
            built = in_pool(pool, write_clip, jobs, "videos")
            for training in trainings:
                training.result()
        rows.write(run / "00_truth.jsonl", [truth for _, truth in built])
        rows.write(run / "clips.jsonl", [clip for clip, _ in built])
        if not (run / "run.json").exists():  # stage 01 completes it later
            world = rows.World(
                model="toy",
                checkpoint="00_base.pt",
                checkpoint_digest=files.digest(run / "00_base.pt"),
                size=args.size,
                world_seed=args.seed,
                scorers="toy",
                scorers_root=".",
                video_root="00_videos",
                clip_s=CLIP_S,
                rater_noise=1.0,
                defaults=DEFAULTS[args.size],
            )
            rows.write_json(run / "run.json", world)
    splits = ", ".join(f"{size[split]} {split}" for split in rows.SPLITS)
    print(f"toy world ({args.size}, seed {args.seed}): {len(built)} clips ({splits})")
    print(f"next: python 01_generate.py {run_flag(run)}")


if __name__ == "__main__":
    command.launch(main, parse_args)
