"""What is found in texts: each kind in what has it, and in nothing that only looks like it."""

from __future__ import annotations

from itertools import pairwise
from time import process_time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.data.languages import language_counts
from finetune.data.quality import Findings, length_outliers, scan

KEY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj"
BEGIN = "-----BEGIN PRIVATE KEY-----"
LETTERS = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8bC0dF2hJ4kL6nP8rS1uV3xY5zA7cD9eG0iI2k"

FOUND = {
    "control characters": ["a bell \x07", "a page\x0cfeed", "a \x7f", "C1: \x85", "nothing \x00"],
    "carriage returns in text": ["one\r\ntwo", "\r"],
    "zero-width or bidirectional control characters": [
        "\ufeffWith a byte order mark",
        "zero\u200bwidth",
        "hid\u200dden",
        "\u200c",
        "turned \u202e round",
        "isolated \u2066 text",
        "left\u200eright",
        "hidden \U000e0041\U000e0042 tags",
    ],
    "replacement characters": ["caf\ufffd"],
    "probable mojibake": [
        text.encode().decode("cp1252", "replace").replace("\ufffd", "\x9d")
        for text in ("café", "It’s", "a – b", "über", "ähnlich", "“", "5 €", "日本語文字", "Привет", "naïve", "😀")
    ]
    + ["cafÃ©", "Itâ€™s", "It‚Äôs", "caf√©", "20 Â°C", "Ã–sterreich"],
    "e-mail address": [
        "jane.doe@gmail.com",
        "<o'neil+list@mail.co.uk>",
        "mailto:j_d@firm-name.de",
        "write to me@firm.org.",
        "(a@b.museum)",
    ],
    "telephone number": [
        "(212) 736-5000",
        "(212)736-5000",
        "212-736-5000",
        "212.736.5000",
        "1-800-463-6332",
        "+1 212 736 5000",
        "+1 (212) 736-5000",
        "+49 30 1234567",
        "+44 20 7946 0958",
        "+33 1 42 68 53 00",
        "+4915112345678",
        "tel:+86-138-0013-8123",
        "301‑496‑5248",
        "+49\xa030\xa01234567",
    ],
    "payment card number": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "5555555555554444",
        "2223003122003222",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
        "30569309025904",
        "3530111333300000",
    ],
    "IBAN": [
        "DE89 3704 0044 0532 0130 00",
        "GB29NWBK60161331926819",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO9386011117947",
        "IBAN: CH93 0076 2011 6238 5295 7 AT THE BANK",
    ],
    "US social security number": ["536-22-1234", "SSN: 001-01-0001."],
    "IPv4 address": ["93.184.216.34", "http://151.101.1.69:8080/", "from 52.14.187.9, twice", "193.99.144.80/24"],
    "private key": [
        f"-----BEGIN {kind}PRIVATE KEY-----\n{KEY}\n" for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ")
    ]
    + [
        f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A1B\n\n{KEY}",
        f'"-----BEGIN PRIVATE KEY-----\\n{KEY}\\n"',
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: 2\n\n{KEY}",
    ],
    "AWS access key": ["AKIAIOSFODNN7EXAMPLE", 'key="ASIAY34FZKBOKMUTVV7A"'],
    "GitHub token": ["ghp_" + LETTERS[:36], "gho_" + LETTERS[:36], f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}"],
    "Hugging Face token": ["hf_" + LETTERS[:34], "HF_TOKEN=hf_" + LETTERS[:34]],
    "OpenAI or Anthropic key": [
        "sk-" + LETTERS[:48],
        "sk-proj-" + LETTERS,
        "sk-ant-api03-" + LETTERS + "-AA",
        "'sk-" + LETTERS[:20] + "T3BlbkFJ" + LETTERS[:20] + "'",
    ],
    "Google API key": ["AIza" + LETTERS[:35]],
    "Slack token": [
        "xoxb-123456789012-1234567890123-" + LETTERS[:24],
        "https://hooks.slack.com/services/T00000000/B00000000/" + LETTERS[:24],
    ],
    "JSON web token": [
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
    ],
    "password in a URL": [
        "postgres://admin:hunter2@db.internal:5432/x",
        "https://user:s3cret@10.0.0.1/",
        "redis://:p4ss@cache:6379",
    ],
}
CASES = [(kind, text) for kind, texts in FOUND.items() for text in texts]

