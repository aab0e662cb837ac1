"""What several stages of the V2A-DPO reproduction share.

Read in this order: notation, Flow-DPO loss (Eq. 5), AudioScore (Sec. 2.1), sampler, the interface of a
backbone. A reader of the paper can stop there. Then: files and failure, torch.distributed, video and audio,
the interface of a scorer; last the boxed adapters (toy, MMAudio, Frieren) and the boxed scorers, which share
nothing with one another.

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
import importlib.util
import json
import math
import os
import random
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
import torchaudio
from tqdm import tqdm

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


def audio_seed(seed, clip_id, k):
    """The seed of the k-th audio of a clip: a function of these three alone, never of rank, shard or batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}/{k}".encode()).digest()[:7], "big")


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


def load_model(name, checkpoint=None, device="cpu", weights="weights"):
    """name: `toy`, `mmaudio:<variant>` or `frieren`; checkpoint: the velocity network's weights, None for the
    upstream file under `weights`. Returns a FlowModel in eval mode."""
    family, _, variant = name.partition(":")
    if family not in ADAPTERS:
        stop(f"--model {name}: unknown; choose toy, mmaudio:small_16k ... mmaudio:large_44k, or frieren")
    model = ADAPTERS[family](variant, checkpoint, Path(weights))
    model.name, model.checkpoint_digest = name, digest(model.checkpoint)
    return model.to(device).eval()


def load_base_model(run, device="cpu", weights="weights"):
    """The model that stage 01 sampled from, its weights checked against run.json."""
    run_json = read_run(run)
    if "checkpoint_digest" not in run_json:
        stop(f"{run}/run.json: stage 01 has not completed it; run 01_generate.py --run {run} first")
    checkpoint = run_json["checkpoint"]
    model = load_model(run_json["model"], None if checkpoint == "upstream" else Path(run) / checkpoint, device, weights)
    if model.checkpoint_digest != run_json["checkpoint_digest"]:
        stop(f"{model.checkpoint}: not the file that stage 01 sampled from (its digest differs); put that one back")
    return model


# ------------------------------------------------------------------------------------------------------------
# Files and failure
# ------------------------------------------------------------------------------------------------------------


SAYING, SAID_BY_THREADS = threading.Lock(), set()


def stop(message):
    """A user error: one line that says what is wrong and what to do, exit code 2. Threads that meet the same one say it
    once."""
    if threading.current_thread() is not threading.main_thread():
        with SAYING:
            if message in SAID_BY_THREADS:
                raise SystemExit(2)
            SAID_BY_THREADS.add(message)
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also beside a progress bar
    raise SystemExit(2)


def launch(main, parse_args):
    """A stage's entry: Ctrl-C ends in one line; what is written so far is kept."""
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


class SkipClip(Exception):
    """A video that cannot be used; the text is the reason that stage 01 counts and lists."""


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


def to_simulate(run, answers, asked, fields, redo):
    """Whether the toy world's people answer: nobody has, or, with --redo, only they have, and to other questions.
    answers: their .jsonl; asked: a set of tuples of these fields."""
    if not (Path(run) / "00_oracle.pt").exists():
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


