"""What people answered: any number of files, read and checked."""

from contextlib import suppress
from pathlib import Path

from plumbing.files import TEXT, Kind, Stop, between, check, maybe, read_csv, read_jsonl, stop, write_jsonl

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
        with suppress(ValueError, TypeError):  # in a csv it is text
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


def counted(answers, excluded):
    """The answers that count: no repeats, which measure a rater's consistency only, and nobody's of --exclude-rater,
    which is said."""
    raters = sorted({answer["rater"] for answer in answers})
    for name in excluded:
        if name not in raters:
            stop(f"--exclude-rater {name}: nobody of that name has answered (there are {', '.join(raters)})")
        print(f"left out by --exclude-rater: {sum(a['rater'] == name for a in answers)} answers of {name}")
    left = [answer for answer in answers if "repeat" not in answer and answer["rater"] not in excluded]
    if answers and not left:
        stop("no answer is left: all are repeats, or of raters that are excluded")
    return left


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
