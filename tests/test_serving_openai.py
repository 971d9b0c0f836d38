"""The service through the real `openai` client: its calls work, and its types hold what the service answers."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from openai.types.fine_tuning import FineTuningJob

from manyicl.serving.app import create_app
from manyicl.serving.backends import TaskSpec
from manyicl.serving.completion_routes import EventStream
from manyicl.serving.database import FileRow
from manyicl.serving.keys import add_key
from manyicl.serving.settings import Settings
from manyicl.serving.store import Owned
from serving_fixtures import CAPITALS, TICKETS, FakeBackend, chat_file, overloaded, plain_file, serving, wait_for


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path / "fake")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {tenant: add_key(tmp_path / "keys.txt", tenant) for tenant in ("acme", "other")}


@pytest.fixture
def address(tmp_path: Path, backend: FakeBackend, keys: dict[str, str]) -> Iterator[str]:
    with serving(Settings(tmp_path / "data", api_keys=tmp_path / "keys.txt"), backend) as address:
        yield address


@pytest.fixture
def client(address: str, keys: dict[str, str]) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key=keys["acme"], max_retries=0, _strict_response_validation=True) as client:
        yield client


def make_model(client: OpenAI, content: bytes, name: str, **options: object) -> FineTuningJob:
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(training_file=file.id, model="base", suffix=name, **options)  # type: ignore[arg-type]
    return wait_for(lambda: (found := client.fine_tuning.jobs.retrieve(job.id)).finished_at and found)


def test_a_file_of_examples_becomes_a_model_that_answers(client: OpenAI, backend: FakeBackend) -> None:
    job = make_model(client, chat_file(TICKETS, system="Route the ticket."), "tickets", seed=3, metadata={"team": "support"})
    assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", "tickets", None)
    assert (job.seed, job.metadata, job.organization_id) == (3, {"team": "support"}, "acme")
    assert job.trained_tokens == sum(len(f"{given} {answer}".split()) for given, answer in TICKETS)
    assert [model.id for model in client.models.list()] == ["base", "tickets"]
    answer = client.chat.completions.create(model="tickets", messages=[{"role": "user", "content": " an invoice I was charged "}])
    assert isinstance(answer, ChatCompletion)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason, answer.model) == ("billing", "stop", "tickets")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (job.trained_tokens + 5, 1)
    assert answer.usage.prompt_tokens_details.cached_tokens == job.trained_tokens
    assert list(backend.kept.values()) == [6]


def test_events_of_a_job_are_listed_newest_first(client: OpenAI) -> None:
    job = make_model(client, chat_file(TICKETS), "tickets")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.message for event in events] == [
        "New fine-tuned model created: tickets",
        "6 examples read; 2 labels.",
        "Fine-tuning job started.",
        f"Created fine-tuning job: {job.id}",
    ]
    first = client.fine_tuning.jobs.list_events(job.id, limit=2)
    assert (len(first.data), first.has_more) == (2, True)


def test_jobs_and_files_are_listed_by_pages(client: OpenAI) -> None:
    file_ids = [client.files.create(file=(f"{n}.jsonl", plain_file(CAPITALS)), purpose="fine-tune").id for n in range(3)]
    job_ids = [client.fine_tuning.jobs.create(training_file=file_ids[0], model="base", suffix=f"m{n}").id for n in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == job_ids[::-1]
    assert client.fine_tuning.jobs.list(limit=5).has_more is False
    assert [file.id for file in client.files.list(limit=2)] == file_ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == file_ids
    assert client.files.list(purpose="assistants").data == []


def test_a_file_is_kept_byte_for_byte_and_deleted(client: OpenAI) -> None:
    content = chat_file([("caf\u00e9 \u732b", "x")])
    file = client.files.create(file=("../../etc/p\r\nX: y.jsonl", content), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("p%0D%0AX: y.jsonl", len(content), "fine-tune", "processed")
    assert client.files.content(file.id).read() == content
    assert client.files.retrieve(file.id) == file
    assert client.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError) as raised:
        client.files.retrieve(file.id)
    assert raised.value.body == {
        "message": f"No such file: {file.id}",
        "type": "invalid_request_error",
        "param": "id",
        "code": "not_found",
    }


def test_no_more_than_four_uploads_are_in_memory_at_once(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    add, running, go_on = Owned.add_file, [], threading.Event()

    def wait(owned: Owned, name: str, content: bytes) -> FileRow:
        running.append(content)
        assert go_on.wait(20)
        return add(owned, name, content)

    monkeypatch.setattr(Owned, "add_file", wait)
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(client.files.create, file=("t.jsonl", b"%d" % number), purpose="fine-tune") for number in range(6)]
        try:
            wait_for(lambda: len(running) == 4)
            time.sleep(0.3)
            assert len(running) == 4
        finally:
            go_on.set()
        assert sorted(client.files.content(each.result().id).read() for each in sent) == [b"%d" % number for number in range(6)]


def test_the_plain_model_has_a_key_for_each_tenant(
    client: OpenAI, address: str, keys: dict[str, str], backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, asked = backend.generate, []

    def note(spec: TaskSpec, *arguments: Any, **options: Any) -> Any:
        asked.append(spec.key)
        return generate(spec, *arguments, **options)

    monkeypatch.setattr(backend, "generate", note)
    with OpenAI(base_url=f"{address}/v1", api_key=keys["other"], max_retries=0) as other:
        for each in (client, client, other):
            each.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])
    first, again, others = asked
    assert first == again != others
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in asked)


def test_an_empty_or_long_input_is_named_by_its_field(client: OpenAI) -> None:
    for text in (" ", "x" * 100_001):
        with pytest.raises(openai.BadRequestError) as chat:
            client.chat.completions.create(model="base", messages=[{"role": "user", "content": text}])
        with pytest.raises(openai.BadRequestError) as plain:
            client.completions.create(model="base", prompt=text)
        assert (chat.value.param, plain.value.param) == ("messages", "prompt")


def test_a_stream_that_nobody_takes_ends_with_what_writes_it() -> None:
    sent: list[Any] = []
    ended: list[bool] = []

    async def events() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "data: x\n\n"
        finally:
            ended.append(True)

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()  # As a connection does whose other end does not read.

    async def stream() -> None:
        await asyncio.wait_for(EventStream(events(), end=time.monotonic() + 0.1).stream_response(send), 20)

    asyncio.run(stream())
    assert [message.get("body") for message in sent] == [None, b"data: x\n\n", b"data: x\n\n"]
    assert ended == [True]


def test_a_deleted_model_is_gone_and_forgotten(client: OpenAI, backend: FakeBackend) -> None:
    make_model(client, chat_file(TICKETS), "tickets")
    deleted = client.models.delete("tickets")
    assert (deleted.id, deleted.deleted) == ("tickets", True)
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="tickets", messages=[{"role": "user", "content": "x"}])
    assert raised.value.code == "model_not_found"
    wait_for(lambda: not backend.kept)
    assert make_model(client, chat_file(TICKETS), "tickets").status == "succeeded"


def test_a_name_is_taken_once(client: OpenAI) -> None:
    job = make_model(client, chat_file(TICKETS), "tickets")
    with pytest.raises(openai.ConflictError) as raised:
        client.fine_tuning.jobs.create(training_file=job.training_file, model="base", suffix="tickets")
    assert (raised.value.code, raised.value.param) == ("model_exists", "suffix")
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.create(training_file=job.training_file, model="base", suffix="base")
    unnamed = client.fine_tuning.jobs.create(training_file=job.training_file, model="base")
    done = wait_for(lambda: (found := client.fine_tuning.jobs.retrieve(unnamed.id)).finished_at and found)
    assert done.fine_tuned_model.startswith("task-")


def test_a_bad_line_fails_the_job_and_is_named(client: OpenAI, backend: FakeBackend) -> None:
    lines = chat_file(TICKETS).splitlines(keepends=True)
    lines[3] = b'{"messages": [{"role": "user", "content": "x"}\n'
    job = make_model(client, b"".join(lines), "tickets")
    assert (job.status, job.fine_tuned_model) == ("failed", None)
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert job.error.message == "train.jsonl:4: broken JSON at column 47: Expecting ',' delimiter. Mend or remove the line."
    assert [model.id for model in client.models.list()] == ["base"]
    assert backend.kept == {}
    assert make_model(client, chat_file(TICKETS), "tickets").status == "succeeded"


def test_examples_that_do_not_fit_are_told(client: OpenAI, backend: FakeBackend) -> None:
    backend.context_tokens = 12
    job = make_model(client, plain_file(CAPITALS * 2), "capitals")
    assert job.status == "succeeded"
    event = client.fine_tuning.jobs.list_events(job.id).data[1]
    assert event.level == "warn"
    told = "3 of 6 examples are not in the context: line 1: 4 tokens do not fit in 0; line 2: 4 tokens do not fit in 0; line 6"
    assert event.message.startswith(told)


def test_a_job_is_cancelled(client: OpenAI, backend: FakeBackend) -> None:
    backend.delay = 60
    file = client.files.create(file=("train.jsonl", chat_file(TICKETS)), purpose="fine-tune")
    running = client.fine_tuning.jobs.create(training_file=file.id, model="base", suffix="one")
    queued = client.fine_tuning.jobs.create(training_file=file.id, model="base", suffix="two")
    wait_for(lambda: "prepare" in backend.calls)
    assert client.fine_tuning.jobs.retrieve(running.id).status == "running"
    assert client.fine_tuning.jobs.cancel(queued.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(running.id).status == "cancelled"
    backend.delay = 0
    assert make_model(client, chat_file(TICKETS), "one").status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(running.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.fine_tuning.jobs.cancel(running.id)


def test_a_busy_backend_delays_a_job(client: OpenAI, backend: FakeBackend) -> None:
    backend.failure = overloaded(0.01)
    file = client.files.create(file=("train.jsonl", chat_file(TICKETS)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(training_file=file.id, model="base", suffix="one")
    wait_for(lambda: backend.calls.count("prepare") > 2)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    backend.failure = None
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")


def test_free_text_is_streamed(client: OpenAI) -> None:
    make_model(client, plain_file(CAPITALS), "capitals")
    chunks = list(
        client.chat.completions.create(
            model="capitals",
            messages=[{"role": "user", "content": "the capital of Norway"}],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Oslo"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    first = chunks[0].choices[0].logprobs
    assert first is not None
    assert first.content is not None
    assert [(top.token, top.logprob) for top in first.content[0].top_logprobs] == [("O", -0.5), ("?", -9999.0)]
    assert (chunks[-1].choices, chunks[-1].usage and chunks[-1].usage.completion_tokens) == ([], 4)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 5


def test_a_stream_is_documented_event_by_event(tmp_path: Path, backend: FakeBackend) -> None:
    paths = create_app(Settings(tmp_path / "unused"), backend).openapi()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
        assert set(content["text/event-stream"]) == {"itemSchema"}
        event = content["text/event-stream"]["itemSchema"]
        assert (event["type"], event["required"], list(event["properties"])) == ("object", ["data"], ["data"])
        assert event["properties"]["data"]["type"] == "string"


def test_plain_completions_take_the_same_options(client: OpenAI) -> None:
    make_model(client, plain_file(CAPITALS), "capitals")
    cut = client.completions.create(model="capitals", prompt="capital of France", max_tokens=3, logprobs=1)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("Par", "length")
    assert cut.choices[0].logprobs is not None
    assert (cut.choices[0].logprobs.tokens, cut.choices[0].logprobs.text_offset) == (["P", "a", "r"], [0, 1, 2])
    stopped = client.completions.create(model="capitals", prompt=["capital of France"], stop=["i", "z"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("Par", "stop")
    warm = client.completions.create(model="capitals", prompt="capital of Peru", temperature=0.5, seed=-3)
    assert warm.choices[0].text == f"Lima at 0.5 by {2**63 - 3}"
    # As OpenAI's own service does, chunks have no reason to be finished until they have one; the types of 3.54 forgot it.
    with OpenAI(base_url=client.base_url, api_key=client.api_key) as lenient:
        stream = lenient.completions.create(model="base", prompt="hi", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "echo: hi"


def test_max_completion_tokens_comes_before_max_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hello"}], max_tokens=9, max_completion_tokens=4
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("echo", "length")


def test_a_system_message_is_the_one_of_the_examples(client: OpenAI) -> None:
    make_model(client, chat_file(TICKETS, system="Route it."), "tickets")
    user = {"role": "user", "content": "the update"}
    same = client.chat.completions.create(model="tickets", messages=[{"role": "system", "content": "Route it. "}, user])  # type: ignore[list-item]
    assert same.choices[0].message.content == "bug"
    with pytest.raises(openai.BadRequestError, match="made with another system message"):
        client.chat.completions.create(model="tickets", messages=[{"role": "developer", "content": "Be rude."}, user])  # type: ignore[list-item]
    base = client.chat.completions.create(model="base", messages=[{"role": "system", "content": "S"}, user])  # type: ignore[list-item]
    assert base.choices[0].message.content == "echo: S\nthe update"


def test_a_label_is_drawn_by_temperature_and_seed(client: OpenAI) -> None:
    make_model(client, chat_file(TICKETS), "tickets")

    def ask(**options: float) -> str | None:
        message = {"role": "user", "content": "nothing shared"}
        return client.chat.completions.create(model="tickets", messages=[message], **options).choices[0].message.content  # type: ignore[call-overload]

    assert {ask() for _ in range(5)} == {"billing"}
    drawn = [ask(temperature=1, seed=seed) for seed in range(20)]
    assert set(drawn) == {"billing", "bug"}
    assert [ask(temperature=1, seed=seed) for seed in range(20)] == drawn


def test_labels_have_log_probabilities(client: OpenAI) -> None:
    make_model(client, chat_file(TICKETS), "tickets")
    answer = client.chat.completions.create(
        model="tickets", messages=[{"role": "user", "content": "invoice"}], logprobs=True, top_logprobs=5
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    token = answer.choices[0].logprobs.content[0]
    assert (token.token, [top.token for top in token.top_logprobs]) == ("billing", ["billing", "bug"])
    assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"top_p": 0.9}, "top_p"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(client: OpenAI, options: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}], **options)  # type: ignore[call-overload]
    assert (raised.value.param or "").startswith(param)
    assert raised.value.type == "invalid_request_error"


def test_neutral_options_are_taken(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}],
        n=1,
        top_p=1,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        tool_choice="none",
        response_format={"type": "text"},
        user="someone",
        stop=None,
    )
    assert answer.choices[0].message.content == "echo: hello"


def test_overload_and_deadlines_have_their_own_status(client: OpenAI, backend: FakeBackend) -> None:
    make_model(client, chat_file(TICKETS), "tickets")
    question = {"model": "tickets", "messages": [{"role": "user", "content": "x"}]}
    backend.failure = overloaded(2.2)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**question)  # type: ignore[call-overload]
    assert (raised.value.response.headers["retry-after"], raised.value.code) == ("3", "overloaded")
    backend.failure, backend.delay = None, 0.05
    with pytest.raises(openai.APIStatusError) as late:
        client.chat.completions.create(**question, extra_headers={"X-Timeout-Seconds": "0.01"})  # type: ignore[call-overload]
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    assert late.value.response.headers["x-should-retry"] == "false"  # Or the client asks twice more, as long each time.
    assert "x-should-retry" not in raised.value.response.headers


def test_an_error_before_the_first_piece_of_a_stream_has_its_status(client: OpenAI, backend: FakeBackend) -> None:
    backend.failure = overloaded(1)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}], stream=True)


def test_a_client_that_leaves_costs_nothing(client: OpenAI, backend: FakeBackend) -> None:
    backend.delay = 0.02
    text = "word " * 200
    stream = client.chat.completions.create(model="base", messages=[{"role": "user", "content": text}], stream=True)
    next(iter(stream))
    stream.close()
    time.sleep(0.3)
    written = backend.num_pieces
    time.sleep(0.3)
    assert backend.num_pieces == written < 50
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": text}], timeout=0.2)
    time.sleep(0.3)
    written = backend.num_pieces
    time.sleep(0.3)
    assert backend.num_pieces == written


def test_another_tenant_sees_nothing(client: OpenAI, address: str, keys: dict[str, str]) -> None:
    job = make_model(client, chat_file(TICKETS), "tickets")
    with OpenAI(base_url=f"{address}/v1", api_key=keys["other"], max_retries=0) as other:
        assert [model.id for model in other.models.list()] == ["base"]
        assert (other.files.list().data, other.fine_tuning.jobs.list().data) == ([], [])
        for call in (
            lambda: other.files.retrieve(job.training_file),
            lambda: other.fine_tuning.jobs.retrieve(job.id),
            lambda: other.models.delete("tickets"),
            lambda: other.fine_tuning.jobs.create(training_file=job.training_file, model="base"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert make_model(other, plain_file(CAPITALS), "tickets").status == "succeeded"
    with OpenAI(base_url=f"{address}/v1", api_key="mi-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as raised:
            stranger.models.list()
        assert raised.value.code == "invalid_api_key"
