"""Files: what they must hold, how they are read and written, what they were made from, and who may write.

Everything that a person or another run brings is checked here, where it is read, and what is wrong ends in one line.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import fcntl
except ModuleNotFoundError:
    print("error: this needs Linux or macOS; on Windows use WSL, the Linux that comes with it", file=sys.stderr)
    raise SystemExit(2) from None

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------------
# Failure
# ------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """A user error: one line that says what is wrong and what to do."""


class SkipClip(Exception):
    """A video or audio that cannot be used; the text is the reason that stage 01 counts and lists."""


class NoFile(SkipClip):
    """A file that is not there: stage 01 skips it, for later stages it is gone."""


class NoAudio(SkipClip):
    """A silent film, which has no audio stream; any other SkipClip of `read_audio` is sound that cannot be read."""


def stop(message):
    raise Stop(message)


# ------------------------------------------------------------------------------------------------------------
# What a file holds: read, checked, written
# ------------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a field of a file must be: in words, and as a test."""

    words: str
    holds: object
    optional: bool = False  # null, or not there at all


def printable(x):
    known = isinstance(x, str) and "\0" not in x
    return known and (x.isascii() or x == x.encode(errors="ignore").decode())  # no lone surrogates


def file_name(x):
    return printable(x) and x[:1] not in ("", ".") and not set("/\\\n\r") & set(x) and len(x.encode()) <= 200


def short_path(x):
    """A path is bytes of the file system: those that are no UTF-8 Python carries as lone surrogates."""
    try:
        path = os.fsencode(x)
    except (TypeError, UnicodeEncodeError):
        return False
    longest = max(map(len, path.split(b"/")))
    return 0 < len(path) < 4000 and longest <= 255 and b"\0" not in path


def between(least, most, *kinds):
    words = f"a {'whole ' * (kinds == (int,))}number from {least:g} to {most:g}"
    return Kind(words, lambda x: type(x) in (kinds or (int, float)) and least <= x <= most)  # neither nan nor true


def one_of(*values):
    return Kind(f"one of {', '.join(values)}", lambda x: isinstance(x, str) and x in values)


def list_of(kind):
    holds = lambda x: isinstance(x, list) and len(x) > 0 and all(map(kind.holds, x))  # noqa: E731
    return Kind(f"a list, each {kind.words}", holds)


def dict_of(kind, name=printable):
    holds = lambda x: isinstance(x, dict) and all(map(name, x)) and all(map(kind.holds, x.values()))  # noqa: E731
    return Kind(f"a dict, each value {kind.words}", holds)


def with_fields(**fields):
    fits = lambda value, kind: kind.optional if value is None else kind.holds(value)  # noqa: E731
    holds = lambda x: isinstance(x, dict) and all(fits(x.get(name), kind) for name, kind in fields.items())  # noqa: E731
    return Kind(f"a dict of {', '.join(f'{name} ({kind.words})' for name, kind in fields.items())}", holds)


def maybe(kind):
    return kind._replace(optional=True)


TEXT, NAME = Kind("text", printable), Kind("a name that a file can have, of at most 200 bytes", file_name)
PATH = Kind("a path that a file can have: below 4000 bytes, none of its names above 255", short_path)
SHARE = between(0, 1)
NUMBER = between(-1e300, 1e300)._replace(words="a finite number")
INDEX, COUNT = between(0, 2**63 - 1, int), between(1, 10**9, int)
THREE = Kind("three probabilities", lambda x: list_of(SHARE).holds(x) and len(x) == 3 and abs(sum(x) - 1) < 1e-3)
FLAG, DICT, LIST = (Kind(f"a {kind.__name__}", lambda x, kind=kind: isinstance(x, kind)) for kind in (bool, dict, list))
FLOATS = Kind("a tensor of floats", lambda x: torch.is_tensor(x) and x.is_floating_point() and x.dim() > 0)
TENSOR, ANY = Kind("a tensor", torch.is_tensor), Kind("something", lambda x: True)


