"""README and docs say what the code says: commands and flags, weights, packages, stages, links, the
top level."""

import argparse
import ast
import fnmatch
import functools
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import stage, stopped
from torch.distributed.run import get_args_parser as torchrun_parser

import common
from common import rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {file: file.read_text(encoding="utf-8") for file in FILES}
RESULTS = PAGES[ROOT / "docs" / "results.md"]
SCRIPTS = {file.name: file for file in sorted(ROOT.glob("0?_*.py"))}
SCRIPTS["docs/evidence.py"] = ROOT / "docs/evidence.py"
# of pip, uv, hf and pytest, where a sentence names them
OTHERS = {"--no-deps", "--no-project", "--local-dir", "--score-noise"}


# Commands


@functools.cache
def parser_of(script):
    """The parser that a script's parse_args builds, caught when it is about to parse."""

    class Built(Exception):
        pass

    def caught(parser, *_, **__):
        raise Built(parser)

    module = importlib.import_module(SCRIPTS[script].stem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", caught)
        with pytest.raises(Built) as built:
            module.parse_args([])
    return built.value.args[0]


def flags_of(parser):
    """Every `--flag` of a parser and of its subcommands."""
    subparsers = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    inner = [p for action in subparsers for p in action.choices.values()]
    own = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    return own.union(*map(flags_of, inner))


def code_lines(text):
    """Lines of fenced blocks and indented code, continuation lines joined."""
    lines, fenced = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            if lines and lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1] + " " + line.strip()
            else:
                lines.append(line.strip())
    return lines


