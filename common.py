"""The paper in code: notation, AudioScore (Sec. 2.1), the curriculum (Eq. 3), Flow-DPO (Eq. 5),
the interfaces of a scorer and of a backbone, the sampler, their loaders.

Read it from the first line to the last. The code that a reader of the paper need not open is in
`plumbing/`; stages import its modules from here: `from common import record, rows`.

Notation. Times follow the paper: t = 0 is data, t = 1 is noise.

| paper          | variable | shape     | unit, range         | in MMAudio's code  | in Frieren's |
|----------------|----------|-----------|---------------------|--------------------|--------------|
| a_0            | a_0      | (B, T, C) | normalised latent   | x1                 | x1 (B, C, T) |
| eps            | eps      | (B, T, C) | N(0, 1)             | x0                 | x0           |
| t              | t        | (B,)      | [0, 1], 1 = noise   | 1 - t              | 1000 (1 - t) |
| a_t            | a_t      | (B, T, C) | (1 - t) a_0 + t eps | xt                 | xt           |
| v (velocity)   | v        | (B, T, C) | eps - a_0           | -(x1 - x0)         | -ut          |
| u_theta, u_ref | u        | (B, T, C) | predicted v         | -predict_flow      | -apply_model |
| v, c (inputs)  | features | B rows    | of frozen encoders  | clip, sync, text_f | CAVP         |
| gamma          | guidance | float     | 1 = no guidance     | cfg_strength       | cfg scale    |
| beta           | beta     | float     | Eq. 5               |                    |              |
| p_i            | p        | (B, 3)    | (Good, Medium, Bad) |                    |              |
| score_c        | score_c  | float     | [-1, 1], Eq. 3      |                    |              |
| score_Delta    | threshold| float     | [0, 1], Sec. 2.3    |                    |              |
| N              | R        | int       | audios of a clip    |                    |              |

A latent has T places in time of C channels, a wave has S samples; k is the number of an audio among
those of its clip, from 0 on. Where each of B clips has R audios, row r * B + b is the r-th audio of
clip b. A network's `conditions` are its own projections of the features, one row for each clip.

Words of the stages:
    clip      a video with its caption, label and split; its audios are numbered by k
    given     an audio that the model did not make, taken in by 01 --given
    rated     a clip of whose audios people rated some (stage 02). Paper silent: it gives no pair
              (03) and no prompt of DDPO (06), since AudioScore was fitted on it
    rate      the split of clips of which a run has nothing but given audio, for people to rate
    shard     up to 32 train clips, which stage 01 samples and stores together
    block     up to 32 clips whose audios are scored together; in stage 03 those of a shard
    claim     to record what a stage is made with, or to compare it with that record
    part      the share of a stage's work that one machine does, by --part
"""

import hashlib
import importlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import (  # noqa: F401, some are imported here only for stages and adapters
    ahead,
    command,
    cores,
    digits,
    files,
    inputs,
    media,
    people,
    ranks,
    record,
    rows,
    scoring,
    speed,
    training,
)
from plumbing.downloads import print_missing, upstream, weight_file  # noqa: F401
from plumbing.files import NoAudio, NoFile, SkipClip, Stop, run_flag, stop  # noqa: F401

digits.same_on_every_cpu()  # before torch computes anything

RATINGS = ("Good", "Medium", "Bad")  # the order of every probability vector (Eq. 1)
# score_1 ... score_5 (Sec. 2.1), by ImageBind, CLAP, Synchformer, PANNs and PESQ.
SCORES = ("ib", "clap", "desync_s", "is_nats", "pesq")

# --------------------------------------------------------------------------------------------------
# AudioScore (Sec. 2.1)
# --------------------------------------------------------------------------------------------------

HIDDEN = 32  # Paper silent: the width between AudioScore's two layers.


