"""The one reader of video and sound: which frame is shown when (ffmpeg's fps filter), where sound
begins, what is said of a file that cannot be used, and how much memory the largest takes."""

import functools
import math
import re
import shutil
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import a_clip, make_video, number_of, shell
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_files import Decoder

import common
from common import files, media, scoring

PLAIN = {"bf": "0"}  # no B-frames: the last packet is the last frame


def shown(path, fps, duration_s):
    """The numbers of the frames that a consumer at fps is given."""
    number = lambda frame: torch.tensor(number_of(frame))  # noqa: E731
    (frames,) = media.read_frames(path, [(fps, number)], duration_s)
    return frames.tolist()


def reason(read, *about):
    with pytest.raises(common.SkipClip) as skipped:
        read(*about)
    return str(skipped.value)


def click(at_s, seconds=2.0):
    """Silence but for 2 ms of noise."""
    wave, start = np.zeros(round(44_100 * seconds)), round(44_100 * at_s)
    wave[start : start + 88] = np.random.default_rng(0).uniform(-0.9, 0.9, 88)
    return wave


def heard_at(wave, rate_hz):
    """When most of a click has sounded, in s."""
    power = wave.double().square().cumsum(0)
    return int((power < power[-1] / 2).sum()) / rate_hz - 0.001


# Which frame is shown when


@pytest.mark.parametrize("rate, fps, expected", [
    (25, 25, [0, 1, 2, 3, 4, 5, 6, 7]),
    # frame n has slot floor(0.32 n + 0.5): n = 1 is the last below 0.5
    (25, 8, [1, 4, 7, 10, 14, 17, 20, 23]),
    (25, 0.5, [24]),  # frame 25, at 1 s, is half a slot: it belongs to the next picture
    # 0.834 n: 3 shares its slot with 4, 9 with 10
    (Fraction(30000, 1001), 25, [0, 1, 2, 4, 5, 6, 7, 8, 10]),
    (50, 25, [0, 2, 4, 6, 8]),  # floor(0.5 n + 0.5): frames 2i - 1 and 2i share slot i
    (50, 8, [3, 9, 15, 21]),
    (10, 25, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]),  # 2.5 n, halves upwards: slots 0, 3, 5, 8, 10
])  # fmt: skip
def test_frames_worked_by_hand(tmp_path, rate, fps, expected):
    path = make_video(tmp_path / "a.mp4", fps=rate, sound=False)
    assert shown(path, fps, 2.0)[: len(expected)] == expected


def test_the_frame_before_a_gap_is_shown_during_it(tmp_path):
    times = [*np.arange(10) / 25, *(1 + np.arange(30) / 25)]  # frame 9 at 0.36 s, frame 10 at 1 s
    path = make_video(tmp_path / "a.mp4", times=times, sound=False)
    assert shown(path, 25, 2.0) == [*range(9), *[9] * 16, *range(10, 35)]
    # frame 10: slot 8
    expected = [1, 4, 7, 9, 9, 9, 9, 9, 11, 14, 17, 20, 24, 27, 30, 33]
    assert shown(path, 8, 2.0) == expected


def test_the_last_frame_is_held_for_its_own_duration(tmp_path):
    about = dict(times=np.arange(11) / 25, hold_s=1.6, sound=False, options=PLAIN)
    path = make_video(tmp_path / "a.mp4", **about)
    assert shown(path, 25, 2.0) == [*range(10), *[10] * 40]  # to 0.4 + 1.6 s
    assert reason(shown, path, 25, 2.04) == "too short: 2.00 s of video, 2.04 s needed"


def test_a_still_picture_is_read_by_every_consumer(tmp_path):
    path = make_video(tmp_path / "a.mp4", times=[0], hold_s=10, sound=False, options=PLAIN)
    for fps in (0.5, 8, 25):
        assert shown(path, fps, 8.0) == [0] * round(8 * fps)


@settings(derandomize=True, database=None, deadline=None)
@given(st.fractions(-100, 100), st.sampled_from((0.5, 8, 25)))
def test_a_slot_is_the_nearest_of_a_grid_halves_away_from_zero(time_s, fps):
    exact = time_s * Fraction(fps)
    assert media.slot(time_s, fps) == math.copysign(math.floor(abs(exact) + Fraction(1, 2)), exact)


