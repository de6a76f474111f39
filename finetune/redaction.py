"""Tokens and passwords, recognised by their shape and taken out of what is shown or kept.

Two ways to recognise one, used together: by what a text looks like (the prefixes that services give their tokens,
`user:password@` in a URL, `token=` before what is no word), and by being, letter for letter, what a variable of the
environment holds whose name says that it is a secret. Neither finds a password that looks like a word; that is why
nothing here is an excuse to write one down.

What is left alone on purpose: words, numbers, special tokens and names of files, whatever they are called, because an
error without its file's name helps nobody; and 40 or 64 hexadecimal digits, which here are commits and hashes far more
often than a key of Weights & Biases (that one is found by its variable).

Any text costs time in proportion to its length, a hostile one too (a test measures it): a pattern begins with letters
that are looked for by themselves, and no two of its tries read the same long run of characters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

REMOVED = "[removed]"
"""What stands in the place of a secret."""

SHORTEST = 8
"""Characters: a shorter value of a variable is too likely to be part of some other word."""

_BY_SHAPE = {
    prefix: re.compile(rf"{re.escape(prefix)}(?<![A-Za-z0-9]{re.escape(prefix)}){rest}")
    for prefix, rest in {
        "hf_": "[A-Za-z0-9]{16,}",  # Hugging Face
        "api_org_": "[A-Za-z0-9]{16,}",
        "wandb_v": r"\d++_[\w-]{16,}",  # Weights & Biases: newer keys, and those of servers of one's own
        "local-": "[0-9a-f]{40}",
        "sk-": r"(?=[A-Za-z_-]{0,99}+\d)[\w-]{20,}",  # OpenAI, Anthropic and those that took after them
        "nvapi-": r"[\w-]{20,}",  # NVIDIA
        "gsk_": "[A-Za-z0-9]{20,}",  # Groq
        "gh": "[pousr]_[A-Za-z0-9]{20,}",  # GitHub
        "github_pat_": r"\w{20,}",
        "glpat-": r"[\w-]{16,}",  # GitLab
        "AKIA": "[A-Z2-7]{16}",  # Amazon
        "ASIA": "[A-Z2-7]{16}",
        "AIza": r"[\w-]{35}",  # Google
        "ya29.": r"[\w-]{20,}",
        "xox": r"[abeoprs]-[\w-]{16,}",  # Slack
        "xapp-": r"[\w-]{16,}",
    }.items()
}
_JWT = re.compile(r"(?<![\w-])([\w-]{13,}+)\.eyJ[\w-]{10,}+\.[\w-]{16,}+")
"""Its first part is the end of a run of such characters, from the first `eyJ` on: a pattern that tried every `eyJ` of
a long run would read the rest of it each time."""

_IN_URL = re.compile(r"(?<=[A-Za-z0-9])(:/{1,2})[^\s/?#'\"]{1,512}@(?=[\w\[])")
"""Who logs in, and with what. One slash after the colon as well: that is what becomes of a URL taken for a path."""

_VALUE = r"[\w.~+/%-]{8,}+(?:={1,2}(?![\w.~+/%-]))?"
_NAMED = re.compile(rf"[=:]\s{{0,2}}(?:\\{{0,2}}[\"'])?(?:(?:Bearer|Basic)\s)?({_VALUE})")
"""What stands between a name and its value, and the value: 8 characters or more."""
_BEARER = re.compile(rf"\bB(?:earer|asic)\s({_VALUE})")

_PASSWORDS = ("password", "passwd", "passphrase")
_KEYS = tuple(f"{kind}{joint}key" for kind in ("api", "access", "account", "private", "secret") for joint in ("", "-"))
_NAMES = (
    *("token", "secret", "signature", "?sig", "&sig", "credential", "credentials", "authorization", "_key"),
    *(*_PASSWORDS, *_KEYS),
)
_WORDS = ("token", "key", "pass", "secret", "signature", "sig", "credential", "authorization")
"""One of them is in a text that has one of the names."""
_LONGEST_NAME = 64
_IN_QUERY = re.compile(r"[?&][\w.-]*$")

_SECRET_VARIABLE = re.compile(
    r"TOKEN|API_?KEY|ACCESS_?KEY|_KEY$|SECRET|PASS(?:WORD|WD|PHRASE)|CREDENTIAL", re.IGNORECASE
)
_NOT_SECRET = re.compile(r"TOKENIZERS?_|_(?:PATH|FILE|DIR)$|DISABLE_|MAX_", re.IGNORECASE)
_SECRET_OPTION = re.compile(r"(--?)?[\w.-]*(?:api[_-]?key|token|password|secret)", re.IGNORECASE)


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What the variables hold whose names say that they are secrets; longer values first.

    Words, numbers, special tokens and paths are none: they would be taken out of every sentence.
    """
    values = (
        value.strip()
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and not _NOT_SECRET.search(name)
    )
    found = {value for value in values if len(value) >= SHORTEST and _is_secret_value(value)}
    return tuple(sorted(found, key=len, reverse=True))