class AudioScore(nn.Module):
    """S(.) of Eq. 1: five scores -> probabilities of (Good, Medium, Bad).

    z-score (paper silent), Linear(5, 32), ReLU, Linear(32, 3), softmax. Its buffers hold the means
    and standard deviations for the z-score (mean, std: (5,)) and the tagger's marginal p(y) (p_y:
    (tags,)), both over the rated audios that it was fitted on, so that a score means the same at
    every use. The tagger is the network that tells what sounds an audio holds: PANNs with its 527
    tags, and in the toy world another. Stage 02's docstring says which network gives which score.
    """

    def __init__(self, tags):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(SCORES)))
        self.register_buffer("std", torch.ones(len(SCORES)))
        self.register_buffer("p_y", torch.full((tags,), 1.0 / tags))
        self.mlp = nn.Sequential(
            nn.Linear(len(SCORES), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(RATINGS))
        )

    def logits(self, scores):
        """(B, 5) float32 -> (B, 3), one for each rating. Paper silent: a score that does not apply
        (PESQ without speech). Ours is nan, and counts as the mean."""
        return self.mlp(torch.nan_to_num((scores - self.mean) / self.std, nan=0.0))

    def forward(self, scores):
        """(B, 5) -> p (B, 3) float64, each row sums to 1. In float32 several bad audios of a clip
        would have P(Bad) = 1 exactly, and tie for the loser of Eq. 2."""
        return self.logits(scores).double().softmax(dim=-1)

    def five_scores(self, measured):
        """(n, 5) float32 in the order of SCORES, nan where a score does not apply. measured: what
        the scorers measured on n audios, {ib, clap, desync_s, pesq: (n,), tag_logits: (n,
        tags)}."""
        if measured["tag_logits"].shape[1:] != self.p_y.shape:
            stop(
                "02_audioscore.pt: fitted with another tagger than this run's; rerun "
                "02_fit_audioscore.py --redo"
            )
        is_nats = self.inception(measured["tag_logits"])
        return torch.stack(
            [measured["ib"], measured["clap"], measured["desync_s"], is_nats, measured["pesq"]],
            dim=1,
        )

    def inception(self, tag_logits):
        """score_4: KL(p(y|a) || p(y)) in nats for each audio; tag_logits (B, tags) -> (B,).

        Paper silent: what the inception score of a single audio is. This is an audio's contribution
        to the usual IS, which is exp of the mean over audios. PANNs was trained with a sigmoid for
        each tag; p(y|a) is a softmax over its logits all the same, as in av-benchmark's IS.
        """
        log_p = tag_logits.float().log_softmax(dim=-1)
        return (log_p.exp() * (log_p - self.p_y.clamp_min(1e-12).log())).sum(dim=-1)

    @classmethod
    def load(cls, path, device="cpu"):
        if_not = "is not an AudioScore; rerun 02_fit_audioscore.py --redo"
        state = files.load_pt(path, {"audioscore": dict})["audioscore"]
        try:
            self = cls(tags=len(state["p_y"]))
        except (KeyError, TypeError):
            stop(f"{path}: {if_not}")
        files.load_weights(self, state, path, if_not)
        return self.to(device).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# The curriculum (Sec. 2.3, Eq. 3). Eq. 2, which finds the pairs, is in 03_mine_pairs.py
# --------------------------------------------------------------------------------------------------


def score_c(p_w, p_l):
    """Eq. 3: a float in [-1, 1], high = an easy pair. p_w, p_l: the winner's and the loser's
    probabilities (Good, Medium, Bad)."""
    good_w, _, bad_w = p_w
    good_l, _, bad_l = p_l
    return 0.5 * ((good_w - good_l) + (bad_l - bad_w))


def split(pairs, threshold):
    """The curriculum's two stages. Stage 1: the easy pairs, whose score_c is above the threshold;
    stage 2: the others. pairs: a list of rows.SplitPair."""
    easy = [pair for pair in pairs if pair.score_c > threshold]
    hard = [pair for pair in pairs if pair.score_c <= threshold]
    return easy, hard


# --------------------------------------------------------------------------------------------------
# Flow-DPO (Sec. 2.3, Eq. 5)
# --------------------------------------------------------------------------------------------------


def interpolate(a_0, eps, t):
    """Rectified flow's straight path (below Eq. 5).

    a_0, eps: (B, T, C); t: (B,) in [0, 1], 1 = noise. Returns a_t (B, T, C), the point at time t,
    and v (B, T, C) = eps - a_0, the path's velocity.
    """
    t = t[:, None, None]
    return (1 - t) * a_0 + t * eps, eps - a_0


def flow_error(v, u):
    """||v - u||^2 of Eq. 5 for each row: v, u (B, T, C), any float type -> (B,) float32.

    Eq. 5 prints a norm, which is a sum over the latent. We average over it, as Diffusion-DPO's code
    and its followers do, so that beta means the same for every latent size. A beta of ours equals a
    beta / (T C) of the printed form. We take the paper's 600 as one of ours; of the printed form it
    would be 600 / (345 * 40) = .043 for MMAudio.
    """
    return (v.float() - u.float()).square().mean(dim=(1, 2))


