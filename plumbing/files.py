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
    """A video or audio that cannot be used. Stage 01 counts and lists the text, its reason."""


class NoFile(SkipClip):
    """A file that is not there: stage 01 skips it, later stages stop (`gone`)."""


class NoAudio(SkipClip):
    """A film without an audio stream. Any other SkipClip is of sound that cannot be read."""


def stop(message):
    raise Stop(message)


def gone(path):
    """A file that stage 01 found is there no longer. That is no reason to skip the clip: it
    would be stored, and still stand when the file is back."""
    stop(f"{path}: gone, though stage 01 found it; put it back and run the same command again")


# --------------------------------------------------------------------------------------------------
# What a file holds: read, checked, written
# --------------------------------------------------------------------------------------------------


TEXT = r"[^\0\ud800-\udfff]*"  # no NUL, no half of a surrogate pair
NAME = r"(?!\.)[^\0\ud800-\udfff/\\\n\r]{1,200}"  # a name that a file can have
LONGEST_NAME = 200  # bytes


def is_text(x):
    return isinstance(x, str) and re.fullmatch(TEXT, x) is not None


def is_name(x):
    """A name that a file can have, also with some more bytes (`<clip>_<k>.wav`)."""
    return is_text(x) and re.fullmatch(NAME, x) is not None and len(x.encode()) <= LONGEST_NAME


def is_path(x):
    """A path that a file can have: bytes. Python carries those that are no UTF-8 as lone
    surrogates."""
    try:
        path = os.fsencode(x)
    except (TypeError, UnicodeEncodeError):
        return False
    longest = max(map(len, path.split(b"/")))
    return 0 < len(path) < 4000 and longest <= 255 and b"\0" not in path


class Ignored:
    """Stands in for what a third-party file holds beside its tensors, which is never built."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # as torch words it, in a RuntimeError
# Types of numbers that PANNs', CLAP's and Frieren's training left in their checkpoints and nobody
# needs, by their names in numpy 1 and in numpy 2.
NUMPY = ["numpy.dtype", "numpy.ndarray"]
for core in ("core", "_core"):
    NUMPY += [f"numpy.{core}.multiarray.scalar", f"numpy.{core}.multiarray._reconstruct"]


@contextmanager
def reading(path):
    """Around what reads `path`: an error of the system names the file, as Python does only where
    it opens one. No reader takes such an error for what is wrong with the file's content: it ends
    the stage (`command.launch`)."""
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


def raise_if_memory_is_short():
    """Raises a MemoryError if 256 MB cannot be had. If they can, a MemoryError that a reader has
    met is its file's fault: damaged, it asks for far more than there is."""
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
        if of_system(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        # A file that it cannot open or map torch reports in words, the system's with their number:
        # "unable to mmap 9 bytes from file <a.pt>: Cannot allocate memory (12)".
        number = re.search(r"\((\d+)\)$", reason)
        if number and os.strerror(int(number[1])) in reason:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        refused = re.search(r"GLOBAL (\S+)", reason)  # a type that is no plain one: it may run code
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
    """Fills a module strictly; stops with `<path>: <otherwise>` where the state is another's, or
    not finite if it must be. options: of the module's load_state_dict."""
    try:
        module.load_state_dict(state, **options)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        stop(f"{path}: {otherwise}")
    if finite and not all(value.isfinite().all() for value in module.state_dict().values()):
        stop(f"{path}: holds numbers that are not finite, so it {otherwise}")


@contextmanager
def writing(path):
    """Around what writes `path`, and nothing else: a full disk or a missing right, for which torch
    and libsndfile have a RuntimeError, ends in one line."""
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
            # SMB, shared folders of virtual machines and Windows' drives under WSL cannot be asked
            # to keep a folder's list of names; the files in it are whole all the same.
            with suppress(OSError):
                sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_pt(path, value):
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        # Given a path, torch would write its temporary name, and equal content would differ.
        torch.save(value, stream)


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
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        stop(f"{path}, line {line}: is UTF-16, or holds NUL characters; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        stop(f"{path}, line {line}: is not UTF-8; save it as UTF-8")


def unique(pairs):
    """The fields of a JSON object. Of two with one name, the second would silently win."""
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
    # splitlines would also cut at a U+2028 within a caption.
    lines = read_text(path, hint).rstrip("\r\n").split("\n")
    return [] if lines == [""] else lines


def read_jsonl(path, hint=""):
    """[(line number, dict), ...]: lines of people or other programs, not yet typed."""
    found = []
    for number, line in enumerate(lines_of(path, hint), 1):
        where = f"{path}, line {number}"
        value = parse_json(line, where, hint)
        if not isinstance(value, dict):
            stop(f"{where}: {repr(value)[:60]} is not a set of fields{hint}")
        found.append((number, value))
    return found


def read_csv(path, columns, delimiter=",", header=True):
    """[(line number, {column: text}), ...] of a table with these columns and perhaps others, which
    its first line names, or, without such a line, of just these. Texts are stripped, blank lines
    skipped. Strict: a stray quote is named, not allowed to swallow lines."""
    stream = io.StringIO(read_text(path), newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    table = []
    line = 1  # where the next row begins
    try:
        for cells in reader:
            if any("\n" in cell for cell in cells[:-1]):  # in the last column, a comment may go on
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
    """What to do with a line that does not have the columns that it should."""
    for mark in ";\t|,":
        if len(cells) == 1 and mark in cells[0]:
            return f"; its columns are separated by {mark!r}, save it with {delimiter!r}"
    return "; mend that line"


def inside(root, name, where):
    """root / name, refused when it leaves root (.., absolute paths, links that point outside)."""
    if not is_path(name):
        stop(f"{where}: {name!r:.60} is not a path that a file can have")
    # os.path is several times faster than pathlib, and a run asks this of every clip.
    root = os.path.realpath(root)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        stop(f"{where}: '{name}' points outside {root}; use a path below it")
    return Path(path)


def below(root, path):
    """A path as the files of a run name it: relative to the run folder if it lies in there, else
    absolute."""
    path = Path(path).resolve()
    root = Path(root).resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def digest_of(*parts):
    """SHA-256 of some values, the first 16 hex digits: the key of what depends on all of them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def digest(path):
    """SHA-256 of a file, the first 16 hex digits; of a folder, that of its .jsonl files in order of
    their names: stage 01's, whose lines hold the digests of the sounds, as do the .pt beside."""
    path = Path(path)
    total = hashlib.sha256()
    if not path.exists():
        stop(f"{path}: no such file")
    for file in sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]:
        with reading(file), open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]
