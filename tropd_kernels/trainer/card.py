"""The model card of a run: objective, models, data, settings and versions.

TRL's card names the method and paper of its trainer. Here the method is the config's objective, so
the text is made from the config and the names that the trainer was given; the metadata is TRL's. A
model in a folder goes by the folder's last part: a card is published, and should not show a
machine's paths. What is not known is left out.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .. import __version__
from .config import TrOPDConfig
from .patching import base_of
from .recipes import describe
from .sampling import WHOLE
from .self_teacher import is_self

_REPOSITORY = "https://github.com/huggingface/trl"


@dataclass(frozen=True)
class Source:
    """The publication of an objective: an arXiv `id`, or only a `url`."""

    title: str
    authors: str
    year: int
    id: str | None = None
    url: str = ""

    @property
    def link(self) -> str:
        return f"[{self.title}]({self.url or f'https://huggingface.co/papers/{self.id}'})"

    @property
    def bibtex(self) -> str:
        name = self.authors.split(" and ")[0].split()[-1].lower()
        word = re.sub(r"\W", "", self.title.split()[0]).lower()
        fields = {"title": f"{{{self.title}}}", "author": self.authors, "year": str(self.year)}
        if self.id:
            fields |= {"eprint": self.id, "archivePrefix": "arXiv"}
        else:
            fields["url"] = self.url
        lines = (f"  {key:<13} = {{{value}}}," for key, value in fields.items())
        return "\n".join([f"@misc{{{name}{self.year}{word},", *lines, "}"])


_TROPD = Source(
    "Trust Region On-Policy Distillation",
    "Xingrun Xing and Haoqing Wang and Boyan Gao and Ziheng Li and Yehui Tang", 2026, "2606.01249",
)  # fmt: skip
_SURVEY = Source(
    "A Formula-Driven Survey and Research Agenda for On-Policy Distillation", "Bowen Zhang",
    2026, "2606.22793",
)  # fmt: skip
_DISTILLM = Source(
    "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    "Jongwoo Ko and Sungnyun Kim and Tianyi Chen and Se-Young Yun", 2024, "2402.03898",
)  # fmt: skip
_BLOG = Source(
    "On-Policy Distillation", "Kevin Lu and {Thinking Machines Lab}", 2025,
    url="https://thinkingmachines.ai/blog/on-policy-distillation/",
)  # fmt: skip
_GKD = Source(
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos "
    "Garea and Matthieu Geist and Olivier Bachem", 2023, "2306.13649",
)  # fmt: skip
_EOPD = Source(
    "Entropy-Aware On-Policy Distillation of Language Models",
    "Woogyeol Jin and Taywon Min and Yongjin Yang and Swanand Ravindra Kadhe and Yi Zhou and "
    "Dennis Wei and Nathalie Baracaldo and Kimin Lee", 2026, "2603.07079",
)  # fmt: skip
_REOPOLD = Source(
    "Scaling Reasoning Efficiently via Relaxed On-Policy Distillation",
    "Jongwoo Ko and Sara Abdali and Young Jin Kim and Tianyi Chen and Pashmina Cameron",
    2026, "2603.11137",
)  # fmt: skip
_AOPD = Source(
    "Asymmetric On-Policy Distillation: Bridging Exploitation and Imitation at the Token Level",
    "Nan Jia and Haojin Yang and Xing Ma and Jiesong Lian and Shuailiang Zhang and Weipeng Zhang "
    "and Ke Zeng and Xunliang Cai", 2026, "2605.06387",
)  # fmt: skip
_POWER_OPD = Source(
    "PowerOPD: Stabilizing On-Policy Distillation with Bounded Power Transformation",
    "Anhao Zhao and Junlong Tong and Yingqi Fan and Ping Nie and Wenjie Li and Xiaoyu Shen",
    2026, "2606.17199",
)  # fmt: skip
_TOPD = Source(
    "Trust Region Policy Distillation",
    "Zhengpeng Xie and Li Lyna Zhang and Zeke Xie and Mao Yang", 2026, "2607.04751",
)  # fmt: skip
_LSM = Source(
    "Revisiting On-Policy Distillation: Empirical Failure Modes and Simple Fixes",
    "Yuqian Fu and Haohuan Huang and Kaiwen Jiang and Yuanheng Zhu and Dongbin Zhao",
    2026, "2603.25562",
)  # fmt: skip
_TODI = Source(
    "ToDi: Token-wise Distillation via Fine-Grained Divergence Control",
    "Seongryong Jung and Suwan Yoon and DongGeon Kim and Hwanhee Lee", 2025, "2505.16297",
)  # fmt: skip
_AKL = Source(
    "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    "Taiqiang Wu and Chaofan Tao and Jiahao Wang and Runming Yang and Zhe Zhao and Ngai Wong",
    2024, "2404.02657",
)  # fmt: skip

_VETO = Source(
    "Stable On-Policy Distillation through Adaptive Target Reformulation",
    "Ijun Jang and Jewon Yeom and Juan Yeo and Hyunggu Lim and Taesup Kim", 2026, "2601.07155",
)  # fmt: skip

_ALL_IDS = "over the whole vocabulary"
_WHOLE = f"{_ALL_IDS}, on every token"
#: Each objective's name, what it does on a token, and its publication.
OBJECTIVES: Mapping[str, tuple[str, str, Source | None]] = {
    "tropd": ("TrOPD", "K1 (the sampled reverse KL)", _TROPD),
    "opd": ("OPD", "K1 (the sampled reverse KL) as a policy gradient", _BLOG),
    "clip_outlier": ("OPD with clipped outliers", "K1 floored at a static threshold", _TROPD),
    "mask_outlier": ("OPD with masked outliers", "K1 above a static threshold", _TROPD),
    "reopold": ("REOPOLD", "floored K1; masked at first, then ranked by entropy", _REOPOLD),
    "eopd": ("EOPD", "PPO-clipped K1, and forward KL where the teacher is unsure", _EOPD),
    "entropy_opd": ("Entropy OPD", "K1 on the student's most uncertain tokens", _SURVEY),
    "aopd": ("AOPD", "K1 where it rewards, forward KL where it punishes", _AOPD),
    "tropd_aopd": (
        "TrOPD + AOPD",
        "K1 where it rewards, forward KL where it punishes",
        _TROPD,
    ),
    "power_opd": ("PowerOPD", "K1 with a bounded reward, a difference of powers", _POWER_OPD),
    "topd": ("TOP-D", "K1 against a proximal teacher, mixed with the student", _TOPD),
    "log1p_opd": ("OPD with compressed rewards", "the logarithm of K1, with its sign", None),
    "tv_opd": ("TV-OPD", "the sign of K1, a policy gradient of the total variation", None),
    "gkd": (
        "GKD",
        "the Jensen-Shannon divergence, of which beta 0 is the forward KL and 1 the reverse KL",
        _GKD,
    ),
    "lsm": (
        "Local support matching (LSM)",
        "the reverse KL on the teacher's top-k, renormalised on both sides",
        _LSM,
    ),
    "mopd": ("MOPD", "a mass-corrected reverse KL on the teacher's top-k", _SURVEY),
    "topk_jsd": ("Top-k JSD", "a Jensen-Shannon divergence on the teacher's top-k", _TROPD),
    "veto": ("Veto", "a divergence to a target between the teacher and the student", _VETO),
    "sft": ("SFT", "cross-entropy", None),
    "forward_kl": ("Forward KL", f"KL(teacher || student) {_WHOLE}", None),
    "reverse_kl": ("Reverse KL", f"KL(student || teacher) {_WHOLE}", None),
    "jeffreys": ("Jeffreys divergence", "the sum of forward and reverse KL", None),
    "jsd": ("Jensen-Shannon divergence", _WHOLE, None),
    "skew_forward": ("Skewed forward KL", _WHOLE, _DISTILLM),
    "skew_reverse": ("Skewed reverse KL", _WHOLE, _DISTILLM),
    "alpha": ("Alpha divergence", _WHOLE, None),
    "chi2": ("Chi-squared divergence", _WHOLE, None),
    "total_variation": ("Total variation", _WHOLE, None),
    "todi": ("ToDi", "forward and reverse KL, blended per id", _TODI),
    "akl": ("Adaptive KL (AKL)", "forward and reverse KL, blended per token", _AKL),
}

#: What TrOPD does on a token that the teacher does not accept, by the rule's `outlier`.
_OUTLIERS = {
    "mask": "nothing",
    "clip": "K1 floored at a static threshold",
    "forward_kl": f"the forward KL {_ALL_IDS}",
    "forward_kl_reward": f"a reward of minus the forward KL {_ALL_IDS}",
}

#: Fields of the config, our own and TRL's, with their own sentence or place in a card.
IN_WORDS = {
    "recipe", "objective", "objective_kwargs", "beta", "prefix_schedule", "prefix_length",
    "prefix_relative", "lmbda", "kl_discount_factor", "importance_gamma", "drift_tau",
}  # fmt: skip
#: Others that influence the loss or the completions: a card has those not at their defaults.
SHAPING = {
    "stage_fraction", "prefix_fraction", "prefix_steps", "prefix_weight", "num_iterations",
    "num_generations", "teacher_update_rate", "teacher_sync_steps", "task_weight",
    "reward_weights", "scale_rewards",
    "drift_block_size", "select_by", "select_fraction", "select_threshold", "router_aux_loss_coef",
    "gradient_tolerance", "gradient_sampling", "disable_dropout", "max_completion_length",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "generation_kwargs",
    "chat_template_kwargs", "use_vllm", "vllm_structured_outputs_regex",
    "max_tool_calling_iterations",
}  # fmt: skip
#: Those that influence neither: where models and data are, how a step is computed, what is shown.
#: Settings of the optimizer and of transformers do not appear in a card.
SHAPING_NOTHING = {
    "prefix_column", "teacher_model_server_url", "teacher_server_timeout",
    "teacher_server_retries", "teacher_server_concurrency", "teacher_server_protocol",
    "precomputed_teacher", "backend",
    "max_workspace_bytes", "rich_progress", "log_regions", "learning_rate",
    "remove_unused_columns", "model_init_kwargs", "trust_remote_code",
    "teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs",
    "teacher_models", "special_token_map",
    "ds3_gather_for_generation", "shuffle_dataset", "pad_to_multiple_of", "cache_implementation",
    "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
    "log_completions", "num_completions_to_print", "log_unique_prompts",
}  # fmt: skip

_TRL_BIBTEX = f"""@software{{vonwerra2020trl,
  title   = {{{{TRL: Transformers Reinforcement Learning}}}},
  author  = {{von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and \
Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin}},
  license = {{Apache-2.0}},
  url     = {{{_REPOSITORY}}},
  year    = {{2020}}
}}"""


@dataclass(frozen=True)
class Named:
    """A publishable name of a model or data set: on the hub, or else `text` describes it."""

    text: str
    hub: str | None = None

    def link(self, kind: str = "") -> str:
        if self.hub is None:
            return self.text
        return f"[{self.hub}](https://huggingface.co/{kind}{self.hub})"


def named(name: str) -> Named:
    """The publishable form of a name on the hub, or of a folder or file: its last part."""
    parts = [part for part in re.split(r"[/\\]+", name) if part]
    for part in parts:  # a snapshot in the hub's cache
        if match := re.fullmatch(r"(?:models|datasets)--(?:(.+?)--)?(.+)", part):
            return _on_hub("/".join(filter(None, match.groups())))
    path = Path(name).expanduser()
    if path.exists():
        return Named(f"`{path.resolve().name}`")
    try:
        validate_repo_id(name)
    except HFValidationError:  # more parts than owner/name, or signs that the hub does not take
        return Named(f"`{parts[-1]}`" if parts else "`.`")
    if path.suffix in (".json", ".jsonl", ".parquet"):
        return Named(f"`{path.name}`")
    return _on_hub(name)


def _on_hub(name: str) -> Named:
    return Named(f"`{name}`", name)


def named_model(model: Any) -> Named:
    """The publishable name of a model: as given, as it was loaded, or its class."""
    if isinstance(model, str):
        return named(model)
    loaded = getattr(model.config, "_name_or_path", "") or ""
    if loaded:
        return named(loaded)
    base = base_of(model)
    kind = type(base).__name__
    return Named(f"{'an' if kind[0] in 'AEIO' else 'a'} `{kind}` without a name")


@dataclass(frozen=True)
class Subject:
    """The models of a card: the student before training, and a phrase for the teacher, if any; and
    the keys of a recipe that did not apply."""

    student: Named
    teacher: str | None = None
    unused: Collection[str] = ()


def subject(
    model: Any,
    teacher: Any,
    served: str | None,
    args: TrOPDConfig,
    unused: Collection[str] = (),
) -> Subject:
    """The subject by `TrOPDTrainer`'s arguments. served: the name of a teacher behind a server."""
    if args.precomputed_teacher:
        who: str | None = "a teacher whose log-probs were computed before and came with the data"
    elif served is not None:
        parts = [part for part in re.split(r"[/\\]+", served) if part]
        path = not parts or served.startswith(("/", ".", "~")) or len(parts) > 2
        who = f"`{parts[-1] if path and parts else served}`, behind a server"
    elif isinstance(teacher, Mapping):
        who = "the teacher of each prompt: " + ", ".join(
            f"{named_model(one).link()} ({name})" for name, one in teacher.items()
        )
    elif is_self(teacher):
        averaged = args.teacher_update_rate is not None
        who = "a moving average of itself" if averaged else "itself before training"
    elif teacher is not None:
        who = named_model(teacher).link()
    else:
        who = None
    return Subject(named_model(model), who, unused)


