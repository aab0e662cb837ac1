"""Records what each stage's output was made from, and keeps two commands from making it at once.

    with record.stage(run, "03", inputs=[...], outputs=[...], redo=args.redo) as stage:
        ...  # where people answer: the sheet is written, their answers are taken
        stage.claim(settings)
        ...  # the work

1. When it is entered, it locks the output and checks the inputs: nothing that they were made from
   may have changed.
2. `claim` writes the stage's record, which is its settings and the digests of its inputs. Where
   there is a record already, it stops if that one differs.
3. When it is left without an error on any rank, it adds the digests of the outputs to the record.

Where a stage is made in parts (--part), each part does 1 and 2. Its lock excludes only the whole
stage and the same part, so that different parts run together. The command without --part does 3.

The first two digits of a file's name say which stage wrote it. That stage's record is
NN_settings.json, or settings.json in a policy's folder.
"""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from plumbing import files, ranks, rows
from plumbing.files import ROOT, digest, stop

try:
    import fcntl
except ModuleNotFoundError:
    print(
        "error: this needs Linux or macOS; on Windows use WSL, the Linux that comes with it",
        file=sys.stderr,
    )
    raise SystemExit(2) from None


class stage:  # noqa: N801, it reads as a verb: with record.stage(...)
    """The context that this module's docstring describes.

    name: the stage's two digits, or a policy's folder; inputs, outputs: names below the run folder;
    advice: what to do where the record differs; part: (I, N) of --part. Only processes that see
    each other's POSIX locks are kept apart.
    """

    def __init__(
        self,
        run,
        name,
        inputs=(),
        outputs=(),
        redo=False,
        advice="use --redo to replace it",
        part=None,
    ):
        self.run = Path(run)
        self.name = name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.redo = redo
        self.advice = advice
        self.part = part
        self.file = settings_file(self.run, name)
        self.locks = []
        self.claimed = False
        if part and redo:
            stop("--redo: not with --part; give the command with --redo once, without --part")

    def __enter__(self):
        if ranks.is_first():
            self.run.mkdir(parents=True, exist_ok=True)
            self.take_locks()
            follow(self.run, self.inputs)
        ranks.barrier()
        return self

    def take_locks(self):
        """The whole stage takes its lock exclusively. Parts share that lock, and each takes another
        one of its own exclusively."""
        if self.part is None:
            self.locks.append(take_lock(self.run, self.name))
            remove_temporaries(self.run, self.name)
        else:
            i, n = self.part
            self.locks.append(take_lock(self.run, f"{self.name}.part_{i}_of_{n}"))
            self.locks.append(take_lock(self.run, self.name, together=True))

    @contextmanager
    def one_at_a_time(self):
        """Lets parts that run at the same time through one after the other: the first one makes the
        files that all share, and the others find them."""
        if self.part is None or not ranks.is_first():
            yield
            return
        with open(self.run / f".{self.name}.begin.lock", "a", encoding="utf-8") as stream:
            with suppress(OSError):  # where locks do not work, every part makes the same files
                fcntl.lockf(stream, fcntl.LOCK_EX)
            yield

    def claim(self, settings, more_inputs=()):
        """Writes or compares the stage's record. more_inputs: files that were written since the
        stage was entered, such as people's answers."""
        self.inputs += more_inputs
        if ranks.is_first():
            with self.one_at_a_time():
                self.write_or_compare(settings, self.redo)
        self.claimed = True
        ranks.barrier()

    def write_or_compare(self, settings, redo):
        """Writes or compares the record. With `redo` the old outputs are removed before the new
        record is written, so that it never stands beside them, even if this is killed."""
        digests = {name: digest(self.run / name) for name in self.inputs}
        settings = json.loads(json.dumps(settings))  # as they will be read: tuples become lists
        new = rows.Record(settings=settings, inputs=digests)
        if self.file.exists() and not redo:
            compare(self.file, new, self.advice)
            return
        for output in self.outputs:
            (self.run / output).unlink(missing_ok=True)
        rows.write_json(self.file, new)

    def is_sealed(self):
        """Whether the outputs exist and are unchanged since this stage wrote them."""
        made = rows.read_json(self.file, rows.Record)
        there = all((self.run / name).exists() for name in self.outputs)
        return there and made.outputs == {name: digest(self.run / name) for name in self.outputs}

    def digest(self):
        """A digest of the settings and inputs, which is stored in checkpoints."""
        made = rows.read_json(self.file, rows.Record)
        return files.digest_of(made.settings, made.inputs)

    def __exit__(self, kind, error, trace):
        if kind is None:
            ranks.barrier()  # another rank may still be at work, or fail
            if self.claimed and self.part is None and ranks.is_first():
                made = rows.read_json(self.file, rows.Record)
                made.outputs = {name: digest(self.run / name) for name in self.outputs}
                rows.write_json(self.file, made)
        for lock in self.locks:
            lock.close()