def check(row, fields, where, hint=""):
    """Stops unless every field is there and of its kind; an optional one that is null is taken for absent. fields:
    {name: Kind}."""
    if not isinstance(row, dict):
        stop(f"{where}: {repr(row)[:60]} is not a set of fields{hint}")
    for name, kind in fields.items():
        value = row.get(name)
        if value is None and not kind.optional:
            stop(f"{where}: field '{name}' is missing{hint}")
        if value is None:
            row.pop(name, None)
        elif not kind.holds(value):
            stop(f"{where}, field '{name}': {repr(value)[:60]} is not {kind.words}{hint}")
    return row


class Ignored:
    """What a third-party file holds beside its tensors and nobody needs (numpy scalars, callbacks): never built."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # as torch words it, in a RuntimeError
NUMPY = ["numpy.dtype", "numpy.ndarray"]  # learning rates, samplers; by the names of numpy 1 and of numpy 2
NUMPY += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]


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
    """The only torch.load of this repository. path: a .pt of plain tensors, numbers, strings, lists, dicts; fields:
    {name: Kind} that it must hold; ignore: names of types that may occur in it, and are left out."""
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
        # What torch cannot map it says in a text alone: "unable to mmap ...: Cannot allocate memory (12)".
        told = re.search(r": ([^:]+) \((\d+)\)$", reason)
        if told and told[1] == os.strerror(int(told[2])):
            raise OSError(int(told[2]), told[1], str(path)) from None
        refused = re.findall(r"GLOBAL (\S+)", str(error))  # a pickle may run code: only plain types are let in
        reason = f"it holds {refused[0]}" if refused else reason[:160]
        stop(f"{path}: cannot be read as a .pt file of plain tensors ({reason}); make it anew or copy it again")
    return check(value, fields, path, "; make it anew or copy it again") if fields else value


def load_weights(module, state, path, otherwise, finite=True):
    """Fills a module strictly; `<path>: <otherwise>` where the state is another's, or not finite if it must be."""
    try:
        module.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # as torch words it, for users
        stop(f"{path}: {otherwise}")
    if finite and not all(value.isfinite().all() for value in module.state_dict().values()):
        stop(f"{path}: holds numbers that are not finite, so it {otherwise}")


@contextmanager
def writing(path):
    """Around what writes `path`: a full disk or a missing right ends in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch and libsndfile have no type of their own for a full disk
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        stop(f"{path}: cannot be written ({reason[:120]}); make room or give the right, then run the command again")


def sync(path):
    """Waits until a file's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path):
    """Waits until a folder's list of names is on the disk, where that can be asked for: SMB, shared folders of virtual
    machines and Windows' drives under WSL refuse it, and the files in such a folder are whole all the same."""
    with suppress(OSError):
        sync(path)


@contextmanager
def replacing(path):
    """Yields a temporary name beside `path` and renames it on success: a file is either whole or absent, even after a
    power failure."""
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
        torch.save(value, stream)  # to a path it would write the temporary name, and equal content would differ


def write_text(path, text):
    """In UTF-8; what has no UTF-8, a byte in the name of a file, is written as JSON writes it, \\udcXX."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path, row):
    with writing(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


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
        return content.replace(b"\0", b"\xff").decode("utf-8-sig")  # without a mark, UTF-16 shows by its NULs
    except UnicodeDecodeError as error:
        utf_16 = b"\0" in content or content[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16, or holds NUL characters" if utf_16 else "not UTF-8"
        line = content[: error.start].count(b"\n") + 1
        stop(f"{path}, line {line}: is {kind}; save it as UTF-8")


def parse_json(text, where, hint=""):
    """One JSON value; a name that occurs twice in an object would silently win."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            stop(f"{where}: a field occurs twice{hint}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        stop(f"{where}: not valid JSON ({error}){hint}")


