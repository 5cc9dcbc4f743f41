"""Members of a step are dealt to processes and rows so that none computes much longer, and every one is computed once."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from baton.parallel import DataParallel
from baton.training.dealing import ModelSize, deal, rows_of_shares, tree_costs, tree_tokens
from baton.training.steps import StepSampler

LLAMA_1B = ModelSize(body=973_000_000, head=263_000_000, attention=16 * 2048)


def costs_of_pairs(count: int, seed: int = 0) -> np.ndarray:
    """Costs of pairs as long as those of chat data: some hundred tokens, a few of them many times longer."""
    rng = np.random.default_rng(seed)
    prompts, responses = (
        np.exp(rng.normal(mean, 0.8, size)).astype(np.int64) + 1 for mean, size in ((4, count), (5.5, (count, 2)))
    )
    return tree_costs(prompts, responses, LLAMA_1B)


@pytest.mark.parametrize("processes", [2, 8, 64])
@pytest.mark.parametrize("pairs", [8, 16, 64])
def test_from_eight_pairs_a_process_on_the_longest_is_at_most_a_twentieth_above_the_mean(processes, pairs):
    for seed in range(3):
        costs = costs_of_pairs(processes * pairs, seed)
        loads = [costs[share].sum() for share in deal(costs.tolist(), processes)]
        assert max(loads) <= max(1.05 * np.mean(loads), 1.01 * costs.max())


def test_what_a_better_division_would_take_from_the_longest_is_found_by_swaps():
    assert sorted(map(sorted, deal([8, 7, 6, 5, 4], 2))) == [[0, 1], [2, 3, 4]]  # the costliest first alone: 17 and 13


numbers = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


@given(numbers, st.integers(1, 9), st.one_of(st.none(), st.integers(1, 4000)))
def test_every_member_is_in_one_row_of_one_share_and_only_single_members_are_longer_than_a_row(tokens, count, most):
    shares = deal(tokens, count)
    divided = rows_of_shares(shares, tokens, most)
    assert sorted(chain(*shares)) == list(range(len(tokens)))
    assert [sorted(chain(*rows)) for rows in divided] == shares
    assert len({len(rows) for rows in divided}) == 1
    for row in chain(*divided):
        assert most is None or len(row) < 2 or sum(tokens[member] for member in row) <= most


def test_a_tree_costs_its_tokens_the_heads_and_what_attention_sees():
    prompts, responses = np.array([3, 2]), np.array([[2, 4], [0, 1]])
    assert tree_tokens(prompts, responses).tolist() == [3 + 1 + 3, 2]
    # tokens + 6 scored * 10/100 of the head + 2 * 5/100 a token seen: 6 in the prompt, 3 + 1 and 9 + 6 in the responses
    assert tree_costs(prompts, responses, ModelSize(100, 10, 5)).tolist() == [7000 + 600 + 2500, 2000 + 100 + 300]


@given(numbers, st.integers(1, 12), st.one_of(st.none(), st.integers(1, 4000)), st.booleans())
def test_steps_are_the_same_members_in_any_number_of_processes(tokens, size, most, drop_last):
    tokens = np.array(tokens)
    amounts = {"pairs": np.ones(len(tokens)), "tokens": tokens}
    wanted = [range(len(tokens))[start : start + size] for start in range(0, len(tokens), size)]
    wanted = [step for step in wanted if len(step) == size or not drop_last]
    for count in (1, 3):
        of_process = []
        for rank in range(count):
            order, process = SequentialSampler(tokens), DataParallel(rank, count)
            sampler = StepSampler(order, size, tokens, tokens, amounts, most, drop_last, process)
            of_process.append(list(sampler))
            assert len(sampler) == len(of_process[-1]) == len(wanted)
        for members, steps in zip(wanted, zip(*of_process, strict=True), strict=True):
            assert len({len(rows) for rows in steps}) == 1
            rows = list(chain(*steps))
            counted = Counter(member for row in rows if row.shares["pairs"] for member in row.members)
            assert counted == Counter(members)
            assert all(row.members and set(row.members) <= set(members) for row in rows)
            for name in amounts:
                assert sum(row.shares[name] for row in rows) == pytest.approx(count)
