"""The mathematics of PPO and its kin: cases computed by hand, parts against the whole, and the last PPO of TRL."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo import shaping
from ppo.advantages import (
    gae,
    grpo,
    reinforce_pp,
    rloo,
    spread,
    token_moments,
    token_rewards,
    variance,
    whitened,
)
from ppo.losses import (
    AdaptiveKL,
    explained_variance,
    importance_weights,
    kl_estimate,
    policy_loss,
    sequence_mask,
    sequence_ratio,
    value_loss,
)
from tests.training.trl_ppo import SETTINGS, batch

# Of `python tests/training/trl_ppo.py` with TRL 1.12.0 and torch 2.13.0.
TRL = {
    "k1": """
        kl: 0.709147 0.136444 -1.27595 0.730213 0.212293 -0.884494 -0.526578 -0.050892 0 0 -0.930215 0.736236 0 0 0
        rewards: -0.070915 -0.013644 0.127595 -0.073021 1.47877 0.088449 0.052658 0.005089 -0.5 0 0.093022 -0.073624 0.25 0 0
        advantages: 0.402957 0.454896 1.0903 -0.445324 1.47128 -1.07304 -0.503798 -1.85584 0 0 -0.020134 0.478707 0 0 0
        returns: 0.579444 0.845558 1.10747 1.11923 1.47877 -0.338711 -0.335618 -0.394719 -0.5 0 -0.063403 0.015569 0.25 0 0
        gradient of new_logprobs: -0.024169 -0.027329 0 0.043965 -0.083444 0.245785 0 0 0 0 0.002659 -0.050478 0 0 0
        gradient of vpred: -0.071746 -0.079678 0 0 -0.112832 -0.034553 -0.060391 0.000436 0 0 0 -0.078446 -0.079918 0 0
        pg_loss: 0.164925
        vf_loss: 1.28056
        vf_clipfrac: 0.333333
    """,
    "k3": """
        kl: 0.201211 0.008899 1.30616 0.21202 0.021021 0.537265 0.16655 0.001317 0 0 0.604839 0.215149 0 0 0
        rewards: -0.020121 -0.00089 -0.130616 -0.021202 1.4979 -0.053727 -0.016655 -0.000132 -0.5 0 -0.060484 -0.021515 0.25 0 0
        advantages: 0.375248 0.330381 0.911378 -0.255045 1.58577 -1.25328 -0.506453 -1.75916 0 0 -0.071333 0.64249 0 0 0
        returns: 0.49017 0.685113 0.909079 1.18775 1.4979 -0.545376 -0.409489 -0.39994 -0.5 0 -0.171418 0.067677 0.25 0 0
        gradient of new_logprobs: -0.022507 -0.019848 0 0.025179 -0.089937 0.287069 0 0 0 0 0.00942 -0.067749 0 0 0
        gradient of vpred: -0.068026 -0.072993 0 0 -0.113629 -0.025942 -0.057313 0.000654 0 0 0 -0.080617 -0.079918 0 0
        pg_loss: 0.193511
        vf_loss: 1.19826
        vf_clipfrac: 0.333333
    """,
}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def mask_of(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float32), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", TRL)
def test_ppo_is_that_of_trl_in_rewards_advantages_losses_and_gradients(kind):
    expected = {
        name: tensor(*map(float, numbers.split()))
        for name, numbers in (line.strip().split(": ") for line in TRL[kind].strip().splitlines())
    }
    given, s = batch(), SETTINGS
    mask = torch.arange(5) < given["lengths"][:, None]
    # TRL puts the score, and a value, one token after the last one where there is room
    longer = torch.arange(5) <= given["lengths"][:, None]
    kl = kl_estimate(given["logprobs"], given["ref_logprobs"], kind) * mask
    rewards = token_rewards(given["scores"], kl, longer, s["kl_coef"])
    values = given["values"] * longer
    advantages, returns = gae(rewards, values, longer, torch.zeros(3, dtype=torch.bool), s["gamma"], s["lam"])
    advantages = whitened(advantages, mask)
    logps, new_values = given["new_logprobs"].requires_grad_(), given["vpred"].requires_grad_()
    losses, _ = policy_loss(logps, given["logprobs"], advantages, s["cliprange"], s["cliprange"])
    value_losses, held = value_loss(new_values, values, returns, s["cliprange_value"])
    pg_loss, vf_loss = losses[mask].mean(), value_losses[longer].mean()
    (pg_loss + s["vf_coef"] * vf_loss).backward()
    found = {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns, "pg_loss": pg_loss, "vf_loss": vf_loss}
    found |= {"gradient of new_logprobs": logps.grad, "gradient of vpred": new_values.grad}
    found |= {"vf_clipfrac": held[longer].float().mean()}
    assert set(found) == set(expected)
    for name, numbers in found.items():
        close(numbers.flatten(), expected[name], 1e-4)


def test_the_score_stands_at_the_last_token_and_the_penalty_at_every_one():
    kl = tensor([0.5, 1.0, math.nan], [0.2, math.inf, 0.0], [1.0, 1.0, 1.0])
    found = token_rewards(tensor(3.0, -2.0, 5.0), kl, torch.arange(3) < torch.tensor([[2], [1], [0]]), 0.1)
    close(found, [[-0.05, 2.9, 0.0], [-2.02, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_gae_bootstraps_what_was_cut_off_from_its_last_value_and_what_stopped_from_nothing():
    rewards, values = tensor([1.0, 2.0, 9.0], [1.0, 2.0, 9.0]), tensor([0.5, 0.25, 9.0], [0.5, 0.25, 9.0])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, False]] * 2), torch.tensor([False, True]), 0.9, 0.5)
    # delta_1 = 2 - 0.25, or 2 + 0.9 * 0.25 - 0.25; delta_0 = 1 + 0.9 * 0.25 - 0.5; A_0 = delta_0 + 0.45 * delta_1
    close(advantages, [[0.725 + 0.45 * 1.75, 1.75, 0.0], [0.725 + 0.45 * 1.975, 1.975, 0.0]])
    close(returns, advantages + values * tensor(1.0, 1.0, 0.0))


@given(st.integers(1, 17), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 9999))
def test_gae_is_its_recursion_for_every_length(length, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, length, generator=generator), torch.randn(2, length, generator=generator)
    lengths, truncated = torch.tensor([length, (length + 1) // 2]), torch.tensor([True, False])
    mask = torch.arange(length) < lengths[:, None]
    found, _ = gae(rewards, values, mask, truncated, gamma, lam)
    for row in range(2):
        last = int(lengths[row]) - 1
        following, advantage = (values[row, last] if truncated[row] else 0.0), 0.0
        for t in range(last, -1, -1):
            advantage = rewards[row, t] + gamma * following - values[row, t] + gamma * lam * advantage
            following = values[row, t]
            assert found[row, t] == pytest.approx(float(advantage), abs=1e-4)


def test_a_return_to_go_is_the_discounted_sum_of_later_rewards():
    rewards = tensor([1.0, 2.0, 4.0], [1.0, 2.0, math.nan])
    close(reinforce_pp(rewards, mask_of(3, 2), 0.5), [[3.0, 4.0, 4.0], [2.0, 2.0, 0.0]])


def test_a_sample_is_compared_with_the_others_of_its_prompt():
    scores, groups = tensor(1.0, 7.0, 2.0, 6.0, 5.0), torch.tensor([8, 3, 8, 8, 5])
    close(rloo(scores, groups), [1 - 4, 0, 2 - 3.5, 6 - 1.5, 0])
    close(grpo(scores, groups, scale=False), [-2, 0, -1, 3, 0])
    close(grpo(scores, groups), torch.tensor([-2.0, 0, -1, 3, 0]) / (7**0.5 + 1e-4))
    close(grpo(tensor(0.1, 0.1, 0.1), torch.zeros(3, dtype=torch.int64)), [0, 0, 0], 1e-9)
    close(spread(tensor(2.0, -1.0), mask_of(1, 3)), [[2, 0, 0], [-1, -1, -1]])


@given(st.integers(2, 30), st.integers(1, 29), st.integers(0, 9999))
def test_parts_that_share_their_moments_are_whitened_as_the_whole(count, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    values, mask = torch.randn(count, 3, generator=generator) * 5 + 100, torch.rand(count, 3, generator=generator) < 0.7
    mask[0], cut = True, min(cut, count - 1)
    whole = whitened(values, mask)
    parts = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
    moments = sum(token_moments(*part) for part in parts)
    close(torch.cat([whitened(*part, moments) for part in parts]), whole, 1e-5)
    assert whole[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert whole[mask].std().item() == pytest.approx(1, abs=1e-4)
    assert not whole[~mask].any()
    assert variance(moments).item() == pytest.approx(values[mask].var().item(), rel=1e-3)


def test_one_token_or_none_is_whitened_to_0():
    close(whitened(tensor([3.0, 9.0]), torch.tensor([[True, False]])), [[0.0, 0.0]])
    close(whitened(tensor([3.0, 9.0]), torch.tensor([[False, False]])), [[0.0, 0.0]])


def test_kl_estimates_agree_with_the_kl_and_k2_has_its_gradient():
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    kl = (logps.exp() * (logps - reference)).sum()
    gradient = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    expected = {kind: (logps.detach().exp() * kl_estimate(logps, reference, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], kl)
    torch.testing.assert_close(expected["k3"], kl)
    assert expected["k2"].item() == pytest.approx(kl.item(), rel=0.1)
    of_k1, of_k2 = (torch.autograd.grad(expected[kind], logits, retain_graph=True)[0] for kind in ("k1", "k2"))
    torch.testing.assert_close(of_k2, gradient)
    torch.testing.assert_close(of_k1, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logps, reference, "k4")


def test_the_policy_loss_is_held_by_each_of_its_bounds():
    ratios = [1.1, 1.5, 0.5, 1.5, 0.5, 5.0]
    advantages = tensor(1.0, 1.0, 1.0, -1.0, -1.0, -1.0)
    logps = torch.tensor(ratios).log().requires_grad_()
    loss, clipped = policy_loss(logps, torch.zeros(6), advantages, 0.2, 0.28)
    close(loss.detach(), [-1.1, -1.28, -0.5, 1.5, 0.8, 5.0])
    assert clipped.tolist() == [False, True, False, False, True, False]
    loss.sum().backward()
    close(logps.grad, [-1.1, 0.0, -0.5, 1.5, 0.0, 5.0])
    loss, clipped = policy_loss(logps, torch.zeros(6), advantages, 0.2, 0.28, dual_clip=3.0)
    close(loss.detach(), [-1.1, -1.28, -0.5, 1.5, 0.8, 3.0])
    assert clipped.tolist() == [False, True, False, False, True, True]


def test_a_ratio_beyond_all_bounds_leaves_no_nan():
    logps = tensor(500.0, 500.0, 500.0).requires_grad_()
    loss, _ = policy_loss(logps, torch.zeros(3), tensor(1.0, 0.0, -1.0), 0.2, 0.2)
    (loss.sum() + kl_estimate(-logps, torch.zeros(3), "k3").sum()).backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()


def test_a_sequence_has_one_ratio_whose_gradient_is_that_of_its_tokens():
    logps, old = tensor(-1.0, -2.0, -3.0, -1.0).requires_grad_(), tensor(-1.5, -2.5, -2.0, -2.0)
    sequences = torch.tensor([4, 4, 4, 9])
    ratio = sequence_ratio(logps, old, sequences)
    close(ratio.detach(), [0.0, 0.0, 0.0, 1.0])
    loss, _ = policy_loss(ratio, torch.zeros(4), tensor(1.0, 2.0, 3.0, 1.0), 9.0, 9.0)
    loss.sum().backward()
    close(logps.grad, [-1.0, -2.0, -3.0, -math.e])
    square = sequence_ratio(logps.detach().view(2, 2), old.view(2, 2), sequences.view(2, 2))
    close(square, [[0.0, 0.0], [0.0, 1.0]])


def test_a_value_that_moved_beyond_the_bound_has_no_gradient():
    values = tensor(1.0, 0.5, 0.5).requires_grad_()
    loss, clipped = value_loss(values, torch.zeros(3), tensor(2.0, 2.0, -1.0), 0.2)
    close(loss.detach(), [0.5 * 1.8**2, 0.5 * 1.8**2, 0.5 * 1.5**2])
    assert clipped.tolist() == [True, True, False]
    loss.sum().backward()
    close(values.grad, [0.0, 0.0, 1.5])
    close(value_loss(values.detach(), torch.zeros(3), tensor(2.0, 2.0, -1.0), None)[0], [0.5, 1.125, 1.125])


def test_what_the_sampler_saw_otherwise_is_weighted_and_sequences_too_far_are_left_out():
    old, sampler = tensor(-1.0, -1.0, -4.0, -2.0), tensor(-1.0, -3.0, -3.0, -1.0)
    close(importance_weights(old, sampler, 2.0), [1.0, 2.0, math.exp(-1), math.exp(-1)])
    sequences = torch.tensor([0, 0, 0, 1])  # mean log-ratios 1/3 and -1
    assert sequence_mask(old, sampler, sequences, 0.5, 2.0).tolist() == [True, True, True, False]
    assert sequence_mask(old, sampler, sequences, 0.3, 1.1).tolist() == [False, False, False, True]


def test_explained_variance_is_1_for_the_returns_0_for_a_constant_and_unknown_where_returns_are_equal():
    returns, mask = tensor([1.0, 2.0, 4.0], [3.0, 0.0, 99.0]), mask_of(3, 2)
    close(explained_variance(returns + 7, returns, mask), 1.0)
    close(explained_variance(torch.ones(2, 3), returns, mask), 0.0)
    assert explained_variance(returns, torch.ones(2, 3), mask).isnan()


def test_the_kl_coefficient_follows_its_target_and_goes_on_from_its_state():
    fixed, adaptive = AdaptiveKL(0.1), AdaptiveKL(0.1, target=6.0, horizon=1000)
    fixed.update(99.0, 100)
    adaptive.update(6.6, 100)  # 10 % above
    assert (fixed.coefficient, adaptive.coefficient) == (0.1, pytest.approx(0.1 * 1.01))
    again = AdaptiveKL(0.5, target=6.0, horizon=1000)
    again.load(adaptive.state())
    again.update(0.0, 500)  # a fifth at most
    assert again.coefficient == pytest.approx(0.1 * 1.01 * 0.9)
    again.update(0.0, 6000)  # as in a step of many samples
    assert again.coefficient == pytest.approx(0.1 * 1.01 * 0.9 * 0.8)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40), st.integers(0, 40))
def test_scores_in_parts_have_the_moments_of_all_scores(scores, cut):
    all_scores = torch.tensor(scores)
    moments = shaping.NO_SCORES
    for part in (all_scores[:cut], all_scores[cut:]):
        moments = shaping.with_scores(moments, part)
    assert moments["count"] == len(scores)
    assert moments["mean"] == pytest.approx(all_scores.double().mean().item(), abs=1e-9)
    assert moments["m2"] == pytest.approx(((all_scores.double() - all_scores.double().mean()) ** 2).sum().item(), abs=1e-6)


def test_scores_are_normalised_by_all_so_far_or_by_their_prompt():
    moments = shaping.with_scores(shaping.NO_SCORES, tensor(1.0, 3.0, 5.0))
    close(shaping.normalised(tensor(3.0, 7.0), moments), [0.0, 2.0])
    close(shaping.normalised(tensor(3.0), shaping.with_scores(shaping.NO_SCORES, tensor(2.0))), [1.0])
    groups = torch.tensor([0, 0, 1, 1])
    close(shaping.normalised_by_prompt(tensor(1.0, 3.0, 5.0, 5.0), groups), [-(0.5**0.5), 0.5**0.5, 0.0, 0.0], 1e-3)


def test_scores_are_held_and_length_costs():
    scores = tensor(-9.0, 0.5, 9.0)
    close(shaping.clip(scores, -1.0, 2.0), [-1.0, 0.5, 2.0])
    close(shaping.clip(scores, high=2.0), [-9.0, 0.5, 2.0])
    close(shaping.clip(scores), scores)
    close(shaping.truncation_penalty(scores, ["stop", "length", None], 1.5), [-9.0, -1.0, 9.0])
    close(shaping.overlong_penalty(torch.zeros(3), torch.tensor([80, 95, 120]), 100, 20, 2.0), [0.0, -1.5, -2.0])
    close(shaping.length_penalty(scores, torch.tensor([10, 0, 100]), 0.01), [-9.1, 0.5, 8.0])
