"""Models inside what trainers and compilers put around them."""

from __future__ import annotations

from typing import Any

# Where the wrapped model is, by the name of a class of the wrapper: no library is imported to look.
# FSDP2's fully_shard wraps nothing: it changes the class of the model to a subclass.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "get_base_model",
    "PeftMixedModel": "get_base_model",
}


def unwrap(model: Any) -> Any:
    """The model inside compiled, parallel and PEFT models; any other is itself."""
    return chain(model)[-1]


def bypassing(model: Any) -> list[Any]:
    """The wrappers that call the forward of what they wrap past its hooks, as PEFT's do."""
    return [one for one in chain(model)[:-1] if _place(one) == "get_base_model"]


def chain(model: Any) -> list[Any]:
    """A model and what is inside it, from the outermost to the innermost."""
    found = [model]
    while (place := _place(found[-1])) is not None:
        inside = getattr(found[-1], place)
        found.append(inside() if place == "get_base_model" else inside)
    return found


def _place(model: Any) -> str | None:
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((WRAPPERS[name] for name in names if name in WRAPPERS), None)