def digest(path):
    """SHA-256 of a file, or of a folder's .jsonl files in order of their names; the first 16 hex digits."""
    path, total = Path(path), hashlib.sha256()
    if not path.exists():
        stop(f"{path}: no such file; rerun the stage that writes it")
    for file in sorted(path.glob("[!.]*.jsonl")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()[:16]


def inside(root, name, where):
    """root / name, refused when it leaves root (.., absolute paths, links that point outside)."""
    root = Path(root).resolve()
    path = (root / str(name)).resolve()
    if not path.is_relative_to(root):
        stop(f"{where}: '{name}' points outside {root}; use a path below it")
    return path


def claim(record, settings, inputs=(), redo=False, advice="use --redo to replace it", outputs=()):
    """One record of settings per output: `record` is its json file, `inputs` the files it is made from.

    The first call writes it; a later one with other settings, or with inputs that changed meanwhile, prints the
    difference and stops, so that nothing is ever half made with other settings. `redo` replaces the record, and first
    removes the `outputs` of the old one: interrupted, it leaves none that the new record would vouch for.
    """
    record = Path(record)
    new = {"settings": settings, "inputs": {str(Path(p).relative_to(run_of(record))): digest(p) for p in inputs}}
    new = json.loads(json.dumps(new))
    if record.exists() and not redo:
        old = read_json(record)
        for part in ("settings", "inputs"):
            before, now = old.get(part, {}), new[part]
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    changed = f"made with {key}={before.get(key)}, now {now.get(key)}"
                    changed = changed if part == "settings" else f"{key} has changed since it was read"
                    stop(f"{record}: {changed}; {advice}")
    for output in outputs if redo else ():
        Path(output).unlink(missing_ok=True)
    write_text(record, json.dumps(new, indent=1) + "\n")


def run_of(record):
    """The run folder of a record: `<run>/NN_settings.json` or `<run>/<folder>/settings.json`."""
    return record.parent if record.name != "settings.json" else record.parent.parent


STAGES = {"02": "02_fit_audioscore.py", "03": "03_mine_pairs.py", "04": "04_curriculum_split.py"}


def check_record(record, rerun):
    """Stops when what an output was made from is missing or has changed since; rerun: the command that mends it."""
    run = run_of(Path(record))
    for name, was in read_json(record)["inputs"].items():
        if not (run / name).exists():
            stop(f"{run / name}: missing, but {record} was made from it; run the stage that writes it again")
        if digest(run / name) != was:
            stop(f"{run / name}: changed after it was read for {record}; rerun {rerun}")


def check_chain(run, *stages):
    """Stops when a stage has not run, or its outputs were made from files that have changed since."""
    for stage in stages:
        record = Path(run) / f"{stage}_settings.json"
        if not record.exists():
            stop(f"{record}: no such file; run {STAGES[stage]} --run {run} first")
        check_record(record, f"{STAGES[stage]} --run {run} --redo")


def read_run(run):
    """run.json of a run folder; stops when the folder is missing."""
    run = Path(run)
    if not run.is_dir():
        stop(f"--run {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
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


def clips_digest(clips):
    """Digest of a list of clips without the toy world's `oracle`, which no stage from 01 to 06 reads."""
    lines = [{k: v for k, v in clip.items() if k != "oracle"} for clip in clips]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def read_samples(run):
    """Every audio of stage 01: {clip id: [line, ...]} in order of k; each line gains `shard` (a path stem)."""
    samples, fields = {}, ("clip", "k", "seed", "wav", "row", "finite")
    for file in sorted((Path(run) / "01_samples").glob("[0-9]*.jsonl")):
        if not file.name.endswith(".skipped.jsonl"):
            for row in read_jsonl(file, fields, "; remove the shard and rerun 01_generate.py"):
                samples.setdefault(row["clip"], []).append(dict(row, shard=file.stem))
    if not samples:
        stop(f"{Path(run) / '01_samples'}: no generated audio; run 01_generate.py --run {run} first")
    return samples


def argument_parser(doc):
    """A stage's parser: the first line of its docstring, and defaults shown in --help."""
    return argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=HelpFormatter, allow_abbrev=False)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Shards:
    """Stage 01's latents and features, memory-mapped: memory does not grow with the data set."""

    def __init__(self, run, samples, num_samples):
        self.folder, self.num_samples, self.open = Path(run) / "01_samples", num_samples, {}
        self.place = {(clip, row["k"]): (row["shard"], row["row"]) for clip, rows in samples.items() for row in rows}

    def shard(self, name):
        if name not in self.open:
            self.open[name] = load_pt(self.folder / f"{name}.pt", mmap=True)
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


def at_least(args, **least):
    """Stops when one of these numbers is too small: at_least(args, steps=1)."""
    for name, bound in least.items():
        if getattr(args, name) < bound:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {bound}")


def parse(parser, argv, stage):
    """parser.parse_args; on a toy run, TOY[size][stage] replaces the paper's defaults (an explicit flag wins)."""
    args = parser.parse_args(argv)
    file = Path(args.run) / "run.json"
    run = read_json(file) if file.is_file() else {}
    if "size" not in run and getattr(args, "model", None) == "toy" and args.checkpoint:  # the toy model, other clips
        beside = Path(args.checkpoint).parent / "run.json"
        run = read_json(beside) if beside.is_file() else {}
    size = run.get("size")
    toy = TOY.get(size, {}).get(stage, {})
    paper = {key: parser.get_default(key) for key in toy}
    parser.set_defaults(**toy)
    args = parser.parse_args(argv)
    changed = [f"{key} {paper[key]} -> {toy[key]}" for key in toy if getattr(args, key) == toy[key] != paper[key]]
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print(f"toy world ({size}): {', '.join(changed)}")
    return args


# The toy world's replacements for the paper's numbers, chosen on its val split: {size: {stage: {argument: value}}}.
TOY = {
    "default": {
        "01": dict(guidance=1.5, sampling_steps=12, batch_clips=8),
        "02": dict(num_rated_clips=150),
        "03": dict(num_human_pairs=150),
        "04": dict(threshold=0.35),
        "05": dict(lr=7e-5, warmup=20, steps=250, global_batch=32, beta=60.0),
        "06": dict(lr=3e-4, steps=250, prompts=4, group_size=16, sampling_steps=10, updates=8, eta=1.0),
        "07": dict(guidance=1.5),
    },
    "tiny": {
        "01": dict(guidance=1.5, sampling_steps=8),
        "02": dict(num_rated_clips=8),
        "03": dict(num_human_pairs=12),
        "04": dict(threshold=0.1),
        "05": dict(lr=1e-4, warmup=2, steps=8, global_batch=4, beta=20.0),
        "06": dict(lr=3e-4, steps=4, prompts=2, group_size=3, sampling_steps=4, updates=2),
        "07": dict(guidance=1.5),
    },
}

# ------------------------------------------------------------------------------------------------------------
# torch.distributed
# ------------------------------------------------------------------------------------------------------------


def setup_ranks():
    """(rank, world, device) under torchrun or alone; nccl on CUDA, gloo elsewhere. Other ranks speak of errors only."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the process ends
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        patience = timedelta(hours=12)  # ranks wait for the slowest clip, scorer or encoder
        dist.init_process_group("nccl" if device != "cpu" else "gloo", timeout=patience)
    return rank, world, device


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
    """checkpoint.pt: everything that the next step depends on besides the settings."""
    save_pt(Path(folder) / "checkpoint.pt", dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict()))


def resume_training(folder, model, optimizer, rank=0):
    """Loads checkpoint.pt if there is one, cuts log.jsonl back to it, and returns the number of steps done."""
    file, log, step = Path(folder) / "checkpoint.pt", Path(folder) / "log.jsonl", 0
    if file.exists():
        state = load_pt(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if rank == 0:
        write_jsonl(log, [row for row in read_jsonl(log) if row["step"] < step] if log.exists() else [])
    barrier()
    return step


def output_folder(run, name):
    """run / name for --out: a folder name inside the run, nothing else."""
    if not name or Path(name).name != name or name in (".", "..") or name[:2] in ("00", "01", "02", "03", "04", "07"):
        stop(f"--out {name}: give a plain folder name, not one of stages 00 to 04 or 07")
    if (Path(run) / name).exists() and not (Path(run) / name).is_dir():
        stop(f"--out {name}: is a file of this run; give a plain folder name")
    return Path(run) / name


def save_policy(folder, model, run_json, **about):
    """policy.pt in the upstream's own format, and policy.json, from which stage 07 knows whose it is."""
    model.save_policy(Path(folder) / "policy.pt")
    about = dict(model=run_json["model"], base_digest=run_json["checkpoint_digest"], **about)
    write_text(Path(folder) / "policy.json", json.dumps(about, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Video and audio
# ------------------------------------------------------------------------------------------------------------


def open_media(path):
    """A video or audio file through PyAV; a title in another encoding than UTF-8 is no reason to refuse it."""
    return av.open(str(path), metadata_errors="ignore")


def read_frames(path, wanted, duration_s):
    """Decodes a video once for several consumers. wanted: [(fps, transform), ...]; transform takes one frame
    (H, W, 3) uint8 tensor and returns a tensor. Output i of a consumer is the first frame shown at or after i / fps,
    duration_s * fps of them (MMAudio's rule, but the last frame is held for its own length). Returns a list of stacked
    tensors. Raises SkipClip for a missing, unreadable, video-less or short file.
    """
    counts = [round(duration_s * fps) for fps, _ in wanted]
    taken, reformat, t, length = [[] for _ in wanted], av.video.reformatter.VideoReformatter(), None, 0.0
    try:
        with open_media(path) as container:
            if not container.streams.video:
                raise SkipClip("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length = 1.0 / float(stream.average_rate or 25)
            start = None
            for frame in container.decode(stream):
                if frame.time is None:
                    raise SkipClip("frames without time stamps")
                start = frame.time if start is None else start
                t, picture = frame.time - start, None
                for (fps, transform), count, out in zip(wanted, counts, taken):
                    while len(out) < count and t >= len(out) / fps - 1e-4:
                        if picture is None:
                            picture = torch.from_numpy(reformat.reformat(frame, format="rgb24").to_ndarray())
                        out.append(transform(picture))
                if all(len(out) == count for out, count in zip(taken, counts)):
                    break
    except FileNotFoundError:
        raise SkipClip("no such file") from None
    except (av.error.FFmpegError, OSError) as error:
        raise SkipClip(f"unreadable video ({getattr(error, 'strerror', None) or type(error).__name__})") from None
    for (fps, _), count, out in zip(wanted, counts, taken):
        while out and len(out) < count and len(out) / fps < t + length + 0.5 / fps:
            out.append(out[-1])
        if len(out) < count:
            raise SkipClip(f"too short: {0.0 if t is None else t + length:.2f} s of video, {duration_s:.2f} s needed")
    return [torch.stack(out) for out in taken]


def read_audio(path, sample_rate_hz, duration_s=None):
    """The first audio stream of any container as mono (S,) float32 at sample_rate_hz; with duration_s, cut or
    zero-padded to it. Raises SkipClip when there is none or it cannot be read."""
    try:
        if Path(path).suffix in (".wav", ".flac"):  # ten times faster than through ffmpeg
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            wave = torch.from_numpy(samples).mean(dim=1)
        else:
            wave, rate = decode_audio(path)
    except FileNotFoundError:
        raise SkipClip("no such file") from None
    except (av.error.FFmpegError, soundfile.SoundFileError, OSError) as error:
        raise SkipClip(f"unreadable audio ({getattr(error, 'strerror', None) or type(error).__name__})") from None
    if not len(wave):
        raise SkipClip("empty audio stream")
    if rate != sample_rate_hz:
        wave = torchaudio.functional.resample(wave, rate, sample_rate_hz)
    return wave if duration_s is None else fit_length(wave, round(duration_s * sample_rate_hz))


def decode_audio(path):
    """(S,) float32 mono and its rate, through PyAV."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise SkipClip("no audio stream")
        stream = container.streams.audio[0]
        planar = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        frames = [out.to_ndarray() for frame in container.decode(stream) for out in planar.resample(frame)]
        frames += [out.to_ndarray() for out in planar.resample(None)]
        if not frames:
            raise SkipClip("empty audio stream")
        return torch.from_numpy(np.concatenate(frames, axis=1).mean(axis=0)), stream.rate


def fit_length(wave, samples):
    """Cut or zero-padded along the last dimension."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def write_audio(path, wave, sample_rate_hz):
    """wave: (S,) float32, clipped to [-1, 1] (what is not finite becomes 0) -> 16-bit wav."""
    with replacing(path) as temporary:
        finite = torch.nan_to_num(wave.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
        soundfile.write(temporary, finite.numpy(), sample_rate_hz, subtype="PCM_16")


# ------------------------------------------------------------------------------------------------------------
# The interface of a scorer, and how the stages score
# ------------------------------------------------------------------------------------------------------------


class Scorer:
    """One frozen scorer. The toy world and the real networks offer the same names: imagebind, clap, synchformer,
    panns, pesq (AudioScore's five) and, for evaluation only, panns_16k and passt."""

    sample_rate_hz: int
    files: tuple = ()  # below --weights
    video_score: str  # the key that is nan for a clip whose video cannot be read, where there is a video tower

    def __init__(self):
        self.memo = {}  # clip id -> embedding of its video or caption, or why there is none

    def clip_side(self, clip):
        """What depends on the clip alone (video tower, text tower, PESQ's reference); None where the score does not
        apply. May raise SkipClip."""
        return None

    def audio_side(self, waves, clips, sides):
        """waves: (B, S) float32 at sample_rate_hz; clips: B lines of clips.jsonl; sides: B results of clip_side.
        Returns a dict of (B, ...) float32 tensors, nan where the score does not apply."""
        raise NotImplementedError

    def __call__(self, waves, clips):
        for clip in clips:
            if clip["id"] not in self.memo:
                try:
                    self.memo[clip["id"]] = self.clip_side(clip)
                except SkipClip as reason:
                    self.memo[clip["id"]] = reason
                    tqdm.write(f"{clip['id']}: {reason}; {type(self).__name__} cannot judge it", file=sys.stderr)
        sides = [self.memo[clip["id"]] for clip in clips]
        rows = [i for i, side in enumerate(sides) if not isinstance(side, SkipClip)]
        if not rows:
            return {self.video_score: torch.full((len(waves),), math.nan)}
        with torch.inference_mode():
            scored = self.audio_side(waves[rows], [clips[i] for i in rows], [sides[i] for i in rows])
        everything = {key: torch.full((len(waves), *value.shape[1:]), math.nan) for key, value in scored.items()}
        for key, value in scored.items():
            everything[key][rows] = value.float().cpu()
        return everything


AUDIOSCORE_SCORERS = ("imagebind", "clap", "synchformer", "panns", "pesq")


def score_files(scorer, audios, clip_s, batch=20):
    """audios: [(clip, wav path, key), ...]; each audio is judged on its first clip_s seconds. Returns a dict of
    (n, ...) float32 tensors in the same order. The next batches are read while one is scored."""
    parts = [audios[i : i + batch] for i in range(0, len(audios), batch)]

    def read(part):
        try:
            return torch.stack([read_audio(path, scorer.sample_rate_hz, clip_s) for _, path, _ in part])
        except SkipClip as reason:
            stop(f"audio of {part[0][0]['id']} or one of the {len(part) - 1} after it ({part[0][1]} ...): {reason}")

    scored = []
    with ThreadPoolExecutor(2) as readers:
        for part, waves in zip(parts, readers.map(read, parts)):
            scored.append(scorer(waves, [clip for clip, _, _ in part]))
    return {key: torch.cat([one[key] for one in scored]) for key in scored[0]}


def score_groups(run, cache, groups, names, weights, ranks=(0, 1, "cpu")):
    """Scores every audio once and keeps the results under its key: cache/<group>.<scorer>.pt.

    groups: {group: [(clip, wav path, key), ...]}; an audio's key changes when the audio does. Scorers are the outer
    loop, so that one network is in memory at a time; within a group each video tower runs once per clip. What is
    cached is not scored again, and groups are divided over the ranks.
    """
    rank, world, device = ranks
    toy, waiting = "scorers" in read_run(run), {name: [] for name in names}
    for name in names:
        for group in list(groups)[rank::world]:
            file = Path(cache) / f"{group}.{name}.pt"
            known = set(load_pt(file, mmap=True)["keys"]) if file.exists() else set()
            if new := [audio for audio in groups[group] if audio[2] not in known]:
                waiting[name].append((file, new))
        if waiting[name] and not toy:
            for file in SCORERS[name].files:  # a missing file is said now, not after hours of the other scorers
                weight_file(weights, file)

    def score_with(name):
        scorer = None
        for file, new in tqdm(waiting[name], desc=name, unit="group", disable=toy or rank > 0 or not waiting[name]):
            scorer = scorer or load_scorer(name, run, device, weights)
            fresh = score_files(scorer, new, read_run(run)["clip_s"])
            fresh["keys"] = [key for _, _, key in new]
            if file.exists():
                old = load_pt(file)
                fresh = {k: old[k] + v if k == "keys" else torch.cat([old[k], v]) for k, v in fresh.items()}
            save_pt(file, fresh)
            scorer.memo.clear()
        del scorer
        if device != "cpu":
            torch.cuda.empty_cache()

    if toy:  # two of its tiny scorers at a time
        with ThreadPoolExecutor(2) as pool:
            list(tqdm(pool.map(score_with, names), desc="score", total=len(names), unit="scorer", disable=rank > 0))
    else:
        for name in names:
            score_with(name)
    barrier()


def cached_scores(cache, group, audios, names):
    """What score_groups kept for these audios, in their order: {scorer: {key: (n, ...) float32}}."""
    found = {}
    for name in names:
        stored = load_pt(Path(cache) / f"{group}.{name}.pt")
        row = {key: i for i, key in enumerate(stored.pop("keys"))}
        order = torch.tensor([row[key] for _, _, key in audios])
        found[name] = {key: value[order] for key, value in stored.items()}
    return found


def merge_scores(cache, groups, names):
    """cached_scores of several groups, one after the other."""
    parts = [cached_scores(cache, group, audios, names) for group, audios in groups.items()]
    return {n: {key: torch.cat([part[n][key] for part in parts]) for key in parts[0][n]} for n in names}


def adopt_scores(source, cache, groups, names, ranks=(0, 1, "cpu")):
    """Copies what another stage's cache knows of these audios into groups that have no cache file yet; every rank for
    the groups that score_groups gives it."""
    rank, world, _ = ranks
    for name in names:
        stored = [load_pt(file) for file in sorted(Path(source).glob(f"*.{name}.pt"))]
        where = {key: (i, j) for i, part in enumerate(stored) for j, key in enumerate(part["keys"])}
        for group in list(groups)[rank::world]:
            keys = [key for _, _, key in groups[group] if key in where]
            file = Path(cache) / f"{group}.{name}.pt"
            if keys and not file.exists():
                values = [k for k in stored[0] if k != "keys"]
                rows = {v: torch.stack([stored[where[key][0]][v][where[key][1]] for key in keys]) for v in values}
                save_pt(file, {**rows, "keys": keys})


def sample_key(run_json, clip, k):
    """The cache key of stage 01's k-th audio of a clip; it changes when the audio is made otherwise."""
    made = json.dumps([run_json[key] for key in ("checkpoint_digest", "sampler", "seed")])
    return f"{clip}/{k}/{hashlib.sha256(made.encode()).hexdigest()[:8]}"


def score_line(clip, k, scores, **more):
    """A line of 02_scores.jsonl or 03_scores/*.jsonl; scores: (5,) with nan where one does not apply."""
    numbers = {name: None if math.isnan(value) else round(value, 6) for name, value in zip(SCORES, scores.tolist())}
    return {"clip": clip, "k": k, **numbers, **more}


def five_scores(found, audioscore):
    """The vector of Sec. 2.1 for each audio, (n, 5) float32 in the order of SCORES, nan where one does not apply."""
    columns = [found["imagebind"]["ib"], found["clap"]["clap"], found["synchformer"]["desync_s"]]
    return torch.stack([*columns, audioscore.inception(found["panns"]["logits"]), found["pesq"]["pesq"]], dim=1)


def score_c(p_w, p_l):
    """Eq. 3; p_w, p_l: (Good, Medium, Bad) of winner and loser -> float in [-1, 1], high = an easy pair."""
    return 0.5 * ((p_w[0] - p_l[0]) + (p_l[2] - p_w[2]))


def load_scorer(name, run, device="cpu", weights="weights"):
    """name: one of the names above; run: the run folder, whose run.json says whether the toy world's scorers or the
    real ones judge it."""
    toy = read_run(run).get("scorers")
    if toy:
        return toy_world().load_scorer(name, Path(run) / toy)
    return SCORERS[name](Path(weights), device)


def toy_world():
    """The embedded default, loaded late like any other upstream package."""
    torch.set_num_threads(1)  # its networks are so small that a second thread triples the CPU time
    return importlib.import_module("00_toy_world")


# Every downloaded file, kept under its upstream name in --weights DIR: {file: (source, size, use)}.
WEIGHTS = {}


def weight_file(weights, name):
    """weights / name, or one line that says what is missing and where it comes from (the README's table row)."""
    path = Path(weights) / name
    if not path.exists():
        source, size, use = WEIGHTS[name]
        stop(f"{path}: missing ({use}); download {name} ({size}) from {source} and put it into {weights}/")
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
        advice = "install it as the README says, or set UPSTREAM_DIR to the folder that holds its clone"
        stop(f"{repository}: cannot import {error.name}; {advice}")
    finally:
        if path:
            sys.path.remove(path)


# ============================================================================================================
# Box: the toy world as a backbone
# ============================================================================================================


class Toy(FlowModel):
    """The network, codec and encoders of 00_toy_world.py. Its time is the paper's already."""

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        if variant:
            stop(f"--model toy:{variant}: the toy model has no variants; give --model toy")
        if checkpoint is None:
            stop("--model toy: needs its weights; run 00_toy_world.py and give --checkpoint runs/toy/00_base.pt")
        self.checkpoint = Path(checkpoint)
        base = toy_world().load_base(checkpoint)
        self.upstream = [base]  # in a list: no submodule
        self.net = base.net
        self.latent_shape, self.sample_rate_hz, self.clip_s = base.latent_shape, base.sample_rate_hz, base.clip_s
        self.net.null_tokens.requires_grad_(False)
        self.net.null_vector.requires_grad_(False)

    def encode(self, clip):
        base = self.upstream[0]
        frames = read_frames(clip["path"], [(base.fps, base.frame_transform)], base.clip_s)[0]
        return {**base.encode_video(frames), "text": base.encode_text(clip["caption"])}

    def project(self, features):
        return self.net.condition(*(features[key].to(self.device).float() for key in ("frames", "pooled", "text")))

    def null_conditions(self, conditions):
        return self.net.null(conditions)

    def predict(self, a_t, t, conditions):
        return self.net(a_t, t, conditions)

    def decode(self, latents):
        return self.upstream[0].decode(latents)

    def blocks(self):
        return self.net.blocks

    def policy_state(self):
        return {key: value.detach().cpu().clone() for key, value in self.net.state_dict().items()}

    def load_policy(self, path):
        """path: policy.pt, a bare state dict of ToyNet."""
        try:
            self.net.load_state_dict(load_pt(path))
        except (AttributeError, RuntimeError, TypeError):
            stop(f"{path}: is not a policy of the toy model; give the policy.pt of a run whose --model is toy")


# ============================================================================================================
# Box: MMAudio as a backbone
# ============================================================================================================

MMAUDIO_VARIANTS = ("small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2")  # the paper's is large_44k
MMAUDIO_CONDITIONS = ("clip_f", "sync_f", "text_f", "clip_f_c", "text_f_c")  # upstream's PreprocessedConditions
MMAUDIO_CLIP = "apple/DFN5B-CLIP-ViT-H-14-384"  # read from the Hugging Face cache, where upstream looks for it
MMAUDIO_CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin")
MMAUDIO_VOCODER = "nvidia/bigvgan_v2_44khz_128band_512x"  # a folder below --weights
MMAUDIO_NETS = "https://huggingface.co/hkchengrex/MMAudio/tree/main/weights"
MMAUDIO_PARTS = "https://github.com/hkchengrex/MMAudio/releases/tag/v0.1"
WEIGHTS |= {
    "mmaudio_small_16k.pth": (MMAUDIO_NETS, "601 MiB", "velocity network of mmaudio:small_16k"),
    "mmaudio_small_44k.pth": (MMAUDIO_NETS, "601 MiB", "velocity network of mmaudio:small_44k"),
    "mmaudio_medium_44k.pth": (MMAUDIO_NETS, "2.4 GiB", "velocity network of mmaudio:medium_44k"),
    "mmaudio_large_44k.pth": (MMAUDIO_NETS, "3.9 GiB", "velocity network of mmaudio:large_44k"),
    "mmaudio_large_44k_v2.pth": (MMAUDIO_NETS, "3.9 GiB", "velocity network of mmaudio:large_44k_v2"),
    "v1-16.pth": (MMAUDIO_PARTS, "655 MiB", "VAE of mmaudio:*_16k"),
    "best_netG.pt": (MMAUDIO_PARTS, "429 MiB", "vocoder of mmaudio:*_16k"),
    "v1-44.pth": (MMAUDIO_PARTS, "1.2 GiB", "VAE of mmaudio:*_44k"),
    f"{MMAUDIO_VOCODER}/config.json": (f"https://huggingface.co/{MMAUDIO_VOCODER}", "1 KB", "vocoder of mmaudio:*_44k"),
    f"{MMAUDIO_VOCODER}/bigvgan_generator.pt": (f"https://huggingface.co/{MMAUDIO_VOCODER}", "466 MiB", "the same"),
}


class MMAudio(FlowModel):
    """MMAudio (Cheng et al., CVPR 2025) from upstream's own classes, whose time runs from noise (0) to data (1).

    Weights and t stay float32 and autocast goes around the calls: cast to bfloat16, large_44k_v2's time embedding
    (frequencies up to 1e4) is another function.
    """

    clip_s = 8.0

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        if variant not in MMAUDIO_VARIANTS:
            stop(f"--model mmaudio:{variant}: unknown variant; choose one of {', '.join(MMAUDIO_VARIANTS)}")
        with upstream("MMAudio"):
            from mmaudio.model import networks
        self.variant, self.weights, self.mode = variant, Path(weights).absolute(), variant.split("_")[1]
        self.sample_rate_hz = {"16k": 16000, "44k": 44100}[self.mode]
        self.checkpoint = Path(checkpoint or weight_file(self.weights, f"mmaudio_{variant}.pth"))
        self.net, self.conditions_class = networks.get_my_mmaudio(variant), networks.PreprocessedConditions
        self.latent_shape = (self.net.latent_seq_len, self.net.latent_dim)
        for parameter in (self.net.empty_clip_feat, self.net.empty_sync_feat):
            parameter.requires_grad_(False)  # null conditions; upstream itself freezes the third, empty_string_feat
        self.load_policy(self.checkpoint)
        # Loaded on first use. A cached function is no submodule, and copies of the model share it.
        self.encoders, self.codec = functools.cache(self.load_encoders), functools.cache(self.load_codec)
        self.text_features = functools.lru_cache(maxsize=512)(self.encode_text)

    def project(self, features):
        clip, sync, text = (features[key].to(self.device) for key in ("clip", "sync", "text"))
        conditions = self.net.preprocess_conditions(clip, sync, text)
        return {key: getattr(conditions, key) for key in MMAUDIO_CONDITIONS}

    def null_conditions(self, conditions):
        # Learned null video and empty_string_feat, as in upstream's evaluation (batch_eval.py gives no negative text);
        # its demo.py encodes the negative text '' with CLIP instead.
        null = self.net.get_empty_conditions(len(conditions["clip_f"]))
        return {key: getattr(null, key) for key in MMAUDIO_CONDITIONS}

    def predict(self, a_t, t, conditions):
        # Upstream's time is 1 - t, its velocity x1 - x0 = a_0 - eps.
        return -self.net.predict_flow(a_t, 1 - t.float(), self.conditions_class(**conditions))

    def blocks(self):
        return [*self.net.joint_blocks, *self.net.fused_blocks]

    def policy_state(self):
        return {key: value.detach().cpu() for key, value in self.net.state_dict().items()}

    def load_policy(self, path):
        """Replaces the velocity network's weights by a bare state dict (upstream's file or ours), strictly."""
        try:
            self.net.load_weights(load_pt(path, mmap=True))
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).replace("Error(s) in loading state_dict for MMAudio:", "").split())[:120]
            stop(f"{path}: not the weights of mmaudio:{self.variant} ({reason}); give a file of this variant")

    # Frozen parts: CLIP and Synchformer; VAE and vocoder ----------------------------------------------------

    def encode(self, clip):
        """clip (64, 1024): CLIP at 8 fps; sync (192, 768): Synchformer at 25 fps; text (77, 1024): CLIP's text."""
        from torchvision.transforms import InterpolationMode, v2

        scale, centre = v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)
        squash = v2.Compose([v2.Resize((384, 384), InterpolationMode.BICUBIC), scale])
        crop = v2.Compose([v2.Resize(224, InterpolationMode.BICUBIC), v2.CenterCrop(224), scale, centre])
        wanted = [(8, lambda frame: squash(frame.permute(2, 0, 1))), (25, lambda frame: crop(frame.permute(2, 0, 1)))]
        encoders = self.encoders()
        squashed, cropped = (frames[None].to(self.device) for frames in read_frames(clip["path"], wanted, self.clip_s))
        features = {
            "clip": encoders.encode_video_with_clip(squashed)[0],
            "sync": encoders.encode_video_with_sync(cropped, batch_size=8)[0],  # 8 of 24 segments at a time
            # Without caption: the network's empty_string_feat, which upstream's training puts for missing text.
            "text": self.text_features(clip["caption"]) if clip.get("caption") else self.net.empty_string_feat.data,
        }
        return {key: value.float().cpu().clone() for key, value in features.items()}  # a clone is no inference tensor

    def encode_text(self, caption):
        return self.encoders().encode_text([caption])[0].cpu()

    @torch.no_grad()
    def decode(self, latents):
        codec, waves = self.codec(), []
        for part in latents.split(8):
            part = self.net.unnormalize(part.to(self.device, torch.float32, copy=True))  # in place, on our copy
            waves.append(codec.vocode(codec.decode(part)).float().cpu().clone())
        return torch.cat(waves)[:, 0, : round(self.clip_s * self.sample_rate_hz)]  # 44.1 kHz: 480 samples over 8 s

    def load_encoders(self):
        from huggingface_hub import constants, try_to_load_from_cache, utils

        synchformer = weight_file(self.weights, "synchformer_state_dict.pth")
        for name in MMAUDIO_CLIP_FILES:
            if not isinstance(try_to_load_from_cache(MMAUDIO_CLIP, name), str):
                fetch = f"hf download {MMAUDIO_CLIP} {' '.join(MMAUDIO_CLIP_FILES)}"
                stop(f"{constants.HF_HUB_CACHE}: {name} of MMAudio's CLIP (3.7 GiB) is missing; run: {fetch}")
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # the files are here: ask the hub for nothing
        utils.reset_sessions()
        try:
            return self.features_utils(enable_conditions=True, synchformer_ckpt=synchformer.absolute())
        finally:
            constants.HF_HUB_OFFLINE = before
            utils.reset_sessions()

    def load_codec(self):
        names = [f"v1-{self.mode[:2]}.pth", "best_netG.pt"]
        if self.mode == "44k":
            names[1:] = [f"{MMAUDIO_VOCODER}/bigvgan_generator.pt", f"{MMAUDIO_VOCODER}/config.json"]
        vae, vocoder = [weight_file(self.weights, name).absolute() for name in names][:2]
        parts = dict(tod_vae_ckpt=vae, bigvgan_vocoder_ckpt=vocoder, need_vae_encoder=False)
        return self.features_utils(enable_conditions=False, **parts)

    def features_utils(self, **parts):
        """Upstream's FeaturesUtils with these parts; it looks for its 44.1 kHz vocoder below the working folder."""
        from contextlib import chdir

        with upstream("MMAudio"):
            from mmaudio.model.utils.features_utils import FeaturesUtils
        try:
            with chdir(self.weights):
                utils = FeaturesUtils(mode=self.mode, **parts)
        except Exception as error:  # upstream's loaders raise a dozen types for a truncated or foreign file
            files = ", ".join(str(value) for value in parts.values() if isinstance(value, Path))
            reason = " ".join(str(error).split())[:160]
            stop(f"{files}: MMAudio cannot load it ({type(error).__name__}: {reason}); download it again")
        return utils.to(self.device).eval().requires_grad_(False)


# ============================================================================================================
# Box: Frieren as a backbone
# ============================================================================================================

WEIGHTS |= {
    "v2a/noreflow/last.ckpt": ("the README of github.com/cyanbx/Frieren-V2A", "1.5 GB or more", "Frieren (no reflow)"),
    "bigvnat/best_netG.pt": ("the README of github.com/cyanbx/Frieren-V2A", "about 0.5 GB", "Frieren's vocoder"),
    "bigvnat/args.yml": ("the README of github.com/cyanbx/Frieren-V2A", "1 kB", "the shape of Frieren's vocoder"),
}


@functools.cache
def frieren_code():
    """Upstream's four classes. Lightning and OmegaConf, which they import and do not need, are stood in for. Generic
    names leave sys.modules: what was imported lives on below `frieren_v2a`, where torch.compile finds it."""
    generic = {"cfm", "vocoder", "pytorch_lightning", "omegaconf"}
    others = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in generic}
    sys.modules["pytorch_lightning"] = types.SimpleNamespace(LightningModule=nn.Module)
    sys.modules["omegaconf"] = types.SimpleNamespace(OmegaConf=None)
    try:
        with upstream("Frieren-V2A", "Frieren"):
            from cfm.models.autoencoder1d import AutoencoderKL
            from cfm.modules.cond_stage.video_feat_encoder import Video_Feat_Encoder_NoPosembed
            from cfm.modules.diffusionmodules.concatDiT import ChannelConcatDiT
            from vocoder.bigvgan.models import BigVGAN
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in generic]:
            sys.modules[name].__name__ = f"frieren_v2a.{name}"
            sys.modules[f"frieren_v2a.{name}"] = sys.modules.pop(name)
        sys.modules.update(others)
    AutoencoderKL.__init__.__globals__["print"] = lambda *_: None  # it prints while it is built
    return ChannelConcatDiT, Video_Feat_Encoder_NoPosembed, AutoencoderKL, BigVGAN


