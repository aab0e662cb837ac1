"""The paper's equations, by numbers worked out by hand, and the laws of the samplers."""

import argparse
import functools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    LATENTS,
    PROBABILITIES,
    arguments,
    call,
    close,
    read,
    read_json,
    shards_of,
    stage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from adapters.toy import VOCABULARY
from common import files, inputs, media, people, rows, training

LOG_2 = 0.6931471805599453


def scalars(*values):
    return [torch.tensor([value], dtype=torch.float32, requires_grad=True) for value in values]


# Flow-DPO (Eq. 5)


def test_flow_dpo_loss_is_log2_when_policy_equals_reference():
    err_w, err_l = torch.tensor([0.3, 1.7]), torch.tensor([0.9, 0.2])
    loss, logits = common.flow_dpo_loss(err_w, err_l, err_w, err_l, beta=600)
    assert loss.tolist() == pytest.approx([LOG_2, LOG_2])
    assert logits.tolist() == [0, 0]


def test_flow_dpo_loss_by_hand_with_eq4s_brackets():
    # W = 0.5 - 0.6 = -0.1, L = 0.9 - 0.7 = 0.2, beta 10: -log sigmoid(-5 (-0.1 - 0.2)) = -log
    # sigmoid(1.5) = 0.2014133
    loss, logits = common.flow_dpo_loss(*scalars(0.5, 0.9, 0.6, 0.7), beta=10)
    assert logits.item() == pytest.approx(1.5, abs=1e-5)
    assert loss.item() == pytest.approx(0.2014133, abs=1e-5)


def test_eq5s_brackets_as_printed_pull_towards_the_loser_too():
    # -log sigmoid(-5 (-0.1) - 0.2) = -log sigmoid(0.3) = 0.5543552; d/d err_l = 1 - sigmoid(0.3) =
    # 0.4255575 > 0
    errors = scalars(0.5, 0.9, 0.6, 0.7)
    loss, logits = common.flow_dpo_loss(*errors, beta=10, printed=True)
    loss.sum().backward()
    assert (logits.item(), loss.item()) == pytest.approx((0.3, 0.5543552), abs=1e-5)
    assert errors[1].grad.item() == pytest.approx(0.4255575, abs=1e-5)


def test_a_lower_loser_error_raises_the_loss_and_a_lower_winner_error_lowers_it():
    errors = scalars(0.4, 0.4, 0.4, 0.4)
    common.flow_dpo_loss(*errors, beta=8)[0].sum().backward()
    # beta / 2 * sigmoid(0) = 8 / 4
    assert [error.grad.item() for error in errors] == pytest.approx([2.0, -2.0, -2.0, 2.0])
    moved, same = torch.tensor([0.9, 1.0, 1.1]), torch.ones(3)
    for err_w, err_l, signs in ((moved, same, [-1, 0, 1]), (same, moved, [1, 0, -1])):
        loss, _ = common.flow_dpo_loss(err_w, err_l, same, same, beta=20)
        assert (loss - loss[1]).sign().tolist() == signs and loss[1].item() == pytest.approx(LOG_2)


def test_flow_error_is_the_mean_over_the_latent_in_float32():
    v, u = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    u[1] = 3.0
    assert common.flow_error(v, u).tolist() == [4.0, 9.0]  # not the sum, 48 and 108
    tiny = common.flow_error(v.bfloat16(), (1 + torch.arange(24.0).view(2, 3, 4) / 64).bfloat16())
    # (1 + k / 64)^2, averaged over k = 0 ... 11 and over k = 12 ... 23; squares rounded to bf16
    # would be off by 1e-3
    assert tiny.tolist() == pytest.approx([1.182170, 1.624552], abs=1e-5)


def test_interpolate_is_data_at_0_and_noise_at_1():
    a_0, eps = torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 10.0)
    a_t, v = common.interpolate(a_0, eps, torch.tensor([0.0, 0.25, 1.0]))
    assert a_t.flatten().tolist() == [2.0, 4.0, 10.0]
    assert v.flatten().tolist() == [8.0, 8.0, 8.0]


def test_in_bf16_too_training_starts_at_log2(run):
    call("05", run, "--out", "half", "--steps", 1, "--precision", "bf16", "--beta", 600)
    first = read(run / "half" / "log.jsonl")[0]
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert (first["gap_w"], first["gap_l"]) == (0.0, 0.0)


def test_a_reference_in_bf16_is_bit_equal_to_the_float32_one_under_autocast(finished):
    model = common.load_base_model(finished)
    whole, half = training.frozen_copy(model, bf16=False), training.frozen_copy(model, bf16=True)
    kinds = {p.dtype for p in half.parameters()}
    assert kinds == {torch.float32, torch.bfloat16} and half.net.place.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    a_t, t = torch.randn(6, *model.latent_shape, generator=generator), torch.linspace(0.01, 1, 6)
    draw = functools.partial(torch.randn, generator=generator)
    features = {"frames": draw(6, 25, 64), "pooled": draw(6, 32)}
    features["text"] = torch.rand(6, len(VOCABULARY), generator=generator)
    with torch.no_grad(), training.autocast("cpu", "bf16"):
        assert torch.equal(whole(a_t, t, features), half(a_t, t, features))


