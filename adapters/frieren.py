"""Frieren (Wang et al., NeurIPS 2024, https://arxiv.org/abs/2406.00320) as a FlowModel
(docs/frieren.md)."""

import contextlib
import functools
import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from common import FlowModel, SkipClip, files, scoring, speed, stop, upstream, weight_file


@functools.cache
def upstream_classes():
    """Upstream's four classes. Lightning and OmegaConf, which they import and do not need, are
    stood in for. Generic names leave sys.modules: what was imported lives on below `frieren_v2a`,
    where torch.compile finds it."""
    generic = {"cfm", "vocoder", "pytorch_lightning", "omegaconf"}

    def loaded():
        return [name for name in sys.modules if name.partition(".")[0] in generic]

    others = {name: sys.modules.pop(name) for name in loaded()}
    sys.modules["pytorch_lightning"] = types.SimpleNamespace(LightningModule=nn.Module)
    sys.modules["omegaconf"] = types.SimpleNamespace(OmegaConf=None)
    try:
        with upstream("Frieren-V2A", "Frieren"):
            from cfm.models.autoencoder1d import AutoencoderKL
            from cfm.modules.cond_stage.video_feat_encoder import Video_Feat_Encoder_NoPosembed
            from cfm.modules.diffusionmodules.concatDiT import ChannelConcatDiT
            from vocoder.bigvgan.models import BigVGAN
    finally:
        for name in loaded():
            module = sys.modules.pop(name)
            module.__name__ = f"frieren_v2a.{name}"
            sys.modules[module.__name__] = module
        sys.modules.update(others)
    AutoencoderKL.__init__.__globals__["print"] = lambda *_: None  # it prints while it is built
    return types.SimpleNamespace(
        dit=ChannelConcatDiT,
        embedder=Video_Feat_Encoder_NoPosembed,
        vae=AutoencoderKL,
        vocoder=BigVGAN,
    )


def fill(part, state, path, *prefixes):
    """Strictly loads what `state` holds under the prefixes; a part on meta takes the mapped tensors
    themselves."""
    own = {name: value for name, value in state.items() if name.startswith(prefixes)}
    try:
        part.load_state_dict(own, assign=next(part.parameters()).is_meta)
    except RuntimeError as error:
        held = {".".join(name.split(".")[:2]) for name in state if "." in name}
        reason = " ".join(str(error).split())[:200]
        stop(
            f"{path}: not the tensors of Frieren; it holds {', '.join(sorted(held))[:200]}; "
            f"{reason}"
        )


