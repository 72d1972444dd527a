"""`TrOPDConfig`: TRL's `DistillationConfig` with an objective, guidance prefixes and credit.

Everything that TRL already spells keeps its spelling (`temperature`, `max_completion_length`,
`beta`, `use_vllm`, `log_completions`, ...), and so does everything of transformers' beneath it.
What is wrong raises here, with the key's name, before any model is loaded.
"""

import inspect
import json
import os
import textwrap
from dataclasses import dataclass, field, fields, replace
from enum import EnumMeta
from typing import Any, get_args, get_type_hints

from trl import DistillationConfig  # type: ignore[attr-defined]

from ..backends import choose_backend
from ..objectives import TokenRule
from ..objectives.registry import build_rule, knobs
from ..once import parse_json
from .best_model import set_direction
from .config_checks import (
    PREFIX_WEIGHT,
    SELECTION,
    check_credit,
    check_generations,
    check_objective_keys,
    check_prefix,
    check_rewards,
    check_sample,
    check_selection,
    check_teacher,
    check_trainer,
)
from .credentials import redacted, shown
from .effects import check_conditions
from .generation_keys import check_generation_conditions
from .loaded_teacher import check_options, dtype_option
from .other_keys import names_unknown_keys
from .own_rule import Objective, RuleSchedule, read_objective, saved_form
from .recipes import RECIPES, Applied, apply_knobs, apply_recipe, describe, saved_name
from .sources import check_revisions
from .value_checks import TYPES, check_checkpointing, check_type, check_values

STAGE_FRACTION = 0.5
#: How a mapping is given on the command line.
_AS_JSON = {
    "objective_kwargs": '{"top_k": 4}',
    "generation_kwargs": '{"top_p": 0.9}',
    "teacher_models": '{"math": "org/model"}',
    "special_token_map": '{"<|end|>": "<|im_end|>"}',
    **dict.fromkeys(["model_init_kwargs", "teacher_model_init_kwargs"], '{"dtype": "bfloat16"}'),
}
_JSON = '{"name": value}'


def _setting(text: str, default: Any = None) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


class _OfInit:
    """The signature of a class whose `__new__` only looks at the arguments of its `__init__`."""

    def __get__(self, config: Any, cls: type) -> inspect.Signature:
        taken = inspect.signature(cls.__init__)  # type: ignore[misc]
        return taken.replace(parameters=[*taken.parameters.values()][1:])


