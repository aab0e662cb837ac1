"""What several stages of the V2A-DPO reproduction share.

Read in this order: notation, Flow-DPO (Eq. 5, Eq. 3), AudioScore (Sec. 2.1), sampler, the interface of a backbone. A
reader of the paper can stop there. Then: failure, files, provenance, what stages read, flags, torch.distributed, video
and audio, scorers and the store of what they said; last the loaders of `adapters/`.

Notation. Times follow the paper: t = 0 is data, t = 1 is noise.

| paper          | variable      | shape          | unit, range           | MMAudio            | Frieren               |
|----------------|---------------|----------------|-----------------------|--------------------|-----------------------|
| a_0            | a_0           | (B, T, C)      | normalised latent     | x1                 | x1, (B, C, T)         |
| eps            | eps           | (B, T, C)      | N(0, 1)               | x0                 | x0                    |
| t              | t             | (B,)           | [0, 1], 1 = noise     | 1 - t              | 1 - t, as t * 1000    |
| a_t            | a_t           | (B, T, C)      | (1 - t) a_0 + t eps   | xt                 | xt                    |
| v              | v             | (B, T, C)      | eps - a_0             | -(x1 - x0)         | -ut                   |
| u_theta, u_ref | u_theta/u_ref | (B, T, C)      | predicted v           | -predict_flow      | -apply_model          |
| v, c           | features      | dict, B rows   | frozen encoders       | clip, sync, text_f | CAVP features         |
| gamma          | guidance      | float          | 1 = no guidance       | cfg_strength       | cfg scale             |
| beta           | beta          | float          | Eq. 5                 |                    |                       |
| p_i            | p             | (B, 3)         | (Good, Medium, Bad)   |                    |                       |
| score_c        | score_c       | float          | [-1, 1], Eq. 3        |                    |                       |
"""

import argparse
import copy
import csv
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
import torchaudio
from av.stream import Disposition
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
RATINGS = ("Good", "Medium", "Bad")  # the order of every probability vector (Eq. 1)
SCORES = ("ib", "clap", "desync_s", "is_nats", "pesq")  # score_1 ... score_5 (Sec. 2.1)

# ------------------------------------------------------------------------------------------------------------
# Flow-DPO (Sec. 2.3)
# ------------------------------------------------------------------------------------------------------------


def interpolate(a_0, eps, t):
    """Rectified flow's straight path (below Eq. 5). a_0, eps: (B, T, C); t: (B,) in [0, 1], 1 = noise.

    Returns a_t (B, T, C), the point at time t, and v (B, T, C) = eps - a_0, the path's velocity.
    """
    t = t[:, None, None]
    return (1 - t) * a_0 + t * eps, eps - a_0


def flow_error(v, u):
    """||v - u||^2 of Eq. 5 for each row: v, u (B, T, C), any float type -> (B,) float32.

    Paper silent: sum or mean. We average over the latent, as Diffusion-DPO's code and its followers do, so that
    beta means the same for every latent size; the sum reading is beta times T * C.
    """
    return (v.float() - u.float()).square().mean(dim=(1, 2))


def flow_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, printed=False):
    """Eq. 5 for each pair; no model, no randomness. err_*: (B,) float32, `flow_error` of policy and reference.

    The printed brackets subtract the loser's gap outside beta/2, which pulls towards the loser too and contradicts the
    paragraph below Eq. 5; we use Eq. 4's, -log sigmoid(-beta/2 (W - L)). `printed` takes them literally, to compare.
    Returns loss (B,), log 2 where policy equals reference, and logits (B,), positive where the policy already
    prefers the winner (the implicit reward's margin).
    """
    gap_w = err_w - ref_err_w  # W, below 0 where the policy fits the winner better than the reference does
    gap_l = err_l - ref_err_l  # L
    logits = -0.5 * beta * gap_w - gap_l if printed else -0.5 * beta * (gap_w - gap_l)
    return -F.logsigmoid(logits), logits


def score_c(p_w, p_l):
    """Eq. 3; p_w, p_l: (Good, Medium, Bad) of winner and loser -> float in [-1, 1], high = an easy pair."""
    return 0.5 * ((p_w[0] - p_l[0]) + (p_l[2] - p_w[2]))


# ------------------------------------------------------------------------------------------------------------
# AudioScore (Sec. 2.1)
# ------------------------------------------------------------------------------------------------------------


class AudioScore(nn.Module):
    """S(.) of Eq. 1: five scores -> probabilities of (Good, Medium, Bad).

    z-score, Linear(5, 32), ReLU, Linear(32, 3), softmax. Its buffers hold the standardiser (mean, std: (5,)) and
    the tagger's marginal p(y) (p_y: (tags,)) over the fitting clips, so that score_4 means the same at every use.
    Paper silent: hidden width; 32 is ours.
    """

    def __init__(self, tags, hidden=32):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(SCORES)))
        self.register_buffer("std", torch.ones(len(SCORES)))
        self.register_buffer("p_y", torch.full((tags,), 1.0 / tags))
        self.mlp = nn.Sequential(nn.Linear(len(SCORES), hidden), nn.ReLU(), nn.Linear(hidden, len(RATINGS)))

    def logits(self, scores):
        """scores: (B, 5) float32, nan where a score does not apply (it then counts as the mean) -> (B, 3)."""
        return self.mlp(torch.nan_to_num((scores - self.mean) / self.std, nan=0.0))

    def forward(self, scores):
        """scores: (B, 5) -> p: (B, 3) float64, each row sums to 1. In float32 several bad audios would have P(Bad) = 1
        exactly, a tie."""
        return self.logits(scores).double().softmax(dim=-1)

    def inception(self, tag_logits):
        """score_4: KL(p(y|a) || p(y)) in nats for each audio; tag_logits (B, tags) -> (B,).

        Paper silent: the inception score of one audio. This is its contribution to the usual IS, exp of the mean.
        """
        log_p = tag_logits.float().log_softmax(dim=-1)
        return (log_p.exp() * (log_p - self.p_y.clamp_min(1e-12).log())).sum(dim=-1)

    @classmethod
    def load(cls, path, device="cpu"):
        state = load_pt(path)["audioscore"]
        self = cls(tags=len(state["p_y"]), hidden=len(state["mlp.0.bias"]))
        self.load_state_dict(state)
        return self.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Sampler