def read_json(path, fields=None, hint=""):
    """A dict with `fields`, {name: Kind}."""
    return check(parse_json(read_text(path, hint), path, hint), fields or {}, path, hint)


def read_jsonl(path, fields=None, hint="", cut=False):
    """A list of dicts, one per line, each with `fields`, {name: Kind}. Stops with file, line and field. cut: drops a
    last line that a kill or a full disk has cut."""
    lines = read_text(path, hint).rstrip("\r\n").split("\n")  # splitlines would cut at U+2028 in a caption
    rows = [(f"{path}, line {number}", line) for number, line in enumerate(lines if lines != [""] else [], 1)]
    if cut and rows and not rows[-1][1].endswith("}"):
        rows.pop()
    return [check(parse_json(line, where, hint), fields or {}, where, hint) for where, line in rows]


def read_csv(path, columns, delimiter=",", header=True):
    """[(line number, row), ...] of a table that has these columns by its first line, or, without such a line, just
    these. Strict: a stray quote is named, not allowed to swallow lines. Values are stripped."""
    rows, before = [], 0
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if reader.line_num > before + 1 and any("\n" in value for value in row[:-1]):
                stop(f"{path}, line {before + 1}: a quote opens here and does not close on this line")
            before = reader.line_num
            if any(value.strip() for value in row):
                rows.append((before, [value.strip() for value in row]))
    except csv.Error as error:
        stop(f"{path}, line {before + 1}: {error}; look for a stray quote there, or save the table anew")

    def wrong(line, row, what):
        other = [mark for mark in ";\t|," if mark != delimiter and mark in row[0]] if len(row) == 1 else ()
        mended = f"its columns are separated by {other[0]!r}, save it with {delimiter!r}" if other else "mend that line"
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
            wrong(line, row, f"{len(row)} fields, expected {len(names)} ({', '.join(columns)}); a stray quote?")
    return [(line, dict(zip(names, row))) for line, row in rows[int(header) :]]


def write_sheet(path, header, rows, answer):
    """A csv for people to fill in, an empty cell of the column `answer` in each row. Somebody's answers are never
    written over: a sheet that holds any is left as it is, and said so."""
    path = Path(path)
    if path.exists() and any(row[answer] for _, row in read_csv(path, (answer,))):
        print(f"{path}: holds answers and is left as it is")
        return
    options = dict(newline="", encoding="utf-8", errors="backslashreplace")  # the last as in `write_text`
    with replacing(path) as temporary, open(temporary, "w", **options) as stream:
        csv.writer(stream).writerows([header, *rows])


def as_cell(text):
    """A caption as a cell that no spreadsheet takes for a formula, on one line."""
    text = " ".join((text or "").split())
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def inside(root, name, where):
    """root / name, refused when it leaves root (.., absolute paths, links that point outside)."""
    root = Path(root).resolve()
    path = (root / check({"path": name}, {"path": PATH}, where)["path"]).resolve()
    if not path.is_relative_to(root):
        stop(f"{where}: '{name}' points outside {root}; use a path below it")
    return path


# ------------------------------------------------------------------------------------------------------------
# Provenance: the two digits of a file's name say which stage wrote it, that stage's record what it was made from
# ------------------------------------------------------------------------------------------------------------


def digest_of(*parts):
    """SHA-256 of some values, the first 16 hex digits: the key of what depends on all of them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def digest(path):
    """SHA-256 of a file, or of a folder's .jsonl files in order of their names; the first 16 hex digits."""
    path, total = Path(path), hashlib.sha256()
    if not path.exists():
        stop(f"{path}: no such file")
    for file in sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]:
        with reading(file), open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]


def record_of(run, name):
    """`<run>/NN_settings.json` of what stage NN wrote; a policy folder has its own settings.json."""
    top = Path(name).parts[0]
    own = Path(run) / top / "settings.json"
    return own if own.exists() else Path(run) / f"{top[:2]}_settings.json"