def write(
    about: Subject,
    args: TrOPDConfig,
    model_name: str,
    *,
    hub_model_id: str | None = None,
    dataset: str | None = None,
    chat: bool = True,
    badges: list[str] | None = None,
    peft: bool = False,
    images: bool = False,
    judges: Sequence[str] = (),
) -> str:
    """The card's text, in Markdown, without its metadata.

    dataset: name on the hub, or a file. chat: the model takes messages. badges: links to the run's
    trackers, in Markdown. peft: the model is an adapter. images: it sees images.
    judges: names of the reward functions.
    """
    name, words, source = _objective(args)
    title = name
    if source:
        title = f"{title} ({source.link})"
    data = f" on {named(dataset).link('datasets/')}" if dataset else ""
    taught = f" to match {about.teacher}" if about.teacher and args.uses_teacher else ""
    sections = [
        f"# Model Card for {model_name}",
        f"This model is a fine-tuned version of {about.student.link()}, trained{taught}{data}.\n"
        f"It has been trained with tropd-kernels, on [TRL]({_REPOSITORY}).",
        "## Quick start",
        _quick_start(hub_model_id or model_name, chat, images),
        "## Training procedure",
        *(badges or []),
        f"Objective: {title}: {words}.",
        *_settings(args, judges, about.unused),
        "### Framework versions",
        "\n".join(f"- {name}: {number}" for name, number in _versions(peft).items()),
        "## Citations",
    ]
    if source:
        sections.append(_cite(name, source.bibtex))
    if args.prefix_schedule != "none" and not _is_tropd(args):
        sections.append(_cite("TrOPD", _TROPD.bibtex))
    return "\n\n".join([*sections, _cite("TRL", _TRL_BIBTEX)]) + "\n"


