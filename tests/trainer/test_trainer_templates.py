"""Keys of `chat_template_kwargs`: those that no template reads are refused by name."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from jinja2 import TemplateError
from training import Spy

from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.chat_templates import as_lists, check_contents, check_template_keys

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: Reads a switch, as Qwen3's does, a date with a default, as Llama 3's does, and documents.
READS = tiny.TEMPLATE + (
    "{% if enable_thinking is defined and not enable_thinking %} w90{% endif %}"
    "{% if not date_string is defined %}{% set date_string = 'w89' %}{% endif %} {{ date_string }}"
    "{% set seen = namespace(any=false) %}{% for d in documents or [] %}{% break %}{% endfor %}"
    "{% generation %}{% endgeneration %}"
)
THINKS = {"enable_thinking": False}


def check(given, template, tools=(), used=None):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    check_template_keys(given, tokenizer, used, tools)


def test_keys_that_are_read():
    for given in (
        THINKS, {"date_string": "w3"}, {"documents": []}, {"padding": False, "truncation": False},
        {"tokenizer_kwargs": {}}, {"continue_final_message": False}, {}, None,
    ):  # fmt: skip
        check(given, READS)


@pytest.mark.parametrize(
    ("given", "template", "words"),
    [
        ({"enable_thinkng": False}, READS, r"reads date_string, .*did you mean 'enable_thinking'"),
        (THINKS | {"date": "w1"}, READS, "reads date_string, documents, enable_thinking besides"),
        (THINKS, tiny.TEMPLATE, "reads no variable besides messages and tools: leave it out"),
        ({"documents": []}, tiny.TEMPLATE, "reads no variable"),
        ({"seen": 3}, READS, "reads"),  # set before it is read
        ({"sanitize_contrl_tokens": True}, tiny.TEMPLATE, "did you mean 'sanitize_control_tok"),
    ],
    ids=str,
)
def test_keys_that_are_not_read(given, template, words):
    key = list(given)[-1]
    with pytest.raises(
        ValueError, match=f"^chat_template_kwargs: '{key}' would have no effect: .*{words}"
    ):
        check(given, template)


def test_a_message_that_goes_on():
    """transformers would refuse it at the first prompt."""
    with pytest.raises(ValueError, match="^chat_template_kwargs: 'continue_final_message' conti"):
        check({"continue_final_message": True}, READS)


def test_the_template_in_use():
    """One of several by name, that for tools, and one that TRL puts in the tokenizer's place."""
    several = {"default": tiny.TEMPLATE, "tool_use": READS, "rag": READS}
    check(THINKS, several, tools=[print])
    check(THINKS, {"default": READS, "rag": tiny.TEMPLATE})
    check(THINKS, tiny.TEMPLATE, used=READS)
    for template, used in ((several, None), (READS, tiny.TEMPLATE)):
        with pytest.raises(ValueError, match="^chat_template_kwargs: 'enable_thinking' would have"):
            check(THINKS, template, used=used)


def test_templates_that_cannot_be_looked_into():
    """Whoever applies them says more; a tokenizer's own code may read any key."""

    class Own(type(tiny.tokenizer())):
        def apply_chat_template(self, *arguments, **keywords):
            return super().apply_chat_template(*arguments, **keywords)

    check(THINKS, "{% if %}")
    check(THINKS, None)
    check(THINKS, {"rag": tiny.TEMPLATE})
    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = Own
    check_template_keys(THINKS, tokenizer, None, ())


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"truncation": True, "max_length": 5}, "truncation"), ({"max_length": 5}, "max_length"),
        ({"padding": True}, "padding"), ({"padding": "max_length"}, "padding"),
        ({"tokenizer_kwargs": {"max_length": 5}}, "max_length"),
        ({"processor_kwargs": {"text_kwargs": {"truncation": True}}}, "truncation"),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_cut_or_pad(given, key):
    """An answer would begin in the middle of a question, or after padding."""
    with pytest.raises(ValueError, match=f"^chat_template_kwargs: '{key}' would cut or pad promp"):
        check(given, READS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "expected a mapping of arguments by their names, got 5"),
        ([("stride", 1)], "expected a mapping"), ("stride", "expected a mapping"),
        ({1: 2}, "expected a mapping"),
        ({"verbose": False, "add_special_tokens": True}, "'add_special_tokens' with"),
        ({"text": "w1"}, "'text' with"), ({"padding": False}, "'padding' with"),
        ({"max_length": None}, "'max_length' with"), ({"text_pair": ["w1"]}, "'text_pair' with"),
        ({"is_split_into_words": True}, "'is_split_into_words' with"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_the_tokenizer(given, words):
    """They would fail at the first prompt, as arguments given twice, or make other than ids."""
    with pytest.raises(ValueError, match=f"^chat_template_kwargs: 'tokenizer_kwargs': {words}"):
        check({"tokenizer_kwargs": given}, READS)


def test_arguments_of_the_tokenizer_that_work():
    for given in ({}, {"split_special_tokens": True}, {"verbose": False}, None):
        check({"tokenizer_kwargs": given} | THINKS, READS)


#: What templates make of a content that is a list of parts.
PRINTS = tiny.TEMPLATE
DROPS = tiny.TEMPLATE.replace("m['content']", "m['content'] if m['content'] is string else ''")
ADDS = tiny.TEMPLATE.replace("m['content']", "' ' + m['content']")
WRITES = tiny.TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endif %}",
)
# As LLaVA's: of a content that is text it writes nothing.
LISTS = tiny.TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] | trim }} {% endfor %}",
)
FIRST = WRITES.replace("m['content'] %}", "m['content'][:1] %}")


