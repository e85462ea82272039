"""The routes. Each turns a request into a job of the service, and what is said into a response."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from magistral_mlx.errors import MagistralError
from magistral_mlx.talk.stream import Stream

from . import failures, requests, web
from .failures import GONE, RefusedError
from .metrics import CONTENT_TYPE
from .replies import DONE, Chat, Completion, Ended, Shape, usage
from .safety import Rules, Safety
from .service import Job, Service
from .slots import ClosingError, FullError, Slot
from .voices import Apart, Tagged, Verbatim
from .wire import ChatRequest, CompletionRequest, DetokenizeRequest, Sampled, TokenizeRequest

T = TypeVar("T")

SEND_SECONDS = 60
"""A client that takes nothing for so long has left."""


def create_app(service: Service, rules: Rules) -> ASGIApp:
    """All of it: the routes behind the rules."""
    app = FastAPI(title="magistral_mlx", version=version("magistral_mlx"), docs_url=None, redoc_url=None)
    app.state.service = service
    for base, raw in (("/v1", False), ("/raw/v1", True)):
        app.include_router(_interface(service, raw=raw), prefix=base)
    app.include_router(_about(service))
    app.router.routes += web.routes()
    for kind in (Exception, MagistralError, RefusedError, FullError, ClosingError):
        app.add_exception_handler(kind, _failed)
    for kind in (HTTPException, RequestValidationError):  # in place of the framework's own
        app.add_exception_handler(kind, _failed)
    counted = _Counted(app, service)
    if rules.origins:
        counted = CORSMiddleware(
            counted, allow_origins=[*rules.origins], allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Safety(counted, rules)


def _interface(service: Service, *, raw: bool) -> APIRouter:
    """The interface under one base path; raw: the reasoning stays in the text, between its tags."""
    router = APIRouter(responses={"4XX": _ERROR, "5XX": _ERROR})
    tokenizer = service.model.tokenizer
    name = service.ids[0]

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, id_) for id_ in service.ids]}

    @router.get("/models/{id_:path}")
    async def model(id_: str) -> dict[str, Any]:
        if id_ not in service.ids:
            raise RefusedError(
                404, "there is no such model here; /v1/models lists them", code="model_not_found"
            )
        return _model(service, id_)

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages, options = requests.chat(body, tokenizer)
        prompt = await asyncio.to_thread(service.model.encode, messages, **options)
        options.pop("system", None)
        shape = Chat(name, tokenizer)
        voice = Tagged if raw else Apart
        job = Job(prompts=[prompt], options=options, voice=voice, n=body.n or 1, id=shape.id)
        return await _answer(service, request, body, job, shape)

    @router.post("/chat/completions/{id_}/stop_thinking", status_code=204)
    async def stop_thinking(id_: str) -> None:
        """End the reasoning of a reply that is being streamed; the answer follows."""
        if not service.stop_thinking(id_):
            raise RefusedError(404, "no reply of that id is being written", code="not_running")

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prompts, options = await asyncio.to_thread(requests.completion, body, tokenizer)
        voice = partial(Verbatim, tokenizer, requests.stops(body))
        options["stop"] = ()
        job = Job(prompts=prompts, options=options, voice=voice, n=body.n or 1)
        return await _answer(service, request, body, job, Completion(name, tokenizer))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        tokens = await asyncio.to_thread(requests.tokens, body, service.model)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.config.max_context}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    return router


def _about(service: Service) -> APIRouter:
    """The server itself."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


async def _answer(service: Service, request: Request, body: Sampled, job: Job, shape: Shape) -> Response:
    """Wait for a turn, then say it whole, or as it comes."""
    slot = await _while_connected(request, service.slots.take())
    if body.stream:
        try:
            first = await _while_connected(request, service.begin(job))
        except BaseException:
            slot.release()
            raise
        counted = bool(body.stream_options and body.stream_options.include_usage)
        return _Events(_pieces(service, job, first, shape, counted=counted), slot, first)
    with slot:
        choices = await _while_connected(request, service.choices(job))
    used = usage([choice.ended for choice in choices], job.n)
    return Response(shape.whole(choices, used), media_type="application/json")


async def _pieces(
    service: Service, job: Job, first: Stream, shape: Shape, *, counted: bool
) -> AsyncGenerator[bytes]:
    """A job as server-sent events. An error that comes when some were sent is one of them."""
    ends: dict[int, Ended] = {}
    try:
        for index in range(job.choices):
            yield shape.opening(index)
        async with aclosing(service.run(job, first)) as told:
            async for index, said in told:
                if not isinstance(said, Ended):
                    yield shape.piece(index, said)
                    continue
                ends[index] = said
                yield shape.ending(index, said)
        if counted:
            yield shape.counted(usage([ends[index] for index in range(job.choices)], job.n))
    except Exception as error:  # noqa: BLE001 -- the status was sent long ago: this is how it can still be told
        failures.log(error)
        yield b"data: " + failures.of(error).body + b"\n\n"
        return
    yield DONE


class _Events(EventSourceResponse):
    """Events that hold a slot until the last one is sent, or the client has left."""

    def __init__(self, pieces: AsyncGenerator[bytes], slot: Slot, first: Stream) -> None:
        super().__init__(pieces, send_timeout=SEND_SECONDS)
        self._slot, self._first = slot, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot, self._first, suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = "route" in scope and not scope.get("path_params")  # never a path that a client made up
                self._metrics.answered(scope["path"] if own else "other", message["status"])
            await send(message)

        await self._app(scope, receive, sending)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do it, unless the client leaves first."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RefusedError(GONE, "the client has left")
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _failed(_: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            return failures.of_validation(error.errors()).response
        case HTTPException():
            return RefusedError(error.status_code, str(error.detail), headers=error.headers).response
        case _:
            return failures.of(error).response


def _model(service: Service, id_: str) -> dict[str, Any]:
    context = service.model.config.max_context
    return {"id": id_, "object": "model", "created": 0, "owned_by": "local", "max_model_len": context}


_ERROR: dict[str, Any] = {
    "description": "what was expected, and what was found",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
