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
import torch.nn.functional as F
import torchaudio

from common import FlowModel, SkipClip, files, scoring, speed, stop, upstream, weight_file

GENERIC = ("cfm", "vocoder", "pytorch_lightning", "omegaconf")


def pop_generic():
    """Removes the modules named in GENERIC, and all below them, from sys.modules. Returns
    {name: module}."""
    names = [name for name in sys.modules if name.partition(".")[0] in GENERIC]
    return {name: sys.modules.pop(name) for name in names}


@functools.cache
def upstream_classes():
    """Upstream's four classes.

    They import Lightning and OmegaConf without needing them, so empty modules stand in for both.
    Upstream's modules have such generic names that another package's `vocoder` could be mistaken
    for Frieren's. So they do not keep these names in sys.modules; they get names below
    `frieren_v2a`, since torch.compile looks up a class's module by its name.
    """
    others = pop_generic()
    sys.modules["pytorch_lightning"] = types.SimpleNamespace(LightningModule=nn.Module)
    sys.modules["omegaconf"] = types.SimpleNamespace(OmegaConf=None)
    try:
        with upstream("Frieren-V2A", "Frieren"):
            from cfm.models.autoencoder1d import AutoencoderKL
            from cfm.modules.cond_stage.video_feat_encoder import Video_Feat_Encoder_NoPosembed
            from cfm.modules.diffusionmodules.concatDiT import ChannelConcatDiT
            from vocoder.bigvgan.models import BigVGAN
    finally:
        for name, module in pop_generic().items():
            module.__name__ = f"frieren_v2a.{name}"
            sys.modules[module.__name__] = module
        sys.modules.update(others)
    return types.SimpleNamespace(
        dit=ChannelConcatDiT,
        embedder=Video_Feat_Encoder_NoPosembed,
        vae=AutoencoderKL,
        vocoder=BigVGAN,
    )


def fill(part, state, path, *prefixes, assign=False):
    """Loads into `part`, strictly, the entries of `state` whose names begin with these prefixes;
    the names in `part` have the same prefixes. assign: a part on the meta device takes over the
    memory-mapped tensors themselves."""
    own = {name: value for name, value in state.items() if name.startswith(prefixes)}
    try:
        part.load_state_dict(own, assign=assign)
    except RuntimeError as error:
        held = sorted({".".join(name.split(".")[:2]) for name in state if "." in name})
        reason = " ".join(str(error).split())[:200]
        holds = f"it holds {', '.join(held)[:200]}"
        stop(f"{path}: not the tensors of Frieren; {holds}; {reason}")


def is_reflowed(path):
    """Whether a file's path names a reflowed or distilled model; `noreflow` and `no_reflow` do
    not."""
    trail = "/".join(Path(path).parts[-2:]).lower()
    return re.search("(?<!no)reflow|distill", re.sub("[ _-]", "", trail))


@functools.cache
def mel_filters():
    """Mel filters (513, 80)."""
    scale = dict(norm="slaney", mel_scale="slaney")
    return torchaudio.functional.melscale_fbanks(513, 0.0, 8000.0, 80, 16000, **scale)


def log_mel(waves):
    """(B, 131072) -> (B, 80, 512), log10 of mel magnitudes, as in upstream's
    script/data_preprocess/NAT_mel.py, which does not run with today's librosa."""
    padded = F.pad(waves.clamp(-1, 1), (384, 384), "reflect")
    window = torch.hann_window(1024, device=waves.device)
    spectrum = torch.stft(padded, 1024, 256, window=window, center=False, return_complex=True)
    magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
    return (mel_filters().T.to(waves.device) @ magnitude).clamp(min=1e-5).log10()


