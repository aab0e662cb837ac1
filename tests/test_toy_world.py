"""The toy world by itself: its vocoder, its corpora, its judge."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchaudio
from conftest import a_clip, stage

import common
from adapters import toy, toy_people
from common import media, rows, scoring

world = stage("00")


def drawn(corpus, count):
    """Scripts of a corpus and their sounds (count, 32000)."""
    scripts = [world.draw_script(0, corpus, i) for i in range(count)]
    return scripts, torch.stack([torch.from_numpy(world.draw_sound(script)) for script in scripts])


@pytest.mark.parametrize("steps, momentum", [(1, 0.0), (4, 0.99), (6, 0.5)])
def test_griffin_lim_is_torchaudios_but_for_the_edges_which_it_mirrors(steps, momentum):
    _, waves = drawn("val", 6)
    window = torch.hann_window(toy.N_FFT)
    magnitude = torch.stft(waves, toy.N_FFT, toy.HOP, window=window, return_complex=True).abs()
    # momentum as torchaudio takes it
    ours = toy.griffin_lim(magnitude.transpose(1, 2), steps, momentum / (1 + momentum))
    sizes = (magnitude, window, toy.N_FFT, toy.HOP, toy.N_FFT, 1.0)
    options = dict(n_iter=steps, momentum=momentum, rand_init=False, length=toy.SAMPLES)
    theirs = torchaudio.functional.griffinlim(*sizes, **options)
    inside = slice(steps * toy.N_FFT, -steps * toy.N_FFT)
    assert (ours - theirs)[:, inside].abs().max() < 1e-4 * theirs.abs().max()


def test_the_codec_keeps_what_the_oracle_measures():
    scripts, waves = drawn("val", 24)
    mel = toy.log_mel(waves)
    codec = world.fit_codec(mel)
    decoded = codec.decode(codec.encode(mel))

    def measured(waves):
        """(3, n): sync_s, floor_db, whether wet."""
        columns = []
        for wave, script in zip(waves, scripts):
            onsets, floor_db, wet_db = toy_people.measure(wave)
            sync_s = toy_people.onsets_to_hits_s(onsets, script.hits_s)
            columns.append((sync_s, floor_db, wet_db > toy_people.WET_DB))
        return np.array(columns).T

    moved_s, moved_db, turned = np.abs(measured(decoded) - measured(waves)).mean(axis=1)
    assert moved_s < 0.015 and moved_db < 1.5 and turned < 0.1


def test_every_network_is_trained_on_clips_of_its_own_and_the_twin_last(monkeypatch):
    """What start_trainings hands to each training, a corpus's name standing for its clips."""
    trained = {}
    monkeypatch.setattr(world, "draw_corpus", lambda pool, corpus, size, seed: {"mel": corpus})
    monkeypatch.setattr(world, "fit_codec", lambda mel: f"codec of {mel}")
    for name in ("train_base", "train_scorers", "train_judge", "train_twin"):

        def train(run, *given, name=name):
            trained[name] = [x if isinstance(x, str) else x["mel"] for x in given if x]

        monkeypatch.setattr(world, name, train)
    world.start_trainings(None, None, {}, 0)
    codec = "codec of pretrain"
    assert list(trained.items()) == [
        ("train_base", ["pretrain", codec]),
        ("train_scorers", ["scorer", "oracle", codec]),
        ("train_judge", ["judge", codec]),
        ("train_twin", ["twin", codec]),
    ]


def test_no_clip_of_the_twins_is_one_of_the_scorers():
    for seed in (0, 1):
        drawn_hits = set()
        for corpus in ("scorer", "twin"):
            for i in range(300):
                drawn_hits.add(tuple(world.draw_script(seed, corpus, i).hits_s))
        assert len(drawn_hits) == 600


def test_the_twin_is_asked_by_stage_07_alone_and_without_being_told_to():
    scorers = scoring.ScorerSet(".", common.SCORERS["toy"], ".")
    assert scorers.of_audioscore == ["toy"]
    _, asked = stage("07").measures_asked(scorers, [])
    assert asked == ["toy", "twin"]
    assert scorers.tensors_of("twin") == {"embedding", "logits"}


def test_energy_dies_away_where_it_falls_by_20_db_a_second():
    # 2.4 dB in 0.12 s: a factor of 10 ** 0.24 = 1.738
    assert toy_people.dies_away([1.0, 0.57], 0.12)
    assert not toy_people.dies_away([1.0, 0.58], 0.12)
    assert not toy_people.dies_away([1.0, 0.5, 0.5], 0.12)
    assert not toy_people.dies_away([0.0, 0.0], 0.12)  # silence


# A click of 5 ms at 0.5 s, and what follows it: amplitudes by seconds since the click.
AFTER_A_CLICK = {
    "nothing": (lambda t: 0 * t, False),
    "a room, decaying by 67 dB a second": (lambda t: 0.1 * np.exp(-t / 0.13) * (t > 0), True),
    "that in noise": (lambda t: 0.1 * np.exp(-t / 0.13) * (t > 0) + 0.001, True),
    "noise throughout": (lambda t: 0.01 + 0 * t, False),
    "noise that begins with it and stays": (lambda t: 0.01 * (t > 0), False),
    "noise that swells": (lambda t: 0.04 * np.clip(t, 0, 1), False),
    "a late hit, 22 dB less": (lambda t: 0.04 * ((t > 0.3) & (t < 0.36)), False),
}


