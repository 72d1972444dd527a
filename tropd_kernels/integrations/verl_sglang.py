"""verl's SGLang server of a teacher, which keeps the label's log-prob. Needs SGLang."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.sglang_rollout import async_sglang_server

from .verl_replaced import keep_labels


class Server(async_sglang_server.SGLangHttpServer):
    """verl's server. Ray finds it by the name of this module, whose import keeps the labels."""


class Replica(async_sglang_server.SGLangReplica):
    """verl's replica, a teacher's with that server."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.is_teacher_model:
            self.server_class = ray.remote(Server)


keep_labels(async_sglang_server)
