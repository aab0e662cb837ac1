"""Reads and checks files, and writes them whole. A fault in a file that a person or another run has
made stops the stage in one line.

`rows` says what a line of a .jsonl must hold; `record` keeps what a stage's files were made from.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shlex
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------
# Failure
# --------------------------------------------------------------------------------------------------


class Stop(Exception):
    """A user error: one line that says what is wrong and what to do."""


class SkipClip(Exception):
    """A video or audio cannot be used. The text is the reason, which stage 01 counts and lists."""


class NoFile(SkipClip):
    """A file does not exist. Stage 01 skips its clip, later stages stop (`gone`)."""


class NoAudio(SkipClip):
    """A file has no audio stream. Where sound is read, any other SkipClip means that the sound
    cannot be read."""


def stop(message):
    raise Stop(message)


def run_flag(run):
    """--run-dir as it can be pasted into a shell, whatever the folder's name."""
    return f"--run-dir {shlex.quote(str(run))}"


def gone(path):
    """Stops because a file that stage 01 found no longer exists. The clip is not skipped, since
    that would be stored, and the clip would stay skipped when the file is back."""
    stop(f"{path}: gone, though stage 01 found it; put it back and run the same command again")


# --------------------------------------------------------------------------------------------------
# What a file holds: read, checked, written
# --------------------------------------------------------------------------------------------------


TEXT = r"[^\0\ud800-\udfff]*"  # no NUL, no half of a surrogate pair
NAME = r"(?!\.)[^\0\ud800-\udfff/\\\n\r]{1,200}"  # a name that a file may have
LONGEST_NAME = 200  # bytes


def is_text(x):
    return isinstance(x, str) and re.fullmatch(TEXT, x) is not None


def is_name(x):
    """Whether x is a name that a file can have, also with a suffix added (`<clip>_<k>.wav`)."""
    return is_text(x) and re.fullmatch(NAME, x) is not None and len(x.encode()) <= LONGEST_NAME


def is_path(x):
    """Whether x is a path that a file can have. A path consists of bytes; Python holds bytes that
    are not UTF-8 as lone surrogates."""
    try:
        path = os.fsencode(x)
    except (TypeError, UnicodeEncodeError):
        return False
    longest = max(map(len, path.split(b"/")))
    return 0 < len(path) < 4000 and longest <= 255 and b"\0" not in path


class Ignored:
    """Stands in for objects that a third-party file holds beside its tensors, so that these objects
    are never built."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # as torch words it, in a RuntimeError
# Types of numbers that the trainings of PANNs, CLAP and Frieren left in their checkpoints and that
# nobody needs, by their names in numpy 1 and in numpy 2.
NUMPY = ["numpy.dtype", "numpy.ndarray"]
for core in ("core", "_core"):
    NUMPY += [f"numpy.{core}.multiarray.scalar", f"numpy.{core}.multiarray._reconstruct"]


@contextmanager
def reading(path):
    """Used around code that reads `path`. It adds the file's name to an error of the system, which
    Python does only for errors in opening a file. Such an error ends the stage (`command.launch`);
    no reader may take it for a fault in the file's content."""
    try:
        yield
    except OSError as error:
        if error.strerror and not error.filename:
            error.filename = str(path)
        raise


def of_system(error):
    """Whether an error in a reader is a fault of the system (disk, rights, memory), not of the
    file's content. EINVAL counts as a fault of the content: a damaged file makes its reader seek to
    before the file's start."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error)


def raise_if_memory_is_short():
    """Raises a MemoryError if 256 MB cannot be allocated. If they can, a MemoryError that a reader
    has met is the fault of its file, which is damaged and asks for far more than there is."""
    bytearray(2**28)


def in_place_of(path):
    """What lies where a downloaded file should be, by its first bytes: a folder, a web page or a
    Git LFS pointer, as downloads without a login or without git-lfs leave them; "" for any
    other."""
    if Path(path).is_dir():
        return "a folder"
    with reading(path), open(path, "rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "a web page" if start.lstrip().startswith(b"<") else ""


def load_pt(path, fields=None, mmap=False, ignore=()):
    """The content of a .pt file of plain tensors, numbers, strings, lists and dicts. This is the
    only torch.load of this repository. fields: {name: type} that the file must hold; ignore: names
    of further types that may occur in it, whose objects are left out."""
    path = Path(path)
    if not path.is_file():
        stop(f"{path}: no such file")
    try:
        with reading(path), torch.serialization.safe_globals([(Ignored, name) for name in ignore]):
            value = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a truncated or foreign file
        if of_system(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        # Where torch cannot open or map a file, the text of its error ends with the system's
        # message and number:
        # "unable to mmap 9 bytes from file <a.pt>: Cannot allocate memory (12)".
        number = re.search(r"\((\d+)\)$", reason)
        if number and os.strerror(int(number[1])) in reason:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        other = in_place_of(path)
        if other:
            stop(f"{path}: is {other} in place of the file; download it again")
        refused = re.search(r"GLOBAL (\S+)", reason)  # a type that is not plain, so may run code
        if refused:
            reason = f"it holds {refused[1]}"
        advice = "make it anew or copy it again"
        stop(f"{path}: cannot be read as a .pt file of plain tensors ({reason:.160}); {advice}")
    for name, kind in (fields or {}).items():
        if not isinstance(value, dict) or name not in value:
            stop(f"{path}: field '{name}' is missing; make it anew or copy it again")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            stop(f"{path}, field '{name}': is no {kind.__name__}; make it anew or copy it again")
    return value


def load_weights(module, state, path, otherwise, finite=True, **options):
    """Loads a state dict into a module, strictly. Stops with `<path>: <otherwise>` where it is
    another module's, or, with `finite`, holds numbers that are not finite. options: further
    arguments of the module's load_state_dict."""
    try:
        module.load_state_dict(state, **options)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        stop(f"{path}: {otherwise}")
    if finite and not all(value.isfinite().all() for value in module.state_dict().values()):
        stop(f"{path}: holds numbers that are not finite, so it {otherwise}")