@pytest.mark.parametrize("template", [PRINTS, DROPS, ADDS, FIRST, WRITES, LISTS])
@pytest.mark.parametrize("column", ["prompt", "teacher_prompt"])
def test_contents_in_parts(tmp_path, template, column):
    """A template for text prints the list as Python does, leaves it or a part out, or fails."""
    user = in_parts("user", "w3")
    user[0]["content"] += [{"type": "text", "text": "w4"}]
    prompt = in_parts("user", "w1") if template == LISTS else [{"role": "user", "content": "w1"}]
    row = {"prompt": prompt} | {column: user}
    if template in (WRITES, LISTS):
        batch, _ = train_on(tmp_path, template, **row)
        written = tiny.tokenizer().convert_tokens_to_ids(["<s>", "w3", "w4", "<|end|>", "<s>"])
        assert batch[f"{column}_ids"].tolist() == [written] * 4
        return
    with pytest.raises(ValueError, match="^chat template: it does not read .* parts.*'w3'.*text"):
        train_on(tmp_path, template, **row)


def train_on(folder, template, prompt, **columns):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    args = TrOPDConfig(
        str(folder), max_steps=1, per_device_train_batch_size=4, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, **{"lmbda": 0.0} if "teacher_completion" in columns else {},
    )  # fmt: skip
    data = tiny.Dataset.from_list([{"prompt": prompt} | columns] * 4)
    trainer = Spy(tiny.model(0), tiny.model(1), args, data, processing_class=tokenizer)
    trainer.train()
    return trainer.batches[0], tokenizer.convert_tokens_to_ids


def in_parts(role, text):
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


TALK = [{"role": "user", "content": "w3"}]
UNREAD = "^chat template: it does not read a content that is text, as in .*'w3'.*list of parts"


@pytest.mark.parametrize("template", [PRINTS, DROPS, ADDS, FIRST, WRITES, LISTS])
@pytest.mark.parametrize("column", ["prompt", "teacher_prompt"])
def test_contents_of_text(tmp_path, template, column):
    """Of a text a template for parts finds none, and writes nothing."""
    prompt = in_parts("user", "w1") if template == LISTS else TALK
    row = {"prompt": prompt} | {column: TALK}
    if template == LISTS:
        with pytest.raises(ValueError, match=UNREAD):
            train_on(tmp_path, template, **row)
        return
    batch, id_of = train_on(tmp_path, template, **row)
    assert (batch[f"{column}_ids"] == id_of("w3")).sum(1).tolist() == [1] * 4


@pytest.mark.parametrize("template", [WRITES, LISTS])
@pytest.mark.parametrize("answer", ["w3", [{"role": "assistant", "content": "w3"}]], ids=str)
def test_answers_of_text(tmp_path, template, answer):
    prompt = in_parts("user", "w1")
    if template == LISTS:
        with pytest.raises(ValueError, match=UNREAD):
            train_on(tmp_path, template, prompt, teacher_completion=answer)
        answer = in_parts("assistant", "w3")
    batch, id_of = train_on(tmp_path, template, prompt, teacher_completion=answer)
    assert batch["completion_ids"].tolist() == [[id_of("w3"), id_of("<|end|>")]] * 4


def test_a_template_that_looks_for_words():
    """It prints a text for what it holds, which a mark in its place does not."""
    looks = LISTS.replace(
        "{% for part",
        "{% if m['content'] is string and '</q>' in m['content'] %}{{ m['content'] }}{% endif %}"
        "{% for part",
    )  # fmt: skip
    check_contents([[{"role": "user", "content": "<q>w3</q>"}]], template_of(looks))
    with pytest.raises(ValueError, match=UNREAD):
        check_contents([TALK], template_of(looks))