def commands_in(text):
    """[[word, ...], ...]: the commands of a text's code that start with python or torchrun and name
    a script of ours, without what stands behind them: `# ...`, what is in brackets after two
    spaces, `> FILE`."""
    found = []
    for line in code_lines(text.replace("$SLURM_ARRAY_TASK_ID", "1")):
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*|\s{2,}\(.*|\s> \S+", "", line)):
            if re.match(r"\s*(python|torchrun) .*\b(0\d_\w+|evidence)\.py\b", part):
                found.append([word for word in shlex.split(part) if word != "..."])
    return found


def complaint(words):
    """What is wrong with a command, or None: torchrun's own parser reads its part, the script's
    parser the rest."""
    try:
        if words[0] == "torchrun":
            assert "--" not in words, "torchrun takes the line without ` -- `"
            launch = torchrun_parser().parse_args(words[1:])
            script, given = launch.training_script, launch.training_script_args
        else:
            script, given = words[1], words[2:]
        assert script in SCRIPTS, f"no script {script}"
        flags = [word for word in given if word.startswith("--")]
        unknown = [flag for flag in flags if flag not in flags_of(parser_of(script))]
        assert not unknown, f"{script} has no {' '.join(unknown)}"
        parser_of(script).parse_args(given)
    except (SystemExit, AssertionError, common.Stop) as error:
        return str(error) or "refused"


def docstring_of(script):
    return ast.get_docstring(ast.parse(SCRIPTS[script].read_text(encoding="utf-8")), clean=False)


SOURCES = {str(page.relative_to(ROOT)): text for page, text in PAGES.items()}
SOURCES |= {script: docstring_of(script) for script in SCRIPTS}
COMMANDS = [(source, words) for source, text in SOURCES.items() for words in commands_in(text)]


EVERY_STAGE = '(for stage in 0?_*.py; do python "$stage" || exit 1; done)'


def test_the_two_commands_stand_verbatim_on_one_line_each():
    lines = [line.strip() for line in README.splitlines()]
    assert f"pip install -r requirements.txt && {EVERY_STAGE}" in lines
    assert "pip install -r requirements.txt && python -m pytest" in lines
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


IDS = [f"{source}: {' '.join(words)}"[:90] for source, words in COMMANDS]


@pytest.mark.parametrize("source, words", COMMANDS, ids=IDS)
def test_every_command_line_parses(source, words):
    assert complaint(words) is None


CARD = "torchrun --nproc_per_node 8 05_train_flow_dpo.py"  # as the design card types it


def torchruns(text):
    """Every torchrun command line of a text: of a page, a docstring, or what a stage prints."""
    whole = re.sub(r"\\\\?\n\s*", "", text)
    return [line.strip() for line in re.findall(r"torchrun --.*", whole)]


def meets_at_the_common_port(line):
    """Whether a second such command on the node would find torchrun's default port taken."""
    return "--standalone" not in line and "--rdzv_endpoint" not in line


TWO_NODES = "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500"


@pytest.mark.parametrize("line, taken", [
    (CARD, True), ("torchrun --nnodes 1 --nproc_per_node 8 05_train_flow_dpo.py", True),
    ("torchrun --standalone --nproc_per_node 8 05_train_flow_dpo.py", False),
    (f"{TWO_NODES} 05_train_flow_dpo.py", False),
])  # fmt: skip
def test_a_command_that_takes_the_common_port_is_found(line, taken):
    (found,) = torchruns(f"as in\n    {line}\n")
    assert meets_at_the_common_port(found) == taken


def test_torchrun_can_run_twice_on_a_node_by_every_command_but_the_design_cards():
    texts = [*PAGES.values(), *(file.read_text(encoding="utf-8") for file in SCRIPTS.values())]
    lines = [line for text in texts for line in torchruns(text)]
    assert len(lines) > 10
    bare = [line.split("  ")[0] for line in lines if meets_at_the_common_port(line)]
    assert bare == [CARD]
    assert torchruns(docstring_of("05_train_flow_dpo.py"))[0].startswith(CARD)


# whose saved answers a flag takes
SHEETS = {"--ratings": "rate", "--choices": "choose", "--answers": "blind"}


@pytest.mark.parametrize("flag", SHEETS)
def test_a_pattern_of_saved_answers_takes_those_of_one_kind_of_page_alone(flag):
    patterns = []
    for _, words in COMMANDS:
        if flag in words:
            given = words[words.index(flag) + 1 :]
            patterns += [word for word in given if "*" in word]
    # as pages of stage 08 name them
    saved = {what: f"packs/{what}_00001_ann.csv" for what in SHEETS.values()}
    assert patterns
    for pattern in patterns:
        assert fnmatch.filter(saved.values(), pattern) == [saved[SHEETS[flag]]], pattern


def test_the_readme_shows_a_command_of_every_stage():
    said = {word for source, words in COMMANDS for word in words if source == "README.md"}
    assert {script for script in SCRIPTS if "/" not in script} <= said | {"00_toy_world.py"}


WRONG = ("05_train_flow_dpo.py --no-such-flag", "05_train_flow_dpo.py --steps many")


@pytest.mark.parametrize("line", (*WRONG, "01_generate.py --gui 1", "09_none.py"))
def test_a_wrong_command_line_is_found(line):
    for launcher in ("python", "torchrun --nproc_per_node 8"):
        (words,) = commands_in(f"    {launcher} \\\n        {line}  # as typed")
        assert complaint(words)


def test_every_flag_in_a_sentence_is_some_scripts_or_torchruns():
    known = OTHERS.union(*map(flags_of, map(parser_of, SCRIPTS)), flags_of(torchrun_parser()))
    for page, text in PAGES.items():
        spans = " ".join(re.findall(r"`[^`\n]+`", text))
        said = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", spans))
        assert said <= known, f"{page.name}: {said - known}"


# The whole by one script

SCRIPT = ROOT / "docs" / "run_vggsound.sh"
# Stands for git, pip, python and torchrun: notes the command, and leaves what the script looks for.
NOTE = """#!/bin/bash
case "$*" in
    *device_count*) echo "${CARDS:-8}"; exit ;;
    -c*) exit "${PACKAGES_ARE_MISSING:-0}" ;;
esac
echo "${0##*/} $*" >> commands
case "$*" in
    clone*) mkdir -p "${@: -1}" ;;
    "-m venv .venv") mkdir -p .venv/bin && touch .venv/bin/activate ;;
    *--ratings*) touch runs/vgg/02_audioscore.pt ;;
    *03_*) printf "clip\\n${QUESTIONS-train0\\n}" > runs/vgg/03_to_choose.csv ;;&
    *--choices*) touch runs/vgg/03_human_choices.jsonl ;;
    *05_*) mkdir -p runs/vgg/05_flow_dpo && touch runs/vgg/05_flow_dpo/settings.json ;;
esac
[[ "$*" != *"$FAILS"* ]] || exit 2
"""


@pytest.fixture
def script(tmp_path):
    """docs/run_vggsound.sh in a folder of its own, called with variables of the environment; no
    stage is run. Returns its exit code, its last line, and the commands that it gave."""
    (tmp_path / "bin").mkdir()
    for name in ("git", "pip", "python", "python3", "torchrun"):
        (tmp_path / "bin" / name).write_text(NOTE)
        (tmp_path / "bin" / name).chmod(0o755)
    for folder in ("docs", "packs", "runs/vgg"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "docs")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"

    def run_script(**variables):
        (tmp_path / "commands").write_text("")
        environment = {"PATH": path, "FAILS": "nothing", **variables}
        options = dict(capture_output=True, text=True, env=environment, cwd=tmp_path)
        done = subprocess.run(["bash", f"docs/{SCRIPT.name}"], **options)
        commands = (tmp_path / "commands").read_text().splitlines()
        printed = (done.stdout + done.stderr).splitlines()
        return done.returncode, ["", *printed][-1], commands

    run_script.folder = tmp_path
    return run_script


def stages_of(commands):
    """The numbers of the stages; what 08 makes; `again` where outputs are replaced."""
    said = []
    for command in commands:
        found = re.search(r"\b(0\d)_\w+\.py(?: (rate|choose)\b)?", command)
        if found:
            said.append(" ".join(filter(None, [*found.groups(), "--redo" in command and "again"])))
    return said


PREPARED = ["01", "01"]  # first --dry-run
TRAINED = ["05", "06", "07", "08"]
WITH_RATINGS = ["02 again", "03 again"]


def test_the_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).stderr == b""


