"""What people are asked and what they answer: sheets, files with answers, and the raters'
agreement."""

import csv
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median

import krippendorff
import numpy as np

from plumbing import files, ranks, rows
from plumbing.files import Stop, stop

# A rater is reported as below the line in two cases: the alpha between the rater's answers and the
# others' is below LEAST_ALPHA, over at least LEAST_PAIRS pairs of answers; or the rater answered a
# smaller share than LEAST_ALIKE of the repeated questions alike, of at least LEAST_REPEATS.
LEAST_ALPHA = 0.2
LEAST_PAIRS = 20
LEAST_ALIKE = 0.5
LEAST_REPEATS = 5

CANNOT_PLAY = "cannot play"  # the answer to what a rater's browser does not play


# --------------------------------------------------------------------------------------------------
# Sheets
# --------------------------------------------------------------------------------------------------


def write_sheet(path, columns, lines, answer):
    """Writes a csv for people to fill in; the cells of the column `answer` are empty. Answers are
    never overwritten: a sheet that holds any is left as it is, and a line says so."""
    path = Path(path)
    if path.exists():
        for _, line in files.read_csv(path, (answer,)):
            if line[answer]:
                print(f"{path}: holds answers and is left as it is")
                return
    # backslashreplace as in files.write_text
    options = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with files.replacing(path) as temporary, open(temporary, "w", **options) as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(lines)


def as_cell(text):
    """A caption as a cell on one line, which no spreadsheet takes for a formula."""
    text = " ".join((text or "").split())
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


# --------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------


def must_simulate(file, asked, redo):
    """Whether the simulated people of a run are to answer: where nobody has answered, or, with
    --redo, where only simulated people have, and to other questions than those asked now. file: the
    answers; asked: [(clip, k), ...], or [(clip, a, b), ...]."""
    if not asked:
        return False
    if not file.exists():
        return True
    answers = [line for _, line in files.read_jsonl(file)]
    by_people = any(line.get("rater") != "simulated" for line in answers)
    fields = ("clip", "k") if len(asked[0]) == 2 else ("clip", "a", "b")
    answered = {tuple(line.get(field) for field in fields) for line in answers}
    return redo and not by_people and answered != set(asked)


def take_answers(file, paths, field, checked, redo):
    """The answers in the files that --ratings or --choices name, which are then stored as the run's
    own, in `file`; without such files the answers that the run has, [] where nobody has answered.
    field, checked: as for read_answers."""
    ranks.barrier()  # the first rank may just have written simulated answers
    if not paths and not file.exists():
        return []
    answers = read_answers(paths or [file], field, checked)
    if paths and ranks.is_first():
        keep_answers(file, answers, paths, redo)
    return answers


def read_answers(paths, field, checked):
    """The answers in .csv and .jsonl files, a list of rows; lines with nothing in `field` are left
    out, as are those that say "cannot play", whose number is printed.

    checked(line, where) returns a line as a row (rows.Answer), or stops where its question is not
    one of this run's. A rater may answer a question only once in all files, and once more with
    `repeat`. Wrong lines are listed, ten at a time.
    """
    found = []
    wrong = []
    first = {}
    unplayed = Counter()
    total = 0
    for path in paths:
        for number, line in lines_of(path, field):
            where = f"{path}, line {number}"
            total += 1
            try:
                if field not in line:
                    stop(f"{where}: field '{field}' is missing")
                if line[field] in (None, ""):
                    continue
                if is_cannot_play(line[field]):
                    unplayed[str(line.get("rater") or "anonymous")] += 1
                    continue
                answer = checked(line, where)
                key = (question_of(answer), answer.rater, answer.repeat)
                if key in first:
                    asked = ", ".join(map(str, question_of(answer)))
                    stop(
                        f"{where}: {asked} is answered twice by {answer.rater} (first in "
                        f"{first[key]}); keep one"
                    )
                first[key] = where
                found.append(answer)
            except Stop as error:
                wrong.append(str(error))
    if wrong:
        more = " ..." if len(wrong) > 10 else ""
        stop(f"{len(wrong)} of {total} rows are wrong: {'; '.join(wrong[:10])}{more}")
    if not found:
        but = f" but {unplayed.total()} 'cannot play'" if unplayed else ""
        stop(f"{names_of(paths)}: no {field} in there{but}")
    for name, count in unplayed.items():
        print(f"set aside: {count} answers 'cannot play' of {name}")
    return found


def is_cannot_play(value):
    """Whether a person wrote "cannot play", in upper or lower case, with any spaces, - or _."""
    if not isinstance(value, str):
        return False
    return re.split(r"[\s_-]+", value.strip().lower()) == CANNOT_PLAY.split()


def lines_of(path, field):
    """The lines of a file with answers, [(line number, dict), ...]."""
    if Path(path).suffix != ".jsonl":
        return files.read_csv(path, (field,))
    return files.read_jsonl(path)


def question_of(answer):
    """The question of an answer: one audio, or two audios in any order."""
    if isinstance(answer, rows.RatingAnswer):
        return answer.clip, answer.k
    return answer.clip, *sorted((answer.a, answer.b))


def typed_answer(line, row_type, where):
    """A line as an answer. Numbers may be texts, as in a csv, with a decimal comma where a
    spreadsheet wrote one, and empty fields count as absent."""
    line = {name: value for name, value in line.items() if value not in (None, "")}
    for name in ("repeat", "seconds"):
        if isinstance(line.get(name), str):
            with suppress(ValueError):
                line[name] = float(line[name].replace(",", "."))
    if line.get("repeat") in (0.0, 1.0) and not isinstance(line["repeat"], bool):
        line["repeat"] = int(line["repeat"])
    answer = rows.typed(line, row_type, where)
    answer.rater = answer.rater or "anonymous"
    return answer


