"""Regular expressions in an adapter's settings: those that would never end are refused, all ordinary ones are not."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.export.adapter_checks import refused_settings

EXPLOSIVE = (
    "(.*.*.*.*.*.*)*!", "(a+)+!", "(?:a|a)*!", "(a|ab)*!", "(x*y?)+!", "(?:q_proj|.*)*!", "(a|a)" * 30 + "!",
    "a?" * 30 + "a" * 30, ".*" * 5 + "!", r"\w{1,9}" * 9, "(?=.*.*.*.*.*!)", r"[\]a)*]*" * 9 + "!",
    r"\\(?x: (a+) +)!",
)  # fmt: skip
"""Patterns that take more steps than atoms in the universe, or at least than a person will wait for."""

ORDINARY = (
    "q_proj", "^model.layers.0.self_attn.q_proj", r"layers\.1\.mlp\..*", r".*\.gate_up_proj", r"layers\.\d{1,2}\.mlp.*",
    r"model\.layers\.(0|1|2|10|11|12)\.self_attn\.(q|k|v)_proj", r".*layers\.([0-9]|1[0-9]|2[0-7])\..*_proj",
    r"(?!.*vision).*(?:q_proj|k_proj)", r"(ab)*[^.*]+\(?", "(?P<what>gate|up)_proj",
)  # fmt: skip

FOR_VISION = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp|ffn).*?(?:q_proj|o_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj|up_proj)))"
)
"""Of the kind that a trainer writes that names targets in models with and without a vision tower alike."""


PATTERN_TABLES = ("rank_pattern", "alpha_pattern")


@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
def test_patterns_that_would_keep_matching_for_years_are_refused(q_adapter: Path, key: str) -> None:
    """PEFT runs all of them on the names of all layers, when a proof loads the adapter."""
    config = json.loads((q_adapter / "adapter_config.json").read_text())
    for pattern in EXPLOSIVE:
        refused = refused_settings(config | {key: {pattern: 4} if key in PATTERN_TABLES else pattern})
        assert any(f"`{key}` has the pattern `{pattern[:60]}`" in problem for problem in refused), pattern
    for pattern in ORDINARY:
        assert not refused_settings(config | {key: {pattern: 4} if key in PATTERN_TABLES else pattern}), pattern
    assert not refused_settings(config | {"target_modules": FOR_VISION})


@settings(max_examples=200, deadline=None)
@given(st.text("ab.()|*+?[]\\{1,2}", max_size=12), st.text("ab", min_size=14, max_size=14))
def test_what_is_allowed_is_matched_in_no_time(pattern: str, name: str) -> None:
    """Whatever is made of the characters that patterns are made of: a bound that is wrong takes seconds here."""
    targets = f"({pattern})" * 4 + "!"
    if not refused_settings({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}):
        started = time.perf_counter()
        re.fullmatch(targets, name * 6)
        assert time.perf_counter() - started < 5