CLEAN = [
    "Tabs\tand\nlines are fine; so are “quotes”, it’s, an — and naïve, café, Österreich, São, MAÇÃ, À LA CARTE.",
    "Ångström, ÀÉÎÕÜ, «Â», «TÂM», “ÂÃ”, 20 °C, £5, ½, © and √2",
    "BRASÃO – SÃO PAULO, “A LIÇÃO”, IRMÃ’ S",
    "👨‍👩‍👧‍👦 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and ❤️‍🔥",
    "می‌خواهم क्‍ष שלום\u200f עולם",
    "Привет, мир. Ðað er ÐÐ",
    "@property @2x.png icon@2x.png lodash@4.17.21 git@github.com:user/repo me@localhost a@b j@example.com @ at@",
    "2019-03-04 10:15:30, 1989–2003, 03/04/2019, 2019.03.04 12.30, 20190304101530, 1623456789012, 2020-2021-2022",
    "3.14159265358979, 0.4111111111111111, 1,234,567,890, 10 000 000 000, +100 000 000, 1e-10, +3.14159265358",
    "<<48/2=24>>24 and 48+24 = <<48+24=72>>72; 200-100-1000=<<200-100-1000=-900>>; 212-736-5000=3; 5 + 4915112345678",
    "id 1234567890123456, ISBN 978-3-16-148410-0, ISSN 2049-3630, part 123-456-7890, 4111 1111 1111 1112",
    "version 10.15.7.1, v1.2.3.4, section 1.2.3.4, Chrome/91.0.100.124, 192.168.100.1, 127.0.0.1, 10.0.0.255",
    "1.3.6.1.4.1.311, 256.300.1.1, 192.0.2.146, 224.0.0.251, 1.2.3.4.500",
    "000-12-3456, 666-12-3456, 912-12-3456, 536-00-1234, 536-22-0000, 1536-22-1234, 536-22-12345, 078-05-1120",
    "DE89 3704 0044 0532 0130 01, GB29 NWBK, AB12 3456 7890 1234 5678, US12345678901234, COVID19 2020",
    "-----BEGIN PUBLIC KEY-----\n" + KEY + "\n-----BEGIN PRIVATE KEY-----\n...\n-----BEGIN CERTIFICATE-----\n" + KEY,
    "ASIA PACIFIC, ASIAPACIFIC, AKIA, xAKIAIOSFODNN7EXAMPLE, ghp_short, hf_hub_download, hf_transfer, HF_HOME",
    "risk-based, sk-learn, a-task-oriented-very-long-hyphenated-identifier-with-many-words, sk-your-key-here, sk-...",
    "disk-" + LETTERS + " xoxo, xoxb-your-token, eyJ, AIzaShort, a.eyJ",
    "https://user:password@host/, http://a.b:80/@c, https://medium.com/@user:1, postgres://<user>:<password>@host",
    "555-0123, (212) 555-0123, 911-911-1911, call 1-800-FLOWERS",
]


def kinds(text: str, *, private: bool = True) -> set[str]:
    return set(scan([text], ["row 1"], private=private).counts)


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_it_is_found(kind: str, text: str) -> None:
    assert kind in kinds(text)


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_looks_like_it(text: str) -> None:
    assert kinds(text) == set()


@pytest.mark.parametrize(
    ("kind", "text"),
    [(kind, text) for kind, text in CASES if kind in list(FOUND)[list(FOUND).index("e-mail address") :]],
)
def test_private_matters_are_looked_for_only_on_demand(kind: str, text: str) -> None:
    assert kinds(text, private=False) == set()


fillers = st.text(st.sampled_from("aZ é’日😀.,;:!?\n\t'\"-_/@#=1234567890") | st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=400)
@given(st.sampled_from(CASES), fillers, fillers)
def test_a_planted_finding_is_found_whatever_stands_around_it(case: tuple[str, str], before: str, after: str) -> None:
    kind, text = case
    assert kind in kinds(f"{before}\n{text}\n{after}")


rows = st.lists(st.sampled_from([text for _, text in CASES] + CLEAN) | fillers, max_size=12)


@given(rows, st.lists(st.integers(0, 12)), st.booleans())
def test_it_does_not_depend_on_batches(texts: list[str], cuts: list[int], private: bool) -> None:
    places = [f"data.jsonl:{number}" for number in range(1, len(texts) + 1)]
    merged = Findings()
    for begin, end in pairwise(sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})):
        merged.merge(scan(texts[begin:end], places[begin:end], private=private))
    assert merged == scan(texts, places, private=private)


@given(rows)
@example(["SSN: 001-01-0001.", "(212) 736-5000"])
@example(["(212) 736-5000", "4111 1111 1111 1111"])
@example(["redis://:p4ss@cache:6379", "@"])
def test_it_is_what_the_rows_have_one_by_one(texts: list[str]) -> None:
    """Nothing is made up where two rows meet, a row counts once, and the first place is the first row's."""
    whole = scan(texts, list(map(str, range(len(texts)))), private=True)
    single = [kinds(text) for text in texts]
    every = set().union(*single)
    assert whole.counts == {kind: sum(kind in row for row in single) for kind in every}
    assert whole.first == {kind: str(next(i for i, row in enumerate(single) if kind in row)) for kind in every}


