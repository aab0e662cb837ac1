"""What 05 and 06 share besides the method: shards of latents, precision, adapters of low rank,
ranks, checkpoints."""

import copy
import functools
import os
import random
import re
import zlib
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint

from plumbing import digits, files, ranks, record, rows, speed
from plumbing.files import ROOT, stop

# --------------------------------------------------------------------------------------------------
# Shards: stage 01's latents and features
# --------------------------------------------------------------------------------------------------


def crc32(row):
    """Of a tensor's bytes, as an integer."""
    return zlib.crc32(row.contiguous().view(torch.uint8).numpy())


def save_shard(file, latents, features, digests):
    """latents: (rows, T, C); features: dict of (clips, ...); digests: of the rows' wavs. Every row
    gets its CRC-32, since nobody reads such a file as a whole."""
    checksums = {"latents": [crc32(row) for row in latents]}
    for name, values in features.items():
        checksums[name] = [crc32(row) for row in values]
    files.save_pt(
        file, {"latents": latents, "features": features, "digests": digests, "crc32": checksums}
    )


class Shards:
    """Stage 01's latents and features, memory-mapped: memory does not grow with the data set. A row
    is checked whenever it is read: a disk that loses a part of a file says nothing."""

    def __init__(self, run, samples, model):
        self.folder = Path(run) / "01_samples"
        self.latent_shape = model.latent_shape
        self.feature_shapes = model.feature_shapes
        self.opened = {}
        self.digests = defaultdict(list)  # {shard: of its audios, in order}
        self.clips = defaultdict(list)  # {shard: its clips, in order}
        self.place_of_audio = {}  # {(clip, k): (shard, row of its latent)}
        self.place_of_clip = {}  # {clip: (shard, row of its features)}
        for clip, audios in samples.items():
            shard = audios[0].shard
            self.place_of_clip[clip] = shard, len(self.clips[shard])
            self.clips[shard].append(clip)
            for audio in audios:
                self.place_of_audio[clip, audio.k] = shard, audio.row
                self.digests[shard].append(audio.digest)

    def latents(self, audios):
        """[(clip, k), ...] -> (B, T, C) float32."""
        found = []
        for clip, k in audios:
            shard, row = self.place_of_audio[clip, k]
            found.append(self.checked(shard, "latents", row, clip))
        return torch.stack(found).float()

    def features(self, clips, device="cpu"):
        """[clip, ...] -> dict of (B, ...) float32 on the device."""
        found = defaultdict(list)
        for clip in clips:
            shard, row = self.place_of_clip[clip]
            for name in self.feature_shapes:
                found[name].append(self.checked(shard, name, row, clip))
        return {
            name: torch.stack(values).to(device, non_blocking=True)
            for name, values in found.items()
        }

    def feature(self, clip, name):
        """One of a clip's features, on the CPU."""
        shard, row = self.place_of_clip[clip]
        return self.checked(shard, name, row, clip)

    def checked(self, shard, name, row, clip):
        """A row of a shard's latents or of one of its features."""
        tensors = self.open(shard)
        values = tensors["latents"] if name == "latents" else tensors["features"][name]
        if crc32(values[row]) != tensors["crc32"][name][row]:
            wrong = f"{name} of clip {clip} are not what stage 01 wrote (a bad disk or copy)"
            stop(f"{self.folder / shard}.pt: {wrong}; {self.again(shard)}")
        return values[row]

    def open(self, shard):
        if shard not in self.opened:
            file = self.folder / f"{shard}.pt"
            tensors = files.load_pt(
                file, {"latents": torch.Tensor, "features": dict, "digests": list}, mmap=True
            )
            if "crc32" not in tensors:
                stop(f"{file}: made by an older version, without checksums; {self.again(shard)}")
            if not self.fits(tensors, shard):
                stop(f"{file}: not of the audios in {shard}.jsonl; {self.again(shard)}")
            self.opened[shard] = tensors
        return self.opened[shard]

    def fits(self, tensors, shard):
        """Whether a shard's tensors are of the audios in its .jsonl, and of this model."""
        audios = len(self.digests[shard])
        clips = len(self.clips[shard])
        wanted = {"latents": (audios, *self.latent_shape)}
        for name, shape in self.feature_shapes.items():
            wanted[name] = (clips, *shape)
        named = {"latents": tensors["latents"], **tensors["features"]}
        if any(
            not torch.is_tensor(value) or not value.is_floating_point() for value in named.values()
        ):
            return False
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        sums = tensors["crc32"] if isinstance(tensors["crc32"], dict) else {}
        counted = {name: len(found) for name, found in sums.items() if isinstance(found, list)}
        rows_of = {name: shape[0] for name, shape in wanted.items()}
        return tensors["digests"] == self.digests[shard] and shapes == wanted and counted == rows_of

    def again(self, shard):
        return f"remove both {shard}.pt and {shard}.jsonl, rerun 01_generate.py"


