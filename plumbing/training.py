"""What 05 and 06 share apart from their methods: reading stage 01's latents and features, precision
and memory, LoRA, the optimizer, and a policy's folder with its checkpoint."""

import copy
import functools
import random
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.utils.checkpoint
from scipy.optimize import brentq
from tqdm import tqdm

from plumbing import digits, files, ranks, record, rows, speed
from plumbing.files import stop

# --------------------------------------------------------------------------------------------------
# Shards: stage 01's latents and features
# --------------------------------------------------------------------------------------------------


def crc32(row):
    """The CRC-32 of a tensor's bytes, as an integer."""
    return zlib.crc32(row.contiguous().view(torch.uint8).numpy())


def save_shard(file, latents, digests, features=None, clips=()):
    """Writes a shard's .pt. latents: (rows, T, C); digests: those of the rows' wavs; features: dict
    of (clips, ...), {} for given audio; clips: their ids. Every row gets a CRC-32 of its own, since
    such a file is never read as a whole."""
    features = features or {}
    checksums = {"latents": [crc32(row) for row in latents]}
    for name, values in features.items():
        checksums[name] = [crc32(row) for row in values]
    saved = {"latents": latents, "features": features, "clips": list(clips), "digests": digests}
    files.save_pt(file, saved | {"crc32": checksums})


class OpenShard(NamedTuple):
    tensors: dict  # by name
    checksums: dict  # {name: a CRC-32 for each row}
    row_of_clip: dict  # {clip: row of its features}


class Shards:
    """Stage 01's latents and features, memory-mapped, so that memory does not grow with the data
    set. A row is checked whenever it is read, since a disk may lose a part of a file without an
    error."""

    def __init__(self, run, samples, model):
        self.folder = Path(run) / "01_samples"
        self.device = model.device
        self.latent_shape = model.latent_shape
        self.feature_shapes = model.feature_shapes
        self.opened = {}
        self.digests = defaultdict(list)  # {file: digests of its audios, in order}
        self.place_of_audio = {}  # {(clip, k): (clip, file, row of its latent)}
        self.shard_of_clip = {}  # {clip: the file of its features}
        for clip, audios in samples.items():
            self.shard_of_clip[clip] = audios[0].shard
            for audio in audios:
                self.place_of_audio[clip, audio.k] = clip, audio.file, audio.row
                self.digests[audio.file].append(audio.digest)

    def latents(self, audios):
        """[(clip, k), ...] -> (B, T, C) float32 on the model's device."""
        return self.rows("latents", [self.place_of_audio[audio] for audio in audios]).float()

    def features(self, clips):
        """[clip, ...] -> dict of (B, ...) float32 on the model's device."""
        places = []
        for clip in clips:
            shard = self.shard_of_clip[clip]
            places.append((clip, shard, self.open(shard).row_of_clip.get(clip)))
        return {name: self.rows(name, places) for name in self.feature_shapes}

    def rows(self, name, places):
        """The rows at these places, stacked. name: "latents", or the name of a feature."""
        found = []
        for clip, file, row in places:
            opened = self.open(file)
            try:
                value = opened.tensors[name][row]
                lost = crc32(value) != opened.checksums[name][row]
            except (IndexError, KeyError, TypeError):
                lost = True
            if lost:
                self.refuse(
                    file,
                    f"{name} of clip {clip} are not what stage 01 wrote (an older version, a bad "
                    "disk or copy)",
                )
            found.append(value)
        return send(torch.stack(found), self.device)

    def open(self, file):
        if file not in self.opened:
            kinds = {"latents": torch.Tensor, "features": dict, "digests": list, "clips": list}
            saved = files.load_pt(self.folder / f"{file}.pt", kinds, mmap=True)
            tensors = {"latents": saved["latents"], **saved["features"]}
            shapes = {}
            for name, value in tensors.items():
                if torch.is_tensor(value):
                    shapes[name] = tuple(value.shape[1:])
            wanted = {"latents": self.latent_shape}
            if "." not in file:  # a file of given audio has no features
                wanted |= self.feature_shapes
            if saved["digests"] != self.digests[file] or shapes != wanted:
                self.refuse(file, f"does not belong to the audios in {file}.jsonl")
            try:
                row_of_clip = {clip: row for row, clip in enumerate(saved["clips"])}
            except TypeError:  # no ids
                row_of_clip = {}
            self.opened[file] = OpenShard(tensors, saved.get("crc32"), row_of_clip)
        return self.opened[file]

    def refuse(self, file, wrong):
        stop(
            f"{self.folder / file}.pt: {wrong}; remove both {file}.pt and {file}.jsonl, rerun "
            "01_generate.py"
        )


