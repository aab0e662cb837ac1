"""07_report.html in a real browser, from the file system and without network."""

import json
import os
import shutil
import subprocess

import pytest
from conftest import read

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

QUIET = """--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync
--disable-component-update --disable-dev-shm-usage --mute-audio --remote-debugging-pipe --window-size=1280,2400"""

LOADED = """new Promise(done => {
  const media = [...document.querySelectorAll("video, audio")], began = Date.now();
  (function look() {
    const waiting = media.filter(m => m.readyState < 4 && !m.error);
    if (!waiting.length || Date.now() - began > 60000)
      done(media.map(m => ({tag: m.tagName, ready: m.readyState, error: m.error && m.error.message, s: m.duration})));
    else setTimeout(look, 100);
  })();
})"""

CLICK = """new Promise(done => {
  const button = document.querySelectorAll("button")[%d], audio = button.parentElement.querySelector("audio");
  const video = button.closest(".card").querySelector("video"), began = Date.now();
  button.click();
  (function look() {
    const others = [...document.querySelectorAll("audio")].filter(a => a !== audio && !a.paused).length;
    const state = {name: button.innerText, on: button.className, audio: audio.currentTime, video: video.currentTime,
                   playing: !audio.paused && !video.paused, others: others};
    if ((state.playing && state.audio > 0.1 && state.video > 0.1) || Date.now() - began > 20000) done(state);
    else setTimeout(look, 20);
  })();
})"""


class Page:
    """A page over Chromium's debugging pipe: JSON messages that end in a zero byte."""

    def __init__(self, url, profile):
        (to_read, self.to), (self.back, to_write) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = [*QUIET.split(), f"--user-data-dir={profile}"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(to_read, to_write))
        self.browser = subprocess.Popen(["bash", "-c", command, BROWSER, *flags, "about:blank"], **quiet)
        os.close(to_read)
        os.close(to_write)
        self.count, self.rest, self.session, self.events = 0, b"", None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=url)

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                block = os.read(self.back, 1 << 20)
                assert block, "the browser ended"
                self.rest += block
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        """The value of a script's promise, as after a user's gesture."""
        flags = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        result = self.send("Runtime.evaluate", expression=script, **flags)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self):
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
                found.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requests(self):
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def close(self):
        self.browser.terminate()
        self.browser.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    page = Page((finished / "07_report.html").as_uri(), tmp_path_factory.mktemp("profile"))
    page.run("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))")
    yield page
    page.close()


def test_every_video_and_audio_of_the_report_loads(page, finished):
    media = page.run(LOADED)
    clips = min(6, sum(clip["split"] == "test" for clip in read(finished / "clips.jsonl")))
    assert [m["tag"] for m in media].count("VIDEO") == clips
    assert [m["tag"] for m in media].count("AUDIO") == 4 * clips
    assert [m for m in media if m["error"] or m["ready"] < 4] == []
    assert all(abs(m["s"] - 2) < 0.1 for m in media)  # picture and sound are equally long


def test_every_picture_of_the_report_is_drawn(page):
    sizes = page.run("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(sizes) > 10 and min(sizes) > 50


def test_each_button_plays_its_own_audio_with_the_video_and_nothing_else(page):
    names = page.run("[...document.querySelectorAll('button')].map(b => b.innerText)")
    assert set(names) == {"ground_truth", "base", "flow_dpo", "ddpo"}
    for i, name in enumerate(names):
        state = page.run(CLICK % i)
        assert state["playing"] and state["audio"] > 0.1 and state["video"] > 0.1, state
        assert (state["name"], state["on"], state["others"]) == (name, "on", 0), state
        assert abs(state["audio"] - state["video"]) < 0.25, state


def test_a_second_click_stops(page):
    page.run(CLICK % 0)
    page.run("document.querySelector('button').click()")
    playing = "[...document.querySelectorAll('audio, video')].filter(m => !m.paused).length"
    assert page.run(playing) == 0 and page.run("document.querySelectorAll('button.on').length") == 0


def test_the_page_fits_and_shows_every_section(page):
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    wanted = ["Results", "Differences to base", "Training", "AudioScore and the curriculum", "Listen"]
    assert page.run("[...document.querySelectorAll('h2')].map(h => h.innerText)") == wanted


def test_the_page_asks_for_nothing_and_complains_of_nothing(page):
    page.run("new Promise(done => setTimeout(done, 200))")
    assert [url for url in page.requests() if not url.startswith("file:")] == []
    assert len(page.requests()) == 1
    assert page.complaints() == []