def test_compiled_sampling_gives_the_same_latents_within_1e_4(finished, monkeypatch):
    plain, compiled = (common.load_base_model(finished) for _ in range(2))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled.compiles = True  # though it is small
    common.speed.compile_models(compiled)
    features = shards_of(finished).features([*inputs.read_samples(finished)][:2])
    ours, theirs = (common.sample(x, features, [1, 2, 3, 4], 3, 1.5) for x in (compiled, plain))
    assert close(ours, theirs, LATENTS) and ours.std() > 0.1
    torch._dynamo.reset()


def test_training_starts_at_log2_with_no_gap_and_its_reference_stays(finished):
    first = read(finished / "05_flow_dpo" / "log.jsonl")[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert (first["gap_w"], first["gap_l"], first["accuracy"]) == (0.0, 0.0, 0.5)


# AudioScore and mining (Eq. 1-3)


def test_score_c_matches_eq3_by_hand():
    # ((0.7 - 0.1) + (0.8 - 0.1)) / 2
    assert common.score_c((0.7, 0.2, 0.1), (0.1, 0.1, 0.8)) == pytest.approx(0.65)
    assert common.score_c((1, 0, 0), (0, 0, 1)) == 1
    assert common.score_c((0, 0, 1), (1, 0, 0)) == -1


def audioscore():
    torch.manual_seed(0)
    made = common.AudioScore(tags=2)
    made.mean.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 2.0]))
    made.std.copy_(torch.tensor([0.5, 0.5, 0.1, 1.0, 0.7]))
    return made.requires_grad_(False)


def test_audioscore_gives_three_probabilities_and_takes_a_score_that_does_not_apply_for_the_mean():
    judge = audioscore()
    p = judge(torch.randn(50, 5, generator=torch.Generator().manual_seed(1)) * 10)
    assert p.shape == (50, 3) and (p >= 0).all()
    assert p.sum(dim=1).tolist() == pytest.approx([1] * 50)
    absent, mean = [0.3, math.nan, 0.1, 0.9, math.nan], [0.3, 0.2, 0.1, 0.9, 2.0]
    p = judge(torch.tensor([absent, mean, [*mean[:4], 1.0]]))
    assert close(p[0], p[1], PROBABILITIES) and not close(p[0], p[2], PROBABILITIES)


def test_inception_score_of_one_audio_by_hand():
    judge = audioscore()  # p(y) is (1/2, 1/2)
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [1000.0, 0.0]])
    # 0; 3/4 log(3/2) + 1/4 log(1/2) = 0.1308121; log 2
    assert judge.inception(logits).tolist() == pytest.approx([0.0, 0.1308121, LOG_2], abs=1e-6)


P = [(0.1, 0.2, 0.7), (0.6, 0.3, 0.1), (0.2, 0.2, 0.6), (0.5, 0.1, 0.4), (0.3, 0.3, 0.4)]
FEW = "fewer than two audios can be used"
TIE = "two audios tie for the best or the worst"
BOTH = "one audio is both the best and the worst"


@pytest.mark.parametrize("p, winners, losers, expected", [
    (P, range(5), range(5), (1, 0)),  # argmax P(Good), argmax P(Bad)
    ([*P[:4], (0.6, 0.2, 0.2)], range(5), range(5), TIE),
    ([*P[:4], (0.2, 0.1, 0.7)], range(5), range(5), TIE),
    ([(0.2, 0.3, 0.5)] * 5, range(5), range(5), TIE),  # AudioScore blind: no audio beats itself
    ([(0.4, 0, 0.6), (0.3, 0.5, 0.2), (0.3, 0.4, 0.3)], range(3), range(3), BOTH),
    (P, [0, 2, 3, 4], range(5), (3, 0)),  # 1, the best, is silent: the next best wins
    (P, [1, 2, 3, 4], range(5), (1, 0)),  # 0 is silent and loses
    (P, [], range(5), "all audios are silent or clipped"), (P, [1], [1], FEW),
])  # fmt: skip
def test_a_pair_by_eq2(p, winners, losers, expected):
    assert stage("03").select_pair(dict(enumerate(p)), [*winners], [*losers]) == expected


AUDIO = st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.booleans())


@settings(derandomize=True, database=None, deadline=None)
@given(st.lists(AUDIO, max_size=6))
def test_a_pair_is_the_one_that_eq2_defines_or_none(drawn):
    p = {k: (x / 10, (10 - x - y) / 10, y / 10) for k, (x, y, _, _) in enumerate(drawn)}
    losers = [k for k, (*_, finite) in enumerate(drawn) if finite]
    winners = [k for k, (_, _, loud, finite) in enumerate(drawn) if loud and finite]
    best = [k for k in winners if all(p[k][0] > p[other][0] for other in winners if other != k)]
    worst = [k for k in losers if all(p[k][2] > p[other][2] for other in losers if other != k)]
    pairs = [(winner, loser) for winner in best for loser in worst if winner != loser]
    found = stage("03").select_pair(p, winners, losers)
    assert [found] == pairs if pairs else isinstance(found, str)


