"""llama.cpp's numbers: those of transformers, and nothing else of llama.cpp's gets out of its process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from finetune.errors import ExportError, MissingExtraError, StorageError
from finetune.export.gguf import convert
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp, native
from finetune.llamacpp.logits import Scorer

gguf_format = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
STORIES = ASSETS / "models" / "stories260K"
ONCE_UPON_A_TIME = [1, 403, 407, 261, 378]

CLOSE = 2e-4
"""Logits go up to 23 here, and two ways of summing in float32 differ by 3.4e-5 at most (measured, 512 tokens); with a
float16 cache it is 4e-2."""


@pytest.fixture(scope="module")
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip("the shared assets are not here")
    return STORIES


@pytest.fixture(scope="module")
def gguf(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    convert(open_model(stories), path, quant="f32")
    return path


@pytest.fixture(scope="module")
def scorer(gguf: Path) -> Iterator[Scorer]:
    with Scorer(gguf, context=512) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def long_story(scorer: Scorer) -> list[int]:
    """A context full of what the model writes itself."""
    return [*ONCE_UPON_A_TIME, *scorer.greedy(ONCE_UPON_A_TIME, 507, [])]


def _reference(model: Path, ids: list[int]) -> numpy.ndarray:
    from transformers import AutoModelForCausalLM

    torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits: numpy.ndarray = torch_model(torch.tensor([ids])).logits[0].numpy()
    return logits


# -- numbers ------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(scorer: Scorer, stories: Path, long_story: list[int]) -> None:
    random = torch.randint(3, 512, (510,), generator=torch.Generator().manual_seed(0)).tolist()
    for ids in ([1], ONCE_UPON_A_TIME, [1, 338, 395], [1, *random], long_story):
        logits = scorer.logits(ids)
        assert logits.shape == (len(ids), 512)
        assert logits.dtype == numpy.float32
        numpy.testing.assert_allclose(logits, _reference(stories, ids), rtol=0, atol=CLOSE)


def test_only_an_exact_cache_is_exact(gguf: Path, stories: Path, long_story: list[int]) -> None:
    with Scorer(gguf, context=512, exact=False) as rough:
        error = numpy.abs(rough.logits(long_story) - _reference(stories, long_story)).max()
    assert 10 * CLOSE < error < 1


def test_a_large_vocabulary_comes_in_pieces(stories: Path, tmp_path: Path) -> None:
    """65,536 rows, most of them padding: a piece of 32 MB is 128 positions. (With Qwen's 151,936 the error is 1e-4.)"""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=65536,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tmp_path / "qwen2"
    Qwen2ForCausalLM(config).save_pretrained(model)
    for file in stories.glob("*token*"):
        shutil.copyfile(file, model / file.name)
    convert(open_model(model), tmp_path / "qwen2.gguf", quant="f32")
    ids = list(range(1000, 1300))
    with Scorer(tmp_path / "qwen2.gguf", context=0) as scorer:
        assert (scorer.vocabulary, scorer.context) == (65536, 512)
        chunks = list(scorer.logits_chunks(ids))
    assert [len(chunk) for chunk in chunks] == [128, 128, 44]
    numpy.testing.assert_allclose(numpy.concatenate(chunks), _reference(model, ids), rtol=0, atol=CLOSE)


def test_every_call_begins_afresh(scorer: Scorer, long_story: list[int]) -> None:
    first = scorer.logits(ONCE_UPON_A_TIME)
    scorer.greedy(long_story[:100], 20, [])
    scorer.logits(long_story[:7])
    assert numpy.array_equal(scorer.logits(ONCE_UPON_A_TIME), first)
    assert scorer.logits([]).shape == (0, 512)


def test_an_iterator_may_be_left_but_not_gone_back_to(gguf: Path, long_story: list[int]) -> None:
    with Scorer(gguf, context=512) as scorer:
        whole = scorer.logits(long_story)
        scorer._piece = 100
        left = scorer.logits_chunks(long_story)
        assert numpy.abs(next(left) - whole[:100]).max() < CLOSE
        assert numpy.abs(scorer.logits(long_story) - whole).max() < CLOSE  # in pieces, and not disturbed
        with pytest.raises(RuntimeError, match="another sequence"):
            next(left)


def test_the_greedy_continuation_is_that_of_transformers_and_of_the_server(
    scorer: Scorer, gguf: Path, stories: Path, long_story: list[int]
) -> None:
    assert long_story[5:] == _reference(stories, long_story).argmax(axis=1)[4:-1].tolist()
    with LlamaCpp(gguf, context=256, gpu_layers=0, threads=1, exact=True) as llama:
        assert llama.generate_ids(ONCE_UPON_A_TIME, 60) == long_story[5:65]
    stop = long_story[30]
    assert scorer.greedy(ONCE_UPON_A_TIME, 60, [stop]) == long_story[5 : long_story.index(stop, 5) + 1]
    assert scorer.greedy(ONCE_UPON_A_TIME, 0, []) == []


def test_texts_become_the_tokens_that_the_server_makes_of_them(scorer: Scorer, gguf: Path) -> None:
    texts = ["Once upon a time", "", " ", "</s> and <s>", "naïve 😀 \x00 end", "long " * 500]
    with LlamaCpp(gguf, context=64, gpu_layers=0, threads=1) as llama:
        for text in texts:
            for special in (True, False):
                ours = scorer.tokenize(text, add_special=special, parse_special=special)
                assert ours == llama.tokenize(text, add_special=special, parse_special=special)
    assert scorer.tokenize("Once upon a time", add_special=True) == ONCE_UPON_A_TIME
    with pytest.raises(ExportError, match="no text"):
        scorer.tokenize("\ud800")


def test_which_tokens_end_an_answer(scorer: Scorer) -> None:
    assert [token for token in range(512) if scorer.is_end(token)] == [2]


def test_what_cannot_be_read_is_refused(scorer: Scorer) -> None:
    with pytest.raises(ExportError, match="512 is not one of its 512 tokens"):
        scorer.logits([1, 512])
    with pytest.raises(ExportError, match="-1 is not one"):
        scorer.is_end(-1)
    with pytest.raises(ExportError, match="513 tokens do not fit into a context of 512"):
        scorer.logits([1] * 513)
    with pytest.raises(ExportError, match="514 tokens do not fit"):
        scorer.greedy([1] * 500, 15, [])
    with pytest.raises(ExportError, match="no token to continue"):
        scorer.greedy([], 3, [])
    assert scorer.logits([1]).shape == (1, 512)


# -- the process --------------------------------------------------------------------------------------------------


def test_files_it_cannot_load_are_explained_and_nothing_is_printed(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut, other = tmp_path / "cut.gguf", tmp_path / "other.gguf"
    cut.write_bytes(gguf.read_bytes()[:500_000])
    other.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ExportError, match=r"cannot load this file: .*corrupted or incomplete") as caught:
        Scorer(cut, context=64)
    assert caught.value.problems[0].place == str(cut)
    with pytest.raises(ExportError, match="magic"):
        Scorer(other, context=64)
    with pytest.raises(ExportError, match=r"cannot load this adapter: .*magic") as caught:
        Scorer(gguf, context=64, lora=[(other, 1.0)])
    assert caught.value.problems[0].place == str(other)
    with pytest.raises(ExportError, match=r"general.type to be 'adapter'"):
        Scorer(gguf, context=64, lora=[(gguf, 1.0)])
    for missing in ({"path": tmp_path / "none"}, {"path": gguf, "lora": [(tmp_path / "none", 1.0)]}):
        with pytest.raises(StorageError, match="no such file"):
            Scorer(**missing, context=64)
    assert capfd.readouterr() == ("", "")


def test_an_abort_is_an_error_and_no_more(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An adapter of an embedding that is the output layer too: llama.cpp multiplies its halves the wrong way round."""
    writer = gguf_format.GGUFWriter(tmp_path / "embedding.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("token_embd.weight.lora_a", numpy.ones((512, 4), numpy.float32))
    writer.add_tensor("token_embd.weight.lora_b", numpy.ones((64, 4), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        Scorer(gguf, context=64, lora=[(tmp_path / "embedding.gguf", 1.0)]) as scorer,
        pytest.raises(ExportError, match=r"process ended with status -6: .*GGML_ASSERT"),
    ):
        scorer.logits([1])
    assert capfd.readouterr() == ("", "")


def test_a_process_that_dies_is_an_error_and_no_more(gguf: Path) -> None:
    with Scorer(gguf, context=64) as scorer:
        scorer._child.kill()
        with pytest.raises(ExportError, match="process ended with status -9"):
            scorer.logits([1])


def test_closing_ends_the_process(gguf: Path) -> None:
    scorer = Scorer(gguf, context=64)
    scorer.close()
    scorer.close()
    assert scorer._child.poll() == 0


ORPHAN = """
import os, sys
from pathlib import Path
from finetune.llamacpp.logits import Scorer
scorer = Scorer(Path(sys.argv[1]), context=64)
print(scorer._child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process as POSIX systems do")
def test_the_process_ends_with_its_parent(gguf: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", ORPHAN, str(gguf)], capture_output=True, text=True)
    child = Path("/proc") / killed.stdout.strip()
    for _ in range(100):
        # One that has ended, but that nobody has asked how, is a zombie.
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("llama.cpp outlived its parent")


# -- the library --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("defaults", "field"), [("_CONTEXT_DEFAULTS", "type_k"), ("_MODEL_DEFAULTS", "n_gpu_layers")])
def test_a_library_with_other_defaults_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, defaults: str, field: str
) -> None:
    native.native()
    monkeypatch.setitem(getattr(native, defaults), field, 7)
    with pytest.raises(ExportError, match=f"not known: `{field}` in its") as caught:
        native.native()
    assert str(caught.value.problems[0].hint).startswith('pip install "xllamacpp==')


def test_a_library_without_a_function_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._SIGNATURES, "llama_no_such_function", (None, ()))
    with pytest.raises(ExportError, match="it has no `llama_no_such_function`"):
        native.native()


def test_another_version_is_not_used(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "xllamacpp-2020.1.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: xllamacpp\nVersion: 2020.1.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"2020\.1\.1 is installed") as caught:
        Scorer(gguf, context=64)
    assert str(caught.value.problems[0].hint).startswith('pip install "xllamacpp==')


def test_without_the_library_the_hint_names_the_extra(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        Scorer(gguf, context=64)
    assert caught.value.problems[0].hint == 'pip install "finetune[gguf]"'