def test_the_script_stops_for_ratings_and_for_choices_and_goes_on_with_them(script):
    code, line, commands = script()
    assert code == 0 and stages_of(commands) == [*PREPARED, "02", "08 rate"]
    assert "runs/vgg/08_rate answered, put what they save into packs/" in line
    for name in ("rate_00001_ann.csv", "rate_00002_b b.csv"):
        (script.folder / "packs" / name).touch()
    code, line, commands = script()
    assert code == 0 and stages_of(commands) == [*PREPARED, *WITH_RATINGS, "08 choose"]
    assert "--ratings packs/rate_00001_ann.csv packs/rate_00002_b b.csv --redo" in commands[2]
    assert "runs/vgg/08_choose answered, put what they save into packs/" in line
    (script.folder / "packs/choose_00001_ann.csv").touch()
    code, _, commands = script()
    assert code == 0
    assert stages_of(commands) == [*PREPARED, *WITH_RATINGS, "04 again", *TRAINED]
    assert "--choices packs/choose_00001_ann.csv --redo" in commands[3]
    code, _, commands = script()  # no answer that came later can void a training
    assert code == 0 and stages_of(commands) == [*PREPARED, *TRAINED]


def test_without_choices_the_script_trains_where_it_is_told_to(script):
    (script.folder / "packs/rate_00001_ann.csv").touch()
    code, _, commands = script(CHOOSE="no")
    assert code == 0
    assert stages_of(commands) == [*PREPARED, *WITH_RATINGS, "04 again", *TRAINED]
    assert "--choices" not in " ".join(commands)


def test_the_script_goes_on_where_nobody_is_asked_to_choose(script):
    (script.folder / "packs/rate_00001_ann.csv").touch()
    code, _, commands = script(QUESTIONS="")
    assert code == 0 and stages_of(commands)[-4:] == TRAINED


