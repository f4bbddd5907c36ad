"""ApiModel: a remote model behind an OpenAI-compatible endpoint, asked like any other predictor."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triptych.data.cache import cache_dir
from triptych.models.api_client import ChatClient, Reply, ReplyCache
from triptych.models.api_price import Price, Spending, image_tokens, text_tokens
from triptych.types import ImageRef, Sample, TriptychError

ENDPOINT = "https://api.openai.com/v1"  # where OPENAI_BASE_URL says nothing else
SHOWN = ("status", "tokens_in", "tokens_out", "served_model", "reason")


class ApiModel:
    """Answers of any snapshot `id`; the endpoint and its key come from the environment.

    OPENAI_API_KEY holds the key and OPENAI_BASE_URL the endpoint (an endpoint of one's own needs no
    key); `environment` is what both names begin with. concurrency: requests at a time. timeout:
    seconds an answer may take; time-outs, full servers and broken connections are tried again
    `retries` times with growing pauses. budget: USD one command may spend at `price` (input and
    output per million tokens, as_of a date, for the `model` it was read for); null spends without a
    cap. detail: the image resolution asked for. options: further fields of the request, such as
    temperature. Replies are cached on disk by model, prompt and image. Refusals, time-outs and
    errors are outcomes with rates of their own.
    """

    capabilities = frozenset({"generate"})

    def __init__(
        self,
        id: str,
        detail: str = "auto",
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
        budget: float | None = None,
        price: dict[str, Any] | None = None,
        limit_field: str = "max_tokens",
        options: dict[str, Any] | None = None,
        cache: bool = True,
        batch_size: int = 64,
        pause: float = 1.0,
        environment: str = "OPENAI",
    ) -> None:
        self.id, self.detail, self.concurrency = id, detail, concurrency
        self.limit_field, self.options, self.batch_size = (
            limit_field,
            dict(options or {}),
            batch_size,
        )
        names = f"{environment}_API_KEY", f"{environment}_BASE_URL"
        key, given = (os.environ.get(name) or None for name in names)
        self.endpoint = (given or ENDPOINT).rstrip("/")
        if key is None and given is None:
            raise TriptychError(
                f"model.id={id} is asked over the network and no key is set; set {names[0]}, "
                f"and {names[1]} for another endpoint, or leave it out: other models need none."
            )
        self.client = ChatClient(self.endpoint, key, timeout, retries, concurrency, pause, names)
        self.cache = ReplyCache(cache_dir() / "api") if cache else None
        self.spending = Spending(Price.read(price, id, budget), budget)
        self.vision_calls = 0
        self._stop = threading.Event()  # what no new try can mend: send nothing more
        self._sizes: dict[str, int] = {}  # image key -> tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens the endpoint has written for this process."""
        return self.spending.tokens_out

    @property
    def costs(self) -> dict[str, float]:
        """What was asked and paid for until now."""
        return self.spending.counts | {
            "requests": self.client.requests,
            "retries": self.client.retried,
        }

    def identity(self) -> dict[str, Any]:
        """What the answers depend on, as far as it can be known from here."""
        names = ("id", "endpoint", "detail", "limit_field", "options")
        return {"type": "ApiModel", **{name: getattr(self, name) for name in names}}

    def generate(self, samples: Sequence[Sample], **decoding: Any) -> list[str]:
        """The words alone; see `respond`."""
        return [outcome.raw for outcome in self.respond(samples, **decoding)]

    def respond(
        self, samples: Sequence[Sample], max_new_tokens: int = 256, **decoding: Any
    ) -> list[Any]:
        """An Outcome a sample; its `extra` tells the status, the tokens and the served snapshot.

        Raises TriptychError when the key is refused, the model unknown, the budget used up, or when
        every one of several samples fails: a server that is down is no result.
        """
        from triptych.evaluation.scorers import FAILED, Outcome

        bodies = [self._body(sample, max_new_tokens, decoding) for sample in samples]
        self._stop.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                replies = list(pool.map(self._ask, samples, bodies))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.vision_calls += len({ref.key for s in samples for ref in s.images})
        failed = [reply for reply in replies if reply.status in FAILED]
        if len(failed) == len(replies) > 1:
            raise TriptychError(
                f"none of {len(replies)} requests to {self.endpoint} was answered; the last failed "
                f"with: {failed[-1].reason}"
            )
        return [Outcome(reply.text, extra=_facts(reply)) for reply in replies]

    def forecast(self, samples: Sequence[Sample], scorer: Any) -> str:
        """What asking these samples may cost at most, before anything is asked."""
        longest = getattr(scorer, "max_new_tokens", 256)
        bodies = [self._body(s, longest, getattr(scorer, "decoding", {})) for s in samples]
        known = [self.cache is not None and self.cache.get(_key(b)) is not None for b in bodies]
        new = [sample for sample, there in zip(samples, known, strict=True) if not there]
        tokens = sum(self._tokens(sample) for sample in new)
        return f"{self.id}: {sum(known):,} of {len(samples):,} answers are cached; " + (
            self.spending.forecast(len(new), tokens, longest * len(new))
        )

    def _ask(self, sample: Sample, body: dict[str, Any]) -> Reply:
        key = _key(body)
        if self.cache is not None and (kept := self.cache.get(key)) is not None:
            self.spending.count("cached")
            return kept
        if self._stop.is_set():
            raise TriptychError("another request has failed for good.")
        longest = body["request"][self.limit_field]
        try:
            with self.spending.reserved(self._tokens(sample), longest) as bill:
                reply = self.client.ask(self._request(sample, body), sample.id)
                bill(reply)
        except TriptychError:
            self._stop.set()
            raise
        if self.cache is not None and reply.status not in ("timeout", "error"):
            self.cache.put(key, reply)
        return reply

    def _body(self, sample: Sample, longest: int, decoding: dict[str, Any]) -> dict[str, Any]:
        """The request with image keys in place of pictures: it is also what the cache goes by."""
        request = {"model": self.id, self.limit_field: longest, **self.options, **decoding}
        return {
            "endpoint": self.endpoint,
            "request": request,
            "detail": self.detail,
            "messages": sample.prompt,
            "images": [ref.key for ref in sample.images],
        }

    def _request(self, sample: Sample, body: dict[str, Any]) -> dict[str, Any]:
        images = iter(sample.images)
        messages = [
            {"role": m["role"], "content": [self._part(part, images) for part in m["content"]]}
            for m in sample.prompt
        ]
        return {**body["request"], "messages": messages}

    def _part(self, part: dict[str, Any], images: Iterator[ImageRef]) -> dict[str, Any]:
        if part["type"] != "image":
            return {"type": "text", "text": part["text"]}
        buffer = io.BytesIO()
        next(images).open().save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{data}", "detail": self.detail},
        }

    def _tokens(self, sample: Sample) -> int:
        words = sum(
            text_tokens(part["text"])
            for message in sample.prompt
            for part in message["content"]
            if part["type"] == "text"
        )
        return words + sum(self._image_tokens(ref) for ref in sample.images)

    def _image_tokens(self, ref: ImageRef) -> int:
        if ref.key not in self._sizes:
            self._sizes[ref.key] = image_tokens(ref.open().size, self.detail)
        return self._sizes[ref.key]


def _key(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _facts(reply: Reply) -> dict[str, Any]:
    return {name: getattr(reply, name) for name in SHOWN if getattr(reply, name) is not None}
