"""Reading and writing model folders in the safetensors format, a tensor at a time."""

from finetune.export.safetensors_io.header import StoredTensor, TensorInfo, itemsize
from finetune.export.safetensors_io.reader import Checkpoint, largest, open_checkpoint, open_file, pieces
from finetune.export.safetensors_io.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "StoredTensor",
    "TensorInfo",
    "itemsize",
    "largest",
    "open_checkpoint",
    "open_file",
    "pieces",
]
