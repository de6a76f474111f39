"""What one family of models needs before its weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def quantisable_class(config: PretrainedConfig) -> Any:
    """The class to load a base with where its linear layers are to be quantised: transformers' choice, but for Falcon.

    transformers quantises modules whose class is `torch.nn.Linear` itself (integrations/bitsandbytes.py). Falcon's are
    of a subclass that multiplies first and adds the bias then, and stay in 16 bit: a 7B base would take 13 GB in "nf4".
    Made of plain linear layers it is the same model, with 4.2 GB.
    """
    from transformers import AutoModelForCausalLM

    return _plain_falcon() if config.model_type == "falcon" else AutoModelForCausalLM


def _plain_falcon() -> Any:
    from torch import nn
    from transformers import FalconForCausalLM

    class PlainFalcon(FalconForCausalLM):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            for parent in list(self.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear) and type(child) is not nn.Linear:
                        plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                        setattr(parent, name, plain)

    return PlainFalcon
