"""Teachers outside the process: a real server on loopback, and columns of the data set."""

from __future__ import annotations

import math
import socket

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve
from training import make, step_and_compare

from tropd_kernels.trainer.completions import read_scores
from tropd_kernels.trainer.server import TeacherServer, TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOP_4 = dict(objective_kwargs={"top_k": 4})
STEPS = dict(max_steps=3, optim="adamw_torch", learning_rate=1e-3)
OBJECTIVES = {
    "tropd": TOP_4,
    "opd": dict(objective="opd"),
    "eopd": dict(objective="eopd", objective_kwargs={"top_k": 4, "entropy_threshold": 0.0}),
    "clip_outlier": dict(objective="clip_outlier", kl_discount_factor=0.5, importance_gamma=0.5),
}


def teacher():
    return tiny.model(1, hidden_size=48)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr("tropd_kernels.trainer.retrying.BACKOFF_SECONDS", 0.01)
    with serve(teacher(), tiny.tokenizer()) as running:
        yield running


def remote(folder, served, **settings):
    """A trainer with this teacher; of its requests only those that come after its construction."""
    trainer = make(folder, teacher_model_server_url=served.url, **settings)
    served.requests.clear()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_served_teacher_is_the_loaded_one(tmp_path, served, name):
    """eopd gates by the teacher's entropy, of which four ids give a bound only: the threshold is
    one that every token passes."""
    here = make(tmp_path, teacher=teacher(), **STEPS, **OBJECTIVES[name])
    here.train()
    there = remote(tmp_path, served, **STEPS, **OBJECTIVES[name])
    there.train()
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-3, atol=2e-5)
    k = 0 if name in ("opd", "clip_outlier") else 4
    assert {r["prompt_logprobs"] for r in served.requests if "prompt_logprobs" in r} == {k}
    logs = [t.state.log_history[0] for t in (here, there)]
    for metric in ("trust_ratio", "reward_mean", "reward_min"):
        assert logs[1][f"tropd/{metric}"] == pytest.approx(logs[0][f"tropd/{metric}"], rel=1e-4)
    assert "tropd/reverse_kl" in logs[0] and "tropd/reverse_kl" not in logs[1]


def test_step_with_a_served_teacher(tmp_path, served):
    trainer = remote(tmp_path, served, **TOP_4)
    step_and_compare(trainer, teacher())


def test_server_writes_the_prefix(tmp_path, served):
    settings = dict(prefix_schedule="constant", prefix_length=3, **TOP_4)
    runs, requests = [], []
    for _ in range(2):
        runs.append(remote(tmp_path, served, **settings))
        runs[-1].train()
        requests += served.requests
    first, second = (run.batches[0] for run in runs)
    assert (first["prefix_lengths"] >= 1).all() and (first["prefix_lengths"] <= 3).all()
    assert torch.equal(first["completion_ids"], second["completion_ids"])  # seeds are sent
    wrote = [r for r in requests if r.get("return_token_ids")]
    assert len(wrote) == 8 and all(r["max_tokens"] == 3 for r in wrote)
    # What is not sent a server takes from the model's own generation_config.
    unset = dict(temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0,
                 presence_penalty=0.0, frequency_penalty=0.0)  # fmt: skip
    assert all(unset.items() <= r.items() for r in wrote)


def columns_of(trainer):
    """The completions of a run's first batch, with the teacher's log-probs, as a data set."""
    rows = {"prompt": [], "completion_ids": [], "teacher_label_log_probs": []}
    rows |= {"teacher_ids": [], "teacher_log_probs": []}
    words = tiny.tokenizer()
    batch = trainer.batches[0]
    for i, prompt in enumerate(batch["prompt_ids"]):
        length = int(batch["completion_mask"][i].sum())
        rows["prompt"].append(words.decode(prompt[prompt != 0]))
        rows["completion_ids"].append(batch["completion_ids"][i, :length].tolist())
        for name in ("teacher_label_log_probs", "teacher_ids", "teacher_log_probs"):
            rows[name].append(batch[name][i, :length].tolist())
    return tiny.Dataset.from_dict(rows)


