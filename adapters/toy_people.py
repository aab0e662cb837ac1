"""The toy world's simulated people, its oracle and its judge (docs/toy.md).

Raters answer in stage 02 and choosers in stage 03; in stage 07 oracle and judge say what is true,
and 08 marks the true hits. Only this file reads 00_truth.jsonl, 00_oracle.pt and 00_judge.pt.

The oracle's classifier is trained on clips that no scorer saw, but the people answer by its
measures: what learns from them learns from it. The judge is for stage 07 alone: another kind of
classifier, other measures, clips of its own.

How reverberant an audio is, is measured as `wet_db`; an audio that counts as reverberant is what
stage 07 calls `aesthetic`.
"""

import functools
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta

from adapters.toy import (
    CLASSES,
    CLIP_S,
    HOP,
    MEL_FRAMES,
    OTHER_VERSION,
    RATE_HZ,
    SAMPLES,
    AudioTower,
    log_mel,
)
from common import files, inputs, media, rows, seed_of, stop


class Truth(rows.Row, kw_only=True, rename={"kind": "class"}):
    """00_truth.jsonl: what happens in a clip."""

    id: rows.Name
    # Its place in CLASSES.
    kind: Annotated[int, Meta(ge=0, lt=len(CLASSES), description="a class of sound, 0 to 7")]
    hits_s: Annotated[
        list[Annotated[float, Meta(ge=0, le=CLIP_S)]],
        Meta(min_length=1, description="seconds within the clip, at least once"),
    ]
    wet: rows.Number = 0.0  # amplitude of the reverberation


def truth_of(run, clips=()):
    """{clip id: line of 00_truth.jsonl}; those of `clips` must be there."""
    file = Path(run) / "00_truth.jsonl"
    truth = {line.id: line for line in rows.read(file, Truth, f"; it {OTHER_VERSION}")}
    for clip in clips:
        if clip.id not in truth:
            stop(f"{file}: has no line of {clip.id}; it {OTHER_VERSION}")
    return truth


def judge_audios(run, audios, columns, judge):
    """audios: list of (clip line, wav path); judge(wave, truth) -> one number for each of the
    columns. Returns them as a dict of arrays (n,)."""
    truth = truth_of(run, [clip for clip, _ in audios])
    said = np.zeros((len(audios), len(columns)))
    for i, (clip, path) in enumerate(audios):
        said[i] = judge(media.read_audio(path, RATE_HZ), truth[clip.id])
    return dict(zip(columns, said.T))


def judged_samples(wave):
    """(S,) tensor -> (32000,) float64 array, cut or padded; what is not finite is silence."""
    wave = torch.nan_to_num(wave, 0, 0, 0)
    return media.fit_length(wave, SAMPLES).numpy().astype(np.float64)


# --------------------------------------------------------------------------------------------------
# The oracle
# --------------------------------------------------------------------------------------------------

FRAMES_PER_S = RATE_HZ / HOP
FARTHEST_S = 0.4  # a hit that is not heard counts as that far away
CLEAN_FLOOR_DB = -57.0  # of the world's own clean clips; below it nothing is gained
WET_DB = -32.0  # the oracle's: reverberant above this
TAIL = slice(14, 20)  # frames after an onset: 280 to 400 ms


def frame_energy(wave):
    """(S,) tensor -> (100,): energy in windows of 40 ms, centred at k * 20 ms."""
    padded = np.pad(judged_samples(wave), (HOP, HOP))
    frames = np.stack([padded[k * HOP : k * HOP + 2 * HOP] for k in range(MEL_FRAMES)])
    return (frames**2 * np.hanning(2 * HOP)).mean(1) + 1e-12


