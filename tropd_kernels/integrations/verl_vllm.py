"""verl's vLLM server of a teacher, which keeps the label's log-prob. Needs vLLM."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout import vllm_async_server

from .verl_replaced import keep_labels


class Server(vllm_async_server.vLLMHttpServer):
    """verl's server. Ray finds it by the name of this module, whose import keeps the labels."""


class Replica(vllm_async_server.vLLMReplica):
    """verl's replica, a teacher's with that server."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.is_teacher_model:
            self.server_class = ray.remote(Server)


keep_labels(vllm_async_server)
