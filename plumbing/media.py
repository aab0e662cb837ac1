"""Video and audio through PyAV: one reader for every model, scorer and page."""

import errno
import math
import re
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from av.stream import Disposition

from plumbing.ahead import in_processes
from plumbing.files import NoAudio, NoFile, SkipClip, digest, memory_or_content, reading, replacing

FINEST_FPS = 25  # the finest consumer's grid, Synchformer's: on it a video is too short for all of them, or for none


class Source:
    """A file as FFmpeg reads it. FFmpeg would report an error of the disk as damaged content, or
    take it for the file's end: the error is kept here, and FFmpeg is told that the file ends."""

    def __init__(self, path, file):
        self.name, self.file, self.error = str(path), file, None

    def __str__(self):
        return self.name

    def read(self, size):
        try:
            return self.file.read(size)
        except OSError as error:
            self.error = self.error or error
            return b""

    def seek(self, offset, whence=0):
        try:
            return self.file.seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which is before the start of an empty file
                self.error = self.error or error
            return -1

    def tell(self):
        return self.file.tell()


# FFmpeg says these of damaged content too; as it reads through `Source`, of nothing else.
SAID_OF_CONTENT = (errno.EIO, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ERANGE, errno.EDOM)


@contextmanager
def open_media(path):
    """A video or audio file through PyAV; a title in another encoding than UTF-8 is no reason to
    refuse it. Raises FFmpegError for what is wrong with the content, a plain OSError for what is
    wrong with the system."""
    with reading(path), open(path, "rb") as file:
        source = Source(path, file)
        try:
            with av.open(source, metadata_errors="ignore") as container:
                yield container
        except av.error.MemoryError:
            memory_or_content()
            raise
        except av.error.FFmpegError as error:
            if error.errno in errno.errorcode and error.errno not in SAID_OF_CONTENT:
                raise OSError(error.errno, error.strerror) from None
            raise
        finally:
            if source.error:
                raise source.error


@contextmanager
def skipping(kind, path):
    """What is wrong with a file's content becomes the reason to skip it, and so does its
    absence."""
    try:
        yield
    except FileNotFoundError:
        if not Path(path).parent.is_dir():  # a whole folder is gone: a disk that is not mounted
            raise
        raise NoFile("no such file") from None
    except av.error.FFmpegError as error:
        raise SkipClip(f"unreadable {kind} ({error.strerror or type(error).__name__})") from None
    except IndexError:  # PyAV's, where a packet is of none of the streams
        raise SkipClip(f"unreadable {kind} (a stream that its header does not name)") from None