@pytest.mark.parametrize("variables", [{"GPUS": "3"}, {"CARDS": "6"}, {"CARDS": "0"}])
def test_the_script_refuses_gpus_that_do_not_divide_a_step_before_it_computes(script, variables):
    code, line, commands = script(**variables)
    (count,) = variables.values()
    more = "; PyTorch sees no GPU" if count == "0" else ""
    assert code == 2 and line == f"GPUS={count}: give 1, 2, 4 or 8{more}"
    assert stages_of(commands) == []


def test_the_script_finds_its_folder_whatever_cdpath_says(script, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "docs").mkdir()
    code, _, commands = script(CDPATH=str(elsewhere))
    assert code == 0 and stages_of(commands) == [*PREPARED, "02", "08 rate"]


@pytest.mark.parametrize("failing, count", [("--dry-run", 1), ("02_fit", 3), ("06_ddpo", 7)])
def test_the_script_ends_where_a_stage_fails(script, failing, count):
    (script.folder / "packs/rate_00001_ann.csv").touch()
    code, _, commands = script(CHOOSE="no", FAILS=failing)
    assert code == 2 and len(stages_of(commands)) == count and failing in commands[-1]


def test_every_command_of_the_script_parses_with_further_flags(script):
    for kind in ("rate", "choose"):
        (script.folder / f"packs/{kind}_00001_ann.csv").touch()
    more = {"FLAGS_01": "--max-clips 5000 --no-compile", "FLAGS_02": "--num-rated-clips 200"}
    more |= {"FLAGS_03": "--num-human-pairs 200", "FLAGS_04": "--threshold 0.6"}
    more |= {"FLAGS_05": "--steps 1200 --lora 16", "FLAGS_06": "--prompts 4"}
    more["FLAGS_07"] = "--judge audiobox"
    _, _, commands = script(GPUS="4", **more)
    stages = [command.split() for command in commands if ".py" in command]
    assert stages and [complaint(words) for words in stages] == [None] * len(stages)
    for number, flags in more.items():
        assert any(f" {number[-2:]}_" in command and flags in command for command in commands)
    assert {words[3] for words in stages if words[0] == "torchrun"} == {"4"}


def test_the_script_clones_and_installs_once_what_the_readme_names(script):
    _, _, commands = script(PACKAGES_ARE_MISSING="1")
    clones = [command.split()[-2] for command in commands if command.startswith("git clone")]
    assert len(clones) == 3 and all(f"git clone {address}" in README for address in clones)
    installed = [command.split() for command in commands if command.startswith("pip install")]
    named = re.search(r"^    pip install -c .*", README, flags=re.M)[0].replace("./", "").split()
    assert installed[0] == ["pip", "install", "-r", "requirements.txt"]
    assert [word.rpartition("/")[2] for word in installed[1]] == named
    assert commands.index("python3 -m venv .venv") < commands.index(" ".join(installed[0]))
    _, _, commands = script()
    assert not [command for command in commands if command.startswith(("git", "pip", "python3"))]


# Tables


def rows_of(page):
    """{first cell without backticks: [other cells]} of a page that has one table."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert sum(set(line) <= set("|-: ") for line in lines) == 1, f"{page}: one table"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == len(cells[0]) and all(row) for row in cells), f"{page}: a cell is empty"
    rows = {row[0].strip("`"): row[1:] for row in cells}
    assert len(rows) == len(cells), f"{page}: a file has two rows"
    return rows


def files_read(source):
    """Names of weight files in a source, `*` where an f-string inserts something."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
        is_name = re.fullmatch(r"[\w*][\w./=*+-]*\.(pth|pt|ckpt|yml|json|txt)", text)
        if is_name and not text.startswith("open_clip_"):
            found |= {text, f"*/{text}"}  # a folder may be put before it elsewhere
    return found