def test_columns_are_the_served_teacher(tmp_path, served):
    """The same completions and log-probs, read from the data set: the same step, no generation."""
    source = remote(tmp_path, served, **TOP_4)
    source.train()
    data = columns_of(source)
    order = source.batches[0]["sequence_ids"].argsort()
    data = data.select(order.tolist())
    asked = len(served.requests)
    replay = make(tmp_path, data=data, precomputed_teacher=True, shuffle_dataset=False, **TOP_4)
    replay.generation_config = None  # nothing may be generated
    replay.train()
    assert len(served.requests) == asked
    assert replay.losses == pytest.approx(source.losses, rel=1e-5)
    torch.testing.assert_close(weights(replay), weights(source), rtol=1e-4, atol=1e-6)


def test_columns_are_cut_at_the_limit(tmp_path, served):
    source = remote(tmp_path, served, **TOP_4)
    source.train()
    replay = make(
        tmp_path,
        data=columns_of(source),
        precomputed_teacher=True,
        max_completion_length=3,
        **TOP_4,
    )
    replay.train()
    (batch,) = replay.batches
    assert batch["completion_ids"].shape == (4, 3) and batch["teacher_ids"].shape == (4, 3, 4)


# --- a server that fails -----------------------------------------------------------------------


def test_failed_requests_are_repeated(tmp_path, served):
    trainer = remote(tmp_path, served, **TOP_4)
    served.faults.status += [503, 500, 429]
    trainer.train()
    assert served.faults.status == []
    assert len([r for r in served.requests if "prompt_logprobs" in r]) == 4 + 3


def test_server_that_dies_leaves_the_checkpoint(tmp_path, served):
    """... and the run goes on from it as if nothing had happened."""
    settings = STEPS | TOP_4 | dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = remote(tmp_path / "whole", served, **settings)
    whole.train()
    cut = remote(tmp_path / "cut", served, teacher_server_retries=1, **settings)
    steps = iter(range(10))
    distill = cut.distill

    def dies_in_the_third(*arguments):
        served.faults.dead = next(steps) == 1
        return distill(*arguments)

    cut.distill = dies_in_the_third
    with pytest.raises(TeacherServerError) as error:
        cut.train()
    last = str(tmp_path / "cut" / "checkpoint-2")
    for words in (served.url, "request ", " of 4 (the log-probs of", "2 attempts",
                  f"go on from {last} by resume_from_checkpoint"):  # fmt: skip
        assert words in str(error.value)
    served.faults.dead = False
    resumed = remote(tmp_path / "cut", served, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.losses == whole.losses[2:]
    assert torch.equal(weights(resumed), weights(whole))


def test_server_that_dies_without_a_checkpoint(tmp_path, served):
    """There is none to go on from, and an evaluation has nothing to go on with."""
    settings = dict(teacher_server_retries=0, evaluate=tiny.prompts(4), **TOP_4)
    run, evaluation = (remote(tmp_path, served, **settings) for _ in range(2))
    served.faults.dead = True
    with pytest.raises(TeacherServerError, match="begin anew: no checkpoint is in .*save_strateg"):
        run.train()
    with pytest.raises(TeacherServerError) as error:
        evaluation.evaluate()
    assert str(error.value).endswith("Look at the server")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (dict(most=2), "start the server with --max-logprobs 4"),
        (dict(without_label=True), "which should be the 4 likeliest and its own"),
        (dict(drop_last=True), "tokens were asked"),
        (dict(nan=True), "hold NaN"),
        (dict(without_logprob=True), "its answer is malformed: .*rank"),
        (dict(status=[404] * 20), "HTTP 404: .*made to fail with 404"),
        (dict(status=[503] * 20), "HTTP 503 after 3 attempts"),
    ],
)
def test_bad_answers_name_the_request(tmp_path, served, fault, words):
    trainer = remote(tmp_path, served, teacher_server_retries=2, **TOP_4)
    for name, value in fault.items():
        setattr(served.faults, name, value)
    with pytest.raises(TeacherServerError, match=words) as error:
        trainer.train()
    assert "after a prompt of" in str(error.value)


def test_server_without_token_ids(tmp_path, served):
    served.faults.no_token_ids = True
    with pytest.raises(TeacherServerError, match="return_token_ids"):
        remote(tmp_path, served, prefix_schedule="constant", prefix_length=2, **TOP_4)


