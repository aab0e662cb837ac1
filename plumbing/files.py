"""Files: read, checked and written whole. What is wrong with one that a person or another run
brings ends in one line.

What a line of a .jsonl must hold is in `rows`, what a stage's files were made from in `record`.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
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
    """A video or audio that cannot be used; the text is the reason that stage 01 counts and
    lists."""


class NoFile(SkipClip):
    """A file that is not there: stage 01 skips it, for later stages it is gone."""


class NoAudio(SkipClip):
    """A silent film, which has no audio stream; any other SkipClip of `read_audio` is sound that
    cannot be read."""


def stop(message):
    raise Stop(message)


def gone(path):
    """For a NoFile after stage 01: no reason to go on without the file, which would outlast its
    absence."""
    stop(f"{path}: gone, though stage 01 found it; put it back and run the same command again")


# --------------------------------------------------------------------------------------------------
# What a file holds: read, checked, written
# --------------------------------------------------------------------------------------------------


LONGEST_NAME = 200  # bytes


def is_text(x):
    """No NUL, and no half of a surrogate pair."""
    return (
        isinstance(x, str)
        and "\0" not in x
        and (x.isascii() or x == x.encode(errors="ignore").decode())
    )


def is_name(x):
    """A name that a file can have."""
    return (
        is_text(x)
        and x[:1] not in ("", ".")
        and not set("/\\\n\r") & set(x)
        and len(x.encode()) <= LONGEST_NAME
    )


def is_path(x):
    """A path is bytes of the file system: those that are no UTF-8 Python carries as lone
    surrogates."""
    try:
        path = os.fsencode(x)
    except (TypeError, UnicodeEncodeError):
        return False
    longest = max(map(len, path.split(b"/")))
    return 0 < len(path) < 4000 and longest <= 255 and b"\0" not in path


class Ignored:
    """What a third-party file holds beside its tensors and nobody needs (numpy scalars, callbacks):
    never built."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # as torch words it, in a RuntimeError
NUMPY = [
    "numpy.dtype",
    "numpy.ndarray",
]  # learning rates, samplers; by the names of numpy 1 and of numpy 2
NUMPY += [
    f"numpy.{core}.multiarray.{name}"
    for core in ("core", "_core")
    for name in ("scalar", "_reconstruct")
]


@contextmanager
def reading(path):
    """Around what reads `path`: an error of the system names the file, as Python does only where
    it opens one. No reader takes such an error for what is wrong with the file's content: it ends
    the stage (`common.launch`)."""
    try:
        yield
    except OSError as error:
        if error.strerror and not error.filename:
            error.filename = str(path)
        raise


def of_system(error):
    """Whether what went wrong in a reader is the system's (a disk, a right, memory), not the
    file's content. EINVAL is the content's: a damaged file sends its reader to before its start."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error)


def memory_or_content():
    """After a MemoryError: raises one where memory is short. Else a damaged file has asked for far
    more than there is."""
    bytearray(2**28)


def load_pt(path, fields=None, mmap=False, ignore=()):
    """The only torch.load of this repository. path: a .pt of plain tensors, numbers, strings,
    lists, dicts; fields: {name: type} that it must hold; ignore: names of types that may occur in
    it, and are left out."""
    path = Path(path)
    if not path.is_file():
        stop(f"{path}: no such file")
    try:
        with reading(path), torch.serialization.safe_globals([(Ignored, name) for name in ignore]):
            value = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a truncated or foreign file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if of_system(error):
            raise
        # What torch cannot map it says in a text alone: "unable to mmap ...: Cannot allocate memory
        # (12)".
        told = re.search(r": ([^:]+) \((\d+)\)$", reason)
        if told and told[1] == os.strerror(int(told[2])):
            raise OSError(int(told[2]), told[1], str(path)) from None
        refused = re.findall(
            r"GLOBAL (\S+)", str(error)
        )  # a pickle may run code: only plain types are let in
        reason = f"it holds {refused[0]}" if refused else reason[:160]
        stop(
            f"{path}: cannot be read as a .pt file of plain tensors ({reason}); make it anew or "
            "copy it again"
        )
    for name, kind in (fields or {}).items():
        if not isinstance(value, dict) or name not in value:
            stop(f"{path}: field '{name}' is missing; make it anew or copy it again")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            stop(f"{path}, field '{name}': is no {kind.__name__}; make it anew or copy it again")
    return value


def load_weights(module, state, path, otherwise, finite=True):
    """Fills a module strictly; `<path>: <otherwise>` where the state is another's, or not finite if
    it must be."""
    try:
        module.load_state_dict(state)
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # as torch words it, for users
        stop(f"{path}: {otherwise}")
    if finite and not all(value.isfinite().all() for value in module.state_dict().values()):
        stop(f"{path}: holds numbers that are not finite, so it {otherwise}")


@contextmanager
def writing(path):
    """Around what writes `path`: a full disk or a missing right ends in one line."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch and libsndfile have no type of their own for a full disk
        reason = getattr(error, "strerror", None) or next(
            iter(str(error).splitlines()), type(error).__name__
        )
        stop(
            f"{path}: cannot be written ({reason[:120]}); make room or give the right, then run "
            "the command again"
        )


