"""`openlm import`: somebody's model as a checkpoint of ours, to train on, evaluate or export."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass

from openlm_lite import run_files
from openlm_lite.config import to_plain
from openlm_lite.errors import InputError
from openlm_lite.hf.compare import difference, our_logits, their_logits
from openlm_lite.hf.families import BY_CLASS
from openlm_lite.hf.source import OPENLM, Source, open_source, tokenizer_documents
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.weights_io import save_weights


@dataclass(frozen=True)
class ImportReport:
    """What was written. The difference is the largest over the logits of random tokens, in fp32."""

    path: str
    source: str
    kind: str
    n_params: int
    tokenizer: bool
    """whether the source had one, which then lies in the checkpoint"""
    max_logit_difference: float | None
    """from the class that transformers loads for the source; None: nothing to compare with"""
    notes: list[str]


def import_model(
    source: str, checkpoint: str, *, model: str | None = None, compare: bool = True
) -> ImportReport:
    """Write the model at `source` to the new folder `checkpoint`, one tensor at a time.

    `model` is the architecture's JSON for weights that come without (`source.open_source`).
    `compare` runs both, one after the other, where transformers has the source's class: the model
    is then once in memory. Raises InputError for bad input and where the logits differ;
    `checkpoint` is whole or absent.
    """
    if os.path.lexists(checkpoint) and (not os.path.isdir(checkpoint) or os.listdir(checkpoint)):
        raise InputError(f"{checkpoint}: exists and is no empty folder; name a new one")
    found = open_source(source, model)
    if found.kind == "checkpoint":
        raise InputError(f"{source}: is a checkpoint of ours already; use it as it is")
    documents = {run_files.MODEL: json.dumps(to_plain(found.cfg), indent=2) + "\n"}
    documents |= tokenizer_documents(found.path)
    facts = {**found.facts, "notes": list(found.notes)}
    save_weights(checkpoint, found.weights, documents=documents, facts={"source": facts})
    worst = None
    if compare and (found.kind in BY_CLASS or found.kind == OPENLM):
        try:
            worst = _compared(found, checkpoint)
        except BaseException:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
    return ImportReport(
        path=checkpoint,
        source=source,
        kind=found.kind,
        n_params=found.cfg.n_params,
        tokenizer="tokenizer.json" in documents,
        max_logit_difference=worst,
        notes=list(found.notes),
    )


def _compared(found: Source, checkpoint: str) -> float:
    """The logits of what was written, read back, against those of what was read."""
    ours = our_logits(found.cfg, checkpoint_weights(checkpoint))
    theirs = their_logits(found.path, found.cfg)
    return difference(ours, theirs, f"{found.path}: read as {found.kind},")