@names_unknown_keys
@dataclass
class TrOPDConfig(DistillationConfig):
    """Settings of `TrOPDTrainer`, besides those of `DistillationConfig` and `TrainingArguments`.

    Of TRL's own fields:

    * `teacher_model_revision`: revision of a teacher by name. For a teacher given as a model, the
      revision at which its tokenizer is looked up on this machine for the comparison.
    * `top_k`, `top_p`, `min_p`, `repetition_penalty`, `cache_implementation` "quantized",
      `generation_kwargs`: other values than the defaults sample from another distribution than the
      student's, so that the K1 term of an objective has a biased gradient: the trainer warns, and
      logs the mass that the first three keep, if no other setting but the temperature changes the
      sampler, as `tropd/sampling_mass`. Objectives without K1 still compare whole distributions.
    * `disable_dropout`: switches off every form of dropout of the student, also in the config that
      is saved with it.

    Not taken: `auto_find_batch_size`, `torch_compile`, settings without effect here (`effects.py`),
    and in `generation_kwargs` the lengths, numbers and ends of completions.

    Raises:
        ValueError: A setting is wrong, or does not go with the others; the text begins with its
            key.
    """

    _VALID_DICT_FIELDS = DistillationConfig._VALID_DICT_FIELDS + [
        "objective", "objective_kwargs", "teacher_models", "special_token_map",
    ]  # fmt: skip

    recipe: str | None = _setting(
        f"what a publication states of a run: {', '.join(map(repr, RECIPES))} (`recipes.py`). It "
        "sets objective, optimizer, num_generations and prefix as far as they are stated there, "
        "and prints them. A key that is given overrules it, also with its default; "
        "objective_kwargs knob by knob. `to_dict` writes it as 'NAME (applied)', since a saved "
        "config gives all keys, as they were."
    )
    objective: Objective = _setting(  # noqa: RUF009
        "the name of one, or a rule of one's own. The names: "
        '"tropd" (default), "opd", "gkd", "eopd", "entropy_opd", "reopold", "clip_outlier", '
        '"mask_outlier", "aopd", "tropd_aopd", "power_opd", "topd", "log1p_opd", "tv_opd", "lsm", '
        '"mopd", "topk_jsd", "veto", "sft", or a divergence: "forward_kl", '
        '"reverse_kl", "jeffreys", "jsd", "skew_forward", "skew_reverse", "alpha", "chi2", '
        '"total_variation", "todi", "akl". `tropd_kernels.objectives` says what each is and where '
        'from. Quantiles and means over "the batch" (entropy_opd, reopold) are over a micro-batch. '
        "A rule of one's own: a `TokenRule`, or a mapping of its fields (in YAML, or JSON as a "
        "flag); or, in Python, a function from the share of training so far, 0 to 1, to the "
        "`TokenRule` of a step, which depends on that share alone: it is not saved, and a resumed "
        "run is given it again.",
        "tropd",
    )
    objective_kwargs: dict | str | None = _setting(  # noqa: RUF009
        "knobs of the objective: the arguments of its constructor, with the papers' defaults. "
        'tropd: gate "bernoulli", outlier "forward_kl", top_k 64, top_k_tail "raw", threshold '
        "-1.386. opd: kl_penalty_coef 1. eopd: entropy_threshold 0.8 nats, top_k 16, clip_ratio "
        "0.2. entropy_opd: top_fraction 0.2. reopold: mixing 0.2, entropy_quantile 0.8. "
        "clip_outlier, mask_outlier: threshold -1.386. power_opd: alpha 5. topd: alpha 0.2, "
        "clip_ratio_low and clip_ratio_high 0.2. tv_opd: scale 1. aopd, tropd_aopd, mopd, "
        "topk_jsd: top_k 64. lsm: top_k 32. forward_kl, reverse_kl: top_k None, top_k_tail "
        '"raw", top_k_ids "teacher" (or "student", beside a teacher that is loaded). skew_*: '
        "alpha 0.1. akl: head_mass 0.5. veto: student_power, to be given, divergence "
        '"forward_kl". sft: label_smoothing 0, z_loss 0. A `top_k` here is the teacher\'s; the '
        "field `top_k` samples."
    )
    beta: float | None = _setting(
        "interpolation of gkd, jsd and topk_jsd: 0 is the forward KL, 1 the reverse KL. None "
        "takes GKD's 0.5."
    )
    stage_fraction: float | None = _setting(
        "share of training after which reopold's second stage begins. None takes 0.5, this "
        "library's choice; the paper does not fix it."
    )
    prefix_schedule: str = _setting(
        'how the teacher\'s prefix shrinks: "none" (no guidance, the default), "cosine" (the '
        'paper\'s), "linear", or "constant" (never).',
        "none",
    )
    prefix_length: int = _setting("length l of the prefix at the first step, in tokens.", 0)
    prefix_relative: bool = _setting(
        "the paper's length instead: l is the schedule's share of the tokens of that row's answer "
        "(as far as max_completion_length reaches), rounded down, at the first step all of it. An "
        "answer that is not in prefix_column is written whole by the teacher, and then cut.",
        False,
    )
    prefix_fraction: float = _setting(
        "share of training over which l falls to 0; the paper's 1.", 1.0
    )
    prefix_steps: int | None = _setting("the same in optimizer steps, instead of prefix_fraction.")
    prefix_weight: float | None = _setting(
        "weight of the K1 forward KL on the prefix, the paper's 0.001. Objectives without that "
        "term treat a prefix like any other token, and refuse another value.",
        PREFIX_WEIGHT,
    )
    prefix_column: str | None = _setting(
        "column with the teacher's answer: text, or the assistant's message in a list. Without "
        "that column the teacher writes the prefix; a column of another name than the default "
        "has to exist.",
        "teacher_completion",
    )
    lmbda: float = _setting(
        "GKD's share of on-policy steps (default 1: all). In the other steps the completions are "
        "the teacher's whole answers, from prefix_column or generated on the spot. Objective "
        '"sft" trains on the teacher\'s text with lmbda 0. An objective with a prefix term treats '
        "those answers as one long prefix, weighted by prefix_weight. A text that reaches "
        "max_completion_length gets no end; one that the teacher ended with a token that is no "
        "end for the student gets the student's end after it. An evaluation uses the student's "
        "own completions, or prefix_column with lmbda 0 where its rows have it.",
        1.0,
    )
    teacher_models: dict | str | None = _setting(  # noqa: RUF009
        "several teachers by their ids, {'math': 'org/model', ...}, instead of teacher_model: each "
        "row's column teacher_id says whose it is. The loss is one mean over all tokens. "
        "TrOPDTrainer's argument of that name also takes models."
    )
    special_token_map: dict | str | None = _setting(  # noqa: RUF009
        "for a teacher whose tokenizer differs in special tokens alone: the student's token to the "
        "teacher's, {'<|end|>': '<|im_end|>', ...}, for all that differ. The error without it has "
        "the line to write."
    )
    teacher_update_rate: float | None = _setting(
        "teacher_model 'self' follows the student as a moving average: this share of the student "
        "and the rest of the teacher, every teacher_sync_steps. 1 is the student of then; None "
        "(default) leaves the teacher as it was. TRL's SDFT has 0.05."
    )
    teacher_sync_steps: int = _setting("optimizer steps from one such update to the next.", 1)
    teacher_model_server_url: str | None = _setting(
        "a teacher behind HTTP, on vLLM or SGLang, instead of one in this process: for objectives "
        "of K1 and the teacher's top-k at temperature 1, by 'vllm_hidden_states' for all. "
        "`teacher_model_name_or_path` is then the served name, if the server has several. Its "
        "tokenizer is checked where the server offers /tokenize, its log-probs by a first request "
        "before a model is loaded, and each prompt against the context that it states: it needs "
        "room for prompt, max_completion_length and 1 token (SGLang: 7). Text that it writes "
        "(prefixes, lmbda below 1) is sampled by temperature, top_p, top_k, min_p and "
        "repetition_penalty; generation_kwargs are not sent. eopd's threshold is compared with a "
        "lower bound of the teacher's entropy, which is what a top-k gives."
    )
    teacher_server_timeout: float = _setting(
        "seconds for one attempt of a request, from connecting to the last byte of the answer.",
        600.0,
    )
    teacher_server_retries: int = _setting(
        "further attempts of a request that fails in transport, in time, or with HTTP 408, 429, "
        "500 or 502 to 504: at once, then after 1 s, 2 s, 4 s, ... 120 s. Retry-After is ignored.",
        9,
    )
    teacher_server_concurrency: int = _setting("requests at once, that share the sequences.", 8)
    teacher_server_protocol: str | None = _setting(
        "'vllm' (/v1/completions), 'vllm_generate' (/inference/v1/generate) or 'sglang' "
        "(/generate); None (default) finds out which. 'vllm_hidden_states' (/pooling): every "
        "objective and temperature, by the head of the checkpoint that teacher_model names; it "
        "writes no text. Seeds of texts, with which a resumed run repeats them, SGLang obeys only "
        "under --enable-deterministic-inference."
    )
    precomputed_teacher: bool = _setting(
        "the data set's columns hold fixed completions, `completion_ids` (C), and the teacher's "
        "log-probs of them, `teacher_label_log_probs` (C), and for objectives that use the top-k "
        "`teacher_ids` and `teacher_log_probs` (C, K), at this temperature. No teacher is loaded "
        "and nothing is generated.",
        False,
    )
    num_generations: int = _setting(
        "completions of each prompt in a generation batch, as in GRPO (default 1). It divides "
        "per_device_train_batch_size x gradient_accumulation_steps x processes, which counts "
        "completions. An evaluation writes one.",
        1,
    )
    num_iterations: int = _setting(
        "optimizer steps on each generation batch, as in GRPO (default 1). From the second step "
        "on the loss uses the ratio to the policy that sampled: PPO's clip, `drift_tau`. A run "
        "resumed between the steps continues with its batch, and so with the same micro-batches.",
        1,
    )
    drift_tau: float | None = _setting(
        "blockwise policy-drift gates: blocks of drift_block_size tokens on which the policy has "
        "moved by s nats a token since sampling weigh exp(-drift_tau |s|), relative to their mean "
        "over the micro-batch. None (default): no gates."
    )
    drift_block_size: int = _setting(
        "tokens of such a block.",
        64,
    )
    kl_discount_factor: float = _setting(
        "replaces the K1 reward by its discounted sum to the end of the completion; 0 (default) "
        "leaves the immediate reward, 1 is the plain sum. A token to which the teacher gives "
        "probability 0 counts as the rule's `threshold` in it, and stays outside the gate; an "
        "objective without a gate has an infinite loss there, and the run stops.",
        0.0,
    )
    importance_gamma: float | None = _setting(
        "IW-OPD's gamma (the paper's 0.5): early tokens have weights of up to 1 + gamma. None "
        "(default) weighs all alike."
    )
    task_weight: float | None = _setting(
        "weight of the advantages of `TrOPDTrainer`'s reward_funcs, GRPO's, in the policy gradient "
        "of an objective by its name: they are added to K1's reward, and 1 weighs them as nats. "
        "None (default): no reward functions."
    )
    reward_weights: list[float] | None = _setting(  # noqa: RUF009
        "one weight for each of reward_funcs, as in GRPO. None (default): all 1."
    )
    scale_rewards: str = _setting(
        'what divides the advantages, as in GRPO: the standard deviation of the "group" (default), '
        'of the "batch", or "none".',
        "group",
    )
    select_by: str | None = _setting(
        'trains only on the tokens with the highest scores: "entropy" (the student\'s), '
        '"teacher_entropy", "reverse_kl", "disagreement" (abs(lq - lo)) or "reward" (with '
        "kl_discount_factor the return), as in `TokenRule`. The others cost no gradient, and the "
        "mean is over all (reopold's over the tokens kept). Goes with select_fraction or "
        "select_threshold. The teacher's prefix is not ranked where the objective weighs it by "
        "prefix_weight, and counts. An evaluation "
        'selects likewise. A server or data set gives no "reverse_kl", and "teacher_entropy" as '
        "the lower bound that the objective's top-k gives. None (default): all tokens. entropy_opd "
        "and reopold select by themselves."
    )
    select_fraction: float | None = _setting(
        "share of the tokens of each micro-batch on each process that select_by selects."
    )
    select_threshold: float | None = _setting(
        "selects the tokens whose score is at least this, in nats (a reward in its own unit), "
        "independent of the micro-batch."
    )
    router_aux_loss_coef: float | None = _setting(
        "weight of a mixture-of-experts student's load-balancing loss, over prompts and "
        "completions, as in TRL's GRPO; logged as aux_loss. None (default) takes the model's own, "
        "0 trains without."
    )
    backend: str | None = _setting(
        '"triton", "native", "torch" or "reference"; None takes the best one here.'
    )
    max_workspace_bytes: int | None = _setting(
        "bound on the loss's temporaries; see `plan_chunks`."
    )
    gradient_tolerance: float = _setting(
        "standard deviation, relative to the gradient's norm, up to which the gradients of head "
        "and hidden states are computed from an unbiased sample of the vocabulary's ids; see "
        "`linear_distillation_loss`. 0 (default): from all ids.",
        0.0,
    )
    gradient_sampling: float | None = _setting(
        "share of the ids in that sample, instead of gradient_tolerance. None (default): all."
    )
    rich_progress: bool | None = _setting(
        "rich's progress display in place of tqdm's; None (default): at a terminal. Each log is a "
        "line in either."
    )
    log_regions: bool = _setting(
        "shows a few completions of each log with their tokens colored by region (trusted, "
        "outlier, prefix) in the terminal and in `output_dir`/regions.",
        False,
    )

    #: As if there were no `__new__`; of subclasses, too.
    __signature__ = _OfInit()

    def __new__(cls, *values: Any, **keywords: Any):
        config = super().__new__(cls)
        if values or keywords:
            names = [one.name for one in fields(cls) if one.init]
            vars(config)["_given"] = {*names[: len(values)], *keywords}
        return config

    def __post_init__(self):
        check_type("recipe", self.recipe, (str, type(None)))
        new = self.recipe is not None and not isinstance(self.recipe, Applied)
        apply_recipe(self, vars(self).pop("_given", set()))
        if isinstance(self.teacher_model_name_or_path, os.PathLike):
            self.teacher_model_name_or_path = os.fspath(self.teacher_model_name_or_path)
        self._check_types()
        check_values(self)
        self._check_json()
        check_checkpointing(self)
        # TRL checks beta as a number. None stays in the field, so that a copy of the config made
        # with another objective does not carry a beta that nobody gave.
        given, self.beta = self.beta, 1.0 if self.beta is None else self.beta
        set_direction(self)
        super().__post_init__()
        self.beta = given
        self._check_model_options()
        self.objective = read_objective(self.objective)
        apply_knobs(self)
        check_trainer(self)
        check_objective_keys(self)
        check_selection(self)
        check_prefix(self)
        check_generations(self)
        check_rewards(self)
        check_credit(self)
        check_teacher(self)
        try:
            choose_backend(self.backend, self.device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"backend: {error}") from error
        check_sample(self)
        check_conditions(self)
        check_generation_conditions(self)
        if new and self.process_index == 0:
            print(describe(self))

    def to_dict(self) -> dict[str, Any]:
        """As transformers' `to_dict`, but secrets in a model's arguments are hidden, too, no token
        stays None, and objective and recipe are such that the same config is made of them."""
        saved = super().to_dict()
        saved |= {key: None for key in saved if getattr(self, key) is None}
        own = {"objective": saved_form(self.objective), "recipe": saved_name(self.recipe)}
        return redacted(saved | own)

    def __repr__(self) -> str:
        given = redacted({one.name: getattr(self, one.name) for one in fields(self)})
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    __str__ = __repr__

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__repr__" not in vars(cls):  # a dataclass would be given one that shows secrets
            cls.__repr__ = TrOPDConfig.__repr__  # type: ignore[method-assign]

    def rule(self, progress: float = 0.0) -> TokenRule:
        """The objective's rule, for the tokens that the config selects, at this share of training,
        0 to 1; only reopold's and a schedule's depend on it."""
        return self._selecting(self.rule_of_all(progress))

    def rules(self) -> tuple[TokenRule, ...]:
        """The different rules of a run, the first first; a schedule's at each hundredth of it."""
        return tuple(dict.fromkeys(map(self._selecting, self.rules_of_all())))

    def rules_of_all(self) -> tuple[TokenRule, ...]:
        """The same without the config's selection."""
        if isinstance(self.objective, RuleSchedule):
            return self.objective.rules
        return tuple(dict.fromkeys(map(self.rule_of_all, (0.0, 1.0))))

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss of any step reads a teacher."""
        return any(rule.uses_teacher for rule in self.rules())

    @property
    def uses_task_advantages(self) -> bool:
        """Whether the loss of any step reads a verifier's rewards."""
        return any(rule.uses_task_advantages for rule in self.rules())

    def _selecting(self, rule: TokenRule) -> TokenRule:
        selection = {name: getattr(self, name) for name in SELECTION}
        return rule if selection["select_by"] is None else replace(rule, **selection)

    def rule_of_all(self, progress: float = 0.0) -> TokenRule:
        """The same without the config's selection."""
        if isinstance(self.objective, TokenRule):
            return self.objective
        if not isinstance(self.objective, str):
            return self.objective(progress)  # type: ignore[misc, operator]
        arguments: dict[str, Any] = dict(self.objective_kwargs or {})  # type: ignore[arg-type]
        takes = knobs(self.objective)
        if self.beta is not None:
            arguments["beta"] = self.beta
        if "prefix_weight" in takes:
            arguments["prefix_weight"] = self.prefix_weight
        if self.objective == "reopold" and "stage" not in arguments:
            switch = STAGE_FRACTION if self.stage_fraction is None else self.stage_fraction
            arguments["stage"] = 1 if progress < switch else 2
        rule = build_rule(self.objective, arguments)
        return rule if self.task_weight is None else replace(rule, task_weight=self.task_weight)

    @property
    def is_guided(self) -> bool:
        """Whether completions begin with the teacher's text, at some steps at least."""
        return self.prefix_schedule != "none" or self.lmbda < 1

    @property
    def loads_teacher(self) -> bool:
        """Whether a teacher's model is loaded into this process."""
        return not (self.teacher_model_server_url or self.precomputed_teacher)

    def _check_types(self) -> None:
        """Refuses types that would fail later without their key, or pass for another value."""
        hints, own = get_type_hints(TrOPDConfig), TrOPDConfig.__annotations__
        for key in [one.name for one in fields(TrOPDConfig)]:
            kinds = get_args(hints[key]) or (hints[key],)
            if isinstance(kinds[0], EnumMeta):
                self._check_choice(key, kinds[0])
            # TRL and transformers take more for text than their annotations say.
            elif set(kinds) <= TYPES.keys() and (key in own or str not in kinds):
                check_type(key, getattr(self, key), kinds)

    def _check_choice(self, key: str, choices: Any) -> None:
        if getattr(self, key) is False:  # what YAML reads in a bare no
            setattr(self, key, "no")
        try:
            choices(getattr(self, key))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def _check_json(self) -> None:
        """Refuses invalid JSON, of which transformers would not name the key, and what is none."""
        for key in [one.name for one in fields(TrOPDConfig)]:
            value = getattr(self, key)
            is_json = isinstance(value, str) and value.startswith("{")
            if key.endswith("_kwargs") and not (is_json or isinstance(value, (dict, type(None)))):
                raise ValueError(
                    f"{key}: expected a mapping, got {shown(value)}: as a flag it is JSON, such as "
                    f"--{key} '{_AS_JSON.get(key, _JSON)}'"
                )
            if is_json and key in self._VALID_DICT_FIELDS:
                try:
                    parse_json(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{key}: {shown(value)} is no JSON: {error}") from error
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from error

    def _check_model_options(self) -> None:
        for key in ("model_init_kwargs", "teacher_model_init_kwargs"):
            if (options := getattr(self, key)) is not None:
                check_options(key, options)
                setattr(self, key, dtype_option(key, options))
        check_revisions(self)


# The fields' help is written once, beside each field; `help(TrOPDConfig)` shows it too.
TrOPDConfig.__doc__ = f"{TrOPDConfig.__doc__}\n    Args:\n" + "\n".join(
    textwrap.fill(
        f"{one.name}: {one.metadata['help']}", 100,
        initial_indent=" " * 8, subsequent_indent=" " * 12,
    )
    for one in fields(TrOPDConfig) if one.name in TrOPDConfig.__annotations__
)  # fmt: skip
