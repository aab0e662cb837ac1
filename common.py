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

import copy
import functools
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio

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


def flow_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta):
    """Eq. 5 for each pair; no model, no randomness. err_*: (B,) float32, `flow_error` of policy and reference.

    The printed brackets would subtract the loser's gap outside beta/2, which pulls towards the loser too and
    contradicts the paragraph below Eq. 5; we use Eq. 4's: -log sigmoid(-beta/2 (W - L)).
    Returns loss (B,), log 2 where policy equals reference, and logits (B,), positive where the policy already
    prefers the winner (the implicit reward's margin).
    """
    gap_w = err_w - ref_err_w  # W, below 0 where the policy fits the winner better than the reference does
    gap_l = err_l - ref_err_l  # L
    logits = -0.5 * beta * (gap_w - gap_l)
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
        """scores: (B, 5) -> p: (B, 3), each row sums to 1."""
        return self.logits(scores).softmax(dim=-1)

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
    projected once. Returns a_0 (R * B, T, C) float32 on the model's device.
    """
    conditions = model.project(features)
    a_t = initial_noise(model, seeds)
    times = torch.linspace(1, 0, steps + 1)
    for t, t_next in zip(times[:-1], times[1:]):
        u = model.velocity(a_t, model.snap_t(t).expand(len(a_t)).to(a_t), conditions, guidance)
        a_t = a_t + (t_next - t).item() * u.float()
    return a_t


# ------------------------------------------------------------------------------------------------------------
# The interface of a backbone: what toy, MMAudio and Frieren offer to the stages
# ------------------------------------------------------------------------------------------------------------


class FlowModel(nn.Module):
    """A V2A flow model in the paper's convention (t = 1 noise, v = eps - a_0). Adapters flip time and sign, nobody else.

    Registered parameters are those of the velocity network: everything that maps features and a_t to u, condition
    projections included. Null-condition parameters are frozen. Encoders and codec are loaded on first use and are no
    submodules, so that copying, training and saving never touch them.
    """

    name: str  # as given to load_model
    latent_shape: tuple  # (T, C)
    sample_rate_hz: int
    clip_s: float  # seconds of video that one audio belongs to

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
    model.name = name
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------------
# Files and failure
# ------------------------------------------------------------------------------------------------------------


def stop(message):
    """A user error: one line that says what is wrong and what to do, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        stop(f"{path}: cannot be read as a .pt file of plain tensors ({reason[:160]}); make it anew or copy it again")


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
    with replacing(path) as temporary:
        torch.save(value, temporary)


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
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            stop(f"{path}, line {number}: not valid JSON{hint}")
        for field in fields:
            if not isinstance(row, dict) or field not in row:
                stop(f"{path}, line {number}: field '{field}' is missing{hint}")
        rows.append(row)
    return rows


def digest(path):
    """SHA-256 of a file, or of a folder's .jsonl files in order of their names; the first 16 hex digits."""
    path, total = Path(path), hashlib.sha256()
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
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


def claim(record, settings, inputs=(), redo=False, advice="use --redo to replace it"):
    """One record of settings per output: `record` is its json file, `inputs` the files it is made from.

    The first call writes it; a later one with other settings, or with inputs that changed meanwhile, prints the
    difference and stops, so that nothing is ever half made with other settings. `redo` replaces the record.
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
                    was = f"made with {key}={before.get(key)}, now {now.get(key)}" if part == "settings" else f"{key} has changed since"
                    stop(f"{record.parent if record.name == 'settings.json' else record}: {was}; {advice}")
    write_text(record, json.dumps(new, indent=1) + "\n")


def run_of(record):
    """The run folder of a record: `<run>/NN_settings.json` or `<run>/<folder>/settings.json`."""
    return record.parent if record.name != "settings.json" else record.parent.parent


STAGES = {
    "01": "01_generate.py",
    "02": "02_fit_audioscore.py",
    "03": "03_mine_pairs.py",
    "04": "04_curriculum_split.py",
    "05": "05_train_flow_dpo.py",
    "06": "06_ddpo_baseline.py",
}


def check_chain(run, *stages):
    """Stops when a stage's outputs are missing or were made from files that have changed since."""
    for stage in stages:
        record = Path(run) / f"{stage}_settings.json"
        if not record.exists():
            stop(f"{record}: no such file; run {STAGES[stage]} --run {run} first")
        for name, was in read_json(record)["inputs"].items():
            path = Path(run) / name
            if not path.exists():
                stop(f"{path}: missing, but stage {stage} was made from it; rerun the stage that writes it")
            if digest(path) != was:
                stop(f"{path}: changed after stage {stage} read it; rerun {STAGES[stage]} --run {run} --redo")