class Frieren(FlowModel):
    """Upstream's own classes (checked at 0c39692): Frieren without reflow, 159M, from CAVP
    features.

    Its time is k = 1000 (1 - t), 0 at noise, 999 at most. 32 frames, 8.000 s, drive 8.192 s of
    audio. Trained: DiT and condition embedder, whole. Unconditional is the embedder's output for
    zeros, so it moves with training; Flow-DPO at guidance 1 never uses it, DDPO trains through it.
    Reflowed and distilled models learnt the guided velocity, unlike Eq. 5 at guidance 1: refused
    where their path, or the one recorded in them, tells; their tensors alone do not."""

    latent_shape = (256, 20)
    sample_rate_hz = 16000
    clip_s = 8.0
    batch_clips = 16  # four blocks: fewer rows leave a GPU waiting for launches
    frames = 32
    cavp_width = 512
    latent_scale = 0.18215
    feature_shapes = {"cavp": (frames, cavp_width)}
    dit_config = dict(
        in_channels=20, context_dim=768, hidden_size=576, num_heads=8, depth=4, max_len=1000
    )
    vae_config = dict(
        double_z=True,
        in_channels=80,
        out_ch=80,
        z_channels=20,
        kernel_size=5,
        ch=384,
        ch_mult=[1, 2, 4],
    )
    vae_config |= dict(num_res_blocks=2, attn_layers=[3], down_layers=[0], dropout=0.0)

    @classmethod
    def files(cls, variant):
        if variant:
            stop(f"--model frieren:{variant}: Frieren has no variants; write --model frieren")
        return ["v2a/noreflow/last.ckpt", "bigvnat/args.yml", "bigvnat/best_netG.pt"]

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        names = self.files(variant)
        classes = upstream_classes()
        self.model = nn.ModuleDict(
            {"diffusion_model": classes.dit(**self.dit_config)}
        )  # upstream's parameter names
        self.cond_stage_model = classes.embedder(self.cavp_width, self.dit_config["context_dim"])
        # Of a transposed input torch computes a linear layer otherwise with gradients than without:
        # in bf16 the policy would begin away from its reference.
        for layer in (self.model["diffusion_model"].x_proj, self.model["diffusion_model"].c_proj):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        for module in self.model.modules():
            module.checkpoint = (
                False  # upstream's own recomputation loses gradients; `blocks` offers ours
            )
        self.checkpoint = Path(checkpoint or weight_file(weights, names[0]))
        base, vae = self.load_policy(self.checkpoint)
        self.base = functools.cache(lambda: base)  # so wrapped, copies of the model share these two
        self.codec = functools.lru_cache(maxsize=1)(
            functools.partial(self.load_codec, vae, weights)
        )

    def load_policy(self, path):
        """Replaces the velocity network's weights by those of a file that save_policy, or upstream
        by Lightning 1.4, wrote. Returns the file's content and its VAE, both mapped: not read
        before they are used."""
        callbacks = (
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # keyed by their class
        )
        file = files.load_pt(path, mmap=True, ignore=[*files.NUMPY, callbacks])
        if not isinstance(file, dict) or not isinstance(file.get("state_dict"), dict):
            stop(f"{path}: no checkpoint of Frieren, which is a dict with a 'state_dict'")
        recorded = [
            callback.get("dirpath") or "" for callback in file.get("callbacks", {}).values()
        ]
        for place in [path, *recorded]:
            trail = "/".join(Path(place).parts[-2:]).lower()
            trail = re.sub("[ _-]", "", trail).replace("noreflow", "")
            if "reflow" in trail or "distill" in trail:
                told = "a reflowed or distilled Frieren by its path, now or in training"
                stop(f"{path}: {told}; use the one without reflow")
        with torch.device("meta"):
            vae = upstream_classes().vae(
                self.latent_shape[1], self.vae_config, {"target": "torch.nn.Identity"}
            )
        fill(
            nn.ModuleDict({"first_stage_model": vae}),
            file["state_dict"],
            path,
            "first_stage_model.",
        )
        fill(self, file["state_dict"], path, "model.", "cond_stage_model.")
        return file, vae

    def policy_state(self):
        """For upstream's generation script: the base checkpoint's 339 tensors, 127 of them replaced
        by the trained."""
        trained = {name: value.cpu() for name, value in self.state_dict().items()}
        return {
            "state_dict": self.base()["state_dict"] | trained,
            "global_step": self.base().get("global_step", 0),
        }

    def cavp_file(self, clip):
        for suffix in ("", ".npz", ".npy"):
            file = Path(f"{clip.cavp}{suffix}")
            if file.suffix in (".npz", ".npy") and file.is_file():
                return file
        return None

    def stamp_of(self, clip):
        file = self.cavp_file(clip)
        return file and scoring.stamp(file)

    def read(self, clip, others=()):
        if clip.cavp is None:
            stop(
                f"clip {clip.id}: Frieren reads CAVP features; give stage 01 their folder with "
                "--cavp"
            )
        file = self.cavp_file(clip)
        if file is None:
            raise SkipClip("no CAVP features (.npz or .npy)")
        with files.reading(file), open(file, "rb") as stream:
            content = io.BytesIO(
                stream.read()
            )  # whole, so that all that goes wrong below is wrong with the content
        try:
            loaded = np.load(content, allow_pickle=False)
            values = loaded["feat"] if file.suffix == ".npz" else loaded
            cavp = torch.from_numpy(np.array(values, dtype=np.float32))
        except (
            Exception
        ) as error:  # numpy, zipfile and zlib have types of their own for a broken file
            if isinstance(error, MemoryError):
                files.memory_or_content()
            raise SkipClip(f"unreadable CAVP features ({type(error).__name__})") from None
        if cavp.dim() != 2 or cavp.shape[1] != self.cavp_width or len(cavp) < self.frames:
            raise SkipClip(
                f"CAVP features are {tuple(cavp.shape)}, not (at least {self.frames}, "
                f"{self.cavp_width})"
            )
        if not cavp[: self.frames].isfinite().all():
            raise SkipClip("CAVP features are not finite")
        return [cavp[: self.frames].clone()]

    def encode(self, clip, tensors):
        return {"cavp": tensors[0]}

    def project(self, features):
        return {"context": self.cond_stage_model(features["cavp"].to(self.device))}  # (B, 32, 768)

    def null_conditions(self, conditions):
        zeros = torch.zeros(1, 1, self.cavp_width, device=self.device)
        return {"context": self.cond_stage_model(zeros).expand_as(conditions["context"])}

    def predict(self, a_t, t, conditions):
        k = (1000 * (1 - t.double())).round().clamp(0, 999).long()
        return -self.model["diffusion_model"](
            a_t.transpose(1, 2), k, conditions["context"]
        ).transpose(1, 2)

    def snap_t(self, t):
        """1 - k/1000 with k cut, not rounded. At the times of 25 steps k is upstream's, whose
        float32 cuts 200, 360 and 400 to 199, 359 and 399; with other numbers of steps a few k may
        differ from upstream's by one."""
        passed = 1 - t.double()
        step = (25 * passed).round()
        grid = (1000 * torch.linspace(0, 1, 26)).long().to(t.device)
        is_of_25 = (25 * passed - step).abs() < 1e-4
        k = torch.where(is_of_25, grid[step.long()], (1000 * passed + 1e-3).long())
        return (1 - k.clamp(0, 999).double() / 1000).to(t.dtype)

    def blocks(self):
        return list(self.model["diffusion_model"].blocks)

    @torch.no_grad()
    def decode(self, latents):
        vae, vocoder = self.codec(self.device, self.compiled)
        waves = []
        for part in latents.to(self.device).float().split(8):
            mels = vae.decode(
                part.transpose(1, 2) / self.latent_scale
            )  # (B, 80, 512), 256 samples each
            waves.append(vocoder(mels)[:, 0].cpu())
        return torch.cat(waves)

    @staticmethod
    def load_codec(vae, weights, device, compiled=False):
        import yaml

        shape, file = (weight_file(weights, name) for name in Frieren.files("")[1:])
        sizes = types.SimpleNamespace(**yaml.safe_load(shape.read_text()))
        vocoder = upstream_classes().vocoder(sizes)
        fill(vocoder, files.load_pt(file).get("generator", {}), file, "")
        with contextlib.redirect_stdout(None):  # it says that it does
            vocoder.remove_weight_norm()
        activations = speed.slice_activations(vocoder)
        if compiled:
            speed.compile_blocks(activations, (vocoder, "forward"))
        return [part.to(device).float().eval().requires_grad_(False) for part in (vae, vocoder)]


ADAPTER = Frieren
