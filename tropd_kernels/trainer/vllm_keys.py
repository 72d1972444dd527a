"""Which keys of `generation_kwargs` vLLM takes, asked of the vLLM that is installed.

TRL makes a `SamplingParams` of them at every step, or sends them to the server, which ignores a key
that its requests do not have.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from ..objectives.registry import nearest

#: Keys of a request that become a part of the server's SamplingParams under another name.
_OF_REQUESTS = {"vllm_xargs", "priority", "cache_salt"}


def check_vllm_keys(given: Mapping[str, Any], mode: str) -> None:
    """Raises ValueError for keys or values that vLLM refuses, and for keys that a server ignores.

    Without vLLM, which TRL then asks for, nothing is checked. mode: "colocate" or "server".
    """
    try:
        from vllm import SamplingParams  # type: ignore[import-not-found]
    except ImportError:
        return
    known = {name for name in inspect.signature(SamplingParams).parameters if name[0] != "_"}
    what = "vLLM's SamplingParams"
    sampling = known
    if mode == "server":
        known, what = (known & _request_fields(known)) | _OF_REQUESTS, "vLLM's requests"
    for name in given:
        if name not in known:
            raise ValueError(
                f"generation_kwargs: {name!r} is no key of {what}{nearest(name, known)}"
            )
    # TRL makes the structured outputs' own class of a mapping.
    values = {name: given[name] for name in given.keys() & sampling - {"structured_outputs"}}
    if mode == "server":  # None is a request's word for the server's default
        values = {name: value for name, value in values.items() if value is not None}
    try:
        SamplingParams(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs: vLLM refuses them: {error}") from error


def _request_fields(otherwise: set[str]) -> set[str]:
    """The fields of a request for completions; `otherwise` where this vLLM has them elsewhere."""
    try:
        from vllm.entrypoints.openai.completion.protocol import (  # type: ignore[import-not-found]
            CompletionRequest,
        )
    except ImportError:
        return otherwise
    return set(CompletionRequest.model_fields)