def test_another_tokenizer_is_refused(tmp_path, served):
    served.faults.other_tokens = True
    with pytest.raises(ValueError, match="teacher_model_server_url: its tokenizer is not"):
        remote(tmp_path, served, **TOP_4)


def test_nobody_there(tmp_path):
    url = "http://127.0.0.1:9"  # the discard service, which nobody runs
    with pytest.raises(
        TeacherServerError, match="the list of models failed: no answer after 1"
    ) as e:
        TeacherServer(url, retries=0)
    assert str(e.value).endswith("Look at the server")  # and not at teacher_server_timeout


@pytest.fixture
def no_host(monkeypatch):
    """An address whose name is unknown, without a resolver that may take its time to say so."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **more):
        if host == "teacher.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return "http://teacher.invalid:8000"


def test_an_unknown_host_is_said_at_once(no_host, caplog):
    """It once took ten silent attempts, four minutes. In the middle of a run it may come back."""
    words = "no host of this name: .*Is teacher_model_server_url right"
    with pytest.raises(TeacherServerError, match=words):
        TeacherServer(no_host, retries=9)
    assert not caplog.records


def test_further_attempts_are_announced(served, no_host, caplog):
    def ours():  # urllib3's own lines reach nobody: its logger has a handler that drops them
        return [r.getMessage() for r in caplog.records if r.name.startswith("tropd_kernels")]

    client = TeacherServer(served.url, retries=2)
    served.faults.status += [503]
    client.score([[5]], [[6]])
    (line,) = ours()
    assert "HTTP 503; the next attempt is in 0 s, and 1 more may follow" in line
    client.url = no_host
    with pytest.raises(TeacherServerError, match="no answer after 3 attempts: .*teacher.invalid"):
        client.score([[5]], [[6]])
    assert len(ours()) == 3


@pytest.mark.parametrize("models", [None, [], ["teacher"], [{}], {"id": "teacher"}])
def test_server_without_a_name(served, models):
    """Something else may answer at the address, or a server with nothing loaded."""
    served.faults.models = models
    with pytest.raises(TeacherServerError, match="the list of models failed: HTTP 200: .*data"):
        TeacherServer(served.url)


def test_label_among_the_likeliest_counts_once(served):
    """vLLM sends the label's log-prob besides the k likeliest, or as one of them."""
    client = TeacherServer(served.url + "/v1/", concurrency=2)
    model = teacher()
    ids = [5, 6, 7, 8, 9]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    (scores,) = client.score([ids[:2]], [ids[2:]], top_k=6)
    expected = log_probs[1:4]
    torch.testing.assert_close(scores.log_probs, expected.topk(6).values)
    torch.testing.assert_close(
        scores.label_log_probs, expected.gather(1, torch.tensor(ids[2:])[:, None])[:, 0]
    )
    assert client.score([ids], [[]], top_k=6)[0].ids.shape == (0, 6)


# --- settings ----------------------------------------------------------------------------------