LOUD = torch.full((1000,), 0.5)
HEARD = {  # a wave; whether it is finite, its peak, its share at full scale; whether it may win
    "loud": (LOUD, (True, 0.5, 0), True),
    "silent": (torch.full((1000,), 0.0009), (True, 0.0009, 0), False),
    "barely": (torch.cat([torch.full((9,), 1.7), LOUD[9:]]), (True, 1, 0.009), True),
    "clipped": (torch.cat([torch.full((10,), 1.7), LOUD[10:]]), (True, 1, 0.01), False),
    "broken": (torch.cat([LOUD[1:], torch.tensor([math.nan])]), (False, 0.5, 0), False),
}


@pytest.mark.parametrize("wave, expected, may_win", HEARD.values(), ids=HEARD)
def test_what_stage_01_records_of_an_audio_says_whether_it_is_silent_or_clipped(
    wave, expected, may_win, tmp_path
):
    row = media.write_audio(tmp_path / "x.wav", wave, 16_000)
    assert (row["finite"], row["peak"], row["clipped"]) == expected
    assert stage("03").is_good_enough(sample(**row)) == may_win
    assert row["digest"] == files.digest(tmp_path / "x.wav")


def sample(k=0, finite=True, peak=0.5, clipped=0.0, digest=""):
    return rows.Sample("x", k, 0, "", 0, digest, finite, peak, clipped)


def test_mining_by_hand():
    p_of = {clip: dict(enumerate(P)) for clip in "abcdef"}
    samples = {clip: [sample(k) for k in range(5)] for clip in "abcdef"}
    # b's best is silent, c's worst has one loud sample
    samples["b"][1].peak = samples["c"][0].clipped = 1e-4
    samples["d"][1].finite = samples["d"][0].finite = False  # neither may be in a pair
    samples["e"] = [sample(k, finite=k == 2) for k in range(5)]
    p_of["f"][3] = p_of["f"][1]
    pairs, dropped = stage("03").mine(samples, p_of, {"a"}, 0.0)
    found = {(pair.clip, pair.winner, pair.loser) for pair in pairs}
    assert found == {("b", 3, 0), ("c", 1, 0), ("d", 3, 2)}
    assert dropped == {
        "are set aside, since people rated them": 1,
        f"make none, since {FEW}": 1,
        f"make none, since {TIE}": 1,
    }
    assert pairs[0].p_winner == P[3] and pairs[0].p_loser == P[0]
    # score_c, Eq. 3: b ((0.5 - 0.1) + (0.7 - 0.4)) / 2 = 0.35, c 0.55, d 0.25
    pairs, dropped = stage("03").mine(samples, p_of, {"a"}, 0.3)
    assert [pair.clip for pair in pairs] == ["b", "c"]
    assert dropped["make none, since score_c is below 0.3"] == 1


def test_people_are_asked_about_audios_of_one_clip_with_one_rating():
    samples = {clip: [sample(k, finite=(clip, k) != ("y", 1)) for k in range(4)] for clip in "xyz"}
    given = {"x": ["Good", "Good", "Bad", "Bad"], "y": ["Good"] * 3, "z": ["Good", "Medium", "Bad"]}
    ratings = []
    for clip, row in given.items():
        ratings += [rows.RatedScore(clip=clip, k=k, rating=r) for k, r in enumerate(row)]
    asked = stage("03").comparisons(samples, ratings, 10, seed=0)
    assert asked == [("x", 0, 1), ("x", 2, 3), ("y", 0, 2)]  # y's audio 1 is not finite


def test_human_pairs_follow_the_majority_and_a_tie_makes_none():
    given = [("x", 0, 1, "a"), ("x", 1, 0, "a"), ("x", 0, 1, "b")]
    given += [("y", 2, 3, "a"), ("y", 2, 3, "b"), ("z", 4, 2, "tie")]
    answers = [rows.ChoiceAnswer(clip=clip, a=a, b=b, choice=x) for clip, a, b, x in given]
    p_of = {clip: dict.fromkeys(range(5), (0.2, 0.3, 0.5)) for clip in "xyz"}
    pairs = stage("03").human_pairs(answers, p_of)
    assert [(pair.clip, pair.winner, pair.loser) for pair in pairs] == [("x", 1, 0)]


def answered(given, first=0, repeat=0):
    """Choices between audios 0 and 1 of so many clips."""
    made = []
    for rater, clip, word in given:
        about = dict(clip=f"{first + clip:02d}", a=0, b=1, choice=word, repeat=repeat)
        made.append(rows.ChoiceAnswer(rater=rater, seconds=4.0 + clip, **about))
    return made


def test_raters_are_compared_with_the_others_and_with_themselves_and_named_below_the_line(capsys):
    # Two raters, three questions, aa ab bb: 2 of 6 ordered pairs differ, by chance 2 * 3 * 3 / (6 *
    # 5) = 0.6 would.
    ann = [("ann", 1, "a"), ("ann", 2, "a"), ("ann", 3, "b")]
    bob = [("bob", 1, "a"), ("bob", 2, "b"), ("bob", 3, "b")]

    def printed(answers):
        people.print_agreement(answers, lambda answer: "ab".index(answer.choice), "nominal")
        return capsys.readouterr().out.splitlines()

    assert printed(answered(ann + bob)) == [
        "raters: 2; 3 of 3 questions answered by several, Krippendorff's alpha 0.444 (nominal)",
        "  ann: 3 answers, alpha 0.444 with the others (3 pairs), median 6.0 s",
        "  bob: 3 answers, alpha 0.444 with the others (3 pairs), median 6.0 s",
    ]
    many = [answer for i in range(7) for answer in answered(ann + bob, 3 * i)]
    of_bob = [("bob", clip, "a") for clip in (1, 2, 3)]  # who said a, b, b, a, b, b
    again = answered(of_bob, 0, 1) + answered(of_bob, 3, 1)
    *_, row, line = printed([*again, *many])
    assert "2 of 6 repeats alike" in row
    assert "below the line" in line and "--exclude-rater 'bob'" in line
    cat = [("cat", 1, "b"), ("cat", 2, "b"), ("cat", 3, "a")]
    turned = [answer for i in range(7) for answer in answered(cat, 3 * i)]
    *_, row, line = printed([*many, *turned])
    assert "alpha -0." in row and "--exclude-rater 'cat'" in line


