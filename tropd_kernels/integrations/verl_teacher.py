"""The label's own log-prob from a top-k teacher behind verl's servers.

verl asks a vLLM or SGLang server for the top k of each position. The server also sends the log-prob
of the token that stands there, and verl drops it beyond the k. Here it is kept, as one more column
behind the k: teacher_ids and teacher_logprobs are (n, k + 1).

verl's registry of servers gives `vLLMReplica` and `SGLangReplica` out of a loader. These loaders
give a subclass whose server's class lies in a module of ours, so that each server's process imports
this package, and with it `verl_replaced.keep_labels`.
"""

from __future__ import annotations

import importlib
from typing import Any

from verl.experimental.teacher_loop.teacher_manager import AsyncTeacherLLMServerManager
from verl.workers.rollout.replica import RolloutReplicaRegistry

from .verl_replaced import cut_for_others

#: verl's name of a server, and the module of ours that has its replica.
REPLICAS = {"vllm": "verl_vllm", "sglang": "verl_sglang"}


def register_replicas() -> None:
    """Puts a loader of ours before verl's for each of `REPLICAS`."""
    for name, module in REPLICAS.items():
        verls = RolloutReplicaRegistry._registry[name]
        if getattr(verls, "serves_tropd", False):
            continue

        def load(verls: Any = verls, module: str = module) -> type:
            verls()  # what else verl does before
            return importlib.import_module(f".{module}", __package__).Replica

        load.serves_tropd = True  # type: ignore[attr-defined]
        RolloutReplicaRegistry.register(name, load)


cut_for_others(AsyncTeacherLLMServerManager)
register_replicas()
