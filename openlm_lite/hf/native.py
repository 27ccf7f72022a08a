"""Which class of transformers holds an architecture, and its config.json both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openlm_lite.errors import InputError
from openlm_lite.hf.families import BY_CLASS, DEFAULTS, FAMILIES, Family
from openlm_lite.hf.rewrite import Rewrite, rewrite
from openlm_lite.model.config import ModelConfig

# --- which class holds an architecture -----------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How well `family` holds an architecture: exactly, as `target`, where `misfits` is empty."""

    family: Family
    target: ModelConfig
    rewrites: tuple[Rewrite, ...]
    misfits: tuple[str, ...]


def fit(cfg: ModelConfig, family: Family) -> Fit:
    """`cfg` brought by rewrites to what the class holds, and what is left that it cannot hold."""
    done: list[Rewrite] = []
    misfits: list[str] = []
    target = cfg
    for name in _REWRITTEN_FIRST + tuple(n for n in DEFAULTS if n not in _REWRITTEN_FIRST):
        allowed, value = family.allowed(name), getattr(target, name)
        wanted = family.adjust(target).get(name)
        if wanted is not None and wanted != value:
            allowed = (wanted,)
        if allowed is None or value in allowed or not is_read(target, name):
            continue
        steps = (rewrite(target, name, other) for other in allowed)
        step = next((s for s in steps if s is not None), None)
        if step is None:
            held = ", ".join(_shown(a) for a in allowed)
            misfits.append(f"{name} = {_shown(value)}: it has {held}")
        else:
            done.append(step)
            target = step.after
    return Fit(family, target, tuple(done), (*misfits, *family.misfits(target)))


# A norm can only be changed, or get a bias, once the embedding norm is folded away.
_REWRITTEN_FIRST = ("rope_style", "embedding_norm", "norm")


def is_read(cfg: ModelConfig, name: str) -> bool:
    """Whether the field plays a part in what the model computes."""
    if name in ("rope_theta", "rotary_pct", "rope_style", "rope_freq_dtype"):
        return cfg.positions == "rope"
    return name != "alibi_bias_max" or cfg.positions == "alibi"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def best_fit(cfg: ModelConfig, hf_class: str | None = None) -> Fit:
    """The class that holds `cfg` with the fewest rewrites, or `hf_class`; look at `misfits`.

    Where none holds it, the one that misses it by the fewest fields. Raises InputError for a class
    that is not known.
    """
    if hf_class is not None:
        if hf_class not in BY_CLASS:
            raise InputError(f"no class {hf_class}: known are {', '.join(BY_CLASS)}")
        return fit(cfg, BY_CLASS[hf_class])
    fits = [fit(cfg, family) for family in FAMILIES]
    return min(fits, key=lambda f: (len(f.misfits), len(f.rewrites)))


# --- config.json ---------------------------------------------------------------------------------


