"""Upstream's own code, with what it cannot import here stood in for, and weight files of exactly
the real form (names, keys, wrapping), made by upstream's own classes at tiny or at real size.

Every `write_...` puts files into a --weights folder. With a `patch` (a MonkeyPatch) networks are
tiny, and for as long as it lasts upstream and we build them so; without one they have their real
size.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import types
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn as nn
import yaml
from conftest import ROOT, a_clip, judged, make_video

import common
from adapters import mmaudio, scorers
from adapters.frieren import Frieren


def weights_row(name):
    """The cells of a file's row in docs/weights.md, all of which a missing file's error repeats."""
    lines = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if f"`{name}`" in line and line.startswith("|"))
    return [cell.strip(" `") for cell in row.split("|")[1:5]]


@contextlib.contextmanager
def stand_ins(made, *others):
    """made: {module name: content}. Meanwhile these, and what is imported beside them, are all that
    there is below their top names and the `others`; afterwards it is gone, and what was there
    before is back."""
    tops = {name.partition(".")[0] for name in (*made, *others)}

    def below():
        return [name for name in sys.modules if name.partition(".")[0] in tops]

    before = {name: sys.modules.pop(name) for name in below()}
    for name, content in made.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name in below():
            del sys.modules[name]
        sys.modules.update(before)


class Decoder:
    """torio's StreamingMediaDecoder as MMAudio and av-benchmark use it: the same ffmpeg filters,
    through PyAV."""

    def __init__(self, path):
        self.path, self.chunks = path, []

    def add_basic_video_stream(self, frames_per_chunk, frame_rate, format):
        frames = []
        with av.open(str(self.path)) as container:
            stream, graph = container.streams.video[0], av.filter.Graph()
            steps = [graph.add("fps", str(frame_rate)), graph.add("format", format)]
            steps.append(graph.add("buffersink"))
            graph.link_nodes(graph.add_buffer(template=stream), *steps).configure()
            for frame in [*container.decode(stream), None]:
                graph.push(frame)
                with contextlib.suppress(BlockingIOError, EOFError):
                    while True:
                        frames.append(torch.from_numpy(graph.vpull().to_ndarray()).permute(2, 0, 1))
        self.chunks.append(torch.stack(frames[:frames_per_chunk]))

    def fill_buffer(self):
        pass

    def pop_chunks(self):
        return self.chunks


TORIO = {"torio": {}, "torio.io": {"StreamingMediaDecoder": Decoder}}

# Clips


def film(path, seconds=9.0, rate=Fraction(43, 2), sound="bursts", size=(160, 90)):
    """A video at a real clip's length and rate, with syllables, silence or no sound at all."""
    waves = {
        "bursts": bursts(seconds, 44_100),
        "silence": np.zeros(int(seconds * 44_100)),
        None: False,
    }
    return make_video(path, size, rate, seconds, sound=waves[sound])


def bursts(seconds, rate_hz, pitch_hz=140.0, seed=0):
    """Voiced syllables, 4 in a second: harmonics under a raised cosine."""
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    voice = sum(np.sin(2 * np.pi * pitch_hz * k * t + k) / k for k in range(1, 12))
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.2 * voice + 0.01 * noise) * np.clip(np.sin(2 * np.pi * 2 * t), 0, None)


# Random weights


def wake(module, seed):
    """Random weights everywhere, of a size that keeps signals alive: a fresh network would hide t,
    attention and position in a DiT's zero projections, and the latent behind a vocoder's biases."""
    torch.manual_seed(seed)
    for name, p in module.named_parameters():
        nn.init.normal_(p, std=0.1 if p.dim() < 2 else p[0].numel() ** -0.5)
        if p.dim() == 1 and name.endswith("weight"):  # a norm's scale
            p.data += 1


def wake_vocoder(generator, volume):
    """A BigVGAN, whose weights are weight-normed: original0 or weight_g is a filter's length."""
    wake(generator, 1)
    for name, p in generator.conv_post.named_parameters():
        if name == "bias":
            p.data.zero_()
        elif name.endswith(("original0", "weight_g")):
            p.data.mul_(volume)


