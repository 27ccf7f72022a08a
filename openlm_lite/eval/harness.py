"""Our models under lm-evaluation-harness (the package lm-eval).

    openlm eval CKPT --suite lm-eval:hellaswag,arc_easy              through our command
    python -m openlm_lite.eval.harness run --model openlm --model_args path=CKPT --tasks …
                                                                     through lm-eval's own

    lm-eval --> strings --> Requests --> ids --> Scorer (choices of a question share their context)
                                            `--> generate.generate

The rules by which strings become ids are those of lm-eval's Hugging Face model: a checkpoint here
and its exported folder there have the same log-likelihoods.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from openlm_lite import dist
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.generate import Sampling, generate
from openlm_lite.eval.held_out import windows
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.scorer import BatchLimits, Choice, score_all
from openlm_lite.eval.text import TextStream
from openlm_lite.hf.source import open_source, with_tokenizer

log = logging.getLogger(__name__)

PREFIX = "lm-eval:"
"""of the words that name its tasks"""

_MAX_NEW_TOKENS = 256  # where a task does not say; lm-eval's own


class Requests:
    """What lm-eval asks of a model, answered for plain strings."""

    def __init__(
        self,
        scorer: ModelScorer,
        tokenizer: Tokenizer,
        *,
        batch: BatchLimits | None = None,
        bos: bool = True,
    ) -> None:
        """bos: begin with what the tokenizer's file wants before a text."""
        self.scorer, self.tokenizer = scorer, tokenizer
        self.batch = batch or BatchLimits()
        self.max_seq_len = scorer.max_seq_len
        self.bos_ids = list(tokenizer.bos_ids) if bos else []
        self.prefix_id = tokenizer.bos_ids[0] if tokenizer.bos_ids else tokenizer.eot_id
        """what stands before a text that has nothing before it, as in lm-eval with either bos"""

    def encode(self, text: str) -> list[int]:
        return [*self.bos_ids, *self.tokenizer.encode(text).tolist()]

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): sum of log p in nats, and whether it is greedy's choice.

        Neighbours with one context make a question, whose context is read once. What is longer
        than the model is cut on the left. Raises InputError for an empty continuation, and for one
        that alone is longer than the model.
        """
        questions: list[list[Choice]] = []
        previous: str | None = None
        n_cut = 0
        for number, (context, continuation) in enumerate(pairs):
            before, scored = self._ids_of(context, continuation)
            if not 0 < len(scored) <= self.max_seq_len:
                raise InputError(
                    f"lm-eval: request {number}: the continuation {continuation[:40]!r} has "
                    f"{len(scored)} tokens; a model of {self.max_seq_len} positions can score 1 to "
                    f"{self.max_seq_len}"
                )
            tokens = (before + scored)[-(self.max_seq_len + 1) :]
            n_cut += len(tokens) < len(before) + len(scored)
            choice = Choice(tokens, len(tokens) - len(scored))
            # a sequence of one token more than the model takes cannot stand behind a cache
            is_short = len(tokens) <= self.max_seq_len
            if is_short and questions and context == previous:
                questions[-1].append(choice)
            else:
                questions.append([choice])
            previous = context if is_short else None
        _say_cut(n_cut, len(pairs))
        scores = [s for found in score_all(self.scorer, questions, self.batch) for s in found]
        if not all(math.isfinite(score.loglik) for score in scores):
            raise RunError("lm-eval: the model's logits are not finite: there is nothing to score")
        if scores and all(score.tied for score in scores):
            raise RunError("lm-eval: the model gives every token the same logit: it cannot score")
        return [(score.loglik, score.greedy) for score in scores]

    def _ids_of(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Spaces at the end of the context belong to the continuation: tokens begin with them."""
        if not context:
            ids = self.tokenizer.encode(continuation).tolist()
            if ids and ids[0] == self.prefix_id:
                return ids[:1], ids[1:]
            return [self.prefix_id], ids
        ids = self.encode(context + continuation)
        n_before = len(self.encode(context.rstrip()))  # of spaces alone: what a text begins with
        if not n_before:
            return [self.prefix_id], ids
        return ids[:n_before], ids[n_before:]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each whole text, nats, in windows as long as the model takes."""
        questions, owners = [], []
        for number, text in enumerate(texts):
            ids = np.array(self.encode(text))
            if not len(ids):
                continue
            for window in windows(ids, self.prefix_id, self.max_seq_len, self.max_seq_len):
                tokens = [int(window.inputs[0]), *window.targets.tolist()]
                questions.append([Choice(tokens, len(tokens) - window.scored)])
                owners.append(number)
        sums = [0.0] * len(texts)
        scores = score_all(self.scorer, questions, self.batch)
        for number, [score] in zip(owners, scores, strict=True):
            sums[number] += score.loglik
        return sums

    def texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each context under its own settings, up to its stop strings."""
        plans = [_plan(settings) for _, settings in requests]
        ids = []
        n_cut = 0
        for (context, _), plan in zip(requests, plans, strict=True):
            room = self.max_seq_len - plan.max_new_tokens
            if room < 1:
                raise InputError(
                    f"lm-eval: {plan.max_new_tokens} new tokens leave no room for a context in a "
                    f"model of {self.max_seq_len} positions; set max_gen_toks in the task's "
                    "generation_kwargs"
                )
            whole = self.encode(context) or [self.prefix_id]
            n_cut += len(whole) > room
            ids.append(whole[-room:])
        _say_cut(n_cut, len(requests))
        order = sorted(range(len(ids)), key=lambda i: (repr(plans[i]), len(ids[i]), i))
        found = [""] * len(ids)
        while order:
            n = 1
            while n < min(len(order), self.batch.sequences) and plans[order[n]] == plans[order[0]]:
                n += 1
            numbers, order = order[:n], order[n:]
            texts = self._continued([ids[i] for i in numbers], numbers, plans[numbers[0]])
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def _continued(self, prompts: list[list[int]], numbers: list[int], plan: _Plan) -> list[str]:
        streams = [TextStream(self.tokenizer, plan.stop) for _ in prompts]
        texts = [""] * len(prompts)

        def has_stopped(row: int, token: int) -> bool:
            texts[row] += streams[row].feed(token)
            return streams[row].stopped

        generate(
            self.scorer.model,
            prompts,
            max_new_tokens=plan.max_new_tokens,
            sampling=plan.sampling,
            eot_id=self.tokenizer.eot_id,
            seeds=[plan.sampling.seed + number for number in numbers],
            stop=has_stopped,
            dtype=self.scorer.dtype,
            shared=self.scorer.lockstep,
        )
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def _say_cut(n_cut: int, n: int) -> None:
    if n_cut:
        log.warning(
            "lm-eval: %d of %d contexts are longer than the model takes, and lost tokens on the "
            "left",
            n_cut,
            n,
        )


