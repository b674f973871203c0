"""The loss of rows, and its gradients, without ever holding the logits of a whole batch.

The mean over learnt tokens is what transformers computes (num_items_in_batch): sums over micro-batches,
divided by what the whole step learns. Logits are made only where something is learnt, some rows at a time,
and each such piece is led back to the hidden states at once: what a step computes is the same, what it holds
is a few megabytes. The decoder is led back through once, with the gradients of all pieces. A mapped head
that learns nothing is read once for the loss and its gradients, a piece of the vocabulary after another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .attention import Attention
from .batches import Batch
from .mapped import MappedLinear, Matrix

_LOGITS = 1 << 22
"""Values of logits that are held at once."""


class _CrossEntropy(torch.autograd.Function):
    """The sum of the losses of logits [n, vocabulary], float32, which become their own gradient in place:
    torch's would hold them three times."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(targets), device=targets.device)
        logits = logits.detach()
        chosen = logits[rows, targets]
        most = logits.amax(dim=1, keepdim=True)
        sums = logits.sub_(most).exp_().sum(dim=1, keepdim=True)
        loss = ((sums.log() + most)[:, 0] - chosen).sum()
        logits.div_(sums)
        logits[rows, targets] -= 1
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        return logits.mul_(gradients[0]), None


def streamed(
    rows: torch.Tensor, targets: torch.Tensor, head: Matrix, dtype: torch.dtype, wait: Callable[[], None]
) -> tuple[float, torch.Tensor]:
    """The sum of the losses of hidden states [n, hidden] under logits that `head` alone makes, and its
    gradient by them [n, hidden], float32: sums over the vocabulary are scaled down whenever a greater logit
    comes, as online softmax has it (Milakov and Gimelshein, 2018). What is wanted stays out of the sums, for
    where its probability is near 1 the gradient is what is left."""
    n, rows = len(rows), rows.to(dtype)
    most = torch.full((n, 1), float("-inf"), device=rows.device)
    others, chosen = torch.zeros_like(most), torch.zeros_like(most)
    drawn = torch.zeros(rows.shape, device=rows.device)
    for place, weight in head.pieces(dtype):
        wait()
        logits = functional.linear(rows, weight).float()
        here = torch.nonzero((targets >= place.start) & (targets < place.stop))[:, 0]
        greater = torch.maximum(most, logits.amax(dim=1, keepdim=True))
        chosen[here, 0] = logits[here, targets[here] - place.start]
        logits[here, targets[here] - place.start] = float("-inf")
        shrunk = most.sub_(greater).exp_()
        most = greater
        logits.sub_(most).exp_()
        others.mul_(shrunk).add_(logits.sum(dim=1, keepdim=True))
        drawn.mul_(shrunk).add_(logits.to(dtype) @ weight)
        del logits, weight  # before there are next ones
    sums = others + (chosen - most).exp()
    loss = float((sums.log() + most - chosen).sum())
    return loss, drawn.sub_(head.lookup(targets).float().mul_(others)).div_(sums)