def _objective(args: TrOPDConfig) -> tuple[str, str, Source | None]:
    """Name, words and publication of the config's objective; a rule of one's own is written out."""
    if isinstance(args.objective, str):
        name, words, source = OBJECTIVES[args.objective]
        rule = args.rule()
        if args.objective == "tropd":
            gated = f" where the teacher accepts the token, else {_OUTLIERS[rule.outlier]}"
            words += " on every token, which is OPD" if rule.gate == "always" else gated
        if rule.top_k is not None:
            words = words.replace(_ALL_IDS, f"on the {rule.top_k_ids}'s top-{rule.top_k}")
        return name, words, source
    rules = args.rules_of_all()
    if len(rules) == 1:
        return "a rule of one's own", f"`{rules[0]!r}`", None
    first, last = (args.rule_of_all(progress) for progress in (0.0, 1.0))
    return "a schedule of rules", f"from `{first!r}` to `{last!r}`", None


def _settings(args: TrOPDConfig, judges: Sequence[str], unused: Collection[str]) -> list[str]:
    """A list, if any, of the settings that influenced the loss or the completions."""
    lines = [describe(args, unused)] if args.recipe else []
    knobs: dict[str, Any] = dict(args.objective_kwargs or {})  # type: ignore[arg-type]
    if args.beta is not None:
        knobs["beta"] = args.beta
    elif args.objective in ("gkd", "jsd"):
        knobs["beta"] = args.rule().divergence_parameter
    if knobs:
        given = ", ".join(f"`{key}={value!r}`" for key, value in knobs.items())
        lines.append(f"Knobs of `{args.objective}`: {given}.")
    if args.prefix_schedule != "none":
        first = "all" if args.prefix_relative else f"{args.prefix_length} tokens"
        lines.append(
            f"Guidance prefix: `{args.prefix_schedule}` schedule, {first} at first, of the "
            "teacher's text." + ("" if _is_tropd(args) else f" It is TrOPD's ({_TROPD.link}).")
        )
    if judges:
        lines.append(f"Completions rewarded, as in GRPO, by {', '.join(f'`{n}`' for n in judges)}.")
    if args.lmbda < 1:
        lines.append(
            f"Share of on-policy steps: {args.lmbda:g}; the others train on the teacher's text."
        )
    if args.kl_discount_factor:
        lines.append(f"Rewards discounted by {args.kl_discount_factor:g} a token.")
    if args.importance_gamma is not None:
        lines.append(f"Importance weights (arXiv 2606.22600), gamma {args.importance_gamma:g}.")
    if args.drift_tau is not None:
        lines.append(f"Policy-drift gates (arXiv 2606.24084), tau {args.drift_tau:g}.")
    if others := _shaping(args):
        lines.append(f"Other settings: {', '.join(f'`{k}={v!r}`' for k, v in others.items())}.")
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _is_tropd(args: TrOPDConfig) -> bool:
    """Whether TrOPD's paper is the objective's publication."""
    return _objective(args)[2] is _TROPD