def lively(net, seed=0):
    """Random weights under which different inputs give different outputs; batch norms that are no
    identity."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


# MMAudio

MMAUDIO = {
    "networks": "mmaudio.model.networks",
    "flow_matching": "mmaudio.model.flow_matching",
    "features_utils": "mmaudio.model.utils.features_utils",
    "eval_utils": "mmaudio.eval_utils",
    "synchformer": "mmaudio.ext.synchformer.synchformer",
    "motionformer": "mmaudio.ext.synchformer.motionformer",
    "vae": "mmaudio.ext.autoencoder.vae",
    "autoencoder": "mmaudio.ext.autoencoder.autoencoder",
    "bigvgan": "mmaudio.ext.bigvgan.models",
    "video_dataset": "mmaudio.data.eval.video_dataset",
    "bigvgan_v2": "mmaudio.ext.bigvgan_v2.bigvgan",
}
BIGVGAN = dict(
    resblock="1", upsample_initial_channel=64, resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1, 3, 5]], activation="snakebeta", snake_logscale=True,
)  # fmt: skip
BIGVGAN_16K = BIGVGAN | dict(num_mels=80, upsample_rates=[4, 4, 2, 2, 2, 2])
BIGVGAN_16K["upsample_kernel_sizes"] = [8, 8, 4, 4, 4, 4]
BIGVGAN_44K = BIGVGAN | dict(num_mels=128, upsample_rates=[8, 4, 2, 2, 2, 2])
BIGVGAN_44K["upsample_kernel_sizes"] = [16, 8, 4, 4, 4, 4]
BIGVGAN_44K_REAL = BIGVGAN_44K | dict(
    resblock_kernel_sizes=[3, 7, 11], resblock_dilation_sizes=[[1, 3, 5]] * 3,
    upsample_initial_channel=1536,
)  # fmt: skip
CLIP = dict(
    embed_dim=1024, quick_gelu=True,
    vision_cfg=dict(image_size=384, patch_size=128, width=64, layers=1, head_width=64),
    text_cfg=dict(context_length=77, vocab_size=49408, width=1024, heads=16, layers=1),
)  # fmt: skip
CLIP_REAL = dict(
    CLIP, vision_cfg=dict(image_size=384, patch_size=14, width=1280, layers=32, head_width=80),
    text_cfg=dict(CLIP["text_cfg"], layers=24),
)  # fmt: skip


def tiny_network(variant):
    """Upstream's MMAudio with the variant's true latent and feature shapes, 64 channels and three
    blocks."""
    channels, length = (20, 250) if variant.endswith("16k") else (40, 345)
    return mmaudio_modules().networks.MMAudio(
        latent_dim=channels, latent_seq_len=length, clip_seq_len=64, sync_seq_len=192,
        clip_dim=1024, sync_dim=768, text_dim=1024, hidden_dim=64, depth=3, fused_depth=1,
        num_heads=2, v2=variant.endswith("v2"),
    )  # fmt: skip


def random_state(network, seed):
    """A network's state dict without the zeros and nans of a fresh one, which would hide most
    mistakes."""
    torch.manual_seed(seed)
    state = network.state_dict()
    for name, value in state.items():
        if "adaLN" in name or "final_layer" in name or "empty" in name or "pos_emb" in name:
            value.normal_(std=0.1)
    state["latent_mean"].normal_()
    state["latent_std"].uniform_(0.5, 1.5)
    return state


@functools.cache
def mmaudio_modules():
    # it would import tensorboard
    sys.modules.setdefault("mmaudio.utils.dist_utils", SimpleNamespace(local_rank=0))
    with common.upstream("MMAudio"), stand_ins(TORIO):
        modules = {name: importlib.import_module(path) for name, path in MMAUDIO.items()}
    return SimpleNamespace(**modules)


def mmaudio_frames(path):
    """A video through the reader of MMAudio's evaluation: the frames for CLIP and for
    Synchformer."""
    reader = mmaudio_modules().video_dataset.VideoDataset(path.parent)
    reader.videos, reader.captions = [path.stem], {path.stem: ""}
    read = reader.sample(0)
    return read["clip_video"], read["sync_video"]


def mmaudio_generate(net, model, clip, steps, seed):
    """MMAudio's generate() from a video file to the wave (S,); encoders and codec are the upstream
    ones that our model holds."""
    code, encoders, codec = mmaudio_modules(), model.encoders(), model.codec()
    utils = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    utils.decode, utils.vocode = codec.decode, codec.vocode
    for name in ("encode_video_with_clip", "encode_video_with_sync", "encode_text"):
        setattr(utils, name, getattr(encoders, name))
    euler = code.flow_matching.FlowMatching(0, "euler", steps)
    settings = dict(feature_utils=utils, net=net, fm=euler)
    settings |= dict(rng=torch.Generator().manual_seed(seed), cfg_strength=4.5)
    frames = (part[None] for part in mmaudio_frames(clip.path))
    with torch.inference_mode():
        return code.eval_utils.generate(*frames, [clip.caption], **settings)[0, 0].clone()


def shrink_motionformer(module, patch):
    """Synchformer's video tower: one narrow layer, 16 patches a frame instead of 196."""
    from omegaconf import OmegaConf

    def load(path):
        config = OmegaConf.load(path)
        config.VIT.DEPTH, config.VIT.PATCH_SIZE, config.VIT.MLP_RATIO = 1, 56, 1
        return config

    patch.setattr(module, "OmegaConf", SimpleNamespace(load=load))


