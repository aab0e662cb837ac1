"""MMAudio (Cheng et al., CVPR 2025, https://arxiv.org/abs/2412.15322) as a FlowModel (docs/mmaudio.md)."""

import functools
from contextlib import chdir
from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode, v2

from common import FlowModel, Memory, load_pt, of_system, read_frames, reading, stop, upstream, weight_file

VARIANTS = ("small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2")  # the paper's is large_44k
CONDITIONS = ("clip_f", "sync_f", "text_f", "clip_f_c", "text_f_c")  # upstream's PreprocessedConditions
CLIP = "apple/DFN5B-CLIP-ViT-H-14-384"  # read from the Hugging Face cache, where upstream looks for it
CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin")
# GiB per row (tests/account.py): kept for the backward pass, with gradient checkpointing, without gradients
ROWS = dict(small_16k=(0.151, 0.03, 0.009), small_44k=(0.2, 0.036, 0.012), medium_44k=(0.4, 0.071, 0.021))
ROWS |= dict.fromkeys(("large_44k", "large_44k_v2"), (0.68, 0.073, 0.022))
VOCODER = "nvidia/bigvgan_v2_44khz_128band_512x"  # a folder below --weights


class MMAudio(FlowModel):
    """Upstream's own classes, whose time runs from noise (0) to data (1).

    Weights and t stay float32 and autocast goes around the calls: cast to bfloat16, large_44k_v2's time embedding
    (frequencies up to 1e4) is another function.
    """

    clip_s = 8.0
    feature_shapes = {"clip": (64, 1024), "sync": (192, 768), "text": (77, 1024)}
    reads_video = True

    @classmethod
    def files(cls, variant):
        """Checkpoint, Synchformer, VAE and vocoder. CLIP lies in the Hugging Face cache."""
        if variant not in VARIANTS:
            stop(f"--model {f'mmaudio:{variant}'.rstrip(':')}: unknown variant; choose one of {', '.join(VARIANTS)}")
        rate = variant.split("_")[1][:2]
        vocoder = [f"{VOCODER}/bigvgan_generator.pt", f"{VOCODER}/config.json"] if rate == "44" else ["best_netG.pt"]
        return [f"mmaudio_{variant}.pth", "synchformer_state_dict.pth", f"v1-{rate}.pth", *vocoder]

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        names = self.files(variant)
        with upstream("MMAudio"):
            from mmaudio.model import networks
        self.variant, self.weights, self.mode = variant, Path(weights).absolute(), variant.split("_")[1]
        self.sample_rate_hz = {"16k": 16000, "44k": 44100}[self.mode]
        self.checkpoint = Path(checkpoint or weight_file(self.weights, names[0]))
        self.net, self.conditions_class = networks.get_my_mmaudio(variant), networks.PreprocessedConditions
        self.memory = Memory(*ROWS[variant], codec={"16k": 1.7, "44k": 3.7}[self.mode], encoders=7.8)
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
        return {key: getattr(conditions, key) for key in CONDITIONS}

    def null_conditions(self, conditions):
        # Learned null video and empty_string_feat, as in upstream's evaluation (batch_eval.py gives no negative text);
        # its demo.py encodes the negative text '' with CLIP instead.
        null = self.net.get_empty_conditions(len(conditions["clip_f"]))
        return {key: getattr(null, key) for key in CONDITIONS}

    def predict(self, a_t, t, conditions):
        # Upstream's time is 1 - t, its velocity x1 - x0 = a_0 - eps.
        return -self.net.predict_flow(a_t, 1 - t.float(), self.conditions_class(**conditions))

    def blocks(self):
        return [*self.net.joint_blocks, *self.net.fused_blocks]

    def policy_state(self):
        return {key: value.detach().cpu() for key, value in self.net.state_dict().items()}

    def load_policy(self, path):
        """A bare state dict, upstream's file or ours."""
        try:
            self.net.load_weights(load_pt(path, mmap=True))
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).replace("Error(s) in loading state_dict for MMAudio:", "").split())[:120]
            stop(f"{path}: not the weights of mmaudio:{self.variant} ({reason}); give a file of this variant")

    # Frozen parts: CLIP and Synchformer; VAE and vocoder ----------------------------------------------------

    def read(self, clip, others=()):
        """(64, 3, 384, 384) at 8 fps for CLIP, (200, 3, 224, 224) at 25 fps for Synchformer, uint8."""
        squash = v2.Resize((384, 384), InterpolationMode.BICUBIC)
        crop = v2.Compose([v2.Resize(224, InterpolationMode.BICUBIC), v2.CenterCrop(224)])
        return read_frames(clip["path"], [(8, squash), (25, crop), *others], self.clip_s)

    def encode(self, clip, seen):
        """clip: CLIP's pictures; sync: Synchformer's segments; text: CLIP's text."""
        scale, centre = v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True)
        squashed, cropped = (scale(frames.to(self.device))[None] for frames in seen)  # float32 on the device
        centre(cropped)
        encoders = self.encoders()
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

        synchformer = weight_file(self.weights, self.files(self.variant)[1])
        for name in CLIP_FILES:
            if not isinstance(try_to_load_from_cache(CLIP, name), str):
                fetch = f"hf download {CLIP} {' '.join(CLIP_FILES)}"
                stop(f"{constants.HF_HUB_CACHE}: {name} of MMAudio's CLIP (3.7 GiB) is missing; run: {fetch}")
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # the files are here: ask the hub for nothing
        utils.reset_sessions()
        try:
            return self.features_utils(enable_conditions=True, synchformer_ckpt=synchformer)
        finally:
            constants.HF_HUB_OFFLINE = before
            utils.reset_sessions()

    def load_codec(self):
        vae, vocoder = [weight_file(self.weights, name) for name in self.files(self.variant)[2:]][:2]
        parts = dict(tod_vae_ckpt=vae, bigvgan_vocoder_ckpt=vocoder, need_vae_encoder=False)
        return self.features_utils(enable_conditions=False, **parts)

    def features_utils(self, **parts):
        """Upstream's FeaturesUtils with these parts; it looks for its 44.1 kHz vocoder below the working folder."""
        with upstream("MMAudio"):
            from mmaudio.model.utils.features_utils import FeaturesUtils
        files = ", ".join(str(value) for value in parts.values() if isinstance(value, Path))
        try:
            with reading(files), chdir(self.weights):
                utils = FeaturesUtils(mode=self.mode, **parts)
        except Exception as error:  # upstream's loaders raise a dozen types for a truncated or foreign file
            if of_system(error):
                raise
            reason = " ".join(str(error).split())[:160]
            stop(f"{files}: MMAudio cannot load it ({type(error).__name__}: {reason}); download it again")
        return utils.to(self.device).eval().requires_grad_(False)


ADAPTER = MMAudio
