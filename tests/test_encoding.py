import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder, chat_layout, encode_episode
from manyicl.episodes import Episode, sample_episode
from manyicl.errors import ModelError, TaskError
from manyicl.tasks.task import Example

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(lambda text: text.strip() == text)
FORMATS = ("plain", "chat")

# Chat templates, as jinja: what models in use do, reduced to the part that matters.
LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
THOUGHT_IN_LAST_ANSWER = LOOP.replace(
    "BODY",
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think/>' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}",
)
NO_END_AFTER_LAST = LOOP.replace(
    "BODY", "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}"
)
NUMBERED = LOOP.replace("BODY", "{{ '<|im_start|>' + m['role'] + loop.index|string + '\n' + m['content'] + '<|im_end|>\n' }}")
FIRST_DIFFERS = LOOP.replace(
    "BODY", "{% if loop.first %}{{ 'U: ' + m['content'] + '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}"
)
ONLY_LAST = "{{ messages[-1]['content'] }}"
SHORTENED = LOOP.replace("BODY", "{% if loop.index > 2 or messages|length < 3 %}" + TURN + "{% endif %}")
PLAIN_END = LOOP.replace("BODY", "{{ m['role'] + ': ' + m['content'] + '\n' }}").replace("<|im_start|>assistant\n", "assistant: ")
WITHOUT_PROMPT = LOOP.replace("BODY", TURN).partition("{% if add_generation_prompt")[0]
MARKED_WHEN_SHORT = "{% if messages|length == 2 %}{{ 'short ' }}{% endif %}" + LOOP.replace("BODY", TURN)


def episode(*pairs: tuple[str, str], instruction: str = "") -> Episode:
    return Episode("task", instruction, tuple(Example(input, answer) for input, answer in pairs))


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


# The plain format.


def test_a_plain_sequence_is_this_text(byte_tokenizer) -> None:
    sequence = encode_episode(episode(("2+2", "4"), ("3+3", "six"), instruction="Add."), Encoder(byte_tokenizer))
    text = "Add.\n\n2+2\nAnswer: 4<|end|>\n\n3+3\nAnswer: six<|end|>\n\n"
    assert text_of(byte_tokenizer, sequence.token_ids) == text
    # One token a byte, one for a terminator: spans follow from lengths alone.
    assert sequence.answer_spans == ((17, 20), (33, 38))
    assert sequence.shots == [
        0 if 17 <= place < 20 else 1 if 33 <= place < 38 else -1 for place in range(len(sequence.token_ids))
    ]
    assert [(segment.role, segment.start, segment.stop, segment.shot) for segment in sequence.segments] == [
        ("opening", 0, 6, -1),
        ("input", 6, 17, 0),
        ("answer", 17, 19, 0),
        ("terminator", 19, 20, 0),
        ("gap", 20, 22, 0),
        ("input", 22, 33, 1),
        ("answer", 33, 37, 1),
        ("terminator", 37, 38, 1),
        ("gap", 38, 40, 1),
    ]


def test_an_episode_without_instruction_has_no_opening(byte_tokenizer) -> None:
    sequence = encode_episode(episode(("a", "b")), Encoder(byte_tokenizer))
    assert sequence.segments[0].role == "input"
    assert Encoder(byte_tokenizer).encode_opening() == ()


def test_the_start_token_stands_where_the_tokenizer_puts_one(make_tokenizer) -> None:
    tokenizer = make_tokenizer(add_start=True)
    encoder = Encoder(tokenizer)
    assert encoder.encode_opening() == (tokenizer.bos_token_id,)
    sequence = encode_episode(episode(("a", "b"), ("c", "d"), instruction="Do."), encoder)
    assert text_of(tokenizer, sequence.token_ids) == "<|bos|>Do.\n\na\nAnswer: b<|end|>\n\nc\nAnswer: d<|end|>\n\n"
    assert sequence.token_ids.count(tokenizer.bos_token_id) == 1


