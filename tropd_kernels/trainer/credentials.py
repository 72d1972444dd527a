"""The secrets of a run: a server's key and the hub's tokens, which errors and logs never show."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

API_KEY = "VLLM_API_KEY"
_NAMES = re.compile("token|passw|secret|api.?key|hf_", re.IGNORECASE)
#: Settings that hold a secret. Others end in the same words but hold none (eos_token).
_SECRET = {"token", "use_auth_token", "hub_token", "push_to_hub_token"}


def read_api_key(given: str | None) -> str | None:
    """The key of a server, stripped of white space; None takes that of the environment.

    Raises ValueError for a key that no HTTP header can hold.
    """
    name, value = (API_KEY, os.environ.get(API_KEY)) if given is None else ("api_key", given)
    key = (value or "").strip()
    if re.fullmatch("[!-~]*", key):
        return key or None
    raise ValueError(
        f"{name}: it holds white space or a character that is not ASCII, which no HTTP header "
        "takes: set it to the key alone"
    )


def check_address(name: str, url: str) -> None:
    """Raises ValueError, which begins with `name`, for anything but a server's plain address."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        whole = False
    if "@" in url:
        raise ValueError(
            f"{name}: it holds a user or a password (it is not shown here), which are not sent: "
            f"leave them out, and give the server's key by the environment's {API_KEY}"
        )
    if "?" in url or "#" in url:
        raise ValueError(
            f"{name}: it holds a query or a fragment (it is not shown here), which the paths of "
            f"requests cannot follow: give the address alone, and a key by the environment's "
            f"{API_KEY}"
        )
    if not whole:
        raise ValueError(
            f"{name}: must begin with http:// or https://, and name a server: {url!r:.200}"
        )


def seems_secret(text: str) -> bool:
    """Whether a text names a secret, so that it may contain one."""
    return _NAMES.search(text) is not None


def shown(value: Any) -> str:
    """The beginning of a value for an error message, unless it may hold a secret."""
    text = repr(value)
    if seems_secret(text):
        return f"a {type(value).__name__} (not shown, as it seems to hold a secret)"
    return text[:80]


def redacted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """These settings with <KEY> for each secret, also in nested mappings."""
    return {
        key: redacted(value)
        if isinstance(value, Mapping)
        else f"<{key.upper()}>"
        if isinstance(value, str) and key in _SECRET
        else value
        for key, value in settings.items()
    }