def flow_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, beta, printed=False):
    """Eq. 5 for each pair; no model, no randomness.

    err_*: (B,) float32, `flow_error` of policy and reference on winner and loser. Returns loss
    (B,), log 2 where policy equals reference, and logits (B,), positive where the policy already
    prefers the winner (the implicit reward's margin).

    W and L are the gaps of winner and loser, the policy's error minus the reference's. A flow has
    no log(policy / reference) of an audio, which Eq. 4 asks for; -1/2 times the audio's gap takes
    its place. Eq. 5 as it is printed sets its brackets in another way than Eq. 4:

        Eq. 4:                     -log sigmoid(beta log_ratio_w - beta log_ratio_l)
        the same of W and L, ours: -log sigmoid(-beta/2 (W - L))
        Eq. 5 as printed:          -log sigmoid(-beta/2 W - L)

    In print the bracket after -beta/2 closes before L. A lower L then lowers the loss too, so that
    the loser's error would fall, which contradicts the paragraph below Eq. 5. We use the brackets
    of Eq. 4; `printed` takes the printed ones, to compare, with our mean as L: the printed sum
    would weigh T C times as much.
    """
    gap_w = err_w - ref_err_w  # W; below 0 where the policy fits better than the reference does
    gap_l = err_l - ref_err_l  # L
    logits = -0.5 * beta * (gap_w - gap_l)
    if printed:
        logits = -0.5 * beta * gap_w - gap_l
    return -F.logsigmoid(logits), logits


# --------------------------------------------------------------------------------------------------
# The interface of a scorer
# --------------------------------------------------------------------------------------------------

SILENT_PEAK = 1e-3  # of full scale, -60 dB; below it an audio counts as silent (01, 03, 07)

# Paper silent: which classes are "the category of human speech" (Sec. 2.1). We take the classes of
# VGGSound in which people talk, spelled as in MMAudio's sets/vgg-test.tsv, and leave out singing,
# rapping, shouting, babbling, crowds and radios.
HUMAN_SPEECH_CLASSES = (
    "child speech, kid speaking",
    "female speech, woman speaking",
    "male speech, man speaking",
    "people whispering",
)


class Scorer:
    """One frozen scorer, which describes each audio by one or several tensors."""

    sample_rate_hz: int
    files: tuple = ()  # below --weights
    # What its scores depend on besides the audio: "caption", "video", "reference" (the clip's own
    # sound, and its label).
    reads: tuple = ()
    # Those of its tensors that compare an audio with the reference, and so are nan for the
    # reference itself.
    compared: tuple = ()
    # Only for a scorer that reads "video": (frames per second, transform of a (3, H, W) uint8
    # picture), and {name: shape} of what `embed_video` returns.
    frames: tuple
    video_shapes: dict = {}
    workers = 0  # how many processes it may start

    def __init__(self, weights, device):
        """weights: folder of `files`."""

    def embed_video(self, frames):
        """Runs its video tower, once per clip. frames: (n, ...), each transformed. Returns a dict
        of float32 tensors."""
        raise NotImplementedError

    def score(self, waves, clips, videos):
        """A dict of (B, ...) tensors, nan where a score does not apply.

        waves: (B, S) float32 at sample_rate_hz; clips: the inputs.FoundClip of each wave; videos:
        what `embed_video` returned, stacked to (B, ...), with rows of nan where a video cannot be
        used.
        """
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# The interface of a backbone: what toy, MMAudio and Frieren offer to the stages
# --------------------------------------------------------------------------------------------------