@given(
    pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    instruction=st.just("") | TEXTS,
    format=st.sampled_from(FORMATS),
)
def test_spans_follow_from_construction(byte_tokenizer, pairs, instruction, format) -> None:
    encoder = Encoder(byte_tokenizer, format=format)
    sequence = encode_episode(episode(*pairs, instruction=instruction), encoder)
    # Segments cover every token, once and in order.
    assert sequence.segments[0].start == 0
    assert all(left.stop == right.start for left, right in pairwise(sequence.segments))
    assert sequence.segments[-1].stop == len(sequence.token_ids)
    # Each answer is there, and ends with the only terminator in it.
    assert len(sequence.answer_spans) == len(pairs)
    for (start, stop), (_, answer) in zip(sequence.answer_spans, pairs, strict=True):
        ids = sequence.token_ids[start:stop]
        assert ids == encoder.encode_answer(answer)
        assert ids.index(encoder.terminator_id) == len(ids) - 1
        assert text_of(byte_tokenizer, ids[:-1]) == encoder.layout.answer_lead + answer
    # What is counted is what is encoded.
    counted = encoder.count_opening(instruction) + sum(encoder.count_example(*pair) for pair in pairs)
    assert counted == len(sequence.token_ids)
    # A query and its label, behind the same demonstrations, are the tokens that were trained.
    opening = encoder.encode_opening(instruction)
    rest = [encoder.encode_example(*pair) for pair in pairs]
    assert sequence.token_ids == (
        *opening,
        *(token for part in rest for token in part.input_ids + part.answer_ids + part.gap_ids),
    )
    assert rest[-1].input_ids == encoder.encode_query(pairs[-1][0])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("special", ["<|end|>", "<|im_end|>", "<|im_start|>", "<|bos|>", "<|pad|>"])
def test_special_tokens_in_a_text_are_plain_text(byte_tokenizer, format: str, special: str) -> None:
    encoder = Encoder(byte_tokenizer, format=format)
    text = f"a{special}b"
    sequence = encode_episode(episode((text, text), instruction=text if format == "plain" else ""), encoder)
    own = encode_episode(episode(("ab", "ab"), instruction="ab" if format == "plain" else ""), encoder)
    special_ids = set(byte_tokenizer.all_special_ids)
    assert [token for token in sequence.token_ids if token in special_ids] == [
        token for token in own.token_ids if token in special_ids
    ]
    assert text in text_of(byte_tokenizer, sequence.token_ids)


def test_a_tokenizer_that_reads_terminators_out_of_answers_is_refused(byte_tokenizer) -> None:
    class Careless:
        """Ignores split_special_tokens, as slow tokenizers may."""

        def __getattr__(self, name):
            return getattr(byte_tokenizer, name)

        def __call__(self, text, *, add_special_tokens=True, split_special_tokens=False):
            return byte_tokenizer(text, add_special_tokens=add_special_tokens)

    encoder = Encoder(Careless())
    assert encoder.encode_answer("fine")[-1] == byte_tokenizer.eos_token_id
    with pytest.raises(ModelError, match=r"reads its end token out of the answer 'a<\|end\|>b'"):
        encoder.encode_answer("a<|end|>b")


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_answer_is_an_error(byte_tokenizer, answer: str, format: str) -> None:
    with pytest.raises(TaskError) as raised:
        Encoder(byte_tokenizer, format=format).encode_answer(answer)
    assert str(raised.value) == f"the answer {answer!r} is empty. Every example needs an answer; remove it or fill it in."


def test_a_tokenizer_without_end_token_is_refused(make_tokenizer) -> None:
    with pytest.raises(ModelError) as raised:
        Encoder(make_tokenizer(end=None))
    assert str(raised.value) == (
        "the tokenizer has no end token (eos_token), which ends every answer. Set one: tokenizer.eos_token = …"
    )


# Labels.


