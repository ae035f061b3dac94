"""What a measurement says it ran on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffpatch.eval import environment

CPU = "processor\t: 0\nmodel name\t: Some Processor\nflags\t\t: fpu avx512f {}\n"


@pytest.mark.parametrize(
    "flags, said", [("", ""), ("amx_tile amx_bf16 amx_int8", ", amx_bf16, amx_int8")]
)
def test_matrix_units_are_named_beside_vectors(
    flags: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: CPU.format(flags))
    found = environment.environment("cpu")
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability() + said
    assert found["device"].startswith("Some Processor, ")


def test_a_system_that_says_nothing_of_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    found = environment.environment("cpu")
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability() and found["device"]
