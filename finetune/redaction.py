"""Tokens and passwords, recognised by their shape and taken out of what is shown or kept.

Two ways to recognise one, used together: by what a text looks like (the prefixes that services give their tokens,
`user:password@` in a URL, `token=` before a long word), and by being, letter for letter, what a variable of the
environment holds whose name says that it is a secret. Neither finds a password that looks like a word and stands alone;
that is why nothing here is an excuse to write one down.

What is left alone on purpose: 40 or 64 hexadecimal digits, which here are commits and hashes far more often than a key
of Weights & Biases (that one is found by its variable), and `pad_token=…` and its like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

REMOVED = "[removed]"
"""What stands in the place of a secret."""

SHORTEST = 8
"""Characters: a shorter value of a variable is too likely to be part of some other word."""

_PREFIXES = (
    "hf_",
    "api_org_",
    "wandb_v",
    "local-",
    "sk-",
    "gh",
    "glpat-",
    "AKIA",
    "ASIA",
    "AIza",
    "ya29.",
    "xox",
    "xapp-",
)
_BY_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v\d+_[\w-]{16,}|local-[0-9a-f]{40}"  # Weights & Biases: newer keys, and those of servers of one's own
    r"|sk-(?=[\w-]{0,99}\d)[\w-]{20,}"  # OpenAI, Anthropic and those that took after them
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z2-7]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}"  # Amazon, Google
    r"|xox[abeoprs]-[\w-]{16,}|xapp-[\w-]{16,}"  # Slack
    r")"
)
_JWT = re.compile(r"eyJ[\w-]{10,4096}\.eyJ[\w-]{10,8192}\.[\w-]{16,}")

_IN_URL = re.compile(r"(?<=[A-Za-z0-9])(:/{1,2})[^\s/?#'\"]{1,512}@(?=[\w\[])")
"""Who logs in, and with what. One slash after the colon as well: that is what becomes of a URL taken for a path."""

_WORDS = ("token", "key", "pass", "secret", "signature", "sig=", "credential", "bearer", "basic")
_NAMED = re.compile(
    r"(token|(?:api|access|private|secret)[_-]?key|pass(?:word|wd|phrase)|secret|signature|credentials?|\bsig|authorization)"
    r"([\"']?\s{0,2}[=:]\s{0,2}[\"']?(?:(?:Bearer|Basic)\s)?)([\w.~+/%-]{8,}=*)",
    re.IGNORECASE,
)
"""A name, what stands between it and its value, and the value: 8 characters or more."""

_ANOTHER_TOKEN = re.compile(
    r"(?:^|[^A-Za-z])(?:pad|eos|bos|unk|sep|cls|mask|eot|eog|image|special|new|stop|end|a|the|per)[_ -]$", re.I
)
"""What stands before a `token` that is a piece of text."""

_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s)([\w.~+/%-]{8,}=*)")

_SECRET_VARIABLE = re.compile(r"TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASS(?:WORD|WD|PHRASE)|CREDENTIAL", re.IGNORECASE)
_NOT_SECRET = re.compile(r"TOKENIZERS?_|_(?:PATH|FILE|DIR)$|DISABLE_|MAX_", re.IGNORECASE)
_SECRET_OPTION = re.compile(r"--?[\w-]*(?:api-?key|token|password|secret)", re.IGNORECASE)


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What the variables hold whose names say that they are secrets; longer values first.

    A value that begins like a path, and one in digits alone, is none.
    """
    values = (
        value.strip()
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and not _NOT_SECRET.search(name)
    )
    found = {value for value in values if len(value) >= SHORTEST and not value.isdecimal() and value[0] not in "/~"}
    return tuple(sorted(found, key=len, reverse=True))


def redacted(text: str, secrets: Sequence[str] | None = None) -> str:
    """A text with `[removed]` for each secret in it. Redacting twice changes nothing more.

    secrets  values to take out wherever they stand; those of this process' environment if not given
    """
    for secret in secrets_of(os.environ) if secrets is None else secrets:
        text = text.replace(secret, REMOVED)
    # Substrings are looked for first: a line of a log costs a few microseconds that way, and a hundred otherwise.
    if any(prefix in text for prefix in _PREFIXES):
        text = _BY_SHAPE.sub(REMOVED, text)
    if ".eyJ" in text:
        text = _JWT.sub(REMOVED, text)
    if "@" in text and ":/" in text:
        text = _IN_URL.sub(rf"\g<1>{REMOVED}@", text)
    lowered = text.lower()
    if any(word in lowered for word in _WORDS):
        text = _BEARER.sub(rf"\g<1>{REMOVED}", _NAMED.sub(_without_value, text))
    return text


def redacted_command(arguments: Sequence[str]) -> list[str]:
    """A command line as it may be kept: also without what follows an option that is named like a secret."""
    kept: list[str] = []
    secret_follows = False
    for argument in arguments:
        kept.append(REMOVED if secret_follows else redacted(argument))
        secret_follows = _SECRET_OPTION.fullmatch(argument) is not None
    return kept


def _without_value(found: re.Match[str]) -> str:
    before = found.string[max(0, found.start() - 12) : found.start()]
    if found[1].lower() == "token" and _ANOTHER_TOKEN.search(before):
        return found[0]
    return f"{found[1]}{found[2]}{REMOVED}"
