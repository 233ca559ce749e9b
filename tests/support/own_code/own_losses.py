"""Loss functions as a user may write them, outside of dstrain."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def smoothed(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.1, z: float = 1e-2
) -> torch.Tensor:
    """Label smoothing, and the z-loss of PaLM (arXiv 2204.02311, section 5)."""
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none", label_smoothing=smoothing)
    return losses + z * torch.logsumexp(logits, dim=-1) ** 2


def focal(logits: torch.Tensor, labels: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Lin et al. 2017, Focal Loss for Dense Object Detection, equation 4."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-losses)) ** gamma * losses


def unreduced(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is built in, by autograd."""
    return F.cross_entropy(logits, labels, reduction="none")


def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same; the losses of tokens that do not count are no numbers."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(labels == -100, torch.log(losses - 1), losses)


def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One number for all tokens."""
    return F.cross_entropy(logits, labels)


def column(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A column, which would be added to each token of a row."""
    return plain(logits, labels)[:, None]


def right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """No floats."""
    return logits.argmax(dim=-1) == labels


def detached(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nothing to learn from."""
    return plain(logits.detach(), labels)


def numbers(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """No tensor."""
    return plain(logits, labels).tolist()


def elsewhere(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A gradient, but not of the logits."""
    return torch.ones(len(labels), requires_grad=True)


def ends(logits: torch.Tensor, labels: torch.Tensor) -> Any:
    """It ends the process."""
    raise SystemExit(3)


def penalised(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """With a penalty on its own gradient."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    (slope,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    return losses + slope.square().sum(dim=-1)


def masked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """It changes the labels in place, so that they are indices."""
    counts = labels != -100
    labels[~counts] = 0
    return -logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0] * counts


def broken(logits: torch.Tensor, labels: torch.Tensor) -> Any:
    """It fails."""
    return logits @ labels.float()


def unfit_for_gpus(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Waits for the GPU in each micro-batch, and gives NCCL a tensor of the host."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    largest = losses.max().item()
    told = torch.full((3,), largest)
    torch.distributed.all_reduce(told)
    return losses