@given(st.text(st.characters()))
def test_any_text_can_be_scanned(text: str) -> None:
    """Lone surrogates too, which JSON can spell."""
    scan([text, text], ["1", "2"], private=True)
    language_counts([text])


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "4111 ",
        "+1 ",
        "@",
        "a@",
        "x://a:b@",
        "AB12 ",
        "sk-",
        "a.eyJ",
        "Ð¿",
        "é\xa0",
        "\u200d",
        BEGIN,
        BEGIN + " a: ",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    """100 kB of what a rule begins with: a rule that looks at each piece up to the end would take a minute."""
    began = process_time()
    scan([text * (100_000 // len(text))], ["1"], private=True)
    assert process_time() - began < 3


def test_what_was_found_is_not_kept() -> None:
    findings = scan([text for _, text in CASES], [f"row {i}" for i in range(len(CASES))], private=True)
    kept = repr(findings)
    assert not any(text in kept for _, text in CASES if len(text) > 5)


def test_findings_are_added_up() -> None:
    findings = Findings()
    findings.add("empty rows", "a:1")
    findings.add("empty rows", "a:2", 3)
    findings.merge(Findings({"empty rows": 1, "long rows": 2}, {"empty rows": "b:1", "long rows": "b:2"}))
    assert findings == Findings({"empty rows": 5, "long rows": 2}, {"empty rows": "a:1", "long rows": "b:2"})


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("English", "What are the treatments for this disease, and how is it found?"),
        ("German", "Wie wird die Krankheit behandelt und was sind die ersten Anzeichen?"),
        ("French", "Quels sont les traitements de la maladie et comment est-elle reconnue ?"),
        ("Spanish", "¿Cuáles son los tratamientos de la enfermedad y cómo se reconoce?"),
        ("Italian", "Quali sono i trattamenti per la malattia e come si riconosce?"),
        ("Portuguese", "Quais são os tratamentos para a doença e como ela é reconhecida?"),
        ("Dutch", "Wat zijn de behandelingen van de ziekte en hoe wordt het herkend?"),
        ("Polish", "Jakie są sposoby leczenia tej choroby i jak się je rozpoznaje, czy to nie jest trudne?"),
        ("Swedish", "Vilka är behandlingarna för sjukdomen och hur upptäcks den?"),
        ("Turkish", "Bu hastalık için hangi tedaviler var ve bir doktor ne kadar sonra aranmalı?"),
        ("Chinese", "这种疾病的治疗方法是什么?"),
        ("Japanese", "この病気の治療法は何ですか。"),
        ("Korean", "이 질병의 치료법은 무엇입니까?"),
        ("Cyrillic", "Как лечат эту болезнь?"),
        ("Arabic", "ما هي علاجات هذا المرض؟"),
        ("Hebrew", "מהם הטיפולים במחלה?"),
        ("Greek", "Ποιες είναι οι θεραπείες;"),
        ("Devanagari", "इस रोग का उपचार क्या है?"),
        ("Thai", "โรคนี้รักษาอย่างไร"),
        ("Japanese", "Pythonのリストについて説明してください。"),
        ("English", "The Chinese word 你好 is what you say to greet a person, and it is pronounced with two tones."),
        ("other", "Nini matibabu ya ugonjwa huu na unatambuliwaje mapema"),
        ("unknown", "Yes"),
        ("unknown", ""),
        ("unknown", "12 + 13 = 25"),
        ("unknown", 'def f(x):\n    return [g(y) for y in x if y["a"] == 1]\n\nprint(f(data)); assert f([]) == []'),
        ("English", "Natalia sold 48/2 = <<48/2=24>>24 clips in May and 48+24 = <<48+24=72>>72 of them in all."),
    ],
)
def test_languages(language: str, text: str) -> None:
    assert language_counts([text, text]) == {language: 2}


def test_rows_that_are_far_longer() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.5, 5_000).astype(np.int64)
    lengths[[17, 4_000]] = 50_000
    assert length_outliers(lengths).tolist() == [17, 4_000]


@pytest.mark.parametrize(
    ("lengths", "outliers"),
    [([], []), ([7], []), ([0, 0, 0], []), ([100] * 50 + [101, 199], []), ([100] * 50 + [300], [50]), ([5, 5000], [])],
)
def test_few_and_equal_lengths(lengths: list[int], outliers: list[int]) -> None:
    assert length_outliers(np.array(lengths, np.int64)).tolist() == outliers