def test_every_weight_file_has_its_row_and_every_row_its_reader():
    rows, read = rows_of("docs/weights.md"), set()
    for file in (ROOT / "adapters").glob("*.py"):
        if file.name != "toy_people.py":  # what it reads in the run folder are no weights
            read |= files_read(file.read_text(encoding="utf-8"))
    read -= {"run.json", "*/run.json"}  # lies beside the toy model's weights, and is none
    assert read
    for name in (name for name in read if not name.startswith("*/")):
        assert fnmatch.filter(rows, name) or fnmatch.filter(rows, f"*/{name}"), f"no row for {name}"
    unread = [row for row in rows if not any(fnmatch.fnmatch(row, name) for name in read)]
    assert unread == ["00_base.pt"]  # given by --checkpoint, whatever its name
    assert all(re.search(r"\b0[1-7]\b", row[-1]) for row in rows.values())


def test_a_missing_weight_file_is_said_by_its_row(tmp_path):
    for name, (source, size, use, _) in rows_of("docs/weights.md").items():
        said = stopped(common.weight_file, tmp_path, name)
        assert name in said and source.strip("<>") in said and size in said and use in said


def test_every_required_package_is_explained():
    choices = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package, pinned = re.split(r"[=><]", line)[0], re.search(r"==(.+)", line)
            row = re.search(rf"^\|[^|]*\b{re.escape(package)}\b[^|]*\|", choices, flags=re.M)
            assert row and (pinned is None or f"{package} {pinned[1]}" in row[0]), line


def test_the_toy_worlds_numbers_are_those_of_its_page():
    """{(stage, flag): (default, of the size default, of large)}, of what 00 replaces and the page
    says."""
    replaced, said = {}, {}
    sizes = [stage("00").DEFAULTS[size] for size in ("default", "large")]
    for number in sizes[0]:
        (script,) = [name for name in SCRIPTS if name.startswith(number)]
        for name, here in sizes[0][number].items():
            usual = parser_of(script).get_default(name)
            if here != usual or sizes[1][number][name] != usual:
                flag = "--" + name.replace("_", "-")
                replaced[number, flag] = (usual, here, sizes[1][number][name])
    page = PAGES[ROOT / "docs" / "toy.md"]
    (section,) = re.findall(r"^## Replaced numbers\n(.*?)^## ", page, flags=re.M | re.S)
    change = r"`(--[\w-]+)` ([\d.,e-]+) -> ([\d.e-]+)(?: \(large: ([\d.e-]+)\))?"
    for numbers, cell in re.findall(r"^\| (0[\d, ]+) \| ([^|]+) \|", section, flags=re.M):
        for flag, usual, here, large in re.findall(change, cell):
            values = (usual.replace(",", ""), here, large or here)
            for number in numbers.split(", "):
                said[number, flag] = tuple(map(float, values))
    assert said == replaced


# The glossary


def fields_of(*row_types):
    return {name for row_type in row_types for name in row_type.__struct_fields__}


STEP = fields_of(rows.Step)
GLOSSARY = {  # a heading of docs/results.md, and the names that its table explains
    "The scores of an audio": fields_of(rows.Score, rows.RatedScore),
    "A pair": fields_of(rows.Pair, rows.SplitPair),
    "Both logs": STEP,
    "log.jsonl of 05": fields_of(rows.FlowDpoStep) - STEP,
    "log.jsonl of 06": fields_of(rows.DdpoStep) - STEP,
    "A row of 07_results.jsonl": fields_of(rows.Result),
    "Metrics": set(stage("07").METRICS),
    "A row of 08_blind.jsonl": fields_of(rows.BlindResult),
}


def first_cells(text, head):
    """Those of the tables whose first column is called so. A bar that stands in a cell has a
    backslash before it."""
    found = []
    for block in re.split(r"\n{2,}", text.strip()):
        if block.startswith(f"| {head} |"):
            found += [re.split(r"(?<!\\)\|", line)[1] for line in block.splitlines()[2:]]
    return found


