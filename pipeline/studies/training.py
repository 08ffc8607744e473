"""The training of the studies' models: a loop, and its use to learn the answers to an image's questions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from itertools import count, islice

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.shared_prefix import ImageQuestions, answer_loss


def fit(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    *,
    name: str,
    num_rows: int,
    batch_size: int,
    num_steps: int,
    generator: torch.Generator,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    max_norm: float = math.inf,
) -> None:
    """Minimise `loss_of(rows)` with AdamW over shuffled epochs of `num_rows` rows, and print the loss now and then.

    The learning rate rises over the first 5% of the steps and falls to zero as a cosine.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=0.05)
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


def fit_answers(
    model: MobileVLMForCausalLM,
    asked: list[ImageQuestions],
    features_of: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    epochs: int,
    generator: torch.Generator,
) -> None:
    """Train what needs a gradient on the answers; `features_of(rows)` are patch features 'I M W' of these images."""
    fit(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lambda rows: answer_loss(model, [asked[row] for row in rows], features_of(rows)),
        name="answers",
        num_rows=len(asked),
        batch_size=batch_size,
        num_steps=epochs * (len(asked) // batch_size),
        generator=generator,
        max_norm=1.0,
    )
