"""What remote answers cost: an estimate before, a bill while they come, and a cap on it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from triptych.models.api_client import Reply
from triptych.types import TriptychError

MILLION = 1_000_000


@dataclass(frozen=True)
class Price:
    """USD per million tokens of one model, as read on a date; prices change, so a date is due."""

    input: float
    output: float
    as_of: str

    @classmethod
    def read(cls, node: dict[str, Any] | None, id: str, budget: float | None) -> Price | None:
        """The price of model `id`; None if it is another model's. A budget needs a price."""
        node = dict(node or {})
        known = node.get("model") == id and None not in (node.get("input"), node.get("output"))
        if known and not node.get("as_of"):
            raise TriptychError("model.price has no date; add model.price.as_of=YYYY-MM-DD.")
        if known:
            return cls(float(node["input"]), float(node["output"]), str(node["as_of"]))
        if budget is not None:
            raise TriptychError(
                f"model.budget={budget:g} needs the price of model.id={id}, in USD per million "
                f"tokens: model.price.model={id} model.price.input=... model.price.output=... "
                "model.price.as_of=YYYY-MM-DD; or model.budget=null to ask without a cap."
            )
        return None

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """USD."""
        return (tokens_in * self.input + tokens_out * self.output) / MILLION


@dataclass
class Spending:
    """Counts what is asked, and refuses a request that could exceed the budget."""

    price: Price | None
    budget: float | None
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    cached: int = 0
    _reserved: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def counts(self) -> dict[str, float]:
        """Totals of this process."""
        made = {"tokens_in": self.tokens_in, "cached": self.cached}
        return made if self.price is None else made | {"usd": round(self.usd, 6)}

    def count(self, name: str) -> None:
        """One more of something."""
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)

    @contextmanager
    def reserved(self, tokens_in: int, tokens_out: int) -> Iterator[Callable[[Reply], None]]:
        """Hold back the most a request can cost, and bill what its reply says it was.

        A time-out may have been answered and paid for, so it is billed in full.
        """
        most = self.price.of(tokens_in, tokens_out) if self.price else 0.0
        with self._lock:
            if self.budget is not None and self.usd + self._reserved + most > self.budget:
                raise TriptychError(
                    f"model.budget={self.budget:g} USD is used up ({self.usd:.4f} spent); raise it "
                    "and give the same command again: answers that are there are not paid twice."
                )
            self._reserved += most

        def bill(reply: Reply) -> None:
            read, wrote = reply.tokens_in or 0, reply.tokens_out or 0
            cost = self.price.of(read, wrote) if self.price else 0.0
            with self._lock:
                self.tokens_in += read
                self.tokens_out += wrote
                self.usd += most if reply.status == "timeout" else cost

        try:
            yield bill
        finally:
            with self._lock:
                self._reserved -= most

    def forecast(self, requests: int, tokens_in: int, tokens_out: int) -> str:
        """The estimate in words."""
        words = f"{requests:,} to ask, about {tokens_in:,} tokens to read"
        words += f" and at most {tokens_out:,} to write"
        if self.price is None:
            return f"{words}; no price is known for this model, so nothing caps it"
        most = self.price.of(tokens_in, tokens_out)
        words += f": at most {most:.2f} USD at the prices of {self.price.as_of}"
        if self.budget is None:
            return f"{words}, without a cap"
        over = " and will stop there" if most > self.budget - self.usd else ""
        return f"{words}; model.budget={self.budget:g}{over}"


def text_tokens(text: str) -> int:
    """An upper guess: no common tokenizer needs more than a token for three bytes of a language."""
    return 8 + math.ceil(len(text.encode("utf-8")) / 3)


def image_tokens(size: tuple[int, int], detail: str) -> int:
    """Tokens of a picture in the tile scheme of GPT-4 with vision; an estimate for other models.

    85 for the picture at low detail; else 170 more for each 512 px tile, after the longer side was
    brought to at most 2,048 px and the shorter to at most 768 px.
    """
    if detail == "low":
        return 85
    width, height = size
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return 85 + 170 * tiles
