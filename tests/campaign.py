"""Disturbs every stage, runs the same command again, and compares all that was written with an
undisturbed run.

Run:   python tests/campaign.py   # about 15 minutes on 2 idle cores, in a temporary folder
       python tests/campaign.py --kills 60 --seed 1 --folder DIR

On the tiny world, for stages 00 to 07, alone and (01, 02, 03, 05, 06, 07) as two ranks under
torchrun:
    kill       SIGKILL at a random moment; of two ranks one, and `--max-restarts 1` goes on or ends
               within a minute
    full disk  no file may grow beyond a random size (RLIMIT_FSIZE): exit code 2, and one line that
               names the file
    two        the same command once more while it runs: refused, with process and host; the first
               does not suffer
    beside     05 and 06 at the same time, which is allowed
After each, the same command runs undisturbed. Says every trial that is not as it should be, and
ends with one line of counts: trials `equal` to the undisturbed run (less times); files `lost`,
missing or other than they should be; rows `doubled` in logs; `leftovers`, files that should not be
there; `hangs`, commands that took a minute more than they should. `test_a_short_campaign` of
test_pipeline.py is a short form.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STAGES = {path.name[:2]: path.name for path in sorted(ROOT.glob("0[0-7]_*.py"))}
FLAGS = {"00": ("--size", "tiny"), "05": ("--steps", "24", "--save-every", "3")}
FLAGS |= {"06": ("--steps", "16", "--save-every", "1")}
RANKED = ("01", "02", "03", "05", "06", "07")
LOCKS = {"05": ".05_flow_dpo.lock", "06": ".06_ddpo.lock"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}
PATIENCE_S = 60  # what a command may take beyond its undisturbed time


def start(number, run, ranks=1, most_bytes=None):
    """A stage's command line in a session of its own; no file that it writes may be larger than
    most_bytes."""
    program = [sys.executable]
    if ranks > 1:
        torchrun = Path(sys.executable).with_name("torchrun")
        program = [torchrun, "--nproc_per_node", ranks, "--max-restarts", 1]
    command = [*program, STAGES[number], "--run-dir", run, *FLAGS.get(number, ())]
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if most_bytes:
        limit = (most_bytes, most_bytes)
        options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    command = [*map(str, command)]
    return subprocess.Popen(command, env=ENVIRONMENT, **options, start_new_session=True)


def finish(process, seconds):
    """(exit code, stderr); the code is None where it took longer and had to be killed."""
    try:
        error = process.communicate(timeout=seconds)[1]
        return process.returncode, error
    except subprocess.TimeoutExpired:
        for one in (*workers(process), process.pid):  # torchrun's ranks lead sessions of their own
            os.kill(one, signal.SIGKILL)
        return None, process.communicate()[1]


def workers(process):
    """The ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        return [int(x) for x in children.read_text().split()]
    except OSError:
        return []


def until_it_works(process, run, number):
    """Waits until the stage holds its lock, or has ended; returns the seconds."""
    lock, began = Path(run) / LOCKS.get(number, f".{number}.lock"), time.monotonic()
    while process.poll() is None:
        holder = re.findall(r"\d+", lock.read_text())[:1] if lock.exists() else []
        if holder and int(holder[0]) in (process.pid, *workers(process)):
            break
        time.sleep(0.01)
    return time.monotonic() - began


def contents(folder):
    """{name: what is compared}: bytes, a checkpoint's tensors, a log's rows less their times."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.endswith(".lock"):
            continue
        found[name] = path.read_bytes()
        if path.name == "checkpoint.pt":  # equal objects may be pickled as one or as two
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.name == "log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{x: row[x] for x in row if x != "seconds"} for row in rows]
    return found


def plain(value):
    """A .pt's content as what == compares."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return value.numpy().tobytes() if torch.is_tensor(value) else value


def compare(run, reference):
    """Counts of lost, doubled, leftovers; and the names of all these."""
    ours, theirs = contents(run), contents(reference)
    names = sorted(ours.keys() - theirs.keys())
    counts = Counter(leftovers=len(names))
    for name, value in theirs.items():
        if ours.get(name) != value:
            names.append(name)
            rows = [str(row) for row in ours.get(name, ())] if isinstance(value, list) else []
            counts["doubled" if len(set(rows)) < len(rows) else "lost"] += 1
    return counts, names


