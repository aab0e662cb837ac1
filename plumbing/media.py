"""Video and audio through PyAV. Every model, scorer and page reads through these functions."""

import functools
import math
import sys
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
from tqdm import tqdm

from plumbing import files
from plumbing.ahead import in_processes
from plumbing.files import NoAudio, NoFile, SkipClip

# The highest frame rate that any reader wants, Synchformer's. It alone decides whether a video is
# long enough, so that a video is too short for all readers or for none.
FINEST_FPS = 25
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4", ".opus")  # of given audio


class Source:
    """An open file for FFmpeg to read. After a failed read FFmpeg would try again; PyAV raises the
    first error and would print the others. So after the first error the file ends for FFmpeg."""

    def __init__(self, file):
        self.file = file
        self.name = file.name
        self.seek = file.seek
        self.tell = file.tell
        self.failed = False

    def read(self, size):
        if self.failed:
            return b""
        self.failed = True
        content = self.file.read(size)
        self.failed = False
        return content


@contextmanager
def open_media(path):
    """Opens a video or audio file with PyAV; metadata in another encoding than UTF-8 is ignored.
    Python opens and reads the file for FFmpeg, so that an error of the disk is raised as Python's,
    and an FFmpegError is always about the content."""
    with files.reading(path), open(path, "rb") as file:
        try:
            with av.open(Source(file), metadata_errors="ignore") as container:
                yield container
        except av.error.MemoryError:
            files.raise_if_memory_is_short()
            raise
        except av.error.BlockingIOError as error:  # the system gives it no further thread
            raise OSError(error.errno, error.strerror) from None


@contextmanager
def skipping(kind, path):
    """Turns a fault in a file's content, or its absence, into a SkipClip with the reason."""
    try:
        yield
    except FileNotFoundError:
        if not Path(path).parent.is_dir():  # the whole folder is gone: perhaps an unmounted disk
            raise
        raise NoFile("no such file") from None
    except av.error.FFmpegError as error:
        raise SkipClip(f"unreadable {kind} ({error.strerror or type(error).__name__})") from None
    except OSError as error:
        if files.of_system(error):
            raise
        raise SkipClip(f"unreadable {kind} ({error.strerror})") from None
    except IndexError:  # PyAV raises this for a packet that belongs to none of the streams
        raise SkipClip(f"unreadable {kind} (a stream that its header does not name)") from None