def write_mmaudio(folder, patch):
    """MMAudio's files in `folder` and CLIP in a Hugging Face cache below it."""
    from omegaconf import OmegaConf

    upstream = mmaudio_modules()
    torch.manual_seed(0)
    patch.setattr(upstream.networks, "get_my_mmaudio", tiny_network)
    for seed, name in enumerate(("small_16k", "small_44k", "large_44k_v2")):
        torch.save(random_state(tiny_network(name), seed), folder / f"mmaudio_{name}.pth")

    sizes = {"16k": (80, 20), "44k": (128, 40)}

    def vae(mode):
        return upstream.vae.VAE(data_dim=sizes[mode][0], embed_dim=sizes[mode][1], hidden_dim=16)

    patch.setattr(upstream.autoencoder, "get_my_vae", vae)
    OmegaConf.save(BIGVGAN_16K, folder / "tiny.yml")
    with_tiny = functools.partial(upstream.autoencoder.BigVGAN, config_path=folder / "tiny.yml")
    patch.setattr(upstream.autoencoder, "BigVGAN", with_tiny)
    write_codec(folder, "16", vae("16k"), BIGVGAN_16K)
    write_codec(folder, "44", vae("44k"), BIGVGAN_44K)
    shrink_motionformer(upstream.motionformer, patch)
    net = upstream.synchformer.Synchformer()
    torch.save(net.state_dict(), folder / "synchformer_state_dict.pth")
    write_clip(folder, patch, CLIP)


def write_codec(folder, rate, vae, sizes):
    from omegaconf import OmegaConf

    upstream = mmaudio_modules()
    torch.save(vae.state_dict(), folder / f"v1-{rate}.pth")
    if rate == "16":
        generator = upstream.bigvgan.BigVGANVocoder(OmegaConf.create(sizes))
        file = folder / "best_netG.pt"
    else:
        generator = upstream.bigvgan_v2.BigVGAN(upstream.bigvgan_v2.AttrDict(sizes))
        file = folder / mmaudio.VOCODER / "bigvgan_generator.pt"
        file.parent.mkdir(parents=True)
        file.with_name("config.json").write_text(json.dumps(sizes))
    wake_vocoder(generator, volume=1e-4)
    torch.save({"generator": generator.state_dict()}, file)


