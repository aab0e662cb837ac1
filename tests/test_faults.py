"""Faults of the system: one stops the stage in a line that names the file and is never a result; a
file's content alone is a reason to skip. And what a disk loses of stage 01's tensors is noticed."""

import builtins
import errno
import os
import shutil

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    a_clip,
    call,
    files_of,
    make_video,
    read,
    remove,
    said,
    shards_of,
    stage,
    stopped,
)

import common
from adapters.frieren import Frieren
from common import ahead, command, files, inputs, media, scoring
from plumbing.files import NO_MEMORY, NoFile

CODES = [errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOMEM, errno.EMFILE]
CODES += [errno.ENFILE, errno.ETIMEDOUT]

# An ill disk


class Ill:
    """An open file that cannot be read beyond some byte."""

    def __init__(self, file, code, end):
        self.file, self.code, self.end = file, code, end

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, size=-1):
        if size < 0 or self.file.tell() + size > self.end:
            raise OSError(self.code, os.strerror(self.code))
        return self.file.read(size)

    def readinto(self, buffer):
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def name_of(file):
    """Of a path, or of an open file."""
    return str(file.name if hasattr(file, "read") else file)


def replace(patch, owner, name, path, instead):
    """Calls `instead` in the place of owner.name where this path is opened, or a file of it."""
    original = getattr(owner, name)

    def opened(file, *rest, **options):
        call = instead if name_of(file) == str(path) else original
        return call(file, *rest, **options)

    patch.setattr(owner, name, opened)


def refusal(code, named=True):
    def refuse(file, *_, **__):
        raise OSError(code, os.strerror(code), *([name_of(file)] if named else []))

    return refuse


def not_opened(patch, path, code):
    replace(patch, builtins, "open", path, refusal(code))


def not_read(patch, path, code, share=0.0):
    original, end = builtins.open, share * os.path.getsize(path)
    ill = lambda *given, **options: Ill(original(*given, **options), code, end)  # noqa: E731
    replace(patch, builtins, "open", path, ill)


def cut_off(patch, path, code):
    not_read(patch, path, code, share=0.9)


def not_opened_by_pyav(patch, path, code):
    replace(patch, av, "open", path, refusal(code))


def not_opened_by_libsndfile(patch, path, code):
    replace(patch, soundfile, "SoundFile", path, refusal(code, named=False))


def said_by_ffmpeg(patch, path, code):
    replace(patch, av, "open", path, lambda file, **_: av.error.err_check(-code, file.name))


# Readers


def frames(path):
    return media.read_frames(path, [(8, torch.clone)], 1.0)


def sound(path):
    return media.read_audio(path, 16_000)


def cavp(path):
    clip = a_clip()
    clip.cavp = path
    return Frieren.read(Frieren.__new__(Frieren), clip)


READERS = [(frames, "a.mp4"), (sound, "a.mp4"), (sound, "a.wav"), (cavp, "a.npy"), (cavp, "a.npz")]
READERS += [(files.load_pt, "a.pt"), (files.digest, "a.pt"), (files.read_text, "a.json")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_video(folder / "a.mp4")
    soundfile.write(folder / "a.wav", np.zeros(4000), 8000)
    np.save(folder / "a.npy", np.zeros((40, 512), np.float32))
    np.savez(folder / "a.npz", feat=np.zeros((40, 512), np.float32))
    files.save_pt(folder / "a.pt", {"x": torch.zeros(500)})
    files.write_text(folder / "a.json", "x" * 1000)
    return folder


FAULTS = [(fault, *reader) for fault in (not_opened, not_read) for reader in READERS]
# libsndfile reads by itself, as far as it is asked to
FAULTS += [(cut_off, reader, name) for reader, name in READERS if name != "a.wav"]
FAULTS += [(not_opened_by_pyav, frames, "a.mp4"), (not_opened_by_pyav, sound, "a.mp4")]
FAULTS += [(not_opened_by_libsndfile, sound, "a.wav")]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("fault, reader, name", FAULTS)
def test_no_reader_takes_an_error_of_the_system_for_the_files_content(
    fault, reader, name, code, folder, monkeypatch
):
    fault(monkeypatch, folder / name, code)
    with pytest.raises(OSError) as raised:
        reader(folder / name)
    assert not isinstance(raised.value, av.error.FFmpegError)
    line = command.one_line(raised.value, None)
    assert line == f"{folder / name}: {os.strerror(code)}; mend that, then run the command again"


def test_sound_is_not_shifted_where_the_first_picture_cannot_be_read(folder, monkeypatch):
    """The second time that the file is opened, for the time of its first picture."""
    opened, original = [], av.open

    def open_once(file, **options):
        opened.append(file)
        if len(opened) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(file, **options)

    monkeypatch.setattr(av, "open", open_once)
    with pytest.raises(OSError, match="a.mp4"):
        sound(folder / "a.mp4")
    assert len(opened) == 2


def test_a_wav_that_libsndfile_cannot_read_is_read_by_ffmpeg(tmp_path, monkeypatch):
    wave = np.random.default_rng(0).uniform(-0.9, 0.9, 4000)
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    expected = sound(tmp_path / "a.wav")

    def system_error(path):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile, "SoundFile", system_error)
    torch.testing.assert_close(sound(tmp_path / "a.wav"), expected, rtol=0, atol=1e-6)