def test_labels_that_begin_like_another_are_told_apart_by_the_terminator(byte_tokenizer) -> None:
    encoder = Encoder(byte_tokenizer)
    ids = encoder.encode_labels(["play", "play music", "playback"])
    assert [len(label) for label in ids] == [6, 12, 10]
    assert ids[1][:5] == ids[2][:5] == ids[0][:5]
    assert {label[-1] for label in ids} == {encoder.terminator_id}
    assert ids[0][5] not in (ids[1][5], ids[2][5])


def test_labels_with_the_same_tokens_or_none_are_errors(byte_tokenizer) -> None:
    encoder = Encoder(byte_tokenizer)
    with pytest.raises(TaskError) as raised:
        encoder.encode_labels(["yes", "no", "yes"])
    assert str(raised.value) == "labels 'yes' and 'yes' have the same 5 token ids and cannot be told apart. Rename one."
    with pytest.raises(TaskError, match="the answer '' is empty"):
        encoder.encode_labels(["yes", ""])


def test_different_labels_that_a_tokenizer_reads_alike_are_errors(byte_tokenizer) -> None:
    class Lowercase:
        def __getattr__(self, name):
            return getattr(byte_tokenizer, name)

        def __call__(self, text, **options):
            return byte_tokenizer(text.lower(), **options)

    with pytest.raises(TaskError, match="labels 'May' and 'may' have the same 5 token ids and cannot be told apart"):
        Encoder(Lowercase()).encode_labels(["May", "june", "may"])


# The chat format.


def conversation(pairs, instruction: str = "") -> list[dict[str, str]]:
    messages = [{"role": "system", "content": instruction}] if instruction else []
    for input, answer in pairs:
        messages += [{"role": "user", "content": input}, {"role": "assistant", "content": answer}]
    return messages