def meant(value, words, where, field):
    """The word of `words` that a person wrote, in upper or lower case."""
    for word in words:
        if isinstance(value, str) and value.strip().lower() == word.lower():
            return word
    stop(f"{where}, field '{field}': {value!r:.60} is not one of {', '.join(words)}, {CANNOT_PLAY}")


def known_k(line, samples, where, field):
    """The k in this field of an answer, as an integer, after checking that stage 01 has this audio
    of the clip. For a given audio the answer may hold the name of its source instead."""
    for needed in ("clip", field):
        if line.get(needed) is None:
            stop(f"{where}: field '{needed}' is missing")
    clip = line["clip"]
    k = line[field]
    if not isinstance(clip, str) or clip not in samples:
        stop(f"{where}, field 'clip': {repr(clip)[:80]} is no clip with generated audio")
    for audio in samples[clip]:
        if str(k).strip() == str(audio.k) or (k == audio.source and k != "model"):
            return audio.k
    known = ", ".join(str(audio.k) for audio in samples[clip])
    stop(f"{where}, field '{field}': {repr(k)[:80]} is no audio of {clip} (there are {known})")


def without_raters(answers, excluded):
    """The answers without those of raters whom --exclude-rater names; prints how many these are."""
    raters = sorted({answer.rater for answer in answers})
    for name in excluded:
        if name not in raters:
            stop(
                f"--exclude-rater {name}: nobody of that name has answered, or only 'cannot play' "
                f"(there are {', '.join(raters)})"
            )
        count = sum(answer.rater == name for answer in answers)
        print(f"left out by --exclude-rater: {count} answers of {name}")
    return [answer for answer in answers if answer.rater not in excluded]


def keep_answers(file, answers, paths, redo):
    """Stores the answers as the run's own. Where the run has other answers, they are replaced only
    with --redo, and both counts are printed."""
    source = names_of(paths)
    if file.exists():
        old = rows.read(file, type(answers[0]))
        if old != answers and not redo:
            stop(
                f"{file}: holds {len(old)} other answers than the {len(answers)} of {source}; "
                "--redo replaces them"
            )
        if old != answers:
            print(f"{file}: {len(old)} answers are replaced by the {len(answers)} of {source}")
    rows.write(file, answers)


def names_of(paths):
    """The names of some files, or, where they are more than three, their number."""
    return ", ".join(map(str, paths)) if len(paths) <= 3 else f"{len(paths)} files"


# --------------------------------------------------------------------------------------------------
# Agreement
# --------------------------------------------------------------------------------------------------


def alpha(table, level):
    """Krippendorff's alpha of a table (raters, questions), which holds nan where a rater has not
    answered. It is nan where all answers are the same."""
    table = np.array(table, dtype=float)
    several = table[:, np.isfinite(table).sum(axis=0) > 1]
    known = np.unique(several[np.isfinite(several)])
    return krippendorff.alpha(several, level_of_measurement=level) if len(known) > 1 else np.nan


def print_agreement(answers, as_number, level):
    """Prints how far the raters agree with one another, how far each answers repeated questions
    alike, and who is below the line. as_number(answer): the answer as a number; level: ordinal or
    nominal."""
    first = defaultdict(dict)  # {rater: {question: number}}
    again = defaultdict(dict)  # the same for questions that were repeated
    seconds = defaultdict(list)
    for answer in answers:
        said = again if answer.repeat else first
        said[answer.rater][question_of(answer)] = as_number(answer)
        if answer.seconds is not None:
            seconds[answer.rater].append(answer.seconds)
    raters = sorted(first.keys() | again.keys())
    questions = sorted({question for said in first.values() for question in said})
    table = []
    for rater in raters:
        table.append([first[rater].get(question, np.nan) for question in questions])
    several = int((np.isfinite(table).sum(axis=0) > 1).sum())
    line = f"raters: {len(raters)}; {several} of {len(questions)} questions answered by several"
    if several:
        line += f", Krippendorff's alpha {alpha(table, level):.3f} ({level})"
    print(line)
    for rater in raters:
        others = [first[other] for other in raters if other != rater]
        print_rater(rater, first[rater], again[rater], others, seconds[rater], level)


def print_rater(name, first, again, others, seconds, level):
    """Prints one rater's agreement: alpha over all pairs of this rater's answer and another rater's
    answer to the same question."""
    pairs = []
    for other in others:
        pairs += [(first[question], other[question]) for question in first.keys() & other.keys()]
    alike = [first[question] == again[question] for question in first.keys() & again.keys()]
    line = f"  {name}: {len(first)} answers"
    is_below = len(alike) >= LEAST_REPEATS and sum(alike) < LEAST_ALIKE * len(alike)
    if pairs:
        agreed = alpha(np.transpose(pairs), level)
        is_below = is_below or (len(pairs) >= LEAST_PAIRS and agreed < LEAST_ALPHA)
        line += f", alpha {agreed:.3f} with the others ({len(pairs)} pairs)"
    if alike:
        line += f", {sum(alike)} of {len(alike)} repeats alike"
    if seconds:
        line += f", median {median(seconds):.1f} s"
    print(line)
    if is_below:
        limits = f"alpha {LEAST_ALPHA}, {LEAST_ALIKE:.0%} of the repeats alike"
        print(
            f"    below the line ({limits}): these answers count, unless --exclude-rater {name!r} "
            "leaves them out"
        )