def sync(path):
    """Waits until a file's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path):
    """Waits until a folder's list of names is on the disk, where that can be asked for: SMB, shared
    folders of virtual machines and Windows' drives under WSL refuse it, and the files in such a
    folder are whole all the same."""
    with suppress(OSError):
        sync(path)


@contextmanager
def replacing(path):
    """Yields a temporary name beside `path` and renames it on success: a file is either whole or
    absent, even after a power failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_pt(path, value):
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        torch.save(
            value, stream
        )  # to a path it would write the temporary name, and equal content would differ


def write_text(path, text):
    """In UTF-8; what has no UTF-8, a byte in the name of a file, is written as JSON writes it,
    \\udcXX."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path, hint=""):
    """A file as text; what is not UTF-8 is named, with the program that likely wrote it."""
    path = Path(path)
    if not path.is_file():
        stop(f"{path}: no such file{hint}")
    with reading(path), open(path, "rb") as stream:
        content = stream.read()
    if content[:2] == b"PK":
        stop(f"{path}: is a workbook (.xlsx) or another zip file; export it as .csv, UTF-8")
    try:
        return content.replace(b"\0", b"\xff").decode(
            "utf-8-sig"
        )  # without a mark, UTF-16 shows by its NULs
    except UnicodeDecodeError as error:
        utf_16 = b"\0" in content or content[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16, or holds NUL characters" if utf_16 else "not UTF-8"
        line = content[: error.start].count(b"\n") + 1
        stop(f"{path}, line {line}: is {kind}; save it as UTF-8")


class Twice(Exception):
    """A name that occurs twice in a JSON object: the second would silently win."""


def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Twice
    return found


JSON = json.JSONDecoder(object_pairs_hook=unique)


def parse_json(text, where, hint=""):
    """One JSON value."""
    try:
        return JSON.decode(text)
    except Twice:
        stop(f"{where}: a field occurs twice{hint}")
    except (ValueError, RecursionError) as error:
        stop(f"{where}: not valid JSON ({error}){hint}")


def lines_of(path, hint=""):
    """The lines of a text file."""
    lines = (
        read_text(path, hint).rstrip("\r\n").split("\n")
    )  # splitlines would cut at U+2028 in a caption
    return [] if lines == [""] else lines


def read_jsonl(path, hint=""):
    """[(line number, dict), ...]: what people or other programs wrote, before it is given a
    type."""
    found = []
    for number, line in enumerate(lines_of(path, hint), 1):
        where = f"{path}, line {number}"
        value = parse_json(line, where, hint)
        if not isinstance(value, dict):
            stop(f"{where}: {repr(value)[:60]} is not a set of fields{hint}")
        found.append((number, value))
    return found


def read_csv(path, columns, delimiter=",", header=True):
    """[(line number, row), ...] of a table that has these columns by its first line, or, without
    such a line, just these. Strict: a stray quote is named, not allowed to swallow lines. Values
    are stripped."""
    rows, before = [], 0
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if reader.line_num > before + 1 and any("\n" in value for value in row[:-1]):
                stop(
                    f"{path}, line {before + 1}: a quote opens here and does not close on this line"
                )
            before = reader.line_num
            if any(value.strip() for value in row):
                rows.append((before, [value.strip() for value in row]))
    except csv.Error as error:
        stop(
            f"{path}, line {before + 1}: {error}; look for a stray quote there, or save the table "
            "anew"
        )

    def wrong(line, row, what):
        other = (
            [mark for mark in ";\t|," if mark != delimiter and mark in row[0]]
            if len(row) == 1
            else ()
        )
        mended = (
            f"its columns are separated by {other[0]!r}, save it with {delimiter!r}"
            if other
            else "mend that line"
        )
        stop(f"{path}, line {line}: {what}; {mended}")

    names = (rows or [(1, [""])])[0][1] if header else columns
    for name in columns:
        if name not in names:
            wrong(1, names, f"column '{name}' is missing")
    for name in filter(None, names):
        if names.count(name) > 1:
            wrong(1, names, f"column '{name}' occurs twice")
    for line, row in rows:
        if len(row) != len(names):
            wrong(
                line,
                row,
                f"{len(row)} fields, expected {len(names)} ({', '.join(columns)}); a stray quote?",
            )
    return [(line, dict(zip(names, row))) for line, row in rows[int(header) :]]


def inside(root, name, where):
    """root / name, refused when it leaves root (.., absolute paths, links that point outside)."""
    if not is_path(name):
        stop(f"{where}: {name!r:.60} is not a path that a file can have")
    root = os.path.realpath(root)  # of texts: a run asks this of every clip
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        stop(f"{where}: '{name}' points outside {root}; use a path below it")
    return Path(path)


def below(root, path):
    """A path as the files of a run name it: relative to the run folder, absolute where it lies
    elsewhere."""
    path = Path(path).resolve()
    root = Path(root).resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def digest_of(*parts):
    """SHA-256 of some values, the first 16 hex digits: the key of what depends on all of them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def digest(path):
    """SHA-256 of a file, or of a folder's .jsonl files in order of their names; the first 16 hex
    digits."""
    path = Path(path)
    total = hashlib.sha256()
    if not path.exists():
        stop(f"{path}: no such file")
    for file in sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]:
        with reading(file), open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]