class _Done(nn.Module):
    """Stands where the decoder was in the model with the head, and gives the output that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class Objective:
    """Of a causal language model of transformers, which attends as `attention` has it. `wait` is called
    between pieces of the work."""

    def __init__(self, causal: Any, attention: Attention, bf16: bool, wait: Callable[[], None]) -> None:
        self._causal, self.attention, self._wait, self._bf16 = causal, attention, wait, bf16
        self._decoder = causal.base_model
        # The model's forward stays the one that makes logits: some heads scale, cap or bias them.
        self._done = _Done()
        self._head = copy.copy(causal)
        self._head._modules = {**causal._modules, causal.base_model_prefix: self._done}
        self._rows = max(16, _LOGITS // int(causal.config.vocab_size))
        self._alone: bool | None = None  # whether a mapped head makes logits by itself; asked once

    def learn(self, batch: Batch, learnt: int) -> float:
        """Adds the gradients of a batch's share in the mean loss of a step that learns from `learnt` tokens;
        returns this share."""
        self._causal.train()
        self._wait()
        with self.attention.over(batch.position_ids):
            return self._learn(batch, learnt)

    def _learn(self, batch: Batch, learnt: int) -> float:
        with self.autocast(batch):
            rows, targets, output = self.hidden(batch)
        if not len(targets):
            return 0.0
        if self._alone is None:
            self._alone = self._makes_alone(output)
        if self._alone:
            matrix = self._causal.get_output_embeddings().matrix
            dtype = torch.bfloat16 if self._bf16 else torch.float32
            share, gradient = 0.0, torch.empty_like(rows)
            most = max(16, _LOGITS // matrix.piece)
            for begin in range(0, len(rows), most):
                some = slice(begin, begin + most)
                lost, found = streamed(rows[some].detach(), targets[some], matrix, dtype, self._wait)
                gradient[some] = found.div_(learnt)
                share += lost / learnt
                del found
            rows.backward(gradient)  # type: ignore[no-untyped-call]
            return share
        apart = rows.detach().requires_grad_()
        share = 0.0
        for piece in self.pieces(len(targets)):
            self._wait()
            with self.autocast(batch):
                loss = self.loss(apart[piece], targets[piece], output) / learnt
            loss.backward()  # type: ignore[no-untyped-call]
            share += float(loss.detach())
        rows.backward(apart.grad)  # type: ignore[no-untyped-call]
        return share

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses of a batch's learnt tokens, and their number."""
        self._causal.eval()
        self._wait()
        total = 0.0
        with self.attention.over(batch.position_ids), self.autocast(batch):
            rows, targets, output = self.hidden(batch)
            for piece in self.pieces(len(targets)):
                self._wait()
                total += float(self.loss(rows[piece], targets[piece], output))
        return total, len(targets)

    def autocast(self, batch: Batch) -> torch.autocast:
        return torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self._bf16)

    def pieces(self, rows: int) -> list[slice]:
        """So that the logits of one are not too many; one at least."""
        return [slice(begin, begin + self._rows) for begin in range(0, max(rows, 1), self._rows)]

    def decoded(self, batch: Batch, embedded: bool = False) -> Any:
        """The decoder's output. `embedded`: the batch has hidden states in the place of token ids."""
        given = {"inputs_embeds" if embedded else "input_ids": batch.input_ids}
        return self._decoder(**given, position_ids=batch.position_ids, use_cache=False)

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, type]:
        """Last hidden states [n, hidden] where something is learnt, their targets [n], and the kind of
        output that the head takes."""
        output = self.decoded(batch)
        wanted = batch.learning
        return output.last_hidden_state[wanted], batch.targets[wanted], type(output)

    def loss(self, rows: torch.Tensor, targets: torch.Tensor, output: type) -> torch.Tensor:
        """The sum over rows [n, hidden]."""
        loss: torch.Tensor = _CrossEntropy.apply(self._logits(rows, output).float(), targets)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def _makes_alone(self, output: type) -> bool:
        """Whether nothing but a mapped head makes logits: no adapter, scale, cap or bias."""
        head = self._causal.get_output_embeddings()
        if not isinstance(head, MappedLinear) or head.bias is not None:
            return False
        probe = torch.full((1, head.in_features), 7.0)
        return torch.equal(self._logits(probe, output), head(probe))

    def _logits(self, rows: torch.Tensor, output: type) -> torch.Tensor:
        """[n, vocabulary] of rows [n, hidden]."""
        ids = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)  # looked at by nobody
        self._done.output = output(last_hidden_state=rows[None])
        # The gradient of an index, `logits[0]`, would be a copy.
        logits: torch.Tensor = self._head(input_ids=ids, use_cache=False).logits.squeeze(0)
        self._done.output = None
        return logits