def test_columns_that_do_not_fit(tmp_path, served):
    source = remote(tmp_path, served, **TOP_4)
    source.train()
    data = columns_of(source)

    def trained(data, **settings):
        make(tmp_path, data=data, precomputed_teacher=True, **(TOP_4 | settings)).train()

    with pytest.raises(ValueError, match="train_dataset: no column 'teacher_ids'"):
        trained(data.remove_columns("teacher_ids"))
    with pytest.raises(ValueError, match="teacher_ids: 4 ids a token, but .* top_k is 5"):
        trained(data, objective_kwargs={"top_k": 5})
    short = data.map(lambda row: {"teacher_label_log_probs": row["teacher_label_log_probs"][:-1]})
    with pytest.raises(ValueError, match="teacher_label_log_probs: expected"):
        trained(short)
    with pytest.raises(ValueError, match="completion_ids: holds the id -100: take padding off"):
        trained(data.map(lambda row: {"completion_ids": [-100, *row["completion_ids"][1:]]}))
    for kind in ("torch", "numpy"):
        trained(data.with_format(kind))
    with pytest.raises(ValueError, match="completion_ids: expected a list of at least one id"):
        trained(data.map(lambda row: {"completion_ids": []}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 0.5, 3.0], "negative log-probs: change their sign; or of logits: subtract"),
        ([1.0, 0.5, 0.25], "probabilities: take their logarithm"),
        ([-1.0, 0.5, 3.0], "logits: subtract their logsumexp"),
    ],
)
@pytest.mark.parametrize("column", ["teacher_label_log_probs", "teacher_log_probs"])
def test_columns_above_zero(tmp_path, column, values, words):
    """They would be rewards of the wrong sign."""
    row = dict(
        prompt="w1 w2", completion_ids=[7, 8, 9], teacher_label_log_probs=[-1.0, 0.0, 1e-6],
        teacher_ids=[[7], [8], [9]], teacher_log_probs=[[-1.0], [0.0], [0.0]],
    )  # fmt: skip
    settings = dict(precomputed_teacher=True, objective_kwargs={"top_k": 1})
    make(tmp_path, data=tiny.Dataset.from_list([row] * 4), **settings).train()
    row[column] = values if column == "teacher_label_log_probs" else [[v] for v in values]
    with pytest.raises(ValueError, match=f"{column}: expected log-probs, .* as of {words}"):
        make(tmp_path, data=tiny.Dataset.from_list([row] * 4), **settings).train()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(teacher_label_log_probs=[-9.0, -0.5, -1.0]),
         "teacher_label_log_probs: -9 for token 0 .id 7., but teacher_log_probs has -0.5 for"),
        (dict(teacher_log_probs=[[-0.5, -1.5], [-1.0, -3.0], [-2.0, -2.0]]),
         r"teacher_ids: expected distinct .* \[9, 9\] with a sum of 0.2707 at token 2"),
        (dict(teacher_ids=[[7, 5], [8, 0], [9, 9]]),
         r"got \[8, 0\] with a sum of 1.368 at token 1: id -1 is padding"),
    ],
)  # fmt: skip
def test_columns_of_several_distributions(tmp_path, change, words):
    """Shifted against each other by a token, or filled up with log-probs of 0."""
    row = dict(
        prompt="w1 w2", completion_ids=[7, 8, 9], teacher_label_log_probs=[-0.5, -1.01, -9.0],
        teacher_ids=[[7, 5], [8, -1], [9, 9]],
        teacher_log_probs=[[-0.5, -1.5], [-1.0, 0.0], [-9.0, -math.inf]],
    )  # fmt: skip
    settings = dict(precomputed_teacher=True, objective_kwargs={"top_k": 2})
    make(tmp_path, data=tiny.Dataset.from_list([row] * 4), **settings).train()
    with pytest.raises(ValueError, match=words):
        make(tmp_path, data=tiny.Dataset.from_list([row | change] * 4), **settings).train()


def test_served_log_probs_above_zero():
    choice = {"prompt_logprobs": [None, {"5": {"logprob": 0.5}}]}
    with pytest.raises(ValueError, match="token 0 reach 0.5, above 0"):
        read_scores(choice, [4], [5], 0)


def test_log_prob_of_a_token_that_the_teacher_excludes(tmp_path, served):
    """vLLM sends -9999 for -inf, which as a reward like others would swamp all earlier returns."""
    choice = {"prompt_logprobs": [None, {"5": {"logprob": -9999.0}, "6": {"logprob": -0.5}}]}
    scores = read_scores(choice, [4], [5], 1)
    assert scores.label_log_probs.tolist() == [-math.inf] and scores.ids.tolist() == [[6]]
    settings = TOP_4 | dict(kl_discount_factor=1.0)
    losses = []
    for excluded in (-math.inf, -9999.0):
        served.faults.excluded = excluded
        trainer = remote(tmp_path, served, **settings)
        trainer.train()
        losses += trainer.losses
    assert losses[0] == losses[1] and abs(losses[0]) < 1e3


@pytest.mark.parametrize("ids", [[7.0, 8.0, 9.0], [7.5, 8.0, 9.0], [7.0, float("nan"), 9.0]])
def test_ids_from_a_table_with_gaps(tmp_path, ids):
    row = dict(prompt="w1 w2", completion_ids=ids, teacher_label_log_probs=[-1.0] * 3)
    data = tiny.Dataset.from_list([row] * 4)
    trainer = make(tmp_path, data=data, precomputed_teacher=True, objective="opd")
    with pytest.raises(ValueError, match="completion_ids: expected whole numbers, got 7"):
        trainer.train()