def frieren_fill(part, state, path, *prefixes):
    """Strictly loads what `state` holds under the prefixes; a part on meta takes the mapped tensors themselves."""
    own = {name: value for name, value in state.items() if name.startswith(prefixes)}
    try:
        part.load_state_dict(own, assign=next(part.parameters()).is_meta)
    except RuntimeError as error:
        held = ", ".join(sorted({".".join(name.split(".")[:2]) for name in state if "." in name}))
        stop(f"{path}: not the tensors of Frieren; it holds {held[:200]}; {' '.join(str(error).split())[:200]}")


class Frieren(FlowModel):
    """Frieren without reflow, 159M, from CAVP features (https://arxiv.org/abs/2406.00320; code checked at 0c39692).

    Its time is k = 1000 (1 - t), 0 at noise, 999 at most. 32 frames, 8.000 s, drive 8.192 s of audio. Trained: DiT and
    condition embedder, whole. Unconditional is the embedder's output for zeros, so it moves with training; Flow-DPO at
    guidance 1 never uses it, DDPO trains through it. Reflowed and distilled models learnt the guided velocity, unlike
    Eq. 5 at guidance 1: refused where their path, or the one recorded in them, tells; their tensors alone do not."""

    latent_shape, sample_rate_hz, clip_s = (256, 20), 16000, 8.0
    frames, cavp_width, latent_scale = 32, 512, 0.18215
    dit_config = dict(in_channels=20, context_dim=768, hidden_size=576, num_heads=8, depth=4, max_len=1000)
    vae_config = dict(double_z=True, in_channels=80, out_ch=80, z_channels=20, kernel_size=5, ch=384, ch_mult=[1, 2, 4])
    vae_config |= dict(num_res_blocks=2, attn_layers=[3], down_layers=[0], dropout=0.0)

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        if variant:
            stop(f"--model frieren:{variant}: Frieren has no variants; write --model frieren")
        dit, embedder, _, _ = frieren_code()
        self.model = nn.ModuleDict({"diffusion_model": dit(**self.dit_config)})  # parameters under upstream's names
        self.cond_stage_model = embedder(self.cavp_width, self.dit_config["context_dim"])
        for module in self.model.modules():
            module.checkpoint = False  # upstream's own recomputation loses gradients; `blocks` offers ours
        self.checkpoint = Path(checkpoint or weight_file(weights, "v2a/noreflow/last.ckpt"))
        base, vae = self.load_policy(self.checkpoint)
        self.base = functools.cache(lambda: base)  # so wrapped, copies of the model share these two
        self.codec = functools.lru_cache(maxsize=1)(functools.partial(self.load_codec, vae, weights))

    def load_policy(self, path):
        """Replaces the velocity network's weights by those of a file that save_policy, or upstream by Lightning 1.4,
        wrote. Returns the file's content and its VAE, both mapped: not read before they are used."""
        scalar = np.float64(0).__reduce__()[0]  # learning rates are numpy scalars, callbacks are keyed by their class
        allowed = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.int64))]
        allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        allowed += [(type("Callback", (), {}), "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
        with torch.serialization.safe_globals(allowed):
            file = load_pt(path, mmap=True)
        if not isinstance(file, dict) or not isinstance(file.get("state_dict"), dict):
            stop(f"{path}: no checkpoint of Frieren, which is a dict with a 'state_dict'")
        recorded = [callback.get("dirpath") or "" for callback in file.get("callbacks", {}).values()]
        trail = "|".join("/".join(Path(place).parts[-2:]) for place in [path, *recorded]).lower()
        trail = trail.translate(dict.fromkeys(map(ord, " _-"))).replace("noreflow", "")
        if "reflow" in trail or "distill" in trail:
            stop(f"{path}: a reflowed or distilled Frieren by its path, now or in training; use the one without reflow")
        with torch.device("meta"):
            vae = frieren_code()[2](self.latent_shape[1], self.vae_config, {"target": "torch.nn.Identity"})
        frieren_fill(nn.ModuleDict({"first_stage_model": vae}), file["state_dict"], path, "first_stage_model.")
        frieren_fill(self, file["state_dict"], path, "model.", "cond_stage_model.")
        return file, vae

    def policy_state(self):
        """For upstream's generation script: the base checkpoint's 339 tensors, 127 of them replaced by the trained."""
        trained = {name: value.cpu() for name, value in self.state_dict().items()}
        return {"state_dict": self.base()["state_dict"] | trained, "global_step": self.base().get("global_step", 0)}

    def encode(self, clip):
        if not clip.get("cavp"):
            stop(f"clip {clip.get('id')}: Frieren reads CAVP features; give stage 01 their folder with --cavp")
        names = [f"{clip['cavp']}{suffix}" for suffix in ("", ".npz", ".npy")]
        file = next((name for name in names if name.endswith((".npz", ".npy")) and os.path.isfile(name)), None)
        if file is None:
            raise SkipClip("no CAVP features (.npz or .npy)")
        try:
            cavp = np.load(file, allow_pickle=False)
            cavp = torch.from_numpy(np.array(cavp["feat"] if file.endswith(".npz") else cavp, dtype=np.float32))
        except Exception as error:  # numpy, zipfile and zlib have types of their own for a broken file
            raise SkipClip(f"unreadable CAVP features ({type(error).__name__})") from None
        if cavp.dim() != 2 or cavp.shape[1] != self.cavp_width or len(cavp) < self.frames:
            raise SkipClip(f"CAVP features are {tuple(cavp.shape)}, not (at least {self.frames}, {self.cavp_width})")
        if not cavp[: self.frames].isfinite().all():
            raise SkipClip("CAVP features are not finite")
        return {"cavp": cavp[: self.frames].clone()}

    def project(self, features):
        return {"context": self.cond_stage_model(features["cavp"].to(self.device))}  # (B, 32, 768)

    def null_conditions(self, conditions):
        zeros = torch.zeros(1, 1, self.cavp_width, device=self.device)
        return {"context": self.cond_stage_model(zeros).expand_as(conditions["context"])}

    def predict(self, a_t, t, conditions):
        k = (1000 * (1 - t.double())).round().clamp(0, 999).long()
        return -self.model["diffusion_model"](a_t.transpose(1, 2), k, conditions["context"]).transpose(1, 2)

    def snap_t(self, t):
        """1 - k/1000 with k cut, not rounded. At the times of 25 steps k is upstream's, whose float32 cuts 200, 360 and
        400 to 199, 359 and 399; with other numbers of steps a few k may differ from upstream's by one."""
        passed = 1 - t.double()
        step, grid = (25 * passed).round(), (1000 * torch.linspace(0, 1, 26)).long().to(t.device)
        k = torch.where((25 * passed - step).abs() < 1e-4, grid[step.long()], (1000 * passed + 1e-3).long())
        return (1 - k.clamp(0, 999).double() / 1000).to(t.dtype)

    def blocks(self):
        return list(self.model["diffusion_model"].blocks)

    @torch.no_grad()
    def decode(self, latents):
        vae, vocoder = self.codec(self.device)
        mels = (vae.decode(z.transpose(1, 2) / self.latent_scale) for z in latents.to(self.device).float().split(8))
        return torch.cat([vocoder(mel)[:, 0].cpu() for mel in mels])  # mel (B, 80, 512), 256 samples each

    @staticmethod
    def load_codec(vae, weights, device):
        import yaml

        shape, file = (weight_file(weights, f"bigvnat/{name}") for name in ("args.yml", "best_netG.pt"))
        vocoder = frieren_code()[3](types.SimpleNamespace(**yaml.safe_load(shape.read_text())))
        frieren_fill(vocoder, load_pt(file).get("generator", {}), file, "")
        return [part.to(device).float().eval().requires_grad_(False) for part in (vae, vocoder)]


# ============================================================================================================
# Box: the real scorers
# ============================================================================================================
# Numbers follow av-benchmark (github.com/hkchengrex/av-benchmark), the code behind the metrics of MMAudio, "the same
# metrics in [8]" (Sec. 3.1). Every network judges the first 8 s of the audio as stage 01 writes it, where what is not
# finite is silence: a silent or broken audio has an ordinary finite value everywhere, and never raises.

WEIGHTS |= {
    "imagebind_huge.pth": (
        "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth", "4.8 GB", "IB: ImageBind"),
    "music_speech_audioset_epoch_15_esc_89.98.pt": (
        "https://huggingface.co/lukewys/laion_clap", "2.4 GB", "CLAP: caption and audio embeddings"),
    "roberta-base/vocab.json": ("https://huggingface.co/FacebookAI/roberta-base", "0.9 MB", "CLAP: caption tokens"),
    "roberta-base/merges.txt": ("https://huggingface.co/FacebookAI/roberta-base", "0.5 MB", "CLAP: caption tokens"),
    "synchformer_state_dict.pth": (
        "https://github.com/hkchengrex/MMAudio/releases/tag/v0.1", "0.95 GB", "DeSync; MMAudio's video features"),
    "Cnn14_mAP=0.431.pth": ("https://zenodo.org/records/3987831", "327 MB", "score 4: PANNs tagger, 32 kHz"),
    "Cnn14_16k_mAP=0.438.pth": ("https://zenodo.org/records/3987831", "324 MB", "IS, KL_PANNs: PANNs, 16 kHz"),
    "passt-s-f128-p16-s10-ap.476-swa.pt": (
        "https://github.com/kkoutini/PaSST/releases/tag/v0.0.1-audioset", "345 MB", "FD_PaSST and KL_PaSST"),
}  # fmt: skip

JUDGED_S = 8.0
SCALAR, ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]  # the files were written under numpy 1
NUMPY_SCALARS = [(SCALAR, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("f8"))]  # learning rates in CLAP's
NUMPY_ARRAYS = [(ARRAY, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, type(np.dtype("i8"))]  # in PANNs'

# Paper silent: which classes are "the category of human speech" (Sec. 2.1). These are VGGSound's in which people talk,
# spelled as among the 309 of MMAudio's sets/vgg-test.tsv; not singing, rapping, shouting, babbling, crowds and radios.
HUMAN_SPEECH_CLASSES = (
    "child speech, kid speaking",
    "female speech, woman speaking",
    "male speech, man speaking",
    "people whispering",
)


def judged(waves, sample_rate_hz, centred=False):
    """(B, S) waves -> (B, 8 s), cut or padded with silence; `centred` takes off the whole wave's mean first."""
    waves = torch.nan_to_num(waves.float(), 0, 0, 0).clamp(-2, 2)  # resampling may overshoot 1; 1e30 would overflow
    if centred:
        waves = waves - waves.mean(dim=-1, keepdim=True)
    return fit_length(waves, round(JUDGED_S * sample_rate_hz))


def in_batches(network, rows, device, size=16):
    """network(rows) on the device, a few rows at a time -> float32 on the CPU."""
    return torch.cat([network(part.to(device)).float().cpu() for part in rows.split(size)])


def nearest_frames(path, fps, transform):
    """8 s of a video, by the rule of ffmpeg's fps filter in av-benchmark's reader: picture i is the last frame before
    (i + 0.5) / fps, so 0.5 fps shows 1, 3, 5 and 7 s (read_frames would show 0, 2, 4, 6). transform: (3, H, W) uint8 ->
    tensor. Returns (8 * fps, ...). The last frame is held, for at most 0.5 s. Raises SkipClip."""
    count, pictures, last, first, slot = round(JUDGED_S * fps), [], None, 0, 0

    def show(until):
        if len(pictures) < min(until, count):
            picture = transform(torch.from_numpy(last.to_ndarray(format="rgb24")).permute(2, 0, 1))
            pictures.extend([picture] * (min(until, count) - len(pictures)))

    try:
        with open_media(path) as container:
            for frame in container.decode(video=0):
                if frame.pts is None:
                    raise SkipClip("frames without time stamps")
                slot = math.floor(frame.pts * frame.time_base * fps + 0.5)  # exact: time_base is a Fraction
                first = slot if last is None else first
                show(slot - first)
                if len(pictures) == count:
                    break
                last = frame
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise SkipClip(f"unreadable video ({type(error).__name__})") from None
    if last is not None and slot - first >= count - 0.5 * fps:
        show(count)
    if len(pictures) < count:
        raise SkipClip(f"too short: {JUDGED_S} s of video needed")
    return torch.stack(pictures)


@contextmanager
def without_init(package):
    """While it lasts, modules of a package are imported without its __init__: panns_inference's and laion_clap's reach
    for the network, imagebind's needs packages that its networks do not."""
    if package in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = list(spec.submodule_search_locations)
    try:
        yield
    finally:
        del sys.modules[package]


def load_weights(net, state, path, device, **options):
    """Strict; a file of another network ends in one line. Returns the network frozen, in eval mode, on the device."""
    try:
        net.load_state_dict(state, **options)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        stop(f"{path}: not the weights of {type(net).__name__} ({reason}); download it again")
    return net.to(device).eval().requires_grad_(False)


class ImageBindScorer(Scorer):
    """score_1, `ib`: cosine of ImageBind's video and audio embeddings, in [-1, 1].

    Video: 4 frames, 3 crops along the longer side, 3 pairs of neighbouring frames; the 9 unit embeddings are averaged.
    Audio: windows of 2 s at 0, 3 and 6 s, averaged (av-benchmark spreads them over the whole file if it exceeds 8 s).
    """

    sample_rate_hz, files, video_score = 16000, ("imagebind_huge.pth",), "ib"

    def __init__(self, weights, device):
        super().__init__()
        from torchvision.transforms import v2

        path = weight_file(weights, self.files[0])
        with upstream("ImageBind"), without_init("imagebind"):
            from imagebind.models import imagebind_model
        net = imagebind_model.imagebind_huge(pretrained=False)  # 4.8 GB: the file is mapped, never copied
        net = load_weights(net, load_pt(path, mmap=True), path, "cpu", assign=True)
        for parts in (net.modality_preprocessors, net.modality_trunks, net.modality_heads, net.modality_postprocessors):
            for modality in set(parts) - {"vision", "audio"}:
                del parts[modality]  # 0.5 of 1.2e9 parameters
        self.device, self.net = device, net.to(device)
        self.picture = v2.Compose([
            v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ])

    @staticmethod
    def crops(frames):
        """(4, 3, H, W), shorter side 224 -> (9, 3, 2, 224, 224): 3 pairs of frames, 3 crops of each."""
        height, width = frames.shape[-2:]
        tops, lefts = ([0, math.ceil((side - 224) / 2), side - 224] for side in (height, width))
        squares = [frames[..., top : top + 224, left : left + 224] for top, left in zip(tops, lefts, strict=True)]
        return torch.stack([square[i : i + 2] for i in range(3) for square in squares]).transpose(1, 2)

    @torch.inference_mode()
    def clip_side(self, clip):
        pairs = self.crops(nearest_frames(clip["path"], 0.5, self.picture))
        return self.net({"vision": pairs[None].to(self.device)})["vision"][0].cpu()

    @staticmethod
    def spectrogram(window):
        """(32000,) -> (1, 128, 204): Kaldi's log mel filter bank, padded with 0, then normalised."""
        fbank = torchaudio.compliance.kaldi.fbank(
            (window - window.mean())[None], sample_frequency=16000, num_mel_bins=128, frame_length=25, frame_shift=10,
            window_type="hanning", htk_compat=True, use_energy=False, dither=0.0,
        )  # (198, 128)  # fmt: skip
        return (fit_length(fbank.T[None], 204) + 4.268) / 9.138

    def audio_side(self, waves, clips, sides):
        windows = judged(waves, 16000).unfold(-1, 32000, 48000)  # (B, 3, 32000)
        mels = torch.stack([torch.stack([self.spectrogram(window) for window in row]) for row in windows])
        audio = in_batches(lambda x: self.net({"audio": x})["audio"], mels, self.device)
        return {"ib": F.cosine_similarity(torch.stack(sides), audio, dim=-1)}


class ClapScorer(Scorer):
    """score_2, `clap`: cosine of LAION-CLAP's caption and audio embeddings, in [-1, 1]; nan without a caption.

    laion_clap's own network, built and loaded by our lines: its package downloads three tokenizers when imported and
    RoBERTa's weights, which its checkpoint replaces, when built; its load_ckpt unpickles.
    """

    sample_rate_hz = 48000
    files = ("music_speech_audioset_epoch_15_esc_89.98.pt", "roberta-base/vocab.json", "roberta-base/merges.txt")
    roberta = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)  # -base

    def __init__(self, weights, device):
        super().__init__()
        from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

        path, vocab, merges = (weight_file(weights, name) for name in self.files)
        tokens = len(read_json(vocab))  # too few would silently map every caption to the same ids
        if tokens != self.roberta["vocab_size"]:
            stop(f"{vocab}: {tokens} tokens instead of {self.roberta['vocab_size']}; download it again")
        self.tokenizer = RobertaTokenizer(str(vocab), str(merges))
        with without_init("laion_clap"):
            from laion_clap.clap_module import factory, model
        empty = RobertaModel(RobertaConfig(**self.roberta))
        model.RobertaModel = types.SimpleNamespace(from_pretrained=lambda name: empty)
        try:
            net, _ = factory.create_model("HTSAT-base", "roberta", device="cpu", enable_fusion=False)
        finally:
            model.RobertaModel = RobertaModel
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            state = load_pt(path)
        state = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
        state.pop("text_branch.embeddings.position_ids", None)  # a constant that newer transformers do not store
        self.device, self.net = device, load_weights(net, state, path, device)

    @torch.inference_mode()
    def clip_side(self, clip):
        if not clip["caption"]:
            return None
        length = dict(padding="max_length", truncation=True, max_length=77)
        tokens = self.tokenizer([clip["caption"]], return_tensors="pt", **length)
        return self.net.get_text_embedding(dict(tokens))[0].cpu()

    def audio_side(self, waves, clips, sides):
        score, rows = torch.full((len(waves),), math.nan), [i for i, side in enumerate(sides) if side is not None]
        if rows:
            waves = fit_length(judged(waves[rows], 48000, centred=True), 480000)  # 10 s, as laion_clap pads
            embed = self.net.get_audio_embedding
            audio = in_batches(lambda x: embed([{"waveform": wave} for wave in x]), waves, self.device)
            score[rows] = F.cosine_similarity(torch.stack([sides[i] for i in rows]), audio, dim=-1)
        return {"clap": score}


class SynchformerScorer(Scorer):
    """score_3, `desync_s`: |audio-video offset| in seconds that Synchformer predicts, mean of the first and the last
    4.8 s, in [0, 2], lower is better. An offset is the most probable of 21 classes, -2 to 2 s in steps of 0.2 s."""

    sample_rate_hz, files, video_score = 16000, ("synchformer_state_dict.pth",), "desync_s"

    def __init__(self, weights, device):
        super().__init__()
        from torchvision.transforms import v2

        path = weight_file(weights, self.files[0])
        with upstream("av-benchmark"):
            from av_bench.synchformer.synchformer import Synchformer, make_class_grid
        self.device, self.net = device, load_weights(Synchformer(), load_pt(path), path, device)
        self.offset_s = make_class_grid(-2, 2, 21)
        self.mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=1024, win_length=400, hop_length=160, n_mels=128)
        self.picture = v2.Compose([
            v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ])

    @torch.inference_mode()
    def clip_side(self, clip):
        """(24, 8, 768): 24 segments of 16 frames (0.64 s), every 8 frames."""
        frames = nearest_frames(clip["path"], 25, self.picture)  # (200, 3, 224, 224)
        segments = torch.stack([frames[i : i + 16] for i in range(0, 185, 8)])[:, None]
        return in_batches(self.net.extract_vfeats, segments, self.device, size=8)[:, 0]

    def audio_side(self, waves, clips, sides):
        segments = judged(waves, 16000).unfold(-1, 10240, 5120)  # (B, 24, 10240)
        mels = fit_length(torch.log(self.mel(segments) + 1e-6), 66)  # padded with 0 after the log, as upstream
        mels = ((mels + 4.2677393) / (2 * 4.5689974))[:, :, None]  # (B, 24, 1, 128, 66)
        audio, video = in_batches(self.net.extract_afeats, mels, self.device), torch.stack(sides)
        offsets = []
        for part in (slice(0, 14), slice(-14, None)):  # the network compares exactly 14 segments
            both = torch.cat([video[:, part], audio[:, part]], dim=2)  # (B, 14, 8 + 6, 768)
            logits = in_batches(lambda x: self.net.compare_v_a(x[:, :, :8], x[:, :, 8:]), both, self.device)
            offsets.append(self.offset_s[logits.argmax(dim=-1)].abs())
        return {"desync_s": torch.stack(offsets).mean(dim=0)}


