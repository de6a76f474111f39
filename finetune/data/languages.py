"""Which language a text is in, roughly, by its script or by its most common words: for a summary, not for decisions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_SCRIPTS = {
    "Chinese": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Korean": re.compile("[\u1100-\u11ff\uac00-\ud7af]"),
    "Cyrillic": re.compile("[\u0400-\u052f]"),
    "Arabic": re.compile("[\u0600-\u06ff\u0750-\u077f]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Greek": re.compile("[\u0370-\u03ff\u1f00-\u1fff]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
    "Bengali": re.compile("[\u0980-\u09ff]"),
    "Tamil": re.compile("[\u0b80-\u0bff]"),
    "Telugu": re.compile("[\u0c00-\u0c7f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
    "Armenian": re.compile("[\u0530-\u058f]"),
    "Georgian": re.compile("[\u10a0-\u10ff]"),
}
_STOP_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the of and to in is that was it for you are with this be have has from what how which not each many"
        " if he she his an on at by as do does or will may more than much these they who",
        "German": "der die das und ist nicht ein eine zu den von mit sich des auf für im dem sind wie auch es ich wird",
        "French": "le la les des et est une un du que dans qui pour pas sur au avec ce il sont plus vous je par",
        "Spanish": "el la los las de que en un una por con para es del se lo como más su al pero no son cómo",
        "Italian": "il la di che è un una per non sono del della con gli le da nel si come più ha alla qual",
        "Portuguese": "os as de que do da em um uma para com não é no na por mais dos se como ao são você",
        "Dutch": "de het een en van is dat niet op te zijn met voor die er aan ook als maar bij wat ik hoe wordt",
        "Polish": "na się nie do jest to że jak od po za przez dla są czy ale tym które był oraz ze",
        "Swedish": "och att det som en är på för av med den inte till ett har de jag om var kan hur från",
        "Danish or Norwegian": "og at det som en er på for av af med den ikke til et har de jeg om kan fra hvordan",
        "Czech": "se na je že do jak pro jsou by ale to který jako podle není také bylo při nebo má ve",
        "Romanian": "și în de la cu nu este pe un din care pentru sunt mai ce ca au fi dar prin că",
        "Turkish": "ve bir bu için ile da ne olarak daha çok en gibi olan değil var mi kadar sonra nasıl",
        "Indonesian": "yang dan di untuk dengan ini itu dari dalam adalah pada tidak akan ke atau juga saya apa oleh",
        "Vietnamese": "và của là có không được cho một trong với các người những để này đã khi từ về như",
        "Finnish": "ja ei että se oli hän ovat mutta kuin joka myös tai kun niin mitä ole voi sen",
        "Hungarian": "az és hogy nem egy van ez meg csak volt mint már vagy ha mi el kell",
    }.items()
}
_WORD = re.compile(r"[^\W\d_]+")
_SYMBOL = re.compile(r"[{}\[\]();_\\#|&^~@]|[=!]=|=\"| = ")
SAMPLE_CHARACTERS = 2_000
FEWEST_WORDS = 4
CODE = 0.06


def language_counts(texts: Sequence[str]) -> Counter[str]:
    """How many texts are in which language, roughly, by their first 2,000 characters.

    Other scripts than the Latin count as themselves, Latin ones by their stop words; "other" is a Latin language that
    is not known here, "unknown" what is too short or too much like code to tell.
    """
    return Counter(_language(text[:SAMPLE_CHARACTERS]) for text in texts)


def _language(text: str) -> str:
    letters = sum(map(str.isalpha, text))
    if not text.isascii():
        scripts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
        if scripts["Japanese"] * 10 >= scripts["Chinese"]:
            scripts["Japanese"] += scripts.pop("Chinese")  # kana between the characters
        name = max(scripts, key=lambda script: scripts[script])
        if scripts[name] >= max(2, letters * 0.3):
            return name
    words = _WORD.findall(text.lower())
    if len(words) < FEWEST_WORDS or len(_SYMBOL.findall(text)) > CODE * len("".join(text.split())):
        return "unknown"
    known = {language: sum(word in stop for word in words) for language, stop in _STOP_WORDS.items()}
    best, second = sorted(known, key=lambda language: -known[language])[:2]
    if known[best] < max(2, 0.08 * len(words)) or known[best] == known[second]:
        return "other" if len(words) >= 2 * FEWEST_WORDS else "unknown"
    return best
