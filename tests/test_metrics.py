"""Metrics with known answers, intervals that cover them, and equality with av-benchmark's own
code."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stage

from common import AudioScore, rows

metrics = stage("07")


# Frechet distance


def test_frechet_distance_of_gaussians_with_known_distance():
    # means 0 and (2, 1, 0), standard deviations (1, 2, 3) and (2, 2, 1): 4 + 1 + (1 - 2)^2 + 0 + (3
    # - 1)^2 = 10
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40_000, 3)) * (1, 2, 3)
    b = rng.standard_normal((40_000, 3)) * (2, 2, 1) + (2, 1, 0)
    assert metrics.frechet_distance(a, b) == pytest.approx(10, abs=0.25)


def test_frechet_distance_does_not_depend_on_the_axes():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((500, 4)) * (1, 2, 3, 4), rng.standard_normal((500, 4)) + 1
    turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    expected = pytest.approx(metrics.frechet_distance(a, b), rel=1e-9)
    assert metrics.frechet_distance(a @ turn, b @ turn) == expected
    assert metrics.frechet_distance(b, a) == expected


def test_frechet_distance_by_hand_in_one_dimension():
    # means 2 and 8, unbiased variances 2 and 8: 36 + 2 + 8 - 2 sqrt(16) = 38
    assert metrics.frechet_distance([[1.0], [3.0]], [[6.0], [10.0]]) == pytest.approx(38)


def test_frechet_distance_of_a_set_to_itself_is_0_and_of_few_audios_finite():
    few = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-3)  # of traces of 64
    value = metrics.frechet_distance(few, few + 1)
    assert np.isfinite(value) and value == pytest.approx(64, rel=1e-4)
    assert metrics.frechet_distance(np.ones((3, 4)), np.ones((3, 4))) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_two_audios():
    assert metrics.frechet_distance(np.zeros((1, 4)), np.zeros((9, 4))) is None
    assert metrics.frechet_distance(np.zeros((9, 4)), np.zeros((1, 4))) is None


# KL and inception score


def test_kl_divergence_is_of_the_generated_from_the_truth_by_hand():
    truth, generated = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    # 3/4 log(3/2) + 1/4 log(1/2) = 0.1308121; the other way 1/2 log(2/3) + 1/2 log 2 = 0.1438410
    assert metrics.kl_divergence(truth, generated).tolist() == pytest.approx([0.1308121], abs=1e-6)
    assert metrics.kl_divergence(generated, truth).tolist() == pytest.approx([0.1438410], abs=1e-6)


def test_kl_divergence_of_extreme_logits_is_finite():
    truth = torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    generated = torch.tensor([[0.0, 1e4], [1e4, 0.0]])
    values = metrics.kl_divergence(truth, generated)
    assert np.isfinite(values).all() and values[0] == pytest.approx(1e4)


def test_inception_score_is_1_for_audios_that_sound_alike():
    assert metrics.inception_score(torch.randn(1, 7).repeat(40, 1)) == pytest.approx(1)
    assert metrics.inception_score(torch.zeros(40, 7)) == pytest.approx(1)


def test_inception_score_of_sure_and_balanced_classes_is_their_number():
    sure = torch.eye(4).repeat(10, 1) * 1000  # 10 splits of 4, each of every class once
    assert metrics.inception_score(sure) == pytest.approx(4)


def test_inception_score_needs_10_audios():
    assert metrics.inception_score(torch.randn(9, 4)) is None
    assert metrics.inception_score(torch.randn(10, 4)) == pytest.approx(1)  # splits of one audio


# Intervals


def jackknifed(values, seed):
    value, low, high = metrics.jackknife(lambda i: values[i].mean(), len(values), seed=seed)
    assert value == values.mean()
    return low, high


def bootstrapped(values, seed):
    _, low, high = metrics.bootstrap(values, resamples=300, seed=seed)
    return low, high


@pytest.mark.parametrize("interval, seed, least", [(bootstrapped, 0, 178), (jackknifed, 1, 180)])
def test_an_interval_covers_the_mean_about_95_times_in_100(interval, seed, least):
    rng, hits = np.random.default_rng(seed), 0
    for i in range(200):
        low, high = interval(rng.standard_normal(60) + 3, i)
        hits += low <= 3 <= high
    assert least <= hits <= 198


def test_jackknife_interval_of_fd_contains_its_value_and_its_width_shrinks():
    rng, widths = np.random.default_rng(3), []
    for n in (100, 1600):
        a, b = rng.standard_normal((n, 4)), rng.standard_normal((n, 4)) * 2 + 1  # 4 + 4 (1 - 2)^2
        distance = lambda i, a=a, b=b: metrics.frechet_distance(a[i], b[i])  # noqa: E731
        value, low, high = metrics.jackknife(distance, n)
        assert low <= value <= high
        widths.append(high - low)
    assert low <= 8 <= high
    assert widths[1] < widths[0] / 2


def test_bootstrap_ignores_clips_to_which_a_metric_does_not_apply():
    value, low, high = metrics.bootstrap(np.array([np.nan, 1.0, 2.0, 3.0]))
    assert value == 2 and 1 <= low < high <= 3
    assert metrics.bootstrap(np.array([np.nan, np.nan])) == (None, None, None)
    assert metrics.bootstrap(np.array([3.0])) == (3.0, None, None)


def made_up(n, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 3)) + shift


def of_fd(ours, truth):
    """What each clip contributes to FD."""
    return metrics.clip_values({"fd": ours}, {"fd": truth}, {"fd": "fd"})["fd"]


def rows_of(values, **against):
    """{(system, metric): its row}."""
    found = metrics.results_of(values, metrics.METRICS, **against)
    return {(row.system, row.metric): row for row in found}


def results_of(base, better, **against):
    """Result rows of two systems and the ground truth, by the stage's own code. base, better: their
    ib, (n,)."""
    n = len(base)
    truth = made_up(n, seed=9)
    values = {"ground_truth": {"is": truth}}
    for name, ib, shift, seed in (("base", base, 2.0, 1), ("flow_dpo", better, 1.0, 2)):
        ours = made_up(n, shift, seed)
        values[name] = {"ib": ib, "fd": of_fd(ours, truth), "is": ours * 3}
    return rows_of(values, **against)


def test_differences_to_another_system_are_those_to_base_turned_round():
    values = np.random.default_rng(3).standard_normal((2, 60))
    usual, turned = results_of(*values), results_of(*values, against="flow_dpo")
    for metric in ("ib", "fd", "is"):
        to_base, to_ours = usual["flow_dpo", metric], turned["base", metric]
        assert to_ours.diff == pytest.approx(-to_base.diff)
        assert turned["flow_dpo", metric].diff is None
        mirrored = (-to_base.diff_high, -to_base.diff_low)
        assert (to_ours.diff_low, to_ours.diff_high) == pytest.approx(mirrored)
        assert to_ours.value == usual["base", metric].value


def test_differences_to_base_are_paired_and_keep_their_sign():
    rng = np.random.default_rng(5)
    base = rng.standard_normal(60) * 10  # clips differ much, systems by exactly 0.5 within a clip
    lines = results_of(base, base + 0.5)
    row = lines["flow_dpo", "ib"]
    assert (row.diff, row.diff_low, row.diff_high) == pytest.approx((0.5, 0.5, 0.5))
    assert row.high - row.low > 3
    base_row = lines["base", "ib"]
    assert base_row.diff is base_row.diff_low is base_row.diff_high is None
    fd = lines["flow_dpo", "fd"]
    assert fd.diff == pytest.approx(fd.value - lines["base", "fd"].value)
    # nearer to the truth: negative, as it is
    assert fd.diff < 0 and fd.better == "lower" and fd.diff_high < 0
    assert ("ground_truth", "fd") not in lines
    assert row.verdict == fd.verdict == "better" and base_row.verdict is None


@pytest.mark.parametrize("better, diff, expected", [
    ("higher", (0.2, 0.1, 0.3), "better"), ("lower", (-0.2, -0.3, -0.1), "better"),
    ("lower", (0.2, 0.1, 0.3), "worse"), ("higher", (-0.2, -0.3, -0.1), "worse"),
    ("higher", (0.2, -0.1, 0.5), None), ("higher", (0.2, None, None), None),
])  # fmt: skip
def test_a_difference_is_better_or_worse_only_where_its_interval_excludes_0(better, diff, expected):
    assert metrics.verdict(better, *diff) == expected


@pytest.mark.parametrize("n", [2, 5, 9, 10, 45])
def test_every_interval_contains_its_value_or_is_absent(n):
    rng = np.random.default_rng(n)
    for row in results_of(rng.standard_normal(n), rng.standard_normal(n)).values():
        assert row.low is None or row.low <= row.value <= row.high
        assert row.diff_low is None or row.diff_low <= row.diff <= row.diff_high
        assert row.metric != "is" or (row.value is None) == (n < 10)


def test_a_clip_without_audio_of_one_system_counts_for_neither_in_the_difference():
    base, ours = np.array([1.0, 2.0, np.nan, 4.0]), np.array([2.0, np.nan, 9.0, 6.0])
    row = results_of(base, ours)["flow_dpo", "ib"]
    assert row.diff == pytest.approx(1.5)  # (1 + 2) / 2
    assert row.n == 3


def test_set_metrics_compare_two_systems_on_the_clips_that_both_have():
    base, few = made_up(60, 2.0, 1), np.full((60, 3), np.nan)
    few[::3] = base[::3]  # the same audio on every third clip, none on the others
    truth = made_up(60, seed=9)
    values = {"base": {"fd": of_fd(base, truth)}, "mine": {"fd": of_fd(few, truth)}}
    row = rows_of(values)["mine", "fd"]
    assert (row.diff, row.diff_low, row.diff_high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert row.n == 20


def test_fd_is_of_the_clips_that_both_sides_have():
    # truth on 4 clips, the system on the last two of them: values 6 and 10 against 1 and 3, as by
    # hand above: 38, while all four of the truth, (100, 200, 1, 3), are of another mean
    truth = np.array([[100.0], [200.0], [1.0], [3.0]])
    ours = np.array([[np.nan], [np.nan], [6.0], [10.0]])
    row = rows_of({"mine": {"fd": of_fd(ours, truth)}})["mine", "fd"]
    assert (row.value, row.n) == (pytest.approx(38), 2)


def test_the_jackknife_of_is_leaves_clips_out_of_one_shuffle():
    # In the shuffled order the classes alternate, so that each of 10 splits of 8 holds 4 and 4: IS
    # 2. Less one block of 4 clips the order is kept, and every split still holds each class 3 to 5
    # times: the values stay close to 2, where fresh shuffles of the rest would make splits of 2 and
    # 6.
    order, logits = metrics.shuffled(80), np.empty((80, 2))
    logits[order] = np.tile([[30.0, 0.0], [0.0, 30.0]], (40, 1))
    block = np.random.default_rng(0).permutation(80) % 20
    row = rows_of({"mine": {"is": logits}})["mine", "is"]
    parts = [metrics.inception_score(logits[order[block[order] != i]]) for i in range(20)]
    error = np.sqrt(19 / 20 * np.square(np.array(parts) - np.mean(parts)).sum())
    assert row.value == pytest.approx(2) and min(parts) > 1.85
    # t of 19 degrees of freedom
    assert row.high - row.value == pytest.approx(2.0930 * error, rel=1e-3)


def test_two_systems_that_lack_other_clips_are_compared_over_the_same_splits():
    """The same audio where both have it: no difference of IS, in no replicate."""
    base = made_up(60, seed=4) * 3
    mine = base.copy()
    base[::7] = np.nan
    mine[3::5] = np.nan
    row = rows_of({"base": {"is": base}, "mine": {"is": mine}})["mine", "is"]
    assert row.diff == row.diff_low == row.diff_high == 0


class OneScorer:
    """Of which five tensors AudioScore's scores are made."""

    @staticmethod
    def audioscore_inputs(by_scorer):
        return by_scorer["toy"]


