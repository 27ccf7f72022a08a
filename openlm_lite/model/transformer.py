"""The model: one decoder-only Transformer, driven by its config. Read this file first.

Shapes: B batch, T position, D d_model, V vocab, H head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openlm_lite.errors import InputError
from openlm_lite.model.attention import (
    Attention,
    Branches,
    KVCache,
    Mask,
    branch_mask,
    causal_flex_mask,
    causal_mask,
    document_mask,
    positions_in_documents,
)
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.layers import FeedForward, Norm, rope_tables
from openlm_lite.model.loss import LossSums, linear_cross_entropy


class Block(nn.Module):
    """One block of the kind `cfg.block`; the residual stream x is only ever added to::

    sequential                           x ─┬─ norm ─ attention ─(+)─┬─ norm ─ ffn ─(+)─ x
                                            └─────────────────────┘  └──────────────┘

    sequential_post_norm (OLMo 2)        x ─┬─ attention ─ norm ─(+)─┬─ ffn ─ norm ─(+)─ x
                                            └─────────────────────┘  └──────────────┘

    parallel (GPT-NeoX)                  x ─┬─ norm ─ attention ─(+)─(+)─ x
                                            ├────────────────────┘    │
                                            └─ norm ─ ffn ────────────┘

    parallel_shared_norm (PaLM, Falcon)  x ─┬─ norm ─┬─ attention ─(+)─(+)─ x
                                            │        └─ ffn ────────┘   │
                                            └───────────────────────────┘
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.kind = cfg.block
        self.attention_norm = Norm(cfg, cfg.d_model)
        self.attention = Attention(cfg, layer)
        if cfg.block != "parallel_shared_norm":
            self.ffn_norm = Norm(cfg, cfg.d_model)
        self.feed_forward = FeedForward(cfg)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Mask | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if self.kind == "sequential_post_norm":
            x_BTD = x_BTD + self.attention_norm(self.attention(x_BTD, rope, mask, cache))
            return x_BTD + self.ffn_norm(self.feed_forward(x_BTD))
        h_BTD = self.attention_norm(x_BTD)
        if self.kind == "sequential":
            x_BTD = x_BTD + self.attention(h_BTD, rope, mask, cache)
            return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))
        g_BTD = self.ffn_norm(x_BTD) if self.kind == "parallel" else h_BTD
        return x_BTD + self.attention(h_BTD, rope, mask, cache) + self.feed_forward(g_BTD)


class Transformer(nn.Module):
    """Embedding, blocks, final norm, output head.

    Build it under `torch.device("meta")`, shard it, then `model.to_empty(device=…)` and
    `init_weights(model, seed)`: no rank ever holds the whole model. There are no buffers.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.causal_by_flex = False  # set by `kernels.set_attention`
        self._rope: dict[Any, tuple[Tensor, Tensor]] = {}
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.positions == "learned":
            self.position_embedding = nn.Embedding(cfg.max_seq_len, cfg.d_model)
        if cfg.embedding_norm:
            self.embedding_norm = Norm(cfg, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = Norm(cfg, cfg.d_model)
        if not cfg.tie_embeddings:
            self.output = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    @property
    def head_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into logits."""
        return self.embedding.weight if self.cfg.tie_embeddings else self.output.weight

    def _rope_tables(self, positions_T: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Computed once for all passes over the same positions.

        Not a buffer: no checkpoint holds it, no cast touches it. A table from inference mode may
        not enter a backward pass.
        """
        mode = torch.is_inference_mode_enabled()
        key = (start, positions_T.shape[0], positions_T.device, type(positions_T), mode)
        if key not in self._rope:
            self._rope = {key: rope_tables(positions_T, self.cfg)}  # the last one alone
        return self._rope[key]

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        z_weight: float | Tensor = 0.0,
        z_over_targets: bool = False,
        cache: KVCache | None = None,
        doc_ids_BT: Tensor | None = None,
        positions_T: Tensor | None = None,
        branches: Branches | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor | LossSums:
        """Logits [B, T, V] in fp32; with `targets_BT`, the loss sums instead (never all logits).

        `logits_at` (indices into the B * T positions) asks for those logits alone, [n, V].

        The loss is taken inside the forward pass because that is where FSDP2 holds the gathered
        head weight. With `cache`, `tokens_BT` continue what the cache holds.

        With `doc_ids_BT` (integers that never decrease along a row) each document of a row gives
        the logits that it gives alone. Learned positions begin anew in each; rotary embedding and
        ALiBi know distances only, and run on.

        `positions_T`: where the tokens stand in their row, for a rank that holds a part of it;
        None: side by side from the cache's length on.

        With `branches` each row of `tokens_BT` holds several continuations of what the cache has
        of that row, and none of them sees another. Their positions have to be below max_seq_len.
        """
        start = 0 if cache is None else cache.length
        T = tokens_BT.shape[1]
        if branches is None and start + T > self.cfg.max_seq_len:
            raise InputError(
                f"{start + T} positions are longer than max_seq_len = {self.cfg.max_seq_len}"
            )
        if cache is not None and doc_ids_BT is not None:
            raise InputError("a cache holds one document per row: doc_ids_BT cannot be given too")
        if branches is not None:
            positions_T = branches.positions_BT
        in_order = positions_T is None
        if positions_T is None:
            positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        rope = None
        if self.cfg.positions == "rope" and in_order:
            rope = self._rope_tables(positions_T, start)
        elif self.cfg.positions == "rope":
            rope = rope_tables(positions_T, self.cfg)

        x_BTD = self.embedding(tokens_BT)
        if self.cfg.positions == "learned":
            known = positions_T if doc_ids_BT is None else positions_in_documents(doc_ids_BT)
            x_BTD = x_BTD + self.position_embedding(known)
        if self.cfg.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        if branches is not None:
            mask = branch_mask(self.cfg, branches, x_BTD.dtype)
        elif doc_ids_BT is None and self.causal_by_flex and cache is None:
            mask = causal_flex_mask(self.cfg, T, x_BTD.device)
        elif doc_ids_BT is None:
            mask = causal_mask(self.cfg, start, T, x_BTD.device, x_BTD.dtype)
        else:
            mask = document_mask(self.cfg, doc_ids_BT, x_BTD.dtype)
        for block in self.layers:
            x_BTD = block(x_BTD, rope, mask, cache)
        x_BTD = self.norm(x_BTD)
        if cache is not None:
            cache.length += T

        if targets_BT is None:
            if logits_at is not None:
                x_BTD = x_BTD.flatten(0, 1)[logits_at]
            return (x_BTD @ self.head_weight_VD.t()).float()
        return linear_cross_entropy(
            x_BTD.flatten(0, 1),
            self.head_weight_VD,
            targets_BT.flatten(),
            z_weight=z_weight,
            z_over_targets=z_over_targets,
        )
