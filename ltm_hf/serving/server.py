"""One Latent Thought Model behind OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, and /health.

A request says how to think and write in `generation_config`, as JSON: {"num_inference_steps": 16}. One text is written
at a time, others wait. What is wrong with a request is said before the first piece of its answer, with a 4xx.
"""

import asyncio
import ipaddress
import socket
import threading
from argparse import Namespace
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Literal
from urllib.parse import urlsplit

from jinja2 import TemplateError

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, PositiveInt, ValidationError, create_model
    from starlette.exceptions import HTTPException
    from uvicorn.config import LOGGING_CONFIG
except ModuleNotFoundError as error:
    raise ImportError(f'The server needs {error.name}: pip install "transformers[serving]"') from None

from ..cli import DEVICE, Parser, device, port, positive_int
from ..configuration_ltm import InferenceSettings
from ..data import prompt_inputs
from ..loading import load_causal_lm
from .answers import Answer, Words, event

LIMITS = {  # of options --max_…: the default, and what it is of
    "inference_steps": (256, "of a request, those of thinking again included"),
    "new_tokens": (1024, "of an answer"),
    "prompt_tokens": (8192, "of a prompt or conversation"),
    "body_bytes": (1_000_000, "of a request"),
    "requests": (16, "that are answered or wait"),
}


# ------------------------------------------------------------------ what a request may hold


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_Temperature = Annotated[float | None, Field(ge=0, le=10)]
_Share = Annotated[float | None, Field(gt=0, le=1)]
_Zero = Annotated[float | None, Field(ge=0, le=0)]
_Words = Annotated[str, Field(min_length=1)]
_Stops = Annotated[
    list[_Words] | None, Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
]
_THINKING = {field.name: (field.type | None, None) for field in fields(InferenceSettings)} | {
    "inference_seed": (int | None, None),
    "sample_latents": (bool | None, None),
    "reinfer_every": (PositiveInt | None, None),
}
_Settings = create_model(
    "_Settings",
    __base__=_Strict,
    do_sample=(bool | None, None),
    max_new_tokens=(PositiveInt | None, None),
    temperature=(_Temperature, None),
    top_k=(PositiveInt | None, None),
    top_p=(_Share, None),
    transformers_version=(str | None, None),  # which `transformers chat` sends along
    **_THINKING,
)


class Body(_Strict):
    model: str | None = None


class _Asked(Body):
    stream: bool | None = None
    max_tokens: PositiveInt | None = None
    temperature: _Temperature = None
    top_p: _Share = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: _Stops = None
    generation_config: Json[_Settings] | None = None
    # What clients send along and what is so anyway.
    n: Literal[1] | None = None
    frequency_penalty: _Zero = None
    presence_penalty: _Zero = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    user: str | None = None

    def settings(self) -> dict:
        """generate()'s, and `seed` and `stop`, as far as they are asked for."""
        asked = self.model_dump(exclude_none=True, include={"temperature", "top_p", "seed", "stop"})
        if self.generation_config:
            asked = self.generation_config.model_dump(exclude_none=True, exclude={"transformers_version"}) | asked
        lengths = {self.max_tokens, getattr(self, "max_completion_tokens", None)} - {None}  # an old and a new name
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens must be the same.")
        if lengths:
            asked["max_new_tokens"] = lengths.pop()
        if asked.get("temperature", 1) < 1e-3:  # OpenAI's word for greedy search is 0; logits would no longer be finite
            asked |= {"temperature": 1.0, "do_sample": False}
        elif asked.keys() & {"temperature", "top_k", "top_p"}:
            asked.setdefault("do_sample", True)
        return asked


class Completion(_Asked):
    prompt: _Words

    def encode(self, tokenizer):
        return prompt_inputs({"prompt": self.prompt}, tokenizer)


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class Chat(_Asked):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None

    def encode(self, tokenizer):
        if tokenizer.chat_template is None:
            raise ValueError("This model has no chat template: ask it by /v1/completions.")
        try:
            return prompt_inputs({"prompt": [message.model_dump() for message in self.messages]}, tokenizer)
        except TemplateError as error:
            raise ValueError(f"The model's chat template says: {error}") from None


# ------------------------------------------------------------------ the model, and what may be asked of it


