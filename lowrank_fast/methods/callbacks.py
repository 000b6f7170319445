"""Controllers as transformers `TrainerCallback`s.

A controller has `begin(total_steps, optimizer)`, `step(n)` after the n-th optimizer step, and optionally
`begin_step(n)` before the forward of optimizer step n (from 0) and `end_backward(n)` between its backward and its
update. transformers is imported here and nowhere else in `methods`.
"""

from __future__ import annotations

from typing import Any


def trainer_callback(controller: Any) -> Any:
    """A `TrainerCallback` that drives `controller`."""
    from transformers import TrainerCallback

    class ControllerCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            controller.begin(state.max_steps, kwargs.get("optimizer"))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if hasattr(controller, "begin_step"):
                controller.begin_step(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if hasattr(controller, "end_backward"):
                controller.end_backward(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            controller.step(state.global_step)

    return ControllerCallback()
