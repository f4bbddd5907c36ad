"""Chat completions over HTTP: retries with growing pauses, and a cache of replies on disk."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from triptych.types import TriptychError

LONGEST_PAUSE = 60.0  # seconds
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # states of a server that may pass
LARGEST = 8 << 20  # bytes of a reply that are read
POLICY = ("content_filter", "content_policy_violation", "responsible_ai_policy_violation")
# How models decline in words; such an answer is a refusal and is still given to the parser.
DECLINES = (
    "i'm sorry, but i can",
    "i'm sorry, i can",
    "i’m sorry, but i can",
    "i’m sorry, i can",
    "i can't assist",
    "i cannot assist",
    "i can't help with",
    "i cannot help with",
    "sorry, i can't",
    "i'm unable to",
    "i am unable to",
)


@dataclass
class Reply:
    """What came of one request: status is ok, refusal, timeout or error."""

    status: str
    text: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    served_model: str | None = None  # the snapshot that the server says it is
    reason: str | None = None  # why there is no answer


class ChatClient:
    """Asks an endpoint; safe for threads. pause: seconds before the first new try.

    names: the variables of the key and of the endpoint, for messages.
    """

    def __init__(
        self,
        endpoint: str,
        key: str | None,
        timeout: float,
        retries: int,
        concurrency: int,
        pause: float = 1.0,
        names: tuple[str, str] = ("OPENAI_API_KEY", "OPENAI_BASE_URL"),
    ) -> None:
        import httpx

        self.endpoint, self.retries, self.pause, self.names = endpoint, retries, pause, names
        limits = httpx.Limits(max_connections=concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=timeout, limits=limits, headers=headers)
        self._lock = threading.Lock()
        self.requests = self.retried = 0

    def ask(self, body: dict[str, Any], name: str) -> Reply:
        """The reply to one request, after as many tries as it takes. `name` is for messages.

        Raises TriptychError for what no new try can mend: the key, the model, the quota.
        """
        import httpx

        reply = Reply("error")
        for attempt in range(self.retries + 1):
            asked_pause = None
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            try:
                status, headers, content = self._post(body)
            except httpx.TimeoutException:
                reply = Reply("timeout", reason=f"no answer within {self._client.timeout.read:g} s")
            except httpx.TransportError as error:
                reply = Reply("error", reason=f"{type(error).__name__}: {error}")
            except httpx.InvalidURL as error:
                raise TriptychError(f"{self.names[1]}={self.endpoint} is no URL: {error}") from None
            else:
                reply = self._read(status, content, body, name)
                if status not in AGAIN and reply.reason != UNREADABLE:
                    return reply
                asked_pause = _asked_pause(headers)
            if attempt < self.retries:
                time.sleep(self._wait(attempt, asked_pause))
        return reply

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        with self._client.stream(
            "POST", f"{self.endpoint}/chat/completions", json=body
        ) as response:
            content = b""
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > LARGEST:
                    break
            return response.status_code, response.headers, content

    def _wait(self, attempt: int, asked: float | None) -> float:
        """Twice as long each time, with a random part, so that clients do not come back at once."""
        own = self.pause * 2**attempt * (0.5 + random.random())
        return min(LONGEST_PAUSE, own if asked is None else max(asked, own / 4))

    def _read(self, status: int, content: bytes, body: dict[str, Any], name: str) -> Reply:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if status == 200:
            return _answer(found)
        error = found.get("error", found) if isinstance(found, dict) else {}
        error = error if isinstance(error, dict) else {"message": str(error)}
        words = " ".join(str(error.get("message") or error.get("detail") or content[:200]).split())
        reason = f"{status}: {words[:300]}"
        if status in (401, 403):
            raise TriptychError(
                f"{self.endpoint} refuses the key ({reason}); set {self.names[0]} to a valid one."
            )
        if status == 404:
            raise TriptychError(
                f"{self.endpoint} knows no model.id={body['model']}, or is no such endpoint "
                f"({reason}); check model.id and {self.names[1]}."
            )
        if status == 429 and error.get("code") == "insufficient_quota":
            raise TriptychError(f"the quota of this key is used up ({reason}); answers are kept.")
        codes = (error.get("code"), error.get("type"))
        if status in (400, 422) and any(code in POLICY for code in codes):
            return Reply("refusal", reason=reason)
        return Reply("error", reason=f"sample '{name}': {reason}" if status < 500 else reason)


UNREADABLE = "the reply cannot be read"


def _answer(found: Any) -> Reply:
    """A reply from the body of a successful request."""
    try:
        choice = found["choices"][0]
        message = choice["message"]
        content, declined = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        usage = found.get("usage") or {}
    except (TypeError, KeyError, IndexError, AttributeError):
        return Reply("error", reason=UNREADABLE)
    text = str(content or declined or "")
    plain = text.strip().lower()
    refused = bool(declined) or choice.get("finish_reason") == "content_filter"
    refused = refused or plain.startswith(DECLINES)
    return Reply(
        "refusal" if refused else "ok",
        text,
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        found.get("model"),
    )


def _asked_pause(headers: Any) -> float | None:
    """Seconds that the server asks to wait, as a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


class ReplyCache:
    """Replies by the hash of their request, a JSON file each; damaged ones count as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply kept under a key."""
        try:
            return Reply(**json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; a full disk costs only the next try."""
        path = self._path(key)
        beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(asdict(reply), ensure_ascii=False), encoding="utf-8")
            os.replace(beside, path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
