"""Every architecture of openlm_lite, and OpenLM's own, as transformers classes in one file.

The file travels with the weights (beside `openlm_fields.py`); it needs torch and transformers 5.
Parameters have the names of OpenLM's Hugging Face export, so that released weights load unchanged:

    model.tok_embeddings.weight                              [V, D]
    model.position_embeddings.weight                         [max_seq_len, D]   learned positions
    model.post_embed_norm.{weight,bias}                      [D]                embedding_norm
    model.layers.i.attention_norm.{weight,bias}              [D]
    model.layers.i.attention.in_proj.{weight,bias}           [(N + 2K) H, D]    rows q, then k, v
    model.layers.i.attention.{q_norm,k_norm}.{weight,bias}   [N H], [K H] full; [H] per_head
    model.layers.i.attention.out_proj.{weight,bias}          [D, N H]
    model.layers.i.ffn_norm.{weight,bias}                    [D]     not in parallel_shared_norm
    model.layers.i.feed_forward.{w12,w3}.{weight,bias}       [2F, D] rows gate, then up; [D, F]
        of geglu, geglu_tanh: model.layers.i.feed_forward.{gate_proj,up_proj,down_proj}
        of gelu, gelu_tanh: model.layers.i.feed_forward.{0,2}; OpenLM's other names of these,
        model.layers.i.{_ff_w1,_ff_w2}, may stand in a file in their place, or beside them
    model.norm.{weight,bias}                                 [D]
    model.output.weight                                      [V, D]  absent from files where tied

OpenLM's `attention.pos_embed.inv_freq` is ignored. There are no buffers: transformers 5 leaves
those that are not in the file uninitialised, so rotary tables are computed in the forward pass.

Shapes: B batch, T position, S all positions seen, D d_model, F d_ff, V vocab, N query heads,
K kv heads, H head_dim, R rotary_dim (the features of a head that are turned).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .openlm_fields import AUTO_MAP, OPENLM_KEYS, model_fields

_OTHER_NAMES = {"_ff_w1": "feed_forward.0", "_ff_w2": "feed_forward.2"}
_OWN_MASK = "openlm"  # key of the masks that `create_masks_for_generate` makes


class OpenLMConfig(PretrainedConfig):
    """The fields of openlm_lite's `ModelConfig`, under their names.

    Reads OpenLM's spellings too (`openlm_fields.py`) and saves ours. Raises ValueError for
    architectures that neither has.
    """

    model_type = "openlm"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference = ["past_key_values"]
    has_no_defaults_at_init = True  # transformers before 5.23 would ask for OpenLMConfig()
    _auto_class = "AutoConfig"  # save_pretrained copies the code into the folder

    def __init__(self, **kwargs: Any) -> None:
        if "d_model" not in kwargs and "hidden_size" not in kwargs:
            kwargs.pop("tie_word_embeddings", None)  # transformers' default: OpenLM ties by its own
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                value = kwargs.pop(theirs)
                if kwargs.setdefault(ours, value) != value:
                    raise ValueError(
                        f"{ours} = {kwargs[ours]!r} and {theirs} = {value!r} contradict each other"
                    )
        fields = model_fields(kwargs)
        for name, value in fields.items():
            setattr(self, name, value)
        rest = {k: v for k, v in kwargs.items() if k not in fields and k not in OPENLM_KEYS}
        rest.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**rest)

    @property
    def rotary_dim(self) -> int:
        """Features of each head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_pct)


# --- layers --------------------------------------------------------------------------------------