def send(tensor, device):
    """A CPU tensor, copied to the device. The copy is from pinned memory, so that the host need not
    wait for it."""
    if torch.device(device).type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def from_shuffled_epochs(items, start, count, seed):
    """`count` items from place `start` on, of an endless sequence. The sequence is one epoch after
    another, each with all items in a new random order that depends on the seed."""
    found = []
    for i in range(start, start + count):
        epoch, place = divmod(i, len(items))
        found.append(items[shuffled(f"{seed}/{epoch}", len(items))[place]])
    return found


@functools.lru_cache(maxsize=4)  # one permutation serves a whole epoch
def shuffled(seed, count):
    """A permutation of range(count), which depends on the seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# --------------------------------------------------------------------------------------------------
# Precision, memory, processes
# --------------------------------------------------------------------------------------------------

ROUNDED = (nn.Linear, nn.Conv1d)  # the layers whose weights autocast rounds to bf16 at every use


def in_bf16(device, precision):
    """Whether to compute in bf16: with `auto` on CUDA only. With fp32, CUDA's matrix products are
    TF32."""
    if precision == "auto":
        return torch.device(device).type != "cpu"
    return precision == "bf16"


def autocast(device, precision="auto"):
    device_type = torch.device(device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=in_bf16(device, precision))


def frozen_copy(model, bf16):
    """The reference u_ref: a frozen copy of the model. With bf16 its weights are rounded: it
    computes the same u in half the memory."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if bf16:
        round_weights(copied)
    return copied


def round_weights(model):
    """Stores the weights of the `ROUNDED` layers as autocast would round them at every use."""
    for layer in model.modules():
        if isinstance(layer, ROUNDED):
            layer.to(torch.bfloat16)


def only_sample(model, to_compile):
    """Makes a model faster in a process that samples and does not train. Numbers stay the same up
    to rounding."""
    if in_bf16(model.device.type, "auto"):  # `sample` computes in bf16 then
        round_weights(model)
        torch.backends.cudnn.benchmark = True  # the same shapes recur for hours
    if to_compile and model.compiles:
        speed.compile_models(model)


def compiles(model, args):
    """Whether --compile is used for this model. With LoRA it is not: the reference runs without the
    LoRA matrices, so that it would be compiled to another graph."""
    return args.compile and model.compiles and not args.lora


def compile_both(model, reference):
    """Compiles policy and reference alike, so that both compute the same u to the bit while their
    weights are equal, rounded to bf16 or not. A graph with gradients rounds differently from one
    without. So the reference is computed with gradients too, but keeps nothing for a backward
    pass."""
    speed.compile_models(model, reference)
    for copied, p in zip(reference.parameters(), model.parameters()):
        copied.requires_grad_(p.requires_grad)
    reference.forward = functools.partial(without_backward, reference.forward)


def without_backward(forward, *inputs):
    """forward(*inputs), computed in the same way as with gradients."""
    with torch.enable_grad():
        u = torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False)
    return u.detach()


def checkpoint_blocks(model):
    """Gradient checkpointing: every block's activations are recomputed in the backward pass, which
    takes more time and less memory."""
    for block in model.blocks():
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )


def data_parallel(model, device):
    """The module to call in training: the model, or, with several processes, its
    DistributedDataParallel."""
    if not dist.is_initialized():
        return model
    devices = None if device == "cpu" else [device]
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, **options)


def refuse_uneven(flag, count, world):
    """Stops where a batch of `count` items cannot be divided evenly over the processes."""
    if count % world:
        stop(f"{flag} {count} cannot be divided over {world} processes; start as many as divide it")