RECORD = dict(settings=DICT, inputs=dict_of(TEXT, short_path), outputs=maybe(dict_of(TEXT, short_path)))


def require(run, *names):
    """Stops unless these outputs of earlier stages exist, and nothing that they were made from has changed since, back
    to stage 01: their records are followed."""
    run, followed = Path(run), set()

    def follow(name):
        path, record = run / name, record_of(run, name)
        script = next((file.name for file in ROOT.glob(f"{name[:2]}_*.py")), "the stage that writes it")
        own = record.parent == run
        again = f"rerun {script} --run-dir {run} --redo" if own else "train it anew, into another --out"
        for file in (path, record):
            if not file.exists():
                stop(f"{file}: no such file; run {script} --run-dir {run} first")
        about = read_json(record, RECORD)
        if name in about.get("outputs", {}) and digest(path) != about["outputs"][name]:
            stop(f"{path}: not the file that was written here, edited, or of another run; {again}")
        if record in followed:
            return
        followed.add(record)
        for source in about["inputs"]:
            if not inside(run, source, record).exists():
                stop(f"{run / source}: missing, but {path} was made from it; run the stage that writes it again")
            follow(source)  # the earliest change is the one to mend
        for source, was in about["inputs"].items():
            if digest(run / source) != was:
                stop(f"{run / source}: changed after it was read for {path}; {again}")

    for name in names:
        follow(name)


def claim(run, record, settings, inputs=(), redo=False, advice="use --redo to replace it", outputs=()):
    """One record of settings per output. record, inputs, outputs: names below run; inputs are what it is made from.

    The first call writes the record; a later one with other settings, or with inputs that changed meanwhile, prints the
    difference and stops, so that nothing is ever half made with other settings. `redo` replaces the record, and first
    removes the `outputs` of the old one: interrupted, it leaves none that the new record would vouch for.
    """
    file = Path(run) / record
    new = {"settings": settings, "inputs": {name: digest(Path(run) / name) for name in inputs}}
    new = json.loads(json.dumps(new))
    if file.exists() and not redo:
        old = read_json(file, RECORD)
        for part, key in [(name, key) for name in new for key in sorted(old[name].keys() | new[name].keys())]:
            before, now = old[part].get(key), new[part].get(key)
            if before != now:
                changed = f"made with {key}={before}, now {now}" if part == "settings" else f"{key} has changed since"
                stop(f"{file}: {changed}; {advice}")
        return
    for output in outputs if redo else ():
        (Path(run) / output).unlink(missing_ok=True)
    write_json(file, new)


def seal(run, record, outputs):
    """Adds the digests of what a stage has written to its record: another run's file in its place is noticed."""
    about = read_json(Path(run) / record, RECORD)
    write_json(Path(run) / record, about | {"outputs": {name: digest(Path(run) / name) for name in outputs}})


def commit():
    """The commit of this code, `-dirty` where it has been changed since; None outside of a git checkout."""
    with suppress(OSError, subprocess.CalledProcessError):
        asked = ("git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


UNLOCKED = set()  # run folders on whose disk locks do not work


def take(run, name, wanted, wait=True):
    """Locks run / name, a file whose text says who has it (not inherited by child processes), and returns it open.
    wait: until another process has let go; otherwise it is named. Where locks do not work (Lustre without flock, some
    NFS), that is said once for a run, and the work goes on."""
    stream = open(Path(run) / name, "a+", encoding="utf-8")  # noqa: SIM115, held until the process ends or it is closed
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        stop(f"{wanted} {stream.read() or 'another process'}; wait for it, or stop it")
    except OSError as error:
        if Path(run) not in UNLOCKED:
            UNLOCKED.add(Path(run))
            unprotected = "nothing keeps two commands from writing to it at the same time: run one after the other"
            print(f"warning: {run}: files cannot be locked here ({error.strerror}); {unprotected}", file=sys.stderr)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream
