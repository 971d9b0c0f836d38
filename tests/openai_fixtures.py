"""A server with OpenAI's completions, as small as can be, around a loaded model; and a backend in front of it."""

import asyncio
import json
import threading
import time

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from manyicl.encoding import Encoder
from manyicl.serving.backends import BackendLimits, TaskSpec
from manyicl.serving.openai_backend import OpenAIBackend
from manyicl.tasks.task import Example

KIND = {
    "vllm": {"ids", "chosen", "echo", "usage"},
    "shared": {"ids", "echo", "usage"},
    "echo": {"ids", "echo"},
    "bare": {"ids"},
    "text": set(),
}
LABELS = ("odd", "even", "neither of them", "e")
SPEC = TaskSpec("a" * 32, tuple(Example(f"number {number}", LABELS[number % 2]) for number in range(6)), LABELS)


class FakeServer:
    """OpenAI's completions on whole prompts, by plain forward passes.

    Attributes:
        kind: What it can do, see `KIND`.
        requests: The body of each request.
        fail: A status to answer with instead, or None.
        break_off: End a stream after its first chunk.
        tokens_at_once: Tokens whose text one chunk of a stream holds.
    """

    def __init__(self, loaded, kind):
        self.loaded, self.can, self.requests, self.fail = loaded, KIND[kind], [], None
        self.break_off, self.tokens_at_once = False, 1
        self.hold = threading.Event()
        self.hold.set()
        self.num_left = 0
        self.seen = set()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.completions)

    async def models(self, request: Request):
        if request.headers.get("authorization") != "Bearer secret":
            return JSONResponse({"error": {"message": "no key"}}, status_code=401)
        sizes = {"max_model_len": 400} if "usage" in self.can else {}
        return {"data": [{"id": "tiny"} | sizes, {"id": "other"}]}

    async def completions(self, request: Request):
        body = await request.json()
        self.requests.append(body)
        if self.fail:
            return JSONResponse({"error": {"message": "secret text"}}, status_code=self.fail, headers={"Retry-After": "7"})
        unknown = {"logprob_token_ids", "return_tokens_as_token_ids", "cache_salt", "stop_token_ids"} & body.keys()
        given = body["prompt"]
        if (unknown and "chosen" not in self.can) or (body.get("echo") and "echo" not in self.can):
            return JSONResponse({"error": {"message": "unknown"}}, status_code=400)
        if isinstance(given, str):
            prompts = [self.loaded.tokenizer(given, add_special_tokens=False)["input_ids"]]
        elif "ids" not in self.can:
            return JSONResponse({"error": {"message": "text only"}}, status_code=422)
        else:
            prompts = given if isinstance(given[0], list) else [given]
        while not self.hold.is_set():
            if await request.is_disconnected():
                self.num_left += 1
                return JSONResponse({})
            await asyncio.sleep(0.01)
        if body.get("stream"):
            return StreamingResponse(self.stream(body, prompts[0]), media_type="text/event-stream")
        choices = [self.complete(body, prompt, place) for place, prompt in enumerate(prompts)]
        return {"choices": choices[::-1], "usage": self.usage(body, prompts, 1)}

    def usage(self, body, prompts, num_tokens):
        told = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": num_tokens}
        if "usage" in self.can:
            cached = [self.cached(body.get("cache_salt"), prompt) for prompt in prompts]
            told["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
        return told

    def cached(self, salt, prompt):
        """Tokens in whole blocks of ten that a prompt with the same salt began with before."""
        fronts = [(salt, tuple(prompt[:stop])) for stop in range(10, len(prompt) + 1, 10)]
        known = [len(front[1]) for front in fronts if front in self.seen]
        self.seen.update(fronts)
        return max(known, default=0)

    @torch.inference_mode()
    def values(self, prompt):
        return self.loaded.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)

    def name(self, body, token):
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.loaded.tokenizer.decode([token])

    def complete(self, body, prompt, place):
        values = self.values(prompt)
        wanted = body.get("logprob_token_ids")
        best = wanted or values[-1].topk(1).indices.tolist()
        told = {
            "tokens": [],
            "token_logprobs": [float(values[-1].max())],
            "top_logprobs": [{self.name(body, token): float(values[-1][token]) for token in best}],
        }
        if body.get("echo"):
            before = [None, *(float(values[at, token]) for at, token in enumerate(prompt[1:]))]
            told["token_logprobs"] = before + told["token_logprobs"]
        return {"index": place, "text": "x", "logprobs": told, "finish_reason": "length"}

    async def stream(self, body, prompt):
        def chunk(**fields):
            return f"data: {json.dumps(fields)}\n\n"

        ids, end = list(prompt), 256
        sent = waiting = ""
        yield ": a comment, as servers send them to keep a connection\n\n"
        for number in range(body["max_tokens"]):
            values = self.values(ids)[-1]
            token = int(values.argmax())
            ids.append(token)
            text = self.loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            new = "" if text.endswith("\ufffd") else text[len(sent) :]
            sent += new
            new, waiting = waiting + new, ""
            if number % self.tokens_at_once and number + 1 < body["max_tokens"]:
                new, waiting = "", new
            choice = {"index": 0, "text": new, "finish_reason": None}
            if body.get("logprobs") is not None:
                best = values.topk(body["logprobs"] + 1).indices.tolist()
                choice["logprobs"] = {
                    "tokens": [self.name(body, token)],
                    "token_logprobs": [float(values[token])],
                    "top_logprobs": [{self.name(body, each): float(values[each]) for each in best}],
                }
            if token == end or number + 1 == body["max_tokens"]:
                choice["finish_reason"] = "stop" if token == end else "length"
            try:
                yield chunk(choices=[choice])
                await asyncio.sleep(0)
            except (asyncio.CancelledError, GeneratorExit):
                self.num_left += 1
                raise
            if self.break_off:
                return
            if choice["finish_reason"]:
                break
        yield chunk(choices=[], usage=self.usage(body, [prompt], len(ids) - len(prompt)))
        yield "data: [DONE]\n\n"


def run_openai_backend(loaded, kind, scenario, *, key="secret", context_tokens=400, model="tiny", **limits):
    """What a coroutine function returns that is given a started backend and the fake server of that kind behind it."""
    fake = FakeServer(loaded, kind)
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]

        async def whole():
            backend = OpenAIBackend(
                f"http://127.0.0.1:{port}/v1/",
                model,
                lambda: Encoder(loaded.tokenizer),
                context_tokens=context_tokens,
                api_key=key,
                limits=BackendLimits(**limits),
            )
            try:
                await backend.start()
                fake.requests.clear()
                return await asyncio.wait_for(scenario(backend, fake), 60)
            finally:
                fake.hold.set()
                await asyncio.wait_for(backend.stop(), 20)

        return asyncio.run(whole())
    finally:
        fake.hold.set()
        server.should_exit = True
        thread.join()
