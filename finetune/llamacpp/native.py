"""The part of llama.cpp's C interface that computes: structures, signatures, and a test that they still fit.

Only for a process that may be lost (`scoring.py`): a wrong layout, or a file that llama.cpp cannot digest, ends it.

The layouts are those of `llama.h` (struct llama_model_params, llama_context_params, llama_batch) in the build that
`library.KNOWN_VERSIONS` names. They are passed by value and change between versions without notice, so `native` reads
llama.cpp's own default values back through them: a field that was inserted anywhere before the last one that we use
moves at least one value that is not zero. The structures end with room to spare, so that a longer one than ours is
still returned into memory that is ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p

from finetune.errors import ExportError
from finetune.llamacpp.library import KNOWN_VERSIONS, library

GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1
FLASH_ATTENTION_OFF = 0
LOG_ERROR = 4
"""Of the enum `ggml_log_level`."""

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
"""(level, text, whatever was registered with it); called from any of llama.cpp's threads."""

_ROOM = ("room", c_uint8 * 256)


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        _ROOM,
    )


class ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("unknown", c_uint64),  # in no header that we have read; zero by default, and left so
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        _ROOM,
    )


class Batch(ctypes.Structure):
    """Tokens to read. Left out (null), positions go on from the last call's, and all belong to one sequence."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", ctypes.POINTER(c_int8)),
    )


_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}

_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": GGML_TYPE_F16,
    "type_v": GGML_TYPE_F16,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}

_INTS = ctypes.POINTER(c_int32)

_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_batch_get_one": (Batch, (_INTS, c_int32)),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_ubatch": (c_uint32, (c_void_p,)),
    "llama_n_threads": (c_int32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (c_int32, (c_void_p, ctypes.POINTER(c_void_p), c_size_t, ctypes.POINTER(c_float))),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits_ith": (c_void_p, (c_void_p, c_int32)),
    "llama_sampler_init_greedy": (c_void_p, ()),
    "llama_sampler_sample": (c_int32, (c_void_p, c_void_p, c_int32)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, _INTS, c_int32, c_bool, c_bool)),
}


def native() -> ctypes.CDLL:
    """The library with the signatures of what is used here.

    Raises ExportError if a function is missing or the structures do not fit; MissingExtraError as `library` does.
    """
    found = library()
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(found, name)
        except AttributeError as error:
            raise _unknown(f"it has no `{name}`") from error
        function.restype, function.argtypes = result, arguments
    _require(found.llama_model_default_params(), _MODEL_DEFAULTS)
    _require(found.llama_context_default_params(), _CONTEXT_DEFAULTS)
    ids = (c_int32 * 3)(5, 6, 7)
    batch = found.llama_batch_get_one(ids, 3)
    others = (batch.embd, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
    if batch.n_tokens != 3 or ctypes.addressof(batch.token.contents) != ctypes.addressof(ids) or any(others):
        raise _unknown("its batches are laid out differently")
    return found


def _require(defaults: ctypes.Structure, expected: Mapping[str, float]) -> None:
    """Every field before the spare room has its known default; those not named in `expected` are zero or null."""
    for name, *_ in defaults._fields_:
        value = getattr(defaults, name)
        if name != "room" and (value or 0) != expected.get(name, 0):
            raise _unknown(f"`{name}` in its {type(defaults).__name__} is {value!r} by default")


def _unknown(difference: str) -> ExportError:
    return ExportError(
        f"this version of xllamacpp is not known: {difference}",
        hint=f'pip install "xllamacpp=={KNOWN_VERSIONS[-1]}"',
    )
