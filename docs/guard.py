"""Compares this code with the run of an older commit, stage by stage, each fed the OLD run's inputs.

    python docs/guard.py OLD_RUN NEW_RUN

OLD_RUN: a run folder that the older commit made on this machine, from 00 to 07. NEW_RUN: a folder to be made: OLD_RUN's
world, candidates and answers, and what this code makes of them. One tie that rounding turned would cascade: so pairs
are compared by (clip, winner, loser), scores by their largest difference, a policy by its distance in units of its
change from the base model, DDPO by its curve of rewards.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SCORES = ("ib", "clap", "desync_s", "is_nats", "pesq")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_stage(run, number, *flags):
    stage = next(Path(__file__).parents[1].glob(f"{number}_*.py"))
    command = [sys.executable, str(stage), "--run-dir", str(run), *map(str, flags)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def apart(old, new, fields):
    """The largest difference in these fields of two lists of rows."""
    largest = 0.0
    for a, b in zip(old, new, strict=True):
        for field in fields:
            if (a[field] is None) != (b[field] is None):
                return float("inf")
            largest = max(largest, abs((a[field] or 0) - (b[field] or 0)))
    return largest


def scores_of(run):
    rows = []
    for path in sorted((run / "03_scores").glob("*.jsonl")):
        rows += lines(path)
    return sorted(rows, key=lambda row: (row["clip"], row["k"]))


def pairs_of(path):
    return {(row["clip"], row["winner"], row["loser"]) for row in lines(path)}


def norm(tensors):
    return sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()


def compare_policies(old, new, folder):
    base = torch.load(old / "00_base.pt", weights_only=True)["net"]
    a = torch.load(old / folder / "policy.pt", weights_only=True)
    b = torch.load(new / folder / "policy.pt", weights_only=True)
    change = norm(a[name] - base[name] for name in base)
    distance = norm(a[name] - b[name] for name in base)
    print(f"{folder}: policies apart by {distance / change:.2e} of the change from base")


def main(old, new):
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("0[2-9]_*", "scores", ".*"))

    run_stage(new, "02", "--ratings", old / "02_ratings.jsonl")
    difference = apart(lines(old / "02_scores.jsonl"), lines(new / "02_scores.jsonl"), SCORES)
    print(f"02: scores of the rated audios apart by {difference:.2e} at most")

    run_stage(new, "03", "--choices", old / "03_human_choices.jsonl")
    difference = apart(scores_of(old), scores_of(new), SCORES)
    print(f"03: scores apart by {difference:.2e} at most")
    for name in ("03_pairs.jsonl", "03_human_pairs.jsonl"):
        was, now = pairs_of(old / name), pairs_of(new / name)
        print(f"{name}: {len(was)} pairs, {len(now)} now, {len(was ^ now)} in one of the two alone")

    run_stage(new, "04")
    for name in ("04_stage1.jsonl", "04_stage2.jsonl"):
        was, now = pairs_of(old / name), pairs_of(new / name)
        print(f"{name}: {len(was)} pairs, {len(was ^ now)} in one of the two alone")

    run_stage(new, "05")
    run_stage(new, "06")
    compare_policies(old, new, "05_flow_dpo")
    compare_policies(old, new, "06_ddpo")
    curves = [lines(run / "06_ddpo/log.jsonl") for run in (old, new)]
    print(f"06: curves of rewards apart by {apart(*curves, ['reward']):.2e} at most")

    run_stage(new, "07")
    tables = []
    for run in (old, new):
        table = lines(run / "07_results.jsonl")
        tables.append({(row["system"], row["metric"]): row["value"] for row in table})
    was, now = tables
    print(f"07: {len(was)} rows, {len(was.keys() ^ now.keys())} in one of the two alone")
    for key in was.keys() & now.keys():
        if was[key] != now[key]:
            print(f"07: {key}: {was[key]}, now {now[key]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