@contextmanager
def writing(path):
    """Used around code that writes `path` and does nothing else: a full disk or a missing right
    stops the stage in one line. (torch and libsndfile raise a RuntimeError for these.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        stop(
            f"{path}: cannot be written ({reason:.120}); make room or give the right, then run "
            "the command again"
        )


def sync(path):
    """Waits until a file's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path):
    """Yields a temporary name beside `path`, and renames the file to `path` on success, so that a
    file is either whole or absent, even after a power failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            # SMB, shared folders of virtual machines and Windows' drives under WSL cannot write a
            # folder's list of names to disk on demand; the files in it are whole all the same.
            with suppress(OSError):
                sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_pt(path, value):
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        # Given a path, torch would store the temporary name in the file, so that files with equal
        # content would differ.
        torch.save(value, stream)


def write_text(path, text):
    """Writes text in UTF-8. Bytes of a file's name that are not UTF-8 are written as JSON writes
    them, \\udcXX."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path, hint=""):
    """A file as text. Stops where it is not UTF-8, and says what it seems to be instead."""
    path = Path(path)
    if not path.is_file():
        stop(f"{path}: no such file{hint}")
    with reading(path), open(path, "rb") as stream:
        content = stream.read()
    if content[:2] == b"PK":
        stop(f"{path}: is a workbook (.xlsx) or another zip file; export it as .csv, UTF-8")
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        stop(f"{path}, line {line}: is UTF-16, or holds NUL characters; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        stop(f"{path}, line {line}: is not UTF-8; save it as UTF-8")


def unique(pairs):
    """The fields of a JSON object. Refuses two fields of the same name, of which Python would
    silently take the second."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field occurs twice")
    return found


JSON = json.JSONDecoder(object_pairs_hook=unique)


def parse_json(text, where, hint=""):
    """One JSON value."""
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError) as error:
        stop(f"{where}: not valid JSON ({error}){hint}")


def lines_of(path, hint=""):
    """The lines of a text file."""
    # splitlines would also split at a U+2028 within a caption.
    lines = read_text(path, hint).rstrip("\r\n").split("\n")
    return [] if lines == [""] else lines


def read_jsonl(path, hint=""):
    """[(line number, dict), ...] of a file by people or other programs; the fields are not yet
    checked."""
    found = []
    for number, line in enumerate(lines_of(path, hint), 1):
        where = f"{path}, line {number}"
        value = parse_json(line, where, hint)
        if not isinstance(value, dict):
            stop(f"{where}: {repr(value)[:60]} is not a set of fields{hint}")
        found.append((number, value))
    return found


def read_csv(path, columns, delimiter=",", header=True):
    """[(line number, {column: text}), ...] of a table. Its first line names its columns: these and
    perhaps others; with header=False there is no such line, and the table has exactly these
    columns. Texts are stripped, blank lines skipped. A stray quote stops the stage, since it would
    swallow lines."""
    stream = io.StringIO(read_text(path), newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    table = []
    line = 1  # where the next row begins
    try:
        for cells in reader:
            if any("\n" in cell for cell in cells[:-1]):  # the last column may have several lines
                stop(f"{path}, line {line}: a quote opens here and does not close on this line")
            if any(cell.strip() for cell in cells):
                table.append((line, [cell.strip() for cell in cells]))
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "look for a stray quote there, or save the table anew"
        stop(f"{path}, line {line}: {error}; {advice}")
    names = list(columns)
    if header:
        line, names = table.pop(0) if table else (1, [""])
        for name in [*columns, *filter(None, names)]:
            if names.count(name) != 1:
                what = "is missing" if name not in names else "occurs twice"
                stop(f"{path}, line {line}: column '{name}' {what}{advice_on(names, delimiter)}")
    for line, cells in table:
        if len(cells) != len(names):
            what = f"{len(cells)} fields, expected {len(names)} ({', '.join(columns)})"
            stop(f"{path}, line {line}: {what}; a stray quote?{advice_on(cells, delimiter)}")
    return [(line, dict(zip(names, cells))) for line, cells in table]


def advice_on(cells, delimiter):
    """The advice for a line that does not have the expected columns."""
    for mark in ";\t|,":
        if len(cells) == 1 and mark in cells[0]:
            return f"; its columns are separated by {mark!r}, save it with {delimiter!r}"
    return "; mend that line"


def inside(root, name, where):
    """The path root / name; stops where it leaves root (by .., an absolute path or a link)."""
    if not is_path(name):
        stop(f"{where}: {name!r:.60} is not a path that a file can have")
    # os.path is several times faster than pathlib, and a run asks this of every clip.
    root = os.path.realpath(root)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        stop(f"{where}: '{name}' points outside {root}; use a path below it")
    return Path(path)


def below(root, path):
    """A path as a run's files write it: relative to the run folder if it lies inside it, else
    absolute."""
    path = Path(path).resolve()
    root = Path(root).resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def digest_of(*parts):
    """The first 16 hex digits of the SHA-256 of some values, as a key for what depends on them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def digest(path):
    """The first 16 hex digits of the SHA-256 of a file, or of all .jsonl files of a folder in the
    order of their names. The only such folder is stage 01's; its lines hold the digests of the
    wavs, and so do the .pt files beside them."""
    path = Path(path)
    total = hashlib.sha256()
    if not path.exists():
        stop(f"{path}: no such file")
    for file in sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]:
        with reading(file), open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]
