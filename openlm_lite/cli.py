"""`openlm VERB …`: every verb parses its words and calls one function.

Modules are imported inside the verbs, so that `openlm` itself starts at once.
Exit codes: 0 done; 1 a run failed; 2 bad input; 75 stopped on request with a checkpoint saved;
76 ended by its watchdog; 77 the launcher died; 130 Ctrl-C twice (torchrun itself answers 1 to every
one but 0).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from openlm_lite import cli_bench, cli_data, cli_eval, cli_fit, cli_runs, cli_science, redact
from openlm_lite.cli_data import print_result
from openlm_lite.errors import InputError, RelayedError, RunError, SharedError
from openlm_lite.host_memory import take_large_pages

FAILED, BAD_INPUT = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser.print_help()
        return 0
    os.umask(os.umask(0o022) | 0o002)  # nothing that we write is anybody's to change
    with redact.guarded_output():
        return _run(parser.parse_args(words))


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args)
    except InputError as e:
        _report(e)
        return BAD_INPUT
    except RunError as e:
        _report(e)
        return FAILED
    except KeyboardInterrupt:
        from openlm_lite.stop import INTERRUPTED

        return INTERRUPTED
    except BrokenPipeError:  # `openlm … | head`
        sys.stderr.close()
        return 0
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as e:
        _report(InputError(f"{e.filename}: {e.strerror}"))
        return BAD_INPUT
    except Exception:  # here and not by the interpreter: standard error is still guarded
        traceback.print_exc()
        return FAILED


def _report(error: Exception) -> None:
    """The message on standard error, once: not for what another rank reports."""
    rank = os.environ.get("RANK", "0")
    our_dist = sys.modules.get("openlm_lite.dist")
    met = our_dist is not None and our_dist.has_met
    alike = not met or isinstance(error, SharedError)  # before they have met, all found the same
    if isinstance(error, RelayedError) or (rank != "0" and alike):
        return
    where = "" if rank == "0" else f"rank {rank}: "
    print(f"openlm: {where}{error}", file=sys.stderr, flush=True)


class _VerbParser(argparse.ArgumentParser):
    """Words may stand before, between and behind options: `RECIPE --json a.b=c`.

    argparse itself takes the first words for all of them.
    """

    _is_inside = False  # parse_known_intermixed_args calls parse_known_args

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_inside:
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openlm",
        description="Pretraining of decoder-only language models, from text to Hugging Face.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", required=True, parser_class=_VerbParser
    )

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    p = verb("config", _config, "print a recipe resolved, with what follows from it")
    p.add_argument("words", nargs="*", metavar="RECIPE | a.b=c", help="a recipe, then overrides")
    p.add_argument("--gpus", type=int, help="do layout and batch fit them? (default: the fewest)")
    p.add_argument(
        "--gpu", metavar="NAME", help="does it fit an A100-40, A100-80, H100, H200, B200?"
    )
    p.add_argument("--schedule", metavar="FILE.csv", help="write step,tokens,lr of every step")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")

    cli_data.add_verbs(verb)

    p = verb("train", _train, "train a recipe; the same command resumes")
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*", metavar="a.b=c")
    p.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let a resumed run differ in this key (repeatable); refused otherwise",
    )

    cli_runs.add_verbs(verb)

    p = verb("export", _export, "write a checkpoint as a Hugging Face folder")
    p.add_argument("checkpoint", help="run folder, or one of its step_… folders")
    p.add_argument("out", help="the folder to make")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--native", action="store_true", help="a class of transformers, or an error")
    form.add_argument("--bundled", action="store_true", help="with its own code, as trained")
    p.add_argument("--class", dest="hf_class", metavar="NAME", help="e.g. MistralForCausalLM")
    p.add_argument("--average", metavar="NAME", help="one of its averages, for its weights")
    p.add_argument("--tokenizer", help="instead of the run's own; none: without")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="of a weights file")
    p.add_argument("--json", action="store_true")

    p = verb("import", _import, "make a checkpoint of a Hugging Face folder or OpenLM's weights")
    p.add_argument("source", help="Hugging Face folder, .pt or .safetensors file")
    p.add_argument("checkpoint", help="the folder to make")
    p.add_argument("--model", metavar="JSON", help="architecture of bare weights: ours or OpenLM's")
    p.add_argument("--no-compare", action="store_true", help="do not load it with transformers too")
    p.add_argument("--json", action="store_true")

    cli_bench.add_verb(verb)
    cli_science.add_verbs(verb)
    cli_fit.add_verbs(verb)
    cli_eval.add_verbs(verb)

    p = verb("generate", _generate, "continue one prompt, as it is made, or many")
    p.add_argument("path", help="run folder, checkpoint or Hugging Face folder")
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help='"" begins a document')
    p.add_argument(
        "--prompts-file",
        metavar="FILE",
        help='more prompts: one on each line, or of a .jsonl file {"prompt": …}',
    )
    p.add_argument("--batch-size", type=int, default=8, help="prompts that are continued together")
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text (repeatable)",
    )
    p.add_argument("--max-new-tokens", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    p.add_argument("--top-k", type=int, default=0, help="0: all")
    p.add_argument("--top-p", type=float, default=0.95)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--average", metavar="NAME", help="one of its averages, for its weights")
    p.add_argument("--tokenizer", help="instead of the model's own")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default cpu)")
    p.add_argument("--json", action="store_true")
    p = verb("completion", _completion, "print a script that completes words in a shell")
    p.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise InputError('completion needs shtab: pip install "openlm-lite[completion]"') from None
    print(shtab.complete(_parser(), args.shell))
    return 0


def _config(args: argparse.Namespace) -> int:
    from openlm_lite import config, run
    from openlm_lite.derived import derived, derived_model
    from openlm_lite.optim.schedule import lr_at

    if args.gpus is not None and args.gpus < 1:
        raise InputError(f"--gpus {args.gpus}: must be at least 1")
    if not args.words or "=" in args.words[0]:
        model = run.load_model(args.words)
        if args.schedule:
            raise InputError("--schedule needs a recipe")
        if args.gpu:
            raise InputError("--gpu needs a recipe")
        resolved: Any = {"model": config.to_plain(model)}
        follows = derived_model(model, model.max_seq_len)
    else:
        cfg = run.load_run(args.words[0], args.words[1:])
        if args.gpus is not None:
            cfg.check_layout(args.gpus)
        resolved, follows = config.to_plain(cfg), derived(cfg, args.gpus, args.gpu)
        if args.schedule:
            schedule = cfg.schedule_in_steps
            with open(args.schedule, "w", encoding="utf-8") as f:
                f.write("step,tokens,lr\n")
                for step in range(cfg.steps):
                    lr = lr_at(step, cfg.steps, cfg.optim.lr, schedule)
                    f.write(f"{step},{cfg.tokens_at(step)},{lr!r}\n")
    if args.json:
        print(json.dumps({"config": resolved, **follows}))
        return 0
    print(config.dump_yaml(resolved), end="")
    print("\n# derived")
    for name, value in follows.items():
        print(f"# {name}: {_readable(value)}")
    return 0


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(one)}" for name, one in value.items())
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _train(args: argparse.Namespace) -> int:
    from openlm_lite.stop import StopRequest

    take_large_pages()
    # first: what follows imports torch, for seconds
    with StopRequest(until_exit=True, importing=True) as stop:
        from openlm_lite import log
        from openlm_lite.run import load_run
        from openlm_lite.train import train

        stop.importing = False
        log.setup_console(rank=int(os.environ.get("RANK", "0")))
        return train(load_run(args.recipe, args.overrides), args.allow_change, stop)


def _export(args: argparse.Namespace) -> int:
    from openlm_lite.hf.export import export_checkpoint

    report = export_checkpoint(
        args.checkpoint,
        args.out,
        how="native" if args.native else "bundled" if args.bundled else "auto",
        hf_class=args.hf_class,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_bytes,
        average=args.average,
    )
    print_result(dataclasses.asdict(report), args.json)
    return 0


def _import(args: argparse.Namespace) -> int:
    from openlm_lite.hf.importer import import_model

    report = import_model(
        args.source, args.checkpoint, model=args.model, compare=not args.no_compare
    )
    print_result(dataclasses.asdict(report), args.json)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from openlm_lite.eval.generate import Sampling
    from openlm_lite.eval.text import generate_texts, read_prompts

    prompts = [*args.prompts, *(read_prompts(args.prompts_file) if args.prompts_file else ())]
    names = [f.name for f in dataclasses.fields(Sampling)]
    pieces = generate_texts(
        args.path,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(**{name: getattr(args, name) for name in names}),
        stop=args.stop,
        batch_size=args.batch_size,
        tokenizer=args.tokenizer,
        device=args.device,
        average=args.average,
    )
    if len(prompts) == 1 and not args.json:
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
        return 0
    found = [{"prompt": prompt, "text": "", "ended": ""} for prompt in prompts]
    n_shown = 0
    for number, text, ended in pieces:
        found[number]["text"] += text
        found[number]["ended"] = ended
        while not args.json and n_shown < len(found) and found[n_shown]["ended"]:
            one = found[n_shown]
            print(f"--- {n_shown} ({one['ended']})\n{one['prompt']}{one['text']}", flush=True)
            n_shown += 1
    if args.json:
        print(json.dumps(found[0] if len(found) == 1 else {"generations": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
