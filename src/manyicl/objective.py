r"""The loss: which answers are targets, and over what it is a mean. In training only this file shifts by one.

    tokens       … \nAnswer:  positive  <|im_end|>  \n\n …
    shot                .        0          0        .        unshifted, as rows carry it
    predicts            0        0          .        .        these positions meet the vocabulary matrix, and no others

Only positions before a target token reach the output head, through the wrapped model's own forward, so that DDP and FSDP
see their hooks; the head is asked for losses chunk by chunk, so that logits of a whole row never exist at once.

Where several processes share a row (context parallelism), targets are shifted before the row is cut, and each position carries
its own: however a row is cut, the losses of its shards sum to those of the row, given attention that sees the whole of it.

Letters: B rows, T tokens, K kept positions (the union over the batch's rows), N = B · K, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyicl.attention import packed_arguments
from manyicl.config import ObjectiveConfig
from manyicl.errors import BudgetError, RecipeError

logger = logging.getLogger(__name__)

CHUNK_POSITIONS = 512
NUM_SHOT_BUCKETS = 16

Batch = dict[str, Tensor]


def shot_bucket_names() -> list[str]:
    """Names of the shot ranges in which losses are reported: 0, 1, 2-3, 4-7 and so on."""
    return ["0", "1", *(f"{2**power}-{2 ** (power + 1) - 1}" for power in range(1, NUM_SHOT_BUCKETS - 1))]


@dataclass(frozen=True)
class AnswerLosses:
    """Losses of one forward pass.

    Attributes:
        total: Weighted sum of token losses, with gradient; divide by the units of the whole optimizer step.
        shot_sums: Sum of token losses per shot bucket, [NUM_SHOT_BUCKETS], detached.
        shot_counts: Target tokens per shot bucket, [NUM_SHOT_BUCKETS].
    """

    total: Tensor
    shot_sums: Tensor
    shot_counts: Tensor


def select_targets(batch: Batch, name: str) -> Tensor:
    """The target mask [B, T], bool and unshifted: every answer's tokens, or those of each episode's last answer.

    Raises:
        BudgetError: a row has no target.
    """
    shot, episode = batch["shot"], batch["episode"]
    mask = shot >= 0
    if name == "last_answer":
        last = torch.full((int(episode.max()) + 1,), -1, dtype=shot.dtype, device=shot.device)
        last.scatter_reduce_(0, episode[mask], shot[mask], reduce="amax")
        mask = mask & (shot == last[episode.clamp(min=0)])
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise BudgetError(
            f"row(s) {empty} of a batch of {mask.shape[0]} x {mask.shape[1]} tokens have no target. Raise episodes.max_tokens."
        )
    return mask


def count_units(batch: Batch, config: ObjectiveConfig) -> Tensor:
    """How many units (target tokens, answers or episodes) a batch's loss is a mean over: int64 scalar."""
    mask = select_targets(batch, config.name)
    if config.normalisation == "token":
        return mask.sum()
    numbers = _answer_numbers(batch) if config.normalisation == "answer" else batch["episode"]
    return torch.tensor(numbers[mask].unique().numel(), device=mask.device)


def answer_losses(model: nn.Module, batch: Batch, config: ObjectiveConfig, *, in_head: bool) -> AnswerLosses:
    """Losses of the targets of a batch.

    Args:
        model: The model as it is called in training, wrapped or not.
        in_head: Whether losses are computed inside the output head, chunk by chunk (see `head_can_return_losses`).
    """
    mask = select_targets(batch, config.name)
    kept = mask[:, 1:].any(dim=0).nonzero().flatten()
    targets = batch["input_ids"][:, kept + 1]
    losses = _token_losses(model, batch, kept, targets, in_head=in_head)
    chosen = mask[:, kept + 1]
    losses = losses.masked_fill(~chosen, 0.0)
    weights = _weights(batch, mask, config.normalisation)[:, kept + 1]
    if config.name == "reweighted":
        weights = weights * _shot_weights(losses.detach(), batch, mask, kept, config)
    return _add_up(losses, weights, batch["shot"][:, kept + 1], chosen)