# ------------------------------------------------------------------------------------------------------------


def seed_of(*parts):
    """A seed, a function of these parts alone: an audio's is of (seed, clip, k), never of rank, shard or batch."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def initial_noise(model, seeds):
    """eps at t = 1 for each seed, drawn on the CPU so that every device starts alike -> (len(seeds), T, C)."""
    rows = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(model.device)


@torch.no_grad()
def sample(model, features, seeds, steps=25, guidance=4.5):
    """Euler's method from noise (t = 1) to data (t = 0), classifier-free guidance inside.

    features: dict of tensors with B rows; seeds: R * B integers, row r * B + b belongs to clip b. The conditions are
    projected once; on CUDA the network runs in bf16. Returns a_0 (R * B, T, C) float32 on the model's device.
    """
    a_t, times = initial_noise(model, seeds), torch.linspace(1, 0, steps + 1)
    with autocast(model.device.type, "auto"):
        conditions = model.project(features)
        for t, t_next in zip(times[:-1], times[1:]):
            u = model.velocity(a_t, model.snap_t(t).expand(len(a_t)).to(a_t), conditions, guidance)
            a_t = a_t + (t_next - t).item() * u.float()
    return a_t


# ------------------------------------------------------------------------------------------------------------
# The interface of a backbone: what toy, MMAudio and Frieren offer to the stages
# ------------------------------------------------------------------------------------------------------------


class FlowModel(nn.Module):
    """A V2A flow model in the paper's convention (t = 1 noise, v = eps - a_0); only adapters flip time and sign.

    Registered parameters are those of the velocity network: everything that maps features and a_t to u, condition
    projections included. Null-condition parameters are frozen. Encoders and codec are loaded on first use and are no
    submodules, so that copying, training and saving never touch them.
    """

    name: str  # as given to load_model
    latent_shape: tuple  # (T, C)
    sample_rate_hz: int
    clip_s: float  # seconds of video that one audio belongs to, and of audio that is judged
    checkpoint: Path  # the file that the velocity network came from

    # What an adapter fills in -------------------------------------------------------------------------------

    def encode(self, clip):
        """Frozen encoders, once per clip. clip: a line of clips.jsonl with `path`. Returns a dict of float32 CPU
        tensors without batch dimension. Raises SkipClip(reason) for a video that cannot be used."""
        raise NotImplementedError

    def project(self, features):
        """features: dict, B rows, any device -> conditions: dict, B rows. Differentiable."""
        raise NotImplementedError

    def null_conditions(self, conditions):
        """The unconditional counterpart of `conditions`, with as many rows."""
        raise NotImplementedError

    def predict(self, a_t, t, conditions):
        """u(a_t, t) without guidance. a_t: (B, T, C), t: (B,), conditions: B rows -> (B, T, C)."""
        raise NotImplementedError

    def decode(self, latents):
        """(B, T, C) normalised latents -> (B, S) float32 waveforms at sample_rate_hz, on the CPU."""
        raise NotImplementedError

    def snap_t(self, t):
        """The nearest earlier time that the network knows; the identity for continuous-time networks."""
        return t

    def blocks(self):
        """The blocks that gradient checkpointing recomputes."""
        return []

    def load_policy(self, path):
        """Replaces the velocity network's weights, strictly, by a file of `save_policy`; stops when it is another
        model's."""
        raise NotImplementedError

    def policy_state(self):
        """What `save_policy` writes: the upstream's own format, loadable by upstream's own loader."""
        raise NotImplementedError

    # What all adapters share --------------------------------------------------------------------------------

    @property
    def device(self):
        return next(self.parameters()).device

    def velocity(self, a_t, t, conditions, guidance=1.0):
        """u with classifier-free guidance gamma: u_null + gamma (u_cond - u_null), both in one forward.

        a_t: (R * B, T, C), t: (R * B,), conditions: B rows, each serving R rows of a_t (row r * B + b takes row b).
        """
        repeats = len(a_t) // len(next(iter(conditions.values())))
        conditions = tile(conditions, repeats)
        if guidance == 1.0:
            return self.predict(a_t, t, conditions)
        null = self.null_conditions(conditions)
        both = {key: torch.cat([value, null[key]]) for key, value in conditions.items()}
        u_cond, u_null = self.predict(torch.cat([a_t, a_t]), torch.cat([t, t]), both).chunk(2)
        return u_null + guidance * (u_cond - u_null)

    def forward(self, a_t, t, features, guidance=1.0):
        """`velocity` from features: what stages 05 and 06 train, through DistributedDataParallel."""
        return self.velocity(a_t, t, self.project(features), guidance)

    def trainable_parameters(self):
        return [p for p in self.parameters() if p.requires_grad]

    def reference(self):
        """A frozen copy: u_ref."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def checkpoint_blocks(self):
        """Trades time for memory: every block's activations are recomputed in the backward pass."""
        for block in self.blocks():
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

    def save_policy(self, path):
        save_pt(path, self.policy_state())


def tile(rows, repeats):
    """Repeats every tensor of a dict along its batch: (B, ...) -> (repeats * B, ...)."""
    return {key: value.repeat(repeats, *[1] * (value.dim() - 1)) for key, value in rows.items()}


# ------------------------------------------------------------------------------------------------------------
# Failure
# ------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """A user error: one line that says what is wrong and what to do."""


class SkipClip(Exception):
    """A video or audio that cannot be used; the text is the reason that stage 01 counts and lists."""


class NoAudio(SkipClip):
    """A silent film, which has no audio stream; any other SkipClip of `read_audio` is sound that cannot be read."""


def stop(message):
    raise Stop(message)


