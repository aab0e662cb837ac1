"""Other people's disks, terminals and processors: what fails there is told apart from what merely
is not there."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    STAGES,
    arguments,
    call,
    ended,
    make_video,
    read,
    said,
    stage,
    start,
    stopped,
)

import common
from common import command, files, inputs, record
from plumbing import cores

# Disks


def failing(*codes):
    """A system call that fails with each of these errors in turn, the last one for good."""
    left = [*codes]

    def call(*_):
        code = left.pop(0) if len(left) > 1 else left[0]
        raise OSError(code, os.strerror(code))

    return call


NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EACCES, errno.EIO, errno.EOPNOTSUPP]


@pytest.mark.parametrize("code", NO_LOCKS)
def test_where_locks_do_not_work_that_is_said_once_for_a_run_and_the_work_goes_on(
    code, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    monkeypatch.setattr(record, "unlocked", set())
    foreign = tmp_path / "run" / "01_audio" / ".a_0.wav.71.tmp.wav"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    for name in ("01", "02"):
        with record.stage(tmp_path / "run", name):
            pass
    assert foreign.exists()  # perhaps another process is writing it
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'run'}: ")
    said(line, os.strerror(code), "two commands")
    with record.stage(tmp_path / "another", "01"):
        assert str(tmp_path / "another") in capsys.readouterr().err


def test_only_a_lock_that_another_holds_means_another_process(tmp_path, monkeypatch):
    (tmp_path / ".01.lock").write_text("process 71 on elsewhere")
    monkeypatch.setattr(fcntl, "lockf", failing(errno.EAGAIN))
    line = stopped(record.stage(tmp_path, "01").__enter__)
    assert "being made by process 71 on elsewhere" in line


HOLDER = """
import sys
from common import record
part = (int(sys.argv[3]), 4) if sys.argv[3:] else None
with record.stage(sys.argv[1], sys.argv[2], part=part):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run, *what):
    """Another process that makes a stage, or a part of it."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", HOLDER, str(run), *what]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.communicate("")


def test_two_commands_on_one_output_are_refused_and_05_and_06_side_by_side_are_not(tmp_path):
    with holder(tmp_path, "05_flow_dpo") as other:
        line = stopped(record.stage(tmp_path, "05_flow_dpo").__enter__)
        said(line, f"05_flow_dpo is being made by process {other.pid} on ")
        said(line, "wait for it, or stop it")
        with record.stage(tmp_path, "06_ddpo"), record.stage(tmp_path, "05_another"):
            pass
    with record.stage(tmp_path, "05_flow_dpo"):
        pass


def test_parts_are_made_side_by_side_and_keep_out_themselves_and_the_whole_stage(tmp_path):
    half_written = tmp_path / "03_scores" / ".00000.pesq.pt.71.tmp.pt"
    half_written.parent.mkdir()
    half_written.touch()
    with holder(tmp_path, "03", "2") as other:
        made_by = f"is being made by process {other.pid} on "
        said(stopped(record.stage(tmp_path, "03", part=(2, 4)).__enter__), "part_2_of_4", made_by)
        said(stopped(record.stage(tmp_path, "03").__enter__), made_by)
        with record.stage(tmp_path, "03", part=(1, 4)):
            assert half_written.exists()  # another part may be writing it
    with holder(tmp_path, "03"):
        said(stopped(record.stage(tmp_path, "03", part=(2, 4)).__enter__), "03 is being made by")
    with record.stage(tmp_path, "03"):
        assert not half_written.exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_synced_is_no_error_and_a_file_is(code, tmp_path, monkeypatch):
    original, refused = os.fsync, failing(code)

    def fsync(handle):
        is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
        return refused(handle) if is_folder == folders else original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folders = True
    files.write_text(tmp_path / "x.txt", "whole")
    assert (tmp_path / "x.txt").read_text() == "whole"
    folders = False
    line = stopped(files.write_text, tmp_path / "y.txt", "lost")
    assert f"{tmp_path / 'y.txt'}: cannot be written ({os.strerror(code)})" in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


# Moved things


@pytest.fixture
def generated(finished, tmp_path, toy):
    """A run on two videos of its own, with the toy model from a folder elsewhere, and its flags."""
    for i in range(2):
        make_video(tmp_path / "videos" / f"{i}.mp4")
    flags = (*toy, "--videos", tmp_path / "videos", "--workers", 0)
    call("01", tmp_path / "run", *flags)
    return tmp_path / "run", flags


def world_at(folder, finished):
    """The toy model and what must lie beside it, elsewhere."""
    folder.mkdir()
    for name in ("00_scorers.pt", "run.json", "00_base.pt"):
        moved = shutil.copy(finished / name, folder / name)
    return moved


def replaced(flags, name, value):
    flags = [*flags]
    flags[flags.index(name) + 1] = value
    return flags


def test_the_same_checkpoint_and_videos_elsewhere_go_on_and_the_run_may_be_renamed(
    generated, finished, tmp_path
):
    run, flags = generated
    before = {path: path.stat().st_mtime_ns for path in (run / "01_samples").iterdir()}
    moved = world_at(tmp_path / "copy", finished)
    call("01", run, *replaced(flags, "--checkpoint", moved))
    (tmp_path / "videos").rename(tmp_path / "films")
    flags = replaced(flags, "--videos", tmp_path / "films")
    call("01", run, *replaced(flags, "--checkpoint", moved))
    assert {path: path.stat().st_mtime_ns for path in (run / "01_samples").iterdir()} == before
    run = run.rename(tmp_path / "renamed")
    known = inputs.read_run(run)
    assert (known.checkpoint, known.video_root) == (str(moved), str(tmp_path / "films"))
    assert all(clip.path.is_file() for clip in inputs.read_clips(run))
    common.load_base_model(run)
    os.remove(moved)
    line = stopped(common.load_base_model, run)
    assert str(moved) in line and "--checkpoint" in line


def test_a_checkpoint_of_another_content_is_refused_by_its_name(
    generated, finished, tmp_path, refused
):
    run, flags = generated
    other = world_at(tmp_path / "other", finished)
    state = files.load_pt(other)
    next(iter(state["net"].values())).add_(1)
    torch.save(state, other)
    line = refused("01", run, *replaced(flags, "--checkpoint", other))
    assert line.startswith(f"error: {other}: not the checkpoint that")
    assert "another --run-dir" in line


# Processors

V2 = "0::/kubepods/job\n"
V1 = "5:memory:/kubepods\n4:cpu,cpuacct:/kubepods/job\n1:name=systemd:/kubepods\n"


@pytest.mark.parametrize("listed, limits, expected", [
    ("", {}, 128),
    (V2, {"cpu.max": "200000 100000"}, 2),  # a container sees its own group as the top one
    (V2, {"kubepods/job/cpu.max": "150000 100000"}, 2),
    (V2, {"kubepods/job/cpu.max": "1000 100000"}, 1),
    # the group above has the limit
    (V2, {"kubepods/job/cpu.max": "max 100000", "kubepods/cpu.max": "300000 100000"}, 3),
    (V2, {"kubepods/job/cpu.max": "max 100000"}, 128),
    (V2, {"unified/kubepods/cpu.max": "500000 100000"}, 5),
    (V2, {"kubepods/job/cpu.max": "90000000 100000"}, 128),
    (V1, {"cpu,cpuacct/kubepods/job/cpu.cfs_quota_us": "250000"}, 3),
    (V1, {"cpu/cpu.cfs_quota_us": "200000"}, 2),
    (V1, {"cpu/kubepods/job/cpu.cfs_quota_us": "-1"}, 128),
    (V1, {"memory/kubepods/cpu.cfs_quota_us": "100000"}, 128),
])  # fmt: skip
def test_the_cores_are_those_that_the_control_groups_leave(
    listed, limits, expected, tmp_path, monkeypatch
):
    periods = {x.replace("quota", "period"): "100000" for x in limits if x.endswith("quota_us")}
    texts = {f"sys/fs/cgroup/{name}": text for name, text in (limits | periods).items()}
    for name, text in (texts | {"proc/self/cgroup": listed}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(128))
    assert cores.cores() == expected


SHARED = [(128, 1, 16), (128, 8, 16), (128, 16, 8), (2, 1, 2), (2, 8, 0)]


@pytest.mark.parametrize("here, ranks, expected", SHARED)
def test_the_workers_are_the_cores_of_a_rank_and_at_most_16(
    here, ranks, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(cores, "cores", lambda: here)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert stage("03").parse_args(arguments(tmp_path)).workers == expected


def test_torch_takes_no_more_threads_than_the_container_has_cores(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(cores, "cores", lambda: 2)
    command.launch(lambda args: None, lambda: None)
    assert threads == [2]


def test_without_affinity_the_pages_are_made_all_the_same(run, monkeypatch, without_pictures):
    monkeypatch.delattr(os, "sched_getaffinity")
    call("08", run, "rate")
    assert cores.cores() >= 1 and (run / "08_rate" / "00001.html").exists()


@pytest.mark.parametrize("number", ["00", "01", "08"])  # they differ in what they import first
def test_without_fcntl_as_on_windows_a_stage_is_one_line(number):
    code = "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = ended(sys.executable, "-c", code, STAGES[number].name, "--help")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "WSL" in done.stderr


# Terminals and names


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
], ids=["latin-1", "ascii", "C"])  # fmt: skip
def test_any_terminal_shows_what_it_can_and_names_of_files_are_utf_8(environment, tmp_path, toy):
    for name in ("弹琴", "café"):
        make_video(tmp_path / "ビデオ" / f"{name}.mp4")
    (tmp_path / "ビデオ" / "坏.mp4").write_bytes(bytes(1000))  # its name is in the report
    flags = (*toy, "--videos", tmp_path / "ビデオ", "--workers", 1)
    command = [sys.executable, STAGES["01"].name, *arguments(tmp_path / "è", *flags)]
    options = dict(capture_output=True, cwd=ROOT, timeout=300)
    done = subprocess.run(command, env=ENVIRONMENT | environment, **options)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert b"3 in, 2 used, 1 skipped" in done.stdout
    assert rb"\u574f" in done.stdout and "坏".encode() not in done.stdout
    assert [clip["id"] for clip in read(tmp_path / "è" / "clips.jsonl")] == ["café", "坏", "弹琴"]
    assert (tmp_path / "è" / "01_audio" / "弹琴_1.wav").exists()


def test_a_video_whose_name_is_no_clips_is_left_out_and_said_and_refused_when_strict(
    tmp_path, toy, refused, capsys
):
    # a folder's name is bytes, these are no UTF-8
    videos = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    good = make_video(tmp_path / "good.mp4")
    os.mkdir(videos)
    for name in ("good.mp4", os.fsdecode(b"caf\xe9.mp4"), "two\nlines.mp4"):
        shutil.copy(good, os.path.join(videos, name))
    flags = (*toy, "--videos", videos, "--workers", 0)
    line = refused("01", tmp_path / "strict", *flags, "--strict")
    said(line, "2 videos have names", r"caf\udce9.mp4", "rename them")
    call("01", tmp_path / "run", *flags)
    assert "2 videos have names" in capsys.readouterr().out
    assert [clip["id"] for clip in read(tmp_path / "run" / "clips.jsonl")] == ["good"]
    assert inputs.read_run(tmp_path / "run").video_root == os.path.realpath(videos)
    line = refused("01", os.fsdecode(b"caf\xe9"), *flags)
    assert "--run-dir" in line and "not UTF-8" in line


@pytest.mark.parametrize("number, flags", [
    ("00", ("--run-dir", "")), ("04", ("--run-dir", "")), ("01", ("--videos", "")),
    ("02", ("--audioscore", "")), ("02", ("--ratings", "a.csv", "")), ("05", ("--weights", "")),
    ("07", ("--systems", "base", "")),
])  # fmt: skip
def test_a_flag_that_an_unset_shell_variable_left_empty_is_refused_by_name(
    number, flags, tmp_path, refused
):
    line = refused(number, tmp_path / "run", *flags)
    said(line, f"{flags[0]}: is empty", "shell variable")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path, fits", [
    ("a/b.mp4", True), ("é" * 127 + "/a", True), ("é" * 128, False), ("a" * 255, True),
    ("a" * 256, False), ("", False), ("a\0b", False), ("a\udce9", True), ("a\ud800", False),
    (7, False), ("a/" * 1999, True), ("a/" * 2000, False),
])  # fmt: skip
def test_a_path_is_bytes_of_the_file_system(path, fits):
    assert files.is_path(path) == fits


# Ctrl-C


IN_PROCESSES = """
import importlib
world = importlib.import_module("00_toy_world")
world.SIZES["tiny"]["processes"] = 2
world.command.launch(world.main, world.parse_args)
"""


@pytest.mark.parametrize("number, flags, begun, code", [
    ("00", ("--size", "tiny"), "00_videos", IN_PROCESSES),  # as the larger worlds are made
    ("00", ("--size", "tiny"), "00_settings.json", None),
    ("01", ("--workers", 2), "run.json", None),
])  # fmt: skip
def test_ctrl_c_is_one_line_and_exit_code_130(number, flags, begun, code, tmp_path, toy):
    if number == "01":
        film = make_video(tmp_path / "videos" / "0.mp4")
        for i in range(1, 40):
            shutil.copy(film, film.with_stem(str(i)))
        flags = (*toy, *flags, "--videos", tmp_path / "videos", "--sampling-steps", 500)
    started = start(number, tmp_path / "run", *flags, code=code)
    while not (tmp_path / "run" / begun).exists() and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    errors = started.communicate(timeout=120)[1].replace("\r", "\n").splitlines()
    lines = [line for line in errors if line.strip() and "%|" not in line]
    assert lines == ["interrupted; run the same command again to go on"]
    assert started.returncode == 130


def test_what_fails_while_ctrl_c_ends_threads_and_workers_is_no_error(capsys):
    def main(args):
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("generator already executing")

    with pytest.raises(SystemExit) as ended:
        command.launch(main, lambda: None)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted; run the same command again to go on\n"