# Sampler

MU, SIGMA = 1.5, 0.4


class GaussianFlow(common.FlowModel):
    """A flow whose data are N(MU, SIGMA^2) in each value; its exact velocity is known in closed
    form.

    a_t ~ N((1 - t) MU, (1 - t)^2 SIGMA^2 + t^2), and v = eps - a_0 has mean -MU and covariance t -
    (1 - t) SIGMA^2 with a_t, so that E[v | a_t] = -MU + (t - (1 - t) SIGMA^2) / var (a_t - mean).
    """

    latent_shape, sample_rate_hz, clip_s = (4, 2), 16_000, 2.0

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def project(self, features):
        return features

    def null_conditions(self, conditions):
        return {key: torch.zeros_like(value) for key, value in conditions.items()}

    def predict(self, a_t, t, conditions):
        t = t[:, None, None]
        mean, variance = (1 - t) * MU, (1 - t) ** 2 * SIGMA**2 + t**2
        u = -MU + (t - (1 - t) * SIGMA**2) / variance * (a_t - mean)
        return self.scale * u + conditions["shift"][:, None, None]


def marginal(t):
    return (1 - t) * MU, (1 - t) ** 2 * SIGMA**2 + t**2


def test_the_ode_samples_the_analytic_flows_data():
    none = {"shift": torch.zeros(1)}
    a_0 = common.sample(GaussianFlow(), none, range(3000), steps=100, guidance=1.0)
    assert a_0.shape == (3000, 4, 2)
    assert a_0.mean().item() == pytest.approx(MU, abs=0.02)
    assert a_0.std().item() == pytest.approx(SIGMA, abs=0.02)


def test_an_audios_noise_depends_on_seed_clip_and_k_alone():
    seeds = [common.seed_of(0, clip, k) for clip in ("x", "y") for k in range(3)]
    assert len(set(seeds)) == 6
    assert seeds == [common.seed_of(0, clip, k) for clip in ("x", "y") for k in range(3)]
    assert common.seed_of(1, "x", 0) != common.seed_of(0, "x", 0)
    model, features = GaussianFlow(), {"shift": torch.tensor([0.0, 0.5])}
    both = common.sample(model, features, [11, 12, 13, 14], steps=5, guidance=2.0)
    alone = common.sample(model, {"shift": features["shift"][1:]}, [14], steps=5, guidance=2.0)
    assert torch.allclose(both[3:], alone, atol=1e-6)


def test_rows_of_a_batch_belong_to_their_clip():
    model = GaussianFlow()
    conditions = {"shift": torch.tensor([0.0, 0.5])}  # row r * B + b takes condition b
    a_t, t = torch.zeros(4, 4, 2), torch.full((4,), 0.5)
    u = model.velocity(a_t, t, conditions)[:, 0, 0]
    assert (u - u[0]).tolist() == pytest.approx([0, 0.5, 0, 0.5])


def test_guidance_extrapolates_from_the_unconditional_velocity():
    model, a_t, t = GaussianFlow(), torch.zeros(1, 4, 2), torch.tensor([0.5])
    null = model.velocity(a_t, t, {"shift": torch.zeros(1)})
    conditions = {"shift": torch.full((1,), 0.2)}
    assert torch.allclose(model.velocity(a_t, t, conditions, 1.0), null + 0.2)
    assert torch.allclose(model.velocity(a_t, t, conditions, 4.5), null + 0.9)  # 4.5 * 0.2


# DDPO


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_the_sde_has_the_odes_marginals(eta):
    torch.manual_seed(0)
    model, steps, count = GaussianFlow(), 200, 4000
    grid = [1 - i / steps for i in range(steps)]
    a_t, checked = torch.randn(count, 4, 2), []
    for i, (now, later) in enumerate(zip(grid[:-1], grid[1:]), 1):
        t, t_next = torch.full((count,), now), torch.full((count,), later)
        u = model.velocity(a_t, t, {"shift": torch.zeros(1)}).detach()
        mean, std = stage("06").sde_step(a_t, u, t, t_next, eta)
        a_t = mean + std * torch.randn_like(mean)
        if i in (20, 50, 100, 150, 180):
            expected_mean, expected_variance = marginal(later)
            assert a_t.mean().item() == pytest.approx(expected_mean, abs=0.02)
            assert a_t.var().item() == pytest.approx(expected_variance, rel=0.06)
            checked.append(later)
    assert checked == pytest.approx([0.9, 0.75, 0.5, 0.25, 0.1])