def read_run(run):
    """run.json of a run folder; stops when the folder is missing."""
    run = Path(run)
    if not run.is_dir():
        stop(f"--run {run}: no such folder; stage 01 (or 00 for the toy world) creates it")
    return read_json(run / "run.json", hint="; run 01_generate.py (or 00_toy_world.py) first")


def read_clips(run, split=None):
    """Lines of clips.jsonl, in order, each with `path` (absolute, checked to lie below the video root)."""
    run = Path(run)
    file, root, clips = run / "clips.jsonl", read_run(run)["video_root"], []
    root = Path(root) if Path(root).is_absolute() else run / root
    for number, clip in enumerate(read_jsonl(file, ("id", "video", "split"), "; rerun 01_generate.py"), 1):
        if split is None or clip["split"] == split:
            clips.append(dict(clip, path=inside(root, clip["video"], f"{file}, line {number}, field 'video'")))
    return clips


def read_samples(run):
    """Every audio of stage 01: {clip id: [line, ...]} in order of k; each line gains `shard` (a path stem)."""
    samples = {}
    for file in sorted((Path(run) / "01_samples").glob("[0-9]*.jsonl")):
        if not file.name.endswith(".skipped.jsonl"):
            for row in read_jsonl(file, ("clip", "k", "seed", "wav", "row"), "; remove the shard and rerun 01_generate.py"):
                samples.setdefault(row["clip"], []).append(dict(row, shard=file.stem))
    if not samples:
        stop(f"{Path(run) / '01_samples'}: no generated audio; run 01_generate.py --run {run} first")
    return samples


def parse(parser, argv, stage):
    """parser.parse_args; on a toy run, TOY[size][stage] replaces the paper's defaults (an explicit flag wins)."""
    args = parser.parse_args(argv)
    file = Path(args.run) / "run.json"
    run = read_json(file) if file.is_file() else {}
    size = getattr(args, "size", None) or run.get("size")
    toy = TOY.get(size, {}).get(stage, {})
    paper = {key: parser.get_default(key) for key in toy}
    parser.set_defaults(**toy)
    args = parser.parse_args(argv)
    changed = [f"{key} {paper[key]} -> {value}" for key, value in toy.items() if getattr(args, key) == value != paper[key]]
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print(f"toy world ({size}): {', '.join(changed)}")
    return args


# The toy world's replacements for the paper's numbers, chosen on its val split: {size: {stage: {argument: value}}}.
TOY = {
    "default": {
        "01": dict(guidance=1.5, sampling_steps=12),
        "02": dict(num_rated_clips=150),
        "03": dict(num_human_pairs=100),
        "05": dict(lr=1e-4, warmup=20, steps=250, global_batch=16, beta=20.0),
        "06": dict(lr=3e-4, steps=60, prompts=16, group_size=8, sampling_steps=10),
        "07": dict(guidance=1.5),
    },
    "tiny": {
        "01": dict(guidance=1.5, sampling_steps=4),
        "02": dict(num_rated_clips=6),
        "03": dict(num_human_pairs=4),
        "05": dict(lr=1e-4, warmup=2, steps=8, global_batch=4, beta=20.0),
        "06": dict(lr=3e-4, steps=2, prompts=2, group_size=3, sampling_steps=4),
        "07": dict(guidance=1.5),
    },
}

# ------------------------------------------------------------------------------------------------------------
# torch.distributed
# ------------------------------------------------------------------------------------------------------------


