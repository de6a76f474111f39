"""Which encoding each tensor of a GGUF file gets: llama.cpp's own choice, made from names and shapes.

What a person asks for (`q4_k_m`, a `Quant`) is a mixture: most matrices get its main encoding, those whose rounding
hurts most get a finer one. Which those are was found by trial in llama.cpp and is written down in the function
`llama_tensor_get_type_impl` of its src/llama-quant.cpp; the tables here say the same, for the quants that need no
importance matrix and the architectures we convert. Compared tensor by tensor with llama.cpp 0.5.0 (ggml 0.25.3);
names of other architectures' tensors that it also leaves alone (recurrent layers, images) are left out.

In short: values of the attention and the second matrix of the feed-forward part are the sensitive ones, in the first
and last layers more than in the middle; what few heads share, or is small beside eight experts, is cheap to keep.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.export.gguf.encode import Encoding, Quant
from finetune.llamacpp.quantize import FORMATS

QUANTS: Mapping[Quant, tuple[Encoding, int]] = {
    "f32": ("f32", 0),
    "f16": ("f16", 1),
    "bf16": ("bf16", 32),
    "q8_0": ("q8_0", 7),
    "q4_0": ("q4_0", 2),
    "q4_1": ("q4_1", 3),
    "q5_0": ("q5_0", 8),
    "q5_1": ("q5_1", 9),
    "q2_k": ("q2_k", 10),
    "q3_k_s": ("q3_k", 11),
    "q3_k_m": ("q3_k", 12),
    "q3_k_l": ("q3_k", 13),
    "q4_k_s": ("q4_k", 14),
    "q4_k_m": ("q4_k", 15),
    "q5_k_s": ("q5_k", 16),
    "q5_k_m": ("q5_k", 17),
    "q6_k": ("q6_k", 18),
    "iq4_nl": ("iq4_nl", 25),
    "iq4_xs": ("iq4_xs", 30),
}
"""The main encoding, and `general.file_type` (the enum `llama_ftype` of llama.h). q2_k_s is not here: llama.cpp makes
it with an importance matrix only."""


@dataclass(frozen=True)
class ModelShape:
    """What the choice depends on beside names and shapes; `llama.cpp` reads the same from the file's metadata."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    """0 for a dense model."""


@dataclass(frozen=True)
class Mix:
    """The choice for every tensor."""

    encodings: Mapping[str, Encoding]
    fallbacks: Mapping[str, Encoding]
    """What was wanted, for the tensors whose rows cannot be cut into that encoding's blocks."""

    def counts(self) -> dict[Encoding, int]:
        """How many tensors have which encoding, the most frequent first."""
        return dict(Counter(self.encodings.values()).most_common())

    def notes(self) -> list[str]:
        """What did not get the encoding that was wanted, for people."""
        pairs = Counter((wanted, self.encodings[name]) for name, wanted in self.fallbacks.items())
        return [
            f"{count} tensor{'s are' if count > 1 else ' is'} {stored} rather than {wanted}: "
            f"{'their' if count > 1 else 'its'} rows are no whole number of blocks"
            for (wanted, stored), count in pairs.items()
        ]


