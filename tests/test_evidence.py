"""docs/evidence.py: its intervals, verdicts and tables, on numbers worked out by hand."""

import json
import re
import shutil
import types

import evidence
import numpy as np
import pytest
from conftest import files_of, read, write

import common

NUMBER = r"\d[\d,]*(?:\.\d+)?"
MADE = ("abc", "a CPU", 1.5)  # by which commit, on what, in how many CPU seconds


def test_the_interval_is_students_t_over_the_worlds():
    # mean 2, standard error 1 / sqrt(3); t(0.975, 2) = 4.302653: half width 2.484138; p = 2 P(T >
    # 3.4641) = 0.0742
    assert evidence.interval([1, 2, 3]) == pytest.approx((2, 2.484138, 0.074180), abs=1e-5)
    assert evidence.interval([3, 3]) == (3, 0, 0) and evidence.interval([0, 0]) == (0, 0, 1)


def test_the_interval_covers_the_truth_95_times_in_100_though_seeds_share_their_world():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        values = 0.7 + rng.standard_normal((12, 1)) + 0.5 * rng.standard_normal((12, 3))
        mean, half, _ = evidence.interval(values.mean(axis=1))
        covered += mean - half < 0.7 < mean + half
    assert 0.93 < covered / 2000 < 0.97


def test_holm_multiplies_the_smallest_p_by_their_number_and_never_falls():
    # sorted .01 x 3, .02 x 2, .03 x 1 -> .03, .04, max(.04, .03)
    assert evidence.holm([0.02, 0.03, 0.01]) == pytest.approx([0.04, 0.04, 0.03])
    assert evidence.holm([0.6, 0.7]) == pytest.approx([1, 1])


def test_holm_of_nine_null_claims_errs_in_at_most_5_of_100_tables():
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(600):
        p = [evidence.interval(rng.standard_normal(12))[2] for _ in range(9)]
        wrong += min(evidence.holm(p)) <= 0.05
    assert wrong / 600 < 0.075


@pytest.fixture
def results(tmp_path):
    """Three worlds. In world w every metric of `base` is 10 w, of the arms a little more."""
    more = {"base": (0, 0, 0), "flow_dpo": (1, 1.2, 1.4), "ddpo": (-1, 1, 0)}
    more["no_human"] = (2, 2, 2)
    rows = []
    metrics = [name for name in evidence.METRICS if "twin" not in name]
    for arm, by in more.items():
        for w in range(3):
            rows += [(str(w), arm, 0, 0, x, 10 * w + by[w], 5, *MADE) for x in metrics]
    evidence.append(tmp_path / "e.csv", rows)
    return evidence.Results(evidence.read(tmp_path / "e.csv"))


def test_differences_are_taken_within_a_world(results):
    assert results.gaps("flow_dpo", "base", "is") == pytest.approx([1, 1.2, 1.4])
    # mean 1.2, standard error .2 / sqrt(3), times t(0.975, 2) = 4.302653
    mean, half, _ = evidence.interval(results.gaps("flow_dpo", "base", "is"))
    assert (mean, half) == pytest.approx((1.2, 0.496828), abs=1e-5)
    systems = ["flow_dpo", "no_human", "not_made"]
    text = evidence.difference_table(results, systems, ["is", "ib"])
    assert text.splitlines()[2:] == [
        "| base | 10.00 ± 24.84 | 1000.0 ± 2484.1 |",
        "| flow_dpo | +1.20 ± 0.50 | +120.0 ± 49.7 |",
        "| no_human | +2.00 ± 0.00 | +200.0 ± 0.0 |",
    ]


def test_a_claim_holds_only_by_its_one_metric_and_after_holm(results):
    claims = [("people", "no_human", "base", "is"), ("lower FD", "no_human", "base", "fd")]
    claims += [("DDPO", "ddpo", "base", "is"), ("of an arm that is not there", "sft", "base", "is")]
    people, fd, ddpo = evidence.claim_table(results, claims).splitlines()[2:]
    assert people.endswith("IS +2.00 ± 0.00 | 3/3 | 0.000 | holds |")
    assert fd.endswith("FD +2 ± 0 | 3/3 | 0.000 | does not hold |")  # a higher FD is worse
    assert "| 1/3 | 1.000 | not decided" in ddpo


def test_a_difference_is_equal_where_it_is_surely_less_than_18_percent_of_the_gain():
    gained = np.array([-100.0, -100.0, -100.0])  # FD: a margin of 18
    # 18 - gaps and 18 + gaps: means 16 and 20, standard error 2 / sqrt(3); P(T_2 > 13.856) = .00258
    assert evidence.is_equal(np.array([0.0, 2.0, 4.0]), gained) == pytest.approx(0.002584, abs=1e-5)
    assert evidence.is_equal(np.array([17.0, 19.0, 21.0]), gained) > 0.5  # beyond it in the mean
    assert evidence.is_equal(np.array([-30.0, 0.0, 30.0]), gained) > 0.05  # too few worlds


