"""A tiny GPT-2 of transformers in float64, its sequences, and the plain loop that frameworks are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sassha_fused.optimizer import FusedOptimizer

VOCABULARY, LENGTH = 31, 12

Sample = dict[str, Tensor]


def model_of(transformers: Any, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    model.loss_type = "ForCausalLM"  # the Trainer then counts the tokens that the loss counts
    model.loss_function = loss_of  # transformers' own is in float32, whatever the model's dtype
    return model


def loss_of(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Tensor:
    """Of the next tokens: summed and divided by num_items_in_batch, or the mean of those that are there."""
    summed = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return summed / (labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def sequences(count: int) -> list[Sample]:
    """Random tokens, of which every sequence has another number to learn."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for i in range(count):
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[: i % (LENGTH - 2)] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def batches_of(samples: Sequence[Sample], size: int) -> list[Sample]:
    """Whole batches, in the order of the samples."""
    chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [{name: torch.stack([sample[name] for sample in chunk]) for name in chunk[0]} for chunk in chunks]


def plain_loop(
    model: Any,
    opt: FusedOptimizer,
    batches: Iterable[Sample],
    clip: float = torch.inf,
    check: Callable[[Tensor], Any] = id,
) -> None:
    """A step for each batch, which goes through the network as a whole; check is given every norm before clipping."""
    model.train()
    for batch in batches:

        def closure() -> Tensor:
            opt.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            check(nn.utils.clip_grad_norm_(model.parameters(), clip))
            return loss

        opt.step(closure)


def assert_same_run(model: Any, opt: Any, other: Any, its: Any, rtol: float) -> None:
    """Weights and every element of state agree, relative to the largest of its tensor."""
    pairs = {name: (mine, theirs) for (name, mine), theirs in zip(model.named_parameters(), other.parameters())}
    states, others = opt.state_dict()["state"], its.state_dict()["state"]
    assert list(states) == list(others)
    for i, state in states.items():
        assert list(state) == list(others[i])
        pairs |= {f"{name} of parameter {i}": (value, others[i][name]) for name, value in state.items()}
    for name, (mine, theirs) in pairs.items():
        mine, theirs = torch.as_tensor(mine).detach(), torch.as_tensor(theirs).detach()
        torch.testing.assert_close(
            mine, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()), msg=lambda text: f"{name}: {text}"
        )
