"""Documents inside a row: where they end, and which targets count.

    apply_masks(tokens, targets, cfg, eot_id)    a batch as read -> as trained on, its documents

A row of `row_tokens` tokens is row_tokens + 1 ids: the inputs and, shifted by one, the targets.
Here a packed row of ten tokens (E: the EOT, -: IGNORE_INDEX). Its documents a and b are whole; of
c, which is too long for a row, the first eleven ids c0 … c10 fill another one::

    ids        a0 a1 a2  E b0 b1  E  E c10 c11 E
    targets       a1 a2  E b0 b1  E  -  -  c11 E    nothing is learned of what a second EOT sets off
    doc ids     0  0  0  0  1  1  1  2  3   3       an EOT belongs to the document that it ends

Shapes: B batch, T position (seq_len).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openlm_lite.errors import InputError

# torch's cross_entropy leaves such targets out by default
IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What of a row is learned from, and what its tokens see."""

    document_masking: bool = False  # no attention from one document of a row to another
    eot_id: int | None = None  # what ends a document; null: the EOT of the dataset's tokenizer
    loss_mask_ids: tuple[int, ...] = ()  # targets with these ids are not learned from
    target_mask_left: int | None = None  # nor those up to the last target with this id
    target_mask_individual: int | None = None  # nor those with this id; it pads what is squashed
    squash_mask_left: bool = False  # target_mask_left's id is taken out, the rest moves up

    def __post_init__(self) -> None:
        problems = []
        for name in ("eot_id", "target_mask_left", "target_mask_individual"):
            if (getattr(self, name) or 0) < 0:
                problems.append(f"{name} = {getattr(self, name)}, must be a token id (0 or more)")
        if any(i < 0 for i in self.loss_mask_ids):
            problems.append(f"loss_mask_ids = {list(self.loss_mask_ids)}, must be token ids")
        left, individual = self.target_mask_left, self.target_mask_individual
        if self.squash_mask_left and (left is None or individual is None):
            problems.append(
                "squash_mask_left takes target_mask_left out and pads with target_mask_individual: "
                "give both"
            )
        if left is not None and left == individual:
            problems.append(f"target_mask_left and target_mask_individual are both {left}")
        if problems:
            raise InputError("data: " + "; ".join(problems))


class Masked(NamedTuple):
    """A batch as it is trained on."""

    tokens_BT: Tensor
    targets_BT: Tensor  # IGNORE_INDEX where nothing is learned
    doc_ids_BT: Tensor | None  # int32, never decreasing along a row; None: one document per row


def apply_masks(
    tokens_BT: Tensor,
    targets_BT: Tensor,
    cfg: MaskConfig,
    eot_id: int | None,
    *,
    packed: bool | Tensor = False,
) -> Masked:
    """What `cfg` makes of a batch; the given tensors are not written to.

    `eot_id` is the dataset's, None where it does not say. `packed`: the rows (or, boolean [B], some
    of them) come from a packed dataset, whose padding is not learned from.
    """
    if isinstance(packed, Tensor) or packed:
        padding_BT = _padding(tokens_BT, targets_BT, eot_of(cfg, eot_id))
        if isinstance(packed, Tensor):
            padding_BT &= packed[:, None]
        targets_BT = targets_BT.masked_fill(padding_BT, IGNORE_INDEX)
    if cfg.target_mask_left is not None:
        left = cfg.target_mask_left
        if cfg.squash_mask_left:
            assert cfg.target_mask_individual is not None
            tokens_BT, targets_BT = squash_left(
                tokens_BT, targets_BT, left, cfg.target_mask_individual
            )
        else:
            targets_BT = targets_BT.masked_fill(_up_to_last(targets_BT, left), IGNORE_INDEX)
    individual = () if cfg.target_mask_individual is None else (cfg.target_mask_individual,)
    for masked in (*cfg.loss_mask_ids, *individual):
        targets_BT = targets_BT.masked_fill(targets_BT == masked, IGNORE_INDEX)
    if not cfg.document_masking:
        return Masked(tokens_BT, targets_BT, None)
    return Masked(tokens_BT, targets_BT, document_ids(tokens_BT, eot_of(cfg, eot_id)))


def eot_of(cfg: MaskConfig, eot_id: int | None) -> int:
    """The id that ends a document: `cfg`'s, else the dataset's. InputError without either."""
    found = eot_id if cfg.eot_id is None else cfg.eot_id
    if found is None:
        raise InputError(
            "data.document_masking: the dataset does not say which id ends a document; set "
            "data.eot_id (OpenLM's and DCLM's shards have 0)"
        )
    return found


def document_ids(tokens_BT: Tensor, eot_id: int) -> Tensor:
    """Which document of its row each token belongs to, int32 [B, T], from 0.

    The EOT belongs to the document that it ends. A row that begins inside a document counts that
    as its document 0.
    """
    ends_BT = torch.nn.functional.pad(tokens_BT[:, :-1] == eot_id, (1, 0))
    return ends_BT.cumsum(dim=1, dtype=torch.int32)


def _padding(tokens_BT: Tensor, targets_BT: Tensor, eot_id: int) -> Tensor:
    """Targets of packed rows that no document has: EOT behind EOT, and what follows the second.

    A row that begins with an EOT begins with a second one.
    """
    ends_BT = tokens_BT == eot_id
    after_end_BT = torch.nn.functional.pad(ends_BT[:, :-1], (1, 0), value=True)
    return ends_BT & (after_end_BT | (targets_BT == eot_id))


def _up_to_last(ids_BT: Tensor, wanted: int) -> Tensor:
    """True up to the last `wanted` of each row, that one included; nowhere in a row without."""
    return (ids_BT == wanted).flip(1).cummax(dim=1).values.flip(1)


def squash_left(
    tokens_BT: Tensor, targets_BT: Tensor, left_id: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """OpenLM's --squash-mask-left: `left_id` taken out of both, `pad_id` at the end.

    Targets before the last `left_id` are masked. Exactly OpenLM, its quirk included: where a row of
    tokens begins with `left_id`, it has one more of them than the targets, and each target behind
    stands beside its own token instead of the one before.
    """
    taken_BT = targets_BT == left_id
    before_BT = _up_to_last(targets_BT, left_id) & ~taken_BT
    targets_BT = targets_BT.masked_fill(before_BT, IGNORE_INDEX)
    return (
        _without(tokens_BT, tokens_BT == left_id, pad_id),
        _without(targets_BT, taken_BT, pad_id),
    )


def _without(ids_BT: Tensor, taken_BT: Tensor, pad_id: int) -> Tensor:
    """The ids of each row that are not taken, moved up; `pad_id` behind them."""
    order_BT = taken_BT.int().argsort(dim=1, stable=True)
    padding_BT = taken_BT.gather(1, order_BT)
    return ids_BT.gather(1, order_BT).masked_fill(padding_BT, pad_id)
