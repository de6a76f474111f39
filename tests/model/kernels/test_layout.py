"""Packed rows never see each other, whatever the family's attention makes of position ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.errors import ConfigError
from finetune.model.kernels import layout
from finetune.model.kernels.attention import use_varlen
from finetune.model.kernels.layout import layout_for, rows_mask
from finetune.train.batches import Collator
from tests.model.kernels.models import FAMILIES, adapted, base, distance, gradients, plain_loss, row


def laid_out(rows: list[Any], sequences: list[list[int]], how: layout.Layout) -> dict[str, Any]:
    made = Collator(rows.__getitem__, 0, how)([{"rows": sequence} for sequence in sequences])
    made.pop("rows")
    return made


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
def test_packed_rows_train_as_separate_ones(family: str) -> None:
    """The check that counts: gradients of packed rows against those of one row a line, for the layout chosen."""
    # A balancing loss of experts looks at all tokens, padding too, so it depends on the layout.
    quiet = {"output_router_logits": False} if family in ("mixtral", "qwen3_moe") else {}
    model = adapted(base(family, **quiet))
    own = model.config._attn_implementation
    rows = [row(length, seed) for seed, length in enumerate((5, 11, 4, 9))]
    apart = gradients(model, plain_loss(model, laid_out(rows, [[0], [1], [2], [3]], "padded")))
    for attention in ("auto", "sdpa"):
        chosen, _ = layout_for(model, "cpu", attention, packed=True)  # type: ignore[arg-type]
        if chosen == "line":
            use_varlen(model)
        packed = gradients(model, plain_loss(model, laid_out(rows, [[0, 1], [2, 3]], chosen)))
        # Sums in another order: 1e-7 of a float32, with some factor for cancellation.
        assert distance(packed, apart) < 2e-5, chosen
        model.get_base_model().set_attn_implementation(own)


def test_falcon_gets_a_mask_of_its_own_because_it_does_not_read_positions() -> None:
    model = adapted(base("falcon"))
    assert layout_for(model, "cpu", "auto", packed=True)[0] == "masked"
    assert layout_for(model, "cpu", "auto", packed=False)[0] == "padded"


def test_where_rows_cannot_be_kept_apart_packing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base("falcon"))
    monkeypatch.setattr(layout, "rows_mask", lambda rows: torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())
    with pytest.raises(ConfigError, match="packed rows would see each other in a model of type falcon") as caught:
        layout_for(model, "cpu", "auto", packed=True)
    assert "train.packing: false" in str(caught.value.problems[0].hint)


def test_a_mask_shows_a_token_its_own_row_up_to_itself() -> None:
    mask = rows_mask(torch.tensor([[1, 1, 2, 2, 2]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