def write_clip(folder, patch, sizes):
    import huggingface_hub
    import open_clip

    cache = folder / "hub"
    snapshot = cache / f"models--{mmaudio.CLIP.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    config = {"model_cfg": sizes, "preprocess_cfg": {}}
    (snapshot / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**sizes).state_dict(), snapshot / "open_clip_pytorch_model.bin")
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def write_real(folder, variant):
    """Network, VAE and vocoder of a variant of MMAudio at their real size: 1.7 GB of small_16k, 5.8
    of large_44k."""
    from omegaconf import OmegaConf

    upstream, rate = mmaudio_modules(), variant.split("_")[1][:2]
    network = upstream.networks.get_my_mmaudio(variant)
    torch.save(random_state(network, 0), folder / f"mmaudio_{variant}.pth")
    config = Path(upstream.bigvgan.__file__).with_name("bigvgan_vocoder.yml")
    sizes = OmegaConf.to_container(OmegaConf.load(config)) if rate == "16" else BIGVGAN_44K_REAL
    write_codec(folder, rate, upstream.vae.get_my_vae(f"{rate}k"), sizes)


# The scorers


def write_imagebind(folder, patch=None):
    """Upstream's class and its checkpoint's real name and keys."""
    with common.upstream("ImageBind"), scorers.without_init("imagebind"):
        from imagebind.models import imagebind_model as upstream
    small = dict(out_embed_dim=16)
    for m, width in dict(vision=32, audio=32, text=16, depth=16, thermal=16, imu=16).items():
        small |= {f"{m}_embed_dim": width, f"{m}_num_blocks": 2, f"{m}_num_heads": 2}
    if patch:
        tiny = lambda pretrained: upstream.ImageBindModel(**small)  # noqa: E731
        patch.setattr(upstream, "imagebind_huge", tiny)
        shape = {"embedding": (small["out_embed_dim"],)}
        patch.setattr(scorers.ImageBindScorer, "video_shapes", shape)
    torch.manual_seed(0)
    net = upstream.imagebind_huge(False).eval()
    # the real initialisation hides the pictures behind nearly equal class tokens
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    torch.save(net.state_dict(), folder / "imagebind_huge.pth")
    return net


def write_clap(folder, patch=None):
    """The official checkpoint's form (prefix, position_ids, optimizer with numpy learning rates),
    tokenizer files."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel

    tokenizer = ByteLevelBPETokenizer()
    words = ["a man talks", "a dog barks in the rain", "someone is playing the drums"]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(words, vocab_size=300, special_tokens=special)
    (folder / "roberta-base").mkdir()
    tokenizer.save_model(str(folder / "roberta-base"))
    roberta, vocab = dict(scorers.ClapScorer.roberta), tokenizer.get_vocab()
    if patch:
        roberta |= dict(num_hidden_layers=1, intermediate_size=64, vocab_size=len(vocab))
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), roberta["vocab_size"])}
    (folder / "roberta-base/vocab.json").write_text(json.dumps(vocab))
    with scorers.without_init("laion_clap"):
        from laion_clap.clap_module import factory, model
    torch.manual_seed(0)
    text_tower = RobertaModel(RobertaConfig(**roberta))
    made = SimpleNamespace(from_pretrained=lambda _: text_tower)
    with pytest.MonkeyPatch.context() as without_hub:
        without_hub.setattr(model, "RobertaModel", made)
        net = lively(factory.create_model("HTSAT-base", "roberta", device="cpu")[0])
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    group = {"lr": np.float64(1e-4), "betas": (0.9, 0.99), "params": [0, 1]}
    optimizer = {"state": {}, "param_groups": [group]}
    official = {"epoch": 15, "name": "clap", "state_dict": state, "optimizer": optimizer}
    torch.save(official, folder / "music_speech_audioset_epoch_15_esc_89.98.pt")
    if patch:
        patch.setattr(scorers.ClapScorer, "roberta", roberta)


def shrink_cnn14(patch):
    """PANNs' Cnn14 with a sixteenth of its channels between the first and the last, and its last
    convolution depthwise."""
    with scorers.without_init("panns_inference"):
        from panns_inference import models

    class Narrow(models.ConvBlock):
        def __init__(self, in_channels, out_channels):
            inner = max(1, in_channels // 16)
            outer = out_channels if out_channels == 2048 else out_channels // 16
            nn.Module.__init__(self)
            self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
            self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False, groups=outer // 4)
            for conv in (self.conv1, self.conv2):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)

    patch.setattr(models, "ConvBlock", Narrow)


def write_panns(folder):
    """Both files in PANNs' form: from before torch's zip format, with the sampler's numpy indices
    beside the model."""
    with scorers.without_init("panns_inference"):
        from panns_inference.models import Cnn14
    for scorer in (scorers.PannsScorer, scorers.Panns16kScorer):
        sizes = dict(sample_rate=scorer.sample_rate_hz, mel_bins=64, classes_num=527)
        net = lively(Cnn14(**sizes, **scorer.stft))
        file = {"iteration": 600000, "model": net.state_dict()}
        file["sampler"] = {"indexes": np.arange(9), "pointer": 4}
        torch.save(file, folder / scorer.files[0], _use_new_zipfile_serialization=False)


def write_passt(folder, patch=None):
    """Tiny: one block of 96 channels; upstream's function, which prints the network, builds it."""
    from hear21passt.models import passt

    tiny = dict(patch_size=16, embed_dim=96, depth=1, num_heads=2, distilled=True)
    build = functools.partial(passt._create_vision_transformer, "passt_s_swa_p16_128_ap476", **tiny)
    if patch:
        patch.setattr(passt, "passt_s_swa_p16_128_ap476", build)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        net = passt.get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False)
    wake(net, 0)
    torch.save(net.state_dict(), folder / "passt-s-f128-p16-s10-ap.476-swa.pt")