def test_p_good_that_differs_by_rounding_is_a_tie():
    torch.manual_seed(0)
    audioscore = AudioScore(tags=8).requires_grad_(False)
    five = {part: torch.full((3,), 0.3) for part in ("clap", "desync_s", "pesq")}
    five["ib"] = torch.tensor([0.3, 0.3 + 1e-6, 0.5])
    five["tag_logits"] = torch.zeros(3, 8)
    measured = metrics.by_metric({"toy": five}, {}, OneScorer, audioscore)
    clips = [SimpleNamespace(id=name) for name in ("base", "same", "absent", "better")]
    audios = dict.fromkeys(("base", "same", "better"))
    p_good = metrics.aligned(measured, audios, clips)["p_good"]
    wins = metrics.win_rate(p_good, np.full(4, p_good[0]))
    assert p_good[1] != p_good[0] and wins[:2].tolist() == [0.5, 0.5]
    assert np.isnan(p_good[2]) and np.isnan(wins[2]) and wins[3] in (0, 1)


# Table 1


def test_table_1_sets_each_system_beside_the_papers_own_row():
    def run_of(model, scorers="real"):
        parts = dict(checkpoint="a", checkpoint_digest="b", video_root="c", clip_s=8.0)
        return rows.World(model=model, scorers=scorers, **parts)

    values = {"base": (61.6, 1.6, None, 17.0, 0.3422, 0.45)}
    values["V-AURA"] = (218.5, 2.5, 2.0, 10.0, 0.27, 0.60)
    results = []
    for system, row in values.items():
        for metric, value in zip(metrics.PAPER_METRICS, row):
            named = dict(system=system, metric=metric, better="higher")
            results.append(rows.Result(**named, value=value, n=2))
    systems = ["ground_truth", "base", "V-AURA", "mine"]
    table = metrics.table_1(run_of("mmaudio:large_44k"), results, systems)
    shown = table.rows
    assert [name for name, _ in shown[:11]] == list(metrics.PAPER)
    assert shown[8] == ("MMAudio", ["60.60", "1.65", "1.40", "17.40", "33.22", "0.44"])
    assert "0.69 FD_PaSST" in table.remark
    assert shown[11:] == [
        ("here: base", ["61.60", "1.60", "-", "17.00", "34.22", "0.450"]),
        ("  minus the paper's MMAudio", ["+1.00", "-0.05", "-", "-0.40", "+1.00", "+0.010"]),
        ("here: V-AURA", ["218.50", "2.50", "2.00", "10.00", "27.00", "0.600"]),
        ("  minus the paper's V-AURA", ["+0.00", "+0.08", "-0.07", "-0.08", "-0.64", "-0.050"]),
        ("here: mine", ["-"] * 6),
    ]
    twin = metrics.row_of_paper
    assert twin("flow_dpo", "frieren") == "Frieren-DPO" and twin("mmaudio", "toy") == "MMAudio"
    assert twin("base", "mmaudio:small_16k") is None and twin("mine", "frieren") is None
    in_the_toy_world = metrics.table_1(run_of("toy", "toy"), results, ["base"]).rows
    assert not any(name.startswith("here") for name, _ in in_the_toy_world)