def launch(main, parse_args):
    """A stage's entry. A user error ends in its line and exit code 2, Ctrl-C in a line; what is written is kept."""
    try:
        main(parse_args())
    except Stop as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, also beside a progress bar
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def load_pt(path, mmap=False):
    """The only torch.load of this repository. path: a .pt of plain tensors, numbers, strings, lists, dicts."""
    path = Path(path)
    if not path.is_file():
        stop(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a truncated or foreign file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        refused = re.findall(r"GLOBAL (\S+)", str(error))  # a pickle may run code: only plain types are let in
        reason = f"it holds {refused[0]}" if refused else reason[:160]
        stop(f"{path}: cannot be read as a .pt file of plain tensors ({reason}); make it anew or copy it again")


@contextmanager
def replacing(path):
    """Yields a temporary name beside `path` and renames it on success: a file is either whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pt(path, value):
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        torch.save(value, stream)  # to a path it would write the temporary name, and equal content would differ


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path, hint=""):
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stop(f"{path}: no such file{hint}")
    except ValueError as error:
        stop(f"{path}: not valid JSON ({error}){hint}")


def read_jsonl(path, fields=(), hint=""):
    """A list of dicts, one per line; every line must have `fields`. Stops with file, line and field."""
    path, rows = Path(path), []
    if not path.is_file():
        stop(f"{path}: no such file{hint}")
    text = path.read_text(encoding="utf-8", errors="replace").rstrip()
    for number, line in enumerate(text.split("\n") if text else (), 1):  # splitlines would cut at U+2028 in a caption
        try:
            row = json.loads(line)
        except ValueError:
            stop(f"{path}, line {number}: not valid JSON{hint}")
        for field in fields:
            if not isinstance(row, dict) or field not in row:
                stop(f"{path}, line {number}: field '{field}' is missing{hint}")
        rows.append(row)
    return rows


def read_table(path, fields):
    """A person's answers, .csv or .jsonl: yields (line number, row); every row must have `fields`."""
    path = Path(path)
    if not path.is_file():
        stop(f"{path}: no such file")
    if path.suffix == ".jsonl":
        yield from enumerate(read_jsonl(path, fields), 1)
        return
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
        reader = csv.DictReader(stream)
        missing = [field for field in fields if field not in (reader.fieldnames or [])]
        if missing:
            stop(f"{path}, line 1: column '{missing[0]}' is missing")
        for row in reader:
            yield reader.line_num, row


def write_sheet(path, header, rows, answer):
    """A csv for people to fill in, an empty cell of the column `answer` in each row. Somebody's answers are never
    written over: a sheet that holds any is left as it is, and said so."""
    path = Path(path)
    if path.exists() and any(row[answer] for _, row in read_table(path, (answer,))):
        print(f"{path}: holds answers and is left as it is")
        return
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def inside(root, name, where):
    """root / name, refused when it leaves root (.., absolute paths, links that point outside)."""
    root = Path(root).resolve()
    path = (root / str(name)).resolve()
    if not path.is_relative_to(root):
        stop(f"{where}: '{name}' points outside {root}; use a path below it")
    return path


# ------------------------------------------------------------------------------------------------------------
# Provenance: the two digits of a file's name say which stage wrote it, that stage's record what it was made from
# ------------------------------------------------------------------------------------------------------------


def digest(path):
    """SHA-256 of a file, or of a folder's .jsonl files in order of their names; the first 16 hex digits."""
    path, total = Path(path), hashlib.sha256()
    if not path.exists():
        stop(f"{path}: no such file")
    for file in sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]


def record_of(run, name):
    """`<run>/NN_settings.json` of what stage NN wrote; a policy folder has its own settings.json."""
    top = Path(name).parts[0]
    own = Path(run) / top / "settings.json"
    return own if own.exists() else Path(run) / f"{top[:2]}_settings.json"


def require(run, *names):
    """Stops unless these outputs of earlier stages exist, and nothing that they were made from has changed since, back
    to stage 01: their records are followed."""
    followed = set()

    def follow(name):
        path, record = Path(run) / name, record_of(run, name)
        script = next((file.name for file in ROOT.glob(f"{name[:2]}_*.py")), None)
        for file in (path, record):
            if not file.exists():
                stop(f"{file}: no such file; run {script or 'the stage that writes it'} --run-dir {run} first")
        if record in followed:
            return
        followed.add(record)
        inputs = read_json(record).get("inputs", {})
        for source in inputs:
            if not (Path(run) / source).exists():
                stop(f"{Path(run) / source}: missing, but {path} was made from it; run the stage that writes it again")
            follow(source)  # the earliest change is the one to mend
        for source, was in inputs.items():
            if digest(Path(run) / source) != was:
                again = f"{script} --run-dir {run} --redo" if record.parent == Path(run) else "it into another --out"
                stop(f"{Path(run) / source}: changed after it was read for {path}; rerun {again}")

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
        old = read_json(file)
        for part in ("settings", "inputs"):
            before, now = old.get(part, {}), new[part]
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    changed = f"made with {key}={before.get(key)}, now {now.get(key)}"
                    changed = changed if part == "settings" else f"{key} has changed since it was read"
                    stop(f"{file}: {changed}; {advice}")
    for output in outputs if redo else ():
        (Path(run) / output).unlink(missing_ok=True)
    write_json(file, new)


# ------------------------------------------------------------------------------------------------------------
# What stages read
# ------------------------------------------------------------------------------------------------------------