RATES = ["12", "43/2", "24000/1001", "30000/1001", "30", "50", "60", "gap"]


@pytest.mark.parametrize("rate", RATES)
def test_frames_are_those_of_ffmpegs_fps_filter_for_three_consumers_of_one_decode(tmp_path, rate):
    gap = dict(times=[*np.arange(60) / 25, *(5 + np.arange(104) / 25)])
    about = gap if rate == "gap" else dict(fps=Fraction(rate), seconds=9.0)
    path, wanted = make_video(tmp_path / "a.mp4", sound=False, **about), (0.5, 8, 25)
    decoder = Decoder(path)
    for fps in wanted:
        decoder.add_basic_video_stream(round(8 * fps), fps, "rgb24")
    ours = media.read_frames(path, [(fps, torch.clone) for fps in wanted], 8.0)
    for mine, theirs in zip(ours, decoder.pop_chunks(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_frame_that_no_slot_shows_is_not_even_converted(tmp_path):
    seen, path = [], make_video(tmp_path / "a.mp4", fps=50, seconds=9.0, sound=False)
    media.read_frames(path, [(0.5, lambda frame: seen.append(number_of(frame)) or frame)], 8.0)
    assert seen == [49, 149, 249, 349]


def test_frames_are_neither_turned_nor_of_another_size_than_the_first(tmp_path):
    upright = make_video(tmp_path / "a.mp4", (96, 64), sound=False)
    with av.open(str(upright)) as source, av.open(str(tmp_path / "turned.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(tmp_path / "turned.mp4")) as turned:
        assert next(turned.decode(video=0)).rotation in (90, -90)
    wanted = [(25, torch.clone)]
    (plain,), (turned,) = (
        media.read_frames(path, wanted, 2.0) for path in (upright, tmp_path / "turned.mp4")
    )
    assert torch.equal(plain, turned)
    about, times = dict(sound=False, options=PLAIN), np.arange(25) / 25
    one = make_video(tmp_path / "1.ts", (96, 64), times=times, **about)
    two = make_video(tmp_path / "2.ts", (64, 48), times=1 + times, **about)
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert media.read_frames(one, wanted, 1.9)[0].shape[1:] == (3, 64, 96)


# Videos that cannot be used


def no_decoder(path, *names):
    """Other names of codecs in a file's header: what a newer encoder wrote."""
    content = path.read_bytes()
    for name in names:
        assert name in content
        content = content.replace(name, b"zzz" + name[3:])
    path.write_bytes(content)
    return path


def with_cover(path):
    """A sound file with a picture in it."""
    with av.open(str(path), "w", format="mp3") as out:
        audio, cover = out.add_stream("mp3", rate=44_100), out.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        black = np.zeros((64, 64, 3), np.uint8)
        out.mux(cover.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
        out.mux(cover.encode(None))
        for i in range(300):
            silence = np.zeros((1, 1152), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, 1152 * i, Fraction(1, 44_100)
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return path


def of_sound_alone(folder):
    soundfile.write(folder / "a.wav", np.zeros(160_000), 16_000)
    return folder / "a.wav"


def of_text(folder):
    (folder / "a.mp4").write_text("no video")
    return folder / "a.mp4"


def silent(name, seconds=9.0, **about):
    return lambda folder: make_video(folder / name, seconds=seconds, sound=False, **about)


UNUSABLE = {
    "missing": (lambda folder: folder / "a.mp4", "no such file"),
    "sound alone": (of_sound_alone, "no video stream"),
    "cover": (lambda folder: with_cover(folder / "a.mp3"), "no video stream"),
    "text": (of_text, "unreadable video (Invalid data found when processing input)"),
    "unknown": (
        lambda folder: no_decoder(silent("a.mp4")(folder), b"avc1"),
        "unreadable video (no decoder for it)",
    ),
    "no stamps": (silent("a.h264"), "frames without time stamps"),
    # frames 0, 1, 2, 2, 4, 4 by these stamps
    "AVI": (silent("a.avi", options={"bf": "2"}), "time stamps out of order"),
    "short": (silent("a.mp4", 7.0), "too short: 7.00 s of video, 8.00 s needed"),
}


@pytest.mark.parametrize("make, expected", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_video_has_one_reason_for_every_consumer(tmp_path, make, expected):
    path = make(tmp_path)
    for fps in (0.5, 8, 25):
        assert reason(shown, path, fps, 8.0) == expected


# Where sound begins


VOICES = [("mp4", "aac"), ("mkv", "aac"), ("ts", "aac"), ("mov", "pcm_s16le")]
VOICES += [("mp4", "libmp3lame"), ("webm", "libopus")]


@pytest.mark.parametrize("suffix, voice", VOICES)
@pytest.mark.parametrize("first_s, late_s", [(0, 0), (0, 0.5), (0.4, 0)])
def test_sample_0_belongs_to_the_first_frame_and_priming_is_cut_once(
    tmp_path, suffix, voice, first_s, late_s
):
    codec = "libvpx" if suffix == "webm" else "libx264"
    rate = 48_000 if voice == "libopus" else 44_100
    wave = torchaudio.functional.resample(torch.from_numpy(click(1.0)), 44_100, rate)[: 2 * rate]
    about = dict(times=first_s + np.arange(50) / 25, sound=wave.numpy(), late_s=late_s)
    path = make_video(tmp_path / f"a.{suffix}", codec=codec, voice=voice, rate_hz=rate, **about)
    for read_s in (None, 3.0):
        read = media.read_audio(path, rate, read_s)
        assert heard_at(read, rate) == pytest.approx(1 + late_s - first_s, abs=0.002)
        assert len(read) > 1.5 * rate
        assert not late_s or read[: round((late_s - 0.06) * rate)].abs().max() == 0


def test_sound_without_picture_begins_with_its_first_sample(tmp_path):
    path = with_cover(tmp_path / "a.mp3")  # a cover is no first frame
    assert len(media.read_audio(path, 44_100)) >= 300 * 1152


def has_audio(path, seconds):
    clip, folder = a_clip(path), path.parent
    audios = [scoring.Audio(clip, 0, path, files.digest(path))]
    block = scoring.Block("0", folder, folder, [clip], audios)
    scoring.find_peaks([block], seconds)
    return bool(scoring.read_peaks([block], seconds).isfinite())


def test_a_silent_film_is_told_from_sound_that_cannot_be_read(tmp_path, capsys):
    silent, sounding = make_video(tmp_path / "s.mp4", sound=False), make_video(tmp_path / "a.mp4")
    with pytest.raises(common.NoAudio, match="no audio stream"):
        media.read_audio(silent, 16_000)
    assert has_audio(sounding, 2.0) and not has_audio(silent, 2.0)
    assert "no usable" not in capsys.readouterr().err
    with av.open(str(sounding)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    content, (start, size) = bytearray(sounding.read_bytes()), places[len(places) // 2]
    content[start : start + size] = np.random.default_rng(0).bytes(size)
    sounding.write_bytes(content)
    unreadable = "unreadable audio (Invalid data found when processing input)"
    assert reason(media.read_audio, sounding, 16_000) == unreadable
    assert not has_audio(sounding, 2.0) and "no usable audio track" in capsys.readouterr().err
    assert shown(sounding, 25, 2.0) == list(range(50))  # its picture is as good as ever
    unknown = no_decoder(make_video(tmp_path / "u.mp4"), b"mp4a", b"esds")
    assert reason(media.read_audio, unknown, 16_000) == "unreadable audio (no decoder for it)"
    assert reason(media.read_audio, tmp_path / "none.mp4", 16_000) == "no such file"
    (tmp_path / "text.wav").write_text("no sound")
    assert reason(media.read_audio, tmp_path / "text.wav", 16_000).startswith("unreadable audio (")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    assert reason(media.read_audio, tmp_path / "empty.wav", 16_000) == "empty audio stream"


# Channels, containers, rates


FORMATS = [("flac", 44_100, 2), ("wav", 8_000, 1), ("ogg", 48_000, 2)]


@pytest.mark.parametrize("suffix, rate, channels", FORMATS)
def test_audio_is_read_from_any_format_rate_and_number_of_channels(
    tmp_path, suffix, rate, channels
):
    second = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * second)[:, None].repeat(channels, 1)
    soundfile.write(tmp_path / f"a.{suffix}", tone, rate)
    wave = media.read_audio(tmp_path / f"a.{suffix}", 16_000, 1.5)
    assert wave.shape == (24_000,) and wave[17_000:].abs().max() < 0.01
    spectrum = np.abs(np.fft.rfft(wave[:16_000].numpy()))
    assert spectrum.argmax() == 440
    assert wave[2000:14_000].abs().max().item() == pytest.approx(0.5, abs=0.05)


def sound_file(path, codec, layout, channels, format=None):
    """2 s of a tone at half of full scale in the first of the channels."""
    wave = np.zeros((96_000, channels), np.float32)
    wave[:, 0] = 0.5 * np.sin(np.arange(96_000) / 10)
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=48_000, layout=layout)
        for start in range(0, 96_000, 1024):
            block = np.ascontiguousarray(wave[start : start + 1024].reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name, codec, layout, channels", [
    ("a.m4a", "aac", "7.1", 8), ("a.flac", "flac", "7.1", 8),
    ("a.mkv", "pcm_s16le", "8 channels", 8), ("b.mkv", "pcm_s16le", "9 channels", 9),
    ("a.mov", "pcm_s16le", "hexadecagonal", 16), ("b.mov", "pcm_f32le", "16 channels", 16),
    ("a.wav", "pcm_s24le", "16 channels", 16), ("a.avi", "pcm_s16le", "12 channels", 12),
])  # fmt: skip
def test_sound_is_the_mean_of_up_to_16_channels_with_or_without_a_layout(
    tmp_path, name, codec, layout, channels
):
    wave = media.read_audio(sound_file(tmp_path / name, codec, layout, channels), 48_000)
    loudest = wave[10_000:80_000].abs().max().item()
    assert loudest == pytest.approx(0.5 / channels, rel=0.05)


def test_channels_in_an_order_of_their_own_do_not_end_the_process(tmp_path):
    """PyAV frees such a layout twice. QuickTime's mark of L R C LFE Ls Rs is replaced by that of L
    R Ls Rs C LFE."""
    path = sound_file(tmp_path / "a.mov", "pcm_s16le", "5.1(side)", 6)
    content = path.read_bytes()
    assert content.count(bytes((0, 121, 0, 6))) == 1
    path.write_bytes(content.replace(bytes((0, 121, 0, 6)), bytes((0, 122, 0, 6))))
    loudest = f"media.read_audio({str(path)!r}, 48_000)[10_000:].abs().max()"
    code = f"from common import media; print({loudest})"
    assert "tensor(0.08" in shell(sys.executable, "-c", code).stdout


def test_channels_may_change_in_mid_stream(tmp_path):
    one = sound_file(tmp_path / "mono.aac", "aac", "mono", 1, "adts")
    two = sound_file(tmp_path / "stereo.aac", "aac", "stereo", 2, "adts")
    one.write_bytes(one.read_bytes() + two.read_bytes())
    wave = media.read_audio(one, 48_000)
    assert wave[20_000:80_000].abs().max().item() == pytest.approx(0.5, rel=0.05)
    assert wave[120_000:180_000].abs().max().item() == pytest.approx(0.25, rel=0.05)


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path):
    m4a = sound_file(tmp_path / "a.m4a", "aac", "mono", 1)
    renamed = shutil.copy(m4a, tmp_path / "b.wav")
    assert torch.equal(media.read_audio(renamed, 16_000), media.read_audio(m4a, 16_000))
    noise, samples = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000), {}
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"c.{suffix}", noise, 16_000)
        samples[suffix], _ = soundfile.read(tmp_path / f"c.{suffix}", dtype="float32")
    piped = bytearray((tmp_path / "c.flac").read_bytes())
    piped[21:26] = bytes([piped[21] & 0xF0, 0, 0, 0, 0])  # the number of samples, unknown to a pipe
    (tmp_path / "d.flac").write_bytes(piped)
    (tmp_path / "c.wav").rename(tmp_path / "C.WAV")
    for name, suffix in (("C.WAV", "wav"), ("c.flac", "flac"), ("d.flac", "flac")):
        read = media.read_audio(tmp_path / name, 16_000)
        assert torch.equal(read, torch.from_numpy(samples[suffix]))


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 192_000])
def test_ordinary_rates_are_torchaudios_to_the_bit_and_a_long_file_is_read_as_far_as_needed(
    tmp_path, rate
):
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, 5 * rate)).float()
    soundfile.write(tmp_path / "a.wav", noise.numpy(), rate, subtype="FLOAT")
    expected = torchaudio.functional.resample(noise, rate, 16_000)
    read = functools.partial(media.read_audio, tmp_path / "a.wav", 16_000)
    assert torch.equal(read(), expected)
    torch.testing.assert_close(read(2.0), expected[:32_000], atol=1e-6, rtol=0)
    assert torch.equal(read(9.0)[:80_000], expected)
    assert len(read(9.0, pad=False)) == 80_000
    assert len(media.decode_audio(tmp_path / "a.wav", 2.0)[0]) == math.ceil(2.1 * rate)


