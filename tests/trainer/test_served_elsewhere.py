"""The same run with its server behind another path, and with a server that is killed while it
answers, by every protocol."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import served
import served_sglang
import served_states
import tiny
from training import make

from tropd_kernels.trainer import TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SERVERS = {
    "vllm": (served.serve, {}),
    "vllm_generate": (served.serve, dict(scale_out=True, completions=False)),
    "sglang": (served_sglang.serve, {}),
    "vllm_hidden_states": (served_states.serve, {}),
}
UNDER = "/team/a"


@pytest.fixture(params=SERVERS)
def running(request, tmp_path, monkeypatch):
    """A server, and a function that makes a trainer which asks it."""
    monkeypatch.setattr("tropd_kernels.trainer.retrying.BACKOFF_SECONDS", 0.01)
    states = request.param == "vllm_hidden_states"
    tiny.model(1).save_pretrained(tmp_path / "served")
    serve, flags = SERVERS[request.param]
    own = dict(teacher=str(tmp_path / "served")) if states else {}
    own |= dict(teacher_server_protocol="vllm_hidden_states") if states else {}
    settings = dict(max_steps=3, objective_kwargs={"top_k": 4}) | own
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve(tiny.model(1), tiny.tokenizer(), **flags))

        def run(name, url=None, **more):
            trainer = make(
                tmp_path / name, teacher_model_server_url=url or server.url, **settings | more
            )
            assert trainer._server.protocol.name == request.param
            return trainer

        yield server, run


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_behind_another_path(running, end):
    server, run = running
    here = run("here")
    here.train()
    server.faults.under = UNDER
    there = run("there", f"{server.url}{UNDER}{end}")
    there.train()
    assert there.losses == here.losses
    with pytest.raises(TeacherServerError, match=r"list of models failed: HTTP 404.*no such team"):
        run("elsewhere", f"{server.url}/team/b")


def test_killed_while_it_answers(running):
    """One answer in three breaks off: they are asked again, and the run is the same."""
    server, run = running
    here = run("here")
    here.train()
    there = run("there", teacher_server_retries=2)
    distill = there.distill

    def breaks(*arguments):
        server.faults.breaks = 2
        return distill(*arguments)

    there.distill = breaks
    there.train()
    assert there.losses == here.losses
    assert server.faults.breaks == 2  # of the last step: those of the others were used up


def test_killed_for_good_while_it_answers(running):
    server, run = running
    save = dict(save_strategy="steps", save_steps=1)
    whole = run("whole")
    whole.train()
    cut = run("cut", teacher_server_retries=1, **save)
    distill = cut.distill

    def breaks(*arguments):
        server.faults.breaks = 100 if cut.state.global_step == 1 else 0
        return distill(*arguments)

    cut.distill = breaks
    with pytest.raises(TeacherServerError, match=r"request \d of 4 .*2 attempts.*checkpoint-2"):
        cut.train()
    server.faults.breaks = 0
    resumed = run("cut", **save)
    resumed.train(resume_from_checkpoint=str(cut.args.output_dir + "/checkpoint-2"))
    assert resumed.losses == whole.losses[2:]