def write_synchformer(folder, patch=None):
    """The one file that MMAudio (its video tower) and DeSync (all of it) read; tiny ones see 16
    patches a frame."""
    with common.upstream("av-benchmark"):
        from av_bench.synchformer import ast, motionformer, synchformer
    if patch:
        shrink_motionformer(motionformer, patch)
        one_layer = dict(num_hidden_layers=1, intermediate_size=64)
        patch.setattr(ast, "ASTConfig", functools.partial(ast.ASTConfig, **one_layer))
        whole = synchformer.GlobalTransformer
        shallow = lambda **sizes: whole(**(sizes | {"n_layer": 1}))  # noqa: E731
        patch.setattr(synchformer, "GlobalTransformer", shallow)
    torch.manual_seed(0)
    net = synchformer.Synchformer().eval()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    file = folder / "synchformer_state_dict.pth"
    torch.save(net.state_dict(), file)
    if not patch:
        return

    # Random weights give every clip and sound the same offset: centre the logits on what some of
    # them give.
    logits, clip = [], a_clip(film(folder / "a.mp4"))
    hook = synchformer.Synchformer.compare_v_a
    scorer = scorers.SCORERS["synchformer"](folder, "cpu")
    scorer.net.compare_v_a = lambda *x: logits.append(hook(scorer.net, *x)) or logits[-1]
    noise = 0.2 * torch.randn(2, 128_000, generator=torch.Generator().manual_seed(0))
    voices = [torch.from_numpy(bursts(8, 16000, pitch)).float() for pitch in (100, 400)]
    voices = torch.stack(voices)
    judged(scorer, torch.cat([voices, voices + noise, noise]), [clip] * 6)
    net.transformer.off_head.bias.data -= torch.cat(logits).mean(dim=0)
    torch.save(net.state_dict(), file)


def shrink_htsat(patch):
    """CLAP's audio tower with one block per stage instead of 2, 2, 12, 2."""
    with scorers.without_init("laion_clap"):
        from laion_clap.clap_module import htsat, model
    tiny = dict(spec_size=256, patch_size=4, patch_stride=(4, 4), embed_dim=128, depths=[1] * 4)
    tiny["window_size"] = 8

    def build(config, enable_fusion, fusion_type):
        fusion = dict(enable_fusion=enable_fusion, fusion_type=fusion_type)
        heads = dict(num_heads=[4, 8, 16, 32], num_classes=config.class_num)
        return htsat.HTSAT_Swin_Transformer(config=config, **tiny, **heads, **fusion)

    patch.setattr(model, "create_htsat_model", build)