def test_one_teacher_only(tmp_path, served):
    words = "teacher_model: .* give one of the three, or .* 'vllm_hidden_states'"
    with pytest.raises(ValueError, match=words):
        remote(tmp_path, served, teacher=teacher(), **TOP_4)


def test_a_given_completion_is_measured_by_its_own_length(tmp_path):
    """Not by max_completion_length, which it may never reach; the context is 64."""
    row = {"completion_ids": [7, 8, 2], "teacher_label_log_probs": [-1.0, -2.0, -0.5]}
    settings = dict(precomputed_teacher=True, objective="opd", max_completion_length=16)
    for prompt, fits in ((50, True), (62, False)):
        data = tiny.Dataset.from_list([{"prompt": " ".join(["w1"] * prompt)} | row] * 8)
        trainer = make(tmp_path, data=data, **settings)
        if fits:
            trainer.train()
            continue
        with pytest.raises(ValueError, match="a prompt with its completion, 65 tokens, exceed"):
            trainer.train()


# --- metrics -----------------------------------------------------------------------------------

#: What a teacher of k ids cannot give, or gives as another quantity under another name.
WHOLE = {"tropd/reverse_kl", "tropd/forward_kl", "tropd/teacher_entropy"}
TOP_K = {"tropd/forward_kl_topk", "tropd/teacher_entropy_topk"}


@pytest.mark.parametrize(
    "settings",
    [
        TOP_4,
        dict(objective_kwargs={"top_k": 4, "gate": "expected"}),
        dict(objective_kwargs={"top_k": 4, "outlier": "forward_kl_reward"}),
        dict(objective="opd"),
        dict(objective="eopd", objective_kwargs={"top_k": 4, "entropy_threshold": 0.0}),
        dict(objective="forward_kl", objective_kwargs={"top_k": 4}),
        dict(objective="mopd", objective_kwargs={"top_k": 4}),
    ],
)
def test_one_name_is_one_quantity(tmp_path, served, settings):
    """Whichever way the teacher's log-probs come: masses of K once were over other tokens."""
    settings = settings | dict(prefix_schedule="constant", prefix_length=2)
    data = tiny.prompts(teacher_completion=[" w3 w4 w5"] * 8)
    logs = []
    for make_it, source in ((make, dict(teacher=teacher())), (remote, dict(served=served))):
        trainer = make_it(tmp_path, data=data, **source, **settings)
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if "tropd/" in k})
    for log in logs:
        del log["tropd/tokens_per_second"], log["tropd/peak_memory_gib"]
    here, there = logs
    assert WHOLE <= here.keys() and not TOP_K & here.keys() and not WHOLE & there.keys()
    served_top_k = {r["prompt_logprobs"] for r in served.requests} != {0}
    assert TOP_K <= there.keys() if served_top_k else not TOP_K & there.keys()
    assert there.keys() - TOP_K == here.keys() - WHOLE
    for name in here.keys() - WHOLE:
        assert there[name] == pytest.approx(here[name], rel=1e-4), name
    if served_top_k:
        assert there["tropd/teacher_entropy_topk"] < here["tropd/teacher_entropy"]


def test_forward_kl_on_the_top_k(tmp_path, served):
    """From the ids that came, by its definition, over the student's tokens."""
    trainer = remote(tmp_path, served, **TOP_4)
    student = tiny.model(0)
    trainer.train()
    (batch,) = trainer.batches
    total, tokens = 0.0, 0
    for i, prompt in enumerate(batch["prompt_ids"]):
        prompt = prompt[batch["prompt_mask"][i].bool()]
        length = int(batch["completion_mask"][i].sum())
        ids = torch.cat([prompt, batch["completion_ids"][i, :length]])
        with torch.no_grad():
            lp = student(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        lp, lq = (lp.gather(1, batch["teacher_ids"][i, :length]),
                  batch["teacher_log_probs"][i, :length])  # fmt: skip
        total += (lq.exp() * (lq - lp)).sum().item()
        tokens += length
    log = trainer.state.log_history[0]
    assert log["tropd/forward_kl_topk"] == pytest.approx(total / tokens, rel=1e-4)
