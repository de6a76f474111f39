"""Secrets and personal data in texts: rules for their shapes, and the arithmetic that their check digits obey.

The rules prefer missing something to crying wolf, and say what they leave out. A batch is looked at as one string by
cheap means (substrings, a table over its bytes, the gaps between its digits); only what looks suspicious meets a
regular expression. The text itself is never returned or kept.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Hits = Iterator[tuple[int, str]]
"""(row, kind), in any order and as often as may be."""

Check = Callable[["re.Match[bytes]"], bool]


def _luhn(match: re.Match[bytes]) -> bool:
    """ISO/IEC 7812: every second digit from the right doubled, digits of the sum added, a multiple of ten."""
    digits = [int(digit) for digit in match[0].decode() if digit.isdigit()][::-1]
    total = sum(digits[0::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return total % 10 == 0 and len(set(digits)) > 1


_IBAN_LENGTHS = """15 NO|16 BE|18 DK FI FO GL NL SD|19 MK SI|20 AT BA EE KZ LT LU MN XK|21 CH CR HR LI LV
|22 BG BH DE GB GE IE ME RS VA|23 AE GI IL IQ OM SO TL|24 AD CZ ES MD PK RO SA SE SK TN VG|25 LY PT ST|26 IS TR
|27 BI DJ FR GR IT MC MR SM|28 AL AZ BY CY DO GT HU LB NI PL SV|29 BR EG PS QA UA|30 JO KW MU|31 MT SC|32 LC|33 RU"""
"""How long an IBAN is in each country: the registry of ISO 13616."""
_LENGTH_OF = {country: int(line[:2]) for line in _IBAN_LENGTHS.split("|") for country in line[3:].split()}


def _iban(match: re.Match[bytes]) -> bool:
    """ISO 13616: the country and check digits moved to the end, letters as numbers from 10, remainder 1 by 97."""
    text = match[0].decode().replace(" ", "")
    length = _LENGTH_OF.get(text[:2], 0)
    text = text[:length]
    return len(text) == length > 0 and int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


def _public_address(match: re.Match[bytes]) -> bool:
    """No private or documentation network, and with a number of three digits, which versions hardly ever have."""
    text = match[0].decode()
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and any(len(part) == 3 for part in text.split("."))


def _international(match: re.Match[bytes]) -> bool:
    """E.164 has at most 15 digits. Round numbers and decimals are no telephone numbers, 555-01xx belongs to fiction."""
    digits = re.sub(rb"\D", b"", match[0])
    plain = re.fullmatch(rb"\+\d+(?:\.\d+)?", match[0])
    fiction = re.match(rb"1\d{3}55501", digits)
    return (11 if plain else 9) <= len(digits) <= (13 if plain else 15) and not fiction and not digits.endswith(b"0000")


_AREA = rb"[2-9](?!11)\d\d"  # area codes and exchanges of the North American plan
_COUNTRY = (
    rb"(?:[17]|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    rb"|(?:2[1-689]|3[578]|42|5[09]|6[789]|8[058]|9[679])\d)"
)
_CARD = (  # Visa, Mastercard, Discover, JCB, UnionPay; American Express; Diners Club
    rb"(?:4\d{3}|5[1-5]\d\d|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)|6011|64[4-9]\d|65\d\d|35(?:2[89]|[3-8]\d)|62\d\d)"
    rb"([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -]?)\d{6}\2\d{5}|3(?:0[0-5]|[68]\d)\d([ -]?)\d{6}\3\d{4}"
)
_NUMBERS: list[tuple[str, re.Pattern[bytes], re.Pattern[bytes], Check | None]] = [  # kind, quick look, rule, arithmetic
    (
        "telephone number",
        re.compile(rb"\d{3}[ .-]\d{4}"),
        re.compile(
            rb"(?<![\w.$+=<>*/^%#-])(?:\+?1[ .-]?)?(?:\(AREA\)[ -]?(?!555.01)AREA[ .-]|AREA([.-])(?!555.01)AREA\1)\d{4}"
            rb"(?![\w%]|[.,-]\d| ?[=*^]| [+-] \d)".replace(b"AREA", _AREA)
        ),
        None,
    ),
    (
        "telephone number",
        re.compile(rb"\+"),
        re.compile(
            rb"(?<![\w.$+=<>*/^%#)-])\+COUNTRY(?:[ .-]?\(?\d{1,14}+\)?){1,6}+(?![\w%]|[.,-]\d| ?[=*^])".replace(
                b"COUNTRY", _COUNTRY
            )
        ),
        _international,
    ),
    (
        "payment card number",
        re.compile(rb"\d{4}[ -]?\d{4,6}[ -]?\d{4}"),
        re.compile(rb"(?<![\w.+$-])(?:" + _CARD + rb")(?!\w|[.-]\d)"),
        _luhn,
    ),
    (  # none begins with 000, 666 or 9; the two that are left out were printed somewhere and withdrawn
        "US social security number",
        re.compile(rb"\d{3}-\d\d-\d{4}"),
        re.compile(
            rb"(?<![\w.+/=*-])(?!000|666|9|078-05-1120|219-09-9999)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?!\w|[.-]\d| ?[=*^])"
        ),
        None,
    ),
    (
        "IPv4 address",
        re.compile(rb"\.\d+\.\d+\."),
        re.compile(
            rb"(?<![\w.])(?<![\w.][/-])(?<!ersion )(?<!elease )(?<!ection )\d{1,3}(?:\.\d{1,3}){3}(?!\w|[.-]\d)"
        ),
        _public_address,
    ),
]
_IBAN = re.compile(rb"(?<![\w-])[A-Z]{2}\d\d(?: ?[A-Z0-9]){11,30}")

_EMAIL = re.compile(
    rb"[\w%+-]@(?!(?:[\w-]+\.)*example\.(?:com|org|net)\b)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    rb"(?!(?:png|jpe?g|gif|svg|webp|js|css|html|example|test|invalid|local|localhost)\b)[A-Za-z]{2,24}(?![\w-]|\.\w|:\w)"
)
_URL_PASSWORD = re.compile(
    rb"[A-Za-z]://[^\s/?#:@\0<>{}$]*:(?!(?:[x*.]+|(?:your)?[_-]?pass(?:word|wd)?|pwd)@)[^\s/?#@\0<>{}$]+@[\w\[]\Z",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    rb"(?:\s|\\[nr]|[A-Za-z-]{1,40}+: [^\n\\]{0,200}+){1,20}+[A-Za-z0-9+/]{16}"
)
_SECRETS: list[tuple[str, tuple[bytes, ...], re.Pattern[bytes]]] = [
    ("AWS access key", (b"AKIA", b"ASIA"), re.compile(rb"(?<![\w/+])(?:AKIA|ASIA)[A-Z2-7]{16}(?!\w)")),
    (
        "GitHub token",
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        re.compile(
            rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})(?!\w)"
        ),
    ),
    ("Hugging Face token", (b"hf_",), re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{34,40}(?!\w)")),
    (
        "OpenAI or Anthropic key",
        (b"sk-",),
        re.compile(
            rb"(?<![\w-])sk-(?:(?:proj|svcacct|admin|ant-[a-z]+\d\d)-[\w-]{40,}|(?=[a-zA-Z]*\d)(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{40,})"
        ),
    ),
    ("Google API key", (b"AIza",), re.compile(rb"(?<![\w-])AIza[\w-]{35}(?![\w-])")),
    (
        "Slack token",
        (b"xox", b"xapp-", b"hooks.slack.com"),
        re.compile(
            rb"(?<![A-Za-z0-9])(?:xox[abeoprs]-(?:\d-)?[A-Za-z0-9]{8,}-[\w-]{10,}|xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]{16,}"
            rb"|hooks\.slack\.com/services/T\w{7,}/B\w{7,}/\w{20,})"
        ),
    ),
    ("JSON web token", (b".eyJ",), re.compile(rb"(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}")),
]


_AROUND = 16
"""Bytes on either side of a number that the rules may look at."""


def private_data(texts: Sequence[str]) -> Hits:
    rows = [text if text.isascii() else _plain(text) for text in texts]
    encoded = [text.encode("utf-8", "surrogatepass") for text in rows]
    joined = b"\0".join(encoded)
    ends = list(accumulate(len(row) + 1 for row in encoded))
    if b"PRIVATE KEY" in joined:
        yield from ((row, "private key") for row, text in enumerate(encoded) if _PRIVATE_KEY.search(text))
    data = np.frombuffer(joined, np.uint8)
    wordy = np.unique(np.searchsorted(ends, _long_words(data), side="right")).tolist()
    words = b"\0".join(encoded[row] for row in wordy)
    for kind, needles, pattern in _SECRETS:
        for needle in needles:
            if needle in words:
                suspects = (row for row in wordy if needle in encoded[row])
                yield from ((row, kind) for row in suspects if pattern.search(encoded[row]))
    for at in _all(b"@", joined):
        if at and _EMAIL.match(joined, at - 1):
            yield bisect_right(ends, at), "e-mail address"
        scheme = joined.rfind(b"://", max(0, at - 300), at)
        if scheme > 0 and _URL_PASSWORD.match(joined, scheme - 1, at + 2):
            yield bisect_right(ends, at), "password in a URL"
    digits = np.flatnonzero(data - np.uint8(ord("0")) < 10)
    for begin, end in _long_numbers(data, digits):
        offset = max(0, begin - _AROUND)
        around, core = joined[offset : end + _AROUND], joined[max(0, begin - 2) : end]
        for kind, hint, pattern, check in _NUMBERS:
            if not hint.search(core):
                continue
            for found in pattern.finditer(around):  # what is cut off at the edge has its own turn
                if begin - 2 <= offset + found.start() < end and (check is None or check(found)):
                    yield bisect_right(ends, begin), kind
    for at in _country_codes(data, digits):
        if (match := _IBAN.match(joined, at)) and _iban(match):
            yield bisect_right(ends, at), "IBAN"


def _plain(text: str) -> str:
    """With the hyphens and spaces that typesetting puts into numbers as those of a keyboard."""
    return text.replace("\xa0", " ").replace("\u202f", " ").replace("\u2011", "-").replace("\u2013", "-")


def _all(needle: bytes, joined: bytes) -> Iterator[int]:
    at = joined.find(needle)
    while at >= 0:
        yield at
        at = joined.find(needle, at + 1)


_BETWEEN = np.isin(np.arange(256), list(b" .-()"))
_CAPITAL = np.isin(np.arange(256), list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def _long_words(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Where 20 bytes from `-` to DEL or more end: letters, digits and what tokens have between them, but no space."""
    breaks = np.flatnonzero(data - np.uint8(ord("-")) > 0x7F - ord("-"))
    ends = np.append(breaks, len(data))
    return np.asarray(ends[np.diff(ends, prepend=-1) > 20] - 1, np.int64)


