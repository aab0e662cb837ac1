"""MMAudio (Cheng et al., CVPR 2025, https://arxiv.org/abs/2412.15322) as a FlowModel
(docs/mmaudio.md)."""

import functools
from contextlib import chdir
from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode, v2

from common import FlowModel, files, media, speed, stop, training, upstream, weight_file

# The paper tunes large_44k.
VARIANTS = ("small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2")
# CLIP is read from the Hugging Face cache, where upstream looks for it.
CLIP = "apple/DFN5B-CLIP-ViT-H-14-384"
CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin")
VOCODER = "nvidia/bigvgan_v2_44khz_128band_512x"  # a folder below --weights


class MMAudio(FlowModel):
    """MMAudio by upstream's own classes, whose time runs from noise (0) to data (1).

    Weights and t stay in float32, also under autocast: in bfloat16 the time embedding of
    large_44k_v2 would lose its high frequencies (up to 1e4).
    """

    clip_s = 8.0
    feature_shapes = {"clip": (64, 1024), "sync": (192, 768), "text": (77, 1024)}
    seen_as = {"synchformer": ("sync", "segments", (24, 8, 768))}
    reads_video = True

    @classmethod
    def files(cls, variant):
        """Checkpoint, Synchformer, VAE and vocoder; CLIP lies in the Hugging Face cache
        (`missing_elsewhere`)."""
        if variant not in VARIANTS:
            stop(f"--model mmaudio:{variant}: no such variant; choose one of {', '.join(VARIANTS)}")
        own = [f"mmaudio_{variant}.pth", "synchformer_state_dict.pth"]
        if variant.endswith("16k"):
            return [*own, "v1-16.pth", "best_netG.pt"]
        return [*own, "v1-44.pth", f"{VOCODER}/bigvgan_generator.pt", f"{VOCODER}/config.json"]

    @classmethod
    def missing_elsewhere(cls):
        """A line on a missing file of CLIP, which upstream reads from the Hugging Face cache."""
        from huggingface_hub import constants, try_to_load_from_cache

        for name in CLIP_FILES:
            if not isinstance(try_to_load_from_cache(CLIP, name), str):
                missing = f"{name} of MMAudio's CLIP (3.7 GiB) is missing"
                fetch = f"run: hf download {CLIP} {' '.join(CLIP_FILES)}"
                return f"{constants.HF_HUB_CACHE}: {missing}; {fetch}"
        return None

    def __init__(self, variant, checkpoint, weights):
        super().__init__()
        names = self.files(variant)
        with upstream("MMAudio"):
            from mmaudio.model import low_level, networks
        self.variant = variant
        self.weights = Path(weights).absolute()
        self.mode = variant.split("_")[1]
        self.sample_rate_hz = {"16k": 16000, "44k": 44100}[self.mode]
        self.checkpoint = Path(checkpoint or weight_file(self.weights, names[0]))
        self.net = networks.get_my_mmaudio(variant)
        if torch.cuda.is_available():  # on a CPU this would take up to half as long again
            speed.keep_channels_last(self.net, low_level.ChannelLastConv1d)
        self.conditions_class = networks.PreprocessedConditions
        self.latent_shape = (self.net.latent_seq_len, self.net.latent_dim)
        # These are null conditions. Upstream itself freezes the third one, empty_string_feat.
        self.net.empty_clip_feat.requires_grad_(False)
        self.net.empty_sync_feat.requires_grad_(False)
        self.load_policy(self.checkpoint)
        # Loaded when first used. A cached function is no submodule, and all copies of the model
        # share it.
        self.encoders = functools.cache(self.load_encoders)
        self.codec = functools.cache(self.load_codec)
        self.text_features = functools.lru_cache(maxsize=512)(self.encode_text)

    def project(self, features):
        clip = features["clip"].to(self.device)
        sync = features["sync"].to(self.device)
        text = features["text"].to(self.device)
        conditions = self.net.preprocess_conditions(clip, sync, text)
        return vars(conditions)

    def null_conditions(self, conditions):
        # The learned null video and empty_string_feat, as in upstream's evaluation: its
        # batch_eval.py gives no negative text. Its demo.py encodes the text '' with CLIP instead.
        return vars(self.net.get_empty_conditions(len(conditions["clip_f"])))

    def predict(self, a_t, t, conditions):
        # Upstream's time is 1 - t, its velocity x1 - x0 = a_0 - eps.
        return -self.net.predict_flow(a_t, 1 - t.float(), self.conditions_class(**conditions))

    def blocks(self):
        return [*self.net.joint_blocks, *self.net.fused_blocks]

    def policy_state(self):
        state = self.net.state_dict()
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}

    def load_policy(self, path):
        """path: a bare state dict, which is the format of upstream's files and of policy.pt."""
        try:
            self.net.load_weights(files.load_pt(path, mmap=True))
        except (RuntimeError, TypeError) as error:
            said = str(error).replace("Error(s) in loading state_dict for MMAudio:", "")
            reason = " ".join(said.split())[:120]
            given = f"not the weights of mmaudio:{self.variant} ({reason})"
            stop(f"{path}: {given}; give a file of this variant")

    # Frozen parts: CLIP and Synchformer; VAE and vocoder
    # ----------------------------------------------------

    def read(self, clip, others=()):
        """(64, 3, 384, 384) at 8 fps for CLIP and (200, 3, 224, 224) at 25 fps for Synchformer, as
        uint8, since they go through a pipe."""
        squash = v2.Resize((384, 384), InterpolationMode.BICUBIC)
        crop = v2.Compose([v2.Resize(224, InterpolationMode.BICUBIC), v2.CenterCrop(224)])
        return media.read_frames(clip.path, [(8, squash), (25, crop), *others], self.clip_s)

    def encode(self, clip, tensors):
        """clip: CLIP's embeddings of pictures; sync: Synchformer's of segments; text: CLIP's of the
        caption."""
        to_float32 = v2.ToDtype(torch.float32, scale=True)
        centre = v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True)
        squashed = to_float32(tensors[0].to(self.device))
        cropped = centre(to_float32(tensors[1].to(self.device)))
        text = self.net.empty_string_feat.data  # upstream trains with this where text is missing
        if clip.caption:
            text = self.text_features(clip.caption)
        encoders = self.encoders()
        with training.autocast(self.device.type):  # as upstream's own evaluation runs it
            pictures = encoders.encode_video_with_clip(squashed[None])[0]
        # Not in bf16: DeSync uses these embeddings too, and takes its offset from the largest of 21
        # numbers. 8 of the 24 segments at a time.
        segments = encoders.encode_video_with_sync(cropped[None], batch_size=8)[0]
        features = {"clip": pictures, "sync": segments, "text": text}
        # Cloned, since a clone is no inference tensor.
        return {key: value.float().cpu().clone() for key, value in features.items()}

    def encode_text(self, caption):
        with training.autocast(self.device.type):
            return self.encoders().encode_text([caption])[0].cpu()

    @torch.no_grad()
    def decode(self, latents):
        codec = self.codec()
        waves = []
        for part in latents.split(8):
            copied = part.to(self.device, torch.float32, copy=True)
            latent = self.net.unnormalize(copied)  # works in place
            with training.autocast(self.device.type):  # as upstream's own evaluation runs both
                decoded = codec.vocode(codec.decode(latent))
            waves.append(decoded.float().cpu().clone())
        samples = round(self.clip_s * self.sample_rate_hz)  # at 44.1 kHz the codec makes 480 more
        return torch.cat(waves)[:, 0, :samples]

    @torch.no_grad()
    def encode_audio(self, waves):
        """The mean of the distribution that upstream's VAE returns, in float32, as upstream encodes
        its training data."""
        codec = self.codec(need_vae_encoder=True)
        # A latent frame covers two mel frames. At 44.1 kHz all of them cover 480 samples more than
        # 8 s; these are filled with silence.
        whole = 2 * codec.mel_converter.hop_size * self.latent_shape[0]
        waves = media.fit_length(waves.float(), whole)
        latents = []
        for part in waves.split(8):
            mean = codec.encode_audio(part.to(self.device)).mean.transpose(1, 2)
            latents.append(self.net.normalize(mean.clone()).cpu())  # works in place
        return torch.cat(latents)

    def load_encoders(self):
        from huggingface_hub import constants, utils

        _, synchformer, *_ = self.files(self.variant)
        synchformer = weight_file(self.weights, synchformer)
        missing = self.missing_elsewhere()
        if missing:
            stop(missing)
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True  # the files are here, so the hub is not asked
        utils.reset_sessions()
        try:
            encoders = self.features_utils(enable_conditions=True, synchformer_ckpt=synchformer)
        finally:
            constants.HF_HUB_OFFLINE = before
            utils.reset_sessions()
        if self.compiled:
            blocks = encoders.clip_model.visual.transformer.resblocks
            speed.compile_blocks(blocks, (encoders, "encode_video_with_clip"))
            blocks = encoders.synchformer.vfeat_extractor.blocks
            speed.compile_blocks(blocks, (encoders, "encode_video_with_sync"))
        return encoders

    def load_codec(self, need_vae_encoder=False):
        _, _, *names = self.files(self.variant)
        vae, vocoder, *_ = [weight_file(self.weights, name) for name in names]
        parts = dict(tod_vae_ckpt=vae, bigvgan_vocoder_ckpt=vocoder)
        parts["need_vae_encoder"] = need_vae_encoder
        codec = self.features_utils(enable_conditions=False, **parts)
        activations = speed.slice_activations(codec.tod.vocoder)
        if self.compiled:
            speed.compile_blocks(activations, (codec, "vocode"))
            speed.compile_blocks([codec.tod.vae.decoder], (codec, "decode"))
        return codec

    def features_utils(self, **parts):
        """Upstream's FeaturesUtils with these parts. For 44.1 kHz it ignores the vocoder's file
        that it is given, and looks for VOCODER below the working folder."""
        with upstream("MMAudio"):
            from mmaudio.model.utils.features_utils import FeaturesUtils
        names = ", ".join(str(value) for value in parts.values() if isinstance(value, Path))
        try:
            with files.reading(names), chdir(self.weights):
                utils = FeaturesUtils(mode=self.mode, **parts)
        # For a truncated or foreign file upstream's loaders raise a dozen types.
        except Exception as error:
            if files.of_system(error):
                raise
            reason = " ".join(str(error).split())[:160]
            why = f"{type(error).__name__}: {reason}"
            stop(f"{names}: MMAudio cannot load it ({why}); download it again")
        return utils.to(self.device).eval().requires_grad_(False)


ADAPTER = MMAudio