def test_without_noise_the_sde_step_is_eulers():
    a_t, u = torch.ones(2, 4, 2), torch.full((2, 4, 2), 3.0)
    t, t_next = torch.tensor([1.0, 0.5]), torch.tensor([0.9, 0.3])
    mean, std = stage("06").sde_step(a_t, u, t, t_next, eta=0.0)
    assert mean[:, 0, 0].tolist() == pytest.approx([1 - 0.3, 1 - 0.6])
    assert std.flatten().tolist() == [0, 0]


def test_sde_step_by_hand():
    # t 0.5, dt 0.1, eta 0.7: s^2 = 0.49; s^2 / (2 t) = 0.49; a_t - [u + 0.49 (a_t + 0.5 u)] dt with
    # a_t = 1, u = 2
    a_t, u = torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)
    mean, std = stage("06").sde_step(a_t, u, torch.tensor([0.5]), torch.tensor([0.4]), 0.7)
    assert mean.item() == pytest.approx(1 - (2 + 0.49 * 2) * 0.1)
    assert std.item() == pytest.approx(0.7 * math.sqrt(0.1))


def test_log_prob_is_the_gaussians_averaged_over_the_latent():
    x, mean, std = torch.ones(1, 3, 2), torch.zeros(1, 3, 2), torch.full((1, 1, 1), 2.0)
    value = stage("06").log_prob(x, mean, std)
    assert value.item() == pytest.approx(-0.125 - math.log(2) - 0.5 * math.log(2 * math.pi))


def test_advantages_are_per_prompt():
    rewards = torch.tensor([0.0, 10.0, 1.0, 12.0, 2.0, 14.0])  # rows r * 2 + b
    advantages, std = stage("06").group_advantages(rewards, 3)
    assert std.tolist() == pytest.approx([1.0, 2.0])
    assert advantages.tolist() == pytest.approx([-1, -1, 0, 0, 1, 1], abs=1e-3)
    assert stage("06").group_advantages(torch.full((4,), 0.3), 2)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("rewards, expected", [
    ((0.3 - 6e-8, 0.3, 0.3 + 6e-8), (0, 0, 0)),  # what rounding makes of three equal rewards
    ((0.30, 0.30, 0.30), (0, 0, 0)),
    ((0.3 - 0.9e-4, 0.3, 0.3 + 0.9e-4), (0, 0, 0)),  # std 0.9e-4, just below the floor
    ((0.3 - 1.1e-4, 0.3, 0.3 + 1.1e-4), (-1, 0, 1)),  # std 1.1e-4, just above it
])  # fmt: skip
def test_a_prompt_without_spread_has_no_advantage_and_its_neighbour_keeps_its_own(
    rewards, expected
):
    assert stage("06").MIN_SPREAD == 1e-4
    both = torch.tensor([rewards, (0.2, 0.4, 0.6)], dtype=torch.float64).T.flatten()  # std 0.2
    advantages, std = stage("06").group_advantages(both, 3)
    assert advantages[0::2].tolist() == pytest.approx(expected, abs=1e-6)
    assert advantages[1::2].tolist() == pytest.approx((-1, 0, 1))
    assert std[1].item() == pytest.approx(0.2)
    assert expected[0] or not advantages[0::2].any()  # exactly 0


def test_ppo_loss_by_hand():
    ratio = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    # min(1.3, 1.1); min(0.7, 0.9); min(-1.3, -1.1); min(-0.7, -0.9); 2
    expected = [-1.1, -0.7, 1.3, 0.9, -2.0]
    assert stage("06").ppo_loss(ratio, advantage, 0.1).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ddpo_ratio_is_1_on_its_first_update(precision, run):
    call("06", run, "--out", "first", "--steps", 2, "--precision", precision)
    first, second = read(run / "first" / "log.jsonl")
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["clipped"] == 0 and first["approx_kl"] < 1e-9
    assert second["approx_kl"] > first["approx_kl"]  # of a policy that has moved


# Curriculum


def pair(clip, score_c=0.0, source="auto"):
    return rows.SplitPair(clip=clip, winner=0, loser=1, score_c=score_c, source=source)


def pairs(easy, hard, human=0):
    """The two stages, with this many pairs."""
    auto = [pair(f"e{i}", 0.9) for i in range(easy)]
    weak = [pair(f"h{i}", 0.4) for i in range(hard)]
    return auto, weak + [pair(f"p{i}", source="human") for i in range(human)]


def test_steps_are_divided_in_proportion_to_the_pairs():
    assert stage("05").divide_steps(pairs(30, 10), 100) == [75, 25]
    assert stage("05").divide_steps(pairs(1, 2), 100) == [33, 67]
    assert stage("05").divide_steps(pairs(0, 5), 7) == [0, 7]
    assert stage("05").divide_steps(pairs(5, 0), 7) == [7, 0]


def test_every_pair_is_seen_equally_often_and_in_its_stage():
    stages, args = pairs(5, 2, 1), argparse.Namespace(seed=0, global_batch=4)
    stage_steps = stage("05").divide_steps(stages, 16)

    def batches():
        return [stage("05").batch_at(step, stages, stage_steps, args) for step in range(16)]

    assert stage_steps == [10, 6]
    seen, counts = batches(), (Counter(), Counter())
    assert [i for i, _ in seen] == [0] * 10 + [1] * 6
    for i, batch in seen:
        counts[i].update(pair.clip for pair in batch)
    assert counts[0] == {f"e{i}": 8 for i in range(5)}  # 40 draws of 5
    assert counts[1] == {"h0": 8, "h1": 8, "p0": 8}  # 24 draws of 3
    assert batches() == seen
    args.seed = 1
    assert batches() != seen