def choose(quant: Quant, tensors: Iterable[tuple[str, tuple[int, ...]]], model: ModelShape) -> Mix:
    """The encoding of every tensor of a file.

    tensors  GGUF names with shapes as torch has them (rows last but one, weights of a row last), in any order
    """
    main, _ = QUANTS[quant]
    shapes = dict(tensors)
    kinds = {name: kind for name in shapes if (kind := _kind(name))}
    tied = "output.weight" not in shapes
    # llama.cpp counts the tensors of a kind rather than reading the layer's number, where it can.
    values = sum(kind == "values" for kind in kinds.values())
    seen: Counter[str] = Counter()
    encodings: dict[str, Encoding] = {}
    fallbacks: dict[str, Encoding] = {}
    for name in sorted(shapes, key=_in_llama_cpps_order):
        if not _is_matrix(name, shapes[name]):
            encodings[name] = "f32"
            continue
        if main not in FORMATS:
            encodings[name] = main
            continue
        kind = kinds.get(name)
        if kind == "output" or (kind == "embedding" and tied):
            wanted = _output(main, shapes[name][-1], model)
        elif kind in ("values", "down"):
            by_name = kind == "down" and model.experts > 1
            place = _layer(name) if by_name else seen[kind]
            seen[kind] += 1
            wanted = _choice(quant, kind, _Place(place, values if kind == "values" else model.layers), model)
        else:
            wanted = _choice(quant, kind, _Place(0, 1), model)
        encodings[name] = _that_fits(wanted, shapes[name][-1])
        if encodings[name] != wanted:
            fallbacks[name] = wanted
    return Mix({name: encodings[name] for name in shapes}, fallbacks)


# -- kinds of tensors ---------------------------------------------------------------------------------------------

Kind = Literal["output", "embedding", "values", "keys", "attention output", "down"]

_KINDS: Sequence[tuple[str, Kind]] = (
    (r"output\.weight", "output"),
    (r"(per_layer_)?token_embd\.weight", "embedding"),
    (r".*attn_(qkv|kv_b|v)\.weight.*", "values"),
    (r".*attn_k\.weight.*", "keys"),
    (r".*attn_output\.weight.*", "attention output"),
    (r".*ffn_down.*", "down"),
)
"""Other matrices (queries, the rest of the feed-forward part) have the main encoding in every mixture."""

_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
"""Matrices that are never quantised: norms of every head, the router of experts, learned positions."""


def _kind(name: str) -> Kind | None:
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name)), None)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is stored in the quant at all. ggml does not count dimensions of one element at the front."""
    dimensions = max((len(shape) - i for i, size in enumerate(shape) if size > 1), default=1)
    return dimensions > 1 and name.endswith("weight") and not any(part in name for part in _KEPT)


def _in_llama_cpps_order(name: str) -> tuple[int, bytes]:
    """`weight_name_comparer` of llama-model-loader.h: by layer, then by name; what is in no layer comes first."""
    return _layer(name), name.encode()


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)", name)
    return int(found.group(1)) if found else -1


# -- the mixtures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """The tensor is number `index` (from 0) of `count` of its kind."""

    index: int
    count: int


_When = Callable[[_Place, ModelShape], bool]
_Steps = tuple[tuple[_When, Encoding], ...]
"""The first that applies is taken; the main encoding if none does."""


def _always(place: _Place, model: ModelShape) -> bool:
    return True


def _sensitive(place: _Place, model: ModelShape) -> bool:
    """The first and the last eighth of the layers, and every third in between (`use_more_bits`)."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def _first_eighth(place: _Place, model: ModelShape) -> bool:
    return place.index < place.count // 8


def _first_sixteenth(place: _Place, model: ModelShape) -> bool:
    return place.index < place.count // 16


def _first_two(place: _Place, model: ModelShape) -> bool:
    return place.index < 2


def _first_four(place: _Place, model: ModelShape) -> bool:
    return place.index < 4


def _shared_by_four(place: _Place, model: ModelShape) -> bool:
    """Four query heads or more have one key-value head: its weights are few, and many depend on them."""
    return model.kv_heads > 0 and model.heads // model.kv_heads >= 4