def shift_targets(batch: Batch, config: ObjectiveConfig, *, multiple: int = 1) -> Batch:
    r"""A batch in which each position carries what it is trained to predict, so that rows can be cut anywhere.

        input_ids    … \nAnswer:   positive    <|im_end|>  \n\n …
        target         positive    <|im_end|>    \n\n      …        the token after it
        shot             0             0          -1       -1       of the target, -1 for none
        weight           1             1           0        0       fp32, 0 for none

    Args:
        multiple: Rows are padded at their end, without targets, to a multiple of so many tokens.

    Raises:
        BudgetError: a row holds several sequences, which a process that has a part of the row could not keep apart.
        RecipeError: the weights of the objective come from losses of the whole row.
    """
    check_can_be_cut(batch, config)
    mask = select_targets(batch, config.name)
    length = mask.shape[1]
    added = -length % multiple
    weight = _weights(batch, mask, config.normalisation)
    shot = torch.where(mask, batch["shot"], -1)
    positions = torch.arange(length + added, device=mask.device).expand(mask.shape[0], -1)
    pad = nn.functional.pad
    return {
        "input_ids": pad(batch["input_ids"], (0, added)),
        "position_ids": positions.contiguous(),
        "target": pad(batch["input_ids"][:, 1:], (0, added + 1)),
        "shot": pad(shot[:, 1:], (0, added + 1), value=-1),
        "weight": pad(weight[:, 1:], (0, added + 1)),
    }


def check_can_be_cut(batch: Batch, config: ObjectiveConfig) -> None:
    """Whether rows can be shared between processes; see `shift_targets` for what it raises."""
    episode = batch["episode"]
    if bool(((episode >= 0) & (episode != episode[:, :1])).any()):
        raise BudgetError("context parallelism needs rows of one sequence each. Set episodes.pack to false.")
    if config.name == "reweighted":
        raise RecipeError("context parallelism does not go with objective.name = reweighted. Choose another objective.")


def shard_losses(model: nn.Module, shard: Batch, *, in_head: bool) -> AnswerLosses:
    """Losses of the targets of one shard of a batch from `shift_targets`."""
    kept = (shard["weight"] > 0).any(dim=0).nonzero().flatten()
    if not kept.numel():
        kept = torch.zeros(1, dtype=torch.long, device=kept.device)  # The model runs all the same: other processes wait for it.
    losses = _token_losses(model, shard, kept, shard["target"][:, kept], in_head=in_head)
    weights = shard["weight"][:, kept]
    chosen = weights > 0
    return _add_up(losses.masked_fill(~chosen, 0.0), weights, shard["shot"][:, kept], chosen)


def _add_up(losses: Tensor, weights: Tensor, shots: Tensor, chosen: Tensor) -> AnswerLosses:
    """Losses [B, K] of kept positions, with their weights, shots and whether they are targets, added up."""
    shots, own = shots[chosen], losses.detach()[chosen]
    buckets = torch.where(shots > 0, shots.clamp(min=1).double().log2().floor().long() + 1, 0).clamp(max=NUM_SHOT_BUCKETS - 1)
    zeros = torch.zeros(NUM_SHOT_BUCKETS, device=losses.device)
    return AnswerLosses(
        total=(losses * weights).sum(),
        shot_sums=zeros.index_add(0, buckets, own),
        shot_counts=zeros.index_add(0, buckets, torch.ones_like(own)),
    )


def _token_losses(model: nn.Module, batch: Batch, kept: Tensor, targets: Tensor, *, in_head: bool) -> Tensor:
    """Negative log-probability [B, K] of `targets`, fp32."""
    arguments = {"input_ids": batch["input_ids"], "use_cache": False, "logits_to_keep": kept}
    # transformers sees packed sequences from positions that restart; a row of one sequence without padding needs none, and
    # takes the fast causal kernel. A shard does not start at 0.
    if "episode" not in batch or bool((batch["episode"] != batch["episode"][:, :1]).any()):
        arguments["position_ids"] = batch["position_ids"]
        if "episode" in batch:
            arguments |= packed_arguments(_unwrap(model), batch["episode"])
    if not in_head:
        logits = model(**arguments).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    with _head_returns_losses(model, targets):
        losses: Tensor = model(**arguments).logits
    return losses.view(targets.shape)


