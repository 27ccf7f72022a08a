"""Examples per second of multiple choice: ours beside lm-eval's Hugging Face path.

    python benchmarks/eval_speed.py DATA TOKENIZER [--task arc_easy] [--rows 24] [--batch 16]

Both get one model (a Llama with random weights), the same token ids and the same
number of sequences per batch; neither encodes text. They take turns, so that a busy machine is
busy for both; what is printed are the medians and the spread of the ratios of neighbouring turns.
Needs `lm-eval` and transformers. The log-likelihoods of both have to agree within 1e-3.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.prompts import examples, find_data, read_data
from openlm_lite.eval.scorer import BatchLimits, Choice, score_all
from openlm_lite.eval.tasks import task_named
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.source import read_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    words = load_tokenizer(args.tokenizer)
    task = task_named(args.task)
    path = find_data(task, args.data)
    assert path is not None, f"{task.file} is not in {args.data}"
    asked = list(examples(task, read_data(task, path), words, limit=args.rows))
    questions = []
    for example in asked:
        assert example.spans is not None
        pairs = zip(example.seqs, example.spans, strict=True)
        questions.append([Choice(seq, start) for seq, (start, _) in pairs])

    ours, theirs = both_models(
        args.d_model, args.layers, words.vocab_size, args.tokenizer, args.batch
    )
    limits = BatchLimits(sequences=args.batch, tokens=1 << 30)
    requests = [
        (("", ""), c.tokens[: c.start].tolist(), c.tokens[c.start :].tolist())
        for question in questions
        for c in question
    ]

    found: dict[str, list[float]] = {"ours": [], "lm_eval": []}
    worst = 0.0
    for turn in range(args.turns + 1):  # the first warms up
        seconds, scores = timed(lambda: score_all(ours, questions, limits))
        other, answers = timed(lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True))
        flat = [score.loglik for question in scores for score in question]
        worst = max(abs(a - b) for a, (b, _) in zip(flat, answers, strict=True))
        assert worst < 1e-3, f"log-likelihoods differ by {worst}"
        if turn:
            found["ours"].append(len(questions) / seconds)
            found["lm_eval"].append(len(questions) / other)
    ratios = [a / b for a, b in zip(found["ours"], found["lm_eval"], strict=True)]
    lengths = [len(seq) for example in asked for seq in example.seqs]
    print(
        json.dumps(
            {
                "task": args.task,
                "examples": len(questions),
                "sequences": len(requests),
                "tokens_per_sequence": round(statistics.mean(lengths), 1),
                "batch": args.batch,
                "n_params": ours.model.cfg.n_params,
                "threads": torch.get_num_threads(),
                "ours_examples_per_second": round(statistics.median(found["ours"]), 3),
                "lm_eval_examples_per_second": round(statistics.median(found["lm_eval"]), 3),
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "largest_difference_nats": float(f"{worst:.1e}"),
            }
        )
    )


def both_models(
    d_model: int, layers: int, vocab_size: int, tokenizer: str, batch: int
) -> tuple[ModelScorer, Any]:
    """One Llama with random weights: as our model, and in lm-eval's Hugging Face class."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=-(-vocab_size // 128) * 128,
        hidden_size=d_model,
        num_hidden_layers=layers,
        num_attention_heads=d_model // 64,
        intermediate_size=d_model * 11 // 4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        ours, theirs = ModelScorer(read_model(folder)), load_hf(folder, torch.float32)
    fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>")
    return ours, HFLM(pretrained=theirs, tokenizer=fast, batch_size=batch, device="cpu")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
