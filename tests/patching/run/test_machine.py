"""A machine that does anything to a patched pipeline, and knows what must come out."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from dataclasses import dataclass
from typing import Any

import accelerate
import diffusers
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import diffpatch
from diffpatch import Temporal, Window
from tests.tiny import Tiny, wan, wan_transformer

CPU = torch.device("cpu")
LOCAL = Window(window=(-1, 1, 2), shift="none")
METHODS: dict[str, Any] = {
    "window": LOCAL,
    "moving": Window(window=(-1, 1, 2), shift="step"),
    "tail": Temporal(over=LOCAL, refresh=2),
    "skip": Temporal(over=LOCAL, mode="skip", threshold=-0.1),
}
SCHEDULERS: dict[str, Any] = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "unipc": functools.partial(
        diffusers.UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
    ),
}


@dataclass(frozen=True)
class Asked:
    """What a patch was asked for."""

    method: str
    dense_steps: int

    def patch(self, target: Any) -> None:
        """Do it."""
        diffpatch.patch(target, METHODS[self.method], dense_steps=self.dense_steps)


@dataclass(frozen=True)
class Request:
    """What a pipeline is called with."""

    height: int
    width: int
    steps: int
    guided: bool

    def run(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """Do it."""
        call: dict[str, Any] = {
            "height": self.height, "width": self.width, "num_inference_steps": self.steps,
            "guidance_scale": 4.0 if self.guided else 1.0, "output_type": "latent",
            "prompt": None, "num_frames": 5, **_embeddings(),
        }  # fmt: skip
        return Tiny(pipe, call).run(**changes)


@functools.cache
def _embeddings() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 1, 16, 32, generator=random)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


@functools.cache
def _alone(asked: Asked | None, scheduler: str, seed: int, request: Request) -> torch.Tensor:
    """The request on a fresh pipeline that nothing else has happened to."""
    pipe = _pipeline()
    pipe.scheduler, pipe.transformer = SCHEDULERS[scheduler](), wan_transformer(1, seed=seed)
    if asked is not None:
        asked.patch(pipe)
    return request.run(pipe)


def _pipeline() -> Any:
    pipe = wan(layers=1).pipe
    pipe.scheduler = SCHEDULERS["euler"]()
    return pipe


def _stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


asked = st.builds(Asked, st.sampled_from(sorted(METHODS)), st.integers(0, 1))
requests = st.builds(
    Request, st.sampled_from([32, 64]), st.sampled_from([32, 64]), st.integers(2, 3), st.booleans()
)


class Machine(RuleBasedStateMachine):
    """A pipeline, and what is known about it."""

    def __init__(self) -> None:
        super().__init__()
        self.pipe = _pipeline()
        self.scheduler, self.seed = "euler", 0
        self.asked: Asked | None = None  # of the transformer that the pipeline holds
        self.lost: list[Any] = []  # patched transformers that it holds no more
        self.clones: list[tuple[Any, str]] = []
        self.compiled = False

    def check(self, found: torch.Tensor, request: Request, scheduler: str | None = None) -> None:
        """The same as alone."""
        expected = _alone(self.asked, scheduler or self.scheduler, self.seed, request)
        assert torch.equal(found, expected)

    @rule(asked=asked)
    def patch(self, asked: Asked) -> None:
        asked.patch(self.pipe)
        self.asked, self.lost = asked, []

    @rule()
    def unpatch(self) -> None:
        diffpatch.unpatch(self.pipe)
        for model in [*self.lost, self.pipe.transformer]:
            assert not hasattr(model, "_diffpatch") and not model._forward_hooks
        assert "_diffpatch_original" not in vars(type(self.pipe.scheduler))
        self.asked, self.lost = None, []

    @rule(request=requests)
    def run(self, request: Request) -> None:
        self.check(request.run(self.pipe), request)

    @rule(request=requests, asked=asked)
    def nested(self, request: Request, asked: Asked) -> None:
        before, self.asked = self.asked, asked
        options = {"dense_steps": asked.dense_steps}
        with diffpatch.patched(self.pipe, METHODS[asked.method], **options):
            self.check(request.run(self.pipe), request)
        self.asked = before
        self.lost = []

    @rule(request=requests)
    def interrupt(self, request: Request) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            request.run(self.pipe, callback_on_step_end=_stop)
        self.run(request)

    @rule(request=requests, copied=st.booleans(), kind=st.sampled_from(sorted(SCHEDULERS)))
    def clone(self, request: Request, copied: bool, kind: str) -> None:
        if copied:
            pipe, kind = copy.copy(self.pipe), self.scheduler
            pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        else:
            pipe = type(self.pipe)(**dict(self.pipe.components, scheduler=SCHEDULERS[kind]()))
            pipe.set_progress_bar_config(disable=True)
        self.check(request.run(pipe), request, kind)
        self.clones = [*self.clones[-1:], (pipe, kind)]

    @precondition(lambda self: self.clones)
    @rule(mine=requests, theirs=requests)
    def threads(self, mine: Request, theirs: Request) -> None:
        pipe, kind = self.clones[-1]
        pipe.transformer = self.pipe.transformer
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(theirs.run(pipe)))
        thread.start()
        self.check(mine.run(self.pipe), mine)
        thread.join()
        self.check(found[0], theirs, kind)

    @precondition(lambda self: not self.compiled)  # once an example: it takes its time
    @rule(request=requests)
    def compiled_blocks(self, request: Request) -> None:
        self.compiled = True
        self.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        try:
            found = request.run(self.pipe)
        finally:
            for block in self.pipe.transformer.blocks:
                block._compiled_call_impl = None
            torch._dynamo.reset()
        expected = _alone(self.asked, self.scheduler, self.seed, request)
        assert torch.allclose(found, expected, atol=1e-4)

    @rule(first=requests, changed=requests)
    def resize_in_the_middle(self, first: Request, changed: Request) -> None:
        """Whatever comes of it, the next run is what it is alone."""

        def callback(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            return {"latents": values["latents"].transpose(-1, -2)}

        with contextlib.suppress(RuntimeError):  # schedulers that remember results of the old size
            first.run(self.pipe, callback_on_step_end=callback)
        self.run(changed)

    @rule(request=requests)
    def offload(self, request: Request) -> None:
        model = accelerate.cpu_offload(self.pipe.transformer, execution_device=CPU)
        try:
            self.run(request)
        finally:
            accelerate.hooks.remove_hook_from_module(model, recurse=True)

    @rule(request=requests)
    def cache(self, request: Request) -> None:
        """A cache that skips at no timestep."""
        model = self.pipe.transformer
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(2000, 3000),
            current_timestep_callback=lambda: 0,
            spatial_attention_block_identifiers=("blocks",),
        )
        model.enable_cache(config)
        try:
            self.run(request)
        finally:
            model.disable_cache()

    @rule(kind=st.sampled_from(sorted(SCHEDULERS)))
    def exchange_scheduler(self, kind: str) -> None:
        self.pipe.scheduler, self.scheduler = SCHEDULERS[kind](), kind

    @rule(seed=st.integers(0, 1))
    def exchange_transformer(self, seed: int) -> None:
        if self.asked is not None:
            self.lost.append(self.pipe.transformer)
        self.pipe.transformer, self.seed = wan_transformer(1, seed=seed), seed
        self.asked = None

    @invariant()
    def nothing_is_held(self) -> None:
        owner = getattr(self.pipe.transformer, "_diffpatch", None)
        assert (owner is None) == (self.asked is None)
        if owner is not None:
            assert owner.patch.state_bytes() == 0
            assert len(owner.patch.runs.all()) <= 2 + len(self.clones)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=12, stateful_step_count=14, deadline=None, derandomize=True, database=None
)