CONTENT = [errno.EIO, errno.EINVAL, errno.EPERM, errno.ENOMEM]
SYSTEM = [errno.EAGAIN, errno.EMFILE, errno.EACCES]


@pytest.mark.parametrize("reader", [frames, sound])
@pytest.mark.parametrize("code", CONTENT, ids=errno.errorcode.get)
def test_what_ffmpeg_says_of_a_file_that_can_be_read_is_said_of_its_content(
    reader, code, folder, monkeypatch
):
    said_by_ffmpeg(monkeypatch, folder / "a.mp4", code)
    with pytest.raises(common.SkipClip, match=os.strerror(code)):
        reader(folder / "a.mp4")


def test_a_thread_that_ffmpeg_cannot_have_is_an_error_of_the_system(folder, monkeypatch):
    said_by_ffmpeg(monkeypatch, folder / "a.mp4", errno.EAGAIN)
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)) as raised:
        frames(folder / "a.mp4")
    assert raised.value.filename == str(folder / "a.mp4")
    assert not isinstance(raised.value, av.error.FFmpegError)


@pytest.mark.parametrize(
    "suffix, voice", [("mp4", "aac"), ("mkv", "aac"), ("ts", "aac"), ("avi", "libmp3lame")]
)
def test_a_disk_that_fails_anywhere_in_a_file_is_told_from_the_files_end(
    suffix, voice, tmp_path, capfd
):
    """FFmpeg takes some errors of reading for the end of the file, or for damaged content."""
    path = make_video(tmp_path / f"a.{suffix}", voice=voice, options={"bf": "0"})
    whole = [frames(path)[0], sound(path)]
    for share in np.arange(0, 1, 0.04):
        for reader, expected in zip((lambda path: frames(path)[0], sound), whole):
            with pytest.MonkeyPatch.context() as patch:
                not_read(patch, path, errno.EIO, share)
                try:
                    assert torch.equal(reader(path), expected)  # what it needs lies before
                except OSError as error:
                    assert error.errno == errno.EIO and error.filename == str(path)
                    assert not isinstance(error, av.error.FFmpegError)
    assert capfd.readouterr().err == ""


def test_a_matroska_file_that_was_cut_is_skipped_though_ffmpeg_says_input_output_error(tmp_path):
    whole = make_video(tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[:300])
    with pytest.raises(common.SkipClip, match=r"unreadable video \(Input/output error\)"):
        frames(tmp_path / "a.mkv")


def test_a_file_that_is_gone_is_a_reason_and_a_folder_that_is_gone_is_not(tmp_path):
    with pytest.raises(NoFile, match="no such file"):
        frames(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError):
        frames(tmp_path / "disk" / "a.mp4")


NO_MAP = "unable to mmap 9 bytes from file <a.pt>: Cannot allocate memory (12)"
NO_HANDLE = "unable to open file <a.pt> in read-only mode: Too many open files (24)"
NO_ROOM = f"[enforce fail] {NO_MEMORY}: you tried to allocate 9 bytes."


@pytest.mark.parametrize("error, line", [
    (RuntimeError(NO_MAP), "a.pt: Cannot allocate memory"),
    (RuntimeError(NO_HANDLE), "a.pt: Too many open files"),
    (RuntimeError(NO_ROOM), "the machine's memory is full"),
    (MemoryError(), "the machine's memory is full"),
])  # fmt: skip
def test_torch_out_of_memory_or_files_asks_for_no_other_copy_of_the_file(
    error, line, folder, monkeypatch
):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises((OSError, MemoryError, RuntimeError)) as raised:
        files.load_pt(folder / "a.pt")
    found = command.one_line(raised.value, None)
    said(found, line, "run the command again")
    assert "copy it" not in found


def test_a_stamp_that_cannot_be_had_is_not_called_gone(folder, monkeypatch):
    original = os.stat

    def stat(path, **options):
        if str(path) == str(folder / "a.mp4"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match="Input/output error"):
        scoring.stamp(folder / "a.mp4")
    monkeypatch.undo()
    assert "gone" in stopped(scoring.stamp, folder / "none.mp4")


def fail(error):
    raise error


