"""Stage 08: pages for people: the report (Sec. 3.2), and packs of sounds to rate, choose, compare.

Raters answer `rate` (Sec. 2.1) and `choose` (2.2). The paper has nothing like `blind`, which asks
which of two systems, unnamed, people prefer.

Run:
    python 08_listen.py                              # after 07: the report
    python 08_listen.py rate --run-dir runs/vgg      # after 02: the audios of 02_to_rate.csv
    python 08_listen.py choose --run-dir runs/vgg    # after 03: the pairs of 03_to_choose.csv
    python 08_listen.py blind --run-dir runs/vgg     # after 07: the systems' audio of test clips
    python 08_listen.py blind --run-dir runs/vgg --answers packs/blind_*.csv

Reads:
    07_results.jsonl      the numbers
    07_systems.json       how they are shown, the audio of every system
    policy.json, settings.json, log.jsonl    of the policy folders among the systems
    02_audioscore.pt      heldout, if it is there: p (n, 3), rating (n,)
    04_stage1.jsonl, 04_stage2.jsonl    if they are there: score_c of the pairs
    04_settings.json      their threshold
    clips.jsonl, videos   what six test clips show
    00_truth.jsonl        toy world: when they sound
    02_to_rate.csv, 03_to_choose.csv    what is asked, with any further columns
    01_audio/             what is heard
    --guide FILE          a line with the question, then `word: a sentence on it` for each answer
    --answers FILE...     of blind: clip, a, b (systems), choice (a, b or tie), rater; if known
                          repeat, seconds, comment, and audios (a digest of both, by which answers
                          about other audio are refused)
Writes:
    08_report.html        one self-contained file that opens from disk in any browser, offline
    08_rate/00001.html, 08_choose/00001.html, 08_blind/00001.html ...
                          packs, as self-contained; each saves a .csv with the sheet's columns and
                          repeat (0, 1), seconds, comment, which 02, 03 and `blind` read
    08_blind.jsonl        a, b (systems), win_rate (of a; a tie is half a win), low, high (95 %), n
                          (answers), ties, clips, raters
Takes: toy report 9 s, a pack 1 s on 2 cores.
"""

import base64
import functools
import io
import math
import random
from collections import defaultdict
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

import av
import jinja2
import matplotlib.image
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import common
from common import (
    RATINGS,
    SkipClip,
    ahead,
    command,
    cores,
    files,
    inputs,
    media,
    people,
    record,
    rows,
    run_flag,
    scoring,
    stop,
)

LISTEN = 6  # clips in the report's listening section
REPEATED = 20  # one question of so many is asked twice
COLOURS = {"better": "#2a7f3f", "worse": "#b3261e", None: "#777777"}
PAGE = files.ROOT / "plumbing" / "08_page.html"


class Mode(NamedTuple):
    """What a pack asks of people."""

    title: str
    question: str
    words: dict  # {an answer: a sentence on it}
    answer: str  # the column of the answer
    sounds: tuple  # the columns that say which audios a question is about
    split: str  # of its clips
    stage: str  # that takes what packs save
    flags: str  # by which it does
    sheet: str = ""  # what is asked, if that stage has written it


MODES = {
    "rate": Mode(
        title="Rate sounds",
        question="How good is this sound for the video?",
        words={
            "Good": "what the video should sound like, at the right moments, clear, and good to "
            "listen to.",
            "Medium": "something is off, but not badly: not quite the right sound, one missing, a "
            "little early or late, some noise.",
            "Bad": "the wrong sound, clearly out of time, or unpleasant to listen to.",
        },
        answer="rating",
        sounds=("k",),
        split="train",
        stage="02_fit_audioscore.py",
        flags="--ratings",
        sheet="02_to_rate.csv",
    ),
    "choose": Mode(
        title="Choose a sound",
        question="Which sound would you rather hear with this video?",
        words={
            "A": "the first is nicer to listen to, or draws you more into the scene.",
            "B": "the second is.",
            "Tie": "you hear no difference, or like both equally well.",
        },
        answer="choice",
        sounds=("a", "b"),
        split="train",
        stage="03_mine_pairs.py",
        flags="--redo --choices",
        sheet="03_to_choose.csv",
    ),
    "blind": Mode(
        title="Compare sounds",
        question="Which sound is better for this video?",
        words={
            "A": "all in all the first is: the right sound, at the right moments, clear, good to "
            "listen to.",
            "B": "the second is.",
            "Tie": "you hear no difference, or find both equally good or bad.",
        },
        answer="choice",
        sounds=("a", "b"),
        split="test",
        stage="08_listen.py",
        flags="blind --answers",
    ),
}


