"""docs/evidence.py: its intervals, verdicts and tables, on numbers worked out by hand."""

import json

import evidence
import numpy as np
import pytest
from conftest import write


def test_the_interval_is_students_t_over_the_base_means():
    # base means 1, 2, 3: mean 2, standard error 1 / sqrt(3); t(0.975, 2) = 4.302653: half width 2.484138
    mean, half = evidence.over_bases([[0.5, 1.5], [2, 2], [0, 6]])
    assert (mean, half) == pytest.approx((2, 2.484138), abs=1e-5)
    assert evidence.over_bases([[3, 3], [3, 3]]) == (3, 0)


def test_the_interval_over_bases_covers_the_truth_95_times_in_100_though_seeds_share_their_base():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        mean, half = evidence.over_bases(0.7 + rng.standard_normal((3, 1)) + 0.5 * rng.standard_normal((3, 3)))
        covered += mean - half < 0.7 < mean + half
    assert 0.93 < covered / 2000 < 0.97


def test_a_claim_holds_only_when_its_whole_interval_lies_on_the_better_side():
    assert evidence.verdict(0.2, 0.1, better=1) == "holds"
    assert evidence.verdict(0.2, 0.1, better=-1) == "does not hold"
    assert evidence.verdict(0.2, 0.3, better=1) == evidence.verdict(-0.2, 0.3, better=1) == "not decidable here"
    assert evidence.verdict(-5, 1, better=-1) == "holds"


@pytest.fixture
def cells(tmp_path):
    """2 bases x 2 seeds. Of base and seed (b, s) every metric of `base` is 10 b + s, of the policies a little more."""
    found = [[tmp_path / f"base{b}_seed{s}" for s in range(2)] for b in range(2)]
    more = {"base": (0, 0), "ground_truth": (9, 9), "flow_dpo": (1, 1.2), "ddpo": (-1, 1)}
    more |= {name: (2, 2) for name in evidence.TABLE_1 if name not in more}
    for b, row in enumerate(found):
        for s, cell in enumerate(row):
            cell.mkdir()
            lines = [{"system": name, "metric": metric, "value": 10.0 * b + s + by[b]}
                     for name, by in more.items() for metric in evidence.METRICS]  # fmt: skip
            write(cell / "results_table1.jsonl", lines)
    return found


def test_differences_are_taken_within_base_and_seed(cells):
    results = evidence.Results(cells, "results_table1.jsonl")
    # 1 on base 0 and 1.2 on base 1: mean 1.1, standard error 0.1, t(0.975, 1) = 12.7062
    assert results.gap("flow_dpo", "base", "is") == pytest.approx((1.1, 1.27062, 4), abs=1e-4)
    assert results.gap("no_human", "base", "is") == pytest.approx((2, 0, 4))
    assert results.gap("ddpo", "base", "is")[:2] == pytest.approx((0, 12.7062), abs=1e-3)


def test_tables_show_differences_as_wide_as_they_are_and_bold_only_where_better(cells):
    results = evidence.Results(cells, "results_table1.jsonl")
    text = evidence.difference_table(results, ["flow_dpo", "no_human"], by_metric=True)
    assert "| IS ↑ | 5.50 ± 63.53 | +1.10 ± 1.27 | **+2.00 ± 0.00** |" in text
    assert "| FD ↓ | 6 ± 64 | +1 ± 1 | +2 ± 0 |" in text  # higher is worse: not bold
    claims = evidence.claim_table(results, [("human pairs", "no_human", "base", ("is", "fd"))])
    assert claims.splitlines()[0] == "| claim | holds | does not hold | not decidable here |"
    assert "| human pairs | IS +2.00 ± 0.00 (4/4) | FD +2 ± 0 (4/4) | - |" in claims
    claims = evidence.claim_table(results, [("DDPO", "ddpo", "base", ("is",))])
    assert "| DDPO | - | - | IS +0.00 ± 12.71 (" in claims


def test_a_metric_that_some_cell_lacks_is_left_out(cells):
    file = cells[1][0] / "results_table1.jsonl"
    write(file, [{**row, "value": None if row["metric"] == "is" else row["value"]} for row in evidence.lines(file)])
    results = evidence.Results(cells, "results_table1.jsonl")
    assert "is" not in results.metrics() and "fd" in results.metrics()
    text = evidence.claim_table(results, [("people", "no_human", "base", ("is", "fd"))])
    assert "| people | - | FD +2 ± 0 (4/4) | - |" in text and "IS" not in text


def test_costs_count_rows_and_the_cpu_seconds_of_each_arms_own_command(cells):
    for cell in (cell for row in cells for cell in row):
        spent = [("01_generate.py --seed 0", 70), ("03_mine_pairs.py --seed 0", 30)]
        spent += [("05_train_flow_dpo.py --seed 0 --out flow_dpo ", 31)]
        spent += [("06_ddpo_baseline.py --seed 0 --out ddpo ", 99)]
        write(cell / "commands.jsonl", [{"command": command, "cpu_s": s} for command, s in spent])
        for name, counts in (("flow_dpo", (16000, 32000)), ("ddpo", (32000, 72960))):
            (cell / name).mkdir()
            write(cell / name / "log.jsonl", [{"forwards_grad": 1, "forwards": 1}, dict(zip(evidence.COUNTS, counts))])
        (cell / "run.json").write_text(json.dumps({"sampler": {"steps": 12, "guidance": 1.5}}))
        (cell / "01_samples").mkdir()
        write(cell / "01_samples/00000.jsonl", [{"k": k} for k in range(5)])
        write(cell / "01_samples/00000.skipped.jsonl", [{"clip": "x"}])
    text = evidence.cost_table(cells, {name: evidence.TABLE_1[name] for name in ("flow_dpo", "ddpo")})
    assert "| flow_dpo | 16,000 | 32,000 | 31 |" in text and "| ddpo | 32,000 | 72,960 | 99 |" in text
    assert "| 0 | 120 | 100 |" in text  # 5 audios of 12 guided steps, two rows each


def test_a_share_of_easy_pairs_becomes_its_threshold(tmp_path):
    pairs = [{"score_c": c / 10, "source": "auto"} for c in range(1, 11)] + [{"score_c": 0.0, "source": "human"}] * 5
    write(tmp_path / "04_stage1.jsonl", pairs[5:])
    write(tmp_path / "04_stage2.jsonl", pairs[:5])
    value = float(evidence.flags_at(tmp_path, "--threshold {share:0.4}").split()[1])
    assert sum(pair["score_c"] > value for pair in pairs) == 4
    assert evidence.flags_at(tmp_path, "--threshold {share:0.0}") == "--threshold 1.000000"
    assert evidence.flags_at(tmp_path, "--beta 20") == "--beta 20"
