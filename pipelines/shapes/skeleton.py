"""A pipeline without weights, made of its config files: enough to know every size.

The transformers and the autoencoder are built on torch's "meta" device, which holds shapes only;
text encoders and the like are left out.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from diffpatch.pipelines.running.loading import UnusableModel, find

READ = ("vae", "transformer")  # what the components begin with whose configs matter


def skeleton(model: str) -> Any:
    """The pipeline of a folder or a hub id without its weights; only a hub id needs a network.

    Where the pipeline cannot be made without all of its parts, an object that has its transformers
    as `components`.

    Raises:
        ModelError: there is no such pipeline, or its configs do not say enough.
    """
    source = find(model)
    try:
        index = source.pipeline.load_config(model)
        parts = _parts(index, model)
    except Exception as error:  # configs of every kind and age go through diffusers' own code
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnusableModel(
            f"{model} cannot be planned from its configs ({reason}); load it and give the pipeline"
            " to diffpatch.plan"
        ) from error
    wanted = inspect.signature(source.pipeline.__init__).parameters
    given = {name: parts.get(name, index[name]) for name in wanted if name in index}
    given = {k: None if isinstance(v, list | tuple) else v for k, v in given.items()}
    try:
        return source.pipeline(**given)
    except Exception:  # some insist on a tokenizer, or on packages that check what was made
        return SimpleNamespace(components=parts)


def transformer_of(config: Path) -> Any:
    """The transformer that a config.json describes, without weights.

    Raises:
        ModelError: the file is not a config of a diffusers transformer.
    """
    import diffusers

    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        name = values["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UnusableModel(
            f"{config} is not a config of a diffusers model: it names no _class_name"
        ) from None
    cls = getattr(diffusers, str(name), None)
    if cls is None:
        raise UnusableModel(
            f"{config}: diffusers {diffusers.__version__} has no {name};"
            " pip install --upgrade diffusers"
        )
    try:
        with torch.device("meta"):
            return cls.from_config(values)
    except Exception as error:  # as above
        raise UnusableModel(f"{config} does not describe a {name}: {error}") from error


def _parts(index: Any, model: str) -> dict[str, Any]:
    """The components whose configs matter, by name, as index files list them."""
    import diffusers

    parts = {}
    for name, entry in index.items():
        if name.startswith(READ) and isinstance(entry, list | tuple) and entry[0] == "diffusers":
            known = getattr(diffusers, entry[1])
            config = known.load_config(model, subfolder=name)
            with torch.device("meta"):
                parts[name] = known.from_config(config)
    return parts