def count():
    """Prints the TFLOP of networks of real size, for one clip or one audio."""
    import open_clip
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    upstream, zeros = mmaudio_modules(), torch.zeros
    with common.upstream("ImageBind"), scorers.without_init("imagebind"):
        from imagebind.models import imagebind_model
    with common.upstream("av-benchmark"):
        from av_bench.synchformer.synchformer import Synchformer
    sizes = upstream.bigvgan_v2.AttrDict(BIGVGAN_44K_REAL)
    vocoder = functools.partial(upstream.bigvgan_v2.BigVGAN, sizes)
    imagebind = imagebind_model.imagebind_huge

    def vae():
        made = upstream.vae.get_my_vae("44k")
        made.remove_weight_norm()
        return made

    parts = {
        "CLIP, 64 pictures": (
            lambda: open_clip.CLIP(**CLIP_REAL), lambda n: n.encode_image(zeros(64, 3, 384, 384))),
        "Synchformer, video": (
            Synchformer, lambda n: n.extract_vfeats(zeros(24, 1, 16, 3, 224, 224))),
        "Synchformer, audio": (Synchformer, lambda n: n.extract_afeats(zeros(1, 24, 1, 128, 66))),
        "ImageBind, video": (imagebind, lambda n: n({"vision": zeros(1, 9, 3, 2, 224, 224)})),
        "ImageBind, audio": (imagebind, lambda n: n({"audio": zeros(1, 3, 1, 128, 204)})),
        "VAE, 44.1 kHz": (vae, lambda n: n.decode(zeros(1, 40, 345))),
        "vocoder, 44.1 kHz": (vocoder, lambda n: n(zeros(1, 128, 690))),
    }  # fmt: skip
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_"):
        setattr(nn.init, name, lambda x, *_, **__: x)  # values do not matter
    nn.init.trunc_normal_ = nn.init.normal_
    # an operator that the counter does not know, as fused attention
    torch.backends.mha.set_fastpath_enabled(False)
    counted, made_up = FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)
    for name, (build, call) in parts.items():
        network = build().eval()
        with made_up, counted as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            call(network)
        print(f"| {name} | {counter.get_total_flops() / 1e12:.3g} |", flush=True)


# Frieren

TINY_DIT = dict(in_channels=20, context_dim=768, hidden_size=64, num_heads=2, depth=2, max_len=300)
TINY_VAE = dict(Frieren.vae_config, ch=32)


def frieren_root():
    root = Path(os.environ["UPSTREAM_DIR"]) / "Frieren-V2A"
    if not root.is_dir():
        pytest.skip(f"no clone of Frieren-V2A in {root.parent}")
    return root


class EulerOnly:
    """torchdyn's NeuralODE(solver='euler') on a given time grid: the next step is measured from the
    accumulated t."""

    def __init__(self, field, solver, **_):
        assert solver == "euler"
        self.field = field

    def __call__(self, x, times):
        t, dt, states = times[0], times[1] - times[0], [x]
        for index in range(1, len(times)):
            x = x + dt * self.field(t, x, args={})
            states.append(x)
            t = t + dt
            if index < len(times) - 1:
                dt = times[index + 1] - t
        return times, torch.stack(states)


class BareLightning(nn.Module):
    """What Frieren's classes use of LightningModule outside of training; `cuda` stays where it
    is."""

    device = property(lambda self: next(self.parameters()).device)

    def cuda(self):
        return self


@contextlib.contextmanager
def frieren_modules(torchdyn=False):
    """Upstream's packages importable under their own names, with stand-ins; all gone afterwards."""

    def load(path):
        return SimpleNamespace(**yaml.safe_load(Path(path).read_text()))

    made = {
        "pytorch_lightning": {"LightningModule": BareLightning},
        "pytorch_lightning.utilities": {},
        "pytorch_lightning.utilities.distributed": {"rank_zero_only": lambda function: function},
        "omegaconf": {"OmegaConf": SimpleNamespace(load=load)},
    }
    if torchdyn:
        importlib.import_module("torchdyn.core")  # the real one, which needs the real Lightning
    else:
        made |= {"torchdyn": {}, "torchdyn.core": {"NeuralODE": EulerOnly}}
    with stand_ins(made, "cfm", "vocoder"), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(frieren_root() / "Frieren"))
        yield