def test_t_and_noise_are_a_function_of_seed_and_step():
    draw, model = stage("05").draw_t_and_noise, GaussianFlow()
    args = argparse.Namespace(seed=0, global_batch=3, stratified_t=False)
    t, eps = draw(7, model, args)
    assert t.shape == (3,) and eps.shape == (3, 4, 2) and ((t >= 0) & (t < 1)).all()
    assert torch.equal(draw(7, model, args)[1], eps)
    assert not torch.equal(draw(8, model, args)[1], eps)


def test_stratified_times_fall_one_in_each_part_of_the_batch_and_anywhere_in_it():
    args = argparse.Namespace(seed=0, global_batch=4, stratified_t=True)
    t = torch.stack([stage("05").draw_t_and_noise(i, GaussianFlow(), args)[0] for i in range(2000)])
    assert (t.sort(dim=1).values * 4).long().tolist() == [[0, 1, 2, 3]] * 2000
    for pair in t.T:  # each pair's own is still U(0, 1): deviations of these are .0065 and .0058
        assert pair.mean() == pytest.approx(1 / 2, abs=0.03)
        assert pair.square().mean() == pytest.approx(1 / 3, abs=0.03)
    between = torch.corrcoef(t.T)[0, 1]  # -1/3 (1 - 1/16) in theory
    assert between == pytest.approx(-0.3125, abs=0.06)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_an_average_is_as_wide_as_it_is_called(width):
    steps = 20_000
    average = {"step": torch.zeros(1, dtype=torch.float64)}
    squares = {"step": torch.zeros(1, dtype=torch.float64)}
    power = training.averaging_power(width)
    for step in range(1, steps + 1):
        at = torch.tensor([step / steps], dtype=torch.float64)
        training.average_in(average, {"step": at}, step, power)
        training.average_in(squares, {"step": at**2}, step, power)
    deviation = (squares["step"] - average["step"] ** 2).sqrt()
    assert deviation.item() == pytest.approx(width, rel=1e-3)


def test_winner_and_loser_share_time_and_noise():
    model, features = GaussianFlow(), {"shift": torch.zeros(2)}
    a_0 = torch.stack([torch.full((2, 4, 2), 1.0), torch.full((2, 4, 2), -1.0)])
    eps, t = torch.randn(2, 4, 2), torch.tensor([0.3, 0.8])
    for err, data in zip(stage("05").pair_errors(model, features, a_0, eps, t), a_0):
        a_t, v = common.interpolate(data, eps, t)
        assert torch.allclose(err, common.flow_error(v, model(a_t, t, features)))
    twins = a_0[:1].expand(2, -1, -1, -1)
    assert torch.allclose(*stage("05").pair_errors(model, features, twins, eps, t))


@pytest.mark.parametrize("threshold, easy", [(0.0, 3), (0.5, 2), (0.7, 1), (1.0, 0)])
def test_human_pairs_are_in_stage_2_with_score_c_0_at_any_threshold(threshold, easy):
    auto = [rows.Pair("a", 0, 1, (g, 0, 1 - g), (1 - g, 0, g)) for g in (0.55, 0.8, 0.9)]
    human = [rows.Pair("p", 2, 3, (1, 0, 0), (0, 0, 1))]  # AudioScore agrees fully
    scored = [stage("04").with_score_c(pair) for pair in auto]
    scored += [stage("04").of_people(pair) for pair in human]
    assert [pair.score_c for pair in scored] == pytest.approx([0.1, 0.6, 0.8, 0.0])
    stage1, stage2 = common.split(scored, threshold)
    assert stage2[-1] == rows.SplitPair("p", 2, 3, 0.0, "human")
    assert [pair.source for pair in stage1] == ["auto"] * easy


def test_ablations_of_the_curriculum(tmp_path):
    def stages(*flags):
        args = stage("05").parse_args(arguments(tmp_path, *flags))
        found = stage("05").read_stages(tmp_path, shards, args)
        return [[pair.clip for pair in part] for part in found]

    for name, part in zip(("04_stage1.jsonl", "04_stage2.jsonl"), pairs(3, 2, 2)):
        rows.write(tmp_path / name, part)
    audios = {(pair.clip, k): None for part in pairs(3, 2, 2) for pair in part for k in (0, 1)}
    shards = argparse.Namespace(place_of_audio=audios)
    assert stages() == [["e0", "e1", "e2"], ["h0", "h1", "p0", "p1"]]
    assert stages("--hard-first") == [["h0", "h1", "p0", "p1"], ["e0", "e1", "e2"]]
    assert stages("--no-human") == [["e0", "e1", "e2"], ["h0", "h1"]]
    assert stages("--threshold", "0.3") == [["e0", "e1", "e2", "h0", "h1"], ["p0", "p1"]]
    assert stages("--threshold", "1.0") == [[], ["e0", "e1", "e2", "h0", "h1", "p0", "p1"]]
    assert stages("--threshold", "0.0")[1] == ["p0", "p1"]


