"""What people answered: any number of files, read and checked, and how far the raters agree."""

from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median

import krippendorff
import numpy as np

from plumbing.files import (
    TEXT,
    Kind,
    Stop,
    between,
    check,
    digest_of,
    inside,
    maybe,
    read_csv,
    read_jsonl,
    stop,
    write_jsonl,
)

LEAST_ALPHA, PAIRS = 0.2, 20  # below the line is who agrees less with the others, over that many pairs of answers
LEAST_STEADY, REPEATS = 0.5, 5  # or who answers a smaller share of that many repeats alike
ASIDES = dict(repeat=Kind("0 or 1", lambda x: type(x) in (int, float) and x in (0, 1)), seconds=between(0, 1e6))
ASIDES = {name: maybe(kind) for name, kind in (ASIDES | dict(comment=TEXT)).items()}


def read_answers(paths, field, answer):
    """What people answered, a list of dicts, from .csv and .jsonl files; rows with nothing in `field` are left out.

    answer: (row, where) -> (what was asked, a tuple; the checked answer, a dict). The rater joins it, and of the
    optional columns what is there: repeat (1 where the same was asked once more), seconds, comment. Nobody answers
    twice, in one file or several. What is wrong is listed, ten rows at a time.
    """
    found, wrong, total, seen = [], [], 0, {}
    for path in paths:
        rows = enumerate(read_jsonl(path), 1) if Path(path).suffix == ".jsonl" else read_csv(path, (field,))
        for line, row in rows:
            where, total = f"{path}, line {line}", total + 1
            try:
                if field not in row:
                    stop(f"{where}: field '{field}' is missing")
                if row[field] in (None, ""):
                    continue
                asked, about = answer(row, where)
                rater, more = rater_of(row, where), asides(row, where)
                key = (asked, rater, "repeat" in more)
                if key in seen:
                    what = ", ".join(map(str, asked))
                    stop(f"{where}: {what} is answered twice by {rater} (first in {seen[key]}); keep one")
                seen[key] = where
                found.append(about | {"rater": rater} | more)
            except Stop as error:
                wrong.append(str(error))
    if wrong:
        stop(f"{len(wrong)} of {total} rows are wrong: {'; '.join(wrong[:10])}{' ...' * (len(wrong) > 10)}")
    if not found:
        stop(f"{named(paths)}: no {field} in there")
    return found


def rater_of(row, where):
    return check(row, {"rater": maybe(TEXT)}, where).get("rater") or "anonymous"


def asides(row, where):
    """Of the optional columns of an answer those that are there; repeat only where it is 1."""
    found = {name: row[name] for name in ASIDES if row.get(name) not in (None, "")}
    for name in found.keys() & {"repeat", "seconds"}:
        with suppress(ValueError):  # in a csv it is text
            found[name] = float(found[name]) if isinstance(found[name], str) else found[name]
    check(found, ASIDES, where)
    repeat = {"repeat": 1} if found.pop("repeat", 0) else {}
    return repeat | found


def meant(value, words, where, field):
    """The word of `words` that a person meant, whatever the capitals."""
    for word in words:
        if isinstance(value, str) and value.strip().lower() == word.lower():
            return word
    stop(f"{where}, field '{field}': {value!r} is not one of {', '.join(words)}")


def from_elsewhere(row, root, where):
    """{clip, k, audio, video, caption, label} of a row that names files below root: a clip is a video with its caption
    and label, k the audio's file."""
    if root is None:
        stop(f"{where}, field 'audio': give --ratings-root, the folder below which it lies")
    about = {}
    for field in ("audio", "video"):
        path = inside(root, row.get(field), f"{where}, field '{field}'")
        if not path.is_file():
            stop(f"{where}, field '{field}': {path}: no such file")
        about[field] = str(path.relative_to(root))
    about |= {field: row[field] for field in ("caption", "label") if row.get(field)}
    check(about, dict.fromkeys(("caption", "label"), maybe(TEXT)), where)
    clip = f"elsewhere_{digest_of(*map(about.get, ('video', 'caption', 'label')))}"
    if row.get("clip") not in (None, "", clip):
        stop(f"{where}: names both a clip and an audio from elsewhere; keep one")
    return {"clip": clip, "k": about["audio"], **about}


