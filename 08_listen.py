"""Stage 08: pages for people. `report`: the numbers, the training, and what every system sounds like (Sec. 3.2).

Run:
    python 08_listen.py report --run-dir runs/vgg     # without words: the report of the toy run

Reads:
    07_results.jsonl, 07_systems.json                the numbers, how they are shown, the audio of every system
    policy.json, settings.json, log.jsonl            of the policy folders among the systems
    02_audioscore.pt, 04_stage*.jsonl, 04_settings.json      heldout; pairs and threshold; left out where there are none
    clips.jsonl, videos, 00_truth.jsonl              what six test clips show, and (toy world) when it sounds
Writes:
    08_report.html     one self-contained file that opens from disk in any browser, without network
Takes: toy 8 s on 2 shared cores.
"""

import base64
import io
from itertools import groupby
from pathlib import Path

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
from common import DICT, LIST, NUMBER, TEXT, SkipClip, maybe, stop

LISTEN = 6  # clips in the listening section
COLOURS = {"better": "#2a7f3f", "worse": "#b3261e", None: "#777777"}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.io.add_argument("what", nargs="?", choices=("report",), default="report", help="the page to make")
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
    """The silent picture as H.264 that every browser plays (4:2:0, 240 to 360 pixels high), `seconds` long."""
    fps, stream = 25, io.BytesIO()

    def resized(frame):  # at once: 8 s of full-size frames are a gigabyte
        height = min(max(frame.shape[1], 240), 360)
        width = 2 * round(frame.shape[2] * height / frame.shape[1] / 2)
        image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")
        how = "AREA" if height < frame.shape[1] else "POINT"  # the toy world's few pixels stay squares
        return torch.from_numpy(image.reformat(width, height - height % 2, "rgb24", interpolation=how).to_ndarray())

    (frames,) = common.read_frames(path, [(fps, resized)], seconds)
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "26", "preset": "veryfast"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames.numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    return data_uri("video/mp4", stream.getvalue())


