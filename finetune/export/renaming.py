"""A module's name in the live model → its name on disk.

Mostly they are the same. An adapter speaks of the live model, and transformers renames some families' tensors while it
loads them; a base may also have been saved without its outermost module, or the adapter been trained without a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

OUTPUT_LAYERS = ("lm_head", "embed_out")
"""What the output layer is called, live or on disk."""

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""What the input embedding is called."""

SPELLINGS = (
    (".mlp.experts", ".block_sparse_moe.experts"),  # Mixtral
    (".mlp.gate", ".block_sparse_moe.gate"),
    ("lm_head", "embed_out"),  # GPT-NeoX
    ("model.language_model.", "language_model.model."),  # Gemma 3 with its vision tower
    ("lm_head", "language_model.lm_head"),
)
"""Live → disk, from transformers 5's `conversion_mapping.py`. Taken only where the disk has the second and not the
first."""


def renaming(modules: Iterable[str], tensors: Iterable[str]) -> Callable[[str], str]:
    """How module names become those on disk, so that all `modules` are there.

    (But for an output layer, which may share the embedding's weight.) If nothing makes them all be there, names that
    are not on disk stay as they are.
    """
    known = {prefix for name in tensors for prefix in _prefixes(name)}
    wanted = [name for name in modules if name.rpartition(".")[2] not in OUTPUT_LAYERS]
    outermost = sorted({name.partition(".")[0] for name in wanted})
    outer = sorted({name for name in known if "." not in name})
    candidates = [("", ""), *((f"{name}.", "") for name in outermost), *(("", f"{name}.") for name in outer)]

    def rename(name: str, drop: str, add: str) -> str:
        for spelled in (*_spellings(add + name.removeprefix(drop)), *_spellings(name)):
            if spelled in known:
                return spelled
        return name

    for drop, add in candidates:
        if all(rename(name, drop, add) in known for name in wanted):
            return lambda name, drop=drop, add=add: rename(name, drop, add)  # type: ignore[misc]
    return lambda name: rename(name, "", "")


def _prefixes(name: str) -> Iterator[str]:
    """`a.b.weight` → `a`, `a.b`."""
    position = name.find(".")
    while position >= 0:
        yield name[:position]
        position = name.find(".", position + 1)


def _spellings(name: str) -> Iterator[str]:
    yield name
    for live, disk in SPELLINGS:
        if live in name:
            yield name.replace(live, disk, 1)