def write_config(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that state the architecture `cfg`, which the class must hold.

    Rotary settings stand twice: transformers 5 reads `rope_parameters`; 4.x and llama.cpp read the
    old keys and silently take defaults where these are absent.
    """
    config: dict[str, Any] = {"architectures": [family.hf_class], "model_type": family.model_type}
    for key in family.keys:
        value = getattr(cfg, key.ours)
        if key.values is not None:
            value = next(theirs for theirs, ours in key.values.items() if ours == value)
        _set(config, key.theirs, value)
    for name, (value, _) in family.must.items():
        _set(config, name, value)
    config |= family.writes
    if family.hf_class == "FalconForCausalLM":
        config |= _falcon_keys(cfg)
    if cfg.positions == "rope":
        rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        config["rope_theta"], config["rope_scaling"] = cfg.rope_theta, None
        if family.rotary_key:
            rope["partial_rotary_factor"] = config[family.rotary_key] = cfg.rotary_pct
        if family.hf_class == "GPTNeoXForCausalLM":
            config["rotary_emb_base"] = cfg.rope_theta
        config["rope_parameters"] = rope
    return config


def _falcon_keys(cfg: ModelConfig) -> dict[str, Any]:
    new = cfg.block == "parallel" or cfg.n_kv_heads not in (1, cfg.n_heads)
    return {
        "new_decoder_architecture": new,
        "multi_query": cfg.n_kv_heads == 1,
        "num_kv_heads": cfg.n_kv_heads,
        "parallel_attn": cfg.block != "sequential",
        "num_ln_in_parallel_attn": (2 if cfg.block == "parallel" else 1) if new else None,
    }


def read_config(family: Family, config: Mapping[str, Any], place: str) -> ModelConfig:
    """The architecture that a config.json states; InputError that names the key if not ours."""

    def refuse(key: str, value: Any, allowed: str) -> InputError:
        return InputError(
            f"{place}: {key} = {value!r} cannot be read as {family.hf_class}; it must be {allowed}"
        )

    found: dict[str, Any] = dict(family.fixed)
    for key in family.keys:
        value = _get(config, key.theirs, key.default)
        if key.values is not None:
            if value not in key.values:
                raise refuse(key.theirs, value, f"one of {', '.join(map(str, key.values))}")
            value = key.values[value]
        found[key.ours] = value
    for name, (wanted, default) in family.must.items():
        value = _get(config, name, default)
        is_wide = name == "sliding_window" and value and value >= found["max_seq_len"]
        if value != wanted and not is_wide:
            raise refuse(name, value, str(wanted))
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise refuse("layer_types", "sliding_attention", "full_attention")
    if config.get("quantization_config"):
        raise refuse("quantization_config", "…", "absent: import the unquantised weights")
    if family.hf_class == "FalconForCausalLM":
        found |= _falcon_fields(config, found["n_heads"], refuse)
    if found.get("positions", "rope") == "rope":
        found |= _rope_fields(family, config, refuse)
    for name in ("vocab_size", "d_model", "n_layers", "n_heads"):
        if not isinstance(found[name], int):
            key = next(k.theirs for k in family.keys if k.ours == name)
            raise refuse(key, found[name], "a whole number")
    if found.get("n_kv_heads") is None:
        found["n_kv_heads"] = found["n_heads"]
    if found.get("head_dim") is None:
        found["head_dim"] = found["d_model"] // found["n_heads"]
    if found.get("d_ff") is None:
        found["d_ff"] = 4 * found["d_model"]
    try:
        cfg = ModelConfig(**found)
    except (InputError, TypeError) as e:
        raise InputError(f"{place}: not an architecture of {family.hf_class}: {e}") from None
    if misfits := fit(cfg, family).misfits:
        raise InputError(f"{place}: not an architecture of {family.hf_class}: {'; '.join(misfits)}")
    return cfg


def _falcon_fields(
    config: Mapping[str, Any], n_heads: int, refuse: Callable[[str, Any, str], InputError]
) -> dict[str, Any]:
    parallel = config.get("parallel_attn", True)
    if not config.get("new_decoder_architecture", False):
        return {
            "n_kv_heads": 1 if config.get("multi_query", True) else n_heads,
            "block": "parallel_shared_norm" if parallel else "sequential",
        }
    if not parallel:
        raise refuse("parallel_attn", parallel, "true with new_decoder_architecture")
    n_norms = config.get("num_ln_in_parallel_attn") or 2
    return {
        "n_kv_heads": config.get("num_kv_heads") or n_heads,
        "block": "parallel" if n_norms == 2 else "parallel_shared_norm",
    }


def _rope_fields(
    family: Family, config: Mapping[str, Any], refuse: Callable[[str, Any, str], InputError]
) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or the keys of 4.x."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise refuse("rope_parameters", rope, "a mapping")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise refuse("rope_parameters.rope_type", kind, "default: scaled rotary embedding is not")
    theta_key = "rotary_emb_base" if family.hf_class == "GPTNeoXForCausalLM" else "rope_theta"
    theta = rope.get("rope_theta", config.get(theta_key, config.get("rope_theta", 10_000.0)))
    found = {"rope_theta": float(theta)}
    if family.rotary_key:
        old = config.get(family.rotary_key, family.rotary_default)
        found["rotary_pct"] = float(rope.get("partial_rotary_factor", old))
    elif rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise refuse("partial_rotary_factor", rope.get("partial_rotary_factor"), "1.0")
    return found


_ABSENT = object()


def _get(config: Mapping[str, Any], dotted: str, default: Any) -> Any:
    node: Any = config
    for key in dotted.split("."):
        node = node.get(key, _ABSENT) if isinstance(node, Mapping) else _ABSENT
    return default if node is _ABSENT else node


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for key in path:
        config = config.setdefault(key, {})
    config[last] = value
