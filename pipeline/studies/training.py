"""The training loop of the two studies' teachers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from itertools import count, islice

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup


def fit(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    *,
    name: str,
    num_rows: int,
    batch_size: int,
    num_steps: int,
    learning_rate: float,
    generator: torch.Generator,
    max_norm: float = math.inf,
) -> None:
    """Minimise `loss_of(rows)` with AdamW over shuffled epochs of `num_rows` rows, and print the loss now and then.

    The learning rate rises over the first 5% of the steps and falls to zero as a cosine.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, num_steps // 20), num_steps)
    whole_batches = max(1, num_rows // batch_size)
    batches = (
        rows
        for _ in count()
        for rows in torch.randperm(num_rows, generator=generator).split(batch_size)[:whole_batches]
    )
    started = time.monotonic()
    for step, rows in enumerate(islice(batches, num_steps), 1):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps:
            seconds = time.monotonic() - started
            print(f"{name} step {step}/{num_steps}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
