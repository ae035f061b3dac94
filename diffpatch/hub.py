"""Whether the Hugging Face hub can be asked at all."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit


def out_of_reach() -> str | None:
    """Why nothing can be fetched, for an error message; None where it may be tried.

    Without this, every file is asked for six times in the course of half a minute, also where it is
    in the cache. Behind a proxy names need not resolve, so that nothing is said of it.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it"
    host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    if urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"{host} is not found: check the network"
    return None