@functools.lru_cache(maxsize=4)
def shuffled(seed, count):
    """A permutation of range(count), a function of the seed: one epoch's order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# --------------------------------------------------------------------------------------------------
# Precision, memory, ranks
# --------------------------------------------------------------------------------------------------


def in_bf16(device, precision):
    """bf16 on CUDA, plain float32 elsewhere, unless --precision says otherwise."""
    return precision == "bf16" or (precision == "auto" and device != "cpu")


def autocast(device, precision="auto"):
    return torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=in_bf16(device, precision)
    )


def frozen_copy(model, bf16, to_compile=False):
    """u_ref: a copy that no optimizer knows. bf16 halves its memory: of the weights of linear and
    convolution layers, which autocast rounds at every use, only the rounded values are kept; norms
    and time embeddings stay float32. It needs gradients where it is to be compiled into the
    policy's graph (speed.compile_blocks), which nobody then asks for."""
    copied = copy.deepcopy(model).eval()
    if not to_compile:
        copied.requires_grad_(False)
    if bf16:
        round_weights(copied)
    return copied


def round_weights(model):
    """Of linear and convolution layers keeps what autocast rounds their weights to at every use."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.to(torch.bfloat16)


def only_sample(model, compiled):
    """For a process that samples and does not train: faster, the same numbers but for rounding."""
    if in_bf16(model.device.type, "auto"):
        round_weights(model)
        torch.backends.cudnn.benchmark = True  # its shapes recur for hours
    if compiled:
        speed.compile_models(model)


def checkpoint_blocks(*models):
    """Trades time for memory: every block's activations are recomputed in the backward pass."""
    for model in models:
        for block in model.blocks():
            block.forward = functools.partial(
                torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
            )


def data_parallel(model, device):
    """The module whose forward 05 and 06 train: the model itself, or its
    DistributedDataParallel."""
    if not dist.is_initialized():
        return model
    devices = None if device == "cpu" else [device]
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, **options)


def sum_dict_over_ranks(sums):
    """{name: tensor}, all of one shape -> their sums over the ranks, on the CPU, in one
    exchange."""
    stacked = torch.stack(list(sums.values()))
    return dict(zip(sums, ranks.sum_over_ranks(stacked).cpu()))


def read_step(sums, grad_norm):
    """What a step logs: its sums as above, and the norm of its gradient, a float. The one copy for
    which the host waits in a step: until then it is ahead of the device."""
    stacked = ranks.sum_over_ranks(torch.stack(list(sums.values())))
    found = torch.cat([stacked.flatten(), grad_norm.to(stacked).view(1)]).cpu()
    return dict(zip(sums, found[:-1].view(stacked.shape))), found[-1].item()


def peak_gb(device):
    """Of this process's GPU so far, in GiB; None on a CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30


# --------------------------------------------------------------------------------------------------
# Adapters of low rank
# --------------------------------------------------------------------------------------------------


class Lora:
    """Adapters of one rank on every linear and convolution layer, trained instead of the weights.
    They begin at zero: the network is what it was. bf16 halves the memory of the weights below
    them, as in `frozen_copy`; the float32 ones wait on the CPU to be merged."""

    def __init__(self, model, rank, seed, bf16=False):
        from peft import LoraConfig, inject_adapter_in_model  # seconds

        self.model = model
        model.requires_grad_(False)
        names = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv1d))
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(
                LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model
            )
        self.layers = {
            name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")
        }
        self.unrounded = {}
        if bf16:
            for name, layer in self.layers.items():
                base = layer.get_base_layer()
                self.unrounded[name] = {
                    key: value.cpu() for key, value in base.state_dict().items()
                }
                base.to(torch.bfloat16)
        trained = [p.requires_grad for name, p in model.named_parameters() if "lora_" in name]
        if not trained or not all(trained):
            stop(f"--lora: {nothing_is_trained()}")

    def reference(self, *inputs):
        """u_ref: the network without its adapters."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        u = self.model(*inputs)
        for layer in self.layers.values():
            layer.enable_adapters(True)
        return u

    def check_moved(self):
        """For after the first optimizer steps: every lora_B begins at zero, and until one moves the
        adapters add nothing."""
        moved = [p.any() for layer in self.layers.values() for p in layer.lora_B.parameters()]
        if not any(moved):
            stop(f"--lora: {nothing_is_trained()}")

    def merge(self):
        """Adds the adapters to the weights below them: the network is of its upstream's form
        again."""
        if self.unrounded:
            self.model.cpu()  # where the weights below are, so that no GPU needs room for them
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            if name in self.unrounded:
                base.float().load_state_dict(self.unrounded.pop(name))
            layer.merge()
            parent, _, own_name = name.rpartition(".")
            setattr(self.model.get_submodule(parent), own_name, base)