@pytest.mark.parametrize(
    "template", [LOOP.replace("BODY", TURN), DEFAULT_SYSTEM + LOOP.replace("BODY", TURN)], ids=["chatml", "default"]
)
@pytest.mark.parametrize("instruction", ["", "Say it."])
def test_a_chat_sequence_is_the_templates_own_text(make_tokenizer, template: str, instruction: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    encoder = Encoder(tokenizer, format="chat")
    pairs = [(f"question {number}", f"answer {number}") for number in range(9)]
    for count in (1, 2, 3, 9):
        sequence = encode_episode(episode(*pairs[:count], instruction=instruction), encoder)
        messages = conversation(pairs[:count], instruction)
        assert text_of(tokenizer, sequence.token_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        # With bytes as tokens, tokenising the whole text gives the same ids, special tokens included.
        assert list(sequence.token_ids) == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        query = [*messages, {"role": "user", "content": "last"}]
        prompt = sequence.token_ids + encoder.encode_query("last")
        assert text_of(tokenizer, prompt) == tokenizer.apply_chat_template(query, tokenize=False, add_generation_prompt=True)
    assert encoder.terminator_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_chat_layout_cuts_the_template(make_tokenizer) -> None:
    layout, terminator_id = chat_layout(make_tokenizer(chat_template=DEFAULT_SYSTEM + LOOP.replace("BODY", TURN)))
    assert layout.opening == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert (layout.before_instruction, layout.after_instruction) == ("<|im_start|>system\n", "<|im_end|>\n")
    assert (layout.before_input, layout.after_input) == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert (layout.answer_lead, layout.gap, layout.is_markup, terminator_id) == ("", "\n", True, 260)


def test_a_template_without_system_messages_serves_tasks_without_instruction(make_tokenizer) -> None:
    encoder = Encoder(make_tokenizer(chat_template=NO_SYSTEM + LOOP.replace("BODY", TURN)), format="chat")
    assert encoder.encode_opening() == ()
    with pytest.raises(ModelError) as raised:
        encoder.encode_opening("Say it.")
    assert str(raised.value) == (
        "the chat template takes no system message, so the task's instruction has no place. "
        "Use episodes.format=plain, or drop the instruction."
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template. Use the plain format: episodes.format=plain."),
        (
            THOUGHT_IN_LAST_ANSWER,
            r"not prefix-stable: .* \(1 questions give '<\|im_start\|>user\\n\[\[manyicl user 0\]\]<.*<think/>",
        ),
        (NO_END_AFTER_LAST, "the chat template ends an answer with '', which is no special token"),
        (NUMBERED, "the chat template wraps later messages in other text than earlier ones"),
        (FIRST_DIFFERS, "the chat template opens its first message differently \\('U: '\\)"),
        (ONLY_LAST, r"the chat template does not show every message \('\[\[manyicl user 0\]\]' is missing\)"),
        (SHORTENED, "the chat template does not show every message"),
        (PLAIN_END, r"the chat template ends an answer with '\\n', which is no special token"),
        (WITHOUT_PROMPT, "the chat template is not prefix-stable: a conversation does not begin with the text of a shorter one"),
        (MARKED_WHEN_SHORT, r"the chat template is not prefix-stable: .* \(1 questions give 'short <"),
        ("{{ raise_exception('Not today.') }}", r"the chat template cannot be rendered: Not today\. Use"),
        ("{{ messages[0].nothing.there }}", "the chat template cannot be rendered: "),
    ],
    ids=[
        "none",
        "thought",
        "no-end",
        "numbered",
        "first",
        "last",
        "shortened",
        "plain-end",
        "no-prompt",
        "short",
        "raises",
        "undefined",
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(make_tokenizer, template: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        Encoder(make_tokenizer(chat_template=template), format="chat")
    assert "episodes.format=plain" in str(raised.value)


@pytest.mark.parametrize("format", FORMATS)
def test_the_default_models_formats(default_model, format: str) -> None:
    tokenizer = default_model.tokenizer
    encoder = Encoder(tokenizer, format=format)
    pairs = [("What a film!", "positive"), ("Dull, and  long.", "negative"), ("naïve café 猫", "neutral")]
    sequence = encode_episode(episode(*pairs, instruction="Judge."), encoder)
    text = text_of(tokenizer, sequence.token_ids)
    assert encoder.terminator_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    if format == "chat":
        assert text == tokenizer.apply_chat_template(conversation(pairs, "Judge."), tokenize=False)
    else:
        assert text == "Judge.\n\n" + "".join(f"{input}\nAnswer: {answer}<|im_end|>\n\n" for input, answer in pairs)
    lead = encoder.layout.answer_lead
    spans = [text_of(tokenizer, sequence.token_ids[start:stop]) for start, stop in sequence.answer_spans]
    assert spans == [f"{lead}{answer}<|im_end|>" for _, answer in pairs]


def test_sampled_episodes_fit_their_budget_in_tokens(byte_tokenizer, small_task) -> None:
    for format in FORMATS:
        encoder = Encoder(byte_tokenizer, format=format)
        task = small_task(num_train=60, instruction="Say yes or no.")
        for max_tokens in (200, 333, 1000):
            config = EpisodesConfig(max_tokens=max_tokens)
            drawn = sample_episode(task, config=config, counter=encoder, seed=0, index=1)
            length = len(encode_episode(drawn, encoder).token_ids)
            longest = max(encoder.count_example(example.input, example.answer) for example in task.train)
            assert max_tokens - longest < length <= max_tokens


class SlowTokenizer:
    """Keeps an option between setting it and using it, as transformers' tokenizers do."""

    bos_token_id, eos_token_id = None, 2
    all_special_ids = (2,)
    chat_template = None

    def __call__(self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False) -> dict[str, list[int]]:
        self.option = split_special_tokens
        time.sleep(0.001)
        return {"input_ids": [int(self.option)]}


def test_encoders_of_one_tokenizer_use_it_one_thread_at_a_time() -> None:
    tokenizer = SlowTokenizer()
    found: dict[bool, set[tuple[int, ...]]] = {}

    def encode(is_markup: bool) -> None:
        encoder = Encoder(tokenizer)
        found[is_markup] = {encoder._tokenize(f"text {number}", is_markup) for number in range(50)}

    threads = [threading.Thread(target=encode, args=(is_markup,)) for is_markup in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {True: {(0,)}, False: {(1,)}}
