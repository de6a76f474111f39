"""What a run takes on the disk and in the machine's own memory, command by command."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from finetune.config.schema import Config
from finetune.plan import saved
from finetune.plan.memory import Memory, adapter_parameters, parameters
from finetune.plan.setup import Setup

MIB = 2**20

LIBRARIES = 504 * MIB
"""A process with torch, transformers, peft, trl and bitsandbytes loaded: measured, with torch's build for CPUs (2.13).
Its build for CUDA is larger, by how much is not measured (whoever prints this says so)."""

MERGE = 319 * MIB
"""`ft merge`, measured on bases of 1.1 to 8 billion parameters: 318 to 321 MB (docs/export.md). It reads in pieces."""

EXPORT = 514 * MIB
"""`ft export`, measured on 1.1 billion parameters without the proof: 501 to 514 MB (docs/export.md)."""

Q4_K_M_BITS = 4.9
"""Bits a parameter of a q4_k_m file: Llama 3 8B's has 4.92 GB for 8.03 billion. Large vocabularies have more."""

Q8_0_BITS = 8.5
"""32 numbers of 8 bits and a scale of 16 (ggml, block_q8_0)."""


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk."""

    download: int
    """The base, as far as it is not here."""
    checkpoints: int
    """The run's checkpoints and its adapter."""
    merged: int
    gguf_q8_0: int
    gguf_q4_k_m: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Ram:
    """Bytes of the machine's own memory."""

    training: int
    merging: int
    exporting: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def disk_of(config: Config, setup: Setup, *, stored_bytes: int, here: bool) -> Disk:
    """stored_bytes: of a parameter in the base's files (2 or 4). here: whether its weights need no download."""
    count = parameters(setup.shape)
    return Disk(
        download=0 if here else count * stored_bytes,
        checkpoints=checkpoint_bytes(config, adapter_parameters(setup.shape, setup.rank, setup.targets)),
        merged=count * stored_bytes,
        gguf_q8_0=int(count * Q8_0_BITS / 8),
        gguf_q4_k_m=int(count * Q4_K_M_BITS / 8),
    )


def checkpoint_bytes(config: Config, adapter: int) -> int:
    """What `ft train` asks for before it begins (train/sft.py): the checkpoints that are kept, the best one where there
    is one, the one being written, and the adapter. Four bytes a parameter, and for AdamW eight, or two in 8 bit."""
    optimizer = adapter * (2 if config.train.optimizer.endswith("8bit") else 8)
    copies = config.train.keep_checkpoints + (1 if config.evaluation.every else 0) + 1
    return copies * (4 * adapter + optimizer) + 4 * adapter + 2 * MIB


def ram_of(setup: Setup, memory: Memory) -> Ram:
    """Training on a GPU: the libraries, the largest tensor on its way to the card, what is offloaded: pinned blocks,
    each as large as the next power of two (aten/core/CachingHostAllocator.h). On a CPU it is all of the memory.
    Exporting includes the proof: one layer and the embedding in float32 (docs/export.md)."""
    shape = setup.shape
    layer = sum(linear.parameters for linear in shape.linears) + shape.vectors
    embedding = shape.vocabulary * shape.hidden
    if setup.dtype_bytes == 4:
        training = LIBRARIES + memory.total - memory.context
    else:
        block = setup.tokens * shape.hidden * saved.residual_bytes(setup)
        waiting = setup.recomputed * 2 ** (block - 1).bit_length() if setup.offload else 0
        training = LIBRARIES + 2 * embedding + waiting
    return Ram(training=training, merging=MERGE, exporting=EXPORT + 4 * (embedding + layer))