def film(container):
    """A container's first video stream that is no cover picture, ready to decode."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            break
    else:
        raise SkipClip("no video stream")
    if stream.codec_context is None:
        raise SkipClip("unreadable video (no decoder for it)")
    stream.thread_type = "AUTO"
    # Each thread holds several frames, of 12 MB at 4K; for small pictures a second one gains
    # nothing.
    stream.codec_context.thread_count = 2 if stream.width * stream.height > 2**16 else 1
    return stream


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def slot(time_s, fps):
    """The nearest multiple of 1 / fps to a time (a Fraction), halves away from zero."""
    nearest = math.floor(abs(time_s) * Fraction(fps) + Fraction(1, 2))
    return nearest if time_s >= 0 else -nearest


def time_of(frame):
    if frame.pts is None:
        raise SkipClip("frames without time stamps")
    return frame.pts * frame.time_base


class Grid:
    """The pictures for one reader of a video, one every 1 / fps s from the first frame on, by the
    rule of ffmpeg's fps filter: picture i is the last frame whose slot, counted from that of the
    first frame, is at most i."""

    def __init__(self, fps, transform, start_s, duration_s):
        self.fps = fps
        self.transform = transform
        self.first = slot(start_s, fps)
        self.count = round(duration_s * fps)
        self.done = 0
        self.pictures = None  # (count, ...), of which the first `done` are filled in

    def ends_by(self, time_s):
        return slot(time_s, self.fps) - self.first >= self.count

    def hold(self, frame, picture_of, until_s=None):
        """Fills the empty slots before that of until_s, or all that are left, with this frame. A
        frame that fills no slot is not converted."""
        end = self.count
        if until_s is not None:
            end = min(end, slot(until_s, self.fps) - self.first)
        if self.done < end:
            picture = self.transform(picture_of(frame))
            if self.pictures is None:
                self.pictures = picture.new_empty(self.count, *picture.shape)
            self.pictures[self.done : end] = picture
            self.done = end


def read_frames(path, wanted, duration_s):
    """The pictures of a video's first duration_s at several frame rates, decoded once. wanted:
    [(fps, transform), ...]; transform: (3, H, W) uint8 -> tensor. Returns a list of (duration_s *
    fps, ...) tensors. Raises SkipClip.

    The pictures are those that torio would give, by which MMAudio's data sets and av-benchmark read
    videos (`Grid`). The last frame is held for its own duration; a display matrix is ignored;
    frames of another size are scaled to the first frame's. Frames are not kept, so that memory is
    bounded where the transforms shrink them."""
    reformatter = av.video.reformatter.VideoReformatter()
    with skipping("video", path), open_media(path) as container:
        stream = film(container)
        frames = container.decode(stream)
        last = next(frames, None)
        if last is None:
            raise SkipClip("no frames")
        start_s = time_of(last)
        size = (last.width, last.height)
        grids = [Grid(fps, transform, start_s, duration_s) for fps, transform in wanted]
        finest = Grid(FINEST_FPS, None, start_s, duration_s)

        @functools.lru_cache(maxsize=1)
        def picture_of(frame):
            # One thread, since the other cores have work of their own.
            picture = reformatter.reformat(frame, *size, "rgb24", threads=1)
            return torch.from_numpy(picture.to_ndarray()).permute(2, 0, 1)

        for frame in frames:
            time_s = time_of(frame)
            if time_s < time_of(last):
                # As of B-frames in AVI, which ffmpeg itself shows late or drops.
                raise SkipClip("time stamps out of order")
            for grid in grids:
                grid.hold(last, picture_of, time_s)
            last = frame
            if all(grid.ends_by(time_s) for grid in (finest, *grids)):
                break
        else:
            last_s = last.duration * last.time_base or 1 / (stream.average_rate or Fraction(25))
            end_s = time_of(last) + last_s
            if not finest.ends_by(end_s):
                found = f"{float(end_s - start_s):.2f} s of video"
                raise SkipClip(f"too short: {found}, {duration_s:.2f} s needed")
            for grid in grids:
                grid.hold(last, picture_of)
    return [grid.pictures for grid in grids]


# --------------------------------------------------------------------------------------------------
# Sound
# --------------------------------------------------------------------------------------------------


def audio_files(folder):
    """{name without suffix: file} of the audio files in a folder. Where several have one name, the
    .wav is taken."""
    found = {}
    for file in sorted(folder.glob("[!.]*"), key=lambda file: file.suffix.lower()):
        # is_file() leaves out folders, pipes, and links whose target is gone.
        if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file():
            found[file.stem] = file  # .wav comes last, and replaces others of its name
    return found


def read_audio(path, sample_rate_hz, duration_s=None, pad=True):
    """The first audio stream of any container as mono (S,) float32 at sample_rate_hz, the mean of
    its channels. With duration_s it is cut to that and, with `pad`, zero-padded to it. In a file
    with video, sample 0 belongs to the first frame: by its time stamps, later sound gets silence in
    front and earlier sound is cut. Raises NoAudio where there is no stream, else SkipClip."""
    wave = resample(*decode_audio(path, duration_s), sample_rate_hz)
    samples = len(wave) if duration_s is None else round(duration_s * sample_rate_hz)
    return fit_length(wave, samples) if pad else wave[:samples]


def decode_audio(path, duration_s=None):
    """Mono sound (S,) float32 and its rate. Of a longer file only the first duration_s are read,
    and 0.1 s more for the filter of `resample`."""
    need_s = math.inf if duration_s is None else duration_s + 0.1
    with skipping("audio", path):
        wave, rate = decode_wav(path, need_s) or decode_stream(path, need_s)
    if not len(wave):
        raise SkipClip("empty audio stream")
    return torch.from_numpy(wave), rate


def decode_wav(path, need_s):
    """What `decode_stream` returns, but ten times faster, for a wav. None where the file is no wav,
    or is one that soundfile cannot read and FFmpeg perhaps can."""
    with files.reading(path), open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return None
    with files.reading(path), suppress(soundfile.SoundFileError), soundfile.SoundFile(path) as file:
        samples = -1 if need_s == math.inf else math.ceil(need_s * file.samplerate)
        wave = file.read(samples, "float32", always_2d=True).mean(axis=1)
        return wave, file.samplerate
    return None


def decode_stream(path, need_s):
    """The first audio stream as an (S,) float32 array and its rate, from the first picture on, for
    need_s or to its end."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise NoAudio("no audio stream")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec is None:
            raise SkipClip("unreadable audio (no decoder for it)")
        layout = codec.layout
        rate = codec.sample_rate
        # PyAV 18 would free a custom order of channels twice. We need no order, only the mean.
        if "(" in layout.name:
            codec.layout = f"{layout.nb_channels} channels"
        picture_s = first_picture_s(path) if container.streams.video else None
        late = 0  # samples from the first picture to the first sound, negative if that is earlier
        pieces = [np.zeros(0, np.float32)]
        total = 0
        kind = None
        for frame in container.decode(stream):
            if kind is None and picture_s is not None and frame.time is not None:
                late = round((frame.time - picture_s) * rate)
                pieces.append(np.zeros(int(min(max(0, late), need_s * rate)), np.float32))
            if kind != (frame.format.name, frame.layout.name, frame.sample_rate):
                # The format may change in mid-stream. Samples are packed, since PyAV miscounts the
                # planes of 8 channels and more.
                kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                packer = av.AudioResampler(format="flt", layout=frame.layout, rate=rate)
            for part in packer.resample(frame):
                piece = part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(axis=1)
                pieces.append(piece)
                total += len(piece)
            if late + total >= need_s * rate:
                break
        return np.concatenate(pieces)[max(0, -late) :], rate