def _long_numbers(data: npt.NDArray[np.uint8], digits: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where digits stand together as in one of `_NUMBERS`, and not as in a date or a table.

    That is: three dots; or nine digits after a plus or with a group of four that is not the first; or thirteen.
    """
    if not len(digits):
        return
    gaps = np.diff(digits)
    together = gaps <= 4
    for at in (digits[:-1] + 1, digits[1:] - (gaps + 1) // 2, digits[1:] - 1):  # first, middle and last of the gap
        together &= _BETWEEN[data[at]] | (gaps == 1)
    breaks = np.flatnonzero(~together)
    begins, ends = np.append(0, breaks + 1), np.append(breaks, len(digits) - 1)
    dots = np.append(0, np.cumsum((gaps == 2) & (data[digits[1:] - 1] == ord("."))))
    close = np.append(gaps == 1, np.zeros(3, np.bool_))
    fours = np.append(0, np.cumsum(~close[:-3] & close[1:-2] & close[2:-1] & close[3:]))
    plus = data[np.maximum(digits[begins] - 1, 0)] == ord("+")
    length = ends - begins + 1
    long = (dots[ends] - dots[begins] >= 3) | (length >= 13) | ((length >= 9) & (plus | (fours[ends] > fours[begins])))
    yield from zip(digits[begins[long]].tolist(), (digits[ends[long]] + 1).tolist(), strict=True)


def _country_codes(data: npt.NDArray[np.uint8], digits: npt.NDArray[np.int64]) -> Iterator[int]:
    """Where two capitals and two digits stand, as at the beginning of an IBAN."""
    first = digits[:-1][np.diff(digits) == 1]
    first = first[first >= 2]
    yield from (first[_CAPITAL[data[first - 1]] & _CAPITAL[data[first - 2]]] - 2).tolist()
