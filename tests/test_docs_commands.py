"""Every command that the documents show has been run, or it stands here why not, and is parsed.

A command is run as it stands, in the world of doc_world.py, but for `INSTEAD` (what the world calls
otherwise, and what would take long) and the words of `_smaller`. One document is one world, its
commands are run in their order. What `NOT_RUN` names goes through the parser of its program. A new
command in a document is run like the others; where it cannot be, it gets a line here.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from openlm_lite import cli, runs
from openlm_lite.run import load_run
from tests.conftest import REFERENCE_DATA
from tests.doc_commands import ROOT, Command, all_commands, files_of, flags_of, words_of
from tests.doc_world import finish_ladder, quick_world, whole_world
from tests.train_server import TrainServer

TOKENIZER = "runs/quickstart-data/train/tokenizer.json"
INSTEAD = {
    # names for the reader to fill in, and optional words
    "bench RECIPE [a.b=c …] [--steps 10] [--warmup 3] [--data real] [--trace FILE.json] [--json]": (
        "bench quickstart optim.lr=1e-3 --steps 1 --warmup 0 --data real --trace t.json --json"
    ),
    "OUT SOURCE[=WEIGHT] SOURCE[=WEIGHT] … [--normalise] [--json]": (
        "soups/of_two runs/a=1 runs/b=3 --normalise --json"
    ),
    "OUT RUN --last N [--every STEPS] [--json]": "soups/last runs/mine --last 2 --every 2 --json",
    "[--optimizer muon]": "--optimizer muon",
    "eval CKPT --suite extended --data eval_data --out DIR": (
        "eval runs/mine --suite extended --data eval_data --out evals/extended"
    ),
    "HF_FOLDER": "runs/quickstart/hf",
    "--dump-prompts TASK": "--dump-prompts copa",
    "--tokenizer FILE": f"--tokenizer {TOKENIZER}",
    "torchrun …": "torchrun --nproc-per-node 8",
    # from a network
    "--tokenizer gpt2": f"--tokenizer {TOKENIZER}",
    "--out data --tokenizer EleutherAI/gpt-neox-20b": f"--out data/dclm --tokenizer {TOKENIZER}",
    "data.train=s3://bucket/shards": "data.train=data/mine/train",
    # larger than this world
    "--nproc-per-node 8": "--nproc-per-node 2",
    "parallel.dp_shard=8": "parallel.dp_shard=1",
    "parallel.tp=8": "parallel.tp=2",
    "runs/stdlib.jsonl --out runs/quickstart-data --train-tokenizer 2048": (
        "my_texts --out runs/quickstart-data --train-tokenizer 300"
    ),
    "runs/stdlib.jsonl --out runs/tutorial-data --train-tokenizer 2048": (
        "my_texts --out runs/tutorial-data --train-tokenizer 300"
    ),
    "'corpus/*.jsonl.zst' --out data": "'corpus/*.jsonl' --out of_one_split",
    "--train-tokenizer 4096": "--train-tokenizer 300",
    "--last 5 --every 1000": "--last 2 --every 2",
    "runs/mine --step 100": "runs/mine --step 1",
    "--model open_lm_1b": "--model model.json",
    "{start_tokens: 131072, tokens: 2e9}": "{start_tokens: 128, tokens: 512}",
    "cooldown_steps=100 schedule.end_lr=3e-5 total_steps=700": (
        "cooldown_steps=2 schedule.end_lr=3e-5 total_steps=8"
    ),
    "runs/trunk@600": "runs/trunk@6",
    "--device cuda": "--device cpu",
    "--stride 512": "--stride 32",
    # with the reference data
    "fit testbed.json": f"fit {REFERENCE_DATA}/scaling/testbed.json",
    "--aiw-form standard --data DIR": f"--aiw-form standard --data {REFERENCE_DATA}/aiw",
}
CI, SLURM = "installs and runs for minutes; CI runs it", "needs Slurm: tests/test_slurm.py"
MINUTES = "trains many models: half an hour and more"
LM_EVAL = "needs lm-eval and its data from the network: tests/eval/test_harness.py"
GOLDEN = "writes the golden losses anew"
NOT_RUN = {
    "make quickstart": CI,
    "make test": CI,
    "make slow": CI,
    "make check": CI,
    "pip install": "installs",
    "python3 -m venv": "installs",
    "source .venv": "installs",
    "prepare s3://bucket/texts": "a bucket, and Ray: tests/data/test_prepare_ray.py",
    "sbatch": SLURM,
    "cat sources.txt": SLURM,
    "torchrun --nnodes 16": "needs 16 nodes",
    "lm-eval:": LM_EVAL,
    "openlm_lite.eval.harness": LM_EVAL,
    "python benchmarks/science.py": MINUTES,
    "bash runs/ladder/run.sh": MINUTES + ": tests/scaling/test_ladder.py, with a stand-in",
    "mkdir -p build": GOLDEN,
    ".venv/bin/python -": GOLDEN,
}
QUICK = re.compile(
    r"openlm (config|runs|report|fit --plan|completion|eval --aggregate|eval --table)\b"
)
SBATCH = {"--nodes", "--gpus-per-node", "--cpus-per-task", "--time", "--no-kill", "--array"}

PARSER = cli._parser()
COMMANDS = all_commands()
DOCUMENTS = list(dict.fromkeys(command.document for command in COMMANDS))


def here(command: Command) -> str:
    """What is run for it."""
    text = re.sub(r"^source <\((.*)\)$", r"\1", command.text).partition(" | ")[0]
    for old, new in INSTEAD.items():
        text = text.replace(old, new)
    return text


def why_not(command: Command) -> str | None:
    reasons = [why for part, why in NOT_RUN.items() if part in command.text]
    if not REFERENCE_DATA.is_dir() and str(REFERENCE_DATA) in here(command):
        reasons.append("needs the reference data")
    return reasons[0] if reasons else None


RUN = [command for command in COMMANDS if why_not(command) is None]


def is_quick(command: Command) -> bool:
    return bool(QUICK.match(here(command)))


# --- the tables ----------------------------------------------------------------------------------


def test_the_documents_have_commands_of_every_verb() -> None:
    (verbs,) = (a for a in PARSER._actions if isinstance(a, argparse._SubParsersAction))
    shown = {words[1] for c in COMMANDS if (words := words_of(here(c)) or [""])[0] == "openlm"}
    assert shown == set(verbs.choices)


def test_the_tables_name_nothing_that_no_document_has_and_change_no_flag() -> None:
    texts = "\n".join(command.text for command in COMMANDS)
    for old, new in INSTEAD.items():
        assert old in texts.replace("torchrun …", "torchrun … --nproc-per-node 8"), old
        assert flags_of(old) == flags_of(new) or old == "torchrun …", old
    for part in NOT_RUN:
        assert part in texts, part


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.document}:{c.line}")
def test_every_command_is_one_that_its_program_takes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verb, its flags, its recipe and its words `a.b=c`, whether it is run or not."""
    words = words_of(here(command))
    assert words, command.where
    while re.fullmatch(r"[A-Z]+=\S+", words[0]):
        words.pop(0)
    try:
        takes(words, monkeypatch)
    except (SystemExit, AssertionError, argparse.ArgumentError) as e:
        raise AssertionError(f"{command.where}: {e!r}") from None


def takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words as their program would."""
    match words:
        case ["openlm", *rest]:
            PARSER.parse_args(rest)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            asked = get_args_parser().parse_args(rest)
            verb = ["train"] if not asked.module else []
            assert asked.training_script == ("openlm_lite" if asked.module else "train.py")
            PARSER.parse_args([*verb, *asked.training_script_args])
        case ["python", "train.py", *rest]:
            PARSER.parse_args(["train", *rest])
        case ["python", script, *rest] if script.endswith(".py"):
            assert (ROOT / script).is_file()
            if "ArgumentParser" in (ROOT / script).read_text():
                parse_script(ROOT / script, rest, monkeypatch)
        case ["python" | ".venv/bin/python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", "-c", "constraints.txt", "-e", package]:
            takes(["pip", "install", package.replace(".[", "openlm-lite[")], monkeypatch)
        case ["source", ".venv/bin/activate"] | ["python3", "-m", "venv", ".venv"]:
            pass
        case ["pip", "install", package]:
            extra = re.fullmatch(r"openlm-lite\[([\w-]+)\]", package)
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extra and extra[1] in project["optional-dependencies"]
        case ["sbatch", *rest]:
            takes_sbatch(rest)
        case ["bash", script, *names] if script.endswith("/run.sh"):
            assert names in ([], ["target"])
        case ["cat", _] | ["mkdir", "-p", "build"] | [".venv/bin/python", "-", *_]:
            pass
        case _:
            raise AssertionError("no parser is known for it: add one here")


def takes_sbatch(words: list[str]) -> None:
    at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    assert set(flags_of(" ".join(words[:at]))) <= SBATCH
    assert (ROOT / words[at]).is_file()
    rest = words[at + 1 :]
    if words[at].endswith("train.sbatch"):
        load_run(str(ROOT / rest[0]), rest[1:])
    else:
        PARSER.parse_args(["prepare", *rest[:1], "--out", *rest[1:]])


def parse_script(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script as far as it has parsed its words."""

    class ParsedError(Exception):
        pass

    def parse(self: argparse.ArgumentParser, *_: object) -> None:
        _, unknown = self.parse_known_args(words)
        assert not unknown, unknown
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(ParsedError):
        runpy.run_path(str(path), run_name="__main__")