def tone(rate, hz=1000, seconds=8.0):
    return torch.from_numpy(0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate))


@pytest.mark.parametrize("rate, new_rate", [
    (44_101, 16_000), (44_099, 16_000), (47_999, 16_000), (191_999, 16_000), (16_001, 16_000),
    (7_993, 16_000), (44_101, 32_000), (11_027, 48_000), (96_001, 44_100),
])  # fmt: skip
def test_rates_with_a_large_table_of_filters_keep_phase_and_length_to_the_end(rate, new_rate):
    """At -80 dB of a 1 kHz tone, no sample is off in time by more than 0.0003 of a sample at 16
    kHz."""
    wave = tone(rate).float()
    ours = media.resample(wave, rate, new_rate)
    assert len(ours) == math.ceil(len(wave) * new_rate / rate)
    exact = tone(new_rate, seconds=len(ours) / new_rate)
    assert (ours - exact)[200:-200].abs().max() < 0.5e-4


def test_a_rate_beside_an_ordinary_one_sounds_as_that_one_does(tmp_path):
    heard = {}
    for rate in (44_100, 44_101):
        soundfile.write(tmp_path / "a.wav", tone(rate).numpy(), rate, subtype="FLOAT")
        heard[rate] = media.read_audio(tmp_path / "a.wav", 16_000)
    assert len(heard[44_100]) == len(heard[44_101]) == 128_000
    apart = (heard[44_100] - heard[44_101])[200:-200].abs().max()
    assert apart < 0.5e-3  # -60 dB: torchaudio's own error


