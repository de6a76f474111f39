"""What of an adapter a merge would not carry over, said before anything is merged."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError

if TYPE_CHECKING:
    from finetune.export.adapter import Adapter

_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip
"""What a LoRA configuration may say: read below, or without influence on the merged weights."""

_OFF: tuple[Any, ...] = (None, False, "none", [], {})

_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""The other ways of starting a LoRA (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) also change the base they start from; the
adapter then belongs to that base, which nobody saved."""

LONGEST_NAME = 200
"""Characters in the name of an adapter's tensor. Those of real models have about 110 at most."""

_LONGEST_PATTERN = 2000

_MOST_STEPS = 2 * 10**7
"""That matching one name with one pattern may take; 10^7 are about half a second. Four `.*` are allowed, five not."""

_NAME = 120
"""Characters of a name that steps are counted for."""

_LARGEST = 1e38
"""Of a rank or an alpha: where float32 ends, which PEFT computes in."""


def refused_settings(config: dict[str, Any]) -> list[str]:
    """What the configuration says that is not understood, or does not make sense."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"`peft_type` is {kind!r}; only LORA can be merged"]
    problems = [
        f"`{key}` is {value!r}, which a merge does not carry over yet"
        for key, value in sorted(config.items())
        if key not in _HARMLESS and value not in _OFF
    ]
    init = config.get("init_lora_weights", True)
    if init not in _INITS_THAT_KEEP_THE_BASE:
        problems.append(f"`init_lora_weights: {init}` changed the base during training; this base is not that one")
    for key, kinds in (("rank_pattern", int), ("alpha_pattern", int | float)):
        table = config.get(key) or {}
        if not isinstance(table, dict):
            problems.append(f"`{key}` is not a table of patterns")
            continue
        for pattern, value in table.items():
            if not isinstance(value, kinds) or not 0 < value < _LARGEST:
                problems.append(f"`{key}` has {value!r} for `{pattern[:60]}`")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        problems.append("`r` and `lora_alpha` must be numbers")
    elif not 1 <= config["r"] < _LARGEST:
        problems.append(f"`r` is {config['r']}")
    elif not abs(config["lora_alpha"]) < _LARGEST:
        problems.append("`lora_alpha` is not a number that float32 can hold")
    for key in ("modules_to_save", "target_parameters", "target_modules"):
        names = config.get(key) or []
        if key == "target_modules" and isinstance(names, str):
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            problems.append(f"`{key}` is {names!r}, not a list of names")
    return problems + [
        f"`{key}` has the pattern `{str(pattern)[:60]}`, which {reason}"
        for key, pattern, added in _patterns(config)
        if (reason := _unusable(pattern, added))
    ]


# -- patterns -----------------------------------------------------------------------------------------------------


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """What PEFT takes for regular expressions: the key, the pattern, and how many `.*` PEFT puts around it.

    Those that a merge has no use for are checked too: the proof of a merge has PEFT itself load the adapter.
    """
    for key, added in (("rank_pattern", 1), ("alpha_pattern", 1), ("modules_to_save", 2), ("layers_pattern", 1)):
        found = config.get(key) or []
        names = found if isinstance(found, list | dict) else [found]
        yield from ((key, name, added) for name in names)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            yield key, config[key], 0


def _unusable(pattern: Any, added: int) -> str | None:
    """Why a pattern is refused. A short one can keep Python's matching busy for years (`(.*.*)*!`)."""
    if not isinstance(pattern, str):
        return "is not text"
    if len(pattern) > _LONGEST_PATTERN:
        return f"is longer than {_LONGEST_PATTERN} characters"
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):  # `[[`, which may come to mean a set
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        return f"is not a regular expression: {error}"
    ways = _ways(pattern)
    if ways is None:
        return "repeats what can match in several ways, or has a rare kind of group: write the names in full"
    if sum(count * math.comb(_NAME + repeats + added, _NAME) for repeats, count in ways.items()) > _MOST_STEPS:
        return "has too many repetitions or alternatives: write the names in full"
    return None


_LITERAL = re.compile(r"(?:\w|-|\\\W)*")

_TOKEN = re.compile(
    r"(?P<repeat>(?:[*+?]|\{\d*,?\d*\})[?+]?)"
    r"|(?P<open>\((?:\?(?:P<\w+>|<?[=!]|[:>])|(?!\?)))|(?P<rare>\(\?)|(?P<close>\))|(?P<alternative>\|)"
    r"|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.",
    re.DOTALL,
)


