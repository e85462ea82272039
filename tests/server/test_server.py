"""The routes, as any client meets them: formats, options, the queue, and shutdown."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from magistral_mlx import Magistral, Reply, Sampling
from tests.decoder.test_batch import RecordingModel
from tests.scripted import scripted
from tests.serving import ASK, HUB_ID, QUESTION, Answer, Running, until

CHAT, RAW = "/v1/chat/completions", "/raw/v1/chat/completions"


def raw_text(reply: Reply) -> str:
    return f"<think>\n{reply.thinking}\n</think>\n\n{reply.answer}"


def test_models(served: Running):
    listed = served.get("/v1/models").json
    assert [model["id"] for model in listed["data"]] == [HUB_ID, "demo"]
    assert served.get(f"/v1/models/{HUB_ID}").json == listed["data"][0]
    assert served.get("/v1/models/other").error["code"] == "model_not_found"


def test_a_chat_gives_what_the_library_gives(served: Running, reply: Reply):
    body = served.post(CHAT, ASK).json
    [choice] = body["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == (reply.answer, "stop")
    assert message["reasoning_content"] == message["reasoning"] == reply.thinking
    used = body["usage"]
    assert used["prompt_tokens"] == reply.stats.prompt_tokens
    assert used["completion_tokens"] == len(reply.token_ids)
    assert used["completion_tokens_details"]["reasoning_tokens"] == reply.stats.thinking_tokens
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


def test_a_stream_is_the_same_in_pieces(served: Running, reply: Reply):
    first, *pieces, end, counted = served.post(
        CHAT, ASK | {"stream": True, "stream_options": {"include_usage": True}}
    ).events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert "".join(delta.get("content", "") for delta in deltas) == reply.answer
    for field in ("reasoning_content", "reasoning"):
        assert "".join(delta.get(field, "") for delta in deltas) == reply.thinking
    assert end["choices"][0]["finish_reason"] == "stop"
    assert counted["choices"] == []
    assert counted["usage"]["completion_tokens"] == len(reply.token_ids)
    assert len({piece["id"] for piece in (first, *pieces, end, counted)}) == 1


def test_no_usage_unless_asked_for(served: Running):
    assert all(piece["choices"] for piece in served.post(CHAT, ASK | {"stream": True}).events)


def test_raw_has_the_tags_in_the_text(served: Running, reply: Reply):
    message = served.post(RAW, ASK).json["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (raw_text(reply), None)
    deltas = [piece["choices"][0]["delta"] for piece in served.post(RAW, ASK | {"stream": True}).events]
    assert "".join(delta.get("content", "") for delta in deltas) == raw_text(reply)


def test_several_choices_have_seeds_of_their_own(served: Running):
    answers = [served.service.model.ask(QUESTION, seed=seed).answer for seed in (1, 2)]
    choices = served.post(CHAT, ASK | {"n": 2}).json["choices"]
    assert [choice["message"]["content"] for choice in choices] == answers
    assert [choice["index"] for choice in choices] == [0, 1]
    pieces = [piece["choices"][0] for piece in served.post(CHAT, ASK | {"n": 2, "stream": True}).events]
    for index, answer in enumerate(answers):
        own = [piece["delta"] for piece in pieces if piece["index"] == index]
        assert own[0]["role"] == "assistant"
        assert "".join(delta.get("content", "") for delta in own) == answer


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"temperature": 0.3, "top_k": 3}, {"sampling": Sampling(temperature=0.3, top_k=3)}),
        ({"max_completion_tokens": 20, "max_tokens": 30}, {"max_tokens": 20}),
        ({"stop": " 4"}, {"stop": " 4"}),
        ({"think_budget": 3}, {"think_budget": 3}),
        ({"reasoning_effort": "none"}, {"think": False}),
    ],
    ids=str,
)
def test_options_mean_what_the_librarys_mean(served: Running, asked: dict[str, Any], options: Any):
    reply = served.service.model.ask(QUESTION, seed=1, **options)
    body = served.post(CHAT, ASK | asked).json
    [choice] = body["choices"]
    assert choice["message"]["content"] == reply.answer
    assert (choice["message"]["reasoning"] or "") == reply.thinking
    assert choice["finish_reason"] == reply.finish_reason
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == reply.stats.thinking_tokens


def test_completions_go_on_with_the_text_as_it_stands(served: Running, reply: Reply):
    tokenizer = served.service.model.tokenizer
    chat = served.service.model.encode(QUESTION)
    body = served.post("/v1/completions", {"prompt": chat, "seed": 1, "max_tokens": 200}).json
    assert body["choices"][0]["text"] == tokenizer.decode(reply.token_ids)
    cut = served.post("/v1/completions", {"prompt": chat, "seed": 1, "max_tokens": 200, "stop": "3+4"}).json
    text, _, _ = tokenizer.decode(reply.token_ids).partition("3+4")
    assert cut["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": "stop",
    }
    streamed = served.post("/v1/completions", {"prompt": chat, "seed": 1, "max_tokens": 200, "stream": True})
    assert "".join(p["choices"][0]["text"] for p in streamed.events) == tokenizer.decode(reply.token_ids)


@pytest.mark.parametrize("as_ids", [False, True])
def test_completions_with_an_echo(served: Running, as_ids: bool):
    tokenizer, texts = served.service.model.tokenizer, ["48 + 37 =", "12 + 5 ="]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts] if as_ids else texts
    asked = {"prompt": prompts, "seed": 3, "max_tokens": 4, "n": 2}
    plain = [choice["text"] for choice in served.post("/v1/completions", asked).json["choices"]]
    assert all(plain)
    echoed = [texts[at // 2] + said for at, said in enumerate(plain)]
    body = served.post("/v1/completions", asked | {"echo": True}).json
    assert [choice["text"] for choice in body["choices"]] == echoed
    told = [""] * 4
    for piece in served.post("/v1/completions", asked | {"echo": True, "stream": True}).events:
        told[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert told == echoed


def test_completions_with_logprobs(served: Running):
    """Parallel lists, aligned with the text; cut where a stop string cuts it."""
    asked = {
        "prompt": "48 + 37 é€😀 =",
        "seed": 3,
        "max_tokens": 40,
        "temperature": 50,
        "top_p": 1,
        "logprobs": 2,
    }
    [choice] = served.post("/v1/completions", asked).json["choices"]
    table, text = choice["logprobs"], choice["text"]
    assert len({len(column) for column in table.values()}) == 1
    assert len(table["tokens"]) > 10
    for token, at in zip(table["tokens"], table["text_offset"], strict=True):
        assert "\ufffd" in token or text.startswith(token, at)
    for logprob, top in zip(table["token_logprobs"], table["top_logprobs"], strict=True):
        assert logprob <= max(top.values()) <= 0
        assert len(top) == 2 or "\ufffd" in top
    pieces = [
        piece["choices"][0] for piece in served.post("/v1/completions", asked | {"stream": True}).events
    ]
    for column, values in table.items():
        assert [one for p in pieces if p["logprobs"] for one in p["logprobs"][column]] == values
    cut = served.post("/v1/completions", asked | {"stop": text[4:7]}).json["choices"][0]
    assert cut["text"] == text[: text.index(text[4:7])]
    kept = [at for at in table["text_offset"] if at < len(cut["text"])]
    assert cut["logprobs"]["text_offset"] == kept
    bare = served.post("/v1/completions", asked | {"logprobs": 0}).json["choices"][0]["logprobs"]
    assert bare["token_logprobs"] == table["token_logprobs"]
    assert not any(bare["top_logprobs"])


@pytest.mark.parametrize("asked", [{"suffix": "."}, {"echo": True, "logprobs": 0}, {"best_of": 2}], ids=str)
def test_completions_that_are_not_done(served: Running, asked: dict[str, Any]):
    refused(served.post("/v1/completions", {"prompt": "x"} | asked), "unsupported")


def test_completions_of_several_prompts(served: Running):
    body = served.post("/v1/completions", {"prompt": ["48 + 37 =", "12 + 5 ="], "seed": 3, "n": 2}).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] <= 4 * 16  # the API's default
    assert body["usage"]["prompt_tokens"] == sum(
        served.post("/v1/tokenize", {"prompt": text}).json["count"] for text in ("48 + 37 =", "12 + 5 =")
    )


def test_tokenize_there_and_back(served: Running):
    model = served.service.model
    told = served.post("/v1/tokenize", {"prompt": "48 × 37"}).json
    assert told["tokens"] == [model.tokenizer.bos_id, *model.tokenizer.encode("48 × 37")]
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 4096)
    assert served.post("/v1/detokenize", {"tokens": told["tokens"]}).json == {"prompt": "48 × 37"}
    chat = served.post("/v1/tokenize", {"messages": ASK["messages"]}).json
    assert chat["tokens"] == model.encode(QUESTION)
    assert served.post("/v1/tokenize", {}).status == 400


def test_a_second_prompt_with_the_same_beginning_is_not_read_again(served: Running):
    long = "Remember: " + " ".join(f"{n}," for n in range(100, 160))
    talk = [{"role": "user", "content": long}]
    first = served.post(CHAT, {"messages": talk, "max_tokens": 5}).json["usage"]
    served.idle_memory()  # the prefix is stored only after the answer was sent
    again = served.post(CHAT, {"messages": talk, "max_tokens": 5}).json["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] < first["prompt_tokens"] / 2
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1


def test_health_and_metrics(served: Running):
    served.post(CHAT, ASK)
    assert served.get("/health").json == {"status": "ok"}
    told = served.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in told.body.decode().splitlines() if line[0] != "#")
    assert float(lines['magistral_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(lines['magistral_tokens_total{kind="thinking"}']) > 0
    assert lines["magistral_running"] == "0.0"
    assert float(lines["magistral_prefix_cache_bytes"]) == served.service.prefixes.nbytes > 0


@pytest.fixture(scope="module")
def narrow(served: Running) -> Iterator[Running]:
    """The same model with one slot, and a queue of one."""
    with Running(served.service.model, running=1, waiting=1) as running:
        yield running


ENDLESS = ASK | {"stream": True, "temperature": 50, "top_p": 1}


def begin(server: Running, body: object = ENDLESS) -> socket.socket:
    """Send a request; read nothing of the response yet."""
    line = server.socket()
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return line


def test_a_full_queue_says_when_to_come_back(narrow: Running, monkeypatch: pytest.MonkeyPatch):
    slots = narrow.service.slots
    with begin(narrow):
        until(lambda: slots.running == 1)
        with begin(narrow):
            until(lambda: slots.waiting == 1)
            with monkeypatch.context() as patch:
                patch.setattr(narrow.service.model, "encode", lambda *_, **__: 1 / 0)  # must not be called
                refused = narrow.post(CHAT, ASK)
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
    until(lambda: narrow.idle)
    assert narrow.post(CHAT, ASK).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(narrow: Running, stream: bool):
    said: list[Reply] = []
    replied = narrow.service.metrics.replied
    narrow.service.metrics.replied = said.append  # type: ignore[method-assign]
    try:
        with begin(narrow, ENDLESS | {"stream": stream}) as line:
            until(lambda: any(s.is_open and s.reply.token_ids for s in list(narrow.service._streams)))
            line.shutdown(socket.SHUT_RDWR)
        until(lambda: narrow.idle)
    finally:
        narrow.service.metrics.replied = replied  # type: ignore[method-assign]
    assert [reply.finish_reason for reply in said] == ["cancelled"]
    assert len(said[0].token_ids) < 4000


def test_one_who_waits_may_leave(narrow: Running):
    slots = narrow.service.slots
    with begin(narrow):
        until(lambda: slots.running == 1)
        with begin(narrow):
            until(lambda: slots.waiting == 1)
        until(lambda: slots.waiting == 0)
        assert slots.running == 1
    until(lambda: narrow.idle)


def test_requests_are_decoded_together(served: Running, monkeypatch: pytest.MonkeyPatch):
    """Those of two clients, and the choices of one request, whose prompt is read once."""
    model = RecordingModel(served.service.model._model)
    monkeypatch.setattr(served.service.model, "_model", model)
    with begin(served) as long:
        long.recv(1)
        served.post(CHAT, ASK)
        assert max(B for B, L in model.shapes if L == 1) == 2
    until(lambda: served.idle)
    model.shapes.clear()
    served.post(CHAT, ASK | {"n": 3, "messages": [{"role": "user", "content": "How much is 3 + 6?"}]})
    assert max(B for B, L in model.shapes if L == 1) == 3
    assert sum(L > 1 for _, L in model.shapes) == 1


def test_more_choices_than_rows_come_one_after_another(narrow: Running, monkeypatch: pytest.MonkeyPatch):
    model = RecordingModel(narrow.service.model._model)
    monkeypatch.setattr(narrow.service.model, "_model", model)
    assert len(narrow.post(CHAT, ASK | {"n": 3, "max_tokens": 5}).json["choices"]) == 3
    assert {B for B, _ in model.shapes} == {1}


def test_a_short_request_does_not_wait_for_a_long_one(served: Running):
    """A short reply that starts later ends before a long one that started first."""
    with begin(served) as long:
        long.recv(1)
        assert served.post(CHAT, ASK).json["choices"][0]["finish_reason"] == "stop"
        assert served.service.slots.running == 1
    until(lambda: served.idle)


def test_the_end_is_graceful():
    with Magistral.load("demo") as model:
        server = Running(model, running=1)
        with begin(server) as running, ExitStack() as later:
            running.recv(1)
            waiting = later.enter_context(begin(server, ASK))
            until(lambda: server.service.slots.waiting == 1)
            ended = threading.Thread(target=server.end)
            ended.start()
            rest = b"".join(iter(lambda: running.recv(65536), b""))
            assert b'"shutting_down"' in rest
            assert b" 503 " in waiting.recv(100)
            ended.join(20)
            assert not ended.is_alive()
        assert server.idle
        assert model.ask(QUESTION, seed=1).answer  # the model outlives its server


def refused(answer: Answer, code: str) -> None:
    assert (answer.status, answer.error["code"]) == (400, code)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_value"),
        (b"{", "invalid_json"),
        (b'{"messages": [', "invalid_json"),
        ({}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({"messages": "hello"}, "invalid_value"),
        ({"messages": [{"role": "user"}]}, "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_value"),
        (ASK | {"max_tokens": 0}, "invalid_value"),
        (ASK | {"max_tokens": "many"}, "invalid_value"),
        (ASK | {"n": 1000}, "invalid_value"),
        (ASK | {"temperature": float("nan")}, "invalid_value"),
        (ASK | {"temperature": -1}, "invalid_value"),
        (ASK | {"seed": 2**80}, "invalid_value"),
        (ASK | {"messages": [{"role": "user", "content": " " * 10**6}]}, "invalid_value"),
        (ASK | {"stop": [""]}, "invalid_value"),
        (ASK | {"frequency_penalty": 1.0}, "unsupported"),
        (ASK | {"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported",
        ),
        ({"messages": [{"role": "user", "content": "9 " * 9000}]}, "context_length_exceeded"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_the_shape_that_clients_know(served: Running, body: object, code: str):
    refused(served.post(CHAT, body), code)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []},
        {"prompt": [1, -1]},
        {"prompt": [10**9]},
        {"prompt": [[]]},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "stop": [""], "stream": True},
        {"prompt": "x", "stop": 2000 * "x"},
    ],
    ids=lambda body: str(body)[:40],
)
def test_mistakes_in_completions(served: Running, body: object):
    refused(served.post("/v1/completions", body), served.post("/v1/completions", body).error["code"])


def test_mistakes_are_not_quoted_at_length(served: Running):
    book = 100_000 * "x"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for path, asked in (
        (CHAT, ASK | {"tools": tools, "tool_choice": book}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": book}]}]}),
    ):
        answer = served.post(path, asked)
        assert (answer.status, len(answer.body) < 2000) == (400, True)


def test_a_body_without_its_type_is_told_of_it(served: Running):
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's default
    told = served.call("POST", CHAT, json.dumps(ASK).encode(), form)
    assert told.status == 400
    assert "Content-Type: application/json" in told.error["message"]


def test_what_is_not_there(served: Running):
    assert served.get("/v1/nothing").error["type"] == "not_found_error"
    assert served.get(CHAT).status == 405
    assert served.get(CHAT).error


def test_reasoning_is_ended_by_its_id(tiny_tokenizer):
    """The scripted model continues its text: from then on, as its answer."""
    said = "<think>\n" + "On and on.\n" * 100 + "</think>\nDone."
    with scripted(tiny_tokenizer("v11"), said, step_seconds=0.002) as model, Running(model) as server:
        with begin(server, ASK | {"stream": True, "max_tokens": 400}) as line:
            received = b""
            while received.count(b"reasoning_content") < 3:
                received += line.recv(4096)
            [id_] = set(re.findall(rb'"id": "(chatcmpl-\w+)"', received))
            path = f"{CHAT}/{id_.decode()}/stop_thinking"
            assert (server.post(path, {}).status, server.post(f"{RAW}/none/stop_thinking", {}).status) == (
                204,
                404,
            )
            while b"[DONE]" not in received:
                received += line.recv(4096)
        assert received.count(b"reasoning_content") < 200 < received.count(b'"delta": {"content"')
        assert server.post(path, {}).error["code"] == "not_running"