class Frieren(FlowModel):
    """Frieren without reflow, 159M parameters, conditioned on CAVP features, by upstream's own
    classes (checked at commit 0c39692).

    Its time is k = 1000 (1 - t), from 0 at noise to 999. 32 frames, 8.000 s of video, condition
    8.192 s of audio. DiT and condition embedder are trained. The null condition is the embedder's
    output for zeros, so it is trained too. A reflowed or distilled Frieren has learned the guided
    velocity, which at guidance 1 is not the velocity of Eq. 5; its tensors have the same names, so
    it can be recognised by its path alone (docs/frieren.md).
    """

    latent_shape = (256, 20)
    sample_rate_hz = 16000
    clip_s = 8.0
    batch_clips = 16  # the network is so small that with fewer rows a GPU waits for kernel launches
    frames = 32
    cavp_width = 512
    latent_scale = 0.18215
    feature_shapes = {"cavp": (frames, cavp_width)}
    dit_config = dict(
        in_channels=20,
        context_dim=768,
        hidden_size=576,
        num_heads=8,
        depth=4,
        max_len=1000,
    )
    vae_config = dict(
        double_z=True,
        in_channels=80,
        out_ch=80,
        z_channels=20,
        kernel_size=5,
        ch=384,
        ch_mult=[1, 2, 4],
        num_res_blocks=2,
        attn_layers=[3],
        down_layers=[0],
        dropout=0.0,
    )

    @classmethod
    def files(cls, variant):
        if variant:
            stop(f"--model frieren:{variant}: Frieren has no variants; write --model frieren")
        return ["v2a/noreflow/last.ckpt", "bigvnat/args.yml", "bigvnat/best_netG.pt"]

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        names = self.files(variant)
        classes = upstream_classes()
        # These attributes give the parameters upstream's names.
        self.model = nn.ModuleDict({"diffusion_model": classes.dit(**self.dit_config)})
        self.cond_stage_model = classes.embedder(self.cavp_width, self.dit_config["context_dim"])
        # Upstream gives two linear layers a transposed input. For such an input torch computes
        # another way with gradients than without, so that in bf16 the policy would not start equal
        # to its reference.
        for layer in (self.model["diffusion_model"].x_proj, self.model["diffusion_model"].c_proj):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        for module in self.model.modules():
            # Upstream's own gradient checkpointing loses gradients; ours goes through `blocks`.
            module.checkpoint = False
        self.checkpoint = Path(checkpoint or weight_file(weights, names[0]))
        base, vae = self.load_policy(self.checkpoint)
        # Functions are no submodules, and all copies of the model share them.
        self.base = lambda: base
        self.codec = functools.cache(functools.partial(self.load_codec, vae, weights))

    def load_policy(self, path):
        """path: a file written by save_policy, or by upstream with Lightning 1.4. Returns, for the
        constructor, the file's content and its VAE. Both are memory-mapped, and so are read only
        where they are used."""
        # Lightning stores callbacks under their class.
        callbacks = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
        file = files.load_pt(path, mmap=True, ignore=[*files.NUMPY, callbacks])
        if not isinstance(file, dict) or not isinstance(file.get("state_dict"), dict):
            stop(f"{path}: no checkpoint of Frieren, which is a dict with a 'state_dict'")
        # A callback may have kept the folder in which the model was trained.
        kept = [callback.get("dirpath") or "" for callback in file.get("callbacks", {}).values()]
        if any(is_reflowed(place) for place in (path, *kept)):
            told = "its path, or the folder that it was trained in, names a reflowed or distilled"
            stop(f"{path}: {told} Frieren; use the one without reflow")
        state = file["state_dict"]
        # Redirected, since the VAE prints its shapes.
        with torch.device("meta"), contextlib.redirect_stdout(None):
            no_loss = {"target": "torch.nn.Identity"}
            vae = upstream_classes().vae(self.latent_shape[1], self.vae_config, no_loss)
        named = nn.ModuleDict({"first_stage_model": vae})
        fill(named, state, path, "first_stage_model.", assign=True)
        fill(self, state, path, "model.", "cond_stage_model.")
        return file, vae

    def policy_state(self):
        """For upstream's generation script: the 339 tensors of the base checkpoint, of which 127
        are replaced by the trained ones."""
        base = self.base()
        trained = {name: value.cpu() for name, value in self.state_dict().items()}
        return {
            "state_dict": base["state_dict"] | trained,
            "global_step": base.get("global_step", 0),
        }

    def cavp_file(self, clip):
        for suffix in ("", ".npz", ".npy"):  # "": an id may itself end in .npz or .npy
            file = Path(f"{clip.cavp}{suffix}")
            if file.suffix in (".npz", ".npy") and file.is_file():
                return file
        return None

    def stamp_of(self, clip):
        file = self.cavp_file(clip)
        return file and scoring.stamp(file)

    def read(self, clip, others=()):
        if clip.cavp is None:
            advice = "give stage 01 their folder with --cavp"
            stop(f"clip {clip.id}: Frieren reads CAVP features; {advice}")
        file = self.cavp_file(clip)
        if file is None:
            raise SkipClip("no CAVP features (.npz or .npy)")
        # Read as a whole, so that any error below is about the content.
        with files.reading(file), open(file, "rb") as stream:
            content = io.BytesIO(stream.read())
        try:
            loaded = np.load(content, allow_pickle=False)
            values = loaded["feat"] if file.suffix == ".npz" else loaded
            cavp = torch.from_numpy(np.array(values, dtype=np.float32))
        # For a broken file numpy, zipfile and zlib each raise types of their own.
        except Exception as error:
            if isinstance(error, MemoryError):
                files.raise_if_memory_is_short()
            raise SkipClip(f"unreadable CAVP features ({type(error).__name__})") from None
        if cavp.dim() != 2 or cavp.shape[1] != self.cavp_width or len(cavp) < self.frames:
            wanted = f"(at least {self.frames}, {self.cavp_width})"
            raise SkipClip(f"CAVP features are {tuple(cavp.shape)}, not {wanted}")
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
        # t is already snapped, so 1000 (1 - t) is a whole number up to rounding.
        k = (1000 * (1 - t.double())).round().clamp(0, 999).long()
        u = self.model["diffusion_model"](a_t.transpose(1, 2), k, conditions["context"])
        return -u.transpose(1, 2)

    def snap_t(self, t):
        """1 - k/1000, where k is 1000 (1 - t) rounded down.

        Upstream rounds down in float32. At its own 25 steps this turns 200, 360 and 400 into 199,
        359 and 399, so there we take upstream's k from `grid`. With another number of steps a few k
        may differ from upstream's by one.
        """
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
        vae, vocoder = self.codec()
        waves = []
        for part in latents.to(self.device).float().split(8):
            # (B, 80, 512): 512 mel frames of 256 samples each
            mels = vae.decode(part.transpose(1, 2) / self.latent_scale)
            waves.append(vocoder(mels)[:, 0].cpu())
        return torch.cat(waves)

    @torch.no_grad()
    def encode_audio(self, waves):
        """The mean of the distribution that upstream's VAE returns."""
        vae, _ = self.codec()
        latents = []
        for part in waves.to(self.device).float().split(8):
            mean = vae.encode(log_mel(part)).mean.transpose(1, 2)
            latents.append((self.latent_scale * mean).cpu())
        return torch.cat(latents)

    def load_codec(self, vae, weights):
        import yaml

        shape, file = (weight_file(weights, name) for name in self.files("")[1:])
        try:
            sizes = types.SimpleNamespace(**yaml.safe_load(files.read_text(shape)))
            vocoder = upstream_classes().vocoder(sizes)
        # What upstream's class raises depends on which of its sizes are absent or of another type.
        except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            stop(f"{shape}: not the sizes of Frieren's vocoder ({reason:.100}); download it again")
        fill(vocoder, files.load_pt(file, {"generator": dict})["generator"], file, "")
        with contextlib.redirect_stdout(None):  # it prints what it does
            vocoder.remove_weight_norm()
        activations = speed.slice_activations(vocoder)
        if self.compiled:
            speed.compile_blocks(activations, (vocoder, "forward"))
        return [
            part.to(self.device).float().eval().requires_grad_(False) for part in (vae, vocoder)
        ]


ADAPTER = Frieren
