"""Every family runs in llama.cpp in exact and in quantised form, and docs/export.md speaks of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.export.gguf.families import FAMILIES
from scripts.export_table import BEGIN, END, MODELS, PAGE, QUANTS, distances

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_says_in_llamacpp_what_it_says_in_transformers(architecture: str, tmp_path: Path) -> None:
    found = distances(architecture, ["f32", "q4_k_m"], tmp_path)
    # Up to 2e-7 was seen in f32, where llama.cpp takes GELU from a table; up to 0.5 in q4_k_m, for random weights.
    assert found["f32"] < 1e-6
    assert 1e-4 < found["q4_k_m"] < 1.0


def test_the_page_has_every_family_and_every_quantisation() -> None:
    lines = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [f"{name}ForCausalLM" for name in header[1:]] == list(MODELS)
    assert set(MODELS) == set(FAMILIES)
    assert [row[0] for row in rows] == list(QUANTS)
    assert all(0 < float(cell) < 3 for row in rows for cell in row[1:])