def redacted(text: str, secrets: Sequence[str] | None = None) -> str:
    """A text with `[removed]` for each secret in it. Redacting twice changes nothing more.

    secrets  values to take out wherever they stand; those of this process' environment if not given
    """
    for secret in secrets_of(os.environ) if secrets is None else secrets:
        text = text.replace(secret, REMOVED)
    # Substrings are looked for first: a line of a log costs a few microseconds that way, and a hundred otherwise.
    for prefix, pattern in _BY_SHAPE.items():
        if prefix in text:
            text = pattern.sub(REMOVED, text)
    if ".eyJ" in text:
        text = _JWT.sub(_without_jwt, text)
    if "@" in text and ":/" in text:
        text = _IN_URL.sub(rf"\g<1>{REMOVED}@", text)
    lowered = text.lower()
    if any(word in lowered for word in _WORDS):
        text = _NAMED.sub(_without_named, text)
    if "Bearer " in text or "Basic " in text:
        text = _BEARER.sub(_without_login, text)
    return text


def redacted_command(arguments: Sequence[str]) -> list[str]:
    """A command line as it may be kept: also without what an option or a key has that is named like a secret."""
    kept: list[str] = []
    secret_follows = False
    for argument in arguments:
        name, joint, _ = argument.partition("=")
        if secret_follows:
            kept.append(REMOVED)
        elif joint and _SECRET_OPTION.fullmatch(name):
            kept.append(f"{name}={REMOVED}")
        else:
            kept.append(redacted(argument))
        found = _SECRET_OPTION.fullmatch(argument)
        secret_follows = found is not None and found[1] is not None
    return kept


# -- what looks like a secret --------------------------------------------------------------------------------------

_PIECE = re.compile(r"[A-Za-z0-9]+")
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[A-Z]")
"""Words of a name like LlamaForCausalLM. Chance makes parts of less than two letters."""
_FILE_NAME = re.compile(
    r"\.(?:jsonl?|ya?ml|toml|txt|md|csv|tsv|parquet|arrow|safetensors|gguf|py|log|gz|zst|jinja)\.?$", re.IGNORECASE
)
_SYMBOLS = re.compile(r"[!#$%^&*?@+=]")


def _odd_letters(value: str) -> int:
    """How many letters and digits of a value are in pieces that are neither a word nor a number."""
    return sum(len(piece) for piece in _PIECE.findall(value) if _is_odd(piece))


def _is_odd(piece: str) -> bool:
    if piece.isdigit():
        return False
    if not piece.isalpha():
        return True
    parts = _PART.findall(piece)
    return 8 <= len(piece) < 2.5 * len(parts) or max(map(len, parts)) > 15


def _is_secret_value(value: str) -> bool:
    """Whether what is called a secret can be one. Its name is believed, unless it looks like something else."""
    if value[0] in "<[" or value.isdecimal() or _FILE_NAME.search(value):
        return False
    odd = _odd_letters(value) >= 8
    if value[0] in "/~" and not odd:
        return False
    mixed = any(c.isalpha() for c in value) and any(c.isdigit() for c in value)
    long_enough = len(value) >= 12 and (mixed or len(_PIECE.findall(value)) > 3)  # a pass phrase has four words
    return (odd or long_enough or _SYMBOLS.search(value) is not None) and not os.path.exists(os.path.expanduser(value))


def _looks_secret(value: str) -> bool:
    """Whether a value, by itself, looks like what no person would write."""
    return len(value) >= 12 and _odd_letters(value) >= 8 and not _FILE_NAME.search(value)


def _without_jwt(found: re.Match[str]) -> str:
    before, begins, _ = found[1].partition("eyJ")
    return before + REMOVED if begins else found[0]


def _without_named(found: re.Match[str]) -> str:
    before = found.string[max(0, found.start() - _LONGEST_NAME) : found.start()].rstrip(" \t\"'\\").lower()
    if not before.endswith(_NAMES):
        return found[0]
    if before.endswith(_PASSWORDS):
        secret = _is_secret_value(found[1])
    else:
        # In the query of a URL, and after the name of this header, there is nothing else.
        secret = before.endswith("authorization") or _IN_QUERY.search(before) is not None or _looks_secret(found[1])
    return _without_group(found) if secret else found[0]


def _without_login(found: re.Match[str]) -> str:
    return _without_group(found) if _looks_secret(found[1]) else found[0]


def _without_group(found: re.Match[str]) -> str:
    return found[0].removesuffix(found[1]) + REMOVED