class PannsScorer(Scorer):
    """The tagger of score_4, PANNs' Cnn14 at 32 kHz: `logits` (B, 527) over AudioSet's classes, before the sigmoid, and
    `embedding` (B, 2048)."""

    sample_rate_hz, files = 32000, ("Cnn14_mAP=0.431.pth",)
    stft = dict(window_size=1024, hop_size=320, fmin=50, fmax=14000)

    def __init__(self, weights, device):
        super().__init__()
        path = weight_file(weights, self.files[0])
        with without_init("panns_inference"):
            from panns_inference.models import Cnn14
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            state = load_pt(path)
        net = Cnn14(sample_rate=self.sample_rate_hz, mel_bins=64, classes_num=527, **self.stft)
        self.device, self.net = device, load_weights(net, state.get("model"), path, device)

    def audio_side(self, waves, clips, sides):
        waves = judged(waves, self.sample_rate_hz, centred=True)
        embedding = in_batches(lambda x: self.net(x)["embedding"], waves, self.device)
        return {"logits": in_batches(self.net.fc_audioset, embedding, self.device), "embedding": embedding}


class Panns16kScorer(PannsScorer):
    """The variant of av-benchmark's KL_PANNs and IS."""

    sample_rate_hz, files = 16000, ("Cnn14_16k_mAP=0.438.pth",)
    stft = dict(window_size=512, hop_size=160, fmin=50, fmax=8000)


