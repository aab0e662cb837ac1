"""Packs to rate, choose and compare: what the files hold, what becomes of answers, and people at
work in a browser."""

import base64
import csv
import functools
import io
import itertools
import json
import re
import shutil
import time
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import soundfile
from conftest import asked_for, call, cells, read, shown, stage, write
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.support.expected_conditions import alert_is_present
from selenium.webdriver.support.ui import WebDriverWait

import common

ENTER, RIGHT, LEFT = Keys.ENTER, Keys.ARROW_RIGHT, Keys.ARROW_LEFT


class Page(HTMLParser):
    """A page's script data, media and visible text, by other code than the stage's."""

    def __init__(self, path):
        super().__init__()
        self.cards, self.videos, self.script, self.text, self.inside = [], [], [], "", None
        self.feed(path.read_text(encoding="utf-8"))
        self.pack = json.loads("".join(self.script))

    def handle_starttag(self, tag, attrs):
        attrs, self.inside = dict(attrs), tag
        if tag == "script":
            self.inside = attrs.get("id", "script")
        if "data-clip" in attrs:
            self.cards.append((attrs["data-clip"], []))
        if tag == "video":
            self.videos.append(base64.b64decode(attrs["src"].partition(",")[2]))
        if "data-row" in attrs:
            self.cards[-1][1].append((int(attrs["data-row"]), {}))
        if "data-value" in attrs:
            flac = base64.b64decode(attrs["data-audio"].partition(",")[2])
            sound = soundfile.read(io.BytesIO(flac), dtype="int16")
            self.cards[-1][1][-1][1][attrs["data-value"]] = sound

    def handle_data(self, data):
        if self.inside == "pack":
            self.script.append(data)
        elif self.inside not in ("style", "script"):
            self.text += data


def packs_of(run, what):
    return [Page(path) for path in sorted((run / f"08_{what}").glob("*.html"))]


# The files