def film(container):
    """The first video stream that is no cover picture, ready to decode."""
    stream = next(
        (s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None
    )
    if stream is None or stream.codec_context is None:
        raise SkipClip(
            "no video stream" if stream is None else "unreadable video (no decoder for it)"
        )
    large = stream.width * stream.height > 2**16  # a thread holds several frames, 12 MB each at 4K
    stream.thread_type, stream.codec_context.thread_count = "AUTO", 2 if large else 1
    return stream


def slot(time_s, fps):
    """ffmpeg's fps filter: the nearest multiple of 1 / fps, halves away from zero. time_s:
    Fraction. In whole numbers, ten times faster than with fractions: a clip asks hundreds of
    times."""
    (high, low), (rate, per) = time_s.as_integer_ratio(), fps.as_integer_ratio()
    nearest = (2 * abs(high) * rate + low * per) // (2 * low * per)
    return nearest if high >= 0 else -nearest


def read_frames(path, wanted, duration_s):
    """A video's first duration_s at several rates, decoded once. wanted: [(fps, transform), ...];
    transform: (3, H, W) uint8 -> tensor. Returns a list of (duration_s * fps, ...) tensors. Raises
    SkipClip.

    The rule is the fps filter's, as in torio, with which MMAudio's data sets and av-benchmark read:
    picture i is the last frame whose slot is at most i, counted from the first frame's; the last
    frame is held for its own duration; a display matrix turns nothing. A changed size is scaled to
    the first. What no slot shows is not converted, and no frame is kept: a transform that shrinks
    bounds the memory."""
    grids = [*(fps for fps, _ in wanted), FINEST_FPS]
    counts = [round(duration_s * fps) for fps in grids]
    out, done, last, reformat = (
        [None] * len(wanted),
        [0] * len(wanted),
        None,
        av.video.reformatter.VideoReformatter(),
    )

    def slots(time_s):
        return [slot(time_s, fps) - start for fps, start in zip(grids, starts)]

    def show_last(until):
        picture = None
        for k, (_, transform) in enumerate(wanted):
            end = min(until[k], counts[k])
            if done[k] < end:
                if picture is None:
                    shown = reformat.reformat(
                        last, *size, "rgb24", threads=1
                    )  # the others have work of their own
                    picture = torch.from_numpy(shown.to_ndarray()).permute(2, 0, 1)
                shown = transform(picture)
                out[k] = shown.new_empty(counts[k], *shown.shape) if out[k] is None else out[k]
                out[k][done[k] : end], done[k] = shown, end

    with skipping("video", path), open_media(path) as container:
        stream = film(container)
        for frame in container.decode(stream):
            if frame.pts is None:
                raise SkipClip("frames without time stamps")
            time_s = frame.pts * frame.time_base
            if last is None:
                start_s, starts, size = (
                    time_s,
                    [slot(time_s, fps) for fps in grids],
                    (frame.width, frame.height),
                )
            elif (
                time_s < last.pts * last.time_base
            ):  # B-frames in AVI: ffmpeg itself shows them late or drops them
                raise SkipClip("time stamps out of order")
            show_last(until := slots(time_s))
            last = frame
            if until[-1] >= counts[-1] and done == counts[:-1]:
                return out
        if last is None:
            raise SkipClip("no frames")
        end_s = time_s + (
            last.duration * last.time_base or 1 / (stream.average_rate or Fraction(25))
        )
        if slots(end_s)[-1] < counts[-1]:
            raise SkipClip(
                f"too short: {float(end_s - start_s):.2f} s of video, {duration_s:.2f} s needed"
            )
        show_last(counts)
    return out


def read_audio(path, sample_rate_hz, duration_s=None, pad=True):
    """The first audio stream of any container as mono (S,) float32 at sample_rate_hz, the mean of
    its channels; with duration_s, cut and (`pad`) zero-padded to it. Beside a video, sample 0
    belongs to the first frame: by its time stamps, sound is led by silence or cut. Raises SkipClip,
    NoAudio where there is no stream."""
    wave = resample(*decode_audio(path, duration_s), sample_rate_hz)
    samples = len(wave) if duration_s is None else round(duration_s * sample_rate_hz)
    return fit_length(wave, samples) if pad else wave[:samples]


def decode_audio(path, duration_s=None):
    """(S,) float32 mono and its rate; of a longer file duration_s, and 0.1 s more for the filter of
    `resample`."""
    need_s, wave = math.inf if duration_s is None else duration_s + 0.1, None
    with skipping("audio", path):
        with reading(path), open(path, "rb") as file:
            is_wav = re.match(rb"RIFF....WAVE", file.read(12), re.DOTALL)
        if is_wav:  # ten times faster than through ffmpeg, which is left what soundfile does not know or cannot read
            with (
                suppress(soundfile.SoundFileError),
                reading(path),
                soundfile.SoundFile(path) as file,
            ):
                samples = -1 if duration_s is None else math.ceil(need_s * file.samplerate)
                wave, rate = (
                    file.read(samples, "float32", always_2d=True).mean(axis=1),
                    file.samplerate,
                )
        if wave is None:
            wave, rate = decode_stream(path, need_s)
    if not len(wave):
        raise SkipClip("empty audio stream")
    return torch.from_numpy(wave), rate


def decode_stream(path, need_s):
    """(S,) float32 array and its rate: the first audio stream from the first picture on, need_s of
    it or all."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise NoAudio("no audio stream")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec is None:
            raise SkipClip("unreadable audio (no decoder for it)")
        layout, rate = codec.layout, codec.sample_rate
        if (
            "(" in layout.name
        ):  # PyAV 18 would free a custom order of channels twice; the mean needs no order
            codec.layout = f"{layout.nb_channels} channels"
        first_s = first_picture_s(path) if container.streams.video else None
        pieces, total, kind = [np.zeros(0, np.float32)], None, None
        for frame in container.decode(stream):
            if (
                total is None
            ):  # samples since the first picture: silence where it is above 0, to be cut where below
                total = 0 if None in (first_s, frame.time) else round((frame.time - first_s) * rate)
                pieces.append(np.zeros(int(max(0, min(total, need_s * rate))), np.float32))
            known, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
            if (
                kind != known
            ):  # also in mid-stream. Packed, as PyAV miscounts the planes of 8 channels and more
                form = (
                    "flt" if frame.layout.nb_channels > 1 else "fltp"
                )  # of one channel the same, and often given
                packed = av.AudioResampler(format=form, layout=frame.layout, rate=rate)
            for part in packed.resample(frame):
                piece = part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(axis=1)
                pieces.append(piece[max(0, -total) :])
                total += len(piece)
            if total >= need_s * rate:
                break
        return np.concatenate(pieces), rate


def first_picture_s(path):
    """When a file's first frame is shown; None where no video can be read."""
    with suppress(SkipClip, av.error.FFmpegError), open_media(path) as container:
        return next((frame.time for frame in container.decode(film(container))), None)
    return None


def resample(wave, rate, new_rate):
    """torchaudio's windowed sinc. Its table of filters grows with the product of both rates over
    their common divisor (44,099 to 16,000 Hz: 2.8 GB, and four times that to make it); where it is
    large, the same filter runs in scipy."""
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    if old * new < 2**20:
        return torchaudio.functional.resample(wave, rate, new_rate)
    from scipy.signal import upfirdn

    cutoff = 0.99 * min(
        old, new
    )  # torchaudio's rolloff; six zero crossings on either side, under a squared cosine
    reach = math.ceil(6 * new / cutoff)  # new samples
    i = np.arange(-reach * old, reach * old + 1)  # time in units of 1 / (old * new)
    phase = (
        i * pow(old, -1, new) % new
    )  # time is the sum of two fractions in float32, whose rounding is at -70 dB
    t = np.float32((phase * old - i) // new / old) - np.float32(phase / new)
    t *= np.float32(cutoff)
    taps = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2, 0) * (cutoff / old)
    out = upfirdn(np.float32(taps), wave.numpy(), new, old)
    return torch.from_numpy(out[reach : reach + math.ceil(len(wave) * new / old)])


def fit_length(wave, samples):
    """Cut or zero-padded along the last dimension."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def write_audio(path, wave, sample_rate_hz):
    """wave: (S,) float32, clipped to [-1, 1] (what is not finite becomes 0) -> 16-bit wav. Returns
    what need not be found out by opening it again: digest, finite, peak (of full scale), clipped
    (share of samples at full scale)."""
    heard = torch.nan_to_num(wave.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
    level = heard.abs()
    with replacing(path) as temporary:
        soundfile.write(temporary, heard.numpy(), sample_rate_hz, subtype="PCM_16")
    about = dict(
        digest=digest(path), finite=bool(wave.isfinite().all()), peak=round(level.max().item(), 6)
    )
    return dict(about, clipped=round((level >= 0.999).float().mean().item(), 6))


def wide_band_pesq(reference, wave):
    """P.862.2 at 16 kHz, 1.0 to 4.64, of two (S,) float32 arrays, cut to the shorter. nan where the
    reference has no utterance; 1.0, the scale's floor, where the other is silent (below -80 dB of
    full scale) or not finite."""
    from pesq import NoUtterancesError, PesqError, pesq  # a C extension, for this score alone

    samples = min(len(reference), len(wave))
    reference, wave = reference[:samples], wave[:samples]
    if samples < 4000 or np.abs(reference).max() < 1e-4:
        return math.nan
    if not np.isfinite(wave).all() or np.abs(wave).max() < 1e-4:
        return 1.0
    try:
        return pesq(16000, reference, wave, "wb")
    except NoUtterancesError:  # depends on the reference alone
        return math.nan
    except (PesqError, ValueError):  # ValueError: its result is nan, as for silence
        return 1.0


def pesq_scores(references, waves, workers):
    """waves (B, S) at 16 kHz, each against its reference, (S,) or None, by so many processes ->
    (B,), nan for None."""
    rows = [i for i, reference in enumerate(references) if reference is not None]
    jobs = [(references[i].numpy(), waves[i].float().cpu().numpy()) for i in rows]
    scores = torch.full((len(waves),), math.nan)
    scores[rows] = torch.tensor(in_processes(wide_band_pesq, jobs, workers))
    return scores
