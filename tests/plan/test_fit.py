"""Cutting a step: what is chosen fits, is the quickest that does, and gets no slower with more memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.plan.amount import Amount
from finetune.plan.fit import (
    RESERVE,
    Wish,
    budget,
    candidates,
    changes_that_fit,
    cut_as,
    fitted,
    largest_micro_batch,
    longest_sequence,
)
from finetune.plan.gpus import GIB, Card, cards, find_card
from finetune.plan.memory import evaluation_memory, training_memory
from finetune.plan.setup import Fit, Kernels, Setup
from finetune.plan.shape import shape_of

from .test_time import ALL, LLAMA_3_8B

LLAMA_3_1B = shape_of(
    {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "test",
)
CHATS = Amount(
    lengths=(50, 300, 2000), counts=(500, 300, 20), supervised=60_000, row=700, longest_row=2000, counted=True
)
EFFECTIVE = 16


def setup_for(**changes: Any) -> Setup:
    default = Setup(
        shape=LLAMA_3_8B,
        quantization="nf4",
        rank=16,
        targets="all-linear",
        optimizer="adamw",
        dtype_bytes=2,
        micro_batch=2,
        sequence=CHATS.longest,
        row=CHATS.longest_row,
        supervised=CHATS.share,
        recomputed=32,
        offload=False,
        kernels=ALL,
    )
    return replace(default, **changes)


def fit(setup: Setup, memory: float, card: Card | None = None, **keep: Any) -> Fit | None:
    card = card or find_card("rtx-4090")
    return fitted(setup, CHATS, EFFECTIVE, int(memory), card, **({"evaluated": False} | keep))


def seconds(setup: Setup, found: Fit, card: Card) -> float:
    every = candidates(setup, CHATS, EFFECTIVE, False, None, None)
    return next(one for one in every if one.fit == found).seconds_a_sequence(card)


setups = st.builds(
    setup_for,
    shape=st.sampled_from([LLAMA_3_8B, LLAMA_3_1B]),
    quantization=st.sampled_from(["nf4", "none"]),
    kernels=st.builds(
        Kernels, st.sampled_from(["varlen", "sdpa"]), st.just(True), st.booleans(), st.booleans()
    ),
)  # fmt: skip


@settings(max_examples=15)
@given(setup=setups, memory=st.floats(5, 100), card=st.sampled_from(cards()))
def test_what_is_chosen_fits_and_keeps_the_step(setup: Setup, memory: float, card: Card) -> None:
    found = fit(setup, memory * GIB, card)
    if found is None:
        everything = replace(setup, micro_batch=1, recomputed=setup.shape.layers, offload=True)
        assert training_memory(everything).total > memory * GIB
        return
    assert found.micro_batch * found.accumulation == EFFECTIVE
    assert 0 <= found.recomputed <= setup.shape.layers
    assert training_memory(cut_as(setup, found, CHATS)).total <= memory * GIB


@settings(max_examples=15)
@given(setup=setups, memories=st.tuples(st.floats(5, 100), st.floats(5, 100)), card=st.sampled_from(cards()))
def test_more_memory_is_never_slower(setup: Setup, memories: tuple[float, float], card: Card) -> None:
    less, more = (fit(setup, memory * GIB, card) for memory in sorted(memories))
    if less is not None:
        assert more is not None
        assert seconds(setup, more, card) <= seconds(setup, less, card)


def test_nothing_that_fits_is_quicker() -> None:
    setup, card, memory = setup_for(), find_card("rtx-4090"), 16 * GIB
    found = fit(setup, memory, card)
    assert found is not None
    fitting = [one for one in candidates(setup, CHATS, EFFECTIVE, False, None, None) if one.memory <= memory]
    assert 10 < len(fitting) < len(candidates(setup, CHATS, EFFECTIVE, False, None, None))
    assert seconds(setup, found, card) == min(one.seconds_a_sequence(card) for one in fitting)


def test_with_memory_to_spare_nothing_is_recomputed_or_offloaded() -> None:
    found = fit(setup_for(), 1000 * GIB)
    assert found == Fit(EFFECTIVE, 1, recomputed=0, offload=False)


def test_some_layers_are_recomputed_where_all_need_not_be() -> None:
    setup = setup_for(micro_batch=1)
    none, every = (training_memory(replace(setup, recomputed=count)).total for count in (0, 32))
    found = fit(setup, (none + every) / 2)
    assert found is not None
    assert 0 < found.recomputed < 32


def test_what_the_config_says_is_kept() -> None:
    found = fit(setup_for(), 200 * GIB, keep_recomputed=32, keep_offload=True)
    assert found is not None
    assert (found.recomputed, found.offload) == (32, True)
    assert fit(setup_for(), 7 * GIB, keep_recomputed=0) is None


def test_the_largest_micro_batch_is_that_of_the_data() -> None:
    """End to end, the longest sequences together; padded, each as long as the longest. No more than there are."""
    setup = setup_for()
    end_to_end = cut_as(setup, Fit(100, 1, 0, False), CHATS)
    assert end_to_end.tokens == 20 * 2000 + 80 * 300
    padded = cut_as(replace(setup, kernels=replace(ALL, attention="sdpa")), Fit(100, 1, 0, False), CHATS)
    assert padded.tokens == 100 * 2000
    assert padded.pairs == 100 * 2000**2
    assert cut_as(setup, Fit(4096, 1, 0, False), CHATS).tokens == CHATS.tokens
    assert cut_as(setup, Fit(1, 100, 0, False), CHATS).tokens == 2000
    assert training_memory(end_to_end).total < training_memory(cut_as(setup, Fit(100, 1, 0, False))).total


def test_absurd_numbers_take_no_longer() -> None:
    setup = setup_for(shape=replace(LLAMA_3_1B, layers=4096))
    found = candidates(setup, CHATS, 2**30, False, None, None)
    assert len(found) < 13 * 130 * 2
    assert {one.fit.recomputed for one in found} >= {0, 4096}
    assert max(one.fit.micro_batch for one in found) == 4096
    assert all(one.fit.micro_batch * one.fit.accumulation == 2**30 for one in found)


def test_the_evaluation_has_to_fit_too() -> None:
    setup = setup_for()
    evaluation = evaluation_memory(setup)
    smallest = training_memory(replace(setup, micro_batch=1, offload=True)).total
    assert fit(setup, max(evaluation, smallest), evaluated=True) is not None
    assert fit(setup, evaluation - 1, evaluated=True) is None


def test_a_reserve_and_what_others_use_are_left_alone() -> None:
    card = replace(find_card("rtx-4090"), in_use=2 * GIB)
    assert budget(card) == pytest.approx(card.memory * (1 - RESERVE) - 2 * GIB, abs=1)


# -- what would have to change ------------------------------------------------------------------------------------


def changes(setup: Setup, memory: float, **keep: Any) -> tuple[str, ...] | None:
    wish = Wish(setup, CHATS, alpha=2.0 * setup.rank, **keep)
    found = changes_that_fit(wish, EFFECTIVE, int(memory), find_card("rtx-4090"), evaluated=False)
    if found is None:
        return None
    assert training_memory(cut_as(found.wish.setup, found.fit, found.wish.amount)).total <= memory
    assert found.wish.alpha == 2 * found.wish.setup.rank  # what the adapter adds is scaled as before
    return found.changes


def least(**others: Any) -> int:
    """Bytes of the smallest cut."""
    return training_memory(setup_for(**{"micro_batch": 1, "offload": True} | others)).total


def test_the_gentlest_change_that_helps_is_the_one_proposed() -> None:
    assert changes(setup_for(), 12 * GIB, recomputed=0) == ("train.gradient_checkpointing=auto",)
    assert changes(setup_for(quantization="none"), 12 * GIB) == ("quantization=nf4",)
    assert changes(setup_for(), least() - 1) == ("train.sequence_length=1024",)
    short = least(sequence=500, row=500)
    assert changes(setup_for(), short - 1) == ("lora.rank=8", "lora.alpha=16")  # which is enough alone
    both = least(sequence=500, row=500, rank=8)
    assert changes(setup_for(), both) == ("train.sequence_length=512", "lora.rank=8", "lora.alpha=16")


def test_the_rank_is_halved_as_often_as_it_takes_and_alpha_with_it() -> None:
    found = changes(setup_for(rank=1024), least(rank=200))
    assert found == ("lora.rank=128", "lora.alpha=256")
    assert changes(setup_for(rank=256), least(rank=65)) == ("lora.rank=64", "lora.alpha=128")


def test_changes_that_turn_out_not_to_be_needed_are_not_proposed() -> None:
    # Without offload and recomputation left to the plan it would fit in nf4 just as well.
    room = training_memory(setup_for(micro_batch=1, recomputed=0, sequence=2000, row=2000)).total
    assert changes(setup_for(quantization="none"), room, recomputed=0, offload=False) == ("quantization=nf4",)
    cut = Fit(1, EFFECTIVE, 0, False)
    assert changes(setup_for(quantization="none"), room, cut=cut) == ("quantization=nf4",)
    # A lower rank is what it takes; shorter sequences alone did not help, and with it are not needed.
    assert changes(setup_for(rank=1024), least(rank=512)) == ("lora.rank=512", "lora.alpha=1024")


def test_where_nothing_helps_nothing_is_proposed() -> None:
    assert changes(setup_for(), 3 * GIB) is None


# -- how large it could be ----------------------------------------------------------------------------------------


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    setup, memory = setup_for(), 16 * GIB
    count = largest_micro_batch(setup, memory)
    assert count > 1
    assert training_memory(replace(setup, micro_batch=count)).total <= memory
    assert training_memory(replace(setup, micro_batch=count + 1)).total > memory
    assert largest_micro_batch(setup, 2 * GIB) == 0


def test_the_longest_sequence_is_the_last_that_fits() -> None:
    setup, memory = setup_for(micro_batch=1), 7 * GIB
    tokens = longest_sequence(setup, memory)
    assert 0 < tokens < setup.shape.context
    assert training_memory(replace(setup, sequence=tokens, row=tokens)).total <= memory
    assert training_memory(replace(setup, sequence=tokens + 1, row=tokens + 1)).total > memory
    assert longest_sequence(setup, 1000 * GIB) == setup.shape.context
