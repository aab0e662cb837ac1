"""08_report.html: what is in the file, and how it behaves in a real browser, from disk and without
network."""

import base64
import io
import json
import re

import av
import numpy as np
import pytest
from conftest import (
    SYSTEMS,
    asked_for,
    call,
    interrupted,
    read,
    read_json,
    remove,
    shown,
    stage,
    write,
)
from selenium.webdriver.common.by import By

import common
from common import inputs

# The file


def page_of(run):
    call("08", run)
    return (run / "08_report.html").read_text(encoding="utf-8")


@pytest.fixture
def report(finished):
    return (finished / "08_report.html").read_text(encoding="utf-8")


def test_the_report_is_one_file_with_audio_of_every_system(finished, report):
    outside = re.sub(r'"data:[^"]*"', "", report)
    assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]+/|@import|<link", outside)
    assert set(re.findall(r'(?:src|href|data-audio)="([^"]{0,5})', report)) == {"data:"}
    cards = report.count('<section class="card">')
    assert cards == min(6, len(inputs.read_clips(finished, "test")))
    for system in SYSTEMS:
        assert len(re.findall(rf"<button[^>]*>{system}</button>", report)) == cards
    assert report.count('data-audio="data:audio/flac') == 4 * cards
    assert report.count("<video ") == cards


def test_the_report_shows_the_numbers_of_07(finished, report):
    systems, results = read_json(finished / "07_systems.json"), read(finished / "07_results.jsonl")
    for row in results:
        how = systems["metrics"][row["metric"]]
        by = f" <small>{systems['clap']}</small>" if row["metric"] == "clap" else ""
        assert f"<th>{how['column']}{by} {'↑' if row['better'] == 'higher' else '↓'}</th>" in report
        if row["value"] is not None:
            assert f">{row['value'] * how['times']:.{how['decimals']}f}" in report
    assert all(f"<th>{name}</th>" in report for name, _ in systems["paper"]["rows"])
    verdicts = [row["verdict"] for row in results if row["system"] != "ground_truth"]
    for verdict in ("better", "worse"):
        assert report.count(f'<td class="{verdict}">') == verdicts.count(verdict)


def test_the_report_says_how_every_policy_was_trained(finished, report):
    page = " ".join(report.split()).replace(" </p>", "</p>")
    for name, folder in (("flow_dpo", "05_flow_dpo"), ("ddpo", "06_ddpo")):
        made = read_json(finished / folder / "settings.json")["settings"]
        beta = f"beta {made['beta']}, " if "beta" in made else ""
        line = f"model toy, method {name}, {beta}lr {made['lr']}, steps {made['steps']}, "
        line += f"ema {made['ema']}, seed {made['seed']}"
        if common.record.commit():
            line += f", commit {common.record.commit()}"
        assert f"{line}</p>" in page


def test_markup_in_a_caption_or_a_name_is_text(run, without_pictures):
    clips, hostile = read(run / "clips.jsonl"), """<script>alert("x")</script> & 'more'"""
    write(run / "clips.jsonl", [clip | {"caption": hostile} for clip in clips])
    systems = read_json(run / "07_systems.json")
    systems["metrics"]["is"]["column"] = systems["paper"]["rows"][0][0] = hostile
    (run / "07_systems.json").write_text(json.dumps(systems))
    page = page_of(run)
    assert "alert(" in page and "<script>alert" not in page and '"x"' not in page
    cards = min(6, sum(clip["split"] == "test" for clip in clips))
    text = "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &#39;more&#39;"
    assert page.count(text) == 2 + cards


def test_true_events_come_from_the_simulated_world_alone(run, report, without_pictures):
    truth = {row["id"]: row["hits_s"] for row in read(run / "00_truth.jsonl")}
    shown = [clip.id for clip in inputs.read_clips(run, "test") if f"<h3>{clip.id}:" in report]
    assert report.count("<i style=") == len(SYSTEMS) * sum(len(truth[clip]) for clip in shown) > 0
    (run / "00_truth.jsonl").unlink()
    assert "<i style=" not in page_of(run)


def test_a_policy_folder_without_log_and_a_run_without_audioscore_make_a_page(
    run, without_pictures
):
    remove(
        run, "05_flow_dpo/log.jsonl", "06_ddpo/log.jsonl", "02_audioscore.pt", "04_settings.json"
    )
    page = page_of(run)
    assert "No policy was trained here" in page and "AudioScore was not fitted here" in page


def pictures(page):
    """The frames of each of a page's videos."""
    for mp4 in re.findall(VIDEO, page):
        with av.open(io.BytesIO(base64.b64decode(mp4))) as container:
            frames = [x.to_ndarray(format="rgb24") for x in container.decode(video=0)]
        yield np.stack(frames).astype(float)


VIDEO = r"data:video/mp4;base64,([^\"]+)"


def test_a_copied_run_makes_its_page_from_its_own_files(report, run):
    audio = read_json(run / "07_systems.json")["systems"][1]["audio"]
    assert all(path == f"07_audio/base/{clip}.wav" for clip, path in audio.items())
    page = page_of(run)
    ours, theirs = (re.sub(VIDEO, "a video", text) for text in (page, report))
    assert ours == theirs and "a video" in ours
    # x264's bytes are not the same in every call
    for one, other in zip(pictures(page), pictures(report)):
        assert one.shape == other.shape and np.abs(one - other).mean() < 0.5  # of 255


