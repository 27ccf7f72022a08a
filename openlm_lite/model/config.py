"""The architecture as data: sizes and switches, and the counts that follow. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openlm_lite.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only architecture. A file in `model_configs/` names every field."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """key/value heads: n_heads is a multiple (1: multi-query attention)"""
    head_dim: int
    d_ff: int
    max_seq_len: int

    block: Literal["sequential", "sequential_post_norm", "parallel", "parallel_shared_norm"] = (
        "sequential"
    )
    """drawn in `transformer.Block`"""
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    norm_gain: bool = True
    norm_bias: bool = False
    """LayerNorm has gain and bias, the gain alone (DCLM), or neither (OLMo); RMSNorm no bias"""
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "full", "per_head"] = "none"
    """the model's norm over queries and over keys: over all heads together (OpenLM, OLMo 2), or
    over each head (Qwen3)"""
    embedding_norm: bool = False
    """the model's norm behind the embedding (BLOOM)"""

    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"] = "swiglu"
    """of the feed-forward network; the first three are gated, `tanh` is GELU's approximation"""
    mlp_bias: bool = False
    attn_bias: Literal["none", "qkv", "all"] = "none"
    """biases of the query, key and value projections; `all`: of the output projection too"""
    clip_qkv: float | None = None
    """queries, keys and values are clamped to [-clip_qkv, clip_qkv] (OLMo 7B 0424)"""

    positions: Literal["rope", "alibi", "learned", "none"] = "rope"
    rope_theta: float = 10_000.0
    rotary_pct: float = 1.0
    """the part of each head's features, from the first on, that is turned"""
    rope_style: Literal["half", "interleaved"] = "half"
    """which features make a pair: i and i + half (GPT-NeoX), or 2i and 2i + 1 (GPT-J, Meta)"""
    rope_freq_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 rounds the rotary frequencies, as OpenLM did in bf16 runs"""
    alibi_bias_max: float = 8.0
    """head n of N subtracts 2^(-alibi_bias_max n / N) per position (n from 1, N a power of 2)"""
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
        if self.positions == "rope" and (self.rotary_dim % 2 or self.rotary_dim < 2):
            found.append(
                f"head_dim = {self.head_dim} x rotary_pct = {self.rotary_pct} turns "
                f"{self.rotary_dim} features: rotary embedding turns pairs"
            )
        if not 0 < self.rotary_pct <= 1:
            found.append(f"rotary_pct = {self.rotary_pct}, must be above 0 and at most 1")
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            found.append(f"clip_qkv = {self.clip_qkv}, must be positive (null: no clipping)")
        if self.alibi_bias_max <= 0:
            found.append(f"alibi_bias_max = {self.alibi_bias_max}, must be positive")
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
    def rotary_dim(self) -> int:
        """Features of each head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network has a gate beside its up projection."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def norms_per_block(self) -> int:
        """Norms on the residual stream, without qk-norm."""
        return 1 if self.block == "parallel_shared_norm" else 2

    @property
    def n_block_matrix_params(self) -> int:
        """Weights of the matrices of every block: what a token is multiplied with."""
        attention = self.d_model * (2 * self.q_width + 2 * self.kv_width)
        feed_forward = (3 if self.is_gated else 2) * self.d_model * self.d_ff
        return self.n_layers * (attention + feed_forward)

    @property
    def n_bias_params(self) -> int:
        """Biases of the linear layers."""
        qkv = self.q_width + 2 * self.kv_width
        attention = {"none": 0, "qkv": qkv, "all": qkv + self.d_model}[self.attn_bias]
        feed_forward = (2 if self.is_gated else 1) * self.d_ff + self.d_model
        return self.n_layers * (attention + (feed_forward if self.mlp_bias else 0))

    @property
    def n_norm_params(self) -> int:
        """Gains and biases of all norms."""
        per_feature = int(self.norm_gain) + int(self.norm_bias)
        qk_width = {
            "none": 0,
            "full": self.q_width + self.kv_width,
            "per_head": 2 * self.head_dim,
        }[self.qk_norm]
        block = self.norms_per_block * self.d_model + qk_width
        ends = (2 if self.embedding_norm else 1) * self.d_model
        return per_feature * (self.n_layers * block + ends)

    @property
    def n_position_params(self) -> int:
        """Weights of the table of learned positions."""
        return self.max_seq_len * self.d_model if self.positions == "learned" else 0

    @property
    def n_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        tables = 1 if self.tie_embeddings else 2
        embedding = tables * self.vocab_size * self.d_model + self.n_position_params
        return embedding + self.n_block_matrix_params + self.n_bias_params + self.n_norm_params

    @property
    def n_params_non_embedding(self) -> int:
        """Parameters without the input embeddings (a tied table is the output head: it stays)."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        return self.n_params - embedding - self.n_position_params

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token: 6 (block matrices + output head) + 12 L N H T.

        Forward and backward, no discount for the causal mask: the convention of PaLM
        (arXiv:2204.02311, appendix B), so that MFU compares with published figures.
        """
        matrices = self.n_block_matrix_params + self.vocab_size * self.d_model
        return 6 * matrices + 12 * self.n_layers * self.q_width * seq_len