def test_text_of_one_role():
    """... or of a turn that is as short as its role's name; a system prompt may be read as text."""
    mixed = LISTS.replace(
        "{% for part", "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{{ m['role'] }}"
        "{% for part"
    )  # fmt: skip
    talk = [{"role": "system", "content": "w3"}, {"role": "user", "content": "user"}]
    with pytest.raises(ValueError, match="^chat template: it does not read a content that is text"):
        check_contents([talk], template_of(mixed))
    check_contents([[talk[0], *in_parts("user", "w4")]], template_of(mixed))
    raises = LISTS.replace("{% for part", "{{ m['content'] + [] and '' }}{% for part")
    with pytest.raises(ValueError, match="^chat template: it does not read a content that is text"):
        check_contents([TALK], template_of(raises))


def test_text_that_a_template_leaves_out():
    """Also of parts, or as thoughts of earlier turns, which the branch for lists may leave in."""
    thoughts = WRITES.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    talk = [{"role": "user", "content": "<think>w3</think>"}, {"role": "assistant", "content": ""}]
    check_contents([talk], template_of(thoughts))
    users = "{% for m in messages if m['role'] == 'user' %}"
    silent = WRITES.replace("{% for m in messages %}", users)
    check_contents([[{"role": "system", "content": "w5"}, *TALK]], template_of(silent))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_a_teacher_s_answer(tmp_path, key):
    """Each family of templates reads another key, and leaves out the others without a word."""
    reads = tiny.TEMPLATE.replace("{{ m['content'] }}", "{{ m['KEY'] | trim }} {{ m['content'] }}")
    answer = {"role": "assistant", "content": "w5", key: " w6 "}
    batch, _ = train_on(tmp_path, reads.replace("KEY", key), TALK, teacher_completion=[answer])
    assert all(ids[:2].tolist() == [11, 10] for ids in batch["completion_ids"])
    for template in (tiny.TEMPLATE, reads.replace("KEY", "thoughts")):
        words = f"^teacher_completion: the chat template does not write the answer's '{key}'"
        with pytest.raises(ValueError, match=words):
            train_on(tmp_path, template, TALK, teacher_completion=[answer])
    strips = "m['content'].split('</think>')[-1]"  # as DeepSeek-R1's
    for said in ("<think> w6 </think> w5", [{"type": "text", "text": "<think>w6</think>w5"}]):
        whole = {"role": "assistant", "content": said}
        template = WRITES.replace("m['content'] }}", f"{strips} }}}}")
        template = template.replace("part['text'] }}", "part['text'].split('</think>')[-1] }}")
        with pytest.raises(ValueError, match="^teacher_completion: .* answer's 'content' whole"):
            train_on(tmp_path, template, TALK, teacher_completion=[whole])
        train_on(tmp_path, WRITES, TALK, teacher_completion=[whole])
    for nothing in ("", None):
        train_on(tmp_path, tiny.TEMPLATE, TALK, teacher_completion=[answer | {key: nothing}])


def template_of(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3"])
def test_contents_beside_a_processor(tmp_path, kind):
    """TRL writes all of them in parts, which a template for text prints as Python does."""
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    args = TrOPDConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    for data in (vision.prompts(2), tiny.Dataset.from_list([{"prompt": TALK}] * 2)):
        processor = vision.processor(kind)
        processor.chat_template = PRINTS
        models = vision.model(kind, 0), vision.model(kind, 1)
        trainer = Spy(*models, args, data, processing_class=processor)
        with pytest.raises(
            ValueError, match="^chat template: .* list of parts.*: beside a processor"
        ):
            trainer.train()


def render_check(content, template, role="user"):
    check_contents([[{"role": role, "content": content}]], template_of(template))


def test_a_template_s_own_error(tmp_path):
    """It is raised in either form, and keeps its words."""
    own = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}"
    for template in (PRINTS, WRITES):
        with pytest.raises(TemplateError, match="^roles must alternate$"):
            train_on(tmp_path, own + "{% endif %}" + template, in_parts("system", "w3"))


def test_text_that_a_template_leaves_out_or_trims():
    """Thoughts, for instance: of text, too."""
    no_thoughts = WRITES.replace("part['text']", "part['text'].split('</think>')[-1] | trim")
    no_thoughts = no_thoughts.replace(
        "{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | trim }}"
    )
    for texts in (["<think>w3</think> w4 "], ["w3\n", "w4"]):
        render_check([{"type": "text", "text": text} for text in texts], no_thoughts)