def frieren_script(folder, patch):
    """script/generate_mel_cfm_cfg_scale.py as it is, and its configuration as a file in `folder`;
    within `frieren_modules`."""
    (folder / "infer.yaml").write_text(yaml.safe_dump(inference_config()))
    patch.chdir(frieren_root() / "script")
    spec = importlib.util.spec_from_file_location("generate", "generate_mel_cfm_cfg_scale.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script, script.OmegaConf.load(folder / "infer.yaml")


def inference_config():
    """Upstream's own inference config, made small; no separate VAE file."""
    file = frieren_root() / "Frieren/configs/ldm_training/v2a_cfm_cfg_infer.yaml"
    config = yaml.safe_load(file.read_text())
    params = config["model"]["params"]
    params["unet_config"]["params"] = TINY_DIT
    params["first_stage_config"]["params"] |= {"ckpt_path": None, "ddconfig": TINY_VAE}
    return config


def frieren_model(torchdyn=False):
    with frieren_modules(torchdyn), contextlib.redirect_stdout(None):
        config = inference_config()["model"]
        model = importlib.import_module("cfm.util").instantiate_from_config(config)
        wake(model, 0)
    return model.eval()


class ModelCheckpoint:
    """Pickles by Lightning's name, as its checkpoints key their callbacks."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


LOGS = "/x/logs/2024_v2a_cfm_train_load_novidpos_concat_2card/checkpoints"


def save_lightning(path, state, dirpath=LOGS, **more):
    """A file with the pickled names that Lightning 1.4 leaves in a checkpoint of Frieren's
    training."""
    callback = {"monitor": "val/loss", "best_model_score": torch.tensor(0.5), "dirpath": dirpath}
    callback["best_model_path"] = ""
    optimizer = {"param_groups": [{"lr": np.float64(5e-5), "steps": np.int64(3)}], "state": {}}
    file = {"epoch": 7, "global_step": 1234, "pytorch-lightning_version": "1.4.2"}
    file |= {"state_dict": state, "callbacks": {ModelCheckpoint: callback}}
    file |= {"optimizer_states": [optimizer], "lr_schedulers": []}
    package, module = "pytorch_lightning.callbacks", {"ModelCheckpoint": ModelCheckpoint}
    with stand_ins({"pytorch_lightning": {}, package: {}, ModelCheckpoint.__module__: module}):
        torch.save(file | more, path)


def write_frieren(folder, patch):
    """The Lightning-style checkpoint and the vocoder. Returns upstream's model."""
    patch.setattr(Frieren, "dit_config", TINY_DIT)
    patch.setattr(Frieren, "vae_config", TINY_VAE)
    theirs = frieren_model()
    checkpoint = folder / "v2a/noreflow/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    save_lightning(checkpoint, theirs.state_dict())
    vocoder = folder / "bigvnat"
    vocoder.mkdir()
    (vocoder / "args.yml").write_text(yaml.safe_dump(BIGVGAN_16K))
    with frieren_modules():
        models = importlib.import_module("vocoder.bigvgan.models")
        net = models.BigVGAN(SimpleNamespace(**BIGVGAN_16K))
    wake_vocoder(net, volume=1e-4)
    torch.save({"generator": net.state_dict()}, vocoder / "best_netG.pt")
    return theirs


def write_cavp(folder, ids):
    folder.mkdir()
    for index, name in enumerate(ids):
        rows = torch.randn(40, 512, generator=torch.Generator().manual_seed(index))
        rows = torch.nn.functional.normalize(rows, dim=1)
        np.savez(folder / f"{name}.npz", feat=rows.numpy())
