"""Stage 08: pages for people: the report (Sec. 3.2); packs to rate (2.1), to choose from (2.2), and of unnamed systems.

Run:
    python 08_listen.py                                         # after 07: the report
    python 08_listen.py rate --run-dir runs/vgg                 # after 02: packs of the audios of 02_to_rate.csv
    python 08_listen.py choose --run-dir runs/vgg               # after 03: packs of the pairs of 03_to_choose.csv
    python 08_listen.py blind --run-dir runs/vgg                # after 07: the systems' audio of test clips, unnamed
    python 08_listen.py blind --run-dir runs/vgg --answers packs/blind_*.csv

Reads:
    07_results.jsonl, 07_systems.json                the numbers, how they are shown, the audio of every system
    policy.json, settings.json, log.jsonl            of the policy folders among the systems
    02_audioscore.pt, 04_stage*.jsonl, 04_settings.json      heldout; pairs and threshold; left out where there are none
    clips.jsonl, videos, 00_truth.jsonl              what six test clips show, and (toy world) when it sounds
    02_to_rate.csv, 03_to_choose.csv, 01_audio/      what is asked, with any further columns; what is heard
    --guide FILE       a line with the question, then `word: a sentence on it` for each answer
    --answers FILE...  of blind: clip, a, b (systems), choice (a, b or tie), rater; if known repeat, seconds, comment,
                       and audios (a digest of both, by which answers about other audio are refused)
Writes:
    08_report.html     one self-contained file that opens from disk in any browser, without network
    08_rate/00001.html, 08_choose/00001.html, 08_blind/00001.html ...      packs, as self-contained; each saves a .csv
                       with the sheet's columns and repeat (0, 1), seconds, comment, which 02, 03 and `blind` read
    08_blind.jsonl     a, b (systems), win_rate (of a; a tie is half a win), low, high (95 %), n (answers), ties, clips,
                       raters
Takes: toy report 6 s, a pack 1 s on 2 shared cores.
"""

import base64
import io
import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations, groupby
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
from common import DICT, LIST, NUMBER, TEXT, SkipClip, maybe, number, stop

LISTEN = 6  # clips in the report's listening section
REPEATED = 20  # one question of so many is asked twice
COLOURS = {"better": "#2a7f3f", "worse": "#b3261e", None: "#777777"}
PAGE = common.ROOT / "plumbing" / "08_page.html"


class Mode(NamedTuple):
    """What a pack asks of people."""

    title: str
    script: str  # whose output is judged
    sheet: str
    heard: str  # the columns that say which audios a question is about
    answer: str  # the column of the answer
    words: tuple  # the answers
    guide: str  # the question, and a sentence on each answer


MODES = {
    "rate": Mode("Rate sounds", "02_fit_audioscore.py", "02_to_rate.csv", "k", "rating", common.RATINGS, """
How good is this sound for the video?
Good: what the video should sound like, at the right moments, clear, and good to listen to.
Medium: something is off, but not badly: not quite the right sound, one missing, a little early or late, some noise.
Bad: the wrong sound, clearly out of time, or unpleasant to listen to."""),
    "choose": Mode("Choose a sound", "03_mine_pairs.py", "03_to_choose.csv", "ab", "choice", ("A", "B", "Tie"), """
Which sound would you rather hear with this video?
A: the first is nicer to listen to, or draws you more into the scene.
B: the second is.
Tie: you hear no difference, or like both equally well."""),
    "blind": Mode("Compare sounds", "07_evaluate.py", "07_systems.json", "ab", "choice", ("A", "B", "Tie"), """
Which sound is better for this video?
A: all in all the first is: the right sound, at the right moments, clear, good to listen to.
B: the second is.
Tie: you hear no difference, or find both equally good or bad."""),
}  # fmt: skip


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    io, modes = parser.io, ("report", *MODES)
    io.add_argument("what", nargs="?", choices=modes, default="report", help="the pages to make")
    io.add_argument("--guide", help="text file that replaces a pack's question and its sentence on each answer")
    io.add_argument("--answers", nargs="+", help="saved packs of blind, to be counted")
    io.add_argument("--exclude-rater", nargs="+", action="extend", default=[], help="whose --answers do not count")
    io.add_argument("--systems", nargs="+", help="of 07, to be compared by blind; else all")
    engineering = parser.engineering
    engineering.add_argument("--pack", type=number(int, 1, 50), default=10, help="clips in a pack")
    engineering.add_argument("--num-clips", type=number(int, 1), default=100, help="test clips that blind draws")
    engineering.add_argument("--seed", type=number(int, 0), default=0, help="of that draw, and of what is asked twice")
    return common.parse(parser, argv, "08")


