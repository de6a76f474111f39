"""Packed rows must not see each other: the loss of two rows packed is the loss of the two apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.store import TokenRow
from finetune.model.kernels.attention import use_varlen
from finetune.train.arguments import processing_class
from finetune.train.batches import Collator, as_dataset, to_dataset
from tests.train.conftest import TINY, prepared, tiny_config


def row(ids: list[int], supervised_from: int) -> TokenRow:
    mask = np.arange(len(ids)) >= supervised_from
    return TokenRow(np.array(ids, dtype=np.int32), mask, "here")


def collated(sequences: list[list[TokenRow]], pad_id: int = 0, end_to_end: bool = False) -> dict[str, torch.Tensor]:
    """A batch of these sequences of rows."""
    rows = [row for sequence in sequences for row in sequence]
    numbers = iter(range(len(rows)))
    dataset = as_dataset([[next(numbers) for _ in sequence] for sequence in sequences])
    return Collator(rows.__getitem__, pad_id, "line" if end_to_end else "padded")(list(dataset))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """The one backend that is selected (`model/base.py`), and the plain one that others are measured by."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=request.param).eval()


def nll(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Sum of the negative log likelihood of the supervised tokens, and their number."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    return float(flat), int((labels[:, 1:] != -100).sum())


def test_packed_rows_have_the_loss_of_the_rows_apart(model: torch.nn.Module) -> None:
    generator = np.random.default_rng(0)
    rows = [row(generator.integers(5, 1500, size=n).tolist(), n // 3) for n in (17, 40, 5, 23)]
    packed = collated([rows[:2], rows[2:]])
    apart = collated([[one] for one in rows])
    packed_loss, packed_tokens = nll(model, packed)
    apart_loss, apart_tokens = nll(model, apart)
    assert packed_tokens == apart_tokens
    # fp32 sums of about 60 terms of size 10, in another order: 1e-5 relative is a hundred times the rounding.
    assert packed_loss == pytest.approx(apart_loss, rel=1e-5)


def test_a_packed_row_does_not_change_when_its_neighbour_does(model: torch.nn.Module) -> None:
    mine = row(list(range(100, 130)), 1)
    logits = []
    for neighbour in (row([7] * 20, 1), row([8] * 20, 1)):
        batch = collated([[neighbour, mine]])
        batch.pop("labels")
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[0, 20:])
    assert torch.equal(logits[0], logits[1])


def test_the_first_token_of_a_packed_row_is_not_predicted_from_the_row_before() -> None:
    batch = collated([[row([1, 2, 3], 0), row([4, 5], 0)]])
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_padding_carries_no_loss() -> None:
    batch = collated([[row([1, 2, 3], 1)], [row([4, 5], 1)]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]


def test_end_to_end_all_rows_are_in_one_line() -> None:
    batch = collated([[row([1, 2, 3], 1), row([4, 5], 0)], [row([6], 0)], [row([7, 8], 1)]], pad_id=9, end_to_end=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["rows"] == [[0, 1], [2], [3]]


@pytest.fixture(scope="module")
def varlen_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa").eval()
    use_varlen(model)
    return model


def test_rows_end_to_end_have_the_loss_of_the_rows_apart(varlen_model: torch.nn.Module) -> None:
    generator = np.random.default_rng(0)
    rows = [row(generator.integers(5, 1500, size=n).tolist(), n // 3) for n in (17, 40, 5, 23)]
    line_loss, line_tokens = nll(varlen_model, collated([rows[:2], rows[2:]], end_to_end=True))
    apart_loss, apart_tokens = nll(varlen_model, collated([[one] for one in rows]))
    assert line_tokens == apart_tokens
    # As above: fp32 sums of about 60 terms of size 10, in another order.
    assert line_loss == pytest.approx(apart_loss, rel=1e-5)


def test_end_to_end_a_row_does_not_change_when_its_neighbour_does(varlen_model: torch.nn.Module) -> None:
    mine = row(list(range(100, 130)), 1)
    logits = []
    for neighbour in (row([7] * 20, 1), row([8] * 20, 1)):
        batch = collated([[neighbour], [mine]], end_to_end=True)
        batch.pop("labels")
        with torch.no_grad():
            logits.append(varlen_model(**batch, use_cache=False).logits[0, 20:])
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(("packing", "accumulation"), [(False, 3), (True, 1)], ids=["unpacked", "packed"])
def test_trls_trainer_takes_the_same_steps_end_to_end(
    tmp_path: Path, tiny_base: Path, packing: bool, accumulation: int
) -> None:
    """Three steps of 2 × `accumulation` sequences each: the losses that are logged and the adapter.

    float32 in another order: losses within 1e-5. AdamW's first steps go by a gradient's sign, and where it is nearly
    nothing that is chance: 99 of 100 weights of B have moved alike to a hundredth of a step.
    """
    found = [_trained(tmp_path / str(way), tiny_base, packing, accumulation, way) for way in (False, True)]
    (padded_losses, padded), (line_losses, line) = found
    assert line_losses == pytest.approx(padded_losses, rel=1e-5)
    assert len(padded_losses) == 3
    for name, weight in padded.items():
        same = ((line[name] - weight).abs() <= 1e-2 * RATE).float().mean()
        assert same >= 0.99, name


RATE = 1e-3


def _trained(
    folder: Path, tiny_base: Path, packing: bool, accumulation: int, end_to_end: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of three steps of training, and the adapter after them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    folder.mkdir()
    data = prepared(tiny_config(folder, rows=40, base=str(tiny_base), train={"packing": packing}))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="sdpa")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    if end_to_end:
        use_varlen(model)
    collate = Collator(data.store.row, data.tokenizer.pad_id, "line" if end_to_end else "padded")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        ),
        train_dataset=to_dataset(data),
        # The rows' numbers are ours alone; our Trainer takes them out.
        data_collator=lambda examples: {name: part for name, part in collate(examples).items() if name != "rows"},
        processing_class=processing_class(data),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