def sum_dict_over_ranks(sums, device):
    """{name: tensor}, all of one shape -> {name: sum over the ranks}, on the CPU."""
    stacked = send(torch.stack(list(sums.values())), device)
    return dict(zip(sums, ranks.sum_over_ranks(stacked).cpu()))


def peak_gb(device):
    """The most memory of the GPU that this process has used so far, in GiB; None on a CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30


# --------------------------------------------------------------------------------------------------
# LoRA: small matrices beside the weights, trained instead of them
# --------------------------------------------------------------------------------------------------


def add_lora(model, rank, seed, bf16):
    """Freezes the network and adds LoRA of this rank to its linear and convolution layers. LoRA
    starts at zero, so that the network's output is unchanged. With bf16 the frozen weights are
    rounded as in `frozen_copy`; their float32 values stay on the CPU for `merge_lora`."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    model.requires_grad_(False)
    names = [name for name, layer in model.named_modules() if isinstance(layer, ROUNDED)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for layer in lora_layers(model).values():
        base = layer.get_base_layer()
        layer.float32_weights = {name: p.cpu() for name, p in base.state_dict().items()}
        if bf16:
            base.to(torch.bfloat16)
    if not model.trainable_parameters():
        stop(f"--lora: {nothing_is_trained()}")


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def lora_reference(model):
    """The reference u_ref: the same network with its LoRA switched off."""
    layers = lora_layers(model).values()

    def reference(*inputs):
        for layer in layers:
            layer.enable_adapters(False)
        u = model(*inputs)
        for layer in layers:
            layer.enable_adapters(True)
        return u

    return reference


def merge_lora(model):
    """Adds the trained LoRA to the frozen weights and removes it, so that the network has its
    upstream's form again."""
    layers = lora_layers(model)
    if layers:
        model.cpu()  # so that the GPU needs no room for the float32 weights
    for name, layer in layers.items():
        base = layer.get_base_layer()
        base.float().load_state_dict(layer.float32_weights)
        layer.merge()
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, base)


def nothing_is_trained():
    """The message where LoRA does not learn. The usual reason is another version of peft than the
    tested one."""
    import peft

    return (
        f"the adapters are frozen, or do not move; peft {peft.__version__} is installed; give "
        "pip install -r requirements.txt, which brings the tested one"
    )


# --------------------------------------------------------------------------------------------------
# Optimizer
# --------------------------------------------------------------------------------------------------


def adamw(model, lr):
    # Paper silent: betas, weight decay and, below, the bound of the gradient. We take MMAudio's.
    options = {"betas": (0.9, 0.95), "weight_decay": 1e-6, "fused": model.device.type != "cpu"}
    return torch.optim.AdamW(model.trainable_parameters(), lr=lr, **options)


def lr_at(step, args):
    """Linear warm-up, then constant [Sec. 3.1]."""
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup))


def clip_gradient(model):
    """Clips the gradient to norm 1, and returns its norm before that, on the model's device."""
    return nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)


def sum_step_over_ranks(step, sums, grad_norm, folder):
    """A step's sums over all ranks, {name: tensor} on the CPU, and the gradient's norm, a float.
    Stops where one of these is not finite, before it reaches the weights. All are copied to the CPU
    at once; this is the only place in an update where the host waits for the device."""
    stacked = ranks.sum_over_ranks(torch.stack(list(sums.values())))
    measured = torch.cat([stacked.flatten(), grad_norm.to(stacked).view(1)]).cpu()
    if not measured.isfinite().all():
        stop(
            f"step {step}: its loss or gradient is not finite; {folder}/checkpoint.pt holds the "
            "last good one; lower --lr"
        )
    return dict(zip(sums, measured[:-1].view(stacked.shape))), measured[-1].item()


def take_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


# --------------------------------------------------------------------------------------------------
# The average of the weights
# --------------------------------------------------------------------------------------------------