class Served:
    """A model and its limits. options: those of `parser`."""

    def __init__(self, model, tokenizer, options: Namespace):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.in_use, self.closing = threading.Lock(), threading.Event()
        self.slots = threading.BoundedSemaphore(options.max_requests)

    def check_origin(self, request: Request) -> None:
        """Refuse what a page of the Web makes a browser send: a foreign Host (DNS rebinding) or Origin."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        with suppress(ValueError):
            name, own = urlsplit(f"//{host}").hostname or "", [self.options.host, *self.options.allowed_hosts]
            if name not in {"localhost", "127.0.0.1", "::1", *map(str.lower, own)}:
                if self.options.host not in ("0.0.0.0", "::"):
                    raise ValueError
                ipaddress.ip_address(name)  # it listens at all addresses, and has no other name
            if origin is None or urlsplit(origin).netloc == host:
                return
        raise HTTPException(403, f"The Host {host!r} or the Origin {origin!r} is not this server's (--allowed_hosts).")

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body of a request. Raises HTTPException or pydantic's ValidationError for one that is none."""
        body, most, name = bytearray(), self.options.max_body_bytes, self.options.model
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"A request may have {most} bytes.")
        asked = kind.model_validate_json(bytes(body))
        if asked.model not in (None, name):
            raise HTTPException(404, f"There is no model {asked.model!r} here, only {name!r}.")
        return asked

    def prepare(self, asked: _Asked) -> tuple[dict, dict]:
        """Inputs and settings of generate(). Raises ValueError for more than the limits, or than the model can do."""
        config, own, most = self.model.config, self.model.generation_config, self.options
        inputs, settings = asked.encode(self.tokenizer), asked.settings()
        if not config.num_latents and (thinking := settings.keys() & _THINKING.keys()):
            raise ValueError(f"This model has no latents: {min(thinking)} does nothing.")
        length, readable = inputs["input_ids"].shape[1], min(most.max_prompt_tokens, config.max_position_embeddings - 1)
        if length > readable:
            raise ValueError(f"The prompt has {length} tokens, and at most {readable} are read here.")
        room = min(most.max_new_tokens, config.max_position_embeddings - length)
        new = settings.setdefault("max_new_tokens", min(own.max_new_tokens or room, room))
        if new > room:
            raise ValueError(f"{new} new tokens are asked for, and at most {room} are written after this prompt.")
        thinking = {name: settings.get(name, getattr(own, name, None)) for name in _THINKING}
        every = thinking["reinfer_every"]
        names = {field.name for field in fields(InferenceSettings)}
        steps = InferenceSettings.of(config, **{name: thinking[name] for name in names}).num_inference_steps
        steps *= 1 + ((new - 1) // every if every else 0)
        if config.num_latents and steps > most.max_inference_steps:
            raise ValueError(f"{steps} inference steps are asked for, and at most {most.max_inference_steps} taken.")
        return inputs, settings | {"pad_token_id": self.tokenizer.pad_token_id}

    async def answer(self, request: Request, kind: type[_Asked]):
        asked = await self.read(request, kind)
        inputs, settings = await asyncio.to_thread(self.prepare, asked)
        if not self.slots.acquire(blocking=False):
            raise HTTPException(429, f"{self.options.max_requests} requests are being answered: try again later.")
        answer = Answer(self.model, self.tokenizer, inputs, settings, self.in_use, self.closing)
        threading.Thread(target=self._work, args=(answer,), daemon=True).start()
        watch = asyncio.create_task(_watch(request, answer))
        words = Words(answer, self.options.model, kind is Chat)
        text, piece = "", await answer.pieces.get()  # what can go wrong has gone wrong before the first
        if asked.stream and not isinstance(piece, Exception):
            return StreamingResponse(words.parts(piece), media_type="text/event-stream")
        while isinstance(piece, str):
            text, piece = text + piece, await answer.pieces.get()
        watch.cancel()
        if piece is not None:
            raise piece
        return JSONResponse(words.whole(text))

    def _work(self, answer: Answer) -> None:
        try:
            answer.write()
        finally:
            self.slots.release()


async def _watch(request: Request, answer: Answer) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.left.set()


# ------------------------------------------------------------------ the server


def build_app(served: Served) -> FastAPI:
    async def is_ours(request: Request) -> None:
        served.check_origin(request)

    app = FastAPI(openapi_url=None, dependencies=[Depends(is_ours)])

    @app.exception_handler(ValueError)
    async def refuse(request, error):
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            error = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        return _error(400, str(error))

    @app.exception_handler(HTTPException)
    async def refuse_by_status(request, error):
        return _error(error.status_code, error.detail)

    @app.exception_handler(Exception)  # a bug, whose traceback is logged
    async def break_down(request, error):
        return _error(500, "The server has failed.")

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models():
        model = {"id": served.options.model, "object": "model", "created": 0, "owned_by": "ltm_hf"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def complete(request: Request):
        return await served.answer(request, Completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await served.answer(request, Chat)

    @app.post("/load_model")  # for `transformers chat`; nothing is loaded
    async def load(request: Request):
        await served.read(request, Body)
        return StreamingResponse(iter([event({"status": "ready", "cached": True})]), media_type="text/event-stream")

    return app


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


class Server(uvicorn.Server):
    """Of the parser's options: listening, with the model loaded. Raises OSError or ValueError where it cannot be."""

    def __init__(self, options: Namespace):
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        self.listening = socket.create_server((options.host, options.port), family=family)
        model, tokenizer = load_causal_lm(options.model, options.device, options.trust_remote_code)
        if model.config.model_type != "ltm":
            raise ValueError(f"{options.model!r} is a {model.config.model_type!r} model, not an LTM.")
        self.served = Served(model, tokenizer, options)
        handlers = LOGGING_CONFIG["handlers"].items()
        log = LOGGING_CONFIG | {"handlers": {name: about | {"stream": "ext://sys.stderr"} for name, about in handlers}}
        # A step that takes longer than these seconds is left to itself.
        super().__init__(uvicorn.Config(build_app(self.served), timeout_graceful_shutdown=3, log_config=log))

    def handle_exit(self, *signal):
        self.served.closing.set()
        super().handle_exit(*signal)

    def run(self):
        with suppress(KeyboardInterrupt):
            super().run(sockets=[self.listening])


def parser(**about) -> Parser:
    made = Parser(**about)
    made.add_argument("model", help="folder of a checkpoint, or its name on the Hub")
    made.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1: this machine only")
    made.add_argument("--port", type=port, default=8000, help="default 8000")
    made.add_argument("--allowed_hosts", nargs="+", default=[], help="names that it is called by from elsewhere")
    made.add_argument("--device", type=device, default=DEVICE)
    made.add_argument("--trust_remote_code", action="store_true", help="run the Python in the model's folder")
    for name, (default, of) in LIMITS.items():
        made.add_argument(f"--max_{name}", type=positive_int, default=default, help=f"{of}; default {default:,}")
    return made