def nothing_is_trained():
    """What is said where adapters do not learn: the usual reason is another version of peft than
    the tested one."""
    import peft

    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    tested = re.search(r"^peft==(.+)$", pins, flags=re.MULTILINE)[1]
    here = f"peft {peft.__version__} is installed, {tested} is tested"
    return f"the adapters are frozen, or do not move; {here}: pip install peft=={tested}"


# --------------------------------------------------------------------------------------------------
# A training's folder: settings, checkpoint, log, policy
# --------------------------------------------------------------------------------------------------

ADVICE = "use another --out, or remove this folder"
MAY_CHANGE = (
    "run_dir",
    "out",
    "weights",
    "micro_batch",
    "save_every",
    "gradient_checkpointing",
    "workers",
)


def settings_of(args):
    """The flags that a training is bound to: all but those that may change when it is resumed."""
    return {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}


def systems_flag(out):
    """What stage 07 has to be told of a policy in this folder."""
    return "" if out in ("05_flow_dpo", "06_ddpo") else f" --systems ground_truth base {out}"


def output_folder(run, name):
    """run / name for --out: a folder name inside the run, nothing else."""
    of_a_stage = re.match(r"0[0-47-9]", name)
    if not files.is_name(name) or of_a_stage:
        stop(f"--out {name}: give a plain folder name, not one of another stage")
    if (Path(run) / name).exists() and not (Path(run) / name).is_dir():
        stop(f"--out {name}: is a file of this run; give a plain folder name")
    return Path(run) / name


def trained_state(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(folder, step, model, optimizer, made_from):
    """checkpoint.pt: everything that the next step depends on besides the settings and inputs,
    whose digest is made_from."""
    with open(folder / "log.jsonl", "rb") as stream:
        os.fsync(stream.fileno())  # the log never lacks what the checkpoint has
    state = {
        "step": step,
        "settings": made_from,
        "model": trained_state(model),
        "optimizer": optimizer.state_dict(),
    }
    files.save_pt(folder / "checkpoint.pt", state)


def resume(folder, model, optimizer, steps, made_from, step_type):
    """Loads checkpoint.pt if there is one, cuts log.jsonl back to it, and returns the number of
    steps done. step_type: of the rows of the log."""
    file = folder / "checkpoint.pt"
    done = 0
    if file.exists():
        done = load_checkpoint(file, model, optimizer, steps, made_from)
    if ranks.is_first():
        log = folder / "log.jsonl"
        logged = rows.read(log, step_type, cut=True) if log.exists() else []
        kept = [row for row in logged if row.step < done]
        if [row.step for row in kept] != list(range(done)):
            stop(
                f"{log}: lacks some of the {done} steps of checkpoint.pt; put it back, or remove "
                "the folder"
            )
        rows.write(log, kept)
    ranks.barrier()
    return done


def load_checkpoint(file, model, optimizer, steps, made_from):
    """Returns its step."""
    other = "is not of this model; remove it, or use another --out"
    state = files.load_pt(
        file, {"step": int, "settings": str, "model": dict, "optimizer": dict}, mmap=True
    )
    if state["settings"] != made_from or not 0 <= state["step"] <= steps:
        settings = file.with_name("settings.json")
        stop(f"{file}: of another training than {settings}; remove it, or use another --out")
    if state["model"].keys() != trained_state(model).keys():
        stop(f"{file}: {other}")
    files.load_weights(model, model.state_dict() | state["model"], file, other)
    weights = [p for p in model.parameters() if p.requires_grad]
    moments = state["optimizer"].get("state")
    if not fits_moments(moments, weights, state["step"]):
        stop(f"{file}: {other}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state["step"]


def fits_moments(moments, weights, step):
    """Whether AdamW's moments are of these weights."""
    if not isinstance(moments, dict) or (step and not moments):
        return False
    for i, moment in moments.items():
        if not isinstance(i, int) or not 0 <= i < len(weights) or not isinstance(moment, dict):
            return False
        for name, shape in (
            ("step", ()),
            ("exp_avg", weights[i].shape),
            ("exp_avg_sq", weights[i].shape),
        ):
            value = moment.get(name)
            if not torch.is_tensor(value) or not value.is_floating_point() or value.shape != shape:
                return False
    return True


def save_policy(run, out, model, run_json, method, steps):
    """policy.pt in the upstream's own format, and policy.json, from which stage 07 knows whose it
    is."""
    file = Path(run) / out / "policy.pt"
    files.save_pt(file, model.policy_state())
    policy = rows.Policy(
        model=run_json.model,
        base_digest=run_json.checkpoint_digest,
        method=method,
        steps=steps,
        commit=record.commit(),
        computed_with=digits.used(),
    )
    rows.write_json(file.with_suffix(".json"), policy)
    print(f"wrote {file}")
