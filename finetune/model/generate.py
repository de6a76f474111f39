"""Text from a model in memory: greedy answers to a batch of prompts, or one answer as it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from finetune.model.memory import in_fitting_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 16,
) -> Iterator[list[int]]:
    """The most likely continuation of each prompt, in order, without the stop token.

    Prompts are batched by similar length and padded on the left, so that every row ends where generation begins.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    answers: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()

    def answer(batch: Sequence[int]) -> list[list[int]]:
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for line, index in enumerate(batch):
            prompt = torch.tensor(list(prompts[index]), dtype=torch.long)
            ids[line, width - len(prompt) :] = prompt
            mask[line, width - len(prompt) :] = 1
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(stop_ids),
                pad_token_id=pad_id,
            )
        return [until_stop(line, stop_ids) for line in written[:, width:].tolist()]

    for batch, written in in_fitting_batches(batches, answer):
        answers.update(zip(batch, written, strict=True))
    model.train(was_training)
    return (answers[index] for index in range(len(prompts)))


def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
) -> Iterator[int]:
    """One token at a time, greedily at temperature 0, else drawn from the softmax at that temperature."""
    import torch

    model.eval()
    ids = torch.tensor([list(prompt)], device=model.device)
    past = None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[0, -1].float()
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1))
        else:
            token = int(logits.argmax())
        if token in stop_ids:
            return
        yield token
        ids = torch.tensor([[token]], device=model.device)


def until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    found = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:found])