def test_keys_that_are_set_already():
    """They would fail as an argument given twice, when the first prompt is tokenized."""
    for key, remedy in (
        ("chat_template", "set the chat_template of processing_class"),
        ("tools", "give tools to TrOPDTrainer"), ("messages", "leave it out"),
        ("add_generation_prompt", "leave it out"), ("return_dict", "leave it out"),
        ("return_tensors", "leave it out"), ("return_assistant_tokens_mask", "leave it out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^chat_template_kwargs: '{key}' is the.*: {remedy}$"):
            check({key: None}, READS)


def test_processors():
    """Their own template counts, not the tokenizer's."""
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    processor = vision.processor("qwen2_vl")
    processor.tokenizer.chat_template = READS
    for given in ({"padding": False}, {"text_kwargs": {}}, {"text_kwargs": {"truncation": None}}):
        check_template_keys(given, processor, None, ())
    with pytest.raises(ValueError, match="^chat_template_kwargs: 'enable_thinking' would have no "):
        check_template_keys(THINKS, processor, None, ())
    processor.chat_template = READS
    check_template_keys(THINKS, processor, None, ())


def test_options_for_lists_of_ids():
    """As transformers takes them from 5.4 on, and before; a processor's own code, less of them."""
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    processor, given = vision.processor("qwen2_vl"), {"enable_thinking": True}
    lists = {"padding": False, "text_kwargs": {"return_tensors": None}}
    assert as_lists(processor, given) == given | {"processor_kwargs": lists}
    text = {"text_kwargs": {"padding": False, "add_special_tokens": False}}
    both = {"text_kwargs": {"return_tensors": None} | text["text_kwargs"]}
    for whole in (given | text, given | {"processor_kwargs": text}):
        assert as_lists(processor, whole) == given | {"processor_kwargs": both}
    # transformers 5.17 takes what stands beside them for the whole of processor_kwargs.
    special = {"add_special_tokens": False}
    whole = given | {"processor_kwargs": lists | special}
    assert as_lists(processor, given | special) == whole

    class Before(type(processor)):
        def apply_chat_template(self, conversation, **keywords):
            raise NotImplementedError

    processor.__class__ = Before
    assert as_lists(processor, given) == given | lists
    Before.__call__ = lambda self, images=None, text=None, padding=False: None
    assert as_lists(processor, given) == given | {"padding": False}
    assert as_lists(processor.tokenizer, given) == given


@pytest.mark.parametrize("given", [5, {"text": "w1"}, {"is_split_into_words": True}], ids=str)
@pytest.mark.parametrize("kind", ["qwen2_vl", "idefics3"])
def test_arguments_of_a_processor(kind, given):
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    with pytest.raises(ValueError, match="^chat_template_kwargs: 'text_kwargs': "):
        check_template_keys({"text_kwargs": given}, vision.processor(kind), None, ())
    with pytest.raises(ValueError, match="^chat_template_kwargs: 'is_split_into_words' with this "):
        check_template_keys({"is_split_into_words": True}, vision.processor(kind), None, ())


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("qwen2_vl", {"min_pixels": 4}), ("qwen2_vl", {"do_rescale": False}),
        ("gemma3", {"do_normalize": False}), ("gemma3", {"do_pan_and_scan": True}),
        ("gemma3", {"images_kwargs": {"do_resize": False}}),
        ("llava_next", {"image_mean": [0.1, 0.1, 0.1]}),
        ("idefics3", {"processor_kwargs": {"images_kwargs": {"do_normalize": False}}}),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_images(kind, given):
    """Completions would be written from other pixels than those that the loss reads."""
    pytest.importorskip("PIL", reason="images need pillow")
    import vision

    (key,) = given
    words = f"^chat_template_kwargs: '{key}' .* the loss.*: set it on processing_class.image_proc"
    with pytest.raises(ValueError, match=words):
        check_template_keys(given, vision.processor(kind), None, ())


@pytest.mark.parametrize("template", [READS, tiny.TEMPLATE])
def test_the_trainer_checks_them(tmp_path, template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    talk = tiny.Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]] * 4})
    args = TrOPDConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, chat_template_kwargs=THINKS,
    )  # fmt: skip

    def made():
        return Spy(tiny.model(0), tiny.model(1), args, talk, processing_class=tokenizer)

    if template != READS:
        with pytest.raises(ValueError, match="^chat_template_kwargs: 'enable_thinking' would have"):
            made()
        return
    trainer = made()
    trainer.train()
    assert (trainer.batches[0]["prompt_ids"] == tokenizer.convert_tokens_to_ids("w90")).any()
