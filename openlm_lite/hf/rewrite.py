"""The same function in another form: what lets a class hold an architecture that is not its own.

Each rewrite changes one field of the architecture, and the weights so that no logit changes:

    rope_style      interleaved -> half   the rows of wq and wk (and qk-norm's gains) reordered
    embedding_norm  true -> false         the norm applied to the table: it sees nothing but a token
    norm            layer_norm -> rms_norm
        LayerNorm(x) = RMSNorm(x - mean(x)). The residual stream is only ever read through norms,
        so the mean over D is taken out of everything that writes to it (tables, wo, w_down and
        their biases), and the stream has mean zero. In the same way the rows of wq and wk are
        centred for qk-norm. Not where norms have a bias, nor where they stand behind attention
        and feed-forward network.
    norm_gain       false -> true         ones
    norm_bias       false -> true         zeros
    attn_bias       none -> qkv -> all    zeros
    mlp_bias        false -> true         zeros
    block           parallel_shared_norm -> parallel    the norm twice

The first three untie a tied head where they change the table. `undo` is the way back, for weights
that a rewrite made; it says so where they were changed since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openlm_lite.hf.layouts import parameter_shapes
from openlm_lite.hf.weights import Weights
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.layers import Norm

_ROUNDING = 1e-5
"""a difference this small, against the largest weight of the tensor, is rounding"""


class CannotUndoError(Exception):
    """The weights are not what this rewrite makes."""


@dataclass(frozen=True)
class Rewrite:
    """`before` became `after`.

    `tensor` and `back` make one tensor of the other form; `check` raises CannotUndoError where the
    weights of `after` are not such that `back` gives the same function.
    """

    before: ModelConfig
    after: ModelConfig
    tensor: Callable[[Weights, str], Tensor]
    back: Callable[[Weights, str], Tensor]
    check: Callable[[Weights], None]

    def apply(self, weights: Weights) -> Weights:
        """The weights of `after`, made when read."""
        return Weights(
            weights.place, parameter_shapes(self.after), lambda name: self.tensor(weights, name)
        )

    def undo(self, weights: Weights) -> Weights:
        """The weights of `before`, made when read. Raises CannotUndoError."""
        self.check(weights)
        return Weights(
            weights.place, parameter_shapes(self.before), lambda name: self.back(weights, name)
        )


def rewrite(cfg: ModelConfig, field: str, value: object) -> Rewrite | None:
    """The rewrite of `cfg` that makes `field` be `value`; None where there is none."""
    way = {
        ("rope_style", "half"): _to_half,
        ("embedding_norm", False): _fold_embedding_norm,
        ("norm", "rms_norm"): _centre,
        ("norm_gain", True): _fill,
        ("norm_bias", True): _fill,
        ("attn_bias", "qkv"): _fill,
        ("attn_bias", "all"): _fill,
        ("mlp_bias", True): _fill,
        ("block", "parallel"): _split_norm,
    }.get((field, value))
    return None if way is None else way(cfg, field, value)


def _copy(weights: Weights, name: str) -> Tensor:
    return weights[name]


def _nothing_to_check(_weights: Weights) -> None:
    return None


# --- rope_style ----------------------------------------------------------------------------------


def _to_half(cfg: ModelConfig, _field: str, _value: object) -> Rewrite:
    H, R = cfg.head_dim, cfg.rotary_dim
    order = torch.cat((torch.arange(0, R, 2), torch.arange(1, R, 2), torch.arange(R, H)))

    def reordered(order_H: Tensor) -> Callable[[Weights, str], Tensor]:
        def tensor(weights: Weights, name: str) -> Tensor:
            weight = weights[name]
            if not _is_per_query_or_key(name):
                return weight
            return weight.reshape(-1, H, *weight.shape[1:])[:, order_H].reshape(weight.shape)

        return tensor

    after = replace(cfg, rope_style="half")
    return Rewrite(cfg, after, reordered(order), reordered(order.argsort()), _nothing_to_check)


def _is_per_query_or_key(name: str) -> bool:
    return any(f".{part}." in name for part in ("wq", "wk", "q_norm", "k_norm"))


# --- embedding_norm ------------------------------------------------------------------------------


def _fold_embedding_norm(cfg: ModelConfig, _field: str, _value: object) -> Rewrite | None:
    if not cfg.embedding_norm or cfg.positions == "learned":  # positions are added before it
        return None

    def tensor(weights: Weights, name: str) -> Tensor:
        if name == "output.weight":
            return weights[_head_name(cfg)]
        if name != "embedding.weight":
            return weights[name]
        norm = Norm(cfg, cfg.d_model)
        for part, parameter in norm.named_parameters():
            parameter.data = weights[f"embedding_norm.{part}"]
        with torch.no_grad():
            return norm(weights[name])

    def check(_weights: Weights) -> None:
        raise CannotUndoError("the embedding norm is part of the table")

    after = replace(cfg, embedding_norm=False, tie_embeddings=False)
    return Rewrite(cfg, after, tensor, _copy, check)


def _head_name(cfg: ModelConfig) -> str:
    return "embedding.weight" if cfg.tie_embeddings else "output.weight"


# --- norm ----------------------------------------------------------------------------------------


def _centre(cfg: ModelConfig, _field: str, _value: object) -> Rewrite | None:
    if cfg.norm_bias or cfg.embedding_norm or cfg.block == "sequential_post_norm":
        return None

    def tensor(weights: Weights, name: str) -> Tensor:
        if name == "output.weight":
            return weights[_head_name(cfg)]
        weight = weights[name]
        return weight if _centred_dim(cfg, name) is None else weight - _mean(cfg, name, weight)

    def check(weights: Weights) -> None:
        for name in weights:
            if _centred_dim(cfg, name) is None:
                continue
            weight = weights[name]
            if _mean(cfg, name, weight).abs().max() > _ROUNDING * weight.abs().max():
                raise CannotUndoError(f"{name} does not have mean zero")
        if cfg.tie_embeddings:
            head, table = weights["output.weight"], weights["embedding.weight"]
            centred = head - _mean(cfg, "embedding.weight", head)
            if (centred - table).abs().max() > _ROUNDING * head.abs().max():
                raise CannotUndoError("the head is not the embedding's")

    def back(weights: Weights, name: str) -> Tensor:
        tied_table = name == "embedding.weight" and cfg.tie_embeddings
        return weights["output.weight" if tied_table else name]

    after = replace(cfg, norm="rms_norm", tie_embeddings=False)
    return Rewrite(cfg, after, tensor, back, check)


def _centred_dim(cfg: ModelConfig, name: str) -> int | None:
    """The dimension whose mean is taken out: of writers to the stream, and of q and k."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module in ("embedding", "position_embedding"):
        return 1  # [rows, D]
    if module in ("wo", "w_down"):
        return 0  # [D, in], bias [D]
    return 0 if module in ("wq", "wk") and cfg.qk_norm != "none" else None


