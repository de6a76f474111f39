"""A config, a shape and an amount of data become an estimate; padding and steps are those of the real thing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Trainer, TrainingArguments

from finetune.config.schema import Train
from finetune.data.prepare import prepare
from finetune.model.base import _attention
from finetune.model.kernels.attention import supports_varlen
from finetune.plan.amount import Amount, amount_of, guessed_amount, sequences_in, steps_in_all, typical
from finetune.plan.estimate import as_written, chosen_fit, estimate, expected_kernels, kept_offload, setup_of
from finetune.plan.fit import cut_as
from finetune.plan.gpus import find_card
from finetune.plan.setup import Fit
from finetune.plan.shape import FAMILIES, shape_of
from finetune.plan.time import work_of
from finetune.train.batches import longest, sequence_lengths

from .test_disk import config_for
from .test_fit import CHATS, LLAMA_3_1B, setup_for
from .test_time import ALL, LLAMA_3_8B

ROOT = Path(__file__).parents[2]
CARD = find_card("rtx-4090")

# -- the amount of data -------------------------------------------------------------------------------------------

amounts = st.dictionaries(st.integers(1, 5000), st.integers(1, 300), min_size=1, max_size=20).map(
    lambda found: Amount(
        lengths=tuple(sorted(found)),
        counts=tuple(found[key] for key in sorted(found)),
        supervised=1,
        row=1,
        longest_row=max(found),
        counted=True,
    )
)


def test_padding_is_what_random_micro_batches_have() -> None:
    draw = random.Random(0)
    lengths = [length for length, count in zip(CHATS.lengths, CHATS.counts, strict=True) for _ in range(count)]
    for micro in (1, 2, 8):
        means = [max(draw.sample(lengths, micro)) for _ in range(20_000)]
        assert CHATS.padded(micro) == pytest.approx(sum(means) / len(means), rel=0.03)  # its standard error is 1 %


@given(amount=amounts)
def test_padding_grows_with_the_micro_batch(amount: Amount) -> None:
    assert amount.padded(1) == pytest.approx(amount.tokens / amount.sequences)
    found = [amount.padded(micro) for micro in (1, 2, 4, 64)]
    assert found == sorted(found)
    assert found[-1] <= amount.longest * (1 + 1e-9)


@given(amount=amounts, limit=st.integers(8, 5000))
def test_shorter_sequences_hold_all_tokens(amount: Amount, limit: int) -> None:
    short = amount.shortened(limit)
    assert short.longest <= limit
    # Pieces of equal length: rounding adds less than a token to each.
    assert amount.tokens <= short.tokens < amount.tokens + short.sequences
    assert list(short.lengths) == sorted(short.lengths)


@pytest.mark.parametrize("packing", [True, False])
def test_prepared_data_is_counted(packing: bool, tmp_path: Path) -> None:
    base = ROOT / "data" / "samples" / "quickstart-base"
    train = {"packing": packing, "sequence_length": 256}
    rows = ROOT / "data" / "samples" / "contract-clauses-heldout.jsonl"
    config = config_for(base=str(base), data=[{"path": str(rows)}], train=train)
    data = prepare(config, base, cache=tmp_path)
    amount = amount_of(data)
    assert (amount.sequences, amount.tokens) == (data.sequences, data.tokens)
    assert amount.supervised == data.supervised_tokens
    assert amount.longest_row == max(len(row.ids) for row in data.train)
    assert (amount.longest > amount.longest_row) == packing
    squares = sum(len(row.ids) ** 2 for row in data.train)
    assert amount.row == round(squares / data.tokens)
    lengths = sequence_lengths(data)
    for count in (1, 3, 10, 10_000):
        tried = sum(int(lengths[number]) for number in longest(lengths, count))  # by training, before its first step
        assert amount.most(count, together=True) == tried
        assert amount.most(count, together=False) == amount.longest * min(count, len(lengths))


@pytest.mark.parametrize("packing", [True, False])
def test_a_guess_is_about_the_characters_and_on_the_safe_side(packing: bool) -> None:
    train = Train(packing=packing, sequence_length=1024)
    amount = guessed_amount(characters=400_000, rows=500, train=train)
    assert amount.tokens == pytest.approx(100_000, rel=0.02)
    assert (amount.longest, amount.row) == (1024, 200)
    assert amount.share == 1
    assert not amount.counted
    long = guessed_amount(characters=400_000, rows=10, train=train)
    assert long.longest == long.row == 1024


@pytest.mark.parametrize("train", [{}, {"epochs": 0.5}, {"max_steps": 7}, {"micro_batch_size": 5}, {"epochs": 2.5}])
@pytest.mark.parametrize("sequences", [1, 15, 16, 17, 1000])
def test_steps_are_those_of_training(train: dict[str, Any], sequences: int, tmp_path: Path) -> None:
    """transformers' own count, from a data loader of so many batches (Trainer.set_initial_training_values)."""
    config = config_for(train=train)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=config.train.epochs,
        max_steps=config.train.max_steps or -1,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
    )
    batches = range(-(-sequences // config.train.micro_batch_size))
    trainer: Any = SimpleNamespace(
        num_examples=lambda _: sequences, get_total_train_batch_size=lambda _: 1, get_sp_size=int
    )
    counted = Trainer.set_initial_training_values(trainer, arguments, batches)
    assert steps_in_all(sequences, config.train) == counted[-1]


@given(sequences=st.integers(1, 60), steps=st.integers(1, 40), micro=st.integers(1, 5), accumulation=st.integers(1, 5))
def test_sequences_of_so_many_steps_are_those_that_are_drawn(
    sequences: int, steps: int, micro: int, accumulation: int
) -> None:
    train = Train(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    drawn = 0
    for step in range(steps):
        first = step % -(-sequences // (micro * accumulation)) * micro * accumulation
        drawn += min(sequences, first + micro * accumulation) - first
    assert sequences_in(steps, sequences, train) == drawn


def test_the_typical_micro_batch_has_the_padding_of_its_kind() -> None:
    mean = CHATS.tokens / CHATS.sequences
    together = typical(setup_for(micro_batch=8), CHATS)
    assert (together.sequence, together.supervised) == (round(mean), pytest.approx(CHATS.share))
    padded = typical(setup_for(micro_batch=8, kernels=replace(ALL, attention="sdpa")), CHATS)
    assert padded.sequence == round(CHATS.padded(8)) > 2 * mean
    # Of every sequence's tokens as many carry loss, however it is filled up.
    assert padded.supervised * padded.sequence == pytest.approx(together.supervised * together.sequence, rel=0.01)


# -- the setup of a config ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "on_gpu", "on_cpu"),
    [("auto", 32, 0), (True, 32, 32), (False, 0, 0), (5, 5, 5), (1000, 32, 32)],
)
def test_recomputation_as_it_is_written(written: bool | int | str, on_gpu: int, on_cpu: int) -> None:
    config = config_for(train={"gradient_checkpointing": written})
    assert as_written(config, 32, "cuda") == Fit(2, 8, on_gpu, False)
    assert as_written(config, 32, "cpu") == Fit(2, 8, on_cpu, False)


def test_a_setup_is_what_the_config_says() -> None:
    config = config_for(
        quantization="int8",
        lora={"rank": 4, "targets": ["q_proj"]},
        train={"optimizer": "paged_adamw", "micro_batch_size": 3, "offload": True},
    )
    setup = setup_of(
        config, LLAMA_3_8B, kernels=ALL, longest_row=100, sequence=200, supervised=0.5, device="cuda"
    )  # fmt: skip
    assert (setup.quantization, setup.rank, setup.targets, setup.optimizer) == ("int8", 4, ("q_proj",), "paged_adamw")
    assert (setup.micro_batch, setup.sequence, setup.row, setup.offload) == (3, 200, 100, True)
    assert setup.dtype_bytes == 2
    assert (setup.dropout, setup.answer) == (False, 128)
    dropped = config_for(lora={"dropout": 0.1}, evaluation={"samples": 0})
    other = setup_of(dropped, LLAMA_3_8B, kernels=ALL, longest_row=1, sequence=1, supervised=1, device="cuda")
    assert (other.dropout, other.answer) == (True, 0)
    cpu = setup_of(config_for(), LLAMA_3_8B, kernels=ALL, longest_row=1, sequence=1, supervised=0.5, device="cpu")
    assert (cpu.dtype_bytes, cpu.optimizer, cpu.recomputed) == (4, "adamw", 0)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_attention_that_is_expected_is_the_one_that_the_model_allows(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    shape = shape_of(json.loads(config.to_json_string(use_diff=False)), kind)
    expected = expected_kernels(config_for(), shape, None).attention
    assert (expected == "varlen") == supports_varlen(config, "cpu")[0]
    without = expected_kernels(config_for(speed={"attention": "sdpa"}), shape, None).attention
    assert without == _attention(config)


def test_older_cards_have_no_flash_attention() -> None:
    assert expected_kernels(config_for(), LLAMA_3_8B, CARD) == ALL
    assert expected_kernels(config_for(), LLAMA_3_8B, find_card("t4")).attention == "sdpa"


@pytest.mark.parametrize(
    ("card", "head_dim", "attention"),
    [
        ("rtx-4090", 192, "varlen"),
        ("rtx-4090", 256, "sdpa"),
        ("rtx-5090", 256, "sdpa"),
        ("a100-40gb", 256, "varlen"),
        ("h100-sxm", 256, "varlen"),
        ("b200", 256, "varlen"),
        ("b200", 264, "sdpa"),
        ("h100-sxm", 100, "sdpa"),
    ],
)
def test_wide_heads_have_flash_attention_on_the_large_chips_only(card: str, head_dim: int, attention: str) -> None:
    shape = replace(LLAMA_3_8B, head_dim=head_dim)
    assert expected_kernels(config_for(), shape, find_card(card)).attention == attention


def test_each_key_of_speed_switches_its_kernel_off() -> None:
    speed = {"attention": "sdpa", "fused": False, "lora": False, "head": False}
    for key, value in speed.items():
        kernels = expected_kernels(config_for(speed={key: value}), LLAMA_3_8B, CARD)
        differing = [name for name in vars(ALL) if getattr(ALL, name) != getattr(kernels, name)]
        assert differing == [key]
    assert not expected_kernels(config_for(lora={"dropout": 0.1}), LLAMA_3_8B, CARD).lora
    compiled = config_for(speed={"compile": True})
    assert expected_kernels(compiled, LLAMA_3_8B, CARD) == replace(ALL, fused=False, lora=False)
    assert kept_offload(compiled) is False  # compiled layers are never offloaded
    assert kept_offload(config_for()) is None
    on_head = config_for(lora={"targets": ["q_proj", "lm_head"]})
    assert expected_kernels(on_head, LLAMA_3_8B, CARD) == replace(ALL, head=False)


# -- the estimate -------------------------------------------------------------------------------------------------


def test_time_and_cost_are_those_of_all_micro_batches() -> None:
    config = config_for(train={"epochs": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 4})
    setup = setup_for(micro_batch=4)
    found = estimate(config, setup, CHATS, CARD, stored_bytes=2, here=False)
    batches = 2 * CHATS.sequences / 4
    assert found.seconds == pytest.approx(batches * work_of(typical(setup, CHATS)).seconds(CARD))
    assert found.tokens == 2 * CHATS.tokens
    assert found.steps == 2 * 52  # ⌈820 / 16⌉
    assert found.dollars == pytest.approx(found.seconds / 3600 * 0.34)
    assert found.kilowatt_hours == pytest.approx(found.seconds / 3600 * 0.45)
    assert found.fit == Fit(4, 4, 32, False)
    assert found.fits


def test_the_number_of_steps_may_be_given() -> None:
    config = config_for(train={"max_steps": 10})
    found = estimate(config, setup_for(), CHATS, CARD, stored_bytes=2, here=False)
    assert found.steps == 10
    assert found.tokens == round(160 * CHATS.tokens / CHATS.sequences)
    few = replace(CHATS, counts=(10, 9, 1))
    config = config_for(train={"max_steps": 100})
    found = estimate(config, setup_for(), few, CARD, stored_bytes=2, here=False)
    assert found.tokens == 50 * few.tokens  # 20 sequences are two steps, of 16 and of 4


def test_an_estimate_goes_into_json() -> None:
    found = estimate(config_for(), setup_for(), CHATS, replace(CARD, price=None), stored_bytes=2, here=False)
    read = json.loads(json.dumps(found.as_dict()))
    assert read["memory"]["total"] == found.memory.total
    assert read["dollars"] is None
    assert read["fit"] == {"micro_batch": 2, "accumulation": 8, "recomputed": 32, "offload": False}
    assert set(read["disk"]) >= {"download", "checkpoints", "merged"}


def test_without_evaluation_none_is_counted() -> None:
    with_it, without = (
        estimate(config_for(evaluation={"split": split}), setup_for(), CHATS, CARD, stored_bytes=2, here=False)
        for split in (0.1, 0)
    )
    assert with_it.evaluation > without.evaluation == 0
    assert without.peak == without.memory.total


def test_a_step_that_is_cut_as_written_stays_so_or_does_not_fit() -> None:
    config = config_for(train={"fit": "as-written", "micro_batch_size": 1, "gradient_accumulation_steps": 16})
    setup = setup_for(shape=LLAMA_3_1B)
    assert chosen_fit(config, setup, CHATS, CARD) == Fit(1, 16, 16, False)
    huge = config_for(train={"fit": "as-written", "micro_batch_size": 4096})
    assert chosen_fit(huge, setup, CHATS, CARD) is None


def test_left_to_the_plan_the_step_is_quicker() -> None:
    auto, written = config_for(), config_for(train={"fit": "as-written"})
    setup = setup_for(shape=LLAMA_3_1B)
    times = []
    for config in (auto, written):
        fit = chosen_fit(config, setup, CHATS, CARD)
        assert fit is not None
        times.append(estimate(config, cut_as(setup, fit), CHATS, CARD, stored_bytes=2, here=True).seconds)
    assert times[0] < times[1]