class OpenLMNorm(nn.Module):
    """LayerNorm or RMSNorm over the last `width` features, with or without gain and bias."""

    def __init__(self, config: OpenLMConfig, width: int) -> None:
        super().__init__()
        self.kind, self.eps, self.shape = config.norm, config.norm_eps, (width,)
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms_norm":
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def rope_tables(positions_BT: Tensor, config: OpenLMConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/R), each [B, T, R] in fp32; the R/2 stand twice."""
    R = config.rotary_dim
    exponents = torch.arange(0, R, 2, device=positions_BT.device, dtype=torch.float32) / R
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_freq_dtype == "bf16":
        frequencies = frequencies.bfloat16().float()
    angles = positions_BT[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BTNH: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    """Turn the first R features of each head, in fp32; feature i pairs with i + R/2.

    `interleaved` pairs 2i with 2i + 1: these are put side by side as halves and stay so, which
    queries and keys share.
    """
    R = cos_BTR.shape[-1]
    x, rest = x_BTNH[..., :R].float(), x_BTNH[..., R:]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    x, partner = torch.cat((first, second), dim=-1), torch.cat((-second, first), dim=-1)
    turned = x * cos_BTR[:, :, None] + partner * sin_BTR[:, :, None]
    return torch.cat((turned.to(x_BTNH.dtype), rest), dim=-1)


class SwiGLU(nn.Module):
    """w3(silu(gate) * up), gate and up in one matrix."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.d_model, 2 * config.d_ff, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.w12(x_BTD).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class GEGLU(nn.Module):
    """down_proj(gelu(gate_proj) * up_proj)."""

    def __init__(self, config: OpenLMConfig, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x_BTD), approximate=self.approximate)
        return self.down_proj(gate * self.up_proj(x_BTD))


def feed_forward_of(config: OpenLMConfig) -> nn.Module:
    """The network of `config.activation`."""
    if config.activation == "swiglu":
        return SwiGLU(config)
    approximate = "tanh" if config.activation.endswith("tanh") else "none"
    if config.activation.startswith("geglu"):
        return GEGLU(config, approximate)
    return nn.Sequential(
        nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias),
        nn.GELU(approximate=approximate),
        nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias),
    )


# --- attention -----------------------------------------------------------------------------------


def alibi_slopes(n_heads: int, bias_max: float) -> list[float]:
    """What each head subtracts from a score per position of distance (arXiv:2108.12409).

    2^(-bias_max n / N), n = 1 … N; where n_heads is no power of two, N is the next one, and every
    second slope comes first.
    """
    n = 1 << (n_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * i / n) for i in range(1, n + 1)]
    return slopes if n == n_heads else (slopes[1::2] + slopes[::2])[:n_heads]


def attention_mask_of(
    config: OpenLMConfig, given: Any, cache: Cache | None, x_BTD: Tensor
) -> Tensor | None:
    """What the attention backend takes as mask for the T positions of x after those in `cache`.

    `given` is [B, S] with 0 at padding, or [B, 1, T, S] (boolean, or added to the scores), or what
    `create_masks_for_generate` made. eager gets a mask to add; sdpa a boolean one, or None where
    all is plainly causal; ALiBi is a mask to add for both, its distances counted in slots, padding
    too; other backends mask for themselves and get [B, S] where there is padding.
    A position of padding sees itself, so that no row is empty (NaN would spread through the
    values). Raises ValueError for masks that do not fit and backends without ALiBi.
    """
    backend, is_alibi = config._attn_implementation, config.positions == "alibi"
    if is_alibi and backend not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation = {backend!r} cannot add ALiBi to the scores; "
            "load this model with attn_implementation = 'sdpa' or 'eager'"
        )
    if isinstance(given, dict):
        return given[_OWN_MASK]
    if given is not None and given.dim() == 4:
        return _four_dimensional(given, is_alibi, backend, x_BTD.dtype)
    if backend not in ("eager", "sdpa"):
        return given if _has_padding(given) else None

    T, device = x_BTD.shape[1], x_BTD.device
    start = cache.get_seq_length() if cache is not None else 0  # of a static cache: a tensor
    static = cache if cache is not None and cache.is_compileable else None
    S = start + T if static is None else static.get_mask_sizes(T, 0)[0]
    if given is not None and (given.shape[-1] > S or (static is None and given.shape[-1] != S)):
        raise ValueError(
            f"attention_mask covers {given.shape[-1]} positions, must cover all {S}: "
            f"those in the cache and the {T} new ones"
        )
    is_padded = _has_padding(given)
    if backend == "sdpa" and not is_alibi and not is_padded and static is None and T in (1, S):
        return None  # sdpa is causal by itself, or the one new position sees everything

    query_T, key_S = start + torch.arange(T, device=device), torch.arange(S, device=device)
    distance_TS = query_T[:, None] - key_S
    seen = (distance_TS >= 0)[None, None]  # [B or 1, 1, T, S]
    if given is not None and is_padded:
        real_BS = F.pad(given.to(device).bool(), (0, S - given.shape[-1]))
        seen = seen & real_BS[:, None, None, :] | (distance_TS == 0)
    if backend == "sdpa" and not is_alibi:
        return seen
    bias = torch.zeros((), device=device)
    if is_alibi:
        slopes_N = torch.tensor(alibi_slopes(config.n_heads, config.alibi_bias_max), device=device)
        bias = -slopes_N[:, None, None] * distance_TS.float()
    return _additive(seen, x_BTD.dtype, bias)


