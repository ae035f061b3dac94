"""Defaults that a user relies on without naming them: they change only where somebody means it.

To take over what is meant: ``python -m tests.proof.test_defaults``.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffpatch
from diffpatch import public
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.methods.base import Method
from diffpatch.methods.registry import list_methods, make_method
from diffpatch.planning.profiles import DEVICES

STORED = Path(__file__).with_name("defaults.json")


def defaults(name: str, function: object) -> dict[str, str]:
    """The parameters of a function or class that need not be given, and which may not be named."""
    found = {}
    for one in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if one.default is not one.empty:
            found[f"{name}({one.name})"] = str(one.default)
        elif one.kind in (one.POSITIONAL_ONLY, one.KEYWORD_ONLY):
            found[f"{name}({one.name})"] = one.kind.description
    return found


def policy(name: str, method: Method) -> dict[str, str]:
    """What stays dense where nobody says how much."""
    steps, layers = method.default_dense_steps, method.default_dense_layers
    return {f"{name} leaves dense": f"{steps} of the steps, {layers} of the layers"}


def current() -> dict[str, str]:
    """Of all that is public, of every method's parameters, and the devices that are shipped."""
    found: dict[str, str] = {}
    for name in sorted(public.__all__):
        value = getattr(diffpatch, name)
        if inspect.isfunction(value):
            found |= defaults(name, value)
        elif inspect.isclass(value) and not issubclass(value, BaseException):
            for own, made in vars(value).items():
                if inspect.isfunction(made) and not own.startswith("_"):
                    found |= defaults(f"{name}.{own}", made)
    for name, info in list_methods().items():
        if info.cls.__module__.startswith("diffpatch."):  # other tests register their own
            found |= {f"{name}: {key}": str(of[1]) for key, of in info.parameters.items()}
            found |= policy(name, make_method(name))
    for mode in ("tail", "skip", "mask"):
        found |= policy(f"temporal in mode {mode}", make_method("temporal", mode=mode))
    found |= defaults("block_sparse_attention", block_sparse_attention)
    for device in DEVICES:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in device.peak.items())
        found[device.name] = f"{rates}, bandwidth {device.bandwidth:.4g}"
    return found


def test_defaults_are_those_that_were_meant() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert len(stored) > 100 and current() == stored


if __name__ == "__main__":
    text = json.dumps(current(), indent=1, ensure_ascii=False, sort_keys=True)
    STORED.write_text(text + "\n", encoding="utf-8")