def read_run(run):
    """run.json of a run folder; stops when the folder is missing."""
    run = Path(run)
    if not run.is_dir():
        stop(f"--run-dir {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
    return read_json(run / "run.json", hint="; run 01_generate.py (or 00_toy_world.py) first")


def read_clips(run, split=None):
    """Lines of clips.jsonl, in order, each with `path` (absolute, checked to lie below the video root) and, for
    Frieren, `cavp` (its features, without suffix)."""
    run = Path(run)
    file, run_json, clips = run / "clips.jsonl", read_run(run), []
    root = run / run_json["video_root"]
    for number, clip in enumerate(read_jsonl(file, ("id", "video", "split"), "; rerun 01_generate.py"), 1):
        if split is None or clip["split"] == split:
            clip["path"] = inside(root, clip["video"], f"{file}, line {number}, field 'video'")
            if "cavp_root" in run_json:
                clip["cavp"] = inside(run_json["cavp_root"], clip["id"], f"{file}, line {number}, field 'id'")
            clips.append(clip)
    return clips


def read_samples(run):
    """Every audio of stage 01: {clip id: [line, ...]} in order of k; each line gains `shard` (a path stem)."""
    samples, fields = {}, ("clip", "k", "seed", "wav", "row", "digest", "finite", "peak", "clipped")
    for file in sorted((Path(run) / "01_samples").glob("[0-9]*.jsonl")):
        if not file.name.endswith(".skipped.jsonl"):
            for row in read_jsonl(file, fields, "; remove the shard and rerun 01_generate.py"):
                samples.setdefault(row["clip"], []).append(dict(row, shard=file.stem))
    if not samples:
        stop(f"{Path(run) / '01_samples'}: no generated audio; run 01_generate.py --run-dir {run} first")
    return samples


class Shards:
    """Stage 01's latents and features, memory-mapped: memory does not grow with the data set."""

    def __init__(self, run, samples, num_samples):
        self.folder, self.num_samples, self.open = Path(run) / "01_samples", num_samples, {}
        self.place = {(clip, row["k"]): (row["shard"], row["row"]) for clip, rows in samples.items() for row in rows}
        self.made = defaultdict(list)  # by shard, the digests of its audios
        for row in (row for rows in samples.values() for row in rows):
            self.made[row["shard"]].append(row["digest"])

    def shard(self, name):
        if name not in self.open:
            file = load_pt(self.folder / f"{name}.pt", mmap=True)
            if file.get("digests") != self.made[name]:
                stop(f"{self.folder / name}.pt: not of the audios in {name}.jsonl; remove both, rerun 01_generate.py")
            self.open[name] = file
        return self.open[name]

    def latents(self, audios):
        """[(clip, k), ...] -> (B, T, C) float32."""
        places = [self.place[audio] for audio in audios]
        return torch.stack([self.shard(name)["latents"][row] for name, row in places]).float()

    def features(self, clips):
        """[clip id, ...] -> dict of (B, ...) float32."""
        places = [self.place[clip, 0] for clip in clips]
        found = [(self.shard(name)["features"], row // self.num_samples) for name, row in places]
        return {key: torch.stack([features[key][row] for features, row in found]) for key in found[0][0]}


def people_of(run):
    """The module whose simulated people answer, and whose oracle judges, in a run that holds its world's truth."""
    return importlib.import_module(ADAPTERS["toy"]) if (Path(run) / "00_truth.jsonl").exists() else None


def to_simulate(run, answers, asked, fields, redo):
    """Whether simulated people answer: nobody has, or, with --redo, only they have, and to other questions.
    answers: their .jsonl; asked: a set of tuples of these fields."""
    if people_of(run) is None:
        return False
    if not answers.exists():
        return True
    rows = read_jsonl(answers, fields)
    simulated = all(row.get("rater") == "simulated" for row in rows)
    return redo and simulated and {tuple(row[field] for field in fields) for row in rows} != asked


def sample_index(clip, k, samples, where, field="k"):
    """k as an integer, after checking that stage 01 made the k-th audio of this clip."""
    if not isinstance(clip, str) or clip not in samples:
        stop(f"{where}, field 'clip': {clip!r} is no clip with generated audio")
    known = [row["k"] for row in samples[clip]]
    if not str(k).isdecimal() or int(k) not in known:
        stop(f"{where}, field '{field}': {k!r} is no audio of {clip} (there are {', '.join(map(str, known))})")
    return int(k)


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A stage's parser: the first line of its docstring, defaults in --help, a bad flag as a user error, --run-dir."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], formatter_class=HelpFormatter, allow_abbrev=False)
        self.io, self.paper, self.engineering = map(self.add_argument_group, ("io", "paper", "engineering"))
        self.io.add_argument("--run-dir", default="runs/toy", help="run folder")

    def error(self, message):
        stop(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number(kind, least=-math.inf, most=math.inf):
    """A flag's type: a finite int or float from least to most."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f", at least {least:g}" * (least > -math.inf) + f", at most {most:g}" * (most < math.inf)
            kinds = {int: "a whole number", float: "a number"}
            raise argparse.ArgumentTypeError(f"{text!r} must be {kinds[kind]}{bounds}")
        return value

    return convert


def parse(parser, argv, stage):
    """parser.parse_args; `defaults` of the run's run.json (or of the run that --checkpoint lies in) replace the paper's
    numbers, which is said, and an explicit flag wins over both."""
    args = parser.parse_args(argv)
    beside = Path(getattr(args, "checkpoint", None) or args.run_dir).with_name("run.json")
    found = [read_json(file) for file in (Path(args.run_dir) / "run.json", beside) if file.is_file()]
    own = next((about["defaults"] for about in found if "defaults" in about), {}).get(stage, {})
    paper = {key: parser.get_default(key) for key in own}
    parser.set_defaults(**own)
    args = parser.parse_args(argv)
    changed = [f"{key} {paper[key]} -> {own[key]}" for key in own if getattr(args, key) == own[key] != paper[key]]
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print(f"this run's defaults: {', '.join(changed)}")
    return args


# ------------------------------------------------------------------------------------------------------------
# torch.distributed, training
# ------------------------------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1
    device: str = "cpu"


RANK_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def setup_ranks():
    """Under torchrun or alone; nccl on CUDA, gloo elsewhere. Other ranks than 0 speak of errors only."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in RANK_VARIABLES.items())
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the process ends
    device, options = "cpu", {}
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            stop(f"process {local} of this node has no GPU ({torch.cuda.device_count()} here); lower --nproc_per_node")
        device, options = f"cuda:{local}", {"device_id": torch.device("cuda", local)}
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        patience = timedelta(hours=12)  # ranks wait for the slowest clip, scorer or encoder
        dist.init_process_group("nccl" if options else "gloo", timeout=patience, **options)
    return Ranks(rank, world, device)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def data_parallel(model, device):
    """The module whose forward 05 and 06 train: the model itself, or its DistributedDataParallel."""
    if not dist.is_initialized():
        return model
    devices = None if device == "cpu" else [device]
    options = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, **options)


def autocast(device, precision):
    """bf16 on CUDA, plain float32 elsewhere, unless --precision says otherwise."""
    bf16 = precision == "bf16" or (precision == "auto" and device != "cpu")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


@functools.lru_cache(maxsize=4)
def shuffled(seed, count):
    """A permutation of range(count), a function of the seed: one epoch's order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def save_training(folder, step, model, optimizer):
    """checkpoint.pt: everything that the next step depends on besides the settings, which it is bound to."""
    state = dict(step=step, settings=digest(Path(folder) / "settings.json"))
    save_pt(Path(folder) / "checkpoint.pt", dict(state, model=model.state_dict(), optimizer=optimizer.state_dict()))


def resume_training(folder, model, optimizer, steps, rank=0):
    """Loads checkpoint.pt if there is one, cuts log.jsonl back to it, and returns the number of steps done."""
    file, log, step = Path(folder) / "checkpoint.pt", Path(folder) / "log.jsonl", 0
    if file.exists():
        state = load_pt(file, mmap=True)
        if state.get("settings") != digest(Path(folder) / "settings.json") or not 0 <= state["step"] <= steps:
            stop(f"{file}: of another training than {folder}/settings.json; remove it, or use another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if rank == 0:
        write_jsonl(log, [row for row in read_jsonl(log) if row["step"] < step] if log.exists() else [])
    barrier()
    return step


def output_folder(run, name):
    """run / name for --out: a folder name inside the run, nothing else."""
    taken = re.match(r"0[0-47-9]|scores$", name)
    if not name or Path(name).name != name or name in (".", "..") or taken:
        stop(f"--out {name}: give a plain folder name, not one of another stage")
    if (Path(run) / name).exists() and not (Path(run) / name).is_dir():
        stop(f"--out {name}: is a file of this run; give a plain folder name")
    return Path(run) / name


def save_policy(folder, model, run_json, **about):
    """policy.pt in the upstream's own format, and policy.json, from which stage 07 knows whose it is."""
    model.save_policy(Path(folder) / "policy.pt")
    about = dict(model=run_json["model"], base_digest=run_json["checkpoint_digest"], **about)
    write_json(Path(folder) / "policy.json", about)


# ------------------------------------------------------------------------------------------------------------
# Video and audio
# ------------------------------------------------------------------------------------------------------------


FINEST_FPS = 25  # the finest consumer's grid, Synchformer's: on it a video is too short for all of them, or for none


def open_media(path):
    """A video or audio file through PyAV; a title in another encoding than UTF-8 is no reason to refuse it."""
    return av.open(str(path), metadata_errors="ignore")


@contextmanager
def skipping(kind):
    """What can go wrong in a file becomes the reason to skip it."""
    try:
        yield
    except FileNotFoundError:
        raise SkipClip("no such file") from None
    except (av.error.FFmpegError, soundfile.SoundFileError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SkipClip(f"unreadable {kind} ({reason})") from None


def film(container):
    """The first video stream that is no cover picture, ready to decode."""
    stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
    if stream is None or stream.codec_context is None:
        raise SkipClip("no video stream" if stream is None else "unreadable video (no decoder for it)")
    stream.thread_type, stream.codec_context.thread_count = "AUTO", 2  # a thread holds several frames, 12 MB each at 4K
    return stream


def slot(time_s, fps):
    """ffmpeg's fps filter: the nearest multiple of 1 / fps, halves away from zero. time_s: Fraction."""
    nearest = math.floor(abs(time_s) * Fraction(fps) + Fraction(1, 2))
    return nearest if time_s >= 0 else -nearest


def read_frames(path, wanted, duration_s):
    """A video's first duration_s at several rates, decoded once. wanted: [(fps, transform), ...]; transform: (3, H, W)
    uint8 -> tensor. Returns a list of (duration_s * fps, ...) tensors. Raises SkipClip.

    The rule is the fps filter's, as in torio, with which MMAudio's data sets and av-benchmark read: picture i is the
    last frame whose slot is at most i, counted from the first frame's; the last frame is held for its own duration; a
    display matrix turns nothing. A changed size is scaled to the first. What no slot shows is not converted, and no
    frame is kept: a transform that shrinks bounds the memory."""
    grids = [*(fps for fps, _ in wanted), FINEST_FPS]
    counts = [round(duration_s * fps) for fps in grids]
    out, done, last, reformat = [None] * len(wanted), [0] * len(wanted), None, av.video.reformatter.VideoReformatter()

    def slots(time_s):
        return [slot(time_s, fps) - slot(start_s, fps) for fps in grids]

    def show_last(until):
        picture = None
        for k, (_, transform) in enumerate(wanted):
            end = min(until[k], counts[k])
            if done[k] < end:
                if picture is None:
                    picture = torch.from_numpy(reformat.reformat(last, *size, "rgb24").to_ndarray()).permute(2, 0, 1)
                shown = transform(picture)
                out[k] = shown.new_empty(counts[k], *shown.shape) if out[k] is None else out[k]
                out[k][done[k] : end], done[k] = shown, end

    with skipping("video"), open_media(path) as container:
        stream = film(container)
        for frame in container.decode(stream):
            if frame.pts is None:
                raise SkipClip("frames without time stamps")
            time_s = frame.pts * frame.time_base
            if last is None:
                start_s, size = time_s, (frame.width, frame.height)
            elif time_s < last.pts * last.time_base:  # B-frames in AVI: ffmpeg itself shows them late or drops them
                raise SkipClip("time stamps out of order")
            show_last(until := slots(time_s))
            last = frame
            if until[-1] >= counts[-1] and done == counts[:-1]:
                return out
        if last is None:
            raise SkipClip("no frames")
        end_s = time_s + (last.duration * last.time_base or 1 / (stream.average_rate or Fraction(25)))
        if slots(end_s)[-1] < counts[-1]:
            raise SkipClip(f"too short: {float(end_s - start_s):.2f} s of video, {duration_s:.2f} s needed")
        show_last(counts)
    return out


def read_audio(path, sample_rate_hz, duration_s=None, pad=True):
    """The first audio stream of any container as mono (S,) float32 at sample_rate_hz, the mean of its channels; with
    duration_s, cut and (`pad`) zero-padded to it. Beside a video, sample 0 belongs to the first frame: by its time
    stamps, sound is led by silence or cut. Raises SkipClip, NoAudio where there is no stream."""
    wave = resample(*decode_audio(path, duration_s), sample_rate_hz)
    samples = len(wave) if duration_s is None else round(duration_s * sample_rate_hz)
    return fit_length(wave, samples) if pad else wave[:samples]


@skipping("audio")
def decode_audio(path, duration_s=None):
    """(S,) float32 mono and its rate; of a longer file duration_s, and 0.1 s more for the filter of `resample`."""
    need_s, wave = math.inf if duration_s is None else duration_s + 0.1, None
    with open(path, "rb") as file:
        is_wav = re.match(rb"RIFF....WAVE", file.read(12), re.DOTALL)
    if is_wav:  # ten times faster than through ffmpeg, which is left what soundfile does not know
        with suppress(soundfile.SoundFileError), soundfile.SoundFile(path) as file:
            samples = -1 if duration_s is None else math.ceil(need_s * file.samplerate)
            wave, rate = file.read(samples, "float32", always_2d=True).mean(axis=1), file.samplerate
    if wave is None:
        wave, rate = decode_stream(path, need_s)
    if not len(wave):
        raise SkipClip("empty audio stream")
    return torch.from_numpy(wave), rate


def decode_stream(path, need_s):
    """(S,) float32 array and its rate: the first audio stream from the first picture on, need_s of it or all."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise NoAudio("no audio stream")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec is None:
            raise SkipClip("unreadable audio (no decoder for it)")
        layout, rate = codec.layout, codec.sample_rate
        if "(" in layout.name:  # PyAV 18 would free a custom order of channels twice; the mean needs no order
            codec.layout = f"{layout.nb_channels} channels"
        first_s = first_picture_s(path) if container.streams.video else None
        pieces, total, kind = [np.zeros(0, np.float32)], None, None
        for frame in container.decode(stream):
            if total is None:  # samples since the first picture: silence where it is above 0, to be cut where below
                total = 0 if None in (first_s, frame.time) else round((frame.time - first_s) * rate)
                pieces.append(np.zeros(int(max(0, min(total, need_s * rate))), np.float32))
            known, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
            if kind != known:  # also in mid-stream. Packed, as PyAV miscounts the planes of 8 channels and more
                packed = av.AudioResampler(format="flt", layout=frame.layout, rate=rate)
            for part in packed.resample(frame):
                piece = part.to_ndarray().reshape(-1, part.layout.nb_channels).mean(axis=1)
                pieces.append(piece[max(0, -total) :])
                total += len(piece)
            if total >= need_s * rate:
                break
        return np.concatenate(pieces), rate


def first_picture_s(path):
    """When a file's first frame is shown; None where no video can be read."""
    with suppress(SkipClip, av.error.FFmpegError), open_media(path) as container:
        return next((frame.time for frame in container.decode(film(container))), None)
    return None


def resample(wave, rate, new_rate):
    """torchaudio's windowed sinc. Its table of filters grows with the product of both rates over their common divisor
    (44,099 to 16,000 Hz: 2.8 GB, and four times that to make it); where it is large, the same filter runs in scipy."""
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    if old * new < 2**20:
        return torchaudio.functional.resample(wave, rate, new_rate)
    from scipy.signal import upfirdn

    cutoff = 0.99 * min(old, new)  # torchaudio's rolloff; six zero crossings on either side, under a squared cosine
    reach = math.ceil(6 * new / cutoff)  # new samples
    i = np.arange(-reach * old, reach * old + 1)  # time in units of 1 / (old * new)
    phase = i * pow(old, -1, new) % new  # time is the sum of two fractions in float32, whose rounding is at -70 dB
    t = np.float32((phase * old - i) // new / old) - np.float32(phase / new)
    t *= np.float32(cutoff)
    taps = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2, 0) * (cutoff / old)
    out = upfirdn(np.float32(taps), wave.numpy(), new, old)
    return torch.from_numpy(out[reach : reach + math.ceil(len(wave) * new / old)])


def fit_length(wave, samples):
    """Cut or zero-padded along the last dimension."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def write_audio(path, wave, sample_rate_hz):
    """wave: (S,) float32, clipped to [-1, 1] (what is not finite becomes 0) -> 16-bit wav. Returns what need not be
    found out by opening it again: digest, finite, peak (of full scale), clipped (share of samples at full scale)."""
    heard = torch.nan_to_num(wave.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
    level = heard.abs()
    with replacing(path) as temporary:
        soundfile.write(temporary, heard.numpy(), sample_rate_hz, subtype="PCM_16")
    about = dict(digest=digest(path), finite=bool(wave.isfinite().all()), peak=round(level.max().item(), 6))
    return dict(about, clipped=round((level >= 0.999).float().mean().item(), 6))


# ------------------------------------------------------------------------------------------------------------
# Scorers, and the one store of what they said
# ------------------------------------------------------------------------------------------------------------

AUDIOSCORE_SCORERS = ("imagebind", "clap", "synchformer", "panns", "pesq")  # behind score_1 ... score_5


class Scorer:
    """One frozen scorer. Every set of them offers AUDIOSCORE_SCORERS, and what stage 07 needs besides."""

    sample_rate_hz: int
    files: tuple = ()  # below --weights
    reads = None  # what of a clip its score depends on: None, "caption", "video" or "reference" (its sound and label)
    gives: str  # the name of its score, where it reads the clip

    def __init__(self):
        self.sides = {}  # clip id -> what embed_clip returned, or the SkipClip that it raised

    def embed_clip(self, clip):
        """What depends on the clip alone (video tower, text tower, PESQ's reference); None where the score does not
        apply. May raise SkipClip."""
        return None

    def score_audio(self, waves, clips, sides):
        """waves: (B, S) float32 at sample_rate_hz; clips: B lines of clips.jsonl; sides: B results of embed_clip.
        Returns a dict of (B, ...) float32 tensors, nan where the score does not apply."""
        raise NotImplementedError

    def __call__(self, waves, clips):
        for clip in clips:
            if clip["id"] not in self.sides:
                try:
                    self.sides[clip["id"]] = self.embed_clip(clip)
                except SkipClip as reason:
                    stamp(clip["path"])
                    self.sides[clip["id"]] = reason
                    tqdm.write(f"{clip['id']}: {reason}; {type(self).__name__} cannot judge it", file=sys.stderr)
        rows = [i for i, clip in enumerate(clips) if not self.failed(clip)]
        if not rows:
            return {self.gives: torch.full((len(waves),), math.nan)}
        sides = [self.sides[clips[i]["id"]] for i in rows]
        with torch.inference_mode():
            scored = self.score_audio(waves[rows], [clips[i] for i in rows], sides)
        everything = {key: torch.full((len(waves), *value.shape[1:]), math.nan) for key, value in scored.items()}
        for key, value in scored.items():
            everything[key][rows] = value.float().cpu()
        return everything

    def failed(self, clip):
        return isinstance(self.sides.get(clip["id"]), SkipClip)


class Audio(NamedTuple):
    """An audio to score: the line of its clip, its file, the file's digest, and its group in the store."""

    clip: dict
    path: Path
    digest: str
    group: str


def stamp(path):
    """Size and time of a file that an earlier stage has used: enough to know it by, without opening it."""
    try:
        about = os.stat(path)
    except OSError:
        stop(f"{path}: gone, though stage 01 found it; put it back and run the same command again")
    return f"{about.st_size}-{about.st_mtime_ns}"


def weights_digest(run, root, files):
    """Digest of a scorer's files, remembered by path, size and time in <run>/scores/weights.json."""
    memory = Path(run) / "scores" / "weights.json"
    known, digests = read_json(memory) if memory.exists() else {}, []
    for path in (Path(root) / name for name in files):
        name = str(path.resolve())
        if not path.exists() and name not in known:
            weight_file(root, path.relative_to(root))
        if path.exists() and known.get(name, {}).get("stamp") != stamp(path):
            known[name] = {"stamp": stamp(path), "digest": digest(path)}
            write_json(memory, known)
        digests.append(known[name]["digest"])
    return "".join(digests)


def score_keys(run, audios, name, weights):
    """The key of each audio for one scorer, a digest of everything that the score depends on: the audio, the scorer's
    weights, and what it reads of the clip. Opens no media file."""
    scorers, sides = scorers_of(run, weights), {}
    cls = scorers.classes[name]
    files = weights_digest(run, scorers.root, cls.files)

    def side(clip):
        if clip["id"] not in sides:
            parts = {"caption": [clip["caption"]], "reference": [clip["label"]]}.get(cls.reads, [])
            sides[clip["id"]] = [*parts, stamp(clip["path"])] if cls.reads in ("video", "reference") else parts
        return sides[clip["id"]]

    parts = (json.dumps([name, audio.digest, files, side(audio.clip)]) for audio in audios)
    return [hashlib.sha256(part.encode()).hexdigest()[:16] for part in parts]


def store_file(run, group, name):
    return Path(run) / "scores" / f"{group}.{name}.pt"


def fill_store(run, audios, names, weights, ranks=Ranks()):  # noqa: B008, a constant
    """Scores what the store lacks, one network in memory at a time (two of tiny ones), groups divided over the ranks. A
    failure is never stored. audios: list of Audio; names: scorers."""
    scorers, clip_s, work = scorers_of(run, weights), read_run(run)["clip_s"], defaultdict(list)
    groups = list(dict.fromkeys(audio.group for audio in audios))[ranks.rank :: ranks.world]
    for name in names:
        wanted = {group: {} for group in groups}
        for audio, key in zip(audios, score_keys(run, audios, name, weights)):
            wanted.get(audio.group, {}).setdefault(key, audio)  # equal audio of two systems is scored once
        for group, new in wanted.items():
            file = store_file(run, group, name)
            for key in load_pt(file, mmap=True)["keys"] if file.exists() else ():
                new.pop(key, None)
            if new:
                work[name].append((file, new))
        for file in scorers.classes[name].files if work[name] else ():
            weight_file(scorers.root, file)  # a missing file is said now, not after hours of the other scorers

    def score_with(name):
        scorer = load_scorer(name, run, ranks.device, weights) if work[name] else None
        for file, new in work[name]:
            scores = score_files(scorer, [*new.values()], clip_s)
            good = [i for i, audio in enumerate(new.values()) if not scorer.failed(audio.clip)]
            keys = [key for i, key in enumerate(new) if i in set(good)]
            scores = {key: value[good] for key, value in scores.items()}
            if file.exists():
                old = load_pt(file)
                keys, scores = old.pop("keys") + keys, {k: torch.cat([old[k], v]) for k, v in scores.items()}
            if keys:
                save_pt(file, {"keys": keys, **scores})
            scorer.sides.clear()
            bar.update()
        del scorer
        if ranks.device != "cpu":
            torch.cuda.empty_cache()

    total = sum(map(len, work.values()))
    bar = tqdm(total=total, desc="score", unit="file", disable=ranks.rank > 0 or not total)
    with bar, ThreadPoolExecutor(scorers.at_a_time) as pool:
        list(pool.map(score_with, names))
    barrier()


def score_files(scorer, audios, clip_s, batch=20):
    """audios: list of Audio, each judged on its first clip_s seconds. Returns a dict of (n, ...) float32 tensors in the
    same order. The next batches are read while one is scored."""

    def read(audio):
        try:
            return read_audio(audio.path, scorer.sample_rate_hz, clip_s)
        except SkipClip as reason:
            stop(f"{audio.path}: {reason}; the audio of {audio.clip['id']} cannot be judged, make or copy it again")

    scored, parts = [], [audios[i : i + batch] for i in range(0, len(audios), batch)]
    with ThreadPoolExecutor(2) as readers:
        for part, waves in zip(parts, readers.map(lambda part: torch.stack([*map(read, part)]), parts)):
            scored.append(scorer(waves, [audio.clip for audio in part]))
    return {key: torch.cat([one[key] for one in scored]) for key in scored[0]}


def stored_scores(run, audios, names, weights):
    """What the store knows of these audios, in their order: {scorer: {key: (n, ...) float32}}, nan where a scorer could
    not judge."""
    found = {}
    for name in names:
        rows, values = defaultdict(list), {}
        for i, (audio, key) in enumerate(zip(audios, score_keys(run, audios, name, weights))):
            rows[audio.group].append((i, key))
        for group, wanted in rows.items():
            file = store_file(run, group, name)
            stored = load_pt(file) if file.exists() else {"keys": []}
            place = {key: row for row, key in enumerate(stored.pop("keys"))}
            known = [(i, place[key]) for i, key in wanted if key in place]
            for key, value in stored.items():
                values.setdefault(key, torch.full((len(audios), *value.shape[1:]), math.nan))
                values[key][[i for i, _ in known]] = value[[row for _, row in known]]
        gives = scorers_of(run, weights).classes[name]
        found[name] = values or {gives.gives: torch.full((len(audios),), math.nan)}
    return found


def five_scores(found, audioscore):
    """The vector of Sec. 2.1 for each audio, (n, 5) float32 in the order of SCORES, nan where one does not apply."""
    columns = [found["imagebind"]["ib"], found["clap"]["clap"], found["synchformer"]["desync_s"]]
    return torch.stack([*columns, audioscore.inception(found["panns"]["logits"]), found["pesq"]["pesq"]], dim=1)


def score_line(clip, k, scores, **more):
    """A line of 02_scores.jsonl or 03_scores/*.jsonl; scores: (5,) with nan where one does not apply."""
    numbers = {name: None if math.isnan(value) else round(value, 6) for name, value in zip(SCORES, scores.tolist())}
    return {"clip": clip, "k": k, **numbers, **more}


# ------------------------------------------------------------------------------------------------------------
# Loaders: a backbone or a scorer is one file in adapters/ and one line here (docs/adapters.md)
# ------------------------------------------------------------------------------------------------------------

ADAPTERS = {"toy": "00_toy_world", "mmaudio": "adapters.mmaudio", "frieren": "adapters.frieren"}
SCORERS = {"toy": ("00_toy_world",), "real": ("adapters.scorers",)}  # sets; run.json names its own, if not the real one


def load_model(name, checkpoint=None, device="cpu", weights="weights"):
    """name: `toy`, `mmaudio:<variant>` or `frieren`; checkpoint: the velocity network's weights, None for the
    upstream file under `weights`. Returns a FlowModel in eval mode."""
    family, _, variant = name.partition(":")
    if family not in ADAPTERS:
        stop(f"--model {name}: unknown; choose toy, mmaudio:small_16k ... mmaudio:large_44k, or frieren")
    model = importlib.import_module(ADAPTERS[family]).ADAPTER(variant, checkpoint, Path(weights))
    model.name, model.checkpoint_digest = name, digest(model.checkpoint)
    return model.to(device).eval()


def load_base_model(run, device="cpu", weights="weights"):
    """The model that stage 01 sampled from, its weights checked against run.json."""
    run_json = read_run(run)
    if "checkpoint_digest" not in run_json:
        stop(f"{run}/run.json: stage 01 has not completed it; run 01_generate.py --run-dir {run} first")
    checkpoint = run_json["checkpoint"]
    model = load_model(run_json["model"], None if checkpoint == "upstream" else Path(run) / checkpoint, device, weights)
    if model.checkpoint_digest != run_json["checkpoint_digest"]:
        stop(f"{model.checkpoint}: not the file that stage 01 sampled from (its digest differs); put that one back")
    return model


class ScorerSet(NamedTuple):
    classes: dict  # name: Scorer
    measures: dict  # what stage 07 makes of them; metric: (mean, fd, kl or is; scorer; key)
    at_a_time: int  # how many networks work side by side
    root: Path  # the folder of their files


def scorers_of(run, weights):
    """The set of frozen scorers that judges this run."""
    about = read_run(run)
    modules = [importlib.import_module(name) for name in SCORERS[about.get("scorers", "real")]]
    root = Path(run) / about["scorers_root"] if "scorers_root" in about else Path(weights)
    classes, measures = ({}, {})
    for module in modules:
        classes, measures = classes | module.SCORERS, measures | module.MEASURES
    return ScorerSet(classes, measures, min(module.AT_A_TIME for module in modules), root)


def load_scorer(name, run, device="cpu", weights="weights"):
    scorers = scorers_of(run, weights)
    return scorers.classes[name](scorers.root, device)


def weight_file(weights, name):
    """weights / name, or one line that says what is missing and where it comes from: its row of docs/weights.md."""
    path = Path(weights) / name
    if not path.exists():
        table = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
        row = next((line for line in table.splitlines() if line.startswith(f"| `{name}` |")), f"| {name} | | | |")
        _, source, size, use, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        stop(f"{path}: missing ({use}); get {name} ({size}) from {source} and put it into {weights}/")
    return path


@contextmanager
def upstream(repository, folder=""):
    """While upstream code is imported, puts the clone $UPSTREAM_DIR/<repository>/<folder> first on sys.path; without
    that variable the installed package is used."""
    root = os.environ.get("UPSTREAM_DIR")
    path = str(Path(root) / repository / folder) if root else None
    if path:
        sys.path.insert(0, path)
    try:
        yield
    except ModuleNotFoundError as error:
        advice = "install it as docs/ says, or set UPSTREAM_DIR to the folder that holds its clone"
        stop(f"{repository}: cannot import {error.name}; {advice}")
    finally:
        if path:
            sys.path.remove(path)
