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


def test_models_are_listed_and_found_by_id(served: Running):
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
    usage = body["usage"]
    assert usage["prompt_tokens"] == reply.stats.prompt_tokens
    assert usage["completion_tokens"] == len(reply.token_ids)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == reply.stats.thinking_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_adds_up_to_the_whole_reply(served: Running, reply: Reply):
    first, *pieces, end, usage = served.post(
        CHAT, ASK | {"stream": True, "stream_options": {"include_usage": True}}
    ).events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert "".join(delta.get("content", "") for delta in deltas) == reply.answer
    for field in ("reasoning_content", "reasoning"):
        assert "".join(delta.get(field, "") for delta in deltas) == reply.thinking
    assert end["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(reply.token_ids)
    assert len({piece["id"] for piece in (first, *pieces, end, usage)}) == 1


def test_a_stream_has_no_usage_unless_requested(served: Running):
    assert all(piece["choices"] for piece in served.post(CHAT, ASK | {"stream": True}).events)


def test_raw_has_the_tags_in_the_text(served: Running, reply: Reply):
    message = served.post(RAW, ASK).json["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (raw_text(reply), None)
    deltas = [piece["choices"][0]["delta"] for piece in served.post(RAW, ASK | {"stream": True}).events]
    assert "".join(delta.get("content", "") for delta in deltas) == raw_text(reply)


def test_each_choice_has_its_own_seed(served: Running):
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
    ("fields", "options"),
    [
        ({"temperature": 0.3, "top_k": 3}, {"sampling": Sampling(temperature=0.3, top_k=3)}),
        ({"max_completion_tokens": 20, "max_tokens": 30}, {"max_tokens": 20}),
        ({"stop": " 4"}, {"stop": " 4"}),
        ({"think_budget": 3}, {"think_budget": 3}),
        ({"reasoning_effort": "none"}, {"think": False}),
    ],
    ids=str,
)
def test_options_have_the_same_effect_as_the_librarys(served: Running, fields: dict[str, Any], options: Any):
    reply = served.service.model.ask(QUESTION, seed=1, **options)
    body = served.post(CHAT, ASK | fields).json
    [choice] = body["choices"]
    assert choice["message"]["content"] == reply.answer
    assert (choice["message"]["reasoning"] or "") == reply.thinking
    assert choice["finish_reason"] == reply.finish_reason
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == reply.stats.thinking_tokens


def test_completions_continue_the_prompt_verbatim(served: Running, reply: Reply):
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
def test_completions_can_echo_the_prompt(served: Running, as_ids: bool):
    tokenizer, texts = served.service.model.tokenizer, ["48 + 37 =", "12 + 5 ="]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts] if as_ids else texts
    request = {"prompt": prompts, "seed": 3, "max_tokens": 4, "n": 2}
    plain = [choice["text"] for choice in served.post("/v1/completions", request).json["choices"]]
    assert all(plain)
    echoed = [texts[at // 2] + generated for at, generated in enumerate(plain)]
    body = served.post("/v1/completions", request | {"echo": True}).json
    assert [choice["text"] for choice in body["choices"]] == echoed
    streamed = [""] * 4
    for piece in served.post("/v1/completions", request | {"echo": True, "stream": True}).events:
        streamed[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert streamed == echoed


def test_completions_logprobs_are_aligned_with_the_text(served: Running):
    """Parallel lists, aligned with the text; cut where a stop string cuts it."""
    request = {
        "prompt": "48 + 37 é€😀 =",
        "seed": 3,
        "max_tokens": 40,
        "temperature": 50,
        "top_p": 1,
        "logprobs": 2,
    }
    [choice] = served.post("/v1/completions", request).json["choices"]
    table, text = choice["logprobs"], choice["text"]
    assert len({len(column) for column in table.values()}) == 1
    assert len(table["tokens"]) > 10
    for token, at in zip(table["tokens"], table["text_offset"], strict=True):
        assert "\ufffd" in token or text.startswith(token, at)
    for logprob, top in zip(table["token_logprobs"], table["top_logprobs"], strict=True):
        assert logprob <= max(top.values()) <= 0
        assert len(top) == 2 or "\ufffd" in top
    pieces = [
        piece["choices"][0] for piece in served.post("/v1/completions", request | {"stream": True}).events
    ]
    for column, values in table.items():
        assert [value for p in pieces if p["logprobs"] for value in p["logprobs"][column]] == values
    cut = served.post("/v1/completions", request | {"stop": text[4:7]}).json["choices"][0]
    assert cut["text"] == text[: text.index(text[4:7])]
    kept = [at for at in table["text_offset"] if at < len(cut["text"])]
    assert cut["logprobs"]["text_offset"] == kept
    bare = served.post("/v1/completions", request | {"logprobs": 0}).json["choices"][0]["logprobs"]
    assert bare["token_logprobs"] == table["token_logprobs"]
    assert not any(bare["top_logprobs"])


@pytest.mark.parametrize("fields", [{"suffix": "."}, {"echo": True, "logprobs": 0}, {"best_of": 2}], ids=str)
def test_unsupported_completions_are_refused(served: Running, fields: dict[str, Any]):
    assert_refused(served.post("/v1/completions", {"prompt": "x"} | fields), "unsupported")


def test_completions_of_several_prompts_are_in_their_order(served: Running):
    body = served.post("/v1/completions", {"prompt": ["48 + 37 =", "12 + 5 ="], "seed": 3, "n": 2}).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] <= 4 * 16  # the API's default
    assert body["usage"]["prompt_tokens"] == sum(
        served.post("/v1/tokenize", {"prompt": text}).json["count"] for text in ("48 + 37 =", "12 + 5 =")
    )


def test_tokenize_and_detokenize_are_inverse(served: Running):
    model = served.service.model
    tokenized = served.post("/v1/tokenize", {"prompt": "48 × 37"}).json
    assert tokenized["tokens"] == [model.tokenizer.bos_id, *model.tokenizer.encode("48 × 37")]
    assert (tokenized["count"], tokenized["max_model_len"]) == (len(tokenized["tokens"]), 4096)
    assert served.post("/v1/detokenize", {"tokens": tokenized["tokens"]}).json == {"prompt": "48 × 37"}
    chat = served.post("/v1/tokenize", {"messages": ASK["messages"]}).json
    assert chat["tokens"] == model.encode(QUESTION)
    assert served.post("/v1/tokenize", {}).status == 400


def test_a_repeated_prompt_is_found_in_the_prefix_cache(served: Running):
    long = "Remember: " + " ".join(f"{n}," for n in range(100, 160))
    messages = [{"role": "user", "content": long}]
    first = served.post(CHAT, {"messages": messages, "max_tokens": 5}).json["usage"]
    served.idle_memory()  # the prefix is stored only after the answer was sent
    again = served.post(CHAT, {"messages": messages, "max_tokens": 5}).json["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] < first["prompt_tokens"] / 2
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1


def test_health_and_metrics_report_the_servers_state(served: Running):
    served.post(CHAT, ASK)
    assert served.get("/health").json == {"status": "ok"}
    response = served.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.body.decode().splitlines() if line[0] != "#")
    assert float(lines['magistral_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(lines['magistral_tokens_total{kind="thinking"}']) > 0
    assert lines["magistral_running"] == "0.0"
    assert float(lines["magistral_prefix_cache_bytes"]) == served.service.prefixes.nbytes > 0


@pytest.fixture(scope="module")
def one_slot_server(served: Running) -> Iterator[Running]:
    """The same model with one slot and a queue for one request."""
    with Running(served.service.model, running=1, waiting=1) as running:
        yield running


ENDLESS_REQUEST = ASK | {"stream": True, "temperature": 50, "top_p": 1}


def send_request(server: Running, body: object = ENDLESS_REQUEST) -> socket.socket:
    """Send a request; read nothing of the response yet."""
    connection = server.socket()
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_full_queue_refuses_with_a_retry_time(one_slot_server: Running, monkeypatch: pytest.MonkeyPatch):
    slots = one_slot_server.service.slots
    with send_request(one_slot_server):
        until(lambda: slots.running == 1)
        with send_request(one_slot_server):
            until(lambda: slots.waiting == 1)
            with monkeypatch.context() as patch:
                patch.setattr(
                    one_slot_server.service.model, "encode", lambda *_, **__: 1 / 0
                )  # must not be called
                response = one_slot_server.post(CHAT, ASK)
            assert (response.status, response.error["code"]) == (429, "queue_full")
            assert int(response.headers["retry-after"]) >= 1
    until(lambda: one_slot_server.idle)
    assert one_slot_server.post(CHAT, ASK).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels_the_generation(one_slot_server: Running, stream: bool):
    replies: list[Reply] = []
    replied = one_slot_server.service.metrics.replied
    one_slot_server.service.metrics.replied = replies.append  # type: ignore[method-assign]
    try:
        with send_request(one_slot_server, ENDLESS_REQUEST | {"stream": stream}) as connection:
            until(
                lambda: any(s.is_open and s.reply.token_ids for s in list(one_slot_server.service._streams))
            )
            connection.shutdown(socket.SHUT_RDWR)
        until(lambda: one_slot_server.idle)
    finally:
        one_slot_server.service.metrics.replied = replied  # type: ignore[method-assign]
    assert [reply.finish_reason for reply in replies] == ["cancelled"]
    assert len(replies[0].token_ids) < 4000


def test_a_waiting_client_may_disconnect(one_slot_server: Running):
    slots = one_slot_server.service.slots
    with send_request(one_slot_server):
        until(lambda: slots.running == 1)
        with send_request(one_slot_server):
            until(lambda: slots.waiting == 1)
        until(lambda: slots.waiting == 0)
        assert slots.running == 1
    until(lambda: one_slot_server.idle)


def test_requests_are_decoded_together(served: Running, monkeypatch: pytest.MonkeyPatch):
    """Those of two clients, and the choices of one request, whose prompt is prefilled once."""
    model = RecordingModel(served.service.model._model)
    monkeypatch.setattr(served.service.model, "_model", model)
    with send_request(served) as long:
        long.recv(1)
        served.post(CHAT, ASK)
        assert max(B for B, L in model.shapes if L == 1) == 2
    until(lambda: served.idle)
    model.shapes.clear()
    served.post(CHAT, ASK | {"n": 3, "messages": [{"role": "user", "content": "How much is 3 + 6?"}]})
    assert max(B for B, L in model.shapes if L == 1) == 3
    assert sum(L > 1 for _, L in model.shapes) == 1


def test_more_choices_than_slots_are_decoded_one_after_another(
    one_slot_server: Running, monkeypatch: pytest.MonkeyPatch
):
    model = RecordingModel(one_slot_server.service.model._model)
    monkeypatch.setattr(one_slot_server.service.model, "_model", model)
    assert len(one_slot_server.post(CHAT, ASK | {"n": 3, "max_tokens": 5}).json["choices"]) == 3
    assert {B for B, _ in model.shapes} == {1}


def test_a_short_request_does_not_wait_for_a_long_one(served: Running):
    """A short reply that starts later ends before a long one that started first."""
    with send_request(served) as long:
        long.recv(1)
        assert served.post(CHAT, ASK).json["choices"][0]["finish_reason"] == "stop"
        assert served.service.slots.running == 1
    until(lambda: served.idle)


def test_shutdown_answers_running_and_waiting_requests():
    with Magistral.load("demo") as model:
        server = Running(model, running=1)
        with send_request(server) as running, ExitStack() as stack:
            running.recv(1)
            waiting = stack.enter_context(send_request(server, ASK))
            until(lambda: server.service.slots.waiting == 1)
            shutdown = threading.Thread(target=server.end)
            shutdown.start()
            rest = b"".join(iter(lambda: running.recv(65536), b""))
            assert b'"shutting_down"' in rest
            assert b" 503 " in waiting.recv(100)
            shutdown.join(20)
            assert not shutdown.is_alive()
        assert server.idle
        assert model.ask(QUESTION, seed=1).answer  # the model outlives its server


def assert_refused(answer: Answer, code: str) -> None:
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
def test_invalid_requests_are_errors_in_openais_format(served: Running, body: object, code: str):
    assert_refused(served.post(CHAT, body), code)


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
def test_invalid_completions_are_refused(served: Running, body: object):
    assert_refused(served.post("/v1/completions", body), served.post("/v1/completions", body).error["code"])


def test_error_messages_do_not_quote_long_values(served: Running):
    long_value = 100_000 * "x"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for path, request in (
        (CHAT, ASK | {"tools": tools, "tool_choice": long_value}),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": long_value}]}]},
        ),
    ):
        answer = served.post(path, request)
        assert (answer.status, len(answer.body) < 2000) == (400, True)


def test_a_wrong_content_type_is_refused_with_the_right_one(served: Running):
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's default
    response = served.call("POST", CHAT, json.dumps(ASK).encode(), form)
    assert response.status == 400
    assert "Content-Type: application/json" in response.error["message"]


def test_unknown_paths_and_methods_are_errors(served: Running):
    assert served.get("/v1/nothing").error["type"] == "not_found_error"
    assert served.get(CHAT).status == 405
    assert served.get(CHAT).error


def test_stop_thinking_ends_the_reasoning_of_a_running_request(tiny_tokenizer):
    """The scripted model continues its text, which then counts as its answer."""
    text = "<think>\n" + "On and on.\n" * 100 + "</think>\nDone."
    with scripted(tiny_tokenizer("v11"), text, step_seconds=0.002) as model, Running(model) as server:
        with send_request(server, ASK | {"stream": True, "max_tokens": 400}) as connection:
            received = b""
            while received.count(b"reasoning_content") < 3:
                received += connection.recv(4096)
            [id_] = set(re.findall(rb'"id": "(chatcmpl-\w+)"', received))
            path = f"{CHAT}/{id_.decode()}/stop_thinking"
            assert (server.post(path, {}).status, server.post(f"{RAW}/none/stop_thinking", {}).status) == (
                204,
                404,
            )
            while b"[DONE]" not in received:
                received += connection.recv(4096)
        assert received.count(b"reasoning_content") < 200 < received.count(b'"delta": {"content"')
        assert server.post(path, {}).error["code"] == "not_running"