class _Plan(NamedTuple):
    """How a text is to be made."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling


def _plan(settings: Mapping[str, Any]) -> _Plan:
    """Of a task's generation_kwargs; InputError for one that is not known."""
    left = dict(settings)
    until = left.pop("until", None) or []
    stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    lengths = [left.pop(name, None) for name in _LENGTHS]
    n_new = next((int(n) for n in lengths if n is not None), _MAX_NEW_TOKENS)
    temperature = float(left.pop("temperature", None) or 0.0)
    is_sampled = left.pop("do_sample", temperature > 0)
    temperature = (temperature or 1.0) if is_sampled else 0.0
    names = {"top_k": int, "top_p": float, "repetition_penalty": float, "seed": int}
    chosen = {n: kind(left.pop(n)) for n, kind in names.items() if left.get(n) is not None}
    if left := {name for name, value in left.items() if value is not None and name not in names}:
        known = ", ".join(["until", "do_sample", "temperature", *names, *_LENGTHS])
        raise InputError(
            f"lm-eval: generation_kwargs: {', '.join(sorted(left))}: not known here; known are "
            f"{known}"
        )
    return _Plan(n_new, stop, Sampling(temperature=temperature, **chosen))


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


# --- lm-eval -------------------------------------------------------------------------------------


def require_lm_eval() -> None:
    """Raises InputError with the install line where lm-eval is absent."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm-eval is not installed: pip install "openlm-lite[lm-eval]"')


@functools.cache
def model_class() -> Any:
    """The class that lm-eval knows as `openlm`; made, and registered there, at the first call."""
    require_lm_eval()
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

    @register_model("openlm")
    class OpenLM(LM):
        """`path`: run, checkpoint or exported folder; `requests`: instead, a model in memory."""

        def __init__(
            self,
            path: str = "",
            requests: Requests | None = None,
            tokenizer: str | None = None,
            average: str | None = None,
            device: str | None = None,
            batch_size: int | str | None = None,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            if requests is None:
                if not path:
                    raise InputError("lm-eval: name the model: --model_args path=CKPT")
                requests = open_requests(
                    path, tokenizer, average, device or "cpu", _sequences(batch_size)
                )
            self.requests = requests
            self._device = requests.scorer.model.embedding.weight.device
            if not requests.scorer.lockstep:  # else every rank answers every request
                self._rank, self._world_size = dist.rank(), dist.world_size()

        def loglikelihood(self, requests: Any) -> Any:
            return self.requests.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return self.requests.rolling([text for (text,) in (r.args for r in requests)])

        def generate_until(self, requests: Any) -> Any:
            return self.requests.texts([request.args for request in requests])

        @property
        def tokenizer_name(self) -> str:
            return self.requests.tokenizer.name

        def all_gather(self, tensor: Any) -> Any:
            if self.world_size == 1:
                return tensor
            return torch.tensor(dist.all_gather(tensor.tolist()), device=tensor.device)

        def gather_object(self, obj: Any, dst: int = 0) -> Any:
            found = [obj] if self.world_size == 1 else dist.all_gather(obj)
            return found if self.rank == dst else None

        def barrier(self) -> None:
            if self.world_size > 1:
                dist.all_gather(None)

    return OpenLM


def _sequences(batch_size: int | str | None) -> int:
    """lm-eval's `--batch_size`, which may be text."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return BatchLimits().sequences
    try:
        return int(batch_size)
    except ValueError:
        raise InputError(f"--batch_size {batch_size}: must be a number, or auto") from None


