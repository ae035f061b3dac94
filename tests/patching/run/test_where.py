"""Two runs at once over one patched model, whatever else is on: where each is tested."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RUN, ADAPTERS = "tests/patching/run/", "tests/adapters/"
WHERE = {
    "threads": f"{RUN}test_runs.py::test_requests_of_other_sizes_take_their_steps_in_turn",
    "threads, 400 requests": (
        f"{RUN}test_load.py::test_every_picture_is_that_of_the_request_alone_and_memory_is_flat"
    ),
    "generators": f"{RUN}test_callers.py::test_generators_of_one_thread_take_turns",
    "tasks": f"{RUN}test_callers.py::test_tasks_of_an_event_loop_take_turns",
    "steps one by one": (
        f"{RUN}test_leaving.py::test_steps_that_a_server_takes_one_by_one_are_one_run"
    ),
    "whatever happens between": f"{RUN}test_machine.py::Machine",
    "compiled": f"{RUN}test_runs.py::test_compiled_models_serve_two_runs_at_once",
    "Ulysses": (
        "tests/patching/attention/test_parallel.py::test_two_runs_at_once_over_two_processes"
    ),
    "offload, LoRA, layers cast": (
        f"{RUN}test_together.py::test_what_is_around_a_model_leaves_runs_apart"
    ),
    "autocast, inference mode": (
        f"{RUN}test_together.py::test_modes_of_one_thread_are_not_those_of_another"
    ),
    "two experts": f"{RUN}test_together.py::test_experts_follow_each_run_over_their_border",
    "true guidance": f"{RUN}test_together.py::test_negative_prompts_of_images",
    "a training step": f"{RUN}test_together.py::test_a_training_step_beside_a_run",
    "caches of diffusers, cache-dit": (
        f"{RUN}test_together.py::test_caches_that_runs_share_are_named"
    ),
    "a cache of the patch": (
        "tests/patching/swap/test_cache.py::test_runs_that_take_turns_rob_each_other_and_are_told"
    ),
    "held steps": (
        "tests/patching/swap/test_hold.py::test_runs_of_two_sizes_in_turns_are_what_they_are_alone"
    ),
    "no lock in attention": f"{RUN}test_together.py::test_no_lock_is_held_during_attention",
    "diffusers' backends": (
        f"{RUN}test_together.py::test_a_backend_of_diffusers_holds_nothing_of_a_run"
    ),
    "ComfyUI": f"{ADAPTERS}test_comfyui.py::test_two_samplings_at_once_are_as_alone",
    "what all engines share": (
        f"{ADAPTERS}test_engine.py::test_runs_at_once_over_one_engine_are_what_they_are_alone"
    ),
    "vLLM-Omni": f"{ADAPTERS}test_vllm_omni.py::test_requests_in_turn_are_as_alone",
    "SGLang": f"{ADAPTERS}test_sglang.py::test_requests_in_turn_are_as_alone",
    "xDiT": f"{ADAPTERS}test_xdit.py::test_requests_in_turn_are_as_alone",
}


@pytest.mark.parametrize("what", WHERE)
def test_it_stands_where_the_table_says(what: str) -> None:
    path, _, name = WHERE[what].partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