# Upstream


@pytest.fixture(scope="module")
def upstream():
    """av_bench.metrics from its clone, without importing the package's heavy parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(os.environ["UPSTREAM_DIR"]) / "av-benchmark"))
        import av_bench.metrics
    return av_bench.metrics


@pytest.mark.upstream
@pytest.mark.parametrize("n, scale", [(10, 1.0), (73, 4.0), (400, 30.0)])  # few, ordinary, extreme
def test_metrics_equal_av_benchmarks(upstream, n, scale):
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, 128, generator=generator) * torch.linspace(0.2, 2, 128)
    b = torch.randn(n + 7, 128, generator=generator) + 0.3
    theirs = upstream.compute_fd(a.numpy(), b.numpy())
    assert metrics.frechet_distance(a, b) == pytest.approx(theirs, rel=1e-4)
    truth, ours = (torch.randn(n, 527, generator=generator) * scale for _ in range(2))
    theirs = upstream.compute_kl([ours], truth)["kl_softmax"]
    assert metrics.kl_divergence(truth, ours).mean() == pytest.approx(theirs, rel=1e-4)
    theirs = upstream.compute_isc(ours, None, rng_seed=2020, samples_shuffle=True, splits=10)
    score = metrics.inception_score(ours[metrics.shuffled(n)])
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
