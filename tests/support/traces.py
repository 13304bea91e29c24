"""What a test may not leave behind: traces on a model, and deprecations in Transformers' log."""

import logging

import zoo

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whisper's own `generate` passes both (transformers 5.23); goes when upstream stops.
KNOWN_DEPRECATIONS = ("Passing `generation_config` together with generation-related arguments",)
FOREIGN = ("transformers.", "accelerate.", "torch.")


class Deprecations(logging.Handler):
    """Collects what Transformers logs about deprecations; it logs most instead of warning."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() and not message.startswith(KNOWN_DEPRECATIONS):
            self.messages.append(message)


def traces_of(built: zoo.Built) -> list[str]:
    """Everything on a model that was not there when it was built, by name."""
    traces = []
    for path, module in built.model.named_modules():
        place = path or "the model"
        for kind in HOOKS:
            hooks = getattr(module, kind)
            if hooks and any(_is_ours(hook) for hook in hooks.values()):
                traces.append(f"{kind} on {place}")
        if module.training:
            traces.append(f"training flag of {place}")
    for path, parameter in built.model.named_parameters():
        if parameter.grad is not None:
            traces.append(f"gradient of {path}")
        if parameter.requires_grad is (path in built.frozen):
            traces.append(f"requires_grad of {path}")
    return traces


def _is_ours(hook: object) -> bool:
    """Whether a hook is not one that Transformers or Accelerate install for good."""
    function = getattr(hook, "func", hook)
    return not str(getattr(function, "__module__", "")).startswith(FOREIGN)