def find_onsets(level_db):
    """Seconds at which a level rises by 5 dB, to within 18 dB of its loudest: (n,).

    level_db: (100,), one number each 20 ms.
    """
    before = np.stack([np.roll(level_db, k) for k in (1, 2, 3)]).mean(0)
    before[:3] = level_db[:3].min()  # nothing comes before the first frames
    after = np.stack([level_db, np.roll(level_db, -1)]).mean(0)
    rise = after - before
    rise[-1] = 0  # nothing comes after the last
    onsets = []
    for i in range(len(rise)):
        steepest = rise[max(0, i - 5) : i + 6].max()
        reached = level_db[i : i + 4].max()
        if rise[i] > 5 and rise[i] == steepest and reached > level_db.max() - 18:
            onsets.append(i * HOP / RATE_HZ)
    return np.array(onsets)


def onsets_to_hits_s(onsets, hits):
    """Mean distance of onsets to the nearest hit, and of hits to the nearest onset, in seconds."""
    if len(onsets) == 0:
        return FARTHEST_S
    distance = np.minimum(np.abs(onsets[:, None] - hits), FARTHEST_S)
    return 0.5 * (distance.min(0).mean() + distance.min(1).mean())


def tail_energy(energy, onsets, floor):
    """Mean energy 280 to 400 ms after onsets that no other follows within 420 ms, less the floor.

    Without such an onset the audio counts as dry: 0.
    """
    tails = []
    for onset, following in zip(onsets, np.append(onsets[1:], CLIP_S)):
        if following - onset < 0.42:
            continue
        tail = np.median(energy[round(onset * FRAMES_PER_S) :][TAIL])
        # Less is a noisy floor's own ripple, no room.
        tails.append(tail - floor if tail > 3 * floor else 0.0)
    return np.mean(tails) if tails else 0.0


def measure(wave, hits_s):
    """The three measures of an audio (S,) that need no network.

    sync_s: from onsets to hits and back, 0 to 0.4 s; floor_db: of noise, and wet_db: of the tail of
    a room, both in dB of the loudest.
    """
    energy = frame_energy(wave)
    onsets = find_onsets(10 * np.log10(energy))
    ordered = np.sort(energy)
    peak = ordered[-4:].mean()
    floor = ordered[2:8].mean()  # without the two quietest
    tail = tail_energy(energy, onsets, floor)
    return {
        "sync_s": onsets_to_hits_s(onsets, np.asarray(hits_s)),
        "floor_db": max(CLEAN_FLOOR_DB, 10 * np.log10(floor / peak)),
        "wet_db": 10 * np.log10(max(tail / peak, 1e-6)),
    }


@torch.inference_mode()
def ask_oracle(run, audios):
    """audios: list of (clip line, wav path) -> dict of (n,) arrays: `semantic`, the probability of
    the true class, and `measure`'s three."""
    file = Path(run) / "00_oracle.pt"
    state = files.load_pt(file, {"classifier": dict})
    classifier = AudioTower(len(CLASSES))
    files.load_weights(classifier, state["classifier"], file, OTHER_VERSION)

    def judge(wave, truth):
        probabilities = classifier(log_mel(wave[None])).softmax(-1)[0]
        return probabilities[truth.kind].item(), *measure(wave, truth.hits_s).values()

    return judge_audios(run, audios, ("semantic", "sync_s", "floor_db", "wet_db"), judge)


# --------------------------------------------------------------------------------------------------
# Simulated people
# --------------------------------------------------------------------------------------------------


def rater_noise(run):
    """How unsteady this world's people are, as a factor of what they usually are."""
    return inputs.read_run(run, rows.World).rater_noise


def severity(value, slight, grave):
    """0 for no fault, 1 for one above the limit `slight`, 2 for one above `grave`."""
    return int(value > slight) + int(value > grave)