def _ways(pattern: str) -> Counter[int] | None:
    """An upper bound of the ways in which a valid pattern can match: repetitions in one way → how many such ways.

    `k` repetitions divide n characters among them and what follows in at most C(n + k, k) ways. Parts that follow one
    another multiply, alternatives add up. None where a part that matches in several ways is itself repeated: that is
    exponential in the name's length; nor for groups that change how the rest is read (flags, conditions).
    """
    one = Counter({0: 1})
    outer: list[tuple[list[Counter[int]], Counter[int], list[str]]] = []
    done: list[Counter[int]] = []  # the alternatives of this group that are complete
    before, last = one, one  # of the alternative that is being read: all but its last part, and that
    texts = [""]
    for token in _TOKEN.finditer(f"{pattern})"):
        text = token[0]
        if token["close"]:
            done.append(_times(before, last))
            # Of names, only those can match in the same place that begin alike.
            literal = all(_LITERAL.fullmatch(name) for name in texts)
            if literal:
                last = Counter({0: max(sum(name.startswith(start) for start in texts) for name in texts)})
            else:
                last = sum(done, Counter())
            if not outer:
                return last
            text = f"({'|'.join(texts)})"
            done, before, texts = outer.pop()
        elif token["alternative"]:
            done.append(_times(before, last))
            before, last = one, one
            texts.append("")
            continue
        elif token["open"]:
            outer.append((done, _times(before, last), texts))
            done, before, last, texts = [], one, one, [""]
            continue
        elif token["rare"]:
            return None
        elif not token["repeat"]:
            before, last = _times(before, last), one
        elif text[0] == "?":
            last = last + one
        elif last != one:
            return None
        elif not re.fullmatch(r"\{\d+\}[?+]?", text):
            last = Counter({1: 1})
        texts[-1] += text
    return last


def _times(left: Counter[int], right: Counter[int]) -> Counter[int]:
    product: Counter[int] = Counter()
    for (a, count), (b, times) in itertools.product(left.items(), right.items()):
        product[a + b] += count * times
    return product


def incomplete(adapter: Adapter) -> list[str]:
    """What the configuration promises and the tensors do not hold, and the other way round."""
    config = adapter.config
    problems = [] if adapter.layers else ["it holds no LoRA weights"]
    for layer in adapter.layers:
        wanted = {"A", "B"} | ({"dora"} if config.get("use_dora") else set())
        if config.get("lora_bias") and not layer.embedding:
            wanted.add("bias")
        if set(layer.parts) != wanted:
            problems.append(f"`{layer.nested}` has the parts {sorted(layer.parts)}, not {sorted(wanted)}")
            continue
        a, b, rank = layer.shape("A"), layer.shape("B"), adapter.rank(layer.module)
        if len(a) != 2 or len(b) != 2:
            problems.append(f"`{layer.nested}` is not a linear layer: its LoRA has the shapes {a} and {b}")
        elif not layer.parameters and (a[0], b[1]) != (rank, rank):
            problems.append(f"`{layer.nested}` has the shapes {a} and {b}, its configuration says rank {rank}")
        elif a[0] != b[1]:
            problems.append(f"`{layer.nested}` has the shapes {a} and {b}, which do not belong together")
        else:
            problems += [
                f"`{layer.nested}` has a {what} of the shape {layer.shape(part)}"
                for part, what in (("dora", "magnitude"), ("bias", "bias"))
                if part in layer.parts and layer.shape(part) != (b[0],)
            ]
    for key, found in (
        ("trainable_token_indices", [tokens.module for tokens in adapter.tokens]),
        ("target_parameters", [layer.module for layer in adapter.layers if layer.parameters]),
        ("modules_to_save", [name for name in adapter.whole if adapter.saves(name.rpartition(".")[0])]),
    ):
        if config.get(key) and not found:
            problems.append(f"`{key}` is {config[key]!r} in adapter_config.json, and nothing of it is stored")
    return problems


def require_numbers(adapter: Adapter) -> None:
    """Every value is finite, and something was learned. Reads the adapter once, a tensor at a time."""
    for name in adapter.stored.tensors:
        for chunk in adapter.stored.chunks(name):
            if not bool(chunk.isfinite().all()):
                raise ExportError(
                    f"`{name}` has values that are not finite numbers",
                    place=str(adapter.stored.place),
                    hint="use a checkpoint from before the loss went wrong",
                )
    learned = (bool(layer.read("B").any()) and bool(layer.read("A").any()) for layer in adapter.layers)
    if not (adapter.whole or adapter.tokens or any(learned)):
        raise ExportError(
            "every lora_B is zero: nothing was learned",
            place=str(adapter.stored.place),
            hint="was the run stopped at its start?",
        )
