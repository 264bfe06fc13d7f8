"""A text on its way from generate(), in a thread, to a client of OpenAI's API."""

import asyncio
import json
import threading
import time
import uuid
from contextlib import suppress

import torch
from starlette.exceptions import HTTPException
from transformers.generation.streamers import BaseStreamer


class Left(Exception):
    """Ends generate(): the client has left, or has all that it asked for."""


class Answer(BaseStreamer):
    """One text: its `pieces` come out of a queue, and at last None or an error.

    inputs: of the model, a row. settings: of generate(), with `max_new_tokens`. in_use: held while the model works.
    closing: set where the server stops. `left` is set where the client has left.
    """

    def __init__(self, model, tokenizer, inputs, settings: dict, in_use: threading.Lock, closing: threading.Event):
        self.model, self.tokenizer, self.inputs, self.settings = model, tokenizer, inputs, settings
        self.in_use, self.closing, self.left = in_use, closing, threading.Event()
        self.loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.seed, self.stops = settings.pop("seed", None), settings.pop("stop", [])
        self.tokens, self.sent, self.has_begun, self.is_stopped = [], 0, False, False

    def write(self) -> None:
        """The thread's work, when its turn has come."""
        try:
            with self.in_use:
                self.check()
                if self.seed is not None:
                    torch.manual_seed(self.seed)
                inputs = self.inputs.to(self.model.device)
                self.model.generate(**inputs, **self.settings, streamer=self, inference_callback=self.check)
        except Left:
            self._hand_on(None)
        except Exception as error:
            self._hand_on(error)

    def check(self, *thought) -> None:
        """Called before the work, after each step of inference and with each token."""
        if self.closing.is_set():
            raise HTTPException(503, "The server is stopping.")
        if self.left.is_set():
            raise Left

    def put(self, value) -> None:
        self.check()
        if self.has_begun:
            self.tokens += value.tolist()
            self._decode()
        self.has_begun = True  # the first is the prompt

    def end(self) -> None:
        self._decode(is_last=True)
        self._hand_on(None)

    def _decode(self, is_last: bool = False) -> None:
        """Hand on what no later token can change, up to a stop string."""
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            text, self.is_stopped = text[: min(found)], True
        elif not is_last:  # without half a character, or what may be half a stop string
            text = text.rstrip("\ufffd")
            text = text[: len(text) + 1 - max(map(len, self.stops), default=1)]
        if len(text) > self.sent:
            self._hand_on(text[self.sent :])
            self.sent = len(text)
        if found and not is_last:
            raise Left

    def _hand_on(self, piece) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Words:
    """An answer in OpenAI's words, whole or in parts."""

    def __init__(self, answer: Answer, name: str, is_chat: bool):
        self.answer, self.is_chat = answer, is_chat
        self.head = {"id": f"ltm-{uuid.uuid4()}", "created": int(time.time()), "model": name}

    def whole(self, text: str) -> dict:
        said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return self._about(said, "chat.completion" if self.is_chat else "text_completion", is_last=True)

    def part(self, text: str, is_last: bool = False) -> str:
        said = {"delta": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return event(self._about(said, "chat.completion.chunk" if self.is_chat else "text_completion", is_last))

    async def parts(self, piece: str | None):
        """From the first piece on, which was waited for."""
        try:
            while isinstance(piece, str):
                yield self.part(piece)
                piece = await self.answer.pieces.get()
            if piece is None:
                yield self.part("", is_last=True)
            else:  # too late for a status
                yield event({"error": {"message": getattr(piece, "detail", str(piece)), "type": "server_error"}})
            yield "data: [DONE]\n\n"
        finally:
            self.answer.left.set()

    def _about(self, said: dict, kind: str, is_last: bool) -> dict:
        reason = usage = None
        if is_last:
            read, tokens = self.answer.inputs["input_ids"].shape[1], self.answer.tokens
            usage = {"prompt_tokens": read, "completion_tokens": len(tokens), "total_tokens": read + len(tokens)}
            ends = self.answer.model.generation_config.eos_token_id
            has_ended = tokens and tokens[-1] in (ends if isinstance(ends, list) else [ends])
            is_full = len(tokens) >= self.answer.settings["max_new_tokens"]
            reason = "length" if is_full and not has_ended and not self.answer.is_stopped else "stop"
        choice = {"index": 0, "finish_reason": reason, "logprobs": None} | said
        return self.head | {"object": kind, "choices": [choice], "usage": usage}


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"
