"""A merge list as token scores.

Where a SentencePiece-style tokenizer is concerned, llama.cpp knows no merges: it joins the neighbours whose joint text
is the token with the highest score. With equal scores it would join from the left, which gives other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def merge_scores(vocab: Mapping[str, int], merges: Sequence[str | Sequence[str]]) -> tuple[dict[str, float], int]:
    """Token → score, and in how many places the scores say something else than the merges. `vocab` holds the tokens
    that text is built of: no special tokens, no bytes.

    A token's score is minus the rank of the first merge that makes it, so that what is merged earlier scores higher.
    The two agree when every way of cutting a token into two tokens is a merge, and when the merges that make one token
    stand together: that is how merge lists are made from SentencePiece models. (Merges of runs of one character, such
    as indentation, may be mixed: a run has the same parts in any order.)
    """
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    scores: dict[str, float] = {}
    interrupted = 0
    previous = None
    for rank, (first, second) in enumerate(pairs):
        token = first + second
        if token in scores:
            interrupted += token != previous and len(set(token)) > 1
        else:
            scores[token] = float(-rank)
        previous = token
    known = set(pairs)
    unlisted = sum(
        token[:cut] in vocab and token[cut:] in vocab and (token[:cut], token[cut:]) not in known
        for token in vocab
        for cut in range(1, len(token))
    )
    never = float(-len(pairs) - 1)
    return {token: scores.get(token, never if len(token) > 1 else 0.0) for token in vocab}, interrupted + unlisted