def parse_args(argv=None):
    parser = command.Parser(__doc__)
    io = parser.io.add_argument
    io(
        "what",
        nargs="?",
        choices=("report", *MODES),
        default="report",
        help="the pages to make",
    )
    io("--guide", help="text file that replaces a pack's question and its sentence on each answer")
    io("--answers", nargs="+", help="saved packs of blind, to be counted")
    io(
        "--exclude-rater",
        nargs="+",
        action="extend",
        default=[],
        help="whose --answers do not count",
    )
    io("--systems", nargs="+", help="of 07, to be compared by blind; else all")
    engineering = parser.engineering.add_argument
    engineering("--pack", type=command.whole(1, 50), default=10, help="clips in a pack")
    engineering("--num-clips", type=command.whole(1), default=100, help="test clips of blind")
    engineering("--seed", type=command.whole(0), default=0, help="by which blind draws them")
    return command.parse(parser, argv, "08")


# --------------------------------------------------------------------------------------------------
# What a page shows and plays
# --------------------------------------------------------------------------------------------------


def data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return data_uri("image/png", stream.getvalue())


def draw_differences(rows_of, metrics, systems):
    """A figure with a plot per metric: difference to base with its 95 % interval, green better,
    red worse, grey undecided. rows_of: {metric: {system: rows.Result}}; metrics: {metric:
    ShownMetric}."""
    lines = math.ceil(len(rows_of) / 4)
    height = lines * (0.95 + 0.25 * len(systems))
    figure = Figure(figsize=(11, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    for i, (metric, row_of) in enumerate(rows_of.items()):
        shown = metrics[metric]
        axis = figure.add_subplot(lines, 4, i + 1)
        for y, system in enumerate(systems):
            if system in row_of:
                draw_interval(axis, y, row_of[system], shown.times)
        axis.axvline(0, color="black", lw=0.8)
        first_of_line = i % 4 == 0
        names = systems if first_of_line else [""] * len(systems)
        axis.set_yticks(range(len(systems)), names, fontsize=8)
        axis.set_ylim(len(systems) - 0.4, -0.6)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{shown.column} ({shown.better} is better)", fontsize=8)
    return figure


def draw_interval(axis, y, row, times):
    """A difference of rows.Result, a dot, in its interval, at height y."""
    x = np.array([row.diff_low, row.diff, row.diff_high]) * times
    axis.plot(x, [y, y, y], "o-", markevery=[1], color=COLOURS[row.verdict], lw=2, ms=5)


def smooth(values, half):
    """A mean over each value and `half` to either side, as many as there are at both ends."""
    means = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return np.array(means)


TRAINING_PLOTS = (  # title, whose log, {field: its line}
    ("loss", rows.FlowDpoStep, {"loss": "-"}),
    ("implicit accuracy", rows.FlowDpoStep, {"accuracy": "-"}),
    ("error gap (dashed: losers)", rows.FlowDpoStep, {"gap_w": "-", "gap_l": "--"}),
    ("DDPO: reward P(Good)", rows.DdpoStep, {"reward": "-"}),
)


def draw_training(logs):
    """A figure: loss, implicit accuracy and error gaps of Flow-DPO, reward of DDPO. logs: {system:
    lines of its log}."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots(1, len(TRAINING_PLOTS))
    for axis, (title, step_type, lines) in zip(axes, TRAINING_PLOTS):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(labelsize=7)
        for i, log in enumerate(logs.values()):
            if isinstance(log[0], step_type):
                for field, line in lines.items():
                    draw_curve(axis, log, field, f"C{i}", line)
        axis.set_visible(bool(axis.lines))  # not where no policy of that kind was trained
    legend = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(logs)]
    figure.legend(handles=legend, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def draw_curve(axis, log, field, colour, line):
    """A field of one training's log. Every stage of the curriculum is smoothed by itself: a mean
    across the switch, a dotted line, would show its jump before it. DDPO has no stages."""
    half = min(12, len(log) // 20)
    for _, steps in groupby(log, key=lambda step: getattr(step, "stage", None)):
        part = list(steps)
        values = smooth([getattr(step, field) for step in part], half)
        axis.plot([step.step for step in part], values, color=colour, lw=1.2, ls=line)
        if part[0] is not log[0]:
            axis.axvline(part[0].step, color="grey", lw=0.8, ls=":")


def draw_audioscore(heldout, score_cs, threshold):
    """A figure: AudioScore on held-out clips, and score_c of the mined pairs. heldout: of
    02_audioscore.pt, p (n, 3) and rating (n,); None of another run's AudioScore."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if heldout is None:
        left.set_visible(False)
    else:
        good = RATINGS.index("Good")
        draw_calibration(left, heldout["p"][:, good].numpy(), heldout["rating"].numpy() == good)
    right.hist(score_cs, bins=30, color="#4a6fa5")
    right.axvline(threshold, color="#b3261e")
    right.set(xlabel="score_c (high = easy)", ylabel="pairs")
    right.set_title(
        f"Complexity of {len(score_cs)} mined pairs; red: score_delta {threshold:g}", fontsize=9
    )
    return figure


def draw_calibration(axis, p_good, is_good):
    """P(Good) in ten bins against the share that was rated Good; a larger dot is of more audios.
    p_good, is_good: (n,) arrays."""
    bins = (10 * p_good).astype(int).clip(max=9)
    axis.plot([0, 1], [0, 1], color="grey", lw=0.8)
    predicted = []
    rated = []
    sizes = []
    for i in np.unique(bins):
        inside = bins == i
        predicted.append(p_good[inside].mean())
        rated.append(is_good[inside].mean())
        sizes.append(15 + 250 * inside.mean())
    axis.scatter(predicted, rated, s=sizes)
    axis.set(xlabel="predicted P(Good)", ylabel="share rated Good")
    axis.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    axis.set_title(f"AudioScore on {len(p_good)} audios of held-out clips", fontsize=9)


def shown_frame(frame):
    """(3, H, W) uint8 -> (360, W', 3) uint8, W' even, as 4:2:0 needs."""
    _, height, width = frame.shape
    image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")
    even_width = 2 * round(width / height * 360 / 2)
    how = "AREA" if height > 360 else "POINT"  # the toy world's few pixels stay squares
    return torch.from_numpy(
        image.reformat(even_width, 360, "rgb24", interpolation=how).to_ndarray()
    )


def playable_video(path, seconds):
    """The silent picture as H.264 that every browser plays (4:2:0, 360 pixels high), `seconds`
    long."""
    fps = 25
    # Made small one by one: 8 s of full-size frames are a gigabyte.
    (frames,) = media.read_frames(path, [(fps, shown_frame)], seconds)
    options = {"crf": "26", "preset": "veryfast"}
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options=options)
        media.encode_picture(container, video, frames.numpy())
    return data_uri("video/mp4", stream.getvalue())


def playable_sound(wave, rate):
    """wave: (S,) float32, as FLAC of 16 bits: what came from a 16-bit file is heard to the bit."""
    flac = io.BytesIO()
    soundfile.write(flac, wave.nan_to_num().numpy(), rate, format="FLAC")
    return data_uri("audio/flac", flac.getvalue())


def spectrogram(wave, rate):
    """Time to the right, 0 to rate / 2 upwards, -100 (black) to -20 dB of a full-scale sine as
    colour."""
    window = torch.hann_window(512)
    hop = max(64, len(wave) // 320)
    spectrum = torch.stft(wave, 512, hop, window=window, return_complex=True).abs()
    amplitude = 2 * spectrum / window.sum()
    level_db = 20 * amplitude.clamp_min(1e-9).log10()
    png = io.BytesIO()
    colours = {"vmin": -100, "vmax": -20, "cmap": "magma"}
    matplotlib.image.imsave(png, level_db.numpy(), origin="lower", format="png", **colours)
    return data_uri("image/png", png.getvalue())


def card_of(clip, clip_s):
    """What a page shows of a clip. Raises SkipClip where it has no picture of the whole length."""
    video = playable_video(clip.path, clip_s)
    return {"clip": clip.id, "caption": clip.caption or clip.label, "video": video}


def check_there(path, clip):
    if not path.exists():
        stop(
            f"{path}: gone, though it was found for {clip}; put it back, or run the stage that "
            "made it again (of a system's audio 07_evaluate.py)"
        )


def write_page(path, **parts):
    """PAGE with these parts: every text is escaped, and nothing is marked as safe."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    files.write_text(path, page.render(parts))


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def read_systems(run):
    """07_systems.json."""
    hint = f"; run 07_evaluate.py {run_flag(run)} first"
    return rows.read_json(run / "07_systems.json", rows.Systems, hint)


def read_results(run):
    """07_results.jsonl and 07_systems.json, which must be of one evaluation."""
    hint = f"; run 07_evaluate.py {run_flag(run)} first"
    results = rows.read(run / "07_results.jsonl", rows.Result, hint)
    evaluated = read_systems(run)
    same_systems = {row.system for row in results} == {system.name for system in evaluated.systems}
    if not same_systems or not {row.metric for row in results} <= evaluated.metrics.keys():
        stop(
            f"{run}/07_systems.json: not of 07_results.jsonl; run 07_evaluate.py "
            f"{run_flag(run)} again"
        )
    return results, evaluated


def read_policies(run, systems):
    """Of the policies among the systems: how each was trained, {system: {setting: value}}, and
    their logs, {system: lines}."""
    made = {}
    logs = {}
    for system in systems:
        if system.folder is None or not (run / system.folder / "policy.json").exists():
            continue
        folder = run / system.folder
        policy = rows.read_json(folder / "policy.json", rows.Policy)
        settings = rows.read_json(folder / "settings.json", rows.Record).settings
        made[system.name] = settings | rows.as_dict(policy)
        line_type = rows.FlowDpoStep if policy.method == "flow_dpo" else rows.DdpoStep
        log = rows.read_if_there(folder / "log.jsonl", line_type)
        if log:
            logs[system.name] = log
    return made, logs


def figures_of(run, results, evaluated, logs):
    """{name: picture} of what there is to draw."""
    figures = {}
    rows_of = defaultdict(dict)
    for row in results:
        if row.diff_low is not None and row.system != "ground_truth":
            rows_of[row.metric][row.system] = row
    if rows_of:
        compared = [s.name for s in evaluated.systems if s.name not in ("base", "ground_truth")]
        figures["differences"] = picture(draw_differences(rows_of, evaluated.metrics, compared))
    if logs:
        figures["training"] = picture(draw_training(logs))
    if (run / "02_audioscore.pt").exists() and (run / "04_settings.json").exists():
        heldout = files.load_pt(run / "02_audioscore.pt", {"audioscore": dict}).get("heldout")
        pairs = rows.read(run / "04_stage1.jsonl", rows.SplitPair)
        pairs += rows.read(run / "04_stage2.jsonl", rows.SplitPair)
        mined = [pair.score_c for pair in pairs if pair.source == "auto"]
        threshold = rows.read_json(run / "04_settings.json", rows.Record).settings["threshold"]
        figures["audioscore"] = picture(draw_audioscore(heldout, mined, threshold))
    return figures


def read_blind(run, systems):
    """08_blind.jsonl, if people have compared systems."""
    blind = rows.read_if_there(run / "08_blind.jsonl", rows.BlindResult)
    names = {system.name for system in systems}
    for row in blind:
        if row.a not in names or row.b not in names:
            stop(
                f"{run}/08_blind.jsonl: of other systems than 07_systems.json; run 08_listen.py "
                "blind --answers again"
            )
    return blind


def player_of(run, clip, systems, run_json):
    """What the report's player shows of a clip. Raises SkipClip."""
    rate = run_json.sample_rate_hz
    check_there(clip.path, clip.id)
    card = card_of(clip, run_json.clip_s)
    card["sounds"] = []
    for system in systems:
        if clip.id in system.audio:
            path = run / system.audio[clip.id]
            check_there(path, clip.id)
            wave = media.read_audio(path, rate, run_json.clip_s)
            sound = {"name": system.name, "audio": playable_sound(wave, rate)}
            sound["picture"] = spectrogram(wave, rate)
            card["sounds"].append(sound)
    return card


def true_events(run, clip_s):
    """{clip id: when it sounds, as shares of the clip}; only a simulated world knows."""
    events = {}
    simulated = common.people_of(run)
    if simulated is not None:
        for name, truth in simulated.truth_of(run).items():
            events[name] = [hit_s / clip_s for hit_s in truth.hits_s if hit_s < clip_s]
    return events


def report(run):
    """08_report.html."""
    # -- numbers
    run_json = inputs.read_run(run)
    results, evaluated = read_results(run)
    systems = evaluated.systems
    clips = inputs.read_clips(run, evaluated.split)
    made, logs = read_policies(run, systems)
    blind = read_blind(run, systems)

    # -- what is shown and played
    figures = figures_of(run, results, evaluated, logs)
    events = true_events(run, run_json.clip_s)
    evenly_spaced = np.linspace(0, len(clips) - 1, min(LISTEN, len(clips))).astype(int)
    cards = []
    for i in tqdm(evenly_spaced, desc="page", unit="clip"):
        clip = clips[i]
        try:
            card = player_of(run, clip, systems, run_json)
        except SkipClip as reason:  # as in stage 07
            tqdm.write(f"{clip.id}: {reason}; left out of the page")
            continue
        card["events"] = events.get(clip.id, [])
        cards.append(card)

    # -- page
    file = run / "08_report.html"
    write_page(
        file,
        title="V2A-DPO: results",
        pack=None,
        run_json=run_json,
        about=evaluated,
        names=[system.name for system in systems],
        clips=clips,
        cell={(row.metric, row.system): row for row in results},
        policies=made,
        figures=figures,
        blind=blind,
        cards=cards,
    )
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")


# --------------------------------------------------------------------------------------------------
# What packs ask
# --------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    line: dict  # of the file that a pack saves, still without an answer
    audios: dict  # {column: path of the audio that it names}


def sheet_questions(run, mode):
    """The questions of a sheet, in its order."""
    sheet = run / mode.sheet
    samples = inputs.read_samples(run) | inputs.read_rate_split(run)
    if not sheet.exists():
        stop(f"{sheet}: no such file; run {mode.stage} {run_flag(run)} first")
    wav_of = {}
    for audios in samples.values():
        for audio in audios:
            wav_of[audio.clip, audio.k] = run / audio.wav
    questions = []
    for number_of, line in files.read_csv(sheet, ("clip", *mode.sounds, mode.answer)):
        audios = {}
        for column in mode.sounds:
            k = people.known_k(line, samples, f"{sheet}, line {number_of}", column)
            audios[column] = wav_of[line["clip"], k]
        questions.append(Question(line, audios))
    if not questions:
        stop(f"{sheet}: asks nothing, and needs no answers; go on with the next stage")
    return questions


def blind_questions(run, args):
    """Questions about every pair of systems on drawn test clips, in rounds. Each round asks every
    clip once, and the pairs take turns, so that the first packs compare them all."""
    audio_of = systems_of(run)
    clips = [clip.id for clip in inputs.read_clips(run, "test")]
    for name in args.systems or ():
        if name not in audio_of:
            stop(
                f"--systems {name}: is no system of {run}/07_systems.json (there are "
                f"{', '.join(audio_of)})"
            )
    compared = [name for name in audio_of if name in (args.systems or audio_of)]
    pairs = list(combinations(compared, 2))
    if not pairs:
        stop("blind compares two systems or more; evaluate another one by 07_evaluate.py")
    drawn = sorted(random.Random(args.seed).sample(clips, min(args.num_clips, len(clips))))
    questions = []
    for turn in range(len(pairs)):
        for i, clip in enumerate(drawn):
            a, b = pairs[(i + turn) % len(pairs)]  # another one for each clip and turn
            if clip in audio_of[a] and clip in audio_of[b]:
                audios = {"a": audio_of[a][clip], "b": audio_of[b][clip]}
                line = {"clip": clip, "a": a, "b": b, "audios": digest_of_both(*audios.values())}
                questions.append(Question(line, audios))
    if not questions:
        stop(
            f"{run}/07_systems.json: none of the {len(drawn)} drawn clips has audio of two of "
            f"{', '.join(compared)}; give a larger --num-clips or other --systems"
        )
    return questions


def systems_of(run):
    """{system: {clip id: path}} of stage 07's last evaluation."""
    audio_of = {}
    for system in read_systems(run).systems:
        audio_of[system.name] = {clip: run / path for clip, path in system.audio.items()}
    return audio_of


def digest_of_both(path_a, path_b):
    """What an answer is about."""
    return files.digest_of(files.digest(path_a), files.digest(path_b))


def guided(mode, path):
    """The mode with the question and the sentences of --guide."""
    lines = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    words = {}
    for line in lines[1:]:
        word, _, sentence = line.partition(":")
        words[word.strip()] = sentence.strip()
    if list(words) != list(mode.words) or not all(words.values()):
        wanted = ", ".join(f"'{word}: ...'" for word in mode.words)
        stop(
            f"--guide {path}: must hold a line with the question, then a line for each answer: "
            f"{wanted}"
        )
    return mode._replace(question=lines[0], words=words)


# --------------------------------------------------------------------------------------------------
# Packs
# --------------------------------------------------------------------------------------------------


class Pack(NamedTuple):
    file: Path
    title: str
    questions: list
    data: dict  # what the page's script reads; its id changes with all that the pack is made of


def level_checks(rate=16_000):
    """{n: a sound of 4 s: noise at -23 dB of full scale, then n beeps at -50}: who can count them
    hears soft faults too."""
    t = torch.arange(rate // 5) / rate
    noise = torch.randn(rate, generator=torch.Generator().manual_seed(0)) * 10 ** (-23 / 20)
    beep = torch.hann_window(len(t)) * torch.sin(2000 * torch.pi * t) * 10 ** (-50 / 20)
    beep_and_pause = torch.cat([beep, torch.zeros(rate // 4)])
    sounds = {}
    for n in (2, 3, 4):
        wave = torch.cat([noise, torch.zeros(rate // 2), *[beep_and_pause] * n])
        sounds[n] = playable_sound(media.fit_length(wave, 4 * rate), rate)
    return sounds


def by_clip(questions):
    """The questions in groups, one for each row of questions about one clip."""
    groups = groupby(questions, key=lambda question: question.line["clip"])
    return [list(group) for _, group in groups]


def stamps_of(questions, clips):
    """Size and time of every file that a pack plays."""
    stamps = []
    for question in questions:
        clip = clips[question.line["clip"]]
        for path in (clip.path, *question.audios.values()):
            stamps.append(scoring.stamp(path))
    return stamps


def packs_of(folder, mode, questions, clips, clip_s, args):
    """The questions as packs of --pack clips each."""
    columns = [*questions[0].line, mode.answer, "rater", "repeat", "seconds", "comment"]
    columns = list(dict.fromkeys(columns))  # a sheet has some of them already
    groups = by_clip(questions)
    packs = []
    asked = 0
    for start in range(0, len(groups), args.pack):
        i = len(packs) + 1
        part = [question for group in groups[start : start + args.pack] for question in group]
        data = {
            "name": f"{args.what}_{i:05}",
            "columns": columns,
            "rows": [question.line for question in part],
            "repeats": [row for row in range(len(part)) if (asked + row) % REPEATED == 0],
            "answer": mode.answer,
            "pairs": len(mode.sounds) > 1,
        }
        asked += len(part)
        data["id"] = files.digest_of(data, stamps_of(part, clips), mode, clip_s, files.digest(PAGE))
        packs.append(Pack(folder / f"{i:05}.html", f"{mode.title}, pack {i}", part, data))
    return packs


def is_there(pack):
    """Whether its file was made of the same questions and files: the id stands in the page's first
    tag."""
    if not pack.file.exists():
        return False
    with open(pack.file, encoding="utf-8") as page:
        return pack.data["id"] in page.read(200)


def cards_of(questions, clips, clip_s):
    """One card per clip, with its questions. A clip that cannot be shown is left out, and said."""
    cards = []
    row = 0
    for group in by_clip(questions):
        clip = clips[group[0].line["clip"]]
        try:
            card = card_of(clip, clip_s)
            card["questions"] = []
            for i, question in enumerate(group):
                sounds = []
                for column, path in question.audios.items():
                    sounds.append(sound_of(column, path, clip_s))
                card["questions"].append({"row": row + i, "sounds": sounds})
            cards.append(card)
        except SkipClip as reason:
            tqdm.write(f"{clip.id}: {reason}; left out")
        row += len(group)
    return cards


def sound_of(column, path, clip_s):
    wave, rate = media.decode_audio(path, clip_s)  # at its own rate
    wave = media.fit_length(wave, round(clip_s * rate))
    return {"name": column, "audio": playable_sound(wave, rate)}


def write_pack(pack, mode, clips, clip_s, levels):
    asked = len(pack.questions) + len(pack.data["repeats"])
    heard = asked * len(mode.sounds)
    seconds = heard * clip_s + asked * 4  # 4 s to answer
    write_page(
        pack.file,
        title=pack.title,
        cards=cards_of(pack.questions, clips, clip_s),
        pack=pack.data | {"levels": levels},
        guide=mode,
        minutes=1 + int(seconds / 60),
        heard=heard,
    )


def write_packs(run, args):
    """08_<what>/00001.html ..., of --pack clips each. One that is there, of the same questions and
    files, is kept."""
    # -- questions
    mode = MODES[args.what]
    folder = run / f"08_{args.what}"
    clip_s = inputs.read_run(run).clip_s
    clips = inputs.read_clips(run, mode.split) + inputs.read_clips(run, rows.RATE_SPLIT)
    clips = {clip.id: clip for clip in clips}
    if args.guide:
        mode = guided(mode, args.guide)
    questions = sheet_questions(run, mode) if mode.sheet else blind_questions(run, args)

    # -- packs
    with record.stage(run, "08"):
        packs = packs_of(folder, mode, questions, clips, clip_s, args)
        todo = [pack for pack in packs if not is_there(pack)]
        levels = level_checks() if todo else {}

        def write(pack):
            return write_pack(pack, mode, clips, clip_s, levels)

        made = ahead.in_threads(write, todo, threads=min(8, cores.cores()))
        for _ in tqdm(made, desc=folder.name, total=len(todo), unit="pack"):
            pass
        for file in folder.glob("[0-9]*.html"):
            if int(file.stem) > len(packs):  # of an earlier, longer sheet
                file.unlink()

    # -- what comes next
    named = {question.line["clip"] for question in questions}
    mb = sum(pack.file.stat().st_size for pack in packs) / 1e6
    print(
        f"{folder}: {len(packs)} packs of {len(questions)} questions on {len(named)} clips, "
        f"{mb:.1f} MB; {len(todo)} made now, {len(packs) - len(todo)} were there"
    )
    print(
        f"next: open {folder / '00001.html'} in a browser, or send the packs to people; then, with "
        "what they save,"
    )
    print(f"      python {mode.stage} {mode.flags} {args.what}_*.csv {run_flag(run)}")


# --------------------------------------------------------------------------------------------------
# Answers to blind
# --------------------------------------------------------------------------------------------------


def read_blind_answers(audio_of, paths):
    """Every answer, a list of rows.ChoiceAnswer, each proved to be about two systems' audio that is
    still the same. audio_of: {system: {clip id: path}}."""
    digest_of_these = functools.cache(digest_of_both)  # several people answer about the same

    def checked(line, where):
        choice = people.meant(line["choice"], ("a", "b", "tie"), where, "choice")
        answer = people.typed_answer(dict(line, choice=choice), rows.ChoiceAnswer, where)
        for column, name in (("a", answer.a), ("b", answer.b)):
            if name not in audio_of:
                stop(
                    f"{where}, field '{column}': {name!r} is no system of 07 (there are "
                    f"{', '.join(audio_of)})"
                )
        path_a = audio_of[answer.a].get(answer.clip)
        path_b = audio_of[answer.b].get(answer.clip)
        if answer.a == answer.b or path_a is None or path_b is None:
            stop(
                f"{where}: {answer.clip} has no audio of two systems, {answer.a} and {answer.b}; "
                "these are answers of another run"
            )
        if line.get("audios") not in (None, "", digest_of_these(path_a, path_b)):
            stop(
                f"{where}: about other audio of {answer.clip} than is here now; these are answers "
                "of another run"
            )
        return answer

    return people.read_answers(paths, "choice", checked)


def wins(answer, name):
    """1 where this system is preferred, 0 where the other is, one half for a tie."""
    if answer.choice == "tie":
        return 0.5
    preferred = answer.a if answer.choice == "a" else answer.b
    return float(preferred == name)


def win_rates(answers, systems, resamples=2000):
    """Lines of 08_blind.jsonl, one for each pair of systems that was compared."""
    rng = np.random.default_rng(0)
    lines = []
    for a, b in combinations(systems, 2):
        part = [answer for answer in answers if {answer.a, answer.b} == {a, b}]
        if part:
            lines.append(win_rate(part, a, b, rng, resamples))
    return lines


def win_rate(answers, a, b, rng, resamples):
    """The interval is a bootstrap over clips and, where there are several, raters: both are drawn
    anew, and an answer counts as often as its clip and its rater together."""
    won = np.array([wins(answer, a) for answer in answers])
    clips, clip_of = np.unique([answer.clip for answer in answers], return_inverse=True)
    raters, rater_of = np.unique([answer.rater for answer in answers], return_inverse=True)
    clip_times = times_drawn(len(clips), rng, resamples)
    rater_times = times_drawn(len(raters), rng, resamples)
    weight = clip_times[:, clip_of] * rater_times[:, rater_of]  # (resamples, answers)
    weight = weight[weight.sum(axis=1) > 0]
    low = None
    high = None
    if len(clips) > 1:
        rates = weight @ won / weight.sum(axis=1)
        low, high = np.percentile(rates, (2.5, 97.5)).tolist()
    return rows.BlindResult(
        a=a,
        b=b,
        win_rate=float(won.mean()),
        low=low,
        high=high,
        n=len(answers),
        ties=sum(answer.choice == "tie" for answer in answers),
        clips=len(clips),
        raters=len(raters),
    )


def times_drawn(count, rng, resamples):
    """How often each of so many things comes, when as many are drawn with replacement: (resamples,
    count)."""
    return rng.multinomial(count, np.full(count, 1 / count), resamples)


def count_answers(run, args):
    audio_of = systems_of(run)
    answers = read_blind_answers(audio_of, args.answers)
    kept = people.without_raters(answers, args.exclude_rater)
    # Of the two systems that whose name comes first, whichever way it was asked.
    people.print_agreement(kept, lambda answer: wins(answer, min(answer.a, answer.b)), "nominal")
    counted = [answer for answer in kept if not answer.repeat]
    lines = win_rates(counted, audio_of)
    rows.write(run / "08_blind.jsonl", lines)
    print(f"blind: {len(counted)} answers; share of those who preferred the first, 95 % interval")
    for line in lines:
        interval = "" if line.low is None else f" [{line.low:.2f}, {line.high:.2f}]"
        count = f"{line.n} answers, {line.ties} of them ties"
        count += f", on {line.clips} clips by {line.raters} raters"
        print(f"  {line.a} to {line.b}: {line.win_rate:.2f}{interval}, {count}")
    print(f"wrote {run / '08_blind.jsonl'}")
    print(f"next: python 08_listen.py {run_flag(run)}")


def main(args):
    run = Path(args.run_dir)
    if args.what == "report":
        report(run)
    elif args.what == "blind" and args.answers:
        count_answers(run, args)
    else:
        write_packs(run, args)


if __name__ == "__main__":
    command.launch(main, parse_args)