class FlowModel(nn.Module):
    """A V2A flow model in the paper's convention (t = 1 noise, v = eps - a_0); only adapters flip
    time and sign.

    The registered parameters are those of the velocity network: everything that maps features and
    a_t to u, including the projections of the conditions. Parameters of null conditions are frozen.
    Encoders and codec are loaded when they are first used, and are no submodules, so that copying,
    training and saving the model leave them alone.
    """

    name: str  # as given to load_model
    latent_shape: tuple  # (T, C)
    feature_shapes: dict  # {name: shape} of what encode returns
    sample_rate_hz: int
    clip_s: float  # seconds: of a clip's video the part that is used, and of its audio likewise
    checkpoint: Path  # the file that the velocity network came from
    checkpoint_digest: str
    reads_video = False  # whether `read` decodes the clip's video
    # Features that equal what a scorer's `embed_video` returns, which then need not be computed
    # again. MMAudio's "sync" is what the scorer "synchformer" returns as "segments", of this shape:
    # {"synchformer": ("sync", "segments", (24, 8, 768))}.
    seen_as: dict = {}
    batch_clips = 4  # how many clips stage 01 samples together: the default of its --batch-clips
    compiles = True  # whether compiling is worth the minutes that it takes
    compiled = False  # whether its blocks have been compiled, as encoders and codec are once loaded

    # What an adapter fills in -------------------------------------------------------------------

    @classmethod
    def files(cls, variant):
        """Names of all files below --weights that the stages will read for this model."""
        return []

    @classmethod
    def missing_elsewhere(cls):
        """A line that names missing files which the stages read from another folder than --weights;
        None where none is missing."""
        return None

    def read(self, clip, others=()):
        """A list of CPU tensors: what `encode` needs of a clip's files, then one for each of
        `others`. This runs in a worker process (ahead.read_ahead): it decodes and shrinks, and uses
        no GPU.

        others: what scorers want of the same video, so that it is decoded only once: a list of
        (frames per second, transform) like `Scorer.frames`. clip: inputs.FoundClip. Raises
        SkipClip(reason) for a video that cannot be used.
        """
        return []

    def stamp_of(self, clip):
        """A text that changes when the file that `read` reads has changed."""
        return scoring.stamp(clip.path)

    def encode(self, clip, tensors):
        """Runs the frozen encoders, once per clip: `read`'s tensors -> a dict of float32 CPU
        tensors without batch dimension."""
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
        """(B, T, C) normalised latents -> (B, S) float32 waves at sample_rate_hz, on the CPU."""
        raise NotImplementedError

    def encode_audio(self, waves):
        """The codec's encoder, without randomness: waves as `decode` returns them, (B, S) float32
        on the CPU -> (B, T, C) float32 normalised latents on the CPU."""
        stop(f"--given: {self.name} has no encoder of sound (encode_audio, docs/adapters.md)")

    def snap_t(self, t):
        """t rounded up to a time that the network knows (Frieren: 1/1000); t itself for a network
        that knows every time, as here. t: float tensor in [0, 1]."""
        return t

    def blocks(self):
        """The network's blocks, which --compile compiles and --gradient-checkpointing
        recomputes."""
        return []

    def load_policy(self, path):
        """Replaces all weights of the velocity network by those of a file that holds what
        `policy_state` returns; stops where the file is another model's."""
        raise NotImplementedError

    def policy_state(self):
        """What policy.pt holds: the weights in upstream's own format, for upstream's own loader."""
        raise NotImplementedError

    # What all adapters share --------------------------------------------------------------------

    @property
    def device(self):
        return next(self.parameters()).device

    def velocity(self, a_t, t, conditions, guidance=1.0):
        """u with classifier-free guidance gamma: u_null + gamma (u_cond - u_null), both in one
        forward.

        a_t: (R * B, T, C), t: (R * B,), conditions: B rows, each of which serves R rows of a_t.
        """
        conditions = tile(conditions, len(a_t))
        if guidance == 1.0:
            return self.predict(a_t, t, conditions)
        null = self.null_conditions(conditions)
        both = {key: torch.cat([value, null[key]]) for key, value in conditions.items()}
        u_cond, u_null = self.predict(torch.cat([a_t, a_t]), torch.cat([t, t]), both).chunk(2)
        return u_null + guidance * (u_cond - u_null)

    def forward(self, a_t, t, features, guidance=1.0):
        """`velocity` from features. 05 and 06 train this, through DistributedDataParallel."""
        return self.velocity(a_t, t, self.project(features), guidance)

    def trainable_parameters(self):
        return [p for p in self.parameters() if p.requires_grad]


