"""The base's tokenizer, from its tokenizer.json, through the `tokenizers` library alone.

transformers' own classes would import torch and take seconds to load; the ids are the same (a test compares them on
real tokenizers). What is trained with here is also what is exported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import BaseError
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file

if TYPE_CHECKING:
    import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its special tokens by name and the chat template that came with it, if any."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    """bos_token, eos_token, unk_token, pad_token: those that the base names."""
    chat_template: str | None
    folder: Path

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (usually a BOS)."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row, special tokens included."""
        texts: list[str] = self.backend.decode_batch([list(row) for row in rows], skip_special_tokens=False)
        return texts

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for no text of their own."""
        return frozenset(number for number, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The same, as they are written."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    def token_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    @cached_property
    def eos_id(self) -> int:
        return self._required("eos_token")

    @cached_property
    def pad_id(self) -> int:
        """The id that fills up short sequences. It is masked out everywhere, so any would do."""
        for name in ("pad_token", "unk_token", "eos_token"):
            if name in self.special:
                found = self.token_id(self.special[name])
                if found is not None:
                    return found
        return 0

    def _required(self, name: str) -> int:
        found = self.token_id(self.special[name]) if name in self.special else None
        if found is None:
            raise BaseError(
                f"the tokenizer has no {name}", place=str(self.folder), hint="without one a model never learns to stop"
            )
        return found


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a model folder."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BaseError(
            "there is no tokenizer.json",
            place=str(folder),
            hint="save the tokenizer with a current transformers (`AutoTokenizer…save_pretrained`), which writes one",
        )
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        if _begins_as_pointer(path):
            raise BaseError(LFS_MESSAGE, place=str(path), hint=LFS_HINT) from error
        raise BaseError(
            "tokenizer.json cannot be read", place=str(path), hint="download the model again: this file is damaged"
        ) from error
    # A saved tokenizer may carry the padding and truncation of its last use; rows are to come out whole.
    backend.no_padding()
    backend.no_truncation()
    settings = _read_json(folder / "tokenizer_config.json")
    _as_transformers_loads_it(backend, settings, _read_json(folder / "config.json"))
    special: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            special[name] = content
    return Tokenizer(backend, special, _chat_template(folder, settings), folder)


# -- what transformers makes of tokenizer.json --------------------------------------------------------------------

_QWEN = "Qwen2Tokenizer"
_UNSTATED = {"qwen2_moe": _QWEN, "qwen3": _QWEN, "qwen3_moe": _QWEN, "gpt_neox": "GPTNeoXTokenizer"}
"""The class that a model type has where no file names one."""

_AS_WRITTEN = frozenset({"mistral", "mixtral", "phi3"})
"""Model types whose tokenizer.json is taken as it is, whatever class is named beside it."""


def _as_transformers_loads_it(backend: tokenizers.Tokenizer, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Some of transformers' classes (5.23) overrule parts of tokenizer.json; whoever runs the model gets theirs.

    Qwen2Tokenizer and GPTNeoXTokenizer normalise to NFC. LlamaTokenizer (Llama 2, TinyLlama) puts a space before the
    whole text where `legacy` is false or not set, and after every special token where it is true, whatever the file
    says. Where a class would cut text into other words than tokenizer.json (GPT2Tokenizer in SmolLM and Phi-4, which
    forgets about digits), the file is right: the model was pre-trained with it.
    """
    from tokenizers import normalizers, pre_tokenizers

    name = _class_name(backend, settings, config)
    if name in (_QWEN, "GPTNeoXTokenizer") and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()
    if name == "LlamaTokenizer":
        prepend = "always" if settings.get("legacy") else "first"
        if settings.get("add_prefix_space") is False:
            prepend = "never"
        # The library's stubs say that None is not allowed here, but it is how a normalizer is taken away.
        backend.normalizer = None  # type: ignore[assignment,unused-ignore]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)


def _class_name(backend: tokenizers.Tokenizer, settings: dict[str, Any], config: dict[str, Any]) -> str | None:
    """The class that AutoTokenizer chooses, without `Fast`; None where it takes tokenizer.json as it is.

    Source: `AutoTokenizer.from_pretrained` and the tables of `tokenization_auto.py`, for the model types that can be
    exported. DeepSeek's R1 distills are why the class alone does not decide: all say LlamaTokenizerFast, over the
    byte-level tokenizers of Qwen and Llama 3.
    """
    kind = config.get("model_type")
    if kind == "qwen2":
        return _QWEN
    if kind in _AS_WRITTEN:
        return None
    stated = settings.get("tokenizer_class") or config.get("tokenizer_class") or _UNSTATED.get(str(kind))
    name = str(stated).removesuffix("Fast")
    return None if name == "LlamaTokenizer" and _is_byte_level(backend) else name


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    parts = (backend.pre_tokenizer, backend.decoder)
    return any(b'"ByteLevel"' in part.__getstate__() for part in parts if part is not None)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers; of several named ones, `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseError("cannot be read", place=str(path), hint="give another with `chat_template:`") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _begins_as_pointer(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return is_lfs_pointer(file.read(60))
    except OSError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    if what := not_a_file(path):
        raise BaseError(f"is {what}, not a file", place=str(path), hint="download the model again")
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(
            "cannot be read", place=str(path), hint="download the model again: this file is damaged"
        ) from error
    if not isinstance(value, dict):
        raise BaseError("is not a mapping", place=str(path), hint="download the model again: this file is damaged")
    return value