@contextmanager
def _head_returns_losses(model: nn.Module, targets: Tensor) -> Iterator[None]:
    """Inside the block the output head returns losses [B, K, 1] of `targets` [B, K] in place of logits."""
    head = _unwrap(model).get_output_embeddings()  # type: ignore[operator]
    forward = head.forward

    def losses_of(hidden: Tensor) -> Tensor:
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()
        if flat.shape[0] <= CHUNK_POSITIONS:
            return _chunk_losses(forward, flat, flat_targets).view(*targets.shape, 1)
        chunks = [
            checkpoint(
                _chunk_losses,
                forward,
                flat[start : start + CHUNK_POSITIONS],
                flat_targets[start : start + CHUNK_POSITIONS],
                use_reentrant=False,
            )
            for start in range(0, flat.shape[0], CHUNK_POSITIONS)
        ]
        return torch.cat(chunks).view(*targets.shape, 1)

    with _replaced_forward(head, losses_of):
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block `module` computes `forward`; a forward that another library has put there comes back afterwards."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _chunk_losses(forward: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(forward(hidden).float(), targets, reduction="none")


def _unwrap(model: nn.Module) -> nn.Module:
    inner = getattr(model, "module", None)
    return _unwrap(inner) if isinstance(inner, nn.Module) else model


@torch.no_grad()
def head_can_return_losses(model: nn.Module) -> bool:
    """Whether the model returns what its output head returns, so that the head may return losses in place of logits.

    Models that alter their logits after the head (soft-capping, a logit scale) do not: those train on whole logits, and one
    message says so. The head is made to return whole numbers from -100 to 100 (exact in every dtype), since soft-capping hardly
    shows in the small logits of an untrained model. Costs one pass over eight tokens.
    """
    device = next(model.parameters()).device
    head = _unwrap(model).get_output_embeddings()  # type: ignore[operator]
    known = torch.arange(head.weight.shape[0], device=device) % 201 - 100
    was_training = model.training
    model.eval()
    with _replaced_forward(head, lambda hidden: known.to(hidden.dtype).expand(*hidden.shape[:-1], -1)):
        logits = model(input_ids=torch.arange(3, 11, device=device).unsqueeze(0), use_cache=False).logits
    model.train(was_training)
    unaltered = bool(torch.equal(logits, known.to(logits.dtype).expand_as(logits)))
    if not unaltered:
        logger.warning(
            "the model alters its logits after the output head: losses are computed from whole logits, which takes more memory"
        )
    return unaltered


def _answer_numbers(batch: Batch) -> Tensor:
    """A number [B, T] for each answer of the batch, 0 where a token belongs to none."""
    shot = batch["shot"]
    return torch.where(shot >= 0, batch["episode"].clamp(min=0) * (shot.max() + 1) + shot + 1, 0)


def _weights(batch: Batch, mask: Tensor, normalisation: str) -> Tensor:
    """Weight [B, T] of each target token; their sum is the number of units."""
    if normalisation == "token":
        return mask.float()
    numbers = _answer_numbers(batch) if normalisation == "answer" else batch["episode"].clamp(min=0)
    sizes = torch.bincount(numbers[mask])
    return torch.where(mask, 1.0 / sizes.clamp(min=1)[numbers.clamp(max=sizes.numel() - 1)], 0.0)


def _shot_weights(losses: Tensor, batch: Batch, mask: Tensor, kept: Tensor, config: ObjectiveConfig) -> Tensor:
    """Weight [B, K] of each target by how its answer's loss compares with the shots before it, in the manner of DrICL.

    For answer k with mean token loss l_k:  A_k = mean(l_{k-w} … l_{k-1}) - l_k,  weight_k = exp(clip(A_k, -2, 2) / temperature),
    scaled to mean one within the episode; the first answer has A_0 = 0. An answer that is much harder than those before it (a
    noisy demonstration) counts less. After arXiv 2501.04070, whose advantages come from a second, zero-shot forward pass and
    sampled windows; here the shots before an answer in the same pass take that place.
    """
    numbers = _answer_numbers(batch)[:, kept + 1]
    episodes, chosen = batch["episode"][:, kept + 1], mask[:, kept + 1]
    size = int(numbers.max()) + 1
    sums = torch.zeros(size, device=losses.device).index_add(0, numbers[chosen], losses[chosen])
    means = sums / torch.bincount(numbers[chosen], minlength=size).clamp(min=1)
    weights = torch.ones(size, device=losses.device)
    for episode in episodes[chosen].unique().tolist():
        answers = numbers[chosen & (episodes == episode)].unique()
        own = means[answers]
        baseline = torch.stack([own[max(0, k - config.reweight_window) : k].mean() if k else own[0] for k in range(len(own))])
        raw = torch.exp((baseline - own).clamp(-2.0, 2.0) / config.reweight_temperature)
        weights[answers] = raw / raw.mean()
    return weights[numbers]