_MIXES: Mapping[tuple[Quant, Kind], _Steps] = {
    ("q2_k", "values"): ((_shared_by_four, "q4_k"), (_always, "q3_k")),
    ("q2_k", "down"): ((_always, "q3_k"),),
    ("q2_k", "attention output"): ((_always, "q3_k"),),
    ("q3_k_m", "values"): ((_first_two, "q5_k"), (_always, "q4_k")),
    ("q3_k_m", "down"): ((_first_sixteenth, "q5_k"), (_always, "q4_k")),
    ("q3_k_m", "attention output"): ((_always, "q4_k"),),
    ("q3_k_l", "values"): ((_always, "q5_k"),),
    ("q3_k_l", "down"): ((_always, "q5_k"),),
    ("q3_k_l", "attention output"): ((_always, "q5_k"),),
    ("q4_k_s", "values"): ((_first_four, "q5_k"),),
    ("q4_k_s", "down"): ((_first_eighth, "q5_k"),),
    ("q4_k_m", "values"): ((_sensitive, "q6_k"),),
    ("q4_k_m", "down"): ((_sensitive, "q6_k"),),
    ("q5_k_m", "values"): ((_sensitive, "q6_k"),),
    ("q5_k_m", "down"): ((_sensitive, "q6_k"),),
    ("iq4_nl", "values"): ((_shared_by_four, "q5_k"),),
    ("iq4_nl", "down"): ((_first_eighth, "q5_k"),),
    ("iq4_xs", "values"): ((_shared_by_four, "q5_k"),),
    ("iq4_xs", "down"): ((_first_eighth, "q5_k"),),
}

_FALCON: Mapping[tuple[Quant, Kind], _Steps] = {
    ("q2_k", "attention output"): (),
    ("q3_k_m", "down"): ((_first_sixteenth, "q5_k"), (_sensitive, "q4_k")),
    ("q3_k_m", "attention output"): (),
    ("q3_k_l", "down"): ((_always, "q4_k"),),
    ("q3_k_l", "attention output"): ((_always, "q4_k"),),
    ("q4_k_s", "down"): (),
    ("q4_k_m", "down"): ((_first_sixteenth, "q6_k"), (_sensitive, "q5_k"), (_always, "q4_k")),
}
"""Where Falcon differs; its joint matrix for queries, keys and values counts as values."""

_EIGHT_EXPERTS_OUTPUT = frozenset({"q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"})
"""With these, a model of eight experts has q5_k for the attention's output; with the others, the main encoding."""


def _choice(quant: Quant, kind: Kind | None, place: _Place, model: ModelShape) -> Encoding:
    main, _ = QUANTS[quant]
    if kind is None:
        return main
    if model.experts == 8:  # beside the experts, the attention is small
        if kind in ("values", "keys"):
            return "q8_0"
        if kind == "attention output" and model.architecture != "falcon":
            return "q5_k" if quant in _EIGHT_EXPERTS_OUTPUT else main
    steps = _MIXES.get((quant, kind), ())
    if model.architecture == "falcon":
        steps = _FALCON.get((quant, kind), steps)
    chosen = next((encoding for when, encoding in steps if when(place, model)), main)
    if kind == "values" and _is_70b(model) and chosen in ("q3_k", "q4_k"):
        return "q5_k"  # eight heads share these weights, which makes them an eighth of the queries'
    return chosen


def _is_70b(model: ModelShape) -> bool:
    shares = model.heads != model.kv_heads
    return model.layers == 80 and (model.architecture == "qwen2" or (model.architecture == "llama" and shares))


def _output(main: Encoding, width: int, model: ModelShape) -> Encoding:
    """The matrix that makes logits: the output's, or the embedding where it is used for that too."""
    if model.architecture == "falcon" or width % FORMATS[main].block:
        return "q8_0"
    return "q8_0" if main == "q8_0" else "q6_k"


# -- rows that cannot be cut --------------------------------------------------------------------------------------

_SMALLER_BLOCKS: Mapping[Encoding, Encoding] = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
"""For rows that are no multiple of 256: the next larger encoding with blocks of 32 (`tensor_type_fallback`)."""


def _that_fits(wanted: Encoding, width: int) -> Encoding:
    if width % FORMATS[wanted].block == 0:
        return wanted
    smaller = _SMALLER_BLOCKS.get(wanted, wanted)
    return "f16" if width % FORMATS[smaller].block else smaller
