"""What several stages of the V2A-DPO reproduction share.

Read in this order: notation, Flow-DPO (Eq. 5, Eq. 3), AudioScore (Sec. 2.1), sampler, the interface of a backbone. A
reader of the paper can stop there. Then: a stage's entry, what stages read, flags, torch.distributed, scorers and the
store of what they said; last the loaders of `adapters/`. Files (checks, records, locks), media, reading ahead, people's
answers and tables are in `plumbing/`.

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
import functools
import hashlib
import importlib
import itertools
import math
import os
import random
import re
import sys
import threading
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from tqdm import tqdm

from plumbing import digits
from plumbing.ahead import *  # noqa: F403, what stages need of these they find here
from plumbing.cores import *  # noqa: F403
from plumbing.files import *  # noqa: F403
from plumbing.media import *  # noqa: F403
from plumbing.people import *  # noqa: F403
from plumbing.tables import *  # noqa: F403

digits.same_on_every_cpu()  # before torch computes anything

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
        hint = "; rerun 02_fit_audioscore.py --redo"
        state = load_pt(path, {"audioscore": with_fields(**{"p_y": FLOATS, "mlp.0.bias": FLOATS})})["audioscore"]
        self = cls(tags=len(state["p_y"]), hidden=len(state["mlp.0.bias"]))
        load_weights(self, state, path, f"is not an AudioScore{hint}")
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
    known = model.snap_t(times[:-1]).to(a_t)  # one copy to the device, not one a step
    with autocast(model.device.type, "auto"):
        conditions = model.project(features)
        for t, dt in zip(known, times.diff().tolist()):
            u = model.velocity(a_t, t.expand(len(a_t)), conditions, guidance)
            a_t = a_t + dt * u.float()
    return a_t


# ------------------------------------------------------------------------------------------------------------
# The interface of a backbone: what toy, MMAudio and Frieren offer to the stages
# ------------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What a variant's networks need of a GPU in bf16, in GiB, counted as docs/cost.md says."""

    row: float  # kept for the backward pass, per row of a forward
    recomputed: float  # the same with gradient checkpointing
    sampled: float  # at work, per row of a forward without gradients
    codec: float  # VAE and vocoder, and eight audios in them
    encoders: float  # of features, and one clip in them


class FlowModel(nn.Module):
    """A V2A flow model in the paper's convention (t = 1 noise, v = eps - a_0); only adapters flip time and sign.

    Registered parameters are those of the velocity network: everything that maps features and a_t to u, condition
    projections included. Null-condition parameters are frozen. Encoders and codec are loaded on first use and are no
    submodules, so that copying, training and saving never touch them.
    """

    name: str  # as given to load_model
    latent_shape: tuple  # (T, C)
    feature_shapes: dict  # {name: shape} of what encode returns
    sample_rate_hz: int
    clip_s: float  # seconds of video that one audio belongs to, and of audio that is judged
    checkpoint: Path  # the file that the velocity network came from
    memory: Memory | None = None
    reads_video = False  # whether `read` decodes the clip's video, and what `others` want of it

    # What an adapter fills in -------------------------------------------------------------------------------

    @classmethod
    def files(cls, variant):
        """Names below --weights of all that the stages will read of this model."""
        return []

    def read(self, clip, others=()):
        """What `encode` needs of a clip's files, a list of CPU tensors: decoded and made small here, where no GPU is
        used, by a process of its own (`read_ahead`); then, if `reads_video`, what `others` (as `Scorer.frames`) want of
        it. clip: a line of clips.jsonl with `path`. Raises SkipClip(reason) for a video that cannot be used."""
        return []

    def stamp_of(self, clip):
        """Changes with the file that `read` reads."""
        return stamp(clip["path"])

    def encode(self, clip, seen):
        """Frozen encoders, once per clip. seen: what `read` returned. Returns a dict of float32 CPU tensors without
        batch dimension."""
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

    def takes(self, features, *rows):
        """Whether these tensors are what `encode` returns, of so many rows."""
        expected = {name: (*rows, *shape) for name, shape in self.feature_shapes.items()}
        return {name: tuple(value.shape) for name, value in features.items()} == expected

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

    def trained_state(self):
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def add_lora(self, rank, seed, bf16=False):
        """From now on adapters of this rank are trained, one on every linear and convolution layer, and nothing else.
        They begin at zero: the network is what it was. bf16 halves the memory of the weights below them, as in
        `reference`; the float32 ones wait on the CPU to be merged."""
        from peft import LoraConfig, inject_adapter_in_model  # seconds

        self.requires_grad_(False)
        layers = [name for name, layer in self.named_modules() if isinstance(layer, (nn.Linear, nn.Conv1d))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "lora"))
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), self)
        self.unrounded = {}
        for name, layer in self.lora_layers() if bf16 else ():
            self.unrounded[name] = {key: value.cpu() for key, value in layer.get_base_layer().state_dict().items()}
            layer.get_base_layer().to(torch.bfloat16)
        trained = [p.requires_grad for name, p in self.named_parameters() if "lora_" in name]
        if not trained or not all(trained):
            stop(f"--lora: {nothing_is_trained()}")

    def check_lora_moved(self):
        """For after the first optimizer steps: every lora_B begins at zero, and until one moves the adapters add
        nothing."""
        layers = self.lora_layers()
        moved = [p.any() for _, layer in layers for p in layer.lora_B.parameters()]
        if layers and not any(moved):
            stop(f"--lora: {nothing_is_trained()}")

    def lora_layers(self):
        return [(name, layer) for name, layer in self.named_modules() if hasattr(layer, "lora_A")]

    def without_lora(self, *inputs):
        for _, layer in self.lora_layers():
            layer.enable_adapters(False)
        u = self(*inputs)
        for _, layer in self.lora_layers():
            layer.enable_adapters(True)
        return u

    def merge_lora(self):
        """Adds the adapters to the weights below them: the network is of its upstream's form again."""
        if self.lora_layers() and self.unrounded:
            self.cpu()  # where the weights below are, so that no GPU needs room for them
        for name, layer in self.lora_layers():
            (parent, _, own), base = name.rpartition("."), layer.get_base_layer()
            if name in self.unrounded:
                base.float().load_state_dict(self.unrounded.pop(name))
            layer.merge()
            setattr(self.get_submodule(parent), own, base)

    def reference(self, bf16=False):
        """u_ref: the network without its adapters if it has some, else a frozen copy. bf16 halves the copy's memory: of
        the weights of linear and convolution layers, which autocast rounds at every use, only the rounded values are
        kept; norms and time embeddings stay float32."""
        if self.lora_layers():
            return self.without_lora
        copied = copy.deepcopy(self).eval().requires_grad_(False)
        for module in copied.modules() if bf16 else ():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                module.to(torch.bfloat16)
        return copied

    def checkpoint_blocks(self):
        """Trades time for memory: every block's activations are recomputed in the backward pass."""
        for block in self.blocks():
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

    def compile_sampling(self):
        """Makes `sample` faster after a first, slow call. Training stays eager: in bf16 a compiled policy rounds
        otherwise than its reference, which Eq. 5's beta would magnify."""
        self.project, self.predict = torch.compile(self.project), torch.compile(self.predict)

    def save_policy(self, path):
        """The end of a training: adapters are merged."""
        self.merge_lora()
        save_pt(path, self.policy_state())