def playable_sound(name, path, seconds, rate):
    """What a button of the player needs: its text, the audio as FLAC, and the spectrogram, time to the right, 0 to
    rate / 2 upwards, -100 (black) to -20 dB of a full-scale sine as colour."""
    wave, flac, png = common.read_audio(path, rate, seconds), io.BytesIO(), io.BytesIO()
    soundfile.write(flac, wave.numpy(), rate, format="FLAC")
    window = torch.hann_window(512)
    spectrum = torch.stft(wave, 512, max(64, len(wave) // 320), window=window, return_complex=True).abs()
    level = 20 * (2 * spectrum / window.sum()).clamp_min(1e-9).log10().numpy()
    matplotlib.image.imsave(png, level, vmin=-100, vmax=-20, cmap="magma", origin="lower", format="png")
    sound, image = data_uri("audio/flac", flac.getvalue()), data_uri("image/png", png.getvalue())
    return dict(name=name, audio=sound, picture=image)


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
        card = dict(title=f"{clip['id']}: {clip.get('caption') or clip.get('label') or 'no caption'}")
        card["events"] = [hit / seconds for hit in truth.get(clip["id"], {}).get("hits_s", ()) if hit < seconds]
        try:
            card["video"] = playable_video(clip["path"], seconds)
            card["sounds"] = [playable_sound(name, path, seconds, rate) for name, path in sounds.items()]
            cards.append(card)
        except SkipClip as reason:
            tqdm.write(f"{clip['id']}: {reason}; left out of the page")
    return cards


# ------------------------------------------------------------------------------------------------------------
# The pages
# ------------------------------------------------------------------------------------------------------------

RESULT = dict(system=TEXT, metric=TEXT, better=TEXT, verdict=maybe(TEXT))
RESULT |= {key: maybe(NUMBER) for key in ("value", "low", "high", "n", "diff", "diff_low", "diff_high")}
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
    files = {n: [common.read_json(f / name) for name in ("settings.json", "policy.json")] for n, f in folders.items()}
    made = {name: settings.get("settings", {}) | policy for name, (settings, policy) in files.items()}
    parts = dict(run_json=run_json, about=about, names=names, cell=cell, policies=made, figures=figures)
    return write_page(run / "08_report.html", cards=cards_of(run, run_json, clips, systems), clips=clips, **parts)


def write_page(path, **parts):
    """PAGE with these parts: every text is escaped, and nothing is marked as safe."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    common.write_text(path, page.render(parts))
    return path


def main(args):
    file = {"report": report}[args.what](Path(args.run_dir))
    print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")


PAGE = """\
{% macro shown(x, how, sign="") %}{{ ("%" ~ sign ~ "." ~ how.decimals ~ "f")|format(x * how.times) }}{% endmacro %}
{% macro figure(name, absent) %}{% if name in figures %}<img class="figure" src="{{ figures[name] }}" alt="">
{% else %}<p>{{ absent }}</p>{% endif %}{% endmacro %}
{% macro player(card) %}
<section class="card"><h3>{{ card.title }}</h3>
<div class="row"><video muted playsinline preload="auto" src="{{ card.video }}"></video>
{% for sound in card.sounds %}
<div class="sound"><button aria-pressed="false">{{ sound.name }}</button>
<audio preload="auto" src="{{ sound.audio }}"></audio><div class="picture"><img src="{{ sound.picture }}" alt="">
{% for event in card.events %}<i style="left:{{ (100 * event)|round(2) }}%"></i>{% endfor %}</div></div>
{% endfor %}</div></section>
{% endmacro %}
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>V2A-DPO: results</title><style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222} h2{margin-top:2rem}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto} .note{color:#555;max-width:60rem}
th,td{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child{text-align:left} td small{display:block;color:#666;font-size:11px} .figure,video{max-width:100%}
.card{border:1px solid #ddd;border-radius:8px;padding:.6rem 1rem 1rem;margin:1rem 0} .better{background:#e6f4ea}
.card h3{margin:.2rem 0 .6rem;font-size:15px;overflow-wrap:anywhere} .worse{background:#fce8e6}
.row{display:flex;gap:.6rem;flex-wrap:wrap;align-items:flex-end} .sound{flex:1 1 170px;max-width:320px}
video,.picture{height:240px;border-radius:4px;background:#000;overflow:hidden} .picture{position:relative}
.picture *{position:absolute;top:0;height:100%} .picture img{width:100%} .picture i{border-left:1px dashed #fffb}
button{width:100%;padding:.35rem;margin-bottom:.3rem;border:1px solid #bbb;border-radius:4px;background:#f6f6f6;
cursor:pointer;font:inherit;overflow-wrap:anywhere} button[aria-pressed=true]{background:#1a56b0;color:#fff}
</style>
<h1>V2A-DPO: results</h1>
<p class="note">{{ run_json.model }}, {{ clips|length }} {{ about.split }} clips, {{ about.steps }} Euler steps,
guidance {{ about.guidance }}. Intervals are 95 %: percentile bootstrap over clips for means, delete-a-block jackknife
for FD and IS. In a cell: value, interval, paired difference to base; green or red where its interval excludes 0.</p>
<h2>Results</h2>
<table><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for metric, how in about.metrics.items() %}
<tr><th>{{ how.column }} {{ "↑" if how.better == "higher" else "↓" }}</th>
{% for name in names %}{% set row = cell.get((metric, name), {}) %}{% set gap = row.diff if name != "ground_truth" %}
<td class="{{ row.verdict or "" if gap is number }}">{{ shown(row.value, how) if row.value is number else "-" }}
{% if row.low is number %}<small>[{{ shown(row.low, how) }}, {{ shown(row.high, how) }}]</small>{% endif %}
{% if gap is number %}<small>{{ shown(gap, how, "+") }}{% if row.diff_low is number %}
 [{{ shown(row.diff_low, how, "+") }}, {{ shown(row.diff_high, how, "+") }}]{% endif %}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</table>
<h3>The paper, Table 1 (VGGSound test)</h3>
<table><tr><th></th>{% for column in about.paper.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for name, row in about.paper.rows %}<tr><th>{{ name }}</th>{% for text in row %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</table><p class="note">{{ about.paper.remark }}</p>
<h2>Differences to base</h2>{{ figure("differences", "There is no system to compare with base.") }}
<h2>Training</h2>
{% for name, made in policies.items() %}<p class="note"><b>{{ name }}</b>:
{% for key in ("model", "method", "beta", "lr", "steps", "seed") if made[key] is defined %}
{{ key }} {{ made[key] }}{{ "" if loop.last else "," }}
{% endfor %}</p>{% endfor %}
{{ figure("training", "No policy was trained here.") }}{% if figures.training %}
<p class="note">Loss: log 2 = 0.693 where the policy is the reference. Dotted line: the curriculum's second stage. A
jump there is of the pairs, not the policy: it has learned to tell the easy pairs apart and meets hard and human ones;
a loss above log 2 says that it ranks some wrongly and with confidence. Error gap: the policy's flow-matching error less
the reference's, of winners (solid) and losers (dashed). Flow-DPO lifts the losers' above the winners'; both may rise
together, since Eq. 5 sees only their difference. Each stage is smoothed by itself.</p>{% endif %}
<h2>AudioScore and the curriculum</h2>{{ figure("audioscore", "AudioScore was not fitted here.") }}
<h2>Listen</h2>
<p class="note">A button plays its system's audio with the silent video, from the start; a second click stops both.
Spectrograms: {{ run_json.clip_s|round(2) }} s to the right, 0 to {{ run_json.sample_rate_hz / 2000 }} kHz upwards
{%- if cards and cards[0].events %}; dashed lines: the true events{% endif %}.</p>
{% for card in cards %}{{ player(card) }}{% endfor %}
<script>
let playing = null;
function stop() {
  document.querySelectorAll("audio, video").forEach(media => media.pause());
  if (playing) playing.setAttribute("aria-pressed", false);
  playing = null;
}
document.querySelectorAll(".card button").forEach(button => button.onclick = () => {
  const audio = button.nextElementSibling, again = playing === button;
  stop();
  if (again) return;
  (playing = button).setAttribute("aria-pressed", true);
  audio.onended = stop;
  const both = [button.closest(".card").querySelector("video"), audio];
  both.forEach(media => { media.currentTime = 0; media.play().catch(() => {}); });
});
</script></html>
"""


if __name__ == "__main__":
    common.launch(main, parse_args)