class PasstScorer(Scorer):
    """`logits` (B, 527) and `embedding` (B, 768) of PaSST at 32 kHz, for FD_PaSST and KL_PaSST: 8 s, padded to 10 s."""

    sample_rate_hz, files = 32000, ("passt-s-f128-p16-s10-ap.476-swa.pt",)

    def __init__(self, weights, device):
        super().__init__()
        path = weight_file(weights, self.files[0])
        from hear21passt.models.passt import get_model
        from hear21passt.models.preprocess import AugmentMelSTFT

        with self.quiet():
            net = get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False)
            self.mel = AugmentMelSTFT(freqm=48, timem=192, fmin_aug_range=10, fmax_aug_range=2000).to(device).eval()
        self.device, self.net = device, load_weights(net, load_pt(path), path, device)

    @staticmethod
    @contextmanager
    def quiet():
        """hear21passt prints its shapes, and warns about 998 frames of its 1000."""
        import contextlib
        import warnings

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def audio_side(self, waves, clips, sides):
        waves = fit_length(judged(waves, 32000, centred=True), 320000)
        with self.quiet():
            both = in_batches(lambda x: torch.cat(self.net(self.mel(x)[:, None]), dim=1), waves, self.device)
        return {"logits": both[:, :527], "embedding": both[:, 527:]}