def logged(stage_number, accuracy, gap_w, saturated, share):
    """A step of 05's log, `share` of whose gradient's weight lies on wrongly ordered pairs."""
    step = dict.fromkeys(rows.FlowDpoStep.__struct_fields__, 0) | dict(stage=stage_number, loss=0.1)
    step |= dict(accuracy=accuracy, gap_w=gap_w, gap_l=2 * gap_w, ref_w=0.51)
    step |= dict(saturated=saturated, weight=0.2, weight_wrong=0.2 * share)
    return rows.FlowDpoStep(**step)


@pytest.mark.parametrize("case, accuracy, gap_w, saturated, share, backwards", [
    ("healthy", 0.964, 0.226, 0.699, 0.51, 0),
    ("too few pairs", 0.996, 0.959, 0.978, 0.59, 0),
    ("lr too high", 0.962, 2.406, 0.924, 0.90, 0),
    ("beta too large", 0.938, 0.306, 0.932, 0.99, 0),
    ("beta too small", 0.958, 7.710, 0.584, 0.42, 0),
    ("winner's error rises", 0.975, 1.407, 0.846, 0.63, 0),
    ("has hardly learned", 0.52, 0.001, 0.0, 0.49, 0),
    # On pairs whose winner is the worse audio curves are never called healthy:
    ("some pairs are backwards", 0.96, 0.2, 0.6, 0.5, 0.01),
    ("pairs are backwards", 0.96, 0.2, 0.6, 0.5, 1.0),
    ("has hardly learned", 0.52, 0.2, 0.6, 0.5, 0.01),
    ("pairs are backwards", 0.52, 0.2, 0.6, 0.5, 1.0),
])  # fmt: skip
def test_the_last_line_names_the_case_of_docs_curves(
    case, accuracy, gap_w, saturated, share, backwards
):
    last = logged(1, accuracy, gap_w, saturated, share)
    # The shorter stage, and steps before the last 50, do not count.
    log = [logged(1, 0.5, 0.5, 0.5, 1)] * 10 + [last] * 50 + [logged(2, 0.5, 0.5, 0.5, 1)] * 20
    line = stage("05").reading(log, backwards)
    assert line.startswith(f"curves: {case}: ")
    assert (f"score_c is negative for {backwards:.0%}" in line) == case.endswith("backwards")


def test_only_mined_pairs_can_be_backwards():
    human = pair("p", source="human")
    stages = [pair("a", 0.9)], [pair("b", -0.1), pair("c", 0.0), pair("d", 0.1), human, human]
    assert stage("05").share_backwards(stages) == 0.25
    assert stage("05").share_backwards(([], [human])) == 0


@pytest.mark.parametrize("steps, easy, hard, times", [
    (12_000, 40_000, 8_000, 2.0),  # the paper's: 96,000 over 48,000
    (12_000, 4_000, 800, 20.0),  # a tenth of its clips
    (3, 0, 240, 0.1),
])  # fmt: skip
def test_05_says_how_often_its_steps_see_a_pair(steps, easy, hard, times, capsys):
    args = stage("05").parse_args(["--steps", str(steps), "--run-dir", "none"])
    stages = [[pair("a")] * easy, [pair("b")] * hard]
    model = SimpleNamespace(latent_shape=(345, 40), trainable_parameters=list)
    stage_steps = stage("05").divide_steps(stages, steps)
    stage("05").print_plan(model, stages, stage_steps, 0, SimpleNamespace(world=1), args)
    out = capsys.readouterr().out
    assert f"every pair is seen {times} times on average ({steps} steps of 8 pairs over" in out


@pytest.mark.parametrize("score_cs, expected", [
    ([i / 100 for i in range(1, 101)], 0.198),  # .20 to 1.00 are 81 of 100
    ([-0.5] * 10, 0.0),  # --threshold takes none below 0
])  # fmt: skip
def test_04_names_the_threshold_that_makes_81_percent_easy(score_cs, expected):
    assert stage("04").threshold_of_paper_share(torch.tensor(score_cs)) == expected


def test_learning_rate_warms_up_once_and_then_stays():
    args = stage("05").parse_args(["--lr", "8", "--warmup", "4", "--run-dir", "none"])
    assert [training.lr_at(step, args) for step in (0, 1, 3, 4, 11_999)] == [2, 4, 8, 8, 8]


PAPER = {
    "01": dict(num_samples=5, guidance=4.5, max_clips=50_000),
    "02": dict(num_rated_clips=2000),
    "03": dict(num_human_pairs=2000),
    "04": dict(threshold=0.7),
    "05": dict(beta=600, lr=5e-6, warmup=1000, steps=12_000, global_batch=8),
    "06": dict(lr=5e-6, steps=12_000, ema=0),
    "07": dict(guidance=4.5),
}
PAPER["05"] |= dict(sft_weight=0, no_human=False, hard_first=False, ema=0, stratified_t=False)


@pytest.mark.parametrize("number", PAPER)
def test_the_papers_numbers_are_the_defaults(number):
    args = vars(stage(number).parse_args(["--run-dir", "none"]))
    assert {name: args[name] for name in PAPER[number]} == PAPER[number]


