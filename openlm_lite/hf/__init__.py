"""`from openlm_lite.hf import *` makes transformers load `model_type: openlm`, OpenLM's own too.

It registers the classes below with AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer,
so that from_pretrained needs no code from the folder. transformers is imported when one of the
names is first asked for, not by `import openlm_lite.hf.…`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openlm_lite.hf.modeling_openlm import (
        OpenLMConfig,
        OpenLMForCausalLM,
        OpenLMModel,
        OpenLMPreTrainedModel,
    )

__all__ = ["OpenLMConfig", "OpenLMForCausalLM", "OpenLMModel", "OpenLMPreTrainedModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    return globals()[name]


def _register() -> None:
    """Runs once: the names then stand in the module, and `__getattr__` is asked no more."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError('transformers is not installed: pip install "openlm-lite[hf]"')
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers import GPTNeoXTokenizerFast as Words  # pyright: ignore (made at run time)

    from openlm_lite.hf import modeling_openlm

    config = modeling_openlm.OpenLMConfig
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, modeling_openlm.OpenLMModel)
    AutoModelForCausalLM.register(config, modeling_openlm.OpenLMForCausalLM)
    # for a folder that names no tokenizer class: OpenLM's models have GPT-NeoX's
    AutoTokenizer.register(config, fast_tokenizer_class=Words)
    globals().update({name: getattr(modeling_openlm, name) for name in __all__})
