"""The architecture as data: sizes and switches, and the counts that follow. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openlm_lite.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only architecture. A file in `model_configs/` names every field.

    `norm_gain` and `norm_bias` make the three norms of the field: LayerNorm with both, with the
    gain alone (DCLM), with neither (non-parametric, OLMo); RMSNorm has a gain and no bias.
    `qk_norm` normalises queries and keys before the rotary embedding with the model's own norm:
    `full` over all heads together (OpenLM, OLMo 2), `per_head` over each head (Qwen3).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    norm_gain: bool = True
    norm_bias: bool = False
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "full", "per_head"] = "none"
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise InputError("model: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What makes this architecture impossible, one sentence each."""
        found = []
        sizes = "vocab_size d_model n_layers n_heads n_kv_heads head_dim d_ff max_seq_len"
        for name in sizes.split():
            if getattr(self, name) < 1:
                found.append(f"{name} = {getattr(self, name)}, must be at least 1")
        if self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads:
            found.append(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            found.append(f"head_dim = {self.head_dim} is odd: rotary embedding turns pairs")
        if self.norm == "rms_norm" and self.norm_bias:
            found.append("norm = rms_norm has no bias: set norm_bias = false")
        if self.norm_eps <= 0:
            found.append(f"norm_eps = {self.norm_eps}, must be positive")
        if self.rope_theta <= 0:
            found.append(f"rope_theta = {self.rope_theta}, must be positive")
        return found

    @property
    def q_width(self) -> int:
        """Features of all query heads together, N*H."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Features of all key (or value) heads together, K*H."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_block_matrix_params(self) -> int:
        """Weights of the seven matrices of every block: what a token is multiplied with."""
        attention = self.d_model * (2 * self.q_width + 2 * self.kv_width)
        feed_forward = 3 * self.d_model * self.d_ff
        return self.n_layers * (attention + feed_forward)

    @property
    def n_norm_params(self) -> int:
        """Gains and biases of all norms."""
        per_feature = int(self.norm_gain) + int(self.norm_bias)
        qk_width = {
            "none": 0,
            "full": self.q_width + self.kv_width,
            "per_head": 2 * self.head_dim,
        }[self.qk_norm]
        return per_feature * (self.n_layers * (2 * self.d_model + qk_width) + self.d_model)

    @property
    def n_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        tables = 1 if self.tie_embeddings else 2
        embedding = self.vocab_size * self.d_model
        return tables * embedding + self.n_block_matrix_params + self.n_norm_params

    @property
    def n_params_non_embedding(self) -> int:
        """Parameters without the input embedding (a tied table is the output head: it stays)."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        return self.n_params - embedding

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token: 6 (block matrices + output head) + 12 L N H T.

        Forward and backward, no discount for the causal mask: the convention of PaLM
        (arXiv:2204.02311, appendix B), so that MFU compares with published figures.
        """
        matrices = self.n_block_matrix_params + self.vocab_size * self.d_model
        return 6 * matrices + 12 * self.n_layers * self.q_width * seq_len
