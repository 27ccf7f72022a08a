"""The tensors of a Hugging Face class from ours, and ours from theirs, one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.layouts import Rule, pack, packed_shape, parameter_shapes, rules_of, unpack
from openlm_lite.hf.weights import Weights
from openlm_lite.model.config import ModelConfig

# OLMoE's router. The softmax over its one expert is 1 whatever its weights are.
_ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.gate\.weight")
# Tables and masks that files of older versions carry; every class makes them itself.
_DERIVED = re.compile(r"(inv_freq|\.attn\.bias|\.attention\.bias|masked_bias|_extra_state)$")
# OpenLM saves the matrices of a GELU network under one of two names, or both.
_OTHER_GELU_NAME = {"_ff_w1": "feed_forward.0", "_ff_w2": "feed_forward.2"}


def to_class(hf_class: str, cfg: ModelConfig, ours: Weights) -> Weights:
    """The tensors that `hf_class` reads, by its names; `cfg` and `ours` are what it holds."""
    rules = {rule.theirs: rule for rule in rules_of(hf_class, cfg)}
    shapes = {name: packed_shape(rule, ours.shapes) for name, rule in rules.items()}
    if hf_class == "OlmoeForCausalLM":
        for i in range(cfg.n_layers):
            shapes[f"model.layers.{i}.mlp.gate.weight"] = (1, cfg.d_model)

    def read(name: str) -> Tensor:
        if name not in rules:
            return torch.zeros(shapes[name])
        rule = rules[name]
        return pack(rule.layout, cfg, [ours[part] for part in rule.ours])

    return Weights(ours.place, shapes, read)


def from_class(hf_class: str, cfg: ModelConfig, files: Weights) -> Weights:
    """Our tensors, fp32, from a class' files; names and shapes are all compared first.

    Raises InputError naming what is missing, what does not belong, or the shape that disagrees.
    """
    rules = rules_of(hf_class, cfg)
    names = _names_in(files, rules)
    shapes = parameter_shapes(cfg)
    _compare(hf_class, cfg, files, rules, names)
    rule_of = {ours: rule for rule in rules for ours in rule.ours}
    held: dict[str, dict[str, Tensor]] = {}  # unread parts of the tensor that was read last

    def read(name: str) -> Tensor:
        rule = rule_of[name]
        if name not in held.get(rule.theirs, {}):
            held.clear()
            whole = files[names[rule.theirs]]
            if not whole.is_floating_point():
                raise InputError(
                    f"{files.place}: tensor {names[rule.theirs]} is {whole.dtype}; weights must "
                    "be floating-point numbers: import the unquantised ones"
                )
            part_shapes = [shapes[part] for part in rule.ours]
            parts = unpack(rule.layout, cfg, whole, part_shapes)
            held[rule.theirs] = dict(zip(rule.ours, parts, strict=True))
        return held[rule.theirs].pop(name).float().contiguous()

    return Weights(files.place, shapes, read)


def _names_in(files: Weights, rules: list[Rule]) -> dict[str, str]:
    """Our table's name of each of their tensors -> its name in the files.

    Files written from the model without its head lack the first part (`transformer.`, `model.`).
    """
    prefixes = {rule.theirs.partition(".")[0] + "." for rule in rules}
    inner = next(p for p in sorted(prefixes) if p in ("model.", "transformer.", "gpt_neox."))
    cut = "" if any(name.startswith(inner) for name in files) else inner
    names = {rule.theirs: rule.theirs.removeprefix(cut) for rule in rules}
    for other, own in _OTHER_GELU_NAME.items():
        for theirs, name in names.items():
            if name not in files and name.replace(own, other) in files:
                names[theirs] = name.replace(own, other)
    return names


def _compare(
    hf_class: str, cfg: ModelConfig, files: Weights, rules: list[Rule], names: Mapping[str, str]
) -> None:
    place, shapes = files.place, parameter_shapes(cfg)
    expected = {names[rule.theirs]: packed_shape(rule, shapes) for rule in rules}
    missing = [name for name in expected if name not in files]
    extra = [n for n in files if n not in expected and not _may_be_left_out(hf_class, cfg, n)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} are missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} do not belong to it: {_some(extra)}")
    if problems:
        raise InputError(
            f"{place}: the tensors are not those of {hf_class} with this architecture: "
            f"{'; '.join(problems)}. Is the architecture (config.json or --model) the right one?"
        )
    for name, shape in expected.items():
        if tuple(files.shapes[name]) != shape:
            raise InputError(
                f"{place}: tensor {name} is {list(files.shapes[name])}, the architecture says "
                f"{list(shape)}; give the architecture that these weights were trained with"
            )
    if cfg.tie_embeddings:
        _check_tied_head(files, rules, names)


def _may_be_left_out(hf_class: str, cfg: ModelConfig, name: str) -> bool:
    if _DERIVED.search(name):
        return True
    if hf_class == "OlmoeForCausalLM" and _ROUTER.fullmatch(name):
        return True
    if hf_class == "OpenLMForCausalLM" and any(o in name for o in _OTHER_GELU_NAME):
        return not cfg.is_gated  # the same matrix under its other name is read
    return cfg.tie_embeddings and name in _HEADS


_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "model.output.weight")


def _check_tied_head(files: Weights, rules: list[Rule], names: Mapping[str, str]) -> None:
    """A file may hold a tied head beside its table, if it is the same."""
    table = next(names[rule.theirs] for rule in rules if rule.ours == ("embedding.weight",))
    for head in _HEADS:
        if head in files and not torch.equal(files[head], files[table]):
            raise InputError(
                f"{files.place}: the architecture ties {head} to {table}, but they differ; set "
                "tie_embeddings = false (tie_word_embeddings, weight_tying) in the architecture"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown}, …"
