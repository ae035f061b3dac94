"""What engines lean on and no CPU has: every name is there, few do anything.

Their own wheels are Python alone, and their own code runs over this.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
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
    """Find every module of some packages."""

    def __init__(self, packages: Collection[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = name.partition(".")[0] in self.packages
        loader: Any = self
        return importlib.machinery.ModuleSpec(name, loader, is_package=True) if ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
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


_VLLM: dict[str, dict[str, Any]] = {
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
def importable(
    *bare: str, absent: Collection[str], work: Mapping[str, Mapping[str, Any]]
) -> Iterator[None]:
    """An engine importable for a while.

    Args:
        *bare: its packages that set up what is not there: their own code is left out.
        absent: packages to stand in for.
        work: module of those -> the names in it that do something.
    """
    before = dict(sys.modules)
    finder: Any = _Finder(absent)
    sys.meta_path.insert(0, finder)
    try:
        for name, names in work.items():
            vars(importlib.import_module(name)).update(names)
        for name in bare:
            package = types.ModuleType(name)
            package.__path__ = _places(name)
            sys.modules[name] = package
        yield
    finally:
        sys.meta_path.remove(finder)
        gone = {*absent, *(name.partition(".")[0] for name in bare)}
        for name in set(sys.modules) - set(before):
            if gone & set(name.split(".")):
                del sys.modules[name]


def _places(name: str) -> list[str]:
    """Where a package's modules are."""
    top, *inner = name.split(".")
    if top in sys.modules:
        places = list(sys.modules[top].__path__)
    else:
        spec = importlib.util.find_spec(top)
        places = list(spec.submodule_search_locations or []) if spec is not None else []
    return [str(Path(place, *inner)) for place in places]


def vllm_omni() -> AbstractContextManager[None]:
    """vLLM-Omni over what stands in for vLLM."""
    return importable("vllm_omni", absent=("vllm",), work=_VLLM)


def sglang() -> AbstractContextManager[None]:
    """SGLang-diffusion's platforms, plug-ins and attention over what stands in for the rest."""
    return importable(
        "sglang", "sglang.multimodal_gen", "sglang.multimodal_gen.runtime",
        "sglang.multimodal_gen.runtime.layers", "sglang.multimodal_gen.runtime.layers.attention",
        "sglang.multimodal_gen.runtime.utils", "sglang.srt", "sglang.srt.plugins", "sglang.kernels",
        absent=("zmq", "msgspec", "addict"), work={},
    )  # fmt: skip


@contextmanager
def xdit() -> Iterator[None]:
    """xDiT's backends and what calls them, on a machine that it would refuse to start on."""
    bare = ("xfuser", "xfuser.core", "xfuser.model_executor", "xfuser.model_executor.layers")
    with importable(*bare, absent=(), work={}):
        vars(importlib.import_module("xfuser.envs"))["get_device_version"] = lambda: "8.0"
        yield