def test_a_clip_without_picture_is_left_out_and_said(run, capsys):
    clip = inputs.read_clips(run, "test")[0]
    clip.path.write_bytes(clip.path.read_bytes()[:700])
    page = page_of(run)
    assert f"<h3>{clip.id}:" not in page and page.count('<section class="card">') == 5
    assert f"{clip.id}: unreadable video" in "".join(capsys.readouterr())


def test_an_interrupted_page_leaves_the_old_one(run):
    before = (run / "08_report.html").read_bytes()
    with interrupted(stage("08"), "spectrogram"):
        call("08", run)
    assert (run / "08_report.html").read_bytes() == before and not list(run.glob(".*.tmp*"))


def test_smoothing_is_a_mean_over_the_values_that_there_are():
    smooth = stage("08").smooth
    assert smooth([1, 2, 4, 9], 1).tolist() == pytest.approx([1.5, 7 / 3, 5, 6.5])
    assert smooth([1, 2, 4], 0).tolist() == [1, 2, 4] and smooth([3], 12).tolist() == [3]


# In a browser

LOADED = """
const done = arguments[0], began = Date.now();
const media = [...document.querySelectorAll("video")];
for (const button of document.querySelectorAll(".play")) {
  media.push(new Audio(button.dataset.audio));
}
(function look() {
  const waiting = media.filter(m => m.readyState < 4 && !m.error);
  if (waiting.length && Date.now() - began < 60000) return setTimeout(look, 100);
  const error = m => m.error && m.error.message;
  done(media.map(m => ({tag: m.tagName, ready: m.readyState, error: error(m), s: m.duration})));
})();"""

PLAYING = """
const [button, done] = arguments, began = Date.now();
const video = button.closest(".card").querySelector("video");
(function look() {
  const others = [...document.querySelectorAll("video")].filter(m => m !== video && !m.paused);
  const pressed = [...document.querySelectorAll("button[aria-pressed=true]")];
  const state = {
    on: pressed.map(b => b === button), others: others.length, src: audio.src,
    playing: !audio.paused && !video.paused, audio: audio.currentTime, video: video.currentTime,
  };
  const is_on = state.playing && state.audio > 0.4 && state.video > 0.4;
  if (is_on || Date.now() - began > 20000) done(state);
  else setTimeout(look, 20);
})();"""

PLACES = """
const place = (e, name) => [e.offsetHeight, name == "video" ? 0 : e.offsetTop];
const places = (card, name) => [...card.querySelectorAll(name)].map(e => place(e, name));
const cards = [...document.querySelectorAll(".card")];
return cards.map(card => ["video", "img", "i"].map(name => places(card, name)));"""


@pytest.fixture(scope="module")
def page(browser, finished):
    return shown(browser, finished / "08_report.html")


def buttons(page):
    return page.find_elements(By.TAG_NAME, "button")


def test_every_video_and_audio_of_the_report_loads(page, finished):
    media = page.execute_async_script(LOADED)
    clips = min(6, sum(clip["split"] == "test" for clip in read(finished / "clips.jsonl")))
    assert [m["tag"] for m in media].count("VIDEO") == clips
    assert [m["tag"] for m in media].count("AUDIO") == 4 * clips
    assert [m for m in media if m["error"] or m["ready"] < 4] == []
    assert all(abs(m["s"] - 2) < 0.1 for m in media)  # picture and sound are equally long


def test_every_picture_of_the_report_is_drawn(page):
    script = "return [...document.images].map(i => i.complete ? i.naturalWidth : 0)"
    sizes = page.execute_script(script)
    assert len(sizes) > 10 and min(sizes) > 50


def test_spectrograms_and_the_lines_of_true_events_are_as_tall_as_the_video(page):
    for video, pictures, lines in page.execute_script(PLACES):
        assert len(pictures) == len(SYSTEMS) and lines
        assert {tuple(place) for place in pictures + lines} == {tuple(video[0])}


def test_each_button_plays_its_own_audio_with_the_video_and_nothing_else(page):
    names = [button.text for button in buttons(page)]
    assert set(names) == set(SYSTEMS)
    for button in buttons(page):
        button.click()
        state = page.execute_async_script(PLAYING, button)
        assert state["playing"] and state["src"] == button.get_attribute("data-audio")
        assert state["on"] == [True] and state["others"] == 0, state
        assert abs(state["audio"] - state["video"]) < 0.1, state


def test_a_second_click_stops(page):
    button = buttons(page)[0]
    button.click()
    assert page.execute_async_script(PLAYING, button)["playing"]
    button.click()
    playing = "return [audio, ...document.querySelectorAll('video')].filter(m => !m.paused).length"
    assert page.execute_script(playing) == 0
    assert page.find_elements(By.CSS_SELECTOR, "button[aria-pressed=true]") == []


def test_the_page_fits_and_shows_every_section(page):
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wanted = [
        "Results",
        "Differences to base",
        "Training",
        "AudioScore and the curriculum",
        "Listen",
    ]
    assert [heading.text for heading in page.find_elements(By.TAG_NAME, "h2")] == wanted


def test_the_page_asks_for_nothing_and_complains_of_nothing(page, finished):
    page.execute_async_script("setTimeout(arguments[0], 200)")
    file = finished / "08_report.html"
    assert asked_for(page, file) == ([file.as_uri()], [])
