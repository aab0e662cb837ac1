"""What a user downloads: files of weights, and clones of upstream code."""

import os
import re
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

from plumbing import files
from plumbing.files import stop


@contextmanager
def upstream(repository, folder=""):
    """Used around an import of upstream code. It puts the clone $UPSTREAM_DIR/<repository>/<folder>
    first on sys.path; without that variable the installed package is imported."""
    root = os.environ.get("UPSTREAM_DIR")
    path = str(Path(root) / repository / folder) if root else None
    if path:
        sys.path.insert(0, path)
    try:
        yield
    except ModuleNotFoundError as error:
        stop(
            f"{repository}: cannot import {error.name}; install it (docs/mmaudio.md, "
            "docs/frieren.md), or set UPSTREAM_DIR to the folder of its clone"
        )
    finally:
        if path:
            sys.path.remove(path)


def weight_file(weights, name):
    """The path weights / name. Stops where no such file exists, in one line that says by its row of
    docs/weights.md what it is and where it comes from."""
    path = Path(weights) / name
    found = files.in_place_of(path) if path.exists() else "missing"
    if found:
        source, size, use = weight_row(name)
        is_so = found if found == "missing" else f"is {found} in place of the file"
        stop(
            f"{path}: {is_so} ({use}); get {name} ({size}) from {source} and put it into {weights}/"
        )
    return path


def weight_row(name):
    """The source, size and use of a file, from its row of docs/weights.md."""
    table = (files.ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for line in table.splitlines():
        if line.startswith(f"| `{name}` |"):
            return [cell.strip() for cell in line.strip("|").split("|")][1:4]
    return "", "", ""


def is_cut_short(path):
    """Whether a file is empty, or is a zip archive, as torch.save writes it, without its end, as an
    interrupted download leaves it. What it holds is not read."""
    with files.reading(path), open(path, "rb") as stream:
        start = stream.read(4)
    return not start or (start == b"PK\3\4" and not zipfile.is_zipfile(path))


def print_missing(weights, names):
    """Prints which of these files are not below --weights, or only a part of them, or something
    else in their place, with what docs/weights.md says of them, and how much there is to download.
    Returns their names."""
    in_gb = {"kB": 1e-6, "KB": 1e-6, "MB": 1e-3, "GB": 1, "MiB": 2**20 / 1e9, "GiB": 2**30 / 1e9}
    missing = []
    gb = 0.0
    for name in dict.fromkeys(names):
        path = Path(weights) / name
        note = ""
        if path.exists():
            other = files.in_place_of(path)
            if other:
                note = f", in whose place is {other}"
            elif is_cut_short(path):
                note = ", of which only a part is there"
            else:
                continue
        missing.append(name)
        source, size, use = weight_row(name)
        print(f"  {name} ({size}){note}, {use}: {source}")
        for count, unit in re.findall(r"([\d.]+) ([kKMG]i?B)", size):
            gb += float(count) * in_gb[unit]
    if missing:
        print(f"files missing below {weights}/: {len(missing)}, {gb:.1f} GB in all")
    return missing