# --- the runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quick") / "world"
    root.mkdir()
    quick_world(root)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("whole") / "world"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        whole_world(root)
    yield root


def test_the_quick_commands_of_all_documents_run(
    quick: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for document in DOCUMENTS:
        world = tmp_path / document.replace("/", "_")
        shutil.copytree(quick, world, symlinks=True)
        monkeypatch.chdir(world)
        write_files(document)
        for command in RUN:
            if command.document == document and is_quick(command):
                run(command, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_all_commands_of_a_document_run_in_their_order(
    document: str,
    whole: Path,
    tmp_path: Path,
    train_server: TrainServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = tmp_path / "world"
    shutil.copytree(whole, world, symlinks=True)
    monkeypatch.chdir(world)
    write_files(document)
    for number, command in enumerate(c for c in RUN if c.document == document):
        run(command, monkeypatch, capsys, train_server, number)


def write_files(document: str) -> None:
    """The recipes that a document shows, under the names that it gives them."""
    for name, text in files_of(ROOT / document).items():
        Path(name).write_text(text)


def run(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: TrainServer | None = None,
    number: int = 0,
) -> None:
    """In the present folder. It ends as the document shows, or well, and says what is shown."""
    words = words_of(here(command)) or []
    words = [w for word in words for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    expected = cli.BAD_INPUT if command.output.startswith("openlm: ") else 0
    match words:
        case ["openlm" | "python", *rest] if words[0] == "openlm" or rest[0] == "train.py":
            rest = ["train", *rest[1:]] if rest[0] == "train.py" else rest
            make_way(rest)
            if "--watch" in rest:
                monkeypatch.setattr(runs.time, "sleep", interrupt)
            code = cli.main([*rest, *smaller(rest, number)])
        case ["torchrun", *_] if "train.py" in words:
            assert server is not None
            n = int(words[words.index("--nproc-per-node") + 1])
            code = through(server, words[words.index("train.py") + 1 :], n, number)
        case ["torchrun", *rest]:
            code = process("-m", "torch.distributed.run", *rest, "--limit", "2")
        case ["python", *rest]:
            code = process(*rest, *(SCRIPTS.get(rest[0], ())))
        case ["cat", *files]:
            assert files and all(Path(file).read_text() for file in files), command.where
            code = 0
        case _:
            raise AssertionError(f"{command.where}: {words[0]}: how is it run?")
    said = capsys.readouterr()
    assert code == expected, f"{command.where}: {code}\n{said.out}\n{said.err}"
    if words[1:2] in (["config"], ["fit"]):
        shown = [line for line in command.output.split("\n") if line not in ("", "…")]
        lines = (said.out + said.err).rstrip("\n").split("\n")
        if (tail := re.search(r"\| tail -(\d+)$", command.text)) is not None:
            assert shown == lines[-int(tail[1]) :], command.where
        missing = [line for line in shown if line not in lines]
        assert not missing, f"{command.where}: {missing}\n{said.out}"
    if "--plan" in words and "--out" in words:
        finish_ladder(Path(words[words.index("--out") + 1]))


SCRIPTS = {
    "benchmarks/coordinate_check.py": ("--widths", "32", "64", "--steps", "1", "--seeds", "1"),
}
"""words that make them quick"""


def smaller(words: list[str], number: int) -> list[str]:
    """Words behind those of a command that make it small; each command has its own run folder."""
    verb, *rest = words
    text = " ".join(rest)
    match verb:
        case "train" if rest[0] == "tutorial.yaml":
            more = ["scale=toy", "total_steps=4", "model.max_seq_len=256"]
            return more if "run.dir=" in text else [*more, "run.dir=runs/tutorial"]
        case "train" if rest[0].endswith(".yaml") and "/" not in rest[0]:  # a small recipe of ours
            return [] if "run.dir=" in text else [f"run.dir=runs/new_{number}"]
        case "train":
            more = [
                "scale=toy",
                "total_tokens=null",
                "total_steps=2",
                "data.val={}",
            ]
            if "run.dir=runs/forty" not in text:  # which the next command evaluates
                more.append(f"run.dir=runs/new_{number}")
            if "schedule.cooldown_steps=" in text:
                more.append("schedule.cooldown_steps=1")
            return more if "data.train=" in text else [*more, f"data.train={SHARDS}"]
        case "bench":
            return ["--steps", "1", "--warmup", "0", "scale=toy", f"data.train={SHARDS}"]
        case "generate":
            return ["--max-new-tokens", "4"]
        case "eval" if "--suite aiw" in text:
            return ["--aiw-trials", "0" if "--aiw-trials" in text else "1", "--aiw-drawn", "1"]
        case "eval" if "--suite" in text or "--dump-prompts" in text:
            return ["--limit", "2"]
        case "prepare" if "--from-shards" in text:
            return ["--workers", "1"]
        case "prepare":
            more = ["--val-fraction", "0.2"] if "--val-fraction" in text else []
            return ["--workers", "1", "--block-tokens", "512", *more]
        case _:
            return []


SHARDS = "runs/quickstart-data/train"


def make_way(words: list[str]) -> None:
    """Take away what a command is to make, where the world has it."""
    verb, *rest = words
    made = {"prepare": rest[rest.index("--out") + 1]} if verb == "prepare" else {}
    made |= {"export": rest[1], "import": rest[1]} if verb in ("export", "import") else {}
    made |= {"average": rest[0]} if verb == "average" else {}
    if verb in made:
        shutil.rmtree(made[verb], ignore_errors=True)


def through(server: TrainServer, words: list[str], world: int, number: int) -> int:
    """Ranks of `train`, as torchrun would start them, in seconds."""
    log = Path.cwd() / f"ranks_{number}.txt"
    words = [*words, *smaller(["train", *words], number)]
    codes = server.train(*words, world=world, log=log, folder=Path.cwd())["codes"]
    print(log.read_text())
    return max(codes, key=abs)


def process(*words: str) -> int:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode


def interrupt(_: float) -> None:
    raise KeyboardInterrupt
