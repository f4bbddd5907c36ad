"""A slow copy of the student that teaches it, and a queue of what it saw (BLIP, MoCo)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.distributed import gather_constant


class Momentum(nn.Module):
    """Teacher and queues of past embeddings: part state `ema`, saved but never trained.

    rate: share of the old teacher that a step keeps. queue: past images and texts kept as
    negatives. (BLIP, arXiv 2201.12086, section 3.2; ALBEF, 2107.07651, section 3.2; 0.995, 57,600.)
    """

    def __init__(
        self, student: nn.ModuleDict, dim: int, rate: float = 0.995, queue: int = 57_600
    ) -> None:
        super().__init__()
        self.rate = rate
        for role, part in student.items():
            setattr(self, role, copy.deepcopy(part).requires_grad_(False))
        generator = torch.Generator().manual_seed(0)  # leaves the run's own stream alone
        for name in ("images", "texts"):
            rows = torch.empty(queue, dim, device="cpu").normal_(generator=generator)
            self.register_buffer(name, F.normalize(rows, dim=-1))  # (queue,E)
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._pending: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> Momentum:
        """A teacher is always in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def start(self, student: nn.ModuleDict) -> None:
        """Become equal to the student before the first step, whatever it was loaded from."""
        if not self.started:
            self._blend(student, 0.0)
            self.started.fill_(True)

    def remember(self, images: Tensor, texts: Tensor) -> None:
        """Note the teacher's embeddings (B,E) of this step; they are queued when it is done."""
        self._pending = (images.detach(), texts.detach())

    @torch.no_grad()
    def step(self, student: nn.ModuleDict) -> None:
        """Move towards the student, and put the noted embeddings of all ranks into the queue."""
        self._blend(student, self.rate)
        if self._pending is None:
            return
        images, texts = (gather_constant(rows) for rows in self._pending)
        self._pending = None
        size = len(self.images)
        images, texts = images[-size:], texts[-size:]
        places = (self.place + torch.arange(len(images), device=images.device)) % size
        self.images[places], self.texts[places] = images, texts
        self.place.copy_((self.place + len(images)) % size)

    def _blend(self, student: nn.ModuleDict, kept: float) -> None:
        for role, part in student.items():
            teacher = getattr(self, role)
            pairs = zip(teacher.parameters(), part.parameters(), strict=True)  # tied tensors once
            for slow, fast in pairs:
                slow.lerp_(fast, 1 - kept)
            for slow, fast in zip(teacher.buffers(), part.buffers(), strict=True):
                slow.copy_(fast)
