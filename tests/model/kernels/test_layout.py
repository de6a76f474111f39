"""Packed rows never see each other, whatever the family's attention makes of position ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.errors import ConfigError
from finetune.model.kernels import layout
from finetune.model.kernels.attention import sees_neighbour, use_varlen
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


@pytest.fixture(scope="module")
def outliers_in_int8(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama with inputs of its linears that are far larger than others, as large models have them, in LLM.int8."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    model = base("llama", num_key_value_heads=4, **(shape | {"initializer_range": 0.1}))
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[:6] *= 8
    model.save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", quantization_config=quantization
    )


def thresholds(model: Any) -> set[float]:
    return {module.state.threshold for module in model.modules() if type(module).__name__ == "Linear8bitLt"}


def test_rows_that_int8_rounds_together_do_not_see_each_other(outliers_in_int8: Any) -> None:
    """What LLM.int8 leaves in 16 bit depends on the batch: a row is rounded otherwise behind another, and no more."""
    before = thresholds(outliers_in_int8)
    assert before == {6.0}
    assert layout_for(outliers_in_int8, "cpu", "auto", packed=True)[0] == "line"
    assert layout_for(outliers_in_int8, "cpu", "sdpa", packed=True)[0] == "padded"
    assert thresholds(outliers_in_int8) == before


def test_in_int8_too_rows_that_see_each_other_are_found_out(
    outliers_in_int8: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    for mask in (everything, everything.tril()):
        assert "see each other" in str(sees_neighbour(outliers_in_int8, {"attention_mask": mask}))
    apart = torch.block_diag(*[torch.ones(3, 3).tril()] * 2).bool()[None, None]
    assert sees_neighbour(outliers_in_int8, {"attention_mask": apart}) is None


def test_a_base_whose_numbers_are_none_is_not_said_to_mix_rows() -> None:
    """The first step says what is wrong with it. But where it is the layout that makes them none, it is refused."""
    model = base("llama")
    apart = torch.block_diag(*[torch.ones(3, 3).tril()] * 2).log()[None, None]
    assert sees_neighbour(model, {"attention_mask": apart}) is None
    assert "see each other" in str(sees_neighbour(model, {"attention_mask": apart * torch.nan}))
    model.model.norm.weight.data.fill_(torch.inf)
    assert layout_for(model, "cpu", "auto", packed=True)[0] == "line"
    assert layout_for(model, "cpu", "sdpa", packed=True)[0] == "padded"


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_neox"])
def test_rows_that_see_all_of_each_other_alike_are_found_out(family: str) -> None:
    """As where a mask of yes and no is added to the scores: two rows that change places change nothing."""
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert "see each other" in str(sees_neighbour(base(family), {"attention_mask": everything}))


def test_a_row_that_goes_on_where_its_neighbour_ended_is_found_out() -> None:
    """Nothing is seen of the neighbour, and yet the row is not computed as alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)).eval()
    apart = torch.block_diag(*[torch.ones(3, 3).tril()] * 2).bool()[None, None]
    assert sees_neighbour(model, {"attention_mask": apart}) is None
    forward = model.forward
    model.forward = lambda position_ids, **rest: forward(position_ids=torch.arange(6).unsqueeze(0), **rest)
    assert "see each other" in str(sees_neighbour(model, {"attention_mask": apart}))


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