def nothing_is_trained():
    """What is said where adapters do not learn: the usual reason is another version of peft than the tested one."""
    import peft

    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    tested = re.search(r"^peft==(.+)$", pins, flags=re.MULTILINE)[1]
    here = f"peft {peft.__version__} is installed, {tested} is tested"
    return f"the adapters are frozen, or do not move; {here}: pip install peft=={tested}"


def tile(rows, repeats):
    """Repeats every tensor of a dict along its batch: (B, ...) -> (repeats * B, ...)."""
    return {key: value.repeat(repeats, *[1] * (value.dim() - 1)) for key, value in rows.items()}


# ------------------------------------------------------------------------------------------------------------
# A stage's entry
# ------------------------------------------------------------------------------------------------------------


def less_memory(args):
    """What the command can still change to need less of a GPU."""
    given = vars(args)
    can = [f"lower --{x.replace('_', '-')}" for x in ("micro_batch", "batch_clips") if given.get(x, 1) > 1]
    offers = dict(gradient_checkpointing="--gradient-checkpointing", lora="--lora 16")
    can += [f"give {flag}" for name, flag in offers.items() if given.get(name, True) in (0, False)]
    return " or ".join(can) or "nothing to change here: it takes a larger one"


def one_line(error, args):
    """What a person reads of an error of theirs, or of the system; None for one of ours."""
    said = " ".join(str(error).split())
    if isinstance(error, Stop):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:200]!a}: a name that is not UTF-8, which some libraries cannot open; rename it"
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}; mend that, then run the command again"
    if isinstance(error, MemoryError) or NO_MEMORY in said:
        return "the machine's memory is full; lower --workers or make room, then run the command again"
    if isinstance(error, torch.OutOfMemoryError) or "STATUS_ALLOC_FAILED" in said:
        return f"{said[:80]} ...: more than the GPU has; {less_memory(args)}"
    if getattr(args, "lora", 0) and "does not require grad" in said:  # torch, of a loss that no weight has a part in
        return f"--lora: {nothing_is_trained()}"
    if re.match(r"DataLoader worker .*(killed by signal|exited unexpectedly)|A process in the process pool was", said):
        return f"{said[:80]} ...: perhaps the machine's memory is full; lower --workers, then run the command again"
    return None


def start_in_utf8():
    """Starts this program again, with names of files in UTF-8, as the run's own files have them. Python reads them in
    the terminal's encoding where it is told to (latin-1, LC_ALL=C with PYTHONUTF8=0), and cannot change that later."""
    if os.environ.get("PYTHONUTF8") != "1":
        environment = os.environ | dict(PYTHONUTF8="1", PYTHONIOENCODING=sys.stdout.encoding)  # the terminal's stays
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def launch(main, parse_args):
    """A stage's entry. A user error, or one of the system, ends in one line and exit code 2, Ctrl-C in a line; what is
    written is kept."""
    if main.__module__ == "__main__" and sys.getfilesystemencoding() != "utf-8":
        start_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show ends no stage
    if torch.get_num_threads() > cores():
        torch.set_num_threads(cores())  # torch knows nothing of a container's share
    args = None
    try:
        args = parse_args()
        main(args)
    except (Stop, OSError, MemoryError, RuntimeError, UnicodeEncodeError) as error:
        line = one_line(error, args)
        if line is None:
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # what rank 0 has met too, it has said by now, and torchrun ends this process
        tqdm.write(f"error: {line}", file=sys.stderr)  # on a line of its own, also beside a progress bar
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# What stages read
# ------------------------------------------------------------------------------------------------------------


SCORER_SET = Kind("a set of scorers", lambda x: isinstance(x, str) and x in SCORERS)
WORLD = dict(model=TEXT, checkpoint=PATH, video_root=PATH, clip_s=between(0.1, 3600), checkpoint_digest=maybe(TEXT))
WORLD |= dict(defaults=maybe(dict_of(dict_of(NUMBER))), scorers=maybe(SCORER_SET))
WORLD |= dict(scorers_root=maybe(PATH), cavp_root=maybe(PATH))
RUN = dict(sampler=with_fields(steps=COUNT, guidance=NUMBER), num_samples=COUNT, seed=INDEX, max_clips=INDEX)
RUN |= WORLD | dict(checkpoint_digest=TEXT, latent_shape=list_of(COUNT), sample_rate_hz=COUNT)
CLIP = dict(id=NAME, video=PATH, caption=maybe(TEXT), label=maybe(TEXT), split=one_of("train", "val", "test"))
SAMPLE = dict(clip=NAME, k=INDEX, seed=INDEX, wav=TEXT, row=INDEX, digest=TEXT, finite=FLAG, peak=SHARE, clipped=SHARE)
SKIPPED = dict(clip=NAME, reason=TEXT)


