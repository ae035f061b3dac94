"""Folders of tiny models, as save_pretrained writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose a lot where other work wants the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines on disk: wan, i2v, flux, and wan with NaN weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny.wan().pipe.save_pretrained(folder / "wan")
    tiny.wan_i2v().pipe.save_pretrained(folder / "i2v")
    tiny.flux().pipe.save_pretrained(folder / "flux")
    broken = tiny.wan().pipe
    broken.transformer.proj_out.weight.data.fill_(float("nan"))
    broken.save_pretrained(folder / "nan")
    return folder
