"""`check_head`, which compares a head with its model, and the models that no head is read from."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from head_models import HIDDEN, IDS, VOCAB, Body, Toy, Whole, build, double
from torch import nn

from tropd_kernels.heads import check_head, read_head


def test_check_sees_wrong_scale_cap_and_bias():
    model = build("gptj bias")
    head = read_head(model)
    for wrong in ({"logit_scale": 1.01}, {"softcap": 200.0}, {"bias": None}):
        with pytest.raises(ValueError, match=r"differ .* by up to \d.* allowed.*materialise"):
            check_head(model, dataclasses.replace(head, **wrong))


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_check_sees_a_cap_with_weights_fresh_from_init(name):
    """Fresh logits are far below any cap, where it changes nothing: the check stretches them."""
    model = build(name)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.002)
    head = read_head(model, verify=True)
    with pytest.raises(ValueError, match="differ"):
        check_head(model, dataclasses.replace(head, softcap=None if head.softcap else 30.0))


@pytest.mark.parametrize("name", ["gemma2", "minicpm3", "phi bias"])
def test_check_in_bfloat16(name):
    model = build(name).bfloat16()
    head = read_head(model, verify=True)
    assert head.logits(head.backbone(IDS).last_hidden_state).dtype == torch.float32
    with pytest.raises(ValueError, match="differ"):
        check_head(model, dataclasses.replace(head, logit_scale=1.1 * head.logit_scale))


@pytest.mark.parametrize("path", [None, double], ids=["passing", "failing"])
def test_check_leaves_the_model_as_it_was(path):
    model = Toy(path)
    model.lm_head.eval()  # a mixture of modes, with dropout at work
    if path is None:
        check_head(model)
    else:
        with pytest.raises(ValueError, match="differ"):
            check_head(model)
    assert model.training and model.model.drop.training and not model.lm_head.training
    assert not model.model._forward_hooks


def test_check_tells_when_the_backbone_alone_gives_other_hidden_states():
    class Shifted(Body):
        def forward(self, input_ids, shift=0.0):
            return SimpleNamespace(last_hidden_state=self.embed(input_ids) + shift)

    model = Toy()
    model.model = body = Shifted()
    model.forward = lambda input_ids: SimpleNamespace(
        logits=model.lm_head(body(input_ids, shift=1.0).last_hidden_state)
    )
    with pytest.raises(ValueError, match="backbone called alone gives hidden states that differ"):
        check_head(model)


def test_check_refuses_logits_that_do_not_fit_or_tell_nothing():
    def masked(hidden, head):
        return head(hidden).index_fill(-1, torch.tensor([4]), torch.finfo(torch.float32).min)

    silent = Toy()
    nn.init.zeros_(silent.lm_head.weight)
    for model, message in (
        (Toy(lambda hidden, head: head(hidden)[..., :90]), r"\(1, 8, 90\).*vocab_size=97 columns"),
        (Toy(lambda hidden, head: head(hidden)[0]), r"logits have shape \(8, 97\)"),
        (Toy(head=nn.Linear(16, VOCAB)), r"states \(1, 8, 32\), expected \(1, 8, 16\)"),
        (silent, "largest logit of a probe is 0"),
        (Toy(lambda hidden, head: head(hidden) / 0), "differ .* by up to inf"),
        (Toy(lambda hidden, head: head(hidden) * float("nan")), "differ .* by up to nan"),
        (Toy(masked), r"differ .* by up to 3.4e\+38"),
    ):
        with pytest.raises(ValueError, match=message):
            check_head(model)


def test_check_avoids_special_tokens():
    text = SimpleNamespace(model_type="toy_text", vocab_size=VOCAB, image_token_index=1)
    model, seen = Toy(eos_token_id=[0, 3], text_config=text), []
    model.model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    check_head(model)
    assert seen[0].tolist() == [[2, 4, 5, 6, 7, 8, 9, 10]]


def test_sharded_head_is_gathered_for_the_check():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh, model = torch.distributed.init_device_mesh("cpu", (1,)), Toy()
        whole = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        hidden = torch.randn(3, HIDDEN)
        torch.testing.assert_close(read_head(model).logits(hidden), hidden @ whole.T)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- refusals


class _Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Disguised(torch.Tensor):
    """Shows a floating dtype and holds something else, as quantised tensors do."""


def _holding(weight, layer=nn.Linear, bias=None):
    """A model whose head holds this weight."""
    head = layer(HIDDEN, VOCAB, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    head.bias = None if bias is None else nn.Parameter(bias)
    return Toy(head=head)


def _distributed():
    return nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)


def _t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _whole_with_a_tower():
    model = Whole()
    model.tower = nn.Linear(2, 2)
    return model


WEIGHT = torch.zeros(VOCAB, HIDDEN)
QUANTISED = r"weight .*expected floating point, not quantised.*modules_to_not_convert"
CUSTOM = r"got a \w+ as head.*expected a plain nn.Linear"
# fmt: off
REFUSED = {
    "4-bit": (lambda: _holding(torch.zeros(1552, 1, dtype=torch.uint8), _Louder), ValueError,
              QUANTISED),
    "8-bit": (lambda: _holding(WEIGHT.to(torch.int8)), ValueError, QUANTISED),
    "float8": (lambda: _holding(WEIGHT.to(torch.float8_e4m3fn)), ValueError, QUANTISED),
    "subclass": (lambda: _holding(WEIGHT.as_subclass(_Disguised)), ValueError, QUANTISED),
    "own forward": (lambda: Toy(head=_Louder(HIDDEN, VOCAB)), TypeError, CUSTOM),
    "sequential": (lambda: Toy(head=nn.Sequential(nn.Linear(2, 2))), TypeError, CUSTOM),
    "embedding": (lambda: Toy(head=nn.Embedding(VOCAB, HIDDEN)), TypeError, CUSTOM),
    "parametrised": (lambda: Toy(head=nn.utils.parametrizations.weight_norm(
        nn.Linear(HIDDEN, VOCAB))), TypeError, CUSTOM),
    "ZeRO-3": (lambda: _holding(torch.empty(0)), ValueError,
               r"\(0,\).*gathered first.*GatheredParameters"),
    "0 rows": (lambda: _holding(WEIGHT[:0]), ValueError, r"\(0, 32\).*gathered first"),
    "flattened": (lambda: _holding(WEIGHT.view(-1)), ValueError,
                  r"\(3104,\).*expected \(V, H\) and \(V,\): gather"),
    "bias": (lambda: _holding(WEIGHT, bias=torch.zeros(5)), ValueError,
             r"bias \(5,\), expected \(V, H\) and \(V,\)"),
    "meta": (lambda: _holding(WEIGHT.to("meta")), ValueError, "on meta, expected .* in memory"),
    "DataParallel": (lambda: nn.DataParallel(Toy()), TypeError,
                     "in DataParallel, expected the bare model"),
    "DistributedDataParallel": (_distributed, TypeError,
                                "in DistributedDataParallel.*pass model.module"),
    "no model": (lambda: nn.Linear(2, 2), TypeError, "got a Linear without config, base_model"),
    "no head": (lambda: build("llama").model, ValueError,
                "LlamaModel without output head.*AutoModelForCausalLM"),
    "encoder-decoder": (_t5, ValueError, "encoder-decoder T5.*expected decoder-only.*materialise"),
    "head in base_model": (_whole_with_a_tower, ValueError,
                           r"base_model \(Whole\) contains the output head"),
    "chameleon": (lambda: Toy(model_type="chameleon"), ValueError, "it masks.*materialise"),
    "prophetnet": (lambda: Toy(model_type="prophetnet"), ValueError, "streams.*materialise"),
}
# fmt: on


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_what_was_given_and_what_to_do(name, verify):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        read_head(make(), verify=verify)