@pytest.mark.parametrize("name", AFTER_A_CLICK)
def test_a_decay_after_a_hit_is_a_room_and_noise_is_none(name):
    amplitude, is_room = AFTER_A_CLICK[name]
    rng = np.random.default_rng(0)
    t = np.arange(toy.SAMPLES) / toy.RATE_HZ - 0.5
    wave = 0.5 * ((t >= 0) & (t < 0.005)) + amplitude(t)
    wave = torch.from_numpy(wave * rng.standard_normal(toy.SAMPLES)).float()
    energy = toy_people.band_energy(wave)
    _, _, wet_db = toy_people.measure(wave)
    assert (
        toy_people.late_db(energy, toy_people.find_attacks(energy)) > toy_people.LATE_DB
    ) == is_room
    assert (wet_db > toy_people.WET_DB) == is_room


@pytest.mark.parametrize(
    "wet_a_db, wet_b_db, choice",
    [
        (-20, -30, "a"),
        (-40, -30, "b"),
        (-24, -30, "tie"),  # 6 dB
        (-38.5, -60, "a"),  # 6.5 dB above what nobody hears
        (-46, -60, "tie"),
    ],
)
def test_of_two_audios_the_more_reverberant_is_chosen_where_one_hears_it(
    monkeypatch, wet_a_db, wet_b_db, choice
):
    monkeypatch.setattr(toy_people.inputs, "read_run", lambda *_: SimpleNamespace(rater_noise=0))
    monkeypatch.setattr(toy_people.media, "read_audio", lambda path, rate: path)
    monkeypatch.setattr(toy_people, "measure", lambda wave: (None, None, wave))
    clip = SimpleNamespace(id="x")
    answers = toy_people.simulated_choices("run", [(clip, 0, 1, wet_a_db, wet_b_db)], 0)
    assert [answer.choice for answer in answers] == [choice]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """{name of what was done to a sound: what the judge says}: of 48 clips that it was not trained
    on."""
    run = tmp_path_factory.mktemp("judge")
    _, waves = drawn("pretrain", 64)
    scripts, own = drawn("judge", 160)
    kind = torch.tensor([script.kind for script in scripts])
    codec = world.fit_codec(toy.log_mel(waves))
    world.train_judge(run, {"wave": own, "kind": kind}, codec)
    truth = []
    for i in range(48):
        script = world.draw_script(0, "val", i)
        hits_s = [round(float(hit), 4) for hit in script.hits_s]
        truth.append({"id": f"c{i}", "class": script.kind, "hits_s": hits_s})
    rows.write(run / "00_truth.jsonl", truth)

    def columns(change):
        """Of the same clips, `change(script)` having been done to each."""
        audios = []
        for i in range(48):
            script = world.draw_script(0, "val", i)
            change(script)
            file = run / f"c{i}.wav"
            media.write_audio(file, torch.from_numpy(world.draw_sound(script)), toy.RATE_HZ)
            audios.append((a_clip(id=f"c{i}"), file))
        return toy_people.ask_judge(run, audios)

    def change_class(script):
        script.sound_kind = (script.sound_kind + 3) % 8

    def come_early(script):
        script.sound_s = np.clip(script.sound_s - 0.2, 0.04, 1.7)

    return {
        "truth": columns(lambda script: None),
        "another class": columns(change_class),
        "0.2 s early": columns(come_early),
        "noise": columns(lambda script: setattr(script, "noise", 0.01)),
        "room": columns(lambda script: setattr(script, "wet", 0.8)),
        "no room": columns(lambda script: setattr(script, "wet", 0.0)),
    }


def test_the_judge_hears_what_was_done_to_a_sound_and_nothing_else(judged):
    mean = {}
    for name, columns in judged.items():
        mean[name] = {key: np.mean([row[key] for row in columns]) for key in columns[0]}
    assert all(mean[name]["semantic"] > 0.97 for name in mean if name != "another class")
    assert mean["another class"]["semantic"] < 0.05
    assert mean["truth"]["sync_s"] < 0.02 and mean["noise"]["sync_s"] < 0.03
    assert 0.15 < mean["0.2 s early"]["sync_s"] < 0.25
    assert mean["room"]["aesthetic"] > 0.85 and mean["no room"]["aesthetic"] < 0.1


def test_an_audio_without_attacks_counts_as_wholly_out_of_time():
    silence = toy_people.band_energy(torch.zeros(toy.SAMPLES))
    assert len(toy_people.find_attacks(silence)) == 0
    energy = toy_people.band_energy(torch.full((toy.SAMPLES,), torch.nan))
    attacks = toy_people.find_attacks(energy)
    assert np.isfinite(toy_people.attack_shape(energy, attacks)).all()
    assert toy_people.late_db(energy, attacks) == -50