@pytest.mark.parametrize("heading", GLOSSARY)
def test_the_glossary_explains_every_number_and_no_other(heading):
    (section,) = re.findall(rf"^### {heading}\n(.*?)(?=^#|\Z)", RESULTS, flags=re.M | re.S)
    cells = first_cells(section, "field") + first_cells(section, "metric")
    named = re.findall(r"`(\w+)`", " ".join(cells))
    assert sorted(named) == sorted(GLOSSARY[heading])


def test_the_glossary_explains_a_policys_fields():
    assert [name for name in fields_of(rows.Policy) if f"`{name}`" not in RESULTS] == []


CODE = [*ROOT.glob("0?_*.py"), ROOT / "common.py", *ROOT.glob("plumbing/*.py")]
CODE += ROOT.glob("adapters/*.py")
TREES = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in CODE}


def as_words(text):
    return " ".join(text.split())


def texts_in(node):
    """All texts below a node, an f-string's in pieces."""
    texts = [below.value for below in ast.walk(node) if isinstance(below, ast.Constant)]
    return [as_words(text) for text in texts if isinstance(text, str)]


def pieces_of(said):
    """The texts of a literal, an f-string's between its values; [] of what a variable holds."""
    parts = said.values if isinstance(said, ast.JoinedStr) else [said]
    return [as_words(part.value) for part in parts if isinstance(part, ast.Constant)]


def printed_lines():
    """[(file, the longest piece of what a print says)], commands left out: `next: ...`."""
    found = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write"):
                pieces = [piece for said in node.args for piece in pieces_of(said)]
                is_command = any(re.search("python|torchrun", piece) for piece in pieces)
                longest = max(pieces, key=len, default="")
                if len(longest) > 3 and not is_command:
                    found.append((name, longest))
    return found


def test_the_glossary_has_every_line_that_is_printed():
    lines = printed_lines()
    assert len(lines) > 60
    page = as_words(RESULTS)
    assert [line for line in lines if line[1] not in page] == []


@pytest.mark.parametrize("page, head", [
    ("results.md", "line"), ("troubleshooting.md", "what you see"),
])  # fmt: skip
def test_a_line_that_is_explained_is_one_that_the_code_says(page, head):
    """Between its `<...>`, commas, colons and brackets every quoted line is text of the code."""
    text = "\0".join(piece for tree in TREES.values() for piece in texts_in(tree))
    unknown = []
    quoted = re.findall(r"`([^`]+)`", " ".join(first_cells(PAGES[ROOT / "docs" / page], head)))
    for line in quoted:
        for piece in re.split(r"<[^>]+>|[,;:()]", as_words(line)):
            piece = piece.strip(" []'")
            if len(piece) > 2 and piece not in text:
                unknown.append((line, piece))
    assert len(quoted) > 25 and unknown == []


def test_the_stages_in_the_table_are_the_files():
    files = {path.name for path in ROOT.glob("0?_*.py")} | {"common.py", "adapters/", "plumbing/"}
    assert files == set(re.findall(r"^\| `([\w]+(?:\.py|/))` \|", README, flags=re.M))


# Pages


def test_the_readme_is_read_in_five_minutes_and_lists_every_page():
    text = re.sub(r"```mermaid.*?```", "", README, flags=re.S)
    assert len(text.splitlines()) <= 150
    for page in PAGES:
        assert page.name == "README.md" or f"(docs/{page.name})" in README


def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading():
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
            if target.startswith("http"):
                continue
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), f"{page.name}: {target}"
            text_there = file.read_text(encoding="utf-8") if anchor else ""
            headings = re.findall(r"^#+ (.+)$", text_there, flags=re.M)
            plain = [re.sub(r"[^\w -]", "", heading).lower() for heading in headings]
            slugs = [heading.replace(" ", "-") for heading in plain]
            assert not anchor or anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_git_holds_nothing_beyond_the_design():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert "README.md" in listed
    top = {name.split("/")[0] for name in listed if name}
    design = """.ci .gitignore .python-version LICENSE README.md common.py pyproject.toml
        adapters docs plumbing requirements.txt tests"""
    assert top <= {*design.split(), *(path.name for path in ROOT.glob("0?_*.py"))}
