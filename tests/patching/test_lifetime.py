"""What outlives a patch, and what does not: copies, files, processors, models."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import diffusers
import pytest
import torch

import diffpatch
from diffpatch import NotPatched
from tests.patching.test_patch import LOCAL
from tests.tiny import Tiny, wan


def test_copies_and_pickles_come_back_unpatched() -> None:
    tiny = wan()
    before = tiny.run()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    patched = tiny.run()
    for copied in (copy.deepcopy(tiny.pipe), pickle.loads(pickle.dumps(tiny.pipe))):
        with pytest.raises(NotPatched):
            diffpatch.report(copied)
        assert torch.equal(Tiny(copied, tiny.call).run(), before)
    assert torch.equal(tiny.run(), patched)


def test_saving_a_patched_pipeline_saves_the_original(tmp_path: Any) -> None:
    tiny = wan()
    before = tiny.run()
    diffpatch.patch(tiny.pipe, LOCAL)
    tiny.pipe.save_pretrained(tmp_path)
    loaded = diffusers.WanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    weights = loaded.transformer.state_dict()
    assert weights.keys() == tiny.pipe.transformer.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in tiny.pipe.transformer.state_dict().items())
    # Weights in a file's memory are aligned differently, which may change the last bit of a sum.
    assert torch.allclose(Tiny(loaded, tiny.call).run(), before, atol=1e-5)


def test_processors_saved_under_a_patch_are_dense_after_it() -> None:
    tiny = wan()
    before = tiny.run()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    saved = dict(tiny.pipe.transformer.attn_processors)
    diffpatch.unpatch(tiny.pipe)
    tiny.pipe.transformer.set_attn_processor(dict(saved))
    assert torch.equal(tiny.run(), before)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    assert not torch.equal(tiny.run(), before)
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(), before)


def test_nothing_keeps_an_unpatched_model_alive() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    tiny.run()
    weight = weakref.ref(tiny.pipe.transformer.blocks[0].attn1.to_q.weight)
    diffpatch.unpatch(tiny.pipe)
    del tiny
    gc.collect()
    assert weight() is None


def test_an_attention_backend_chosen_under_a_patch_stays() -> None:
    tiny = wan(layers=1)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    tiny.pipe.transformer.blocks[0].attn1.processor._attention_backend = "native"
    diffpatch.unpatch(tiny.pipe)
    assert tiny.pipe.transformer.blocks[0].attn1.processor._attention_backend == "native"