def averaging_power(width):
    """The exponent gamma of a power-function average (arXiv 2312.02696, Sec. 3.1; MMAudio trains
    with it), in which the weights after update i count as i^gamma. width: the standard deviation of
    i under this weighting, relative to the last i; above 0, at most 0.28. A larger width means a
    smaller gamma: 16.97 at .05, 1.83 at .2."""

    def excess(gamma):
        return (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) - width**2

    return brentq(excess, 0, 1 / width)


@torch.no_grad()
def average_in(average, weights, update, power):
    """Includes the weights after this update into their average. update: its number, from 1 on;
    average, weights: dicts of float32 tensors with the same names."""
    share = 1 - (1 - 1 / update) ** (power + 1)
    torch._foreach_lerp_(list(average.values()), list(weights.values()), share)


# --------------------------------------------------------------------------------------------------
# A training, step by step
# --------------------------------------------------------------------------------------------------


class Trainer:
    """What 05 and 06 do besides computing their losses: it trains a network in a policy's folder,
    and goes on from the folder's checkpoint.

    policy: the module that the losses call, the network or its DistributedDataParallel; done: the
    number of steps that the checkpoint holds.
    """

    def __init__(self, stage, model, row_type, save_every, here, args):
        """stage: what `output` returned; its settings are claimed here. row_type: the type of the
        lines of log.jsonl; save_every: steps between checkpoints; here: ranks.Ranks."""
        given = vars(args).items()
        stage.claim({name: value for name, value in given if name not in MAY_CHANGE})
        self.stage = stage
        self.model = model
        self.row_type = row_type
        self.save_every = save_every
        self.here = here
        self.args = args
        self.folder = stage.run / args.out
        self.made_from = stage.digest()
        # The average of the trained weights. These are the same in all processes, so that the first
        # one alone keeps it.
        self.average = copy.deepcopy(trained_state(model)) if args.ema and here.first else {}
        if args.gradient_checkpointing:
            checkpoint_blocks(model)
        self.optimizer = adamw(model, args.lr)
        self.done = self.resume()
        self.policy = data_parallel(model, here.device)

    def resume(self):
        """Loads checkpoint.pt if there is one, and removes the lines of log.jsonl that are later: a
        training that was killed has usually logged more steps than its checkpoint holds. Returns
        the number of steps done."""
        file = self.folder / "checkpoint.pt"
        done = 0
        if file.exists():
            done = load_checkpoint(
                file, self.model, self.optimizer, self.average, self.args.steps, self.made_from
            )
        if self.here.first:
            log = self.folder / "log.jsonl"
            logged = rows.read(log, self.row_type, cut=True) if log.exists() else []
            kept = [row for row in logged if row.step < done]
            if [row.step for row in kept] != list(range(done)):
                stop(
                    f"{log}: lacks some of the {done} steps of checkpoint.pt; put it back, or "
                    "remove the folder"
                )
            rows.write(log, kept)
        ranks.barrier()
        return done

    def steps(self):
        """Yields the steps that are left, and shows a progress bar."""
        self.bar = tqdm(
            range(self.done, self.args.steps),
            initial=self.done,
            total=self.args.steps,
            unit="step",
            disable=not self.here.first,
        )
        for step in self.bar:
            self.began = time.time()
            yield step

    def finish_step(self, step, **measured):
        """Writes the step's line of log.jsonl, and a checkpoint every save_every steps. measured:
        the fields of the line that the Trainer does not know."""
        if not self.here.first:
            return
        if self.average:
            power = averaging_power(self.args.ema)
            average_in(self.average, trained_state(self.model), step + 1, power)
        row = self.row_type(
            step=step,
            **measured,
            seconds=time.time() - self.began,
            peak_gb=peak_gb(self.here.device),
        )
        rows.append(self.folder / "log.jsonl", row)
        if (step + 1) % self.save_every == 0 or step + 1 == self.args.steps:
            save_checkpoint(
                self.folder, step + 1, self.model, self.optimizer, self.average, self.made_from
            )

    def save_policy(self, run_json, method):
        """Writes policy.pt in the upstream's own format, and policy.json, which tells stage 07 what
        it was tuned from. A training that had finished before keeps its files."""
        if self.done == self.args.steps and self.stage.is_sealed():
            return
        self.model.load_state_dict(self.average, strict=False)  # changes nothing without --ema
        merge_lora(self.model)
        file = self.folder / "policy.pt"
        files.save_pt(file, self.model.policy_state())
        policy = rows.Policy(
            model=run_json.model,
            base_digest=run_json.checkpoint_digest,
            method=method,
            steps=self.args.steps,
            commit=record.commit(),
            computed_with=digits.used(),
        )
        rows.write_json(file.with_suffix(".json"), policy)
        print(f"wrote {file}")