class PesqScorer(Scorer):
    """score_5, `pesq`: wide-band PESQ (P.862.2, 1.0 to 4.64) at 16 kHz against the clip's own audio, both cut to the
    shorter, at most 8 s. nan where it does not apply: another class, no audio track, a reference without utterance.
    A silent (below -80 dB of full scale) or non-finite generated audio is 1.0, the scale's floor."""

    sample_rate_hz = 16000

    def __init__(self, weights, device):
        super().__init__()

    def clip_side(self, clip):
        if clip["label"] not in HUMAN_SPEECH_CLASSES:
            return None
        try:
            return read_audio(clip["path"], 16000)[: round(JUDGED_S * 16000)]
        except SkipClip:  # a silent film: its video was read by stage 01
            return None

    def audio_side(self, waves, clips, sides):
        scores = [math.nan if side is None else self.score(side, wave) for side, wave in zip(sides, waves, strict=True)]
        return {"pesq": torch.tensor(scores)}

    @staticmethod
    def score(reference, wave):
        from pesq import NoUtterancesError, PesqError, pesq

        samples = min(len(reference), len(wave))
        reference, wave = reference[:samples].numpy(), wave[:samples].float().cpu().numpy()
        if samples < 4000 or np.abs(reference).max() < 1e-4:
            return math.nan
        if not np.isfinite(wave).all() or np.abs(wave).max() < 1e-4:
            return 1.0
        try:
            return pesq(16000, reference, wave, "wb")
        except NoUtterancesError:  # depends on the reference alone
            return math.nan
        except (PesqError, ValueError):  # ValueError: its result is nan, as for silence
            return 1.0


ADAPTERS = {"toy": Toy, "mmaudio": MMAudio, "frieren": Frieren}
SCORERS = {
    "imagebind": ImageBindScorer,
    "clap": ClapScorer,
    "synchformer": SynchformerScorer,
    "panns": PannsScorer,
    "panns_16k": Panns16kScorer,
    "passt": PasstScorer,
    "pesq": PesqScorer,
}
