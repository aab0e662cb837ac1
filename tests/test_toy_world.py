"""The toy world by itself: its vocoder, its second judge, its sizes."""

import numpy as np
import pytest
import torch
import torchaudio
from conftest import stage

world = stage("00")


def drawn(corpus, count, **changed):
    """Scripts of a corpus and their sounds (count, 32000)."""
    scripts = [world.draw_script(0, corpus, i) | changed for i in range(count)]
    return scripts, torch.stack([torch.from_numpy(world.draw_sound(script)) for script in scripts])


@pytest.mark.parametrize("steps, momentum", [(1, 0.0), (4, 0.99), (6, 0.5)])
def test_griffin_lim_is_torchaudios_but_for_the_edges_which_it_mirrors(steps, momentum):
    _, waves = drawn("val", 6)
    window = torch.hann_window(world.N_FFT)
    magnitude = torch.stft(waves, world.N_FFT, world.HOP, window=window, return_complex=True).abs()
    ours = world.griffin_lim(magnitude.transpose(1, 2), steps, momentum / (1 + momentum))  # as torchaudio takes it
    options = dict(n_iter=steps, momentum=momentum, rand_init=False, length=world.SAMPLES)
    theirs = torchaudio.functional.griffinlim(magnitude, window, world.N_FFT, world.HOP, world.N_FFT, 1.0, **options)
    inside = slice(steps * world.N_FFT, -steps * world.N_FFT)
    assert (ours - theirs)[:, inside].abs().max() < 1e-4 * theirs.abs().max()


def test_the_codec_keeps_what_the_oracle_measures():
    scripts, waves = drawn("val", 24)
    codec = world.Codec.fit(world.log_mel(waves))
    decoded = codec.decode(codec.encode(world.log_mel(waves)))
    before, after = (
        np.array([world.measure(wave, script["hits_s"]) for wave, script in zip(x, scripts)]) for x in (waves, decoded)
    )
    assert np.abs(after[:, 0] - before[:, 0]).mean() < 0.015  # seconds
    assert np.abs(after[:, 1] - before[:, 1]).mean() < 1.5  # dB of the floor
    assert np.mean((after[:, 2] > world.WET_DB) == (before[:, 2] > world.WET_DB)) > 0.9


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """{name of what was done to a sound: the judge's columns}: of 48 clips that it was not trained on."""
    run = tmp_path_factory.mktemp("judge")
    _, waves = drawn("pretrain", 64)
    scripts, own = drawn("judge", 160)
    codec, kind = world.Codec.fit(world.log_mel(waves)), torch.tensor([script["kind"] for script in scripts])
    world.train_judge(run / "00_judge.pt", {"wave": own, "kind": kind}, codec, {}, 0)
    ids = [f"c{i}" for i in range(48)]
    scripts = [world.draw_script(0, "val", i) for i in range(48)]
    truth = [{"id": i, "class": s["kind"], "hits_s": [round(float(h), 4) for h in s["hits_s"]]}
             for i, s in zip(ids, scripts)]  # fmt: skip
    world.common.write_jsonl(run / "00_truth.jsonl", truth)

    def hear(*spoil):
        changed, found = dict(spoil), []
        for i, name in enumerate(ids):
            script = world.draw_script(0, "val", i)
            for key, value in changed.items():
                script[key] = value(script[key]) if callable(value) else value
            world.common.write_audio(run / f"{name}.wav", torch.from_numpy(world.draw_sound(script)), world.RATE_HZ)
            found.append(({"id": name}, run / f"{name}.wav"))
        return world.judge(run, found)

    return {
        "truth": hear(),
        "another class": hear(("heard_kind", lambda kind: (kind + 3) % 8)),
        "0.2 s early": hear(("heard_s", lambda hits: np.clip(hits - 0.2, 0.04, 1.7))),
        "noise": hear(("noise", 0.01)),
        "room": hear(("wet", 0.8)),
        "no room": hear(("wet", 0.0)),
    }


def test_the_judge_hears_what_was_done_to_a_sound_and_nothing_else(judged):
    mean = {name: {key: value.mean() for key, value in seen.items()} for name, seen in judged.items()}
    assert all(mean[name]["semantic"] > 0.97 for name in mean if name != "another class")
    assert mean["another class"]["semantic"] < 0.05
    assert mean["truth"]["sync_s"] < 0.02 and mean["noise"]["sync_s"] < 0.03
    assert 0.15 < mean["0.2 s early"]["sync_s"] < 0.25
    assert mean["room"]["aesthetic"] > 0.85 and mean["no room"]["aesthetic"] < 0.1


def test_an_audio_without_attacks_counts_as_wholly_out_of_time():
    assert len(world.attacks(world.band_energy(torch.zeros(world.SAMPLES)))) == 0
    energy = world.band_energy(torch.full((world.SAMPLES,), torch.nan))
    assert np.isfinite(world.attack_shape(energy, world.attacks(energy))).all()
    assert world.late_db(energy, world.attacks(energy)) == -50
