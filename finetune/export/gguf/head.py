"""A stored output head that config.json says is tied to the embedding.

transformers 5 believes the weights: it ties the two only where they are equal, or one of them is not stored
(`PreTrainedModel.tie_weights`). Fine-tuned models are found with a head of their own and `tie_word_embeddings` left
true, and base models with the embedding stored twice.
"""

from __future__ import annotations

import copy

from finetune.export.gguf.family import Config, Family
from finetune.export.source import Weights


def as_stored(family: Family, config: Config, weights: Weights) -> Config:
    """The configuration with `tie_word_embeddings` as transformers takes it, given the weights.

    A stored head is compared with the embedding a few rows at a time, and to its end only where they are equal.
    """
    head, embedding = _source(family, "output.weight"), _source(family, "token_embd.weight")
    if not config.tie_word_embeddings or head not in weights.tensors or embedding not in weights.tensors:
        return config
    if _equal(weights, head, embedding):
        return config
    untied = copy.copy(config)
    untied.tie_word_embeddings = False
    return untied


def _source(family: Family, target: str) -> str:
    """The tensor of the model folder that the first rule for `target` names."""
    return next(rule.source for rule in family.rules if rule.target == target)


def _equal(weights: Weights, first: str, second: str) -> bool:
    """Whether two tensors hold the same values, in whatever dtypes and groups of rows. NaN is equal to nothing."""
    one, two = weights.tensors[first], weights.tensors[second]
    if one.shape != two.shape or not (one.is_float and two.is_float):
        return False
    ours, theirs = ((group.flatten() for group in weights.chunks(name)) for name in (first, second))
    left, right = next(ours), next(theirs)
    while len(left):  # there are as many numbers on both sides, so they end together
        count = min(len(left), len(right))
        if not bool((left[:count] == right[:count]).all()):
            return False
        left = left[count:] if len(left) > count else next(ours, left[:0])
        right = right[count:] if len(right) > count else next(theirs, right[:0])
    return True