class Trial:
    """One disturbance of a stage in `run`, from a copy of `before`; `after`: what it must make;
    took: its seconds undisturbed, and until it begins to work."""

    def __init__(self, number, ranks, run, before, after, took):
        self.number, self.ranks, self.run, self.after, self.took = number, ranks, run, after, took
        self.counts, self.said, self.recovered = Counter(), [], None
        shutil.rmtree(run, ignore_errors=True)
        if before:
            shutil.copytree(before, run)

    def check(self, holds, what):
        if not holds:
            self.said.append(what)

    def end(self, process):
        code, error = finish(process, self.took[0] + PATIENCE_S)
        self.counts["hangs"] += code is None
        return code, error

    def kill(self, rng):
        process = start(self.number, self.run, self.ranks)
        until_it_works(process, self.run, self.number)
        time.sleep(rng.random() * (self.took[0] - self.took[1]))
        victims = [process.pid] if self.ranks == 1 else workers(process)
        if process.poll() is None and victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
        code, _ = self.end(process)
        self.recovered = None if self.ranks == 1 else code == 0

    def full_disk(self, rng):
        ours, before = contents(self.after), contents(self.run)
        changed = [name for name, value in ours.items() if before.get(name) != value]
        largest = max((self.after / name).stat().st_size for name in changed)
        limit = rng.randint(100, int(0.8 * largest))
        code, error = self.end(start(self.number, self.run, self.ranks, limit))
        clear = code == 2 and error.count("error: ") == 1 and "Traceback" not in error
        clear = clear and str(self.run) in error
        self.check(clear, f"not clear, exit code {code}: {error[-400:]!r}")

    def two(self, rng):
        first = start(self.number, self.run, self.ranks)
        until_it_works(first, self.run, self.number)
        os.kill(first.pid, signal.SIGSTOP)
        code, error = self.end(start(self.number, self.run))
        os.kill(first.pid, signal.SIGCONT)
        named = re.search(r"error: .* process \d+ on \S+; wait for it, or stop it", error)
        what = f"the second was not refused, exit code {code}: {error[-400:]!r}"
        self.check(code == 2 and named, what)
        code, error = self.end(first)
        self.check(code == 0, f"the first ended with {code}: {error[-400:]!r}")

    def again(self):
        code, error = self.end(start(self.number, self.run, self.ranks))
        self.check(code == 0, f"the rerun ended with {code}: {error[-600:]!r}")
        counts, names = compare(self.run, self.after)
        self.check(not names, f"differs in {names[:8]}")
        self.counts += counts
        return self


def undisturbed(number, ranks, run, keep):
    """Runs a stage, keeps a copy of the run; returns its seconds, and those until it began to
    work."""
    began, process = time.monotonic(), start(number, run, ranks)
    idle = until_it_works(process, run, number)
    code, error = finish(process, 1200)
    assert code == 0, f"{number} undisturbed ended with {code}: {error}"
    shutil.copytree(run, keep)
    return time.monotonic() - began, idle


def main(args):
    folder = Path(args.folder or tempfile.mkdtemp(prefix="campaign"))
    run, rng, before, after, took = folder / "run", random.Random(args.seed), {"00": None}, {}, {}
    for number, following in zip(STAGES, [*list(STAGES)[1:], None]):
        for ranks in (2, 1) if number in RANKED else (1,):
            if ranks == 2:
                shutil.copytree(before[number], run, dirs_exist_ok=True)
            after[number, ranks] = folder / f"after_{number}_{ranks}"
            took[number, ranks] = undisturbed(number, ranks, run, after[number, ranks])
            if ranks == 2:
                shutil.rmtree(run)
                shutil.copytree(before[number], run)
        before[following] = after[number, 1]
    alone, ranked = [(number, 1) for number in STAGES], [(number, 2) for number in RANKED]
    jobs = [("kill", *rng.choice(alone)) for _ in range(args.kills // 2)]
    jobs += [("kill", *rng.choice(ranked)) for _ in range(args.kills - len(jobs))]
    jobs += [(how, *place) for how in ("full_disk", "two") for place in alone]
    counts, recovered = Counter(), []
    for how, number, ranks in jobs:
        trial = Trial(number, ranks, run, before[number], after[number, ranks], took[number, ranks])
        getattr(trial, how)(rng)
        trial.again()
        counts += trial.counts + Counter(equal=not trial.said)
        recovered += [] if trial.recovered is None else [trial.recovered]
        print(f"{how} {number}, {ranks} rank(s): {'; '.join(trial.said) or 'equal'}", flush=True)
    trial = Trial("06", 1, run, before["05"], after["06", 1], took["06", 1])
    other = start("05", run)
    trial.again()
    code, _ = trial.end(other)
    named = compare(run, after["06", 1])[1]
    print(f"05 beside 06: {named or 'equal'}, exit code {code}")
    ranked = f"of {len(recovered)} jobs with a rank killed, torchrun itself brought"
    print(f"{ranked} {sum(recovered)} to the end")
    counts += Counter(equal=not named, lost=len(named))
    names = ("equal", "lost", "doubled", "leftovers", "hangs")
    said = ", ".join(f"{name} {counts[name]}" for name in names)
    print(f"{len(jobs) + 1} trials: {said}")
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="a new folder for the runs, which is then kept")
    main(parser.parse_args())