def _shaping(args: TrOPDConfig) -> dict[str, Any]:
    """The `SHAPING` fields that are not at their defaults, nor at a value that does as little."""
    found = {}
    for field in fields(args):
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        value, idle = getattr(args, field.name), (default, {}, *WHOLE.get(field.name, ()))
        if field.name in SHAPING and value not in idle:
            found[field.name] = value
    return found


def _quick_start(name: str, chat: bool, images: bool) -> str:
    if images and chat:
        return f"""```python
from PIL import Image
from transformers import pipeline

generator = pipeline("image-text-to-text", model="{name}", device_map="auto")
image = Image.new("RGB", (256, 256), "red")  # or Image.open("a_file.png")
question = {{"type": "text", "text": "Which colour is this?"}}
messages = [{{"role": "user", "content": [{{"type": "image", "image": image}}, question]}}]
output = generator(text=messages, max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
```"""
    question = "Which is the largest prime below 100?"
    given = f'[{{"role": "user", "content": "{question}"}}]' if chat else f'"{question}"'
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{name}", device_map="auto")\n'
        f"output = generator({given}, max_new_tokens=128, return_full_text=False)[0]\n"
        'print(output["generated_text"])\n```'
    )


def _versions(peft: bool) -> dict[str, str]:
    packages = {"TRL": "trl", "Transformers": "transformers", "PyTorch": "torch"}
    packages |= {"Datasets": "datasets", "Tokenizers": "tokenizers"}
    if peft:
        packages["PEFT"] = "peft"
    return {"tropd-kernels": __version__} | {
        name: version(package) for name, package in packages.items()
    }


def _cite(name: str, entry: str) -> str:
    return f"Cite {name} as:\n\n```bibtex\n{entry}\n```"