def first_picture_s(path):
    """The time in seconds of a file's first frame; None where no video can be read."""
    with suppress(SkipClip, av.error.FFmpegError), open_media(path) as container:
        return next((frame.time for frame in container.decode(film(container))), None)
    return None


def resample(wave, rate, new_rate):
    """(S,) -> (ceil(S * new_rate / rate),), by torchaudio's windowed sinc. Its table of filters
    grows with the product of both rates, each divided by their common divisor: from 44,099 to
    16,000 Hz it takes 2.8 GB, and four times that to make. Where it would be large, FFmpeg's
    resampler is used instead."""
    divisor = math.gcd(rate, new_rate)
    if rate * new_rate < 2**20 * divisor**2:
        return torchaudio.functional.resample(wave, rate, new_rate)
    frame = av.AudioFrame.from_ndarray(wave.numpy()[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=new_rate)
    parts = [part.to_ndarray()[0] for part in resampler.resample(frame) + resampler.resample(None)]
    samples = math.ceil(len(wave) * new_rate / rate)
    return fit_length(torch.from_numpy(np.concatenate(parts)), samples)


def clip_sound(path, sample_rate_hz, duration_s, pad=True):
    """The sound of a clip that stage 01 found, by `read_audio`, for PESQ to compare with; None
    where it has no sound that can be read."""
    try:
        return read_audio(path, sample_rate_hz, duration_s, pad)
    except NoAudio:
        return None
    except NoFile:
        files.gone(path)
    except SkipClip as reason:
        tqdm.write(f"{path}: {reason}; PESQ cannot use it", file=sys.stderr)
        return None


def fit_length(wave, samples):
    """The wave, cut or zero-padded along the last dimension to this many samples."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def write_audio(path, wave, sample_rate_hz):
    """Writes a wave (S,) float32 as a 16-bit wav, clipped to [-1, 1]; values that are not finite
    become 0. Returns what is stored about it, so that the file need not be opened again: digest,
    finite, peak (of full scale), clipped (share of samples at full scale)."""
    heard = torch.nan_to_num(wave.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
    level = heard.abs()
    with files.replacing(path) as temporary:
        soundfile.write(temporary, heard.numpy(), sample_rate_hz, subtype="PCM_16")
    return {
        "digest": files.digest(path),
        "finite": bool(wave.isfinite().all()),
        "peak": round(level.max().item(), 6),
        "clipped": round((level >= 0.999).float().mean().item(), 6),
    }


def encode_picture(container, stream, frames):
    """Writes frames, an (n, H, W, 3) uint8 array with even H and W, into an H.264 stream of an open
    container, as 4:2:0, which every browser plays."""
    stream.height = frames.shape[1]
    stream.width = frames.shape[2]
    stream.pix_fmt = "yuv420p"
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))


def wide_band_pesq(reference, wave):
    """PESQ by P.862.2 at 16 kHz, 1.0 to 4.64, of two (S,) float32 arrays, cut to the shorter one.
    nan where the reference has no utterance; 1.0, the lowest value of the scale, where the wave is
    silent (below -80 dB of full scale) or not finite."""
    from pesq import NoUtterancesError, PesqError, pesq  # a C extension, for this score alone

    samples = min(len(reference), len(wave))
    reference, wave = reference[:samples], wave[:samples]
    if samples < 4000 or np.abs(reference).max() < 1e-4:
        return math.nan
    # The package fails for a silent wave, fails for infinity as if the reference had no utterance,
    # and rates a wave that is almost silent.
    if not np.isfinite(wave).all() or np.abs(wave).max() < 1e-4:
        return 1.0
    try:
        return pesq(16000, reference, wave, "wb")
    except NoUtterancesError:
        return math.nan
    except (PesqError, ValueError):
        return 1.0


def pesq_scores(references, waves, workers):
    """PESQ of waves (B, S) at 16 kHz, each against its reference, (S,) or None, by this many
    processes -> (B,), nan where the reference is None."""
    rows = [i for i, reference in enumerate(references) if reference is not None]
    jobs = [(references[i].numpy(), waves[i].float().cpu().numpy()) for i in rows]
    scores = torch.full((len(waves),), math.nan)
    scores[rows] = torch.tensor(in_processes(wide_band_pesq, jobs, workers))
    return scores