def compare(file, new, advice):
    """Stops at the first setting or input that differs from those of the record in `file`."""
    old = rows.read_json(file, rows.Record)
    for key in sorted(old.settings.keys() | new.settings.keys()):
        before = old.settings.get(key, False if key == "compile" else None)  # old records lack it
        now = new.settings.get(key)
        if before != now:
            if key == "compile":  # its default depends on the machine
                advice = f"give --{'compile' if before else 'no-compile'}, or {advice}"
            stop(f"{file}: made with {key}={before}, now {now}; {advice}")
    for name in sorted(old.inputs.keys() | new.inputs.keys()):
        if old.inputs.get(name) != new.inputs.get(name):
            stop(f"{file}: {name} has changed since; {advice}")


def follow(run, names, digests=None):
    """Stops unless these outputs of earlier stages exist and nothing that they were made from has
    changed since, back to stage 01. Where several files have changed, the one of the earliest stage
    is named, since it must be mended first."""
    digests = {} if digests is None else digests  # of the files that are checked so far
    for name in names:
        if name in digests:
            continue
        path = run / name
        file = record_of(run, name)
        scripts = [script.name for script in ROOT.glob(f"{name[:2]}_*.py")]
        script = scripts[0] if scripts else "the stage that writes it"
        for needed in (path, file):
            if not needed.exists():
                stop(f"{needed}: no such file; run {script} {files.run_flag(run)} first")
        again = f"rerun {script} {files.run_flag(run)} --redo"
        if file.parent != run:
            again = "train it anew, into another --out"

        made = rows.read_json(file, rows.Record)
        digests[name] = digest(path)
        if made.outputs.get(name, digests[name]) != digests[name]:
            stop(
                f"{path}: not the file that was written here: it was edited, or comes from another "
                f"run; {again}"
            )
        for source in made.inputs:
            files.inside(run, source, file)
        follow(run, made.inputs, digests)
        for source, was in made.inputs.items():
            if digests[source] != was:
                stop(f"{run / source}: changed after it was read for {path}; {again}")


def settings_file(run, name):
    """The file with the record of a stage, given by its two digits, or of a policy, given by its
    folder."""
    if is_stage(name):
        return run / f"{name}_settings.json"
    return run / name / "settings.json"


def is_stage(name):
    return re.fullmatch(r"\d\d", name) is not None


def record_of(run, name):
    """The file with the record of the stage that wrote the file of this name."""
    top = Path(name).parts[0]
    of_policy = settings_file(run, top)
    return of_policy if of_policy.exists() else settings_file(run, top[:2])


# --------------------------------------------------------------------------------------------------
# Locks
# --------------------------------------------------------------------------------------------------

NO_LOCKS = (
    "warning: {run}: files cannot be locked here ({why}); nothing keeps two commands from writing "
    "to it at the same time: run one after the other"
)
unlocked = set()  # run folders on whose disk locks do not work


def take_lock(run, name, together=False):
    """Locks an output through a lock file, whose text names the process that holds it, and returns
    that file, open. Child processes do not inherit the lock. together: others that pass it may hold
    the lock too. Where locks do not work (Lustre without flock, some NFS), a warning is printed
    once for each run, and the work goes on."""
    stream = open(run / f".{name}.lock", "a+", encoding="utf-8")  # noqa: SIM115, until the end
    try:
        fcntl.lockf(stream, (fcntl.LOCK_SH if together else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read() or "another process"
        stop(f"{run}: {name} is being made by {holder}; wait for it, or stop it")
    except OSError as error:
        if run not in unlocked:
            unlocked.add(run)
            print(NO_LOCKS.format(run=run, why=error.strerror), file=sys.stderr)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream


def remove_temporaries(run, name):
    """Removes the half-written files that killed processes of a stage, or of a policy's training,
    have left. Where locks do not work they stay, since another process may be writing them."""
    if run in unlocked:
        return
    folder = f"{name}_*" if is_stage(name) else name
    patterns = [f".{name}*.tmp*", f"{folder}/**/.*.tmp*"]
    if name in ("00", "01"):
        patterns += [".run*.tmp*", ".clips*.tmp*"]
    for pattern in patterns:
        for file in run.glob(pattern):
            file.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# The code
# --------------------------------------------------------------------------------------------------


def commit():
    """The commit of this code, with `-dirty` where files have been changed since; None outside of a
    git checkout."""
    asked = ("git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
