"""vLLM, as far as vLLM-Omni's attention leans on it: every name is there, few do anything.

vLLM itself needs a GPU's stack; vLLM-Omni's wheel is Python alone, and its own code runs over this.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class _Named(type):
    """A class whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Named(name, (), {}))
        return self.__dict__[name]


class _Finder:
    """Finds every module of vLLM."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        ours = name.partition(".")[0] == "vllm"
        spec = importlib.machinery.ModuleSpec
        return spec(name, cls, is_package=True) if ours else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


class _PlatformEnum(enum.Enum):
    UNSPECIFIED = 0
    CUDA = 1


def _logger(name: str) -> Any:
    logger: Any = logging.getLogger(name)
    logger.info_once, logger.warning_once = logger.info, logger.warning
    return logger


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _config(cls: Any = None, **_: Any) -> Any:
    return cls if cls is not None else lambda given: given


def _layer_index(prefix: str) -> int:
    [number] = [int(part) for part in prefix.split(".") if part.isdigit()]
    return number


_WORK: dict[str, dict[str, Any]] = {
    "vllm.logger": {"init_logger": _logger},
    "vllm.envs": {"VLLM_PLUGINS": None},
    "vllm.plugins": {"load_general_plugins": lambda: None},
    "vllm.utils.import_utils": {"resolve_obj_by_qualname": _resolve},
    "vllm.platforms.interface": {"PlatformEnum": _PlatformEnum},
    "vllm.platforms": {"PlatformEnum": _PlatformEnum},
    "vllm.config": {"config": _config},
    "vllm.config.utils": {"config": _config},
    "vllm.model_executor.models.utils": {"extract_layer_index": _layer_index},
    "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": []},
}


@contextmanager
def installed() -> Iterator[None]:
    """vLLM-Omni importable for a while, its package's own set-up of vLLM left out."""
    before = dict(sys.modules)
    place = importlib.util.find_spec("vllm_omni")
    assert place is not None and place.submodule_search_locations is not None
    package = types.ModuleType("vllm_omni")
    package.__path__ = list(place.submodule_search_locations)
    sys.meta_path.insert(0, _Finder)
    try:
        for name, work in _WORK.items():
            module = importlib.import_module(name)
            for key, value in work.items():
                setattr(module, key, value)
        sys.modules["vllm_omni"] = package
        yield
    finally:
        sys.meta_path.remove(_Finder)
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("vllm", "vllm_omni") or ".vllm_omni" in name:
                del sys.modules[name]