def test_an_explicit_flag_wins_over_the_runs_defaults_and_they_over_the_paper(
    finished, tmp_path, capsys
):
    def beta(run, *flags):
        return stage("05").parse_args(arguments(run, *flags)).beta

    assert read_json(finished / "run.json")["defaults"] == stage("00").DEFAULTS["tiny"]
    assert beta(finished) == stage("00").DEFAULTS["tiny"]["05"]["beta"] == 20
    assert "beta 600.0 -> 20.0" in capsys.readouterr().out
    assert beta(finished, "--beta", 600) == 600 and "beta" not in capsys.readouterr().out
    # any run may bring its own
    (tmp_path / "run.json").write_text('{"defaults": {"05": {"beta": 7.5}}}')
    assert beta(tmp_path) == 7.5 and "lr" not in capsys.readouterr().out


# AudioScore's fit (Sec. 2.1)


def made_up_scores(count, seed=0):
    """What scorers measured on `count` audios, 5 per clip, whose rating depends on ib and desync
    alone."""
    generator = torch.Generator().manual_seed(seed)
    names = ("ib", "clap", "desync_s", "pesq")
    measured = {name: torch.randn(count, generator=generator) for name in names}
    measured["pesq"][::2] = float("nan")
    measured["tag_logits"] = torch.randn(count, 4, generator=generator)
    merit = measured["ib"] - measured["desync_s"]
    rating = (merit < 0.7).long() + (merit < -0.7).long()
    clips = [f"clip{i // 5}" for i in range(count)]
    return measured, torch.nn.functional.one_hot(rating, 3).float(), clips


def test_audioscore_learns_ratings_that_its_scores_determine_and_is_judged_on_other_clips():
    measured, target, clips = made_up_scores(200)
    p = stage("02").cross_validate(measured, target, clips, seed=0)
    assert p.isfinite().all()
    accuracy = (p.argmax(dim=1) == target.argmax(dim=1)).float().mean().item()
    majority = target.mean(dim=0).max().item()
    assert accuracy > majority + 0.2
    shuffled = target[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    blind = stage("02").cross_validate(measured, shuffled, clips, seed=0)
    chance = (blind.argmax(dim=1) == shuffled.argmax(dim=1)).float().mean().item()
    assert chance < accuracy - 0.2  # nothing leaks from the held-out clips


def test_a_score_that_never_varied_among_the_rated_audios_does_not_decide_alone_elsewhere():
    measured, target, _ = made_up_scores(40)
    measured["desync_s"][:] = 0.6
    fitted = stage("02").fit(measured, target, seed=0)
    scores = fitted.five_scores(measured)
    scores[:, 2] = 1.0  # DeSync moves in steps of 0.1 s: a handful of audios may share one value
    p = fitted(scores)
    assert fitted.std[2] == 1 and p.max() < 0.9999 and len(p.unique(dim=0)) == 40


def test_a_fold_never_splits_a_clip_nor_a_youtube_video(monkeypatch):
    measured, target, _ = made_up_scores(60)
    clips = [f"abcdefghij{i // 10}_{i % 10:06d}" for i in range(60)]  # 6 videos of 10 clips
    parts, fit = [], stage("02").fit

    def spy(part, share, seed):
        parts.append({round(x, 6) for x in part["ib"].tolist()})
        return fit(part, share, seed, steps=1)

    monkeypatch.setattr(stage("02"), "fit", spy)
    stage("02").cross_validate(measured, target, [*map(inputs.video_of, clips)], seed=0)
    assert len(parts) == 5
    for fitted in parts:
        ib = measured["ib"].tolist()
        used = Counter(clip[:11] for clip, x in zip(clips, ib) if round(x, 6) in fitted)
        assert set(used.values()) == {10}  # whole videos only


def test_of_equally_many_raters_the_worse_rating_counts():
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
    assert stage("02").majority(rows).tolist() == [1, 2, 2, 0]


def test_clips_to_rate_are_the_first_of_a_seeded_permutation():
    order, names = stage("02").drawn_order, {f"c{i:02d}": [] for i in range(40)}
    turned = dict(random.Random(1).sample(sorted(names.items()), 40))
    assert order(names, 0) == order(turned, 0) != order(names, 1)
    assert sorted(order(names, 0)) == sorted(names) and order(names, 0) != sorted(names)


def test_sft_weight_adds_the_winners_own_error(run):
    call("05", run, "--steps", 1, "--out", "plain", "--warmup", 0)
    call("05", run, "--steps", 1, "--out", "sft", "--warmup", 0, "--sft-weight", 2)
    plain, sft = (read(run / out / "log.jsonl")[0]["loss"] for out in ("plain", "sft"))
    assert plain == pytest.approx(LOG_2, abs=1e-6)
    assert sft > plain + 0.1  # 2 x an error of order 1


def test_beta_0_with_sft_weight_is_plain_fine_tuning_on_the_winners(run, monkeypatch):
    def last(out, **swap):
        monkeypatch.setattr(common, "flow_dpo_loss", swap.get("loss", common.flow_dpo_loss))
        call("05", run, "--steps", 3, "--out", out, "--beta", 0, "--sft-weight", 1)
        return (run / out / "policy.pt").read_bytes()

    def no_preference(err_w, *_):
        return 0 * err_w, 0 * err_w

    assert last("sft") == last("winners", loss=no_preference)