def setup_ranks():
    """(rank, world, device) under torchrun or alone; nccl on CUDA, gloo elsewhere."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
    return rank, world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------------------------------
# Video and audio
# ------------------------------------------------------------------------------------------------------------


def read_frames(path, wanted, duration_s):
    """Decodes a video once for several consumers. wanted: [(fps, transform), ...]; transform takes one frame
    (H, W, 3) uint8 tensor and returns a tensor. Output i of a consumer is the first frame shown at or after i / fps,
    duration_s * fps of them (MMAudio's rule, but the last frame is held for its own length). Returns a list of stacked
    tensors. Raises SkipClip for a missing, unreadable, video-less or short file.
    """
    counts = [round(duration_s * fps) for fps, _ in wanted]
    taken, reformat, t, length = [[] for _ in wanted], av.video.reformatter.VideoReformatter(), None, 0.0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SkipClip("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length = 1.0 / float(stream.average_rate or 25)
            start = None
            for frame in container.decode(stream):
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
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise SkipClip("no audio stream")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            frames = [out.to_ndarray() for frame in container.decode(stream) for out in planar.resample(frame)]
            frames += [out.to_ndarray() for out in planar.resample(None)]
            rate = stream.rate
    except FileNotFoundError:
        raise SkipClip("no such file") from None
    except (av.error.FFmpegError, OSError) as error:
        raise SkipClip(f"unreadable audio ({getattr(error, 'strerror', None) or type(error).__name__})") from None
    if not frames:
        raise SkipClip("empty audio stream")
    wave = torch.from_numpy(np.concatenate(frames, axis=1).mean(axis=0))
    if rate != sample_rate_hz:
        wave = torchaudio.functional.resample(wave, rate, sample_rate_hz)
    return wave if duration_s is None else fit_length(wave, round(duration_s * sample_rate_hz))


def fit_length(wave, samples):
    """Cut or zero-padded along the last dimension."""
    return F.pad(wave[..., :samples], (0, max(0, samples - wave.shape[-1])))


def write_audio(path, wave, sample_rate_hz):
    """wave: (S,) float32, clipped to [-1, 1] (what is not finite becomes 0) -> 16-bit wav."""
    with replacing(path) as temporary:
        soundfile.write(temporary, torch.nan_to_num(wave.float(), 0, 0, 0).clamp(-1, 1).numpy(), sample_rate_hz, subtype="PCM_16")


# ------------------------------------------------------------------------------------------------------------
# The interface of a scorer, and how the stages score
# ------------------------------------------------------------------------------------------------------------


class Scorer:
    """One frozen scorer. The toy world and the real networks offer the same names: imagebind, clap, synchformer,
    panns, pesq (AudioScore's five) and, for evaluation only, panns_16k and passt."""

    sample_rate_hz: int

    def __init__(self):
        self.memo = {}  # clip id -> embedding of its video or caption

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
                self.memo[clip["id"]] = self.clip_side(clip)
        with torch.inference_mode():
            scored = self.audio_side(waves, clips, [self.memo[clip["id"]] for clip in clips])
        return {key: value.detach().clone().float().cpu() for key, value in scored.items()}


AUDIOSCORE_SCORERS = ("imagebind", "clap", "synchformer", "panns", "pesq")


def load_scorer(name, run, device="cpu", weights="weights"):
    """name: one of the names above; run: the run folder, whose run.json says whether the toy world's scorers or the
    real ones judge it."""
    toy = read_run(run).get("scorers")
    if toy:
        return toy_world().load_scorer(name, Path(run) / toy)
    return SCORERS[name](Path(weights), device)


def toy_world():
    """The embedded default, loaded late like any other upstream package."""
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
        stop(f"{repository}: cannot import {error.name}; install it as the README says, or set UPSTREAM_DIR to the folder of its clone")
    finally:
        if path:
            sys.path.remove(path)


# ============================================================================================================
# Box: the toy world as a backbone
# ============================================================================================================


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
    "synchformer_state_dict.pth": (MMAUDIO_PARTS, "907 MiB", "Synchformer, MMAudio's video features and DeSync"),
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
        self.variant, self.weights, self.mode = variant, Path(weights), variant.split("_")[1]
        self.sample_rate_hz = {"16k": 16000, "44k": 44100}[self.mode]
        checkpoint = checkpoint or weight_file(self.weights, f"mmaudio_{variant}.pth")
        self.net, self.conditions_class = networks.get_my_mmaudio(variant), networks.PreprocessedConditions
        self.latent_shape = (self.net.latent_seq_len, self.net.latent_dim)
        for parameter in (self.net.empty_clip_feat, self.net.empty_sync_feat):
            parameter.requires_grad_(False)  # null conditions; upstream itself freezes the third, empty_string_feat
        self.load_policy(checkpoint)
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


# ============================================================================================================
# Box: the real scorers
# ============================================================================================================


ADAPTERS = {"mmaudio": MMAudio}
SCORERS = {}