# ------------------------------------------------------------------------------------------------------------
# What a page shows and plays
# ------------------------------------------------------------------------------------------------------------


def data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(draw, *about):
    """What draw(figure, *about) draws."""
    figure, stream = Figure(layout="constrained"), io.BytesIO()
    draw(figure, *about)
    figure.savefig(stream, format="png", dpi=110)
    return data_uri("image/png", stream.getvalue())


def draw_differences(figure, cell, metrics, systems):
    """One small plot per metric: difference to base with its 95 % interval, green better, red worse, grey undecided."""
    metrics = [(name, how) for name, how in metrics.items() if any((name, system) in cell for system in systems)]
    lines = -(-len(metrics) // 4)
    figure.set_size_inches(11, lines * (0.95 + 0.25 * len(systems)))
    figure.get_layout_engine().set(h_pad=0.1)
    for i, (name, how) in enumerate(metrics):
        axis = figure.add_subplot(lines, 4, i + 1)
        for y, system in enumerate(systems):
            if row := cell.get((name, system)):
                low, middle, high = (row[key] * how["times"] for key in ("diff_low", "diff", "diff_high"))
                axis.plot([low, high], [y, y], color=COLOURS[row["verdict"]], lw=2)
                axis.plot(middle, y, "o", color=COLOURS[row["verdict"]], ms=5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(systems)), [""] * len(systems) if i % 4 else systems, fontsize=8)
        axis.set_ylim(len(systems) - 0.4, -0.6)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{how['column']} ({how['better']} is better)", fontsize=8)


def smooth(values, width):
    """A centred mean over `width` values, over fewer at both ends."""
    sums, half = np.cumsum([0.0, *values]), width // 2
    low, high = (np.clip(np.arange(len(values)) + d, 0, len(values)) for d in (-half, half + 1))
    return (sums[high] - sums[low]) / (high - low)


def draw_training(figure, logs):
    """Loss, implicit accuracy and error gaps of Flow-DPO, reward of DDPO. Every stage is smoothed by itself: a mean
    across the switch would show its jump before it."""
    titles = ("loss", "implicit accuracy", "error gap (dashed: losers)", "DDPO: reward P(Good)")
    figure.set_size_inches(11, 3)
    axes = dict(zip(("loss", "accuracy", "gap", "reward"), figure.subplots(1, 4)))
    for title, axis in zip(titles, axes.values()):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(labelsize=7)
    for i, log in enumerate(logs.values()):
        width, stages = min(25, len(log) // 10), [[*rows] for _, rows in groupby(log, lambda row: row.get("stage"))]
        for key in (key for key in ("loss", "accuracy", "gap_w", "gap_l", "reward") if key in log[0]):
            axis, style = axes[key.split("_")[0]], dict(color=f"C{i}", lw=1.2, ls="--" if key == "gap_l" else "-")
            for rows in stages:
                axis.plot([row["step"] for row in rows], smooth([row[key] for row in rows], width), **style)
            for rows in stages[1:]:
                axis.axvline(rows[0]["step"], color="grey", lw=0.8, ls=":")
    for axis in axes.values():
        axis.set_visible(bool(axis.lines))
    names = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(logs)]
    figure.legend(handles=names, loc="outside lower center", ncols=6, fontsize=8)