def simulated_ratings(run, audios, seed):
    """What a listener says (Sec. 2.1): one with three faults to look for, unsteady thresholds, and
    a taste for rooms.

    | faults                    | rating                                      |
    |---------------------------|---------------------------------------------|
    | none                      | Good; a third of the dry ones Medium        |
    | slight ones               | Medium; one alone in a clearly wet audio is |
    |                           | forgiven now and then: Good                 |
    | any grave one             | Bad                                         |

    audios: list of (clip line, k, wav path). A rating depends on (seed, clip, k) and the audio, not
    on the order.
    """
    noise = rater_noise(run)
    measured = ask_oracle(run, [(clip, path) for clip, _, path in audios])
    answers = []
    for i, (clip, k, _) in enumerate(audios):
        rng = np.random.default_rng(seed_of(seed, "rater", clip.id, k))
        semantic = measured["semantic"][i] + 0.05 * noise * rng.standard_normal()
        sync_s = measured["sync_s"][i] + 0.02 * noise * rng.standard_normal()
        floor_db = measured["floor_db"][i] + 3 * noise * rng.standard_normal()
        wet_db = measured["wet_db"][i]
        chance = rng.random()

        faults = (
            severity(1 - semantic, 0.2, 0.6),
            severity(sync_s, 0.06, 0.15),
            severity(floor_db, -42, -30),
        )
        forgiven = sum(faults) == 1 and wet_db > WET_DB + 4 and chance < 0.3
        too_dry = wet_db < WET_DB and chance < 0.35
        rating = "Medium"
        if max(faults) == 2:
            rating = "Bad"
        elif forgiven or (sum(faults) == 0 and not too_dry):
            rating = "Good"
        answers.append(rows.RatingAnswer(clip=clip.id, k=k, rating=rating, rater="simulated"))
    return answers


def simulated_choices(run, comparisons, seed):
    """Which of two audios of a clip a listener prefers (Sec. 2.2): the more reverberant one, heard
    with noise of 2 dB; "tie" where they differ by 6 dB or less.

    comparisons: list of (clip line, a, b, wav a, wav b).
    """
    noise = 2 * rater_noise(run)
    truth = truth_of(run, [clip for clip, *_ in comparisons])
    answers = []
    for clip, a, b, *wavs in comparisons:
        hits_s = truth[clip.id].hits_s
        wet_a, wet_b = [measure(media.read_audio(wav, RATE_HZ), hits_s)["wet_db"] for wav in wavs]
        difference_db = wet_a - wet_b
        rng = np.random.default_rng(seed_of(seed, "chooser", clip.id, a, b))
        if abs(difference_db) <= 6:
            choice = "tie"
        elif difference_db + noise * rng.standard_normal() > 0:
            choice = "a"
        else:
            choice = "b"
        answers.append(rows.ChoiceAnswer(clip=clip.id, a=a, b=b, choice=choice, rater="simulated"))
    return answers


# --------------------------------------------------------------------------------------------------
# The judge, for stage 07 alone: it shares no network, no clip and no measure with raters, scorers
# and oracle
# --------------------------------------------------------------------------------------------------

SPAN = 512  # samples of a window, 32 ms
STRIDE = 128  # samples from a window to the next, 8 ms
BANDS = 20
LATE_DB = -28.0  # reverberant above this; 5 % errors on the judge's own corpus


@functools.cache
def band_filters():
    """(20, 257) bool: bands of equal width in octaves from 60 Hz, each of one bin at least."""
    edges = np.geomspace(60, RATE_HZ / 2, BANDS + 1)
    centre = np.sqrt(edges[:-1] * edges[1:])
    hz = np.fft.rfftfreq(SPAN, 1 / RATE_HZ)
    band = np.arange(BANDS)
    within = np.searchsorted(edges, hz, side="right") - 1 == band[:, None]
    within[band, np.abs(hz - centre[:, None]).argmin(1)] = True  # the nearest bin
    return within


