"""The toy world's simulated people, its oracle and its judge (docs/toy.md).

Simulated raters answer in stage 02, simulated choosers in stage 03. In stage 07 the oracle and the
judge measure audios against the truth, and 08 marks the true hits. Only this file reads
00_truth.jsonl, 00_oracle.pt and 00_judge.pt.

The oracle's classifier is trained on clips that no scorer saw. But the simulated people answer by
the oracle's measures, so that whatever learns from the people also learns from the oracle. The
judge is used in stage 07 alone; it has another kind of classifier, other measures and clips of its
own.

Reverberation (a room): the oracle measures it as `wet_db`, the judge as `late_db`. An audio above a
limit counts as reverberant, which stage 07 calls `aesthetic`. Both measures require that the sound
after a hit dies away, so that constant noise or a faint late hit does not count as a room.
"""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta

from adapters.toy import (
    CLIP_S,
    HOP,
    LABELS,
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
    # Its place in LABELS.
    kind: Annotated[int, Meta(ge=0, lt=len(LABELS), description="a class of sound, 0 to 7")]
    hits_s: Annotated[
        list[Annotated[float, Meta(ge=0, le=CLIP_S)]],
        Meta(min_length=1, description="seconds within the clip, at least once"),
    ]


def truth_of(run, clips=()):
    """{clip id: line of 00_truth.jsonl}; stops where one of `clips` has no line."""
    file = Path(run) / "00_truth.jsonl"
    truth = {line.id: line for line in rows.read(file, Truth, f"; it {OTHER_VERSION}")}
    for clip in clips:
        if clip.id not in truth:
            stop(f"{file}: has no line of {clip.id}; it {OTHER_VERSION}")
    return truth


def measure_audios(run, audios, measure_one):
    """A list of what measure_one(wave, truth) returns for each audio. audios: list of (clip line,
    wav path)."""
    truth = truth_of(run, [clip for clip, _ in audios])
    measured = []
    for clip, path in audios:
        measured.append(measure_one(media.read_audio(path, RATE_HZ), truth[clip.id]))
    return measured


def judged_samples(wave):
    """(S,) tensor -> (32000,) float64 array, cut or padded; samples that are not finite become
    silence."""
    wave = torch.nan_to_num(wave, 0, 0, 0)
    return media.fit_length(wave, SAMPLES).numpy().astype(np.float64)


# --------------------------------------------------------------------------------------------------
# The oracle
# --------------------------------------------------------------------------------------------------

FRAMES_PER_S = RATE_HZ / HOP
FARTHEST_S = 0.4  # a hit without an onset counts as this far away
CLEAN_FLOOR_DB = -57.0  # noise floor of the world's own clean clips; lower floors count as this
WET_DB = -32.0  # the oracle calls an audio reverberant above this
FAINT_DB = -45.0  # choosers hear no reverberation below this


def frame_energy(wave):
    """(S,) tensor -> (100,): energy in windows of 40 ms, centred at k * 20 ms."""
    padded = np.pad(judged_samples(wave), (HOP, HOP))
    frames = np.stack([padded[k * HOP : k * HOP + 2 * HOP] for k in range(MEL_FRAMES)])
    return (frames**2 * np.hanning(2 * HOP)).mean(1) + 1e-12


def find_onsets(level_db):
    """The times in seconds at which a level rises by 5 dB or more and comes within 18 dB of its
    maximum: (n,).

    level_db: (100,), one number each 20 ms.
    """
    before = (level_db[2:-2] + level_db[1:-3] + level_db[:-4]) / 3
    after = (level_db[:-1] + level_db[1:]) / 2
    rise = np.zeros(len(level_db))
    rise[:3] = after[:3] - level_db[:3].min()  # nothing comes before the first frames
    rise[3:-1] = after[3:] - before
    onsets = []
    for i in range(len(rise)):
        steepest = rise[max(0, i - 5) : i + 6].max()
        reached = level_db[i : i + 4].max()
        if rise[i] > 5 and rise[i] == steepest and reached > level_db.max() - 18:
            onsets.append(i * HOP / RATE_HZ)
    return np.array(onsets)


def onsets_to_hits_s(onsets, hits):
    """The mean distance of onsets to the nearest hit and that of hits to the nearest onset,
    averaged, in seconds."""
    if len(onsets) == 0:
        return FARTHEST_S
    distance = np.minimum(np.abs(onsets[:, None] - hits), FARTHEST_S)
    return 0.5 * (distance.min(0).mean() + distance.min(1).mean())


def dies_away(stretches, seconds):
    """Whether energy falls by 20 dB a second or more from each stretch to the next, which begins
    this many seconds later. In the world's rooms it falls by 67 dB a second."""
    factor = 10 ** (20 * seconds / 10)
    return all(early > factor * late for early, late in zip(stretches, stretches[1:]))


def tail_energy(energy, onsets, floor):
    """The energy of a room's tail: the median 280 to 400 ms after an onset, minus the floor, and 0
    where the energy has not died away since 160 to 280 ms after it. Only onsets that no other
    follows within 420 ms count; this is the mean over them, 0 without any: the audio counts as
    dry."""
    tails = []
    for onset, following in zip(onsets, np.append(onsets[1:], CLIP_S)):
        if following - onset < 0.42:
            continue
        frame = round(onset * FRAMES_PER_S)
        before = energy[frame + 8 : frame + 14]
        late = energy[frame + 14 : frame + 20]
        tail = np.median(late)
        # A tail below three times the floor may be a fluctuation of a noisy floor, so it is no
        # room.
        is_room = tail > 3 * floor and dies_away([before.mean() - floor, late.mean() - floor], 0.12)
        tails.append(tail - floor if is_room else 0.0)
    return np.mean(tails) if tails else 0.0


def measure(wave):
    """What the oracle measures of an audio (S,) without a network: its onsets in seconds, (n,); its
    noise floor and the tail of a room, both in dB relative to its loudest frames."""
    energy = frame_energy(wave)
    onsets = find_onsets(10 * np.log10(energy))
    ordered = np.sort(energy)
    peak = ordered[-4:].mean()
    floor = ordered[2:8].mean()  # leaves out the two quietest frames, which may be outliers
    tail = tail_energy(energy, onsets, floor)
    floor_db = max(CLEAN_FLOOR_DB, 10 * np.log10(floor / peak))
    wet_db = 10 * np.log10(max(tail / peak, 1e-6))
    return onsets, floor_db, wet_db


@torch.inference_mode()
def ask_oracle(run, audios):
    """audios: list of (clip line, wav path) -> list of dicts: semantic, the probability of the true
    class; sync_s, `onsets_to_hits_s`, 0 to 0.4 s; floor_db and wet_db, from `measure`."""
    file = Path(run) / "00_oracle.pt"
    state = files.load_pt(file, {"classifier": dict})
    classifier = AudioTower(len(LABELS))
    files.load_weights(classifier, state["classifier"], file, OTHER_VERSION)

    def oracle(wave, truth):
        probabilities = classifier(log_mel(wave[None])).softmax(-1)[0]
        onsets, floor_db, wet_db = measure(wave)
        return {
            "semantic": probabilities[truth.kind].item(),
            "sync_s": onsets_to_hits_s(onsets, np.array(truth.hits_s)),
            "floor_db": floor_db,
            "wet_db": wet_db,
        }

    return measure_audios(run, audios, oracle)


# --------------------------------------------------------------------------------------------------
# Simulated people
# --------------------------------------------------------------------------------------------------


def severity(value, slight, grave):
    """0 for no fault, 1 for one above the limit `slight`, 2 for one above `grave`."""
    return int(value > slight) + int(value > grave)


def simulated_ratings(run, audios, seed):
    """The ratings of a simulated listener (Sec. 2.1), who looks for three faults, has unsteady
    thresholds and likes rooms.

    audios: list of (clip line, k, wav path). A rating depends on (seed, clip, k) and the audio, not
    on the order of the audios.
    """
    world = inputs.read_run(run, rows.World)
    noise = world.rater_noise  # 1 is usual; with 0 the listener is perfectly steady
    measured = ask_oracle(run, [(clip, path) for clip, _, path in audios])
    answers = []
    for (clip, k, _), said in zip(audios, measured):
        rng = np.random.default_rng(seed_of(seed, "rater", clip.id, k))
        semantic = said["semantic"] + 0.05 * noise * rng.standard_normal()
        sync_s = said["sync_s"] + 0.02 * noise * rng.standard_normal()
        floor_db = said["floor_db"] + 3 * noise * rng.standard_normal()
        wet_db = said["wet_db"]
        chance = rng.random()

        faults = (
            severity(1 - semantic, 0.2, 0.6),
            severity(sync_s, 0.06, 0.15),
            severity(floor_db, -42, -30),
        )
        slight = max(0, sum(faults) - world.rater_overlooks)
        if max(faults) == 2:
            rating = "Bad"
        elif slight == 0:  # about a third of the dry audios are only Medium
            rating = "Medium" if wet_db < WET_DB and chance < 0.35 else "Good"
        elif slight == 1:  # sometimes forgiven where the room is clearly heard
            rating = "Good" if wet_db > WET_DB + 4 and chance < 0.3 else "Medium"
        else:
            rating = "Medium"
        answers.append(rows.RatingAnswer(clip=clip.id, k=k, rating=rating, rater="simulated"))
    return answers


def simulated_choices(run, comparisons, seed):
    """Which of two audios of a clip a simulated listener prefers (Sec. 2.2): the more reverberant
    one, by a difference that is heard with noise of 2 dB; "tie" where they differ by 6 dB or less.
    All audios below FAINT_DB sound equally dry.

    comparisons: list of (clip line, a, b, wav a, wav b).
    """
    noise_db = 2 * inputs.read_run(run, rows.World).rater_noise
    answers = []
    for clip, a, b, wav_a, wav_b in comparisons:
        _, _, wet_a_db = measure(media.read_audio(wav_a, RATE_HZ))
        _, _, wet_b_db = measure(media.read_audio(wav_b, RATE_HZ))
        difference_db = max(wet_a_db, FAINT_DB) - max(wet_b_db, FAINT_DB)
        rng = np.random.default_rng(seed_of(seed, "chooser", clip.id, a, b))
        if abs(difference_db) <= 6:
            choice = "tie"
        elif difference_db + noise_db * rng.standard_normal() > 0:
            choice = "a"
        else:
            choice = "b"
        answers.append(rows.ChoiceAnswer(clip=clip.id, a=a, b=b, choice=choice, rater="simulated"))
    return answers


# --------------------------------------------------------------------------------------------------
# The judge, used in stage 07 alone: it shares no network, no clip and no measure with the raters,
# the scorers and the oracle
# --------------------------------------------------------------------------------------------------

# The judge works on spectra of windows. All numbers of windows below count steps of 8 ms.
SPAN = 512  # samples of a window, 32 ms
STRIDE = 128  # samples from a window to the next, 8 ms
BANDS = 20
LATE_DB = -29.0  # reverberant above this, which is wrong for 2 % of the judge's own corpus


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
    """The windows in which all bands together rise most within 24 ms, at least 160 ms apart and
    within 20 dB of the loudest window: (n,) int. energy: (251, 20)."""
    from scipy.signal import find_peaks

    total = energy.sum(1)
    level = np.log10(energy + 1e-4 * total.max())
    rise = np.maximum(level[3:] - level[:-3], 0).sum(1)  # from each window to the third after it
    peaks, _ = find_peaks(rise, height=max(2.0, rise.max() / 4), distance=20)
    attacks = []
    for peak in peaks:
        if total[peak : peak + 8].max() > total.max() / 100:  # within 64 ms
            attacks.append(peak + 2)  # the rise is from `peak` to `peak + 3`
    return np.array(attacks, dtype=int)


def attack_shape(energy, attacks):
    """(60,): the spectrum of an attack in three successive stretches, 224 ms in all, in dB relative
    to the first stretch's total.

    It is the mean over all attacks, or, without any, the spectrum from the loudest window on.
    """
    if len(attacks) == 0:
        attacks = [energy.sum(1).argmax()]
    floor = np.quantile(energy, 0.1, axis=0)
    stretches = []
    for start, end in ((0, 6), (6, 14), (14, 28)):  # windows after the attack: to 48, 112, 224 ms
        within = [attack for attack in attacks if attack + start < len(energy)]
        spectra = [energy[attack + start : attack + end].mean(0) for attack in within]
        spectrum = np.mean(spectra, 0) if spectra else floor
        stretches.append(np.maximum(spectrum - floor, 0))
    loudness = stretches[0].sum() + 1e-9
    return 10 * np.log10(np.concatenate(stretches) / loudness + 1e-4)


def late_db(energy, attacks):
    """The energy from 288 ms after an attack on, relative to the energy before, in dB, both minus
    the floor. It counts as 0 where it does not die away, which needs a fall from the stretch before
    to the first half of the late energy, and from there to its second half.

    This is the mean over the attacks that no other follows within 416 ms; -50 where there is none.
    It is the counterpart of the oracle's `tail_energy`, in windows of 8 ms.
    """
    total = energy.sum(1)
    floor = np.convolve(total, np.full(16, 1 / 16), "valid").min()  # the quietest 128 ms
    shares = []
    for attack, following in zip(attacks, np.append(attacks[1:], len(total))):
        if following - attack < 52:  # 416 ms
            continue
        tail_start = attack + 36  # 288 ms
        tail_end = min(following - 3, attack + 62)  # 496 ms, or 24 ms before the next attack
        early = total[attack:tail_start] - floor
        late = total[tail_start:tail_end] - floor
        half = len(late) // 2
        stretches = [early[-half:].mean(), late[:half].mean(), late[half : 2 * half].mean()]
        # Less than a tenth of the floor may be a fluctuation of the floor.
        is_room = late.mean() > 0.1 * floor and dies_away(stretches, half * STRIDE / RATE_HZ)
        shares.append(late.sum() / max(early.sum(), 1e-9) if is_room else 0.0)
    return 10 * np.log10(max(np.mean(shares), 1e-5)) if shares else -50.0


def matched_sync_s(attacks_s, hits_s):
    """The mean distance of attacks and hits that are matched one to one, in seconds; each one
    without a partner counts 0.4 s."""
    from scipy.optimize import linear_sum_assignment

    distance = np.minimum(np.abs(attacks_s[:, None] - hits_s), FARTHEST_S)
    matched = distance[linear_sum_assignment(distance)]  # as many pairs as the smaller side has
    count = max(distance.shape)
    alone = count - len(matched)
    return (matched.sum() + FARTHEST_S * alone) / count


def ask_judge(run, audios):
    """audios: list of (clip line, wav path) -> list of dicts: semantic, whether the judge names the
    true class; sync_s, `matched_sync_s` of attacks and hits; aesthetic, whether the audio is
    reverberant."""
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
        return {
            "semantic": named == truth.kind,
            "sync_s": sync_s,
            "aesthetic": late_db(energy, attacks) > LATE_DB,
        }

    return measure_audios(run, audios, judge)


def compared_with_truth(run, audios):
    """audios: list of (clip line, wav path) -> dict of (n,) float arrays: stage 07's metrics
    `oracle_...` and `judge_...`."""
    columns = defaultdict(list)
    for said in ask_oracle(run, audios):
        said["aesthetic"] = said.pop("wet_db") > WET_DB
        for name, value in said.items():
            columns[f"oracle_{name}"].append(value)
    for said in ask_judge(run, audios):
        for name, value in said.items():
            columns[f"judge_{name}"].append(value)
    return {name: np.array(values, dtype=float) for name, values in columns.items()}
