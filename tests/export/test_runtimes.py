from __future__ import annotations

import pytest

from finetune.errors import ExportError
from finetune.export.runtimes import modelfile


def test_the_least_a_modelfile_says() -> None:
    assert modelfile("m-q8_0.gguf") == "FROM ./m-q8_0.gguf\n"


def test_all_a_modelfile_says() -> None:
    text = modelfile("m.gguf", stop=("<|im_end|>", "</s>"), system='Say "hi"!\nThen stop.', license_text="Apache-2.0")
    assert text.splitlines() == [
        "FROM ./m.gguf",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "</s>"',
        'SYSTEM """Say "hi"!',
        'Then stop."""',
        'LICENSE "Apache-2.0"',
    ]


@pytest.mark.parametrize("system", ['three """ marks', 'ends with "'])
def test_text_that_would_end_the_quotation_is_refused(system: str) -> None:
    with pytest.raises(ExportError, match="Modelfile"):
        modelfile("m.gguf", system=system)