def without_raters(answers, excluded):
    """The answers less those of --exclude-rater, which are counted."""
    raters = sorted({answer["rater"] for answer in answers})
    for name in excluded:
        if name not in raters:
            stop(f"--exclude-rater {name}: nobody of that name has answered (there are {', '.join(raters)})")
        print(f"left out by --exclude-rater: {sum(a['rater'] == name for a in answers)} answers of {name}")
    return [answer for answer in answers if answer["rater"] not in excluded]


def alpha(rows, level):
    """Krippendorff's alpha of (raters, items), nan where one has not answered; nan without two different answers."""
    rows = np.array(rows, dtype=float)
    several = rows[:, np.isfinite(rows).sum(axis=0) > 1]
    known = np.unique(several[np.isfinite(several)])
    return krippendorff.alpha(several, level_of_measurement=level) if len(known) > 1 else np.nan


def report_raters(answers, asked, meant, level):
    """Prints how far the raters agree with one another, and each with an earlier self; names those below the line.

    answers: as read; asked(answer): what the question was; meant(answer): the answer as a number; level: ordinal or
    nominal. A rater against the others: alpha over the pairs of the rater's and another's answer to one question.
    """
    said, seconds, same = (defaultdict(kind) for kind in (dict, list, list))
    for answer in sorted(answers, key=lambda answer: "repeat" in answer):
        mine, question = said[answer["rater"]], asked(answer)
        seconds[answer["rater"]] += [answer["seconds"]] if "seconds" in answer else []
        if "repeat" not in answer:
            mine[question] = meant(answer)
        elif question in mine:
            same[answer["rater"]].append(mine[question] == meant(answer))
    count = Counter(question for mine in said.values() for question in mine)
    table = [[mine.get(question, np.nan) for question in sorted(count)] for mine in said.values()]
    several = sum(n > 1 for n in count.values())
    print(f"raters: {len(said)}; {several} of {len(count)} questions answered by several", end="")
    print(f", Krippendorff's alpha {alpha(table, level):.3f} ({level})" if several else "")
    for name, mine in sorted(said.items()):
        others = [other for other in said.values() if other is not mine]
        pairs = np.array([(mine[x], other[x]) for other in others for x in mine.keys() & other.keys()]).reshape(-1, 2)
        agreed, steady = alpha(pairs.T, level), same[name]
        text = f"  {name}: {len(mine)} answers"
        text += f", alpha {agreed:.3f} with the others ({len(pairs)} pairs)" if len(pairs) else ""
        text += f", {sum(steady)} of {len(steady)} repeats alike" if steady else ""
        text += f", median {median(seconds[name]):.1f} s" if seconds[name] else ""
        print(text)
        unsteady = len(steady) >= REPEATS and sum(steady) < LEAST_STEADY * len(steady)
        if (len(pairs) >= PAIRS and agreed < LEAST_ALPHA) or unsteady:
            line = f"alpha {LEAST_ALPHA}, {LEAST_STEADY:.0%} of the repeats alike"
            print(f"    below the line ({line}): these answers count, unless --exclude-rater {name!r} leaves them out")


def named(paths):
    return ", ".join(map(str, paths)) if len(paths) <= 3 else f"{len(paths)} files"


def keep_answers(file, answers, paths, redo):
    """The answers as the run's own; other ones that it has are replaced by --redo alone, and both counts are said."""
    old, source = read_jsonl(file) if file.exists() else answers, named(paths)
    if old != answers:
        if not redo:
            stop(f"{file}: holds {len(old)} other answers than the {len(answers)} of {source}; --redo replaces them")
        print(f"{file}: {len(old)} answers are replaced by the {len(answers)} of {source}")
    write_jsonl(file, answers)
