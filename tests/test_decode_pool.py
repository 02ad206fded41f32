"""Decodes in lockstep: sums that are kept agree with what every member does by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.decode_pool import DecodePool
from policies.request import Request

BLOCK = 4


def pool_of(prompts: list[int], output_tokens: int = 100) -> DecodePool:
    """Requests that have completed their prefills: the first token is out, and not in the cache yet."""
    pool = DecodePool(BLOCK)
    for place, prompt in enumerate(prompts):
        request = Request(place, 0.0, prompt, output_tokens)
        request.completed_tokens = request.scheduled_tokens = prompt
        request.generated_tokens = 1
        request.last_token_s = 0.0
        pool.add(request)
    return pool


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 40))
def test_blocks_of_a_run_are_those_of_each_member(prompts: list[int], steps: int, before: int) -> None:
    pool = pool_of(prompts)
    pool.advance(before, 1.0)
    tokens = [prompt + before for prompt in prompts]
    by_hand = sum(-(-(length + steps) // BLOCK) + -length // BLOCK for length in tokens)
    assert pool.blocks_for(steps) == by_hand


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 60))
def test_as_many_steps_as_there_are_blocks_for(prompts: list[int], most: int, blocks: int) -> None:
    pool = pool_of(prompts)
    fitting = [steps for steps in range(1, most + 1) if pool.blocks_for(steps) <= blocks]
    assert pool.steps_within(blocks, most) == max(fitting, default=1)