# --------------------------------------------------------------------------------------------------
# A policy's folder: settings, checkpoint, log, policy
# --------------------------------------------------------------------------------------------------

MAY_CHANGE = (  # when a training is resumed
    "run_dir",
    "out",
    "weights",
    "micro_batch",
    "save_every",
    "gradient_checkpointing",
    "workers",
)
OTHER_STAGES = ("00", "01", "02", "03", "04", "07", "08")


def systems_flag(out):
    """The flag by which stage 07 evaluates a policy in this folder; "" where it does so anyway."""
    return "" if out in ("05_flow_dpo", "06_ddpo") else f" --systems ground_truth base {out}"


def output(run, name, inputs):
    """The record.stage of a training into run / name, where name is --out, a folder inside the
    run."""
    if not files.is_name(name) or name.startswith(OTHER_STAGES):
        stop(f"--out {name}: give a plain folder name, not one of another stage")
    if (run / name).is_file():
        stop(f"--out {name}: is a file of this run; give a plain folder name")
    outputs = [f"{name}/policy.pt", f"{name}/policy.json"]
    advice = "use another --out, or remove this folder"
    return record.stage(run, name, inputs, outputs, advice=advice)


def trained_state(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(folder, step, model, optimizer, average, made_from):
    """Writes checkpoint.pt: all that the next step depends on, except settings and inputs, of which
    it holds the digest made_from. average: that of the trained weights, {} without --ema."""
    state = trained_state(model)
    # Every lora_B starts at zero; where all are still zero, LoRA has learned nothing.
    lora = [value for name, value in state.items() if "lora_B" in name]
    may_move = optimizer.state and optimizer.param_groups[0]["lr"] > 0
    if lora and may_move and not any(value.any() for value in lora):
        stop(f"--lora: {nothing_is_trained()}")
    files.sync(folder / "log.jsonl")  # so that the log never lacks a step of the checkpoint
    saved = {
        "step": step,
        "settings": made_from,
        "model": state,
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    files.save_pt(folder / "checkpoint.pt", saved)


def load_checkpoint(file, model, optimizer, average, steps, made_from):
    """Loads a checkpoint's weights, the optimizer's moments and the average. Returns its step."""
    advice = "remove it, or use another --out"
    kinds = {"step": int, "settings": str, "model": dict, "optimizer": dict, "average": dict}
    state = files.load_pt(file, kinds, mmap=True)
    if state["settings"] != made_from or not 0 <= state["step"] <= steps:
        settings = file.with_name("settings.json")
        stop(f"{file}: belongs to another training than {settings}; {advice}")
    other = f"is not of this model; {advice}"
    moments = state["optimizer"].get("state")
    names = trained_state(model).keys()
    are_there = state["model"].keys() == names and fits_moments(moments, model)
    if not are_there or state["average"].keys() not in (average.keys(), names):
        stop(f"{file}: {other}")
    if average:
        files.load_weights(model, model.state_dict() | state["average"], file, other)
        average.update(copy.deepcopy(trained_state(model)))
    files.load_weights(model, model.state_dict() | state["model"], file, other)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state["step"]


def fits_moments(moments, model):
    """Whether these are AdamW's moments for the trained weights, or {}, as before the first
    step."""
    wanted = {}
    for i, p in enumerate(model.trainable_parameters()):
        wanted[i] = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
    try:
        found = {}
        for i, moment in moments.items():
            found[i] = {name: value.shape for name, value in moment.items()}
    except AttributeError:
        return False
    return found in ({}, wanted)
