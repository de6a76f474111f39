"""What a run takes on the disk: against real checkpoints' sizes and published files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.plan.bases import shape_for
from finetune.plan.disk import EXPORT, LIBRARIES, MERGE, MIB, checkpoint_bytes, disk_of, ram_of
from finetune.plan.memory import adapter_parameters, training_memory

from .test_fit import setup_for
from .test_time import LLAMA_3_8B


def config_for(**sections: Any) -> Config:
    return Config.model_validate({"base": "/a", "data": [{"path": "/b.jsonl"}], **sections})


def test_llama_3_8b_has_the_sizes_of_its_published_files() -> None:
    disk = disk_of(config_for(), setup_for(), stored_bytes=2, here=False)
    assert disk.download == disk.merged == pytest.approx(16.06e9, rel=0.001)  # its safetensors on the Hub
    assert disk.gguf_q4_k_m == pytest.approx(4.92e9, rel=0.01)
    assert disk.gguf_q8_0 == pytest.approx(8.54e9, rel=0.01)


def test_a_base_that_is_here_is_not_downloaded() -> None:
    assert disk_of(config_for(), setup_for(), stored_bytes=2, here=True).download == 0


def test_a_base_in_float32_is_twice_as_large() -> None:
    half, full = (disk_of(config_for(), setup_for(), stored_bytes=count, here=False) for count in (2, 4))
    assert (full.download, full.merged) == (2 * half.download, 2 * half.merged)


@pytest.mark.parametrize(
    ("sections", "bytes_each"),
    [
        ({}, 3 * 12 + 4),
        ({"train": {"keep_checkpoints": 4}}, 5 * 12 + 4),
        ({"evaluation": {"every": 10}}, 4 * 12 + 4),
        ({"train": {"optimizer": "paged_adamw_8bit"}}, 3 * 6 + 4),
    ],
)
def test_checkpoints_are_what_training_asks_room_for(sections: dict[str, Any], bytes_each: int) -> None:
    """train/sft.py, `_require_room`: those that are kept, the best, the one being written, and the adapter."""
    assert checkpoint_bytes(config_for(**sections), 1_000_000) == bytes_each * 1_000_000 + 2**21


def test_the_adapter_is_that_of_the_setup() -> None:
    small, large = (disk_of(config_for(), setup_for(rank=rank), stored_bytes=2, here=True) for rank in (8, 16))
    adapter = adapter_parameters(LLAMA_3_8B, 8, "all-linear")
    assert large.checkpoints - small.checkpoints == 40 * adapter


def test_ram() -> None:
    setup = setup_for(offload=False)
    memory = training_memory(setup)
    ram = ram_of(setup, memory)
    embedding = 128256 * 4096
    assert ram.training == LIBRARIES + 2 * embedding
    assert ram.merging == MERGE
    assert ram.exporting > EXPORT + 4 * embedding
    # 2 × 2,000 tokens of 4,096 numbers in 16 bit are 31.25 MiB, for which torch pins 32.
    assert setup.tokens * 4096 * 2 == 31.25 * MIB
    waiting = 32 * 32 * MIB
    assert ram_of(replace(setup, offload=True), memory).training - ram.training == waiting
    # GPT-NeoX's hidden states are float32 when its base is quantised (saved.py, `wide_residual`).
    wide = replace(setup, shape=shape_for("EleutherAI/pythia-6.9b"), offload=True)
    assert ram_of(wide, memory).training - ram_of(replace(wide, offload=False), memory).training == 2 * waiting
    cpu = replace(setup, dtype_bytes=4)
    assert ram_of(cpu, memory).training == LIBRARIES + memory.total - memory.context
