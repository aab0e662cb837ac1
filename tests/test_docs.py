"""The README says what the code says: commands, weights table, the paper's numbers, the top level."""

import re
import subprocess
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_verbatim_on_one_line_each():
    lines = [line.strip() for line in README.splitlines()]
    assert 'pip install -r requirements.txt && (for stage in 0?_*.py; do python "$stage" || exit 1; done)' in lines
    assert "pip install -r requirements.txt && python -m pytest" in lines
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_weight_file_has_its_row_with_size_and_use():
    for name, (source, size, use) in common.WEIGHTS.items():
        row = next((line for line in README.splitlines() if line.startswith(f"| `{name}` |")), None)
        assert row is not None, name
        assert source in row and f"| {size} | {use} |" in row


def test_every_required_package_is_explained():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package = re.split(r"[=><]", line)[0]
            assert re.search(rf"^\|[^|]*\b{re.escape(package)}\b", README, flags=re.M), package


def test_every_torchrun_line_separates_the_script_from_torchruns_own_options():
    commands = [line for line in README.splitlines() if line.strip().startswith("torchrun")]
    assert commands
    assert all(" -- 0" in line for line in commands)


def test_the_stages_in_the_table_are_the_files():
    files = {path.name for path in ROOT.glob("0?_*.py")} | {"common.py"}
    assert files == set(re.findall(r"^\| `([\w]+\.py)` \|", README, flags=re.M))


def test_git_holds_nothing_beyond_the_design():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert "README.md" in listed
    top = {name.split("/")[0] for name in listed if name}
    extra = {".ci", ".gitignore", "LICENSE", "README.md", "common.py", "pyproject.toml", "requirements.txt", "tests"}
    assert top <= extra | {path.name for path in ROOT.glob("0?_*.py")}