def _has_padding(mask_BS: Tensor | None) -> bool:
    if mask_BS is None:
        return False
    # a compiled graph cannot look, and then takes the general way
    return torch.compiler.is_compiling() or not bool(mask_BS.all())


def _additive(seen: Tensor, dtype: torch.dtype, bias: Tensor) -> Tensor:
    return bias.to(dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _four_dimensional(
    mask: Tensor, is_alibi: bool, backend: str | None, dtype: torch.dtype
) -> Tensor:
    if is_alibi:
        raise ValueError(
            "attention_mask has 4 dimensions: with ALiBi the distances are unknown then; "
            "give [batch, positions]"
        )
    if backend == "eager" and mask.dtype == torch.bool:
        return _additive(mask, dtype, torch.zeros((), device=mask.device))
    return mask


def eager_attention(
    module: nn.Module,
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T scaling + mask) V as [B, T, N, H], and the softmax, taken in fp32."""
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = (t.repeat_interleave(groups, dim=1) for t in (k_BKSH, v_BKSH))
    scores_BNTS = q_BNTH @ k_BNSH.transpose(2, 3) * scaling + attention_mask
    precise = torch.promote_types(q_BNTH.dtype, torch.float32)
    weights_BNTS = scores_BNTS.softmax(dim=-1, dtype=precise).to(q_BNTH.dtype)
    return (weights_BNTS @ v_BNSH).transpose(1, 2), weights_BNTS


class OpenLMAttention(nn.Module):
    """Between projection and heads: qk-norm over all heads, then clip_qkv; on the heads: qk-norm of
    each, then rotary embedding. The backend is `config._attn_implementation`."""

    is_causal = True

    def __init__(self, config: OpenLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = config.head_dim**-0.5
        q_width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.widths = [q_width, kv_width, kv_width]
        in_bias, out_bias = config.attn_bias != "none", config.attn_bias == "all"
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=in_bias)
        self.out_proj = nn.Linear(q_width, config.d_model, bias=out_bias)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "per_head"
            self.q_norm = OpenLMNorm(config, config.head_dim if per_head else q_width)
            self.k_norm = OpenLMNorm(config, config.head_dim if per_head else kv_width)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        config, (B, T, _) = self.config, x_BTD.shape
        q, k, v = self.in_proj(x_BTD).split(self.widths, dim=-1)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.clip_qkv is not None:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        q, k, v = (t.view(B, T, -1, config.head_dim) for t in (q, k, v))
        if config.qk_norm == "per_head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (apply_rope(t, *rope, config.rope_style == "interleaved") for t in (q, k))

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # transformers reads the source for this call: without it set_attn_implementation only warns
        backend = config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention)
        y_BTNH, weights = attend(self, q, k, v, mask, scaling=self.scaling, **kwargs)
        return self.out_proj(y_BTNH.reshape(B, T, -1)), weights


class OpenLMBlock(GradientCheckpointingLayer):
    """One block: what it does to the residual stream is `config.block`."""

    def __init__(self, config: OpenLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.kind = config.block
        self.attention_norm = OpenLMNorm(config, config.d_model)
        self.attention = OpenLMAttention(config, layer_idx)
        if config.block != "parallel_shared_norm":
            self.ffn_norm = OpenLMNorm(config, config.d_model)
        self.feed_forward = feed_forward_of(config)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.kind == "sequential_post_norm":
            y_BTD, weights = self.attention(x_BTD, rope, mask, **kwargs)
            x_BTD = x_BTD + self.attention_norm(y_BTD)
            return x_BTD + self.ffn_norm(self.feed_forward(x_BTD)), weights
        h_BTD = self.attention_norm(x_BTD)
        y_BTD, weights = self.attention(h_BTD, rope, mask, **kwargs)
        if self.kind == "sequential":
            x_BTD = x_BTD + y_BTD
            return x_BTD + self.feed_forward(self.ffn_norm(x_BTD)), weights
        g_BTD = self.ffn_norm(x_BTD) if self.kind == "parallel" else h_BTD
        return x_BTD + y_BTD + self.feed_forward(g_BTD), weights


# --- models --------------------------------------------------------------------------------------


class OpenLMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about both models."""

    config: OpenLMConfig
    config_class = OpenLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"pos_embed\.inv_freq$"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        kwargs["key_mapping"] = _OTHER_NAMES | (kwargs.get("key_mapping") or {})
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal values of deviation 1/sqrt(fan-in), cut at 3; gains 1, biases 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = module.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, OpenLMNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def create_masks_for_generate(
        config: OpenLMConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **_: Any,
    ) -> dict[str, Tensor | None]:
        """`generate` asks for the whole mask ahead where a static cache lets it compile."""
        mask = attention_mask_of(config, attention_mask, past_key_values, inputs_embeds)
        return {_OWN_MASK: mask}


class OpenLMModel(OpenLMPreTrainedModel):
    """Embedding, blocks and final norm; `AutoModel`."""

    output: nn.Linear  # the head, where OpenLMForCausalLM adds it; else its tensor is ignored
    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"pos_embed\.inv_freq$", r"^(model\.)?output\.weight$"]

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embeddings = nn.Embedding(config.max_seq_len, config.d_model)
        if config.embedding_norm:
            self.post_embed_norm = OpenLMNorm(config, config.d_model)
        self.layers = nn.ModuleList(OpenLMBlock(config, i) for i in range(config.n_layers))
        self.norm = OpenLMNorm(config, config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states [B, T, D]. Without `position_ids`, padding on the left has none."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        output_hidden_states = _or(output_hidden_states, config.output_hidden_states)
        output_attentions = _or(output_attentions, config.output_attentions)
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation = {config._attn_implementation!r} keeps no attentions; "
                "load the model with attn_implementation = 'eager'"
            )
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a block that runs twice would write twice
        if _or(use_cache, getattr(config, "use_cache", True)) and past_key_values is None:
            past_key_values = DynamicCache(config=config)

        x_BTD = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = _positions(attention_mask, past_key_values, x_BTD)
        if config.positions == "learned":
            x_BTD = x_BTD + self._learned(position_ids)
        if config.embedding_norm:
            x_BTD = self.post_embed_norm(x_BTD)
        rope = rope_tables(position_ids, config) if config.positions == "rope" else None
        mask = attention_mask_of(config, attention_mask, past_key_values, x_BTD)

        states, attentions = [x_BTD], []
        kwargs |= {"past_key_values": past_key_values, "position_ids": position_ids}
        for layer in self.layers:
            x_BTD, weights = layer(x_BTD, rope, mask, **kwargs)
            states.append(x_BTD)
            attentions.append(weights)
        states[-1] = x_BTD = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _learned(self, position_ids: Tensor) -> Tensor:
        last = self.config.max_seq_len - 1
        if not torch.compiler.is_compiling() and int(position_ids.max()) > last:
            raise ValueError(
                f"position {int(position_ids.max())} is beyond the last learned one, {last} "
                f"(max_seq_len = {self.config.max_seq_len}); give a shorter text"
            )
        return self.position_embeddings(position_ids)


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _positions(mask: Any, cache: Cache | None, x_BTD: Tensor) -> Tensor:
    """[B, T]: counted by the padding mask where there is one, as `generate` counts them."""
    T = x_BTD.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:].to(x_BTD.device)
    start = cache.get_seq_length() if cache is not None else 0
    return (start + torch.arange(T, device=x_BTD.device))[None]


class OpenLMForCausalLM(OpenLMPreTrainedModel, GenerationMixin):
    """`OpenLMModel` with the head, which lies in it (`model.output`), as in OpenLM's files."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"model.output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        self.model = OpenLMModel(config)
        self.model.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.output = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in fp32: of the last `logits_to_keep` positions (0: all), or of those
        named. `labels` [B, T] are `input_ids` again, -100 where they do not count."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.output(outputs.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
