"""Training a LoRA of a transformer with sparse attention on: stopped at any moment, it goes on.

PEFT makes the corrections (``pip install peft``), accelerate places model and optimizer, and every
block is computed again in the backward pass instead of kept. The folder of a training holds

``pytorch_lora_weights.safetensors``  what was learned; diffusers loads it by ``load_lora_weights``
``optimizer.safetensors``             the state of the optimizer
``loss.json``                         the loss of every step, and what else is put into the record
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from diffpatch.checking import Count, check
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.files import read_json, write_bytes, write_json

WEIGHTS, STATE, RECORD = "pytorch_lora_weights.safetensors", "optimizer.safetensors", "loss.json"
KEEP_EVERY = 20  # steps between two writings
SEED = 0  # of the first values, so that trainings can be repeated


class LoraTraining:
    """One training.

    Args:
        model: a diffusers transformer; its own weights stay as they are.
        folder: where the files are; what an earlier training left there is gone on with.
        targets: endings of the paths of the linear layers that are corrected.
        rank: of the corrections.
        rate: learning rate of AdamW.

    Attributes:
        model: the transformer, on its device.
        record: what `RECORD` holds: ``losses``, and whatever a caller adds.

    Raises:
        DiffpatchError: PEFT is not installed, the model has none of the targets, a number cannot
            be, or the folder holds a training of something else.
    """

    def __init__(
        self, model: Any, folder: Path, targets: Sequence[str], *, rank: int, rate: float
    ) -> None:
        try:
            from peft import LoraConfig
        except ImportError:
            raise DiffpatchError("a LoRA is trained with PEFT: pip install peft") from None
        check("LoraTraining", "rank", rank, Count)
        if not 0 < rate < math.inf:
            raise BadParameter(f"LoraTraining: rate={rate} must be a positive number, such as 1e-4")
        self.folder, self._accelerator = folder, Accelerator()
        self.model = model.to(self._accelerator.device).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
            try:
                model.add_adapter(config)
            except ValueError as error:
                raise DiffpatchError(
                    f"no layer of {type(model).__name__} ends in one of {', '.join(targets)}:"
                    f" name its own ({str(error).splitlines()[0]})"
                ) from error
        model.enable_gradient_checkpointing()
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, lr=rate)
        self.record: dict[str, Any] = {"losses": []}
        self._resume()

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        device: torch.device = self._accelerator.device
        return device

    def run(
        self,
        steps: int,
        loss: Callable[[Any, int], torch.Tensor],
        say: Callable[[str], None] = print,
    ) -> None:
        """The updates that are still to be made.

        Args:
            steps: updates in all, earlier ones included.
            loss: of the model and the number of the update.
            say: gets a line now and then.
        """
        self.model.train()
        model, optimizer = self._accelerator.prepare(self.model, self._optimizer)
        losses = self.record["losses"]
        for step in range(len(losses), steps):
            value = loss(model, step)
            self._accelerator.backward(value)
            self._accelerator.clip_grad_norm_(self._weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value.detach()))
            if (step + 1) % KEEP_EVERY == 0 or step + 1 == steps:
                latest = losses[-KEEP_EVERY:]
                say(f"step {step + 1}: loss {sum(latest) / len(latest):.4f}")
                self.save()
        self.model.eval()

    def save(self) -> None:
        """Write what was learned, and all that it takes to go on."""
        from peft.utils import get_peft_model_state_dict

        self.folder.mkdir(parents=True, exist_ok=True)
        learned = get_peft_model_state_dict(self.model)
        named = {f"transformer.{n}": x.detach().contiguous() for n, x in learned.items()}
        write_bytes(self.folder / WEIGHTS, to_bytes(named))
        write_bytes(self.folder / STATE, to_bytes(dict(self._state())))
        write_json(self.folder / RECORD, self.record)  # last: it says how far the others are

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the optimizer, by the number of their parameter."""
        for i, parameter in enumerate(self._weights):
            for name, value in self._optimizer.state[parameter].items():
                yield f"{i}.{name}", value

    def _resume(self) -> None:
        """Read back what an earlier training wrote, if there was one.

        Raises:
            DiffpatchError: it was of something else, or its files are damaged.
        """
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

        record = read_json(self.folder / RECORD)
        if record is None:
            return
        own = {n: x.shape for n, x in get_peft_model_state_dict(self.model).items()}
        files = (_tensors(self.folder / WEIGHTS), _tensors(self.folder / STATE))
        learned = {n.removeprefix("transformer."): x for n, x in files[0].items()}
        state = [_numbered(files[1], i) for i in range(len(self._weights))]
        kept = isinstance(record, dict) and isinstance(record.get("losses"), list)
        if not kept or any("exp_avg" not in one for one in state):
            raise DiffpatchError(f"{self.folder} holds no whole training: {_ANOTHER}")
        if {n: x.shape for n, x in learned.items()} != own:
            raise DiffpatchError(
                f"{self.folder} holds a training of other layers, of another rank or of another"
                f" model than {type(self.model).__name__}: go on with what it was begun with, or"
                f" {_ANOTHER}"
            )
        set_peft_model_state_dict(self.model, learned)
        for parameter, one in zip(self._weights, state, strict=True):
            self._optimizer.state[parameter] = one
        self.record |= record


_ANOTHER = "name another folder, or delete this one"


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Those of a file that an earlier training wrote."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DiffpatchError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}): {_ANOTHER}"
        ) from None


def _numbered(tensors: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """The state of the optimizer for one parameter."""
    return {n.partition(".")[2]: x for n, x in tensors.items() if n.startswith(f"{i}.")}