def _mean(cfg: ModelConfig, name: str, weight: Tensor) -> Tensor:
    """The mean that centring takes out of `weight`, in its shape; computed in fp64."""
    wide = weight.double()
    if cfg.qk_norm == "per_head" and _is_per_query_or_key(name):
        heads = wide.reshape(-1, cfg.head_dim, *weight.shape[1:])
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(weight.shape).float()
    dim = _centred_dim(cfg, name)
    assert dim is not None
    return wide.mean(dim, keepdim=True).expand_as(wide).float()


# --- gains, biases, the second norm --------------------------------------------------------------


def _fill(cfg: ModelConfig, field: str, value: object) -> Rewrite | None:
    if field == "norm_bias" and cfg.norm == "rms_norm":
        return None
    if (field, value) == ("attn_bias", "qkv") and cfg.attn_bias == "all":
        return None
    after = replace(cfg, **{field: value})
    added = parameter_shapes(after).keys() - parameter_shapes(cfg).keys()
    neutral = 1.0 if field == "norm_gain" else 0.0

    def tensor(weights: Weights, name: str) -> Tensor:
        if name in added:
            return torch.full(parameter_shapes(after)[name], neutral)
        return weights[name]

    def check(weights: Weights) -> None:
        for name in added:
            if not weights[name].eq(neutral).all():
                raise CannotUndoError(f"{name} is not {neutral:g} everywhere")

    return Rewrite(cfg, after, tensor, _copy, check)


def _split_norm(cfg: ModelConfig, _field: str, _value: object) -> Rewrite | None:
    if cfg.block != "parallel_shared_norm":
        return None

    def tensor(weights: Weights, name: str) -> Tensor:
        return weights[name.replace(".ffn_norm.", ".attention_norm.")]

    def check(weights: Weights) -> None:
        for name in weights:
            if ".ffn_norm." in name:
                other = name.replace(".ffn_norm.", ".attention_norm.")
                if not torch.equal(weights[name], weights[other]):
                    raise CannotUndoError(f"{name} is not {other}")

    return Rewrite(cfg, replace(cfg, block="parallel"), tensor, _copy, check)