# Memory

GROWTH = """
import sys
from common import media
def mib(key):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) / 1024
before = mib("VmRSS")
for call in sys.argv[1:]:
    eval(call)
    print("MiB", mib("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_file_takes_more_than_half_a_gibibyte(tmp_path):
    """A second of 4K (0.6 GiB of pictures), half an hour of sound (0.6 GiB while joined), 44,099 Hz
    (11 GiB)."""
    fast = {"preset": "ultrafast", "qp": "51", "threads": "2"}
    film = make_video(tmp_path / "4k.mp4", (3840, 2160), 25, 1.0, sound=False, options=fast)
    soundfile.write(tmp_path / "long.flac", np.zeros(90_000_000, np.int16), 48_000)
    soundfile.write(tmp_path / "odd.wav", np.zeros(441_000), 44_099)
    small = "lambda x: x[:, ::9, ::9]"
    calls = [f"media.read_frames({str(film)!r}, [(8, {small}), (25, {small})], 1.0)"]
    for name in ("long.flac", "odd.wav"):
        calls.append(f"media.read_audio({str(tmp_path / name)!r}, 16_000, 8.0)")
    printed = shell(sys.executable, "-c", GROWTH, *calls).stdout
    growth = [float(number) for number in re.findall(r"MiB (\S+)", printed)]
    assert len(growth) == 3 and max(growth) < 512, growth
