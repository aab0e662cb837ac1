"""What a stage's output was made from, and who may make it: one rule for all stages.

    with record.stage(run, "03", inputs=[...], outputs=[...], redo=args.redo) as stage:
        ...                      # where people answer: the sheet is written, their answers are taken
        stage.claim(settings)    # the record says that the output is made with these settings from these inputs
        ...                      # the work

The first two digits of a file's name say which stage wrote it. That stage's record,
NN_settings.json, or settings.json in a policy's folder, holds its settings and the digests of its
inputs and outputs.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
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
    """Locks an output, proves the inputs, and seals what was written when all ranks have come to
    the end.

    name: the stage's two digits, or a policy's folder; inputs, outputs: names below the run folder.
    An error on any rank seals nothing. Only processes that see each other's POSIX locks are kept
    apart.
    """

    def __init__(
        self, run, name, inputs=(), outputs=(), redo=False, advice="use --redo to replace it"
    ):
        self.run = Path(run)
        self.name = name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.redo = redo
        self.advice = advice
        self.file = (
            self.run / f"{name}_settings.json"
            if len(name) == 2
            else self.run / name / "settings.json"
        )
        self.lock = None
        self.claimed = False

    def __enter__(self):
        if ranks.is_first():
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(self.run, self.name)
            if self.run not in UNLOCKED:  # else another process may be writing them
                remove_temporaries(self.run, self.name)
            follow(self.run, self.inputs)
        ranks.barrier()
        return self

    def claim(self, settings, more_inputs=()):
        """Writes the record, or stops where the one that is there says otherwise: nothing is ever
        half made with other settings. `redo` removes the old outputs first: interrupted, it leaves
        none that the new record would vouch for. more_inputs: what was written since the lock was
        taken, people's answers."""
        self.inputs += more_inputs
        if ranks.is_first():
            self.write(settings, self.redo)
        self.claimed = True
        ranks.barrier()

    def write(self, settings, redo):
        digests = {name: digest(self.run / name) for name in self.inputs}
        new = rows.Record(settings=json.loads(json.dumps(settings)), inputs=digests)
        if self.file.exists() and not redo:
            compare(self.file, new, self.advice)
            return
        for output in self.outputs:
            (self.run / output).unlink(missing_ok=True)
        rows.write_json(self.file, new)

    def digest(self):
        """Of the settings and inputs; a checkpoint is bound to it."""
        made = rows.read_json(self.file, rows.Record)
        return files.digest_of(made.settings, made.inputs)

    def __exit__(self, kind, error, trace):
        if kind is None and self.claimed:
            ranks.barrier()  # another rank may still fail
            if ranks.is_first():
                made = rows.read_json(self.file, rows.Record)
                made.outputs = {name: digest(self.run / name) for name in self.outputs}
                rows.write_json(self.file, made)
        if self.lock is not None:
            self.lock.close()


def compare(file, new, advice):
    """Stops at the first setting or input that differs from those of the record in `file`."""
    old = rows.read_json(file, rows.Record)
    for key in sorted(old.settings.keys() | new.settings.keys()):
        before = old.settings.get(key)
        now = new.settings.get(key)
        if before != now:
            if key == "compile":  # its default is the machine's
                advice = f"give --{'compile' if before else 'no-compile'}, or {advice}"
            stop(f"{file}: made with {key}={before}, now {now}; {advice}")
    for name in sorted(old.inputs.keys() | new.inputs.keys()):
        if old.inputs.get(name) != new.inputs.get(name):
            stop(f"{file}: {name} has changed since; {advice}")


def follow(run, names):
    """Stops unless these outputs of earlier stages exist and nothing that they were made from has
    changed since, back to stage 01. The earliest change is named: it is the one to mend."""
    known = set()
    for name in names:
        follow_one(Path(run), name, known)


def follow_one(run, name, known):
    path = run / name
    file = record_of(run, name)
    script = next((path.name for path in ROOT.glob(f"{name[:2]}_*.py")), "the stage that writes it")
    again = f"rerun {script} --run-dir {run} --redo"
    if file.parent != run:
        again = "train it anew, into another --out"
    for needed in (path, file):
        if not needed.exists():
            stop(f"{needed}: no such file; run {script} --run-dir {run} first")
    made = rows.read_json(file, rows.Record)
    if name in made.outputs and digest(path) != made.outputs[name]:
        stop(f"{path}: not the file that was written here, edited, or of another run; {again}")
    if file in known:
        return
    known.add(file)
    for source in made.inputs:
        if not files.inside(run, source, file).exists():
            stop(
                f"{run / source}: missing, but {path} was made from it; run the stage that writes "
                "it again"
            )
        follow_one(run, source, known)
    for source, was in made.inputs.items():
        if digest(run / source) != was:
            stop(f"{run / source}: changed after it was read for {path}; {again}")


def record_of(run, name):
    """The record of the stage that wrote this file."""
    top = Path(name).parts[0]
    of_policy = run / top / "settings.json"
    return of_policy if of_policy.exists() else run / f"{top[:2]}_settings.json"


# --------------------------------------------------------------------------------------------------
# Locks
# --------------------------------------------------------------------------------------------------

UNLOCKED = set()  # run folders on whose disk locks do not work


def take_lock(run, name):
    """Locks an output, in a file whose text says who has it (not inherited by child processes), and
    returns it open. Where locks do not work (Lustre without flock, some NFS), that is said once for
    a run, and the work goes on."""
    stream = open(run / f".{name}.lock", "a+", encoding="utf-8")  # noqa: SIM115, held until the stage ends
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read() or "another process"
        stop(f"{run}: {name} is being made by {holder}; wait for it, or stop it")
    except OSError as error:
        if run not in UNLOCKED:
            UNLOCKED.add(run)
            unprotected = "nothing keeps two commands from writing to it at the same time: run one after the other"
            print(
                f"warning: {run}: files cannot be locked here ({error.strerror}); {unprotected}",
                file=sys.stderr,
            )
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream


def remove_temporaries(run, name):
    """What killed processes left half written of a stage's, or of a policy folder's, files."""
    patterns = [f".{name}*.tmp*", f"{name}/**/.*.tmp*"]
    if len(name) == 2:
        patterns.append(f"{name}_*/**/.*.tmp*")
    if name in ("00", "01"):
        patterns += [".run*.tmp*", ".clips*.tmp*"]
    for pattern in patterns:
        for file in run.glob(pattern):
            file.unlink(missing_ok=True)


def commit():
    """The commit of this code, `-dirty` where it has been changed since; None outside of a git
    checkout."""
    asked = ("git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
