"""What an export and a generation start from: the model and the tokenizer of a checkpoint."""

from __future__ import annotations

import os

import torch

from openlm_lite.checkpoint import read_document, read_model_weights
from openlm_lite.config import decode, parse_yaml, to_tree
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer


def read_model_config(step_folder: str) -> ModelConfig:
    """The architecture that `step_folder`/model.json states; InputError if it states none."""
    place = os.path.join(step_folder, "model.json")
    plain = parse_yaml(read_document(step_folder, "model.json"), place)  # JSON is YAML
    if not isinstance(plain, dict):
        raise InputError(f"{place}: holds a {type(plain).__name__}, must hold an architecture")
    return decode(ModelConfig, to_tree(plain, place))


def read_model(step_folder: str) -> Transformer:
    """The model of a checkpoint, fp32, on the CPU, in evaluation mode.

    Raises InputError for a damaged checkpoint and for weights that do not fit its model.json.
    """
    with torch.device("meta"):
        model = Transformer(read_model_config(step_folder))
    weights = {name: w.float() for name, w in read_model_weights(step_folder).items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise InputError(f"{step_folder}: the weights do not fit its model.json: {e}") from e
    return model.eval()


def find_tokenizer(step_folder: str, spec: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer named by `spec`, else the one beside the run, else its training data's.

        run/{tokenizer.json, checkpoints/step_00001000/}

    It may have fewer ids than the model has rows (padding), never more: InputError.
    """
    tokenizer = load_tokenizer(spec if spec is not None else _tokenizer_folder(step_folder))
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model "
            f"{step_folder} has vocab_size = {vocab_size}: it was trained with another tokenizer"
        )
    return tokenizer


def _tokenizer_folder(step_folder: str) -> str:
    parent = os.path.dirname(os.path.abspath(step_folder))
    run = os.path.dirname(parent) if os.path.basename(parent) == "checkpoints" else parent
    places = [step_folder, run]
    if data := _training_data(step_folder):
        places.append(data if os.path.isdir(data) else os.path.dirname(data))
    for place in places:
        if os.path.isfile(os.path.join(place, "tokenizer.json")):
            return place
    raise InputError(
        f"{step_folder}: no tokenizer.json in {', '.join(places)}; name the tokenizer that the "
        "model was trained with (--tokenizer NAME_OR_FILE)"
    )


def _training_data(step_folder: str) -> str | None:
    """`data.train` of the checkpoint's config.yaml; None where it states none."""
    try:
        text = read_document(step_folder, "config.yaml")
        path = parse_yaml(text, "config.yaml")["data"]["train"]
    except (InputError, KeyError, TypeError):
        return None
    return path if isinstance(path, str) else None
