"""Files of models on the hub, fetched as diffusers does it."""

from __future__ import annotations

import re
from pathlib import Path

from diffpatch.errors import BadParameter
from diffpatch.hub import out_of_reach

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def fetched(weights: str, files: str) -> Path:
    """The folder of a model on the hub, from the cache of this machine where it is there.

    Args:
        weights: the name of the model, such as ``somebody/wan-sparse``.
        files: a pattern of those that are wanted.

    Raises:
        BadParameter: it is not such a name, or it cannot be fetched.
    """
    if _NAME.fullmatch(weights) is None:
        raise BadParameter(f"weights={weights!r} is not a file, a folder or a model on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        alone = out_of_reach() is not None
        return Path(snapshot_download(weights, allow_patterns=[files], local_files_only=alone))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadParameter(
            f"weights={weights!r} cannot be fetched from the hub ({reason}): check the name and the"
            " connection, or give a folder on this disk"
        ) from None