def band_energy(wave):
    """(S,) tensor -> (251, 20): energy of each window in each band."""
    padded = np.pad(judged_samples(wave), SPAN // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, SPAN)[::STRIDE]
    spectrum = np.fft.rfft(windows * np.hanning(SPAN))
    return np.abs(spectrum) ** 2 @ band_filters().T + 1e-9


def find_attacks(energy):
    """energy: (251, 20). Windows in which all bands together rise most in 24 ms, 160 ms apart and
    within 20 dB of the loudest: (n,) int."""
    from scipy.signal import find_peaks

    total = energy.sum(1)
    level = np.log10(energy + 1e-4 * total.max())
    rise = np.maximum(level[3:] - level[:-3], 0).sum(1)  # from each window to the third after it
    peaks, _ = find_peaks(rise, height=max(2.0, rise.max() / 4), distance=20)
    attacks = []
    for peak in peaks:
        if total[peak : peak + 8].max() > total.max() / 100:
            attacks.append(peak + 2)  # a window within the rise
    return np.array(attacks, dtype=int)


def attack_shape(energy, attacks):
    """-> (60,): the spectrum of an attack in three stretches, 224 ms in all, in dB of the first.

    The mean of all attacks; without any, of the loudest window.
    """
    if len(attacks) == 0:
        attacks = [energy.sum(1).argmax()]
    floor = np.quantile(energy, 0.1, axis=0)
    stretches = []
    for start, end in ((0, 6), (6, 14), (14, 28)):  # windows after the attack
        within = [attack for attack in attacks if attack + start < len(energy)]
        spectra = [energy[attack + start : attack + end].mean(0) for attack in within]
        spectrum = np.mean(spectra, 0) if spectra else floor
        stretches.append(np.maximum(spectrum - floor, 0))
    loudness = stretches[0].sum() + 1e-9
    return 10 * np.log10(np.concatenate(stretches) / loudness + 1e-4)


def late_db(energy, attacks):
    """Energy later than 272 ms after an attack over what came before, in dB, less the floor.

    Mean of the attacks that no other follows within 416 ms; -50 where nothing is left. The mirror
    of the oracle's `tail_energy`, in windows of 8 ms.
    """
    total = energy.sum(1)
    floor = np.convolve(total, np.full(16, 1 / 16), "valid").min()
    shares = []
    for attack, following in zip(attacks, np.append(attacks[1:], len(total))):
        if following - attack < 52:
            continue
        tail_starts = attack + 34
        early = total[attack:tail_starts] - floor
        late = total[tail_starts : min(following - 3, attack + 62)] - floor
        share = late.sum() / max(early.sum(), 1e-9)
        # Less is the floor's own ripple.
        shares.append(share if late.mean() > 0.3 * floor else 0.0)
    return 10 * np.log10(max(np.mean(shares), 1e-5)) if shares else -50.0


def matched_sync_s(attacks_s, hits_s):
    """Mean distance of attacks and hits matched one to one; 0.4 s for each without a partner."""
    from scipy.optimize import linear_sum_assignment

    distance = np.minimum(np.abs(attacks_s[:, None] - hits_s), FARTHEST_S)
    matched = distance[linear_sum_assignment(distance)]
    count = max(distance.shape)
    alone = count - len(matched)
    return (matched.sum() + FARTHEST_S * alone) / count


def ask_judge(run, audios):
    """audios: list of (clip line, wav path) -> dict of (n,) arrays.

    semantic: 1 where the class is recognised; sync_s: `matched_sync_s`; aesthetic: 1 where
    reverberant.
    """
    fields = {"mean": torch.Tensor, "precision": torch.Tensor}
    state = files.load_pt(Path(run) / "00_judge.pt", fields)
    mean = state["mean"].numpy()
    precision = state["precision"].numpy()

    def judge(wave, truth):
        energy = band_energy(wave)
        attacks = find_attacks(energy)
        difference = attack_shape(energy, attacks) - mean
        squared_distance = ((difference @ precision) * difference).sum(1)  # Mahalanobis, (8,)
        named = squared_distance.argmin()
        sync_s = matched_sync_s(attacks * STRIDE / RATE_HZ, np.array(truth.hits_s))
        return named == truth.kind, sync_s, late_db(energy, attacks) > LATE_DB

    return judge_audios(run, audios, ("semantic", "sync_s", "aesthetic"), judge)


def oracle_scores(run, audios):
    """audios: list of (clip line, wav path) -> dict of (n,) arrays: stage 07's columns `oracle_...`
    and `judge_...`."""
    oracle = ask_oracle(run, audios)
    oracle["aesthetic"] = (oracle["wet_db"] > WET_DB).astype(np.float64)
    columns = {f"oracle_{name}": values for name, values in oracle.items()}
    for name, values in ask_judge(run, audios).items():
        columns[f"judge_{name}"] = values
    return columns
