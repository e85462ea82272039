"""The routes. Each turns a request into a job for the service, and the reply into an HTTP response."""

import asyncio
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from magistral_mlx.errors import MagistralError
from magistral_mlx.talk.options import Options

from . import anthropic_requests, failures, requests, web
from .anthropic_replies import MessageEncoder
from .anthropic_wire import CountRequest, MessagesRequest
from .completion_replies import CompletionEncoder
from .delivery import answer
from .failures import RefusedError
from .metrics import CONTENT_TYPE
from .rendering import RawText, SeparateReasoning, TaggedReasoning
from .replies import ChatEncoder
from .safety import Rules, Safety
from .service import Job, Service
from .slots import ClosingError, FullError
from .wire import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


def create_app(service: Service, rules: Rules) -> ASGIApp:
    """The whole application: all routes, behind the access rules."""
    app = FastAPI(title="magistral_mlx", version=version("magistral_mlx"), docs_url=None, redoc_url=None)
    app.state.service = service
    for base, raw in (("/v1", False), ("/raw/v1", True)):
        app.include_router(_openai(service, raw=raw), prefix=base)
    app.include_router(_anthropic(service), prefix="/v1")
    app.include_router(_about(service))
    app.router.routes += web.routes()
    for kind in (Exception, MagistralError, RefusedError, FullError, ClosingError):
        app.add_exception_handler(kind, _failed)
    for kind in (HTTPException, RequestValidationError):  # instead of FastAPI's handlers
        app.add_exception_handler(kind, _failed)
    counted = _Counted(app, service)
    if rules.origins:
        counted = CORSMiddleware(
            counted, allow_origins=[*rules.origins], allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Safety(counted, rules)


def _openai(service: Service, *, raw: bool) -> APIRouter:
    """OpenAI's API under one base path; raw: the reasoning stays in the text, between its tags."""
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
        service.slots.check()
        prompt, options = await _prompt(service, body)
        encoder = ChatEncoder(name, tokenizer, body)
        rendering = TaggedReasoning if raw else SeparateReasoning
        job = Job(prompts=[prompt], options=options, rendering=rendering, n=body.n or 1, id=encoder.id)
        return await answer(service, request, job, encoder, stream=bool(body.stream))

    @router.post("/chat/completions/{id_}/stop_thinking", status_code=204)
    async def stop_thinking(id_: str) -> None:
        """End the reasoning of a reply that is being streamed; the answer follows."""
        if not service.stop_thinking(id_):
            raise RefusedError(404, "no reply of that id is running", code="not_running")

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.slots.check()
        prompts, options = await asyncio.to_thread(requests.completion, body, tokenizer)
        rendering = partial(RawText, tokenizer, requests.stops(body))
        options["stop"] = ()
        job = Job(prompts=prompts, options=options, rendering=rendering, n=body.n or 1)
        echoes = await asyncio.to_thread(requests.echoes, body, tokenizer)
        encoder = CompletionEncoder(name, tokenizer, body, echoes)
        return await answer(service, request, job, encoder, stream=bool(body.stream))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        tokens = await asyncio.to_thread(requests.tokens, body, service.model)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.config.max_context}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    return router


def _anthropic(service: Service) -> APIRouter:
    """Anthropic's API: the same chat in another format."""
    router = APIRouter(responses={"4XX": _ANTHROPIC_ERROR, "5XX": _ANTHROPIC_ERROR})

    @router.post("/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        service.slots.check()
        prompt, options = await _prompt(service, anthropic_requests.chat(body))
        encoder = MessageEncoder(service.ids[0], prompt_tokens=len(prompt))
        job = Job(prompts=[prompt], options=options, rendering=SeparateReasoning, id=encoder.id)
        return await answer(service, request, job, encoder, stream=bool(body.stream))

    @router.post("/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        prompt, _ = await _prompt(service, anthropic_requests.chat(body))
        return {"input_tokens": len(prompt)}

    return router


async def _prompt(service: Service, asked: ChatRequest) -> tuple[list[int], Options]:
    """A chat request as the ids of its prompt and the options of its reply."""
    messages, options = requests.chat(asked, service.model.tokenizer)
    prompt = await asyncio.to_thread(service.model.encode, messages, **options)
    options.pop("system", None)
    return prompt, options


def _about(service: Service) -> APIRouter:
    """Routes about the server itself."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


class _Counted:
    """Counts responses by path and status."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = "route" in scope and not scope.get("path_params")  # no paths made up by clients
                self._metrics.answered(scope["path"] if own else "other", message["status"])
            await send(message)

        await self._app(scope, receive, sending)


async def _failed(request: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            refused = failures.validation_refusal(error.errors())
        case HTTPException():
            refused = RefusedError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            refused = failures.refusal(error)
    return refused.response(request.url.path)


def _model(service: Service, id_: str) -> dict[str, Any]:
    context = service.model.config.max_context
    return {"id": id_, "object": "model", "created": 0, "owned_by": "local", "max_model_len": context}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*properties], "properties": properties}


def _response(**body: Any) -> dict[str, Any]:
    """An error response in the OpenAPI schema."""
    content = {"application/json": {"schema": _object(**body)}}
    return {"description": "what was expected, and what was found", "content": content}


_TEXT = {"type": "string"}
_MAYBE = {"type": ["string", "null"]}
_ERROR = _response(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))
_ANTHROPIC_ERROR = _response(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT))