def read_run(run, fields=RUN):
    """run.json of a run folder, completed by stage 01 unless `fields` is WORLD; stops when the folder is missing."""
    run = Path(run)
    if not run.is_dir():
        stop(f"--run-dir {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
    return read_json(run / "run.json", fields, "; run 01_generate.py (or 00_toy_world.py) first")


def read_clips(run, split=None):
    """Lines of clips.jsonl, in order, each with `path` (absolute, checked to lie below the video root) and, for
    Frieren, `cavp` (its features, without suffix)."""
    run = Path(run)
    file, run_json, clips, ids = run / "clips.jsonl", read_run(run), [], set()
    root = run / run_json["video_root"]
    for number, clip in enumerate(read_jsonl(file, CLIP, "; rerun 01_generate.py"), 1):
        clip = {"caption": None, "label": None, **clip}
        if clip["id"] in ids:
            stop(f"{file}, line {number}, field 'id': {clip['id']} occurs twice; rerun 01_generate.py")
        ids.add(clip["id"])
        if split is None or clip["split"] == split:
            clip["path"] = inside(root, clip["video"], f"{file}, line {number}, field 'video'")
            if "cavp_root" in run_json:
                clip["cavp"] = inside(run_json["cavp_root"], clip["id"], f"{file}, line {number}, field 'id'")
            clips.append(clip)
    return clips


def read_samples(run):
    """Every audio of stage 01: {clip id: [line, ...]} in order of k; each line gains `shard` (a path stem). Every train
    clip that stage 01 drew must be there, with all its audios, or be skipped."""
    run, samples, skipped = Path(run), {}, 0
    about, train = read_run(run), {c["id"] for c in read_jsonl(run / "clips.jsonl", CLIP) if c["split"] == "train"}
    for file in sorted((run / "01_samples").glob("[0-9]*.jsonl")):
        hint = "; remove that shard and rerun 01_generate.py"
        if file.name.endswith(".skipped.jsonl"):
            skipped += len(read_jsonl(file, SKIPPED, hint))
            continue
        for i, row in enumerate(read_jsonl(file, SAMPLE, hint)):
            mine, k = samples.setdefault(row["clip"], []), i % about["num_samples"]
            in_order = (row["row"], row["k"]) == (i, k) and [earlier["row"] for earlier in mine] == [*range(i - k, i)]
            if not in_order or row["clip"] not in train or row["wav"] != f"01_audio/{row['clip']}_{k}.wav":
                stop(f"{file}, line {i + 1}: not audio {k} of a train clip, with its row, k and wav, in order{hint}")
            mine.append(dict(row, shard=file.stem))
    if not samples:
        stop(f"{run / '01_samples'}: no generated audio; run 01_generate.py --run-dir {run} first")
    whole = all(len(rows) == about["num_samples"] for rows in samples.values())
    if not whole or len(samples) + skipped != min(len(train), about["max_clips"]):
        stop(f"{run / '01_samples'}: some of the {len(train)} train clips are not there; rerun 01_generate.py")
    return samples


def read_pairs(path, hint, **fields):
    """Pairs of different audios, each once: clip, winner, loser (k), and these fields."""
    pairs, seen = read_jsonl(path, dict(clip=NAME, winner=INDEX, loser=INDEX, **fields), hint), set()
    for line, pair in enumerate(pairs, 1):
        key = (pair["clip"], *sorted((pair["winner"], pair["loser"])))
        if pair["winner"] == pair["loser"] or key in seen:
            stop(f"{path}, line {line}: {key} is no pair, or stands here twice{hint}")
        seen.add(key)
    return pairs


def crc32(row):
    """Of a tensor's bytes, as an integer."""
    return zlib.crc32(row.contiguous().view(torch.uint8).numpy())


def save_shard(file, latents, features, digests):
    """Of stage 01. latents: (rows, T, C); features: dict of (clips, ...); digests: of the rows' wavs.
    Every row gets its CRC-32, since nobody reads such a file as a whole."""
    checksums = {"latents": [crc32(row) for row in latents]}
    for name, values in features.items():
        checksums[name] = [crc32(row) for row in values]
    save_pt(file, dict(latents=latents, features=features, digests=digests, crc32=checksums))


class Shards:
    """Stage 01's latents and features, memory-mapped: memory does not grow with the data set. A row
    is checked whenever it is read: a disk that loses a part of a file says nothing."""

    def __init__(self, run, samples, model):
        self.folder, self.num_samples, self.open = Path(run) / "01_samples", read_run(run)["num_samples"], {}
        self.latent_shape, self.takes = model.latent_shape, model.takes
        self.place = {(clip, row["k"]): (row["shard"], row["row"]) for clip, rows in samples.items() for row in rows}
        self.made = defaultdict(list)  # by shard, the digests of its audios
        for row in (row for rows in samples.values() for row in rows):
            self.made[row["shard"]].append(row["digest"])

    def shard(self, name):
        if name not in self.open:
            path, made = self.folder / f"{name}.pt", self.made[name]
            fields = dict(latents=FLOATS, features=dict_of(FLOATS), digests=LIST, crc32=maybe(dict_of(LIST)))
            file = load_pt(path, fields, mmap=True)
            if "crc32" not in file:
                stop(f"{path}: made by an older version, without checksums; {self.again(name)}")
            clips = len(made) // self.num_samples
            rows = {"latents": len(made), **dict.fromkeys(file["features"], clips)}
            fits = file["digests"] == made and file["latents"].shape == (len(made), *self.latent_shape)
            fits = fits and {key: len(sums) for key, sums in file["crc32"].items()} == rows
            if not fits or not self.takes(file["features"], clips):
                stop(f"{path}: not of the audios in {name}.jsonl; {self.again(name)}")
            self.open[name] = file
        return self.open[name]

    def again(self, name):
        return f"remove both {name}.pt and {name}.jsonl, rerun 01_generate.py"

    def checked(self, clip, name, key, row):
        """A row of a shard's latents or of one of its features."""
        shard = self.shard(name)
        value = shard["latents"][row] if key == "latents" else shard["features"][key][row]
        if crc32(value) != shard["crc32"][key][row]:
            wrong = f"{key} of clip {clip} are not what stage 01 wrote (a bad disk or copy)"
            stop(f"{self.folder / name}.pt: {wrong}; {self.again(name)}")
        return value

    def latents(self, audios):
        """[(clip, k), ...] -> (B, T, C) float32."""
        rows = []
        for clip, k in audios:
            name, row = self.place[clip, k]
            rows.append(self.checked(clip, name, "latents", row))
        return torch.stack(rows).float()

    def features(self, clips):
        """[clip id, ...] -> dict of (B, ...) float32."""
        rows = defaultdict(list)
        for clip in clips:
            name, row = self.place[clip, 0]
            for key in self.shard(name)["features"]:
                rows[key].append(self.checked(clip, name, key, row // self.num_samples))
        return {key: torch.stack(values) for key, values in rows.items()}


def people_of(run):
    """The module whose simulated people answer, and whose oracle judges, in a run that holds its world's truth."""
    return importlib.import_module(ADAPTERS["toy"]) if (Path(run) / "00_truth.jsonl").exists() else None


def to_simulate(run, answers, asked, fields, redo):
    """Whether simulated people answer: nobody has, or, with --redo, only they have, and to other questions.
    answers: their .jsonl; asked: a set of tuples of these fields."""
    if people_of(run) is None or not asked:
        return False
    if not answers.exists():
        return True
    rows = read_jsonl(answers)
    simulated = all(row.get("rater") == "simulated" for row in rows)
    return redo and simulated and {tuple(row.get(field) for field in fields) for row in rows} != asked


def sample_index(row, samples, where, field="k"):
    """The k in this field as an integer, after checking that stage 01 made the k-th audio of the row's clip."""
    clip, k = (check(row, {"clip": TEXT, field: ANY}, where)[name] for name in ("clip", field))
    if clip not in samples:
        stop(f"{where}, field 'clip': {repr(clip)[:80]} is no clip with generated audio")
    known = {str(row["k"]): row["k"] for row in samples[clip]}
    if isinstance(k, bool) or str(k).strip() not in known:
        stop(f"{where}, field '{field}': {repr(k)[:80]} is no audio of {clip} (there are {', '.join(known)})")
    return known[str(k).strip()]


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
        none = action.default in (None, []) or action.default is False
        return action.help if none else super()._get_help_string(action)


def workers_flag(parser):
    share = min(MOST_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if sys.platform != "linux":
        share = 0  # a fork is not safe
    described = "processes that decode video or compute PESQ, by default the cores per rank, at most "
    described += f"{MOST_WORKERS}; 0: none besides this one"
    parser.engineering.add_argument("--workers", type=number(int, 0), default=share, help=described)


def number(kind, least, most=None):
    """A flag's type: a finite int or float from least to most (if None, a number that no flag can mean)."""
    most = {int: 2**31 - 1, float: 1e9}[kind] if most is None else most

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            kinds = {int: "a whole number", float: "a number"}
            raise argparse.ArgumentTypeError(f"{text[:40]!r} must be {kinds[kind]} from {least} to {most}")
        return value

    return convert


def parse(parser, argv, stage):
    """parser.parse_args. A run's `defaults` (of run.json, or of the one beside --checkpoint) replace the paper's
    numbers, which is said; an explicit flag wins over both."""
    args = parser.parse_args(argv)
    if not printable(args.run_dir):
        stop(f"--run-dir {args.run_dir}: its name is not UTF-8, so that not every library can open it; use another")
    checkpoint = getattr(args, "checkpoint", None)
    folders = [Path(args.run_dir)] + ([Path(checkpoint).parent] if checkpoint else [])
    files = [folder / "run.json" for folder in folders if (folder / "run.json").is_file()]
    found = [(file, read_json(file, {"defaults": WORLD["defaults"]}).get("defaults", {})) for file in files]
    file, own = next(((file, defaults[stage]) for file, defaults in found if stage in defaults), (None, {}))
    flags = {action.dest: action for action in parser._actions if action.type}
    for key, value in own.items():
        try:
            own[key] = flags[key].type(str(value))
        except (KeyError, argparse.ArgumentTypeError):
            stop(f"{file}, field 'defaults': {key} {value!r} is no flag of stage {stage} with such a value")
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


def setup_ranks():
    """Under torchrun or alone; nccl on CUDA, gloo elsewhere. Other ranks than 0 speak of errors only."""
    rank, world, local = (int(os.environ.get(name, n)) for name, n in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items())
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
        patience = timedelta(seconds=60)  # to meet
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=patience))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # restarted by torchrun, ranks would find their predecessors'
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # addresses, and wait for them
        options |= dict(store=store, rank=rank, world_size=world, timeout=patience)
        dist.init_process_group("gloo" if device == "cpu" else "nccl", **options)
        dist.distributed_c10d._set_pg_timeout(timedelta(hours=12))  # to wait for the slowest clip, scorer or encoder
    return Ranks(rank, world, device)


CUDA_GIB = 1.5  # context, kernels' workspaces, what the allocator cannot use: our allowance (docs/cost.md)
HELD, STORE = [], threading.Lock()  # locks that live as long as the process; one thread at a time writes to the store


def hold(run, name, ranks):
    """Takes this run's lock of a stage, or of a training's output folder, for as long as the process lives; a second
    process is refused. What killed ones left half written is removed. Only processes that see each other's POSIX locks
    are kept apart: on a file system without them, nothing is (`take`)."""
    if ranks.rank == 0:
        Path(run).mkdir(parents=True, exist_ok=True)
        HELD.append(take(run, f".{name}.lock", f"{run}: {name} is being made by", wait=False))
        own = (".run*", ".clips*") if name in ("00", "01") else ()
        for pattern in (f".{name}*", f"{name}/**/.*", f"{name}_*/**/.*" if len(name) == 2 else ".", *own):
            for file in Path(run).glob(f"{pattern}.tmp*"):
                file.unlink(missing_ok=True)
    barrier()


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


def say_memory(model, args, device, trained=0, sampled=0, reference=None, frozen=(), others=0.0):
    """Says what the stage needs of a GPU at its peak, by the account in the model's adapter, and warns where that is
    more than it has. trained, sampled: rows of a forward with and without gradients; frozen: of `codec`, `encoders`;
    others: GiB of further networks. Silent for a model without account."""
    memory, bf16 = model.memory, in_bf16(device, getattr(args, "precision", "auto"))
    if memory is None:
        return
    gib = lambda weights: sum(p.numel() * p.element_size() for p in weights) / 2**30  # noqa: E731
    row = memory.recomputed if vars(args).get("gradient_checkpointing") else memory.row
    needs = dict(weights=gib(model.parameters()), reference=gib(reference.parameters()) if reference else 0)
    needs["gradients and AdamW"] = 3 * gib(model.trainable_parameters()) * (trained > 0)
    needs["bf16 copies"] = gib(p for p in model.parameters() if p.dtype == torch.float32) / 2 * bf16
    needs["activations"] = max(trained * row, sampled * memory.sampled) * (1 if bf16 else 2)
    needs["other networks"] = sum(getattr(memory, part) for part in frozen) + others
    needs["CUDA"] = CUDA_GIB * (device != "cpu")
    total, parts = sum(needs.values()), ", ".join(f"{part} {value:.1f}" for part, value in needs.items() if value)
    print(f"expected peak: {total:.1f} GiB by count ({parts})")
    has = torch.cuda.get_device_properties(device).total_memory / 2**30 if device != "cpu" else math.inf
    if total > has:
        print(f"warning: more than the {has:.1f} GiB of this GPU; {less_memory(args)}")


def in_bf16(device, precision):
    """bf16 on CUDA, plain float32 elsewhere, unless --precision says otherwise."""
    return precision == "bf16" or (precision == "auto" and device != "cpu")


def autocast(device, precision):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=in_bf16(device, precision))


@functools.lru_cache(maxsize=4)
def shuffled(seed, count):
    """A permutation of range(count), a function of the seed: one epoch's order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def made_with(folder):
    """Digest of what a training was started with; its policy's digest joins the same record at the end."""
    about = read_json(Path(folder) / "settings.json", RECORD)
    return digest_of(about["settings"], about["inputs"])


def save_training(folder, step, model, optimizer):
    """checkpoint.pt: everything that the next step depends on besides the settings, which it is bound to."""
    if optimizer.state and optimizer.param_groups[0]["lr"] > 0:
        model.check_lora_moved()
    with open(Path(folder) / "log.jsonl", "rb") as stream:
        os.fsync(stream.fileno())  # the log never lacks what the checkpoint has
    state = dict(step=step, settings=made_with(folder))
    save_pt(Path(folder) / "checkpoint.pt", dict(state, model=model.trained_state(), optimizer=optimizer.state_dict()))


def resume_training(folder, model, optimizer, steps, rank, shown):
    """Loads checkpoint.pt if there is one, cuts log.jsonl back to it, and returns the number of steps done. shown:
    fields of the log that are read at the end."""
    file, log, step = Path(folder) / "checkpoint.pt", Path(folder) / "log.jsonl", 0
    if file.exists():
        advice = "remove it, or use another --out"
        moments = dict_of(with_fields(step=TENSOR, exp_avg=TENSOR, exp_avg_sq=TENSOR), lambda x: type(x) is int)
        fields = dict(step=INDEX, settings=TEXT, model=dict_of(TENSOR), optimizer=with_fields(state=moments))
        state = load_pt(file, fields, mmap=True)
        if state["settings"] != made_with(folder) or state["step"] > steps:
            stop(f"{file}: of another training than {folder}/settings.json; {advice}")
        own, wrong = {**optimizer.state_dict(), "state": state["optimizer"]["state"]}, f"is not of this model; {advice}"
        if state["model"].keys() != model.trained_state().keys():
            stop(f"{file}: {wrong}")
        load_weights(model, model.state_dict() | state["model"], file, wrong)
        load_weights(optimizer, own, file, wrong, finite=False)
        step, weights = state["step"], model.trainable_parameters()
        if any(optimizer.state[x]["exp_avg"].shape != x.shape for x in weights if step and x in optimizer.state):
            stop(f"{file}: {wrong}")
    if rank == 0:
        rows = read_jsonl(log, {"step": INDEX, **dict.fromkeys(shown, NUMBER)}, cut=True) if log.exists() else []
        rows = [row for row in rows if row["step"] < step]
        if [row["step"] for row in rows] != [*range(step)]:
            stop(f"{log}: lacks some of the {step} steps of checkpoint.pt; put it back, or remove the folder")
        write_jsonl(log, rows)
    barrier()
    return step


def output_folder(run, name):
    """run / name for --out: a folder name inside the run, nothing else."""
    taken = re.match(r"0[0-47-9]|scores$", name)
    if not file_name(name) or taken:
        stop(f"--out {name}: give a plain folder name, not one of another stage")
    if (Path(run) / name).exists() and not (Path(run) / name).is_dir():
        stop(f"--out {name}: is a file of this run; give a plain folder name")
    return Path(run) / name


def save_policy(run, out, model, run_json, **about):
    """policy.pt in the upstream's own format, and policy.json, from which stage 07 knows whose it is; says how stage 07
    evaluates it."""
    file = Path(run) / out / "policy.pt"
    model.save_policy(file)
    about = dict(model=run_json["model"], base_digest=run_json["checkpoint_digest"], **about, commit=commit())
    write_json(file.with_suffix(".json"), about | digits.used())
    seal(run, f"{out}/settings.json", [f"{out}/policy.pt"])
    asked = "" if out in ("05_flow_dpo", "06_ddpo") else f" --systems {out}"
    print(f"wrote {file}\nnext: python 07_evaluate.py --run-dir {run}{asked}")


# ------------------------------------------------------------------------------------------------------------
# Scorers, and the one store of what they said
# ------------------------------------------------------------------------------------------------------------

SILENT_PEAK = 1e-3  # of full scale, -60 dB

# Paper silent: which classes are "the category of human speech" (Sec. 2.1). These are VGGSound's in which people talk,
# spelled as among the 309 of MMAudio's sets/vgg-test.tsv; not singing, rapping, shouting, babbling, crowds and radios.
HUMAN_SPEECH_CLASSES = ("child speech, kid speaking", "female speech, woman speaking")
HUMAN_SPEECH_CLASSES += ("male speech, man speaking", "people whispering")
AUDIOSCORE_SCORERS = dict(imagebind="ib", clap="clap", synchformer="desync_s", panns="logits", pesq="pesq")  # 1 ... 5
MODEL = "model"  # beside the video towers' embeddings the store keeps a backbone's features, under this name


class Scorer:
    """One frozen scorer. Every set of them offers AUDIOSCORE_SCORERS, and what stage 07 needs besides."""

    sample_rate_hz: int
    files: tuple = ()  # below --weights
    gib = 0.0  # of its network and of 16 audios in it, counted as docs/cost.md says
    reads = None  # what of a clip its score depends on: None, "caption", "video" or "reference" (its sound and label)
    frames: tuple  # of one that reads "video": (frames per second, transform of a (3, H, W) uint8 picture)
    gives: str  # the one score of a scorer that reads the clip
    workers = 0  # processes that it may have

    def __init__(self, weights, device):
        """weights: folder of `files`."""

    def embed_clip(self, clip, frames=None):
        """What depends on the clip alone: text tower, PESQ's reference; video tower, of the frames that it wants, each
        transformed, for which it returns a float32 tensor. None where the score does not apply. May raise SkipClip."""
        return None

    def score_audio(self, waves, clips, sides):
        """waves: (B, S) float32 at sample_rate_hz; clips: B lines of clips.jsonl; sides: B results of embed_clip.
        Returns a dict of (B, ...) float32 tensors, nan where the score does not apply."""
        raise NotImplementedError

    def embed_clips(self, clips):
        """{clip id: side} of the clips that it can judge, for one that reads no video."""
        sides = {}
        for clip in clips:
            try:
                sides[clip["id"]] = self.embed_clip(clip)
            except SkipClip as reason:
                unjudged(clip, reason, type(self).__name__)
        return sides

    def __call__(self, waves, clips, sides):
        """`score_audio`, nan for clips that have no side. sides: {clip id: what `embed_clip` returned}."""
        rows = [i for i, clip in enumerate(clips) if clip["id"] in sides]
        if not rows:
            return {self.gives: torch.full((len(waves),), math.nan)}
        with torch.inference_mode():
            some = waves if len(rows) == len(clips) else waves[rows]
            scored = self.score_audio(some, [clips[i] for i in rows], [sides[clips[i]["id"]] for i in rows])
        everything = {key: torch.full((len(waves), *value.shape[1:]), math.nan) for key, value in scored.items()}
        for key, value in scored.items():
            everything[key][rows] = value.float().cpu()
        return everything


def unjudged(clip, reason, scorer):
    if isinstance(reason, NoFile):
        gone(clip["path"])
    tqdm.write(f"{clip['id']}: {reason}; {scorer} cannot use it", file=sys.stderr)


class Audio(NamedTuple):
    """An audio to score: the line of its clip, its file, the file's digest, and its group in the store."""

    clip: dict
    path: Path
    digest: str
    group: str


def gone(path):
    moved = "or tell stage 01 by --videos where it is now"
    stop(f"{path}: gone, though stage 01 found it; put it back and run the same command again, {moved}")


def stamp(path):
    """Size and time of a file that an earlier stage has used: enough to know it by, without opening it."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        gone(path)
    return f"{about.st_size}-{about.st_mtime_ns}"


def remembered(run, name, paths, fields, find=None):
    """{path: what find(path) says of it, a dict of `fields`}, kept in <run>/scores/<name>.json for as long as a file's
    size and time stay; of a file that is gone, for good. None is not kept; without find, all that is new is None."""
    memory, keys = Path(run) / "scores" / f"{name}.json", {path: str(Path(path).resolve()) for path in paths}
    now = {path: stamp(path) for path in keys if Path(path).exists()}
    kind = dict_of(with_fields(stamp=TEXT, **fields), short_path)

    def look():
        known = check({name: read_json(memory)}, {name: kind}, memory)[name] if memory.exists() else {}
        new = [p for p, key in keys.items() if key not in known or now.get(p) not in (None, known[key]["stamp"])]
        return known, new, {path: known.get(key) for path, key in keys.items()} | dict.fromkeys(new)

    known, new, about = look()  # the file is whole at any time: only who adds to it need wait for the others
    if find and new:
        with store_of(run), ThreadPoolExecutor(8) as readers:  # they wait for the disk more than for a core
            known, new, about = look()  # another process may have added them meanwhile
            about |= zip(new, tqdm(readers.map(find, new), desc=name, total=len(new), unit="file", disable=not new))
            found = {keys[path]: {"stamp": now[path], **about[path]} for path in new if about[path]}
            write_json(memory, known | found)
    return about


@contextmanager
def store_of(run):
    """While this process alone writes to the store."""
    folder = Path(run) / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    with STORE, take(run, "scores/.lock", "the store is used by"):
        if Path(run) not in UNLOCKED:  # else another process may be at work on such a file
            for file in folder.glob(".*.tmp*"):
                file.unlink(missing_ok=True)
        yield


def score_keys(run, audios, name, weights):
    """The key of each audio for one scorer: its digest, then that of all else that the score depends on, the scorer's
    weights and what it reads of the clip. Opens no media file."""
    reads, files, sides = scorers_of(run, weights).classes[name].reads, weights_digest(run, name, weights), {}

    def side(clip):
        if clip["id"] not in sides:
            parts = {"caption": [clip["caption"]], "reference": [clip["label"]]}.get(reads, [])
            parts = [*parts, stamp(clip["path"])] if reads in ("video", "reference") else parts
            sides[clip["id"]] = digest_of(name, files, parts)
        return sides[clip["id"]]

    return [audio.digest + side(audio.clip) for audio in audios]


def weights_digest(run, name, weights):
    """Of all files of a scorer."""
    scorers = scorers_of(run, weights)
    paths = [scorers.root / file for file in scorers.classes[name].files]
    weigh = lambda path: {"digest": digest(weight_file(scorers.root, path.relative_to(scorers.root)))}  # noqa: E731
    return "".join(about["digest"] for about in remembered(run, "weights", paths, dict(digest=TEXT), weigh).values())


def store_file(run, group, name):
    return Path(run) / "scores" / f"{group}.{name}.pt"


def add_to_store(run, file, keys, values):
    """keys: n strings; values: dict of (n, ...) tensors."""
    with store_of(run):  # two stages may fill one file
        if file.exists():
            known, old = read_store(file, {key: value.shape[1:] for key, value in values.items()})
            keys, values = known + keys, {key: torch.cat([old[key], value]) for key, value in values.items()}
        save_pt(file, {"keys": " ".join(keys), **values})  # one text is read faster than many


def see(run, clips, names, weights, ranks, workers, loaded=None, model=None):
    """The first pass: the video towers among these scorers, loaded together (or, by name, already), and a model's
    encoders embed what the store lacks, so that a video is decoded once. clips: {group: list of clips}."""
    scorers, clip_s = scorers_of(run, weights), read_run(run)["clip_s"]
    names = [MODEL] * bool(model) + [name for name in names if scorers.classes[name].reads == "video"]
    known = {name: embedded(run, clips, name, weights, model) for name in names}
    lacks = {name: {c["id"] for part in clips.values() for c in part} - of.keys() for name, of in known.items()}
    names = [name for name in names if lacks[name]]
    new = {group: [c for c in part if any(c["id"] in lacks[name] for name in names)] for group, part in clips.items()}
    todo = [clip for part in new.values() for clip in part]
    load = loaded.get if loaded else lambda name: load_scorer(name, run, ranks.device, weights)
    towers = {name: load(name) for name in names if name != MODEL}
    keys = {name: video_keys(run, todo, name, weights, model) for name in names}
    frames = [*dict.fromkeys(tower.frames for tower in towers.values())]  # once for towers that want the same
    read = model.read if MODEL in names else lambda clip, others: read_frames(clip["path"], others, clip_s)
    videos = read_ahead(lambda clip: read(clip, frames), todo, workers)
    bar = tqdm(total=len(todo), desc="see", unit="video", disable=ranks.rank > 0 or not todo)
    with closing(videos), bar:
        for group, part in new.items():
            made = {name: {} for name in names}
            for clip, seen in zip(part, videos):
                bar.update()
                if isinstance(seen, SkipClip):
                    unjudged(clip, seen, ", ".join(name for name in names if clip["id"] in lacks[name]))
                    continue
                own, shown = seen[: len(seen) - len(frames)], dict(zip(frames, seen[len(seen) - len(frames) :]))
                if clip["id"] in lacks.get(MODEL, ()):
                    made[MODEL][keys[MODEL][clip["id"]]] = model.encode(clip, own)
                for name, tower in towers.items():
                    if clip["id"] in lacks[name]:
                        with torch.inference_mode():
                            embedding = tower.embed_clip(clip, shown[tower.frames])
                        made[name][keys[name][clip["id"]]] = {"embedding": embedding}
            for name, rows in made.items():
                if rows:
                    values = [*rows.values()]
                    values = {key: torch.stack([row[key] for row in values]) for key in values[0]}
                    add_to_store(run, store_file(run, group, f"{name}_video"), [*rows], values)
    barrier()


def fill_store(run, audios, names, weights, ranks=Ranks(), workers=0):  # noqa: B008, a constant
    """Scores what the store lacks, one network in memory at a time (tiny ones together), groups divided over the ranks.
    A failure is never stored. audios: list of Audio; names: scorers; workers: processes for video and PESQ."""
    scorers, clip_s, work = scorers_of(run, weights), read_run(run)["clip_s"], defaultdict(dict)
    groups, clips = list(dict.fromkeys(audio.group for audio in audios))[ranks.rank :: ranks.world], {}
    for name in names:
        wanted = {group: {} for group in groups}
        for audio, key in zip(audios, score_keys(run, audios, name, weights)):
            wanted.get(audio.group, {}).setdefault(key, audio)  # equal audio of two systems is scored once
        for group, new in wanted.items():
            file = store_file(run, group, name)
            for key in read_store(file)[0] if file.exists() else ():
                new.pop(key, None)
            if new:
                work[name][group] = new
                clips.setdefault(group, {}).update((audio.clip["id"], audio.clip) for audio in new.values())
        for file in scorers.classes[name].files if work[name] else ():
            weight_file(scorers.root, file)  # a missing file is said now, not after hours of the other scorers
    names = [name for name in names if work[name]]
    see(run, {group: [*part.values()] for group, part in clips.items()}, names, weights, ranks, workers)

    def score(names):
        """By these scorers side by side: what they hear is read once for each of their sample rates."""
        loaded, parts = {name: load_scorer(name, run, ranks.device, weights, workers) for name in names}, []
        key_of = {name: {a.path: key for new in work[name].values() for key, a in new.items()} for name in names}
        for group in groups:
            lacking = [*{a.path: a for name in names for a in work[name].get(group, {}).values()}.values()]
            parts += [(group, lacking[i : i + 20]) for i in range(0, len(lacking), 20)]
        rates = {scorer.sample_rate_hz for scorer in loaded.values()}
        read = lambda part: {rate: read_waves(part, rate, clip_s) for rate in rates}  # noqa: E731
        waves = in_threads(read, [part for _, part in parts], max(2, workers))

        def look(name, group):
            clips = {audio.clip["id"]: audio.clip for audio in work[name].get(group, {}).values()}
            return sides_of(run, loaded[name], name, {group: clips.values()}, weights)

        def judge(name, part, heard):
            rows = [i for i, audio in enumerate(part) if audio.path in key_of[name]]
            bar.update(len(rows))
            rows = [i for i in rows if part[i].clip["id"] in sides[name]]
            if rows:
                own = heard[loaded[name].sample_rate_hz]
                own = own if len(rows) == len(part) else own[rows]
                scored[name].append(loaded[name](own, [part[i].clip for i in rows], sides[name]))
                keys[name] += [key_of[name][part[i].path] for i in rows]

        for group, batches in itertools.groupby(parts, key=lambda part: part[0]):
            sides = dict(zip(names, pool.map(look, names, itertools.repeat(group))))
            keys, scored = defaultdict(list), defaultdict(list)
            for _, part in batches:
                list(pool.map(judge, names, itertools.repeat(part), itertools.repeat(next(waves))))
            for name, made in scored.items():
                scores = {key: torch.cat([one[key] for one in made]) for key in made[0]}
                add_to_store(run, store_file(run, group, name), keys[name], scores)

    total = sum(len(new) for groups in work.values() for new in groups.values())
    bar = tqdm(total=total, desc="score", unit="score", disable=ranks.rank > 0 or not total)
    with bar, ThreadPoolExecutor(scorers.at_a_time) as pool:
        for i in range(0, len(names), scorers.at_a_time):
            score(names[i : i + scorers.at_a_time])
            if ranks.device != "cpu":
                torch.cuda.empty_cache()
    barrier()


def sides_of(run, scorer, name, clips, weights):
    """{clip id: what `embed_clip` returned} of the clips that a scorer can judge, by `see` where it reads the video.
    clips: {group: clips}."""
    if scorer.reads == "video":
        return {clip: row["embedding"] for clip, row in embedded(run, clips, name, weights).items()}
    return scorer.embed_clips([clip for part in clips.values() for clip in part])


def embedded(run, clips, name, weights, model=None):
    """What the store knows of these videos: {clip id: {key: embedding}}, memory-mapped. clips: {group: clips}."""
    found, key_of = {}, video_keys(run, [clip for part in clips.values() for clip in part], name, weights, model)
    for group, part in clips.items():
        file = store_file(run, group, f"{name}_video")
        shapes = model.feature_shapes if name == MODEL else {"embedding": None}
        keys, stored = read_store(file, shapes) if file.exists() else ([], {})
        place = {key: row for row, key in enumerate(keys)}
        known = {clip["id"]: place[key_of[clip["id"]]] for clip in part if key_of[clip["id"]] in place}
        found |= {clip: {key: value[row] for key, value in stored.items()} for clip, row in known.items()}
    return found


def video_keys(run, clips, name, weights, model=None):
    """{clip id: digest of what the embedding of its video depends on}."""
    if name == MODEL:
        return {c["id"]: digest_of(model.checkpoint_digest, c["caption"], model.stamp_of(c)) for c in clips}
    files = weights_digest(run, name, weights)
    return {clip["id"]: digest_of(name, files, stamp(clip["path"])) for clip in clips}


def read_waves(audios, sample_rate_hz, clip_s):
    """list of Audio -> (B, S) float32, the first clip_s seconds of each."""
    waves = []
    for audio in audios:
        try:
            waves.append(read_audio(audio.path, sample_rate_hz, clip_s))
        except SkipClip as reason:
            stop(f"{audio.path}: {reason}; the audio of {audio.clip['id']} cannot be judged, make or copy it again")
    return torch.stack(waves)


def stored_scores(run, audios, names, weights):
    """What the store knows of these audios, in their order: {scorer: {key: (n, ...) float32}}, nan where a scorer could
    not judge."""
    found, scorers = {}, scorers_of(run, weights)
    for name in names:
        used = {key for _, scorer, key in scorers.measures.values() if scorer == name}
        shapes = dict.fromkeys(filter(None, [*used, AUDIOSCORE_SCORERS.get(name)]))
        rows, values = defaultdict(list), {}
        for i, (audio, key) in enumerate(zip(audios, score_keys(run, audios, name, weights))):
            rows[audio.group].append((i, key))
        for group, wanted in rows.items():
            file = store_file(run, group, name)
            keys, stored = read_store(file, shapes) if file.exists() else ([], {})
            place = {key: row for row, key in enumerate(keys)}
            known = [(i, place[key]) for i, key in wanted if key in place]
            for key, value in stored.items():
                shapes[key], some = value.shape[1:], value[[row for _, row in known]]
                if some.isinf().any():
                    stop(f"{file}: holds an infinite score; remove it and run the stage again")
                values.setdefault(key, torch.full((len(audios), *shapes[key]), math.nan))
                values[key][[i for i, _ in known]] = some
        found[name] = values or {scorers.classes[name].gives: torch.full((len(audios),), math.nan)}
    return found


def read_store(file, shapes=None):
    """The keys of a file of the store, and its (n, ...) tensors, memory-mapped. shapes: the shape of a row, or None, of
    those that must be there."""
    shapes = shapes or {}
    stored = load_pt(file, {"keys": TEXT, **dict.fromkeys(shapes, FLOATS)}, mmap=True)
    keys = stored.pop("keys").split()
    for key, value in stored.items():
        if not FLOATS.holds(value) or len(value) != len(keys) or shapes.get(key) not in (None, value.shape[1:]):
            stop(f"{file}: '{key}' does not fit the other scores; remove it and run the stage again")
    return keys, stored


def listen(run, paths, seconds, ranks):
    """{path: peak of its first `seconds`}, None without a track that can be decoded to there, so that a damaged packet
    stops no evaluation."""

    def peak(path):
        try:
            return {"peak": decode_audio(path, seconds)[0].nan_to_num().abs().max().item()}
        except NoFile:
            gone(path)
        except NoAudio:
            return {"peak": None}  # a silent film
        except SkipClip as reason:
            tqdm.write(f"{path}: {reason}; no usable audio track", file=sys.stderr)  # and never remembered

    if ranks.rank == 0:
        remembered(run, "heard", paths, dict(peak=maybe(NUMBER)), peak)
    barrier()
    heard = remembered(run, "heard", paths, dict(peak=maybe(NUMBER)))
    return {path: about and about.get("peak") for path, about in heard.items()}


def five_scores(found, audioscore):
    """The vector of Sec. 2.1 for each audio, (n, 5) float32 in the order of SCORES, nan where one does not apply."""
    columns = {name: found[name][key] for name, key in AUDIOSCORE_SCORERS.items()}
    if columns["panns"].shape[1:] != audioscore.p_y.shape:
        stop("02_audioscore.pt: fitted with another tagger than scores/*.panns.pt; rerun 02_fit_audioscore.py --redo")
    return torch.stack([*(columns | {"panns": audioscore.inception(columns["panns"])}).values()], dim=1)


def score_line(clip, k, scores, **more):
    """A line of 02_scores.jsonl or 03_scores/*.jsonl; scores: (5,) with nan where one does not apply."""
    numbers = {name: None if math.isnan(value) else round(value, 6) for name, value in zip(SCORES, scores.tolist())}
    return {"clip": clip, "k": k, **numbers, **more}


# ------------------------------------------------------------------------------------------------------------
# Loaders: a backbone or a scorer is one file in adapters/ and one line here (docs/adapters.md)
# ------------------------------------------------------------------------------------------------------------

ADAPTERS = {"toy": "00_toy_world", "mmaudio": "adapters.mmaudio", "frieren": "adapters.frieren"}
SCORERS = {"toy": ("00_toy_world",), "real": ("adapters.scorers",)}  # sets; run.json names its own, if not the real one


def adapter_of(name):
    """The class of a model, and its variant. name: `toy`, `mmaudio:<variant>` or `frieren`."""
    family, _, variant = name.partition(":")
    if family not in ADAPTERS:
        stop(f"--model {name}: unknown; choose toy, mmaudio:small_16k ... mmaudio:large_44k, or frieren")
    return importlib.import_module(ADAPTERS[family]).ADAPTER, variant


def files_of(name, checkpoint):
    """Names below --weights of all that the stages will read with this model."""
    adapter, variant = adapter_of(name)
    own = adapter.files(variant)
    scorers = scorer_set("real", "").classes.values() if own else ()
    return own[bool(checkpoint) :] + [file for scorer in scorers for file in scorer.files]


def load_model(name, checkpoint=None, device="cpu", weights="weights"):
    """checkpoint: the velocity network's weights, None for the upstream file under `weights`. Returns a FlowModel in
    eval mode."""
    adapter, variant = adapter_of(name)
    model = adapter(variant, checkpoint, Path(weights))
    model.name, model.checkpoint_digest = name, digest(model.checkpoint)
    return model.to(device).eval()


def load_base_model(run, device="cpu", weights="weights"):
    """The model that stage 01 sampled from, its weights checked against run.json."""
    run_json = read_run(run)
    checkpoint = None
    if run_json["checkpoint"] != "upstream":
        checkpoint = Path(run) / run_json["checkpoint"]
        if not checkpoint.exists():
            stop(f"{checkpoint}: gone; put it back, or give 01_generate.py the --checkpoint that has moved")
    model = load_model(run_json["model"], checkpoint, device, weights)
    if model.checkpoint_digest != run_json["checkpoint_digest"]:
        stop(f"{model.checkpoint}: not the file that stage 01 sampled from (its digest differs); put that one back")
    return model


class ScorerSet(NamedTuple):
    classes: dict  # name: Scorer
    measures: dict  # what stage 07 makes of them; metric: (mean, fd, kl or is; scorer; key)
    judges: tuple  # scorers that stage 07 asks only when told to
    at_a_time: int  # how many networks work side by side
    root: Path  # the folder of their files


def scorers_of(run, weights):
    """The set of frozen scorers that judges this run."""
    about = read_run(run)
    root = Path(run) / about["scorers_root"] if "scorers_root" in about else Path(weights)
    return scorer_set(about.get("scorers", "real"), root)


def scorer_set(name, root):
    modules = [importlib.import_module(module) for module in SCORERS[name]]
    classes, measures = {}, {}
    for module in modules:
        classes, measures = classes | module.SCORERS, measures | module.MEASURES
    judges = tuple(name for module in modules for name in getattr(module, "JUDGES", ()))
    return ScorerSet(classes, measures, judges, min(module.AT_A_TIME for module in modules), root)


def load_scorer(name, run, device="cpu", weights="weights", workers=0):
    scorers = scorers_of(run, weights)
    scorer = scorers.classes[name](scorers.root, device)
    scorer.workers = workers
    return scorer


def weight_file(weights, name):
    """weights / name, or one line that says what is missing and where it comes from: its row of docs/weights.md."""
    path = Path(weights) / name
    if not path.exists():
        source, size, use = weight_row(name)
        stop(f"{path}: missing ({use}); get {name} ({size}) from {source} and put it into {weights}/")
    return path


def weight_row(name):
    """Source, size and use of a file, from docs/weights.md."""
    table = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    row = next((line for line in table.splitlines() if line.startswith(f"| `{name}` |")), f"| {name} | | | |")
    return [cell.strip() for cell in row.strip("|").split("|")][1:4]


def print_missing(weights, names):
    """The files among these that are not below --weights, with what docs/weights.md says of them, and their size."""
    missing = [(name, *weight_row(name)) for name in dict.fromkeys(names) if not (Path(weights) / name).exists()]
    in_gb, gb = dict(kB=1e-6, KB=1e-6, MB=1e-3, GB=1, MiB=2**20 / 1e9, GiB=2**30 / 1e9), 0
    for name, source, size, use in missing:
        print(f"  {name} ({size}), {use}: {source}")
        gb += sum(float(number) * in_gb[unit] for number, unit in re.findall(r"([\d.]+) ([kKMG]i?B)", size))
    if missing:
        print(f"missing below {weights}/: {len(missing)} files, {gb:.1f} GB in all")


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
        advice = "install it (docs/mmaudio.md, docs/frieren.md), or set UPSTREAM_DIR to the folder of its clone"
        stop(f"{repository}: cannot import {error.name}; {advice}")
    finally:
        if path:
            sys.path.remove(path)