def tile(conditions, count):
    """Repeats the B rows of every tensor of a dict until there are `count`."""
    repeated = {}
    for key, value in conditions.items():
        repeated[key] = value.repeat(count // len(value), *[1] * (value.dim() - 1))
    return repeated


def stack_features(features, device):
    """A list of B dicts of tensors -> a dict of (B, ...) tensors on the device."""
    return {key: torch.stack([one[key] for one in features]).to(device) for key in features[0]}


# --------------------------------------------------------------------------------------------------
# Sampler
# --------------------------------------------------------------------------------------------------


def seed_of(*parts):
    """A seed that depends on these parts alone. An audio's is made from (seed, clip, k), never from
    rank, shard or batch. It has 56 bits, since torch's seeds are signed."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def initial_noise(model, seeds):
    """eps at t = 1, (len(seeds), T, C), drawn on the CPU so that it is the same on every device."""
    eps = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        eps.append(torch.randn(model.latent_shape, generator=generator))
    return torch.stack(eps).to(model.device)


@torch.no_grad()
def sample(model, features, seeds, steps=25, guidance=4.5):
    """Euler's method from noise (t = 1) to data (t = 0), classifier-free guidance inside.

    features: dict of tensors with B rows; seeds: R * B integers. The conditions are projected once;
    on CUDA the network runs in bf16. All steps are equal, as upstream's are; only the t that the
    network is told is rounded (`snap_t`).
    Returns a_0 (R * B, T, C) float32 on the model's device. Paper silent: the number of steps, 25
    is upstream's.
    """
    a_t = initial_noise(model, seeds)
    times = torch.linspace(1, 0, steps + 1)
    dts = (-times.diff()).tolist()
    t_of_network = model.snap_t(times[:-1]).to(a_t)  # one copy to the device, not one each step
    with training.autocast(model.device.type):
        conditions = model.project(features)
        for t, dt in zip(t_of_network, dts):
            u = model.velocity(a_t, t.expand(len(a_t)), conditions, guidance)
            a_t = a_t - dt * u.float()
    return a_t


def sample_clips(model, batches, sampler):
    """Samples and decodes audio for clips; one batch is decoded while the next one is sampled.

    batches: lists of (clip, its features, its R seeds); sampler: rows.Sampler. Yields for each clip
    (clip, latents (R, T, C), waves (R, S)), float32 on the CPU, in the order of the batches.
    """

    def sampled():  # runs in this thread, a batch ahead of `decode`
        for batch in batches:
            clips, features, seeds_of_clips = zip(*batch)
            seeds = []  # in the order of the rows, r * B + b
            for seeds_of_rth_audios in zip(*seeds_of_clips):
                seeds += seeds_of_rth_audios
            features = stack_features(features, model.device)
            a_0 = sample(model, features, seeds, sampler.steps, sampler.guidance)
            yield clips, a_0.unflatten(0, (-1, len(clips))).transpose(0, 1)  # (B, R, T, C)

    def decode(batch):  # runs in a thread of its own
        clips, a_0 = batch
        waves = model.decode(a_0.flatten(0, 1)).unflatten(0, a_0.shape[:2])
        return zip(clips, a_0.float().cpu(), waves)

    for decoded in ahead.in_threads(decode, sampled(), threads=1):
        yield from decoded


# --------------------------------------------------------------------------------------------------
# Loaders. A new backbone or scorer is one file in adapters/ and one line here (docs/adapters.md)
# --------------------------------------------------------------------------------------------------

ADAPTERS = {"toy": "adapters.toy", "mmaudio": "adapters.mmaudio", "frieren": "adapters.frieren"}
# The modules with the scorers of a run; run.json says whether they are toy or real.
SCORERS = {"toy": ("adapters.toy",), "real": ("adapters.scorers",)}


def adapter_of(name):
    """The class of a model and the name of its variant. name: `toy`, `mmaudio:<variant>` or
    `frieren`."""
    family, _, variant = name.partition(":")
    if family not in ADAPTERS:
        stop(f"--model {name}: unknown; choose one of {', '.join(ADAPTERS)}")
    return importlib.import_module(ADAPTERS[family]).ADAPTER, variant


def load_model(name, checkpoint=None, device="cpu", weights="weights"):
    """A FlowModel in eval mode. checkpoint: the file of the velocity network's weights, None for
    upstream's file below `weights`."""
    adapter, variant = adapter_of(name)
    model = adapter(variant, checkpoint, Path(weights))
    model.name = name
    model.checkpoint_digest = files.digest(model.checkpoint)
    return model.to(device).eval()


def load_base_model(run, device="cpu", weights="weights"):
    """The model that stage 01 sampled from, after checking its weights against run.json."""
    run_json = inputs.read_run(run)
    checkpoint = None
    if run_json.checkpoint != "upstream":
        checkpoint = run / run_json.checkpoint
        if not checkpoint.exists():
            stop(
                f"{checkpoint}: gone; put it back, or give 01_generate.py the --checkpoint that "
                "has moved"
            )
    model = load_model(run_json.model, checkpoint, device, weights)
    if model.checkpoint_digest != run_json.checkpoint_digest:
        stop(
            f"{model.checkpoint}: not the file that stage 01 sampled from (its digest differs); "
            "put that one back"
        )
    return model


def scorers_of(run, weights):
    """The set of frozen scorers of this run."""
    run_json = inputs.read_run(run)
    root = run / run_json.scorers_root if run_json.scorers_root else weights
    return scoring.ScorerSet(run, SCORERS[run_json.scorers], root)


def people_of(run):
    """The module adapters.toy_people, with the simulated people, the oracle and the judge, where
    the run is of the toy world and so holds its truth; None in other runs."""
    if (run / "00_truth.jsonl").exists():
        return importlib.import_module("adapters.toy_people")
    return None