def draw_audioscore(figure, heldout, pairs, threshold):
    """P(Good) on held-out clips against the share that was rated Good; score_c of the mined pairs."""
    figure.set_size_inches(9, 3.2)
    left, right = figure.subplots(1, 2)
    p, good = heldout["p"][:, 0].numpy(), (heldout["rating"] == 0).numpy()
    bins = np.digitize(p, np.linspace(0, 1, 11)[1:-1])
    points = [(p[bins == i].mean(), good[bins == i].mean(), (bins == i).mean()) for i in range(10) if (bins == i).any()]
    left.plot([0, 1], [0, 1], color="grey", lw=0.8)
    left.scatter(*zip(*[(x, y) for x, y, _ in points]), s=[15 + 250 * share for *_, share in points])
    left.set(xlabel="predicted P(Good)", ylabel="share rated Good", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    left.set_title(f"AudioScore on {len(p)} audios of held-out clips", fontsize=9)
    right.hist([row["score_c"] for row in pairs], bins=30, color="#4a6fa5")
    right.axvline(threshold, color="#b3261e")
    right.set(xlabel="score_c (high = easy)", ylabel="pairs")
    right.set_title(f"Complexity of {len(pairs)} mined pairs; red: score_delta {threshold:g}", fontsize=9)


def playable_video(path, seconds):
    """The silent picture as H.264 that every browser plays (4:2:0, 360 pixels high), `seconds` long."""
    fps, stream = 25, io.BytesIO()

    def resized(frame):  # at once: 8 s of full-size frames are a gigabyte
        height, width = 360, 2 * round(frame.shape[2] * 180 / frame.shape[1])
        image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")
        how = "AREA" if height < frame.shape[1] else "POINT"  # the toy world's few pixels stay squares
        return torch.from_numpy(image.reformat(width, height, "rgb24", interpolation=how).to_ndarray())

    (frames,) = common.read_frames(path, [(fps, resized)], seconds)
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "26", "preset": "veryfast"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames.numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    return data_uri("video/mp4", stream.getvalue())


def playable_sound(wave, rate):
    """wave: (S,) float32, as FLAC of 16 bits: what came from a 16-bit file is heard to the bit."""
    flac = io.BytesIO()
    soundfile.write(flac, wave.nan_to_num().numpy(), rate, format="FLAC")
    return data_uri("audio/flac", flac.getvalue())


def spectrogram(wave, rate):
    """Time to the right, 0 to rate / 2 upwards, -100 (black) to -20 dB of a full-scale sine as colour."""
    png, window = io.BytesIO(), torch.hann_window(512)
    spectrum = torch.stft(wave, 512, max(64, len(wave) // 320), window=window, return_complex=True).abs()
    level = 20 * (2 * spectrum / window.sum()).clamp_min(1e-9).log10().numpy()
    matplotlib.image.imsave(png, level, vmin=-100, vmax=-20, cmap="magma", origin="lower", format="png")
    return data_uri("image/png", png.getvalue())


def cards_of(run, run_json, clips, systems):
    """What the player shows of up to LISTEN clips, evenly drawn. Stops at a file that is gone; leaves out, as stage 07
    did, a video without picture of the whole length."""
    seconds, rate, cards = run_json["clip_s"], run_json["sample_rate_hz"], []
    clips = [clips[i] for i in np.linspace(0, len(clips) - 1, min(LISTEN, len(clips))).astype(int)]
    files = [{s["name"]: run / s["audio"][c["id"]] for s in systems if c["id"] in s["audio"]} for c in clips]
    for clip, sounds in zip(clips, files):
        for path in (clip["path"], *sounds.values()):
            if not path.exists():
                stop(f"{path}: gone, though stage 07 used it for {clip['id']}; put it back or run 07_evaluate.py again")
    people = common.people_of(run)
    truth = people.truth_of(run) if people else {}  # only a simulated world knows when it sounds
    for clip, sounds in tqdm([*zip(clips, files)], desc="page", unit="clip"):
        card = dict(clip=clip["id"], caption=clip.get("caption") or clip.get("label"), sounds=[])
        card["events"] = [hit / seconds for hit in truth.get(clip["id"], {}).get("hits_s", ()) if hit < seconds]
        try:
            card["video"] = playable_video(clip["path"], seconds)
            for name, path in sounds.items():
                wave = common.read_audio(path, rate, seconds)
                sound = dict(name=name, audio=playable_sound(wave, rate), picture=spectrogram(wave, rate))
                card["sounds"].append(sound)
            cards.append(card)
        except SkipClip as reason:
            tqdm.write(f"{clip['id']}: {reason}; left out of the page")
    return cards


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------

RESULT = dict(system=TEXT, metric=TEXT, better=TEXT, verdict=maybe(TEXT))
RESULT |= {key: maybe(NUMBER) for key in ("value", "low", "high", "n", "diff", "diff_low", "diff_high")}
COMPARED = dict(a=TEXT, b=TEXT, win_rate=NUMBER, low=maybe(NUMBER), high=maybe(NUMBER))
COMPARED |= dict.fromkeys(("n", "ties", "clips", "raters"), common.INDEX)
SYSTEMS = dict(split=TEXT, guidance=NUMBER, steps=NUMBER, systems=LIST, metrics=DICT, paper=DICT)


def report(run):
    # -- numbers
    run_json, hint = common.read_run(run), f"; run 07_evaluate.py --run-dir {run} first"
    results = [dict.fromkeys(RESULT) | row for row in common.read_jsonl(run / "07_results.jsonl", RESULT, hint)]
    about = common.read_json(run / "07_systems.json", SYSTEMS, hint)
    systems, clips = about["systems"], common.read_clips(run, about["split"])
    names = [system["name"] for system in systems]
    if {*names} != {row["system"] for row in results} or not {row["metric"] for row in results} <= {*about["metrics"]}:
        stop(f"{run}/07_systems.json: not of 07_results.jsonl; run 07_evaluate.py --run-dir {run} again")

    # -- figures
    figures, cell = {}, {(row["metric"], row["system"]): row for row in results}
    tested = {key: row for key, row in cell.items() if row["diff_low"] is not None and key[1] != "ground_truth"}
    if tested:
        compared = [name for name in names if name not in ("base", "ground_truth")]
        figures["differences"] = picture(draw_differences, tested, about["metrics"], compared)
    folders = {s["name"]: run / s["folder"] for s in systems if s["folder"]}
    folders = {name: folder for name, folder in folders.items() if (folder / "policy.json").exists()}
    logs = {n: common.read_jsonl(f / "log.jsonl") for n, f in folders.items() if (f / "log.jsonl").exists()}
    if any(logs.values()):
        figures["training"] = picture(draw_training, {name: log for name, log in logs.items() if log})
    if (run / "02_audioscore.pt").exists() and (run / "04_settings.json").exists():
        heldout = common.load_pt(run / "02_audioscore.pt")["heldout"]
        mined = [r for i in (1, 2) for r in common.read_jsonl(run / f"04_stage{i}.jsonl") if r["source"] == "auto"]
        threshold = common.read_json(run / "04_settings.json")["settings"]["threshold"]
        figures["audioscore"] = picture(draw_audioscore, heldout, mined, threshold)

    # -- page
    blind = common.read_jsonl(run / "08_blind.jsonl", COMPARED) if (run / "08_blind.jsonl").exists() else []
    if not {row[x] for row in blind for x in "ab"} <= {*names}:
        stop(f"{run}/08_blind.jsonl: of other systems than 07_systems.json; run 08_listen.py blind --answers again")
    files = {n: [common.read_json(f / name) for name in ("settings.json", "policy.json")] for n, f in folders.items()}
    made = {name: settings.get("settings", {}) | policy for name, (settings, policy) in files.items()}
    parts = dict(run_json=run_json, about=about, names=names, cell=cell, policies=made, figures=figures, blind=blind)
    file, cards = run / "08_report.html", cards_of(run, run_json, clips, systems)
    write_page(file, title="V2A-DPO: results", cards=cards, clips=clips, pack=None, **parts)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")


def write_page(path, **parts):
    """PAGE with these parts: every text is escaped, and nothing is marked as safe."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    common.write_text(path, page.from_string(PAGE.read_text(encoding="utf-8")).render(parts))


# ------------------------------------------------------------------------------------------------------------
# Packs
# ------------------------------------------------------------------------------------------------------------


def sheet_of(run, mode, args):
    """What is asked: the sheet's columns, and for each of its rows (row, {column: path of the audio that it names})."""
    if mode is MODES["blind"]:
        return comparisons(run, args)
    sheet, samples, asked = run / mode.sheet, common.read_samples(run), []
    if not sheet.exists():
        stop(f"{sheet}: no such file; run {mode.script} --run-dir {run} first")
    wav = {(clip, audio["k"]): run / audio["wav"] for clip, audios in samples.items() for audio in audios}
    for line, row in common.read_csv(sheet, ("clip", *mode.heard, mode.answer)):
        k = {column: common.sample_index(row, samples, f"{sheet}, line {line}", column) for column in mode.heard}
        asked.append((row, {column: wav[row["clip"], k[column]] for column in mode.heard}))
    if not asked:
        stop(f"{sheet}: asks nothing; run {mode.script} --run-dir {run} again")
    return [*asked[0][0]], asked


def comparisons(run, args):
    """As sheet_of: every pair of systems on drawn test clips, in rounds. Each round asks every clip once, and the pairs
    take turns, so that the first packs compare them all."""
    audio, clips = systems_of(run), [clip["id"] for clip in common.read_clips(run, "test")]
    for name in args.systems or ():
        if name not in audio:
            stop(f"--systems {name}: is no system of {run}/07_systems.json (there are {', '.join(audio)})")
    pairs = [*combinations([name for name in audio if name in (args.systems or audio)], 2)]
    if not pairs:
        stop("blind compares two systems or more; evaluate another one by 07_evaluate.py")
    clips = sorted(random.Random(args.seed).sample(clips, min(args.num_clips, len(clips))))
    turns = [(clip, *pairs[(i + turn) % len(pairs)]) for turn in range(len(pairs)) for i, clip in enumerate(clips)]
    heard = [(clip, a, b, dict(a=audio[a].get(clip), b=audio[b].get(clip))) for clip, a, b in turns]
    asked = [(dict(clip=clip, a=a, b=b, audios=bound(x)), x) for clip, a, b, x in heard if all(x.values())]
    return ["clip", "a", "b", "audios", "choice"], asked


def systems_of(run):
    """{system: {clip id: path}} of stage 07's last evaluation."""
    fields = dict(systems=common.list_of(common.with_fields(name=TEXT, audio=common.dict_of(common.PATH))))
    about = common.read_json(run / "07_systems.json", fields, f"; run 07_evaluate.py --run-dir {run} first")
    return {s["name"]: {clip: run / path for clip, path in s["audio"].items()} for s in about["systems"]}


def bound(paths):
    """What an answer is about: a digest of two audios. paths: {a, b: path}."""
    return common.digest_of(*(common.digest(paths[x]) for x in "ab"))


def guide_of(mode, path):
    """The question, and {answer: a sentence on it}; from --guide, or the mode's own."""
    text = common.read_text(path) if path else mode.guide
    question, *lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    said = {word.strip(): sentence.strip() for word, _, sentence in (line.partition(":") for line in lines)}
    if [*said] != [*mode.words] or not all(said.values()):
        wanted = ", ".join(f"'{word}: ...'" for word in mode.words)
        stop(f"--guide {path}: must hold a line with the question, then a line for each answer: {wanted}")
    return dict(question=question, words=said)


def level_checks(rate=16_000):
    """{n: 4 s of noise at -23 dB of full scale, then n beeps at -50}: who can count them hears soft faults too."""
    t, noise = torch.arange(rate // 5) / rate, torch.randn(rate, generator=torch.Generator().manual_seed(0))
    beep = torch.cat([torch.hann_window(len(t)) * torch.sin(2000 * torch.pi * t) * 10**-2.5, torch.zeros(rate // 4)])
    waves = {n: torch.cat([noise * 10**-1.15, torch.zeros(rate // 2), *[beep] * n]) for n in (2, 3, 4)}
    return {n: playable_sound(common.fit_length(wave, 4 * rate), rate) for n, wave in waves.items()}


def cards_of_pack(asked, clips, seconds):
    """One card per clip, with its questions. A clip that cannot be shown is left out, and said."""
    cards = []
    for name, group in groupby(enumerate(asked), key=lambda one: one[1][0]["clip"]):
        clip = clips[name]
        card = dict(clip=name, caption=clip.get("caption") or clip.get("label"), questions=[])
        try:
            card["video"] = playable_video(clip["path"], seconds)
            for row, (_, paths) in group:
                sounds = []
                for column, path in paths.items():
                    wave, rate = common.decode_audio(path, seconds)  # at its own rate
                    wave = common.fit_length(wave, round(seconds * rate))
                    sounds.append(dict(name=column, audio=playable_sound(wave, rate)))
                card["questions"].append(dict(row=row, sounds=sounds))
            cards.append(card)
        except SkipClip as reason:
            tqdm.write(f"{name}: {reason}; left out")
    return cards


def write_packs(run, what, args):
    """08_<what>/00001.html ..., of --pack clips each. One that is there, of the same questions and files, is kept."""
    mode, folder, seconds, todo = MODES[what], run / f"08_{what}", common.read_run(run)["clip_s"], {}
    clips = {clip["id"]: clip for clip in common.read_clips(run, "test" if what == "blind" else "train")}
    guide, (columns, asked) = guide_of(mode, args.guide), sheet_of(run, mode, args)
    columns = [*dict.fromkeys([*columns, "rater", "repeat", "seconds", "comment"])]
    groups = [[*group] for _, group in groupby(asked, key=lambda one: one[0]["clip"])]
    packs = [[*chain(*groups[i : i + args.pack])] for i in range(0, len(groups), args.pack)]
    common.hold(run, "08", common.Ranks())
    before = 0
    for i, pack in enumerate(packs, 1):
        stamps = []
        for path in (path for row, paths in pack for path in (clips[row["clip"]]["path"], *paths.values())):
            if not path.exists():
                stop(f"{path}: gone, though {folder.name} needs it; put it back, or run the stage that made it again")
            stamps.append((path.stat().st_size, path.stat().st_mtime_ns))
        after = before + len(pack)
        repeats = -(-after // REPEATED) - -(-before // REPEATED)  # so that of all packs one in REPEATED is
        repeats = random.Random(f"{args.seed} {i}").sample(range(len(pack)), repeats)
        about = dict(name=f"{what}_{i:05}", columns=columns, rows=[row for row, _ in pack], repeats=repeats)
        about |= dict(answer=mode.answer, pairs=len(mode.heard) > 1)
        about["id"] = common.digest_of(about, stamps, guide, seconds, common.digest(PAGE))
        file, before = folder / f"{i:05}.html", after
        if not (file.exists() and about["id"] in file.open(encoding="utf-8").read(200)):
            todo[file] = (f"{mode.title}, pack {i}", about, pack)

    levels, began = level_checks() if todo else {}, time.monotonic()

    def make(file):
        title, about, pack = todo[file]
        cards = cards_of_pack(pack, clips, seconds)
        heard = len(mode.heard) * (len(pack) + len(about["repeats"]))
        minutes = 1 + int(heard * (seconds + 4 / len(mode.heard)) / 60)
        write_page(
            file, title=title, cards=cards, pack=about | dict(levels=levels), guide=guide, minutes=minutes, heard=heard
        )
        return file.stat().st_size / 1e6

    pool = ThreadPoolExecutor(min(8, common.cores()))
    try:
        sizes = [*tqdm(pool.map(make, todo), desc=folder.name, total=len(todo), unit="pack")]
    finally:
        pool.shutdown(cancel_futures=True)
    for file in folder.glob("[0-9]*.html"):
        if int(file.stem) > len(packs):  # of an earlier, longer sheet
            file.unlink()
    names = {row["clip"] for row, _ in asked}
    print(f"{folder}: {len(packs)} packs of {len(asked)} questions on {len(names)} clips", end="")
    took = time.monotonic() - began
    each = f"; {len(todo)} made now, {took / len(todo):.1f} s and {sum(sizes) / len(todo):.1f} MB each" if todo else ""
    print(f"{each}; {len(packs) - len(todo)} were there")
    print(f"next: open {folder / '00001.html'} in a browser, or send the packs to people; then, with what they save,")
    flags = {"rate": "--ratings", "choose": "--redo --choices", "blind": "--answers"}[what]
    script = "08_listen.py blind" if what == "blind" else mode.script
    print(f"      python {script} --run-dir {run} {flags} {what}_*.csv")


# ------------------------------------------------------------------------------------------------------------
# Answers to blind
# ------------------------------------------------------------------------------------------------------------


def read_comparisons(run, paths):
    """Every answer, checked: [{clip, a, b, choice, rater, and what is known of repeat, seconds, comment}]."""
    audio, known = systems_of(run), {}

    def answer(row, where):
        common.check(row, dict(clip=common.NAME, a=TEXT, b=TEXT, audios=maybe(TEXT)), where)
        clip, a, b = (row[name] for name in ("clip", "a", "b"))
        for column in "ab":
            if row[column] not in audio:
                stop(f"{where}, field '{column}': {row[column]!r} is no system of 07 (there are {', '.join(audio)})")
        if a == b or clip not in audio[a] or clip not in audio[b]:
            stop(f"{where}: {clip} has no audio of two systems, {a} and {b}; these are answers of another run")
        if (clip, a, b) not in known:
            known[clip, a, b] = bound(dict(a=audio[a][clip], b=audio[b][clip]))
        if row.get("audios") not in (None, "", known[clip, a, b]):
            stop(f"{where}: about other audio of {clip} than is here now; these are answers of another run")
        choice = common.meant(row["choice"], ("a", "b", "tie"), where, "choice")
        return (clip, *sorted((a, b))), dict(clip=clip, a=a, b=b, choice=choice)

    return common.read_answers(paths, "choice", answer)


def wins(answer, name):
    """1 where this system is preferred, 0 where the other is, one half for a tie."""
    return 0.5 if answer["choice"] == "tie" else float(answer[answer["choice"]] == name)


def win_rates(answers, systems, resamples=2000):
    """Lines of 08_blind.jsonl. The interval is a bootstrap over clips and, where there are several, raters: both are
    drawn anew, and an answer counts as often as its clip and its rater together."""
    lines, rng = [], np.random.default_rng(0)
    for a, b in combinations(systems, 2):
        part = [answer for answer in answers if {answer["a"], answer["b"]} == {a, b}]
        if not part:
            continue
        won, weight, count = np.array([wins(answer, a) for answer in part]), 1.0, {}
        for field in ("clip", "rater"):
            names, of = np.unique([answer[field] for answer in part], return_inverse=True)
            count[field] = len(names)
            weight = weight * rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)[:, of]
        low = high = None
        if count["clip"] > 1:
            weight = weight[weight.sum(axis=1) > 0]
            low, high = np.percentile(weight @ won / weight.sum(axis=1), (2.5, 97.5)).tolist()
        ties = sum(answer["choice"] == "tie" for answer in part)
        numbers = dict(win_rate=float(won.mean()), low=low, high=high, n=len(part), ties=ties)
        lines.append(dict(a=a, b=b, **numbers, clips=count["clip"], raters=count["rater"]))
    return lines


def count_answers(run, args):
    answers = read_comparisons(run, args.answers)
    heard = common.without_raters(answers, args.exclude_rater)
    asked = lambda answer: (answer["clip"], *sorted((answer["a"], answer["b"])))  # noqa: E731
    common.report_raters(heard, asked, lambda answer: wins(answer, min(answer["a"], answer["b"])), "nominal")
    counted = [answer for answer in heard if "repeat" not in answer]
    lines = win_rates(counted, [*systems_of(run)])
    common.write_jsonl(run / "08_blind.jsonl", lines)
    print(f"blind: {len(counted)} answers; share of those who preferred the first, 95 % interval")
    for line in lines:
        interval = "" if line["low"] is None else f" [{line['low']:.2f}, {line['high']:.2f}]"
        count = f"{line['n']} answers, {line['ties']} of them ties, on {line['clips']} clips by {line['raters']} raters"
        print(f"  {line['a']} to {line['b']}: {line['win_rate']:.2f}{interval}, {count}")
    print(f"wrote {run / '08_blind.jsonl'}\nnext: python 08_listen.py --run-dir {run}")


def main(args):
    run = Path(args.run_dir)
    if args.what == "report":
        report(run)
    elif args.what == "blind" and args.answers:
        count_answers(run, args)
    else:
        write_packs(run, args.what, args)


if __name__ == "__main__":
    common.launch(main, parse_args)
