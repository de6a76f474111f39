"""A model that is lent to a trainer, and given back as it was."""

from __future__ import annotations

from typing import Any


class Borrowed:
    """What accelerate and TRL change on a model, to be put back: whoever has it next would else compute otherwise.

    accelerate wraps its forward in mixed precision with results in float32; TRL gives it another head, and lets the
    routers of a mixture report.
    """

    MARKS = ("_is_accelerate_prepared", "_original_forward")

    def __init__(self, model: Any) -> None:
        self._config = model.config.get_text_config()
        self._routers = getattr(self._config, "output_router_logits", None)
        self._owners = (model, model.get_base_model())
        self._forwards = [vars(owner).get("forward") for owner in self._owners]

    def give_back(self) -> None:
        for owner, forward in zip(self._owners, self._forwards, strict=True):
            if forward is None:
                vars(owner).pop("forward", None)
            else:
                owner.forward = forward
            for mark in self.MARKS:
                vars(owner).pop(mark, None)
        if self._routers is not None:
            self._config.output_router_logits = self._routers