def test_the_fresh_worlds_are_told_by_three_metrics_and_log_fd_is_of_every_training(tmp_path):
    rows = []
    for world in ("12", "13", "14"):
        for arm, value in (("base", 8.0), ("flow_dpo", 4.0), ("ddpo", 2.0)):
            for seed in (0, 1):
                for metric in ("is", "ib", "fd_twin"):
                    told = value * 4**seed + 0.01 * int(world)
                    rows.append((world, arm, seed, 0, metric, told, 5, "abc", "a CPU", "1.5"))
    evidence.append(tmp_path / "f.csv", rows)
    results = evidence.Results(evidence.read(tmp_path / "f.csv"))
    logs = [np.log(2 * 4**seed + 0.12) for seed in (0, 1)]
    assert results.mean["ddpo", "log_fd_twin"]["12"] == pytest.approx(np.mean(logs))
    lines = evidence.fresh_table(results, "flow_dpo", "ddpo").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| IS ↑", "| IB x100 ↑", "| log FD, twin tagger ↓"
    ]  # fmt: skip
    assert "flow_dpo ahead" in lines[0] and "ddpo ahead" in lines[2]


def test_the_page_of_tables_is_what_the_csvs_make(capsys):
    evidence.main(evidence.parse_args(["tables"]))
    page = (evidence.ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    made = capsys.readouterr().out
    assert re.split(NUMBER, made) == re.split(NUMBER, page)
    for ours, theirs in zip(re.findall(NUMBER, made), re.findall(NUMBER, page), strict=True):
        _, _, decimals = theirs.partition(".")
        apart = abs(float(ours.replace(",", "")) - float(theirs.replace(",", "")))
        assert apart < 1.5 * 10 ** -len(decimals), (ours, theirs)  # another CPU may round a tie


def test_what_the_csv_holds_is_kept_once(results, tmp_path):
    before = (tmp_path / "e.csv").read_text()
    evidence.append(tmp_path / "e.csv", [("0", "base", 0, 0, "fd", 99, 5, *MADE)])
    assert (tmp_path / "e.csv").read_text() == before
    evidence.append(tmp_path / "e.csv", [("3", "base", 0, 0, "fd", 99, 5, *MADE)])
    assert (tmp_path / "e.csv").read_text() == before + "3,base,0,0,fd,99,5,abc,a CPU,1.5\n"


def test_an_older_csv_keeps_its_columns(tmp_path):
    (tmp_path / "e.csv").write_text("world,arm,seed,budget,metric,value,n\n")
    evidence.append(tmp_path / "e.csv", [("3", "base", 0, 0, "fd", 99, 5, *MADE)])
    assert (tmp_path / "e.csv").read_text().splitlines()[1] == "3,base,0,0,fd,99,5"


def test_a_share_of_easy_pairs_becomes_its_threshold(tmp_path):
    pairs = [{"score_c": c / 10, "source": "auto"} for c in range(1, 11)]
    pairs += [{"score_c": 0.0, "source": "human"}] * 5
    write(tmp_path / "04_stage1.jsonl", pairs[5:])
    write(tmp_path / "04_stage2.jsonl", pairs[:5])
    value = float(evidence.flags_at(tmp_path, "--threshold {share:0.4}").split()[1])
    assert sum(pair["score_c"] > value for pair in pairs) == 4
    assert evidence.flags_at(tmp_path, "--threshold {share:0}") == "--threshold 1.000000"
    assert evidence.flags_at(tmp_path, "--beta 20") == "--beta 20"


def test_every_claim_is_of_arms_that_are_made_and_of_one_metric_that_is_judged():
    fresh = {arm.name for arm in evidence.FRESH}
    assert {arm for claim in evidence.FRESH_CLAIMS.values() for arm in claim} == fresh
    assert {*evidence.FRESH_METRICS} <= {*evidence.METRICS}
    made = {arm.name for arm in evidence.ARMS} | {"base"}
    for claims in evidence.CLAIMS.values():
        for text, system, against, metric in claims:
            assert {system, against} <= made and metric in evidence.METRICS, text


def test_every_training_has_a_name_that_07_takes():
    for study in evidence.STUDIES.values():
        for arm in {arm for arms in study.worlds.values() for arm in arms}:
            assert all(re.fullmatch(r"[\w-]+", arm.out(seed)) for seed in arm.seeds), arm


def test_what_another_noise_or_round_made_is_an_arm_of_its_world():
    values, same = {"0": 1.0, "0 round 2": 4.0, "0 noise 3": 7.0}, dict(seed=0, metric="fd")
    rows = [dict(world=x, arm="flow_dpo", value=y, **same) for x, y in values.items()]
    results = evidence.Results(rows)
    assert results.gaps("flow_dpo, round 2", "flow_dpo", "fd") == [3]
    assert results.gaps("flow_dpo, noise 3", "flow_dpo, round 2", "fd") == [3]
    assert evidence.World(0, 3.0).name == "0 noise 3"
    assert evidence.World(0, round=2).name == "0 round 2"
    assert evidence.World(0, given=True, overlooks=1).name == "0 given mild 1"


def test_a_world_is_judged_and_never_made_again(finished, tmp_path, monkeypatch):
    """Trainings in a world that is there up to stage 04, and in a second round; and its twin with
    unsteadier people."""
    skip = shutil.ignore_patterns("0[5-8]*", ".*", "test_*", "val_*")
    shutil.copytree(finished, tmp_path / "tiny_0", ignore=skip)
    arm = evidence.Arm
    flow_dpo = arm("flow_dpo", "05", "--steps 3")
    arms = [flow_dpo, arm("sft", "05", "--beta 0 --sft-weight 1 --steps 3")]
    arms += [arm("ddpo", "06", "--steps 2"), flow_dpo._replace(guidance=3)]
    args = types.SimpleNamespace(runs=tmp_path, csv=tmp_path / "e.csv", jobs=1, size="tiny")
    study = {evidence.World(0): arms, evidence.World(0, round=2): arms[:1]}
    made = {"command": "01_generate.py --seed 0", "cpu_s": 7.5}
    write(tmp_path / "tiny_0/commands.jsonl", [made])
    (tmp_path / "tiny_0_round_2").mkdir()
    (tmp_path / "tiny_0_round_2/00_base.pt").touch()  # an interrupted copy
    evidence.make(args, study, "val")
    rows = evidence.read(args.csv)
    assert {(row["world"], row["arm"]) for row in rows if row["metric"] == "fd"} == {
        ("0", "base"), ("0", "flow_dpo"), ("0", "sft"), ("0", "ddpo"), ("0", "base at guidance 3"),
        ("0", "flow_dpo at guidance 3"), ("0 round 2", "base"), ("0 round 2", "flow_dpo"),
    }  # fmt: skip
    keys = ("world", "arm", "n")
    logged = [x["metric"] for x in rows if [x[key] for key in keys] == ["0", "flow_dpo", "0"]]
    assert {*evidence.LOGGED, "norm_wrong", "cpu_s"} == set(logged)
    assert not (tmp_path / "tiny_0/07_audio/flow_dpo_0").exists()
    # Eq. 5 has no gradient
    assert ("sft", "norm_wrong") not in {(row["arm"], row["metric"]) for row in rows}
    value = {(row["world"], row["arm"], row["metric"]): row["value"] for row in rows}
    assert value["0", "base", "pool_audios"] == 5 * 20
    assert value["0", "base", "pool_forwards"] == 2 * 8 * 5 * 20
    assert 0 < value["0", "base", "p_good_largest"] < 1
    assert 0 <= value["0", "base", "best_is_least_bad"] <= 1
    assert value["0", "base", "cpu_s_01"] == 7.5 and value["0", "base", "pool_rated"] == 5 * 8
    first = pytest.approx(value["0", "flow_dpo", "fd"], rel=1e-4)
    assert value["0 round 2", "base", "fd"] == first != value["0", "base", "fd"]  # begins there
    before, told, command = args.csv.read_text(), [], evidence.command

    def of_02_alone(*words):
        told.append(words)
        return words[1] == "02" and command(*words)

    monkeypatch.setattr(evidence, "command", of_02_alone)
    evidence.make(args, study, "val")
    assert args.csv.read_text() == before and not told
    evidence.make_world((args, evidence.World(0, 3.0)))  # other people, of the same audios
    twin, own = tmp_path / "tiny_0_noise_3", tmp_path / "tiny_0"
    assert [number for _, number, _ in told] == ["01", "02", "03", "04"]
    assert json.loads((twin / "run.json").read_text())["rater_noise"] == 3
    assert files_of(twin, "02_ratings") != files_of(own, "02_ratings")
    assert files_of(twin, "01_audio", "01_samples") == files_of(own, "01_audio", "01_samples")
    for scores in (own / "03_scores").glob("*.pt"):
        assert (twin / "03_scores" / scores.name).samefile(scores)  # nothing is scored twice
    evidence.make_world((args, evidence.World(0, overlooks=3)))  # people who are easily pleased
    rated = {}
    for folder in (own, tmp_path / "tiny_0_mild_3"):
        rated[folder.name] = [row["rating"] for row in read(folder / "02_ratings.jsonl")]
    usual, mild = rated.values()
    better = [common.RATINGS.index(a) - common.RATINGS.index(b) for a, b in zip(usual, mild)]
    assert min(better) == 0 and mild.count("Good") > usual.count("Good")