def open_requests(
    path: str, tokenizer: str | None, average: str | None, device: str, sequences: int
) -> Requests:
    """The model at `path` (`hf.source.open_source`), ready to be asked."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device %s: torch finds no CUDA device here; the model runs on the CPU", device)
        device = "cpu"  # lm-eval asks for cuda:0 where nothing else is said
    model, words = with_tokenizer(open_source(path, average=average), tokenizer)
    return Requests(ModelScorer(model.to(device)), words, batch=BatchLimits(sequences=sequences))


def check_tasks(tasks: Sequence[str], tasks_dir: str | None) -> Any:
    """lm-eval's TaskManager that knows `tasks` (`run_harness`); InputError for one that is unknown.

    Whether their data can be had shows only when they are asked.
    """
    require_lm_eval()
    manager = _task_manager(tuple(tasks), tasks_dir)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"lm-eval: {', '.join(unknown)}: no such task"
            + (f" in {tasks_dir} or" if tasks_dir else "")
            + " in lm-eval; `lm-eval ls tasks` lists its own"
        )
    return manager


@functools.lru_cache(maxsize=1)  # it reads thousands of files, once for the check and the run
def _task_manager(tasks: tuple[str, ...], tasks_dir: str | None) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if tasks_dir:
        manager = TaskManager(include_path=tasks_dir, include_defaults=False)
        if all(task in manager.all_tasks for task in tasks):
            return manager
    return TaskManager(include_path=tasks_dir)


def run_harness(
    requests: Requests,
    tasks: Sequence[str],
    *,
    tasks_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """lm-eval's results for `tasks`: task -> plain values, with versions, shots and sample counts.

    `tasks_dir`: a folder of task files (YAML) that come before lm-eval's own, which are only looked
    at (for seconds) where a task is not among them; such tasks may have their data on this machine.
    Every rank gets the same. Seeds Python's, numpy's and torch's generators, as lm-eval does.
    Raises InputError for a task that is not known, RunError for logits that say nothing.
    """
    manager = check_tasks(tasks, tasks_dir)
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    found = simple_evaluate(
        model=model_class()(requests=requests),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=1000,
        log_samples=False,
    )
    return dist.all_gather(_plain(found))[0] if found is not None else dist.all_gather(None)[0]


def _plain(found: Any) -> dict[str, Any]:
    """What is worth keeping of lm-eval's results, as JSON's own types."""
    import lm_eval  # pyright: ignore[reportMissingImports]

    report: dict[str, Any] = {"lm_eval_version": lm_eval.__version__, "tasks": {}}
    for task, values in found["results"].items():
        numbers = {}
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool):
                key = metric if filtered in ("", "none") else f"{metric},{filtered}"
                numbers[key] = float(value)
        samples = found.get("n-samples", {}).get(task, {})
        report["tasks"][task] = {
            **numbers,
            "version": found["versions"].get(task),
            "shots": found["n-shot"].get(task),
            "rows": samples.get("effective"),
            "rows_of_task": samples.get("original"),
        }
    return report


def main() -> int:
    """lm-eval's own command, in which `--model openlm` is known."""
    try:
        model_class()
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        cli_evaluate()
    except InputError as e:
        print(f"openlm: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