ERRORS = [OSError(errno.ESTALE, os.strerror(errno.ESTALE), "a.mp4"), MemoryError()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error, line", zip(ERRORS, ("a.mp4: Stale file handle", "memory is full")))
def test_an_error_of_the_system_comes_back_from_a_worker_with_its_file_and_reason(
    error, line, workers
):
    with pytest.raises(type(error)) as raised:
        next(ahead.read_ahead(fail, [error], workers))
    assert line in command.one_line(raised.value, None)


# Stages

SMALL = ("--sampling-steps", 2, "--num-samples", 2)


def ill_files(number, run):
    """[(fault, path), ...]: what a stage reads, and how it cannot be read."""
    split, nth = {"01": ("train", 3), "03": ("train", 0), "07": ("test", 1)}[number]
    clip = [clip for clip in read(run / "clips.jsonl") if clip["split"] == split][nth]
    video = run / "00_videos" / clip["video"]
    if number == "01":
        return [(x, video) for x in (not_opened, not_read, cut_off, not_opened_by_pyav)]
    if number == "03":
        wav = run / "01_audio" / f"{clip['id']}_1.wav"
        return [(not_read, video), (not_opened_by_libsndfile, wav), (not_opened, wav)]
    wav = run / "07_audio" / "base" / f"{clip['id']}.wav"
    return [(cut_off, video), (not_opened_by_pyav, video), (not_opened, wav)]


@pytest.mark.parametrize("number, code, flags, results", [
    ("01", errno.EIO, (*SMALL, "--workers", 0), ("01",)),
    ("01", errno.EIO, (*SMALL, "--workers", 2), ("01",)),
    ("03", errno.ESTALE, ("--redo", "--workers", 2), ("03_scores/00000.jsonl", "03_pairs")),
    ("07", errno.EMFILE, ("--systems", "base", "--workers", 2), ("07_results.jsonl",)),
])  # fmt: skip
def test_a_stage_stops_at_an_ill_disk_and_then_ends_as_if_nothing_had_been(
    number, code, flags, results, run, fresh, refused
):
    place = fresh if number == "01" else run
    remove(place, "03_scores", "07_clips", "07_scores")
    undisturbed = shutil.copytree(place, place.with_name("undisturbed"))
    for fault, path in ill_files(number, place):
        with pytest.MonkeyPatch.context() as patch:
            fault(patch, path, code)
            line = refused(number, place, *flags)
        assert line == f"error: {path}: {os.strerror(code)}; mend that, then run the command again"
        if number == "03":
            assert not [*place.glob("03_pairs.jsonl"), *place.glob("03_scores/*.toy.pt")]
    for one in (undisturbed, place):
        call(number, one, *flags)
    assert files_of(place, *results) == files_of(undisturbed, *results) != {}
    assert not [*place.glob("01_samples/*.skipped.jsonl")]


def test_a_folder_of_videos_that_cannot_be_read_is_not_left_out(
    tmp_path, toy, refused, monkeypatch
):
    make_video(tmp_path / "videos/a.mp4")
    make_video(tmp_path / "videos/more/b.mp4")
    original = os.scandir

    def scandir(folder):
        if str(folder).endswith("more"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return original(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    line = refused("01", tmp_path / "run", "--videos", tmp_path / "videos", *toy)
    assert "more: Permission denied" in line


# What a disk loses of the tensors


def test_a_single_bit_is_noticed_when_its_row_is_read_and_only_then(run):
    first, _, third, *_ = inputs.read_samples(run)
    whole, row = shards_of(run).latents([(first, 0)]), shards_of(run).latents([(third, 1)])
    file = run / "01_samples/00000.pt"
    content = bytearray(file.read_bytes())
    content[content.index(row.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert torch.equal(shards_of(run).latents([(first, 0)]), whole)
    shards_of(run).features([third])
    line = stopped(shards_of(run).latents, [(third, 1)])
    assert f"00000.pt: latents of clip {third} are not what stage 01 wrote" in line


def test_a_shard_of_an_older_version_is_said_to_be_one(run):
    file = files.load_pt(run / "01_samples/00000.pt")
    del file["crc32"]
    files.save_pt(run / "01_samples/00000.pt", file)
    line = stopped(shards_of(run).latents, [(next(iter(inputs.read_samples(run))), 0)])
    assert "an older version" in line


@pytest.mark.parametrize("left", [0, 0.5, 0.999])
def test_stage_01_makes_a_shard_again_that_has_been_cut(left, fresh, monkeypatch):
    monkeypatch.setattr(stage("01"), "SHARD_CLIPS", 8)
    call("01", fresh, *SMALL)
    whole, file = files_of(fresh, "01"), fresh / "01_samples/00001.pt"
    os.truncate(file, round(left * file.stat().st_size))
    call("01", fresh, *SMALL)
    assert files_of(fresh, "01") == whole