MARKUP = "<b onclick=alert(1)>bold</b> </script><script>alert('x')</script>"


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory):
    """A finished run with packs of every kind; its first test and train clips have markup as
    caption."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("packed") / "run")
    clips, named = read(run / "clips.jsonl"), cells(run / "02_to_rate.csv")[0]["clip"]
    hostile = {"test00000", named, cells(run / "03_to_choose.csv")[0]["clip"]}
    for clip in clips:
        clip["caption"] = MARKUP if clip["id"] in hostile else clip["caption"]
    write(run / "clips.jsonl", clips)
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(stage("08").playable_video)  # time
        patch.setattr(stage("08"), "playable_video", cached)
        call("08", run, "rate", "--pack", 8)
        call("08", run, "choose", "--pack", 8)
        systems = ("--systems", "base", "flow_dpo", "ground_truth")
        call("08", run, "blind", "--pack", 2, "--num-clips", 2, *systems)
    return run


def test_every_row_of_a_sheet_is_asked_once_and_one_in_twenty_twice(run, without_pictures):
    for what, pack, sheet in (("rate", 3, "02_to_rate.csv"), ("choose", 1, "03_to_choose.csv")):
        call("08", run, what, "--pack", pack)
        rows, pages = cells(run / sheet), packs_of(run, what)
        assert [row for page in pages for row in page.pack["rows"]] == rows
        assert all(len(page.cards) <= pack for page in pages)
        assert sum(len(page.pack["repeats"]) for page in pages) == -(-len(rows) // 20)
        assert pages[0].pack["columns"] == [*rows[0], "repeat", "seconds", "comment"]


def test_a_pack_holds_the_samples_bit_by_bit_and_the_whole_silent_video_at_360_lines(packed):
    for what in ("rate", "choose"):
        for page in packs_of(packed, what):
            for clip, questions in page.cards:
                for row, sounds in questions:
                    for column, (heard, rate) in sounds.items():
                        file = f"01_audio/{clip}_{page.pack['rows'][row][column]}.wav"
                        wave, own_rate = soundfile.read(packed / file, dtype="int16")
                        assert rate == own_rate and np.array_equal(heard, wave)
            with av.open(io.BytesIO(page.videos[0])) as film:
                (stream,) = film.streams
                codec = stream.codec_context
                assert (codec.name, codec.pix_fmt, stream.height) == ("h264", "yuv420p", 360)
                assert len(list(film.decode(stream))) == 50


def test_blind_asks_every_pair_of_systems_on_every_clip_and_all_pairs_early(packed):
    rows = [row for page in packs_of(packed, "blind") for row in page.pack["rows"]]
    pairs = [("ground_truth", "base"), ("ground_truth", "flow_dpo"), ("base", "flow_dpo")]
    assert len(rows) == len({(row["clip"], row["a"], row["b"]) for row in rows}) == 2 * 3
    assert [(row["a"], row["b"]) for row in rows] == [pairs[i] for i in (0, 1, 1, 2, 2, 0)]


def test_no_name_and_no_k_is_to_be_seen(packed):
    for what in ("rate", "choose", "blind"):
        for page in packs_of(packed, what):
            words = set(re.findall(r"[\w.]+", page.text))
            names = {"ground_truth", "base", "flow_dpo", "k", "wav"}
            assert not words & (names | {clip for clip, _ in page.cards})
            assert "alert(1)" not in page.text or "<b onclick=alert(1)>bold</b>" in page.text


def test_packs_that_are_there_are_kept_unless_what_they_ask_changes(run, capsys, without_pictures):
    folder = run / "08_choose"

    def times():
        return [file.stat().st_mtime_ns for file in sorted(folder.iterdir())]

    call("08", run, "choose", "--pack", 3)
    out, before = capsys.readouterr().out, times()
    assert re.search(r"3 packs of 12 questions on 8 clips, [\d.]+ MB; 3 made now, 0 were", out)
    (folder / "00002.html").unlink()
    (folder / ".00002.html.1.tmp.html").write_text("half")
    call("08", run, "choose", "--pack", 3)
    changed = [i for i, (x, y) in enumerate(zip(before, times(), strict=True)) if x != y]
    assert changed == [1]
    (run / "guide.txt").write_text("Which?\nA: this\nB: that\nTie: whatever\n")
    call("08", run, "choose", "--pack", 50, "--guide", run / "guide.txt")
    (page,) = packs_of(run, "choose")  # those of the longer list are gone
    assert "Which?" in page.text and "whatever" in page.text and len(page.pack["rows"]) == 12


def test_a_clip_without_picture_is_left_out_of_its_pack_and_said(run, capsys):
    clip = cells(run / "02_to_rate.csv")[0]["clip"]
    file = run / "00_videos" / f"{clip}.mp4"
    file.write_bytes(file.read_bytes()[:700])
    call("08", run, "rate", "--pack", 2)
    assert f"{clip}: unreadable video" in "".join(capsys.readouterr())
    page = packs_of(run, "rate")[0]
    assert len(page.cards) == 1 and page.cards[0][0] != clip and len(page.pack["rows"]) == 10


# Answers to blind


def answers(run, *rows):
    fields = ("clip", "a", "b", "choice", "rater")
    write(run / "answers.jsonl", [dict(zip(fields, row)) for row in rows])
    return run / "answers.jsonl"


def test_win_rates_by_hand_whichever_is_named_first_and_without_repeats(
    run, capsys, without_pictures
):
    rows = [("test00000", "base", "ddpo", "a", "x"), ("test00001", "ddpo", "base", "b", "x")]
    rows += [("test00000", "base", "ddpo", "tie", "y"), ("test00002", "base", "ddpo", "b", "y")]
    rows += [("test00000", "base", "flow_dpo", "b", "x")]
    rows += [("test00003", "ground_truth", "base", "a", "x")]
    file = answers(run, *rows)
    write(file, [*read(file), read(file)[0] | {"repeat": 1, "choice": "b"}])
    call("08", run, "blind", "--answers", file)
    found = {(row["a"], row["b"]): row for row in read(run / "08_blind.jsonl")}
    assert set(found) == {("ground_truth", "base"), ("base", "flow_dpo"), ("base", "ddpo")}
    ddpo = found["base", "ddpo"]
    counts = {"win_rate": 0.625, "n": 4, "ties": 1, "clips": 3, "raters": 2}
    assert ddpo == ddpo | counts
    assert 0 <= ddpo["low"] < 0.625 < ddpo["high"] <= 1
    assert found["base", "flow_dpo"]["win_rate"] == 0 and found["base", "flow_dpo"]["low"] is None
    assert "base to ddpo: 0.62 [" in capsys.readouterr().out
    call("08", run)
    page = " ".join((run / "08_report.html").read_text(encoding="utf-8").split())
    assert "Blind listening" in page and "<tr><th>base</th><td>ddpo</td><td>0.62</td>" in page
    write(run / "08_blind.jsonl", [ddpo | {"a": "lost"}])
    with pytest.raises(common.Stop, match=r"08_blind\.jsonl: of other systems"):
        call("08", run)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        taste = 0.6 + 0.2 * rng.uniform(-1, 1, 8)  # of eight raters, on 15 clips each
        rows = []
        for i, j in itertools.product(range(8), range(15)):
            choice = "a" if rng.random() < taste[i] else "b"
            about = dict(clip=f"c{(i * 4 + j) % 40}", a="x", b="y", choice=choice, rater=f"r{i}")
            rows.append(common.rows.ChoiceAnswer(**about))
        (line,) = stage("08").win_rates(rows, ["x", "y"], 300)
        covered += line.low <= 0.6 <= line.high
    assert covered >= 54


def test_answers_about_audio_that_was_made_anew_are_refused(packed, run, refused):
    row = packs_of(packed, "blind")[0].pack["rows"][1] | {"choice": "a", "rater": "x"}
    write(run / "answers.jsonl", [row])
    call("08", run, "blind", "--answers", run / "answers.jsonl")
    file = run / "07_audio" / row["b"] / f"{row['clip']}.wav"
    file.write_bytes(file.read_bytes()[:-2] + b"\1\1")
    assert "about other audio of" in refused("08", run, "blind", "--answers", run / "answers.jsonl")


# In a browser


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def ask(browser, script, *args):
    return browser.execute_script(f"return {script}", *args)


def wait(browser, script, seconds=30):
    began = time.monotonic()
    while not (found := ask(browser, script)):
        body = browser.find_element("tag name", "body").text
        assert time.monotonic() - began < seconds, (script, body)
        time.sleep(0.01)
    return found


def open_page(browser, path, rater=None, hurry=True):
    """By keys alone: the name, the check of the level, the start. hurry: sounds play sixteen times
    as fast."""
    shown(browser, path)
    if hurry:
        browser.execute_script("audio.defaultPlaybackRate = 16")
    if rater:
        name = "document.getElementById('name')"
        browser.execute_script(f"{name}.focus(); {name}.select()")
        press(browser, rater, ENTER)
        press(browser, str(wait(browser, "beeps")), ENTER)
        wait(browser, "!document.querySelector('main').hidden")


def heard(browser):
    """Waits until the question is heard; its row in the pack, and the columns of its sounds in
    their order."""
    about = "[+q.dataset.row, soundsOf(q).map(s => s.dataset.value), q.dataset.key]"
    shown = f"(q => q && isHeard(q) && !playing && {about})(sounds[at] && questionOf(sounds[at]))"
    return wait(browser, shown)


def saved(browser, name):
    press(browser, "s")
    file, began = browser.downloads / name, time.monotonic()
    while not file.exists():
        assert time.monotonic() - began < 20, [*browser.downloads.iterdir()]
        time.sleep(0.02)
    return file


def test_the_whole_sheet_rated_by_keys_with_a_reload_fits_the_same_audioscore_to_the_bit(
    packed, run, finished, browser
):
    page = packed / "08_rate" / "00001.html"
    said = {(row["clip"], row["k"]): row["rating"] for row in read(run / "02_ratings.jsonl")}
    open_page(browser, page, "simulated")
    rows, count = ask(browser, "pack.rows"), ask(browser, "questions.length")
    assert count == len(rows) + 2 == 42
    for i in range(count):
        row, _, key = heard(browser)
        press(browser, said[rows[row]["clip"], int(rows[row]["k"])][0].lower())
        wait(browser, f"state.items['{key}'].answer")
        if i == count // 2:
            order = ask(browser, "questions.map(q => q.dataset.key)")
            open_page(browser, page)
            assert f"{i + 1} answers" in browser.find_element("id", "hello").text
            press(browser, ENTER)
            assert ask(browser, "questions.map(q => q.dataset.key)") == order
            assert ask(browser, "done()") == i + 1
    assert "all 42 are answered" in browser.find_element("id", "rest").text
    file = saved(browser, "rate_00001_simulated.csv")
    assert asked_for(browser, page) == ([page.as_uri()] * 2, [])
    found = cells(file)
    for row, asked in zip(found, rows):
        answered = {"rating": row["rating"], "rater": row["rater"]}
        assert row == row | asked | answered
    assert [row["repeat"] for row in found] == ["0"] * 40 + ["1"] * 2
    assert all(float(row["seconds"]) > 0 for row in found)
    call("02", run, "--ratings", file, "--redo")
    assert (run / "02_audioscore.pt").read_bytes() == (finished / "02_audioscore.pt").read_bytes()


def test_choices_made_by_keys_become_the_same_pairs(packed, run, finished, browser):
    page = packed / "08_choose" / "00001.html"
    said = {(r["clip"], r["a"], r["b"]): r["choice"] for r in read(run / "03_human_choices.jsonl")}
    open_page(browser, page, "simulated")
    rows, orders = ask(browser, "pack.rows"), []
    for i in range(ask(browser, "questions.length")):
        row, order, key = heard(browser)
        orders.append(order)
        choice = said[rows[row]["clip"], *(int(rows[row][x]) for x in "ab")]
        press(browser, "t" if choice == "tie" else "ab"[order.index(choice)])
        wait(browser, f"state.items['{key}'].answer")
        if i == 5:
            open_page(browser, page)
            press(browser, ENTER)
    assert ["a", "b"] in orders and ["b", "a"] in orders
    call("03", run, "--choices", saved(browser, "choose_00001_simulated.csv"), "--redo")
    pairs = "03_human_pairs.jsonl"
    assert (run / pairs).read_bytes() == (finished / pairs).read_bytes()


def test_a_blind_pack_half_done_is_saved_and_counted(packed, browser):
    page = packed / "08_blind" / "00001.html"
    open_page(browser, page, '=Zoë, "Z" <i>')
    row, order, _ = heard(browser)
    press(browser, "c")
    press(browser, 'hum, "odd"', ENTER, "a")
    wait(browser, "done() == 1")
    file = saved(browser, "blind_00001_-Zoë-Z-i-.csv")
    found = [line for line in cells(file) if line["choice"]]
    (answer,) = found
    assert (answer["choice"], answer["comment"]) == (order[0], 'hum, "odd"')
    assert answer["rater"] == '\'=Zoë, "Z" <i>'  # no formula in a spreadsheet
    assert len(cells(file)) == 2 + ask(browser, "pack.repeats.length")
    assert answer["clip"] == ask(browser, "pack.rows")[row]["clip"]
    call("08", packed, "blind", "--answers", file)
    (line,) = read(packed / "08_blind.jsonl")
    assert line["n"] == 1 and {line["a"], line["b"]} == {answer["a"], answer["b"]}
    assert asked_for(browser, page) == ([page.as_uri()], [])


def test_what_does_not_play_is_answered_so_and_counts_for_no_audio(packed, run, browser, capsys):
    open_page(browser, packed / "08_rate" / "00001.html", "Zoë", hurry=False)
    press(browser, "x")  # at once, nothing was heard
    wait(browser, "done() == 1")
    browser.execute_script("audio.defaultPlaybackRate = 16; play(sounds[at])")
    heard(browser)
    press(browser, "g")
    wait(browser, "done() == 2")
    file = saved(browser, "rate_00001_Zoë.csv")
    assert sorted(row["rating"] for row in cells(file))[-2:] == ["Good", "cannot play"]
    call("02", run, "--ratings", file, run / "02_ratings.jsonl", "--redo")
    assert "set aside: 1 answers 'cannot play' of Zoë" in capsys.readouterr().out
    mine = [row for row in read(run / "02_ratings.jsonl") if row["rater"] == "Zoë"]
    assert [row["rating"] for row in mine] == ["Good"]


def test_what_does_not_play_is_said_leads_on_and_can_be_answered_properly_afterwards(
    packed, browser
):
    def broken(button):
        browser.execute_script(f"{button}.dataset.audio = 'data:audio/flac;base64,AAAA'")

    def complaint():
        alert = WebDriverWait(browser, 20).until(alert_is_present())
        text = alert.text
        alert.accept()
        assert ask(browser, "playing === null")
        return text

    open_page(browser, packed / "08_rate" / "00001.html")
    # before the start the key X would not help
    browser.execute_script("$('check').onclick = null")
    broken("$('check')")
    browser.execute_script("setTimeout(() => $('check').click())")
    assert "or tell whoever gave it to you" in complaint()
    open_page(browser, packed / "08_rate" / "00001.html", "Flo")
    heard(browser)
    broken("sounds[1]")
    press(browser, "g")
    assert "the key X answers 'Cannot play'" in complaint()
    press(browser, "x")
    assert heard(browser) and ask(browser, "at") == 2
    press(browser, LEFT)
    complaint()
    say = browser.find_element("id", "say").text
    assert "sound 2 of 5. Answered 'Cannot play'." in say and ask(browser, "done()") == 2
    browser.execute_script("sounds[1].dataset.audio = sounds[0].dataset.audio")
    press(browser, " ")
    heard(browser)
    press(browser, "b")
    assert wait(browser, "state.items[questions[1].dataset.key].answer") == "Bad"
    browser.execute_script("show(sounds.length)")
    press(browser, "x", "1", " ")  # nothing is asked there
    assert ask(browser, "[at, done()]") == [ask(browser, "sounds.length"), 2]
    assert "Cannot play" not in browser.find_element("id", "rest").text
    press(browser, LEFT, "x")  # the last, which is asked once more
    browser.execute_script("show(sounds.length)")
    assert "(1 answer is 'Cannot play'.)" in browser.find_element("id", "rest").text


def test_two_windows_of_one_rater_lose_no_answer(packed, browser):
    page = packed / "08_choose" / "00001.html"
    open_page(browser, page, "Gus")
    first = browser.current_window_handle
    key = heard(browser)[2]
    browser.switch_to.new_window("tab")
    open_page(browser, page)
    press(browser, ENTER)
    for n in (1, 2):
        heard(browser)
        press(browser, "t")
        wait(browser, f"done() == {n}")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    wait(browser, "done() == 2")
    assert ask(browser, "questionOf(sounds[at]).dataset.key") == key
    press(browser, "a")
    wait(browser, f"state.items['{key}'].answer !== 'tie'")
    browser.switch_to.window(second)
    wait(browser, f"done() == 2 && state.items['{key}'].answer !== 'tie'")
    browser.close()
    browser.switch_to.window(first)
    open_page(browser, page)
    assert "Welcome back, Gus. 2 answers" in browser.find_element("id", "hello").text


def test_a_narrow_window_shows_everything_though_name_and_caption_are_long(packed, browser):
    def check_in_sight(name):
        rect = ask(browser, f"$('{name}').getBoundingClientRect().toJSON()")
        assert rect["top"] > -1 and rect["bottom"] < 741, rect

    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for what in ("rate", "choose"):
            open_page(browser, packed / f"08_{what}" / "00001.html")
            browser.execute_script("$('name').value = 'New'; hello(); scrollTo(0, 0); count(5)")
            assert "Play it first" in browser.find_element("id", "hello").text
            check_in_sight("hello")
            open_page(browser, packed / f"08_{what}" / "00001.html", "Maximiliane " * 5)
            browser.execute_script("all('.caption').forEach(c => c.textContent = 'x'.repeat(300))")
            heard(browser)
            press(browser, "s")
            check_in_sight("say")
            assert ask(browser, "document.documentElement.scrollWidth <= innerWidth")
            assert ask(browser, "document.querySelector('header').offsetHeight") < 150
            # of the last sound of a clip the video is in sight too
            last = "sounds.findLastIndex(s => cardOf(s) === cardOf(sounds[0]))"
            browser.execute_script(f"show({last})")
            box = "(e => [e.top, e.bottom])({}.getBoundingClientRect())"
            film = ask(browser, box.format("filmOf(sounds[at])"))
            asked = ask(browser, box.format("questionOf(sounds[at])"))
            assert 0 <= film[0] < film[1] <= asked[0] < asked[1] <= 740
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_cannot_play_is_understood_in_a_sheet_filled_in_by_hand(run, capsys, refused):
    sheet = cells(run / "02_to_rate.csv")
    words = ["Cannot play", "CANNOT  PLAY", "cannot-play", "cannot_play", " cannot play "]
    file = run / "hand.jsonl"

    def fill(words, rater):
        write(file, [row | {"rating": w, "rater": rater} for row, w in zip(sheet, words)])

    fill(words, "Hal")
    said = refused("02", run, "--ratings", file, "--redo")
    assert "no rating in there but 5 'cannot play'" in said
    fill(["x"], "Hal")
    assert "'x' is not one of Good, Medium, Bad, cannot play" in refused(
        "02", run, "--ratings", file, "--redo"
    )
    both = ("02", run, "--redo", "--ratings", file, run / "02_ratings.jsonl")
    fill(words, "Hal")
    said = refused(*both, "--exclude-rater", "Hal")
    assert "nobody of that name has answered, or only 'cannot play' (there are simulated)" in said
    fill(words, ["Hal"])  # no name, but no reason to break down
    call(*both)
    assert "set aside: 5 answers 'cannot play' of ['Hal']" in capsys.readouterr().out


def test_seconds_with_the_comma_of_a_spreadsheet_are_read(run):
    rows = [{**row, "rating": " gOOD", "rater": "Ivo"} for row in cells(run / "02_to_rate.csv")]
    file = run / "hand.csv"
    with open(file, "w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "seconds"])
        writer.writeheader()
        writer.writerows(row | {"seconds": "3,4"} for row in rows[:2])
    call("02", run, "--ratings", file, run / "02_ratings.jsonl", "--redo")
    found = [row for row in read(run / "02_ratings.jsonl") if row["rater"] == "Ivo"]
    assert [(row["rating"], row["seconds"]) for row in found] == [("Good", 3.4)] * 2


def test_what_was_skipped_is_asked_before_the_end_corrections_lead_back_a_reload_shows_the_end(
    packed, browser
):
    page = packed / "08_choose" / "00001.html"
    open_page(browser, page, "Eve")
    keys = [heard(browser)[2]]
    press(browser, RIGHT, RIGHT)  # past both sounds of the first
    keys.append(heard(browser)[2])
    press(browser, "t")
    keys.append(heard(browser)[2])
    press(browser, LEFT, LEFT, "a")  # the second again, which is heard
    assert wait(browser, f"state.items['{keys[1]}'].answer !== 'tie'")
    assert heard(browser)[2] == keys[2]
    press(browser, "b")
    while (key := heard(browser)[2]) not in keys:
        keys.append(key)
        press(browser, "t")
    assert key == keys[0]  # before what is asked once more
    for again in (False, True):
        assert ("again" in heard(browser)[2]) == again
        press(browser, "t")
    for _ in range(2):
        assert wait(browser, "!document.getElementById('end').hidden")
        assert f"all {len(keys) + 1} are answered" in browser.find_element("id", "rest").text
        open_page(browser, page)
        press(browser, " ", "3", ENTER)  # nothing is checked a second time


def test_a_caption_with_markup_is_text(packed, browser):
    hostile = {clip["id"] for clip in read(packed / "clips.jsonl") if clip["caption"] == MARKUP}
    asked = {row["clip"] for row in cells(packed / "02_to_rate.csv")}
    open_page(browser, packed / "08_rate" / "00001.html")
    captions = browser.find_elements("class name", "caption")
    shown = [caption.get_attribute("textContent") for caption in captions]
    assert sum(MARKUP in text for text in shown) == len(hostile & asked) > 0
    assert browser.find_elements("css selector", ".caption *") == []


def test_an_answer_counts_only_after_the_sound_has_been_heard_to_its_end(packed, browser):
    open_page(browser, packed / "08_rate" / "00001.html", "Bo", hurry=False)
    wait(browser, "playing && audio.currentTime > 0.3 && filmOf(playing).currentTime > 0.3")
    state = ask(browser, "[audio.currentTime, filmOf(playing).currentTime]")
    assert abs(state[0] - state[1]) < 0.1
    # so that there is time to look
    browser.execute_script("audio.playbackRate = audio.defaultPlaybackRate = 0.07")
    press(browser, "g")
    assert "Listen to the end first" in browser.find_element("id", "say").text
    assert ask(browser, "done()") == 0
    button = ask(browser, "questions[0].querySelector('.answers button')")
    assert not button.is_enabled()
    press(browser, " ", " ")  # stopped, and from the start again
    assert wait(browser, "playing && audio.currentTime < 0.3")
    press(browser, RIGHT, LEFT)
    assert ask(browser, "at") == 0 and not ask(browser, "isHeard(questions[0])")
    browser.execute_script("audio.playbackRate = audio.defaultPlaybackRate = 16")
    wait(browser, "isHeard(questions[0])")
    assert button.is_enabled()
    button.click()
    wait(browser, "done() == 1 && at == 1")
    press(browser, LEFT, "b")  # a heard one can be changed at once
    assert wait(browser, "state.items[questions[0].dataset.key].answer") == "Bad"


def test_a_name_and_the_right_number_of_beeps_come_first_and_every_rater_has_an_order(
    packed, browser
):
    page, orders = packed / "08_rate" / "00001.html", {}
    open_page(browser, page)
    browser.execute_script("localStorage.clear()")
    open_page(browser, page)
    press(browser, ENTER)
    assert browser.find_element("id", "start").is_enabled() is False
    press(browser, "Cy", ENTER)
    n = wait(browser, "beeps")
    press(browser, ENTER)  # stopped: the number stays
    assert wait(browser, "!playing && beeps") == n
    press(browser, str(2 if n == 3 else 3))
    assert "That is not it" in browser.find_element("id", "hello").text
    press(browser, str(n))  # no second guess at the same sound
    assert "Play it first" in browser.find_element("id", "hello").text
    assert browser.find_element("id", "start").is_enabled() is False
    for name in ("Cy", "Di"):
        open_page(browser, page, name)
        orders[name] = ask(browser, "questions.map(q => q.dataset.key)")
    assert orders["Cy"] != orders["Di"] and sorted(orders["Cy"]) == sorted(orders["Di"])
    assert [key for key in orders["Cy"] if "again" in key] == orders["Cy"][-2:]
    assert ask(browser, "document.documentElement.scrollWidth <= innerWidth")
