"""What a planned ladder leaves on the disk, and the scripts that train it.

::

    DIR/ladder.json     the manifest: name, folder, N, D, FLOPs of each run
        s_4x.yaml …     a recipe per run
        run.sh          trains them here, one after another
        array.sbatch    trains them under Slurm, one per task
        s_4x/ …         the runs, once they are begun; s_4x.done once they are done
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from openlm_lite import storage
from openlm_lite.errors import InputError
from openlm_lite.scaling.ladder import Plan
from openlm_lite.scaling.plan_text import run_facts
from openlm_lite.scaling.table import MANIFEST_NAME

_RUN = """\
#!/usr/bin/env bash
# Trains the runs of a ladder, one after another, cheapest first. The same command goes on: what is
# done is skipped, what was stopped resumes.
#
#     bash run.sh              all but the target
#     bash run.sh target       these
#     NPROC=2 bash run.sh      on two processes
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd @FROM@ # where it was planned: the recipes' paths start there
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

names=(@NAMES@)
if [ $# -gt 0 ]; then
    names=("$@")
fi
for name in "${names[@]}"; do
    if [ ! -f "$here/$name.yaml" ]; then
        echo "run.sh: $name: no such run in $here" >&2
        exit 2
    fi
    if [ -e "$here/$name.done" ]; then
        echo "run.sh: $name: done"
        continue
    fi
    words=(train "$here/$name.yaml" "run.dir=$here/$name")
    if [ "${NPROC:-1}" = 1 ]; then
        python -m openlm_lite "${words[@]}"
    else
        torchrun --standalone --nproc-per-node "$NPROC" -m openlm_lite "${words[@]}"
    fi
    touch "$here/$name.done"
done
"""

_ARRAY = """\
#!/bin/bash
# Trains the runs of a ladder under Slurm, each on one node, across as many time limits as it takes.
#
#     sbatch --gpus-per-node 8 array.sbatch        all but the target
#     sbatch --array=@TARGET@ … array.sbatch        the target
#
# The site's own words (partition, account, time, GPUs) go on the sbatch line.
#SBATCH --job-name=openlm-ladder
#SBATCH --array=0-@LAST@
#SBATCH --ntasks=1
# To this shell, before the time limit; the ranks are asked to save, and the task is requeued.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

set -euo pipefail

asked=
trap 'asked=1' USR1

here=@HERE@ # Slurm runs a copy of this file
cd @FROM@ # where it was planned: the recipes' paths start there
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

names=(@NAMES@ target)
name=${names[SLURM_ARRAY_TASK_ID]}
if [ -e "$here/$name.done" ]; then
    echo "array.sbatch: $name: done"
    exit 0
fi
nproc=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
share=$((SLURM_CPUS_ON_NODE / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}

stop_mark() { stat -c '%i %y' "$here/$name/stopped.json" 2>/dev/null || true; }
mark_before=$(stop_mark)

# To torchrun, 75 ("stopped on request") would be a failure; stopped.json tells a stop from the end.
rank='
import sys
from openlm_lite.__main__ import leave, main

code = main(["train", *sys.argv[1:]])
leave(0 if code == 75 else code)
'
# Requests to stop go past torchrun, which would die of them, to its ranks, every second: what they
# do not hear while they start, they hear later.
(trap '' USR1 && exec torchrun --standalone --nproc-per-node "$nproc" \\
    --no-python python -c "$rank" "$here/$name.yaml" "run.dir=$here/$name") &
agent=$!
trap 'kill -TERM $agent 2>/dev/null' TERM
while kill -0 $agent 2>/dev/null; do
    if [ -n "$asked" ]; then
        pkill -USR1 -P $agent || true
    fi
    sleep 1
done
code=0
wait $agent || code=$?

mark=$(stop_mark)
if [ -n "$mark" ] && [ "$mark" != "$mark_before" ]; then
    # not SLURM_JOB_ID: for one of the tasks that number means the whole array
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "array.sbatch: $name stopped with a checkpoint; requeueing $task"
    scontrol requeue "$task" || true # refused: end with 75 all the same
    exit 75
fi
if [ "$code" = 0 ]; then
    touch "$here/$name.done"
fi
exit "$code"
"""


def write_plan(plan: Plan, out: str, budget: float | None) -> None:
    """Write the folder, whole or not at all. One that holds this very plan stays as it is.

    Raises InputError where `out` holds anything else.
    """
    folder = Path(out)
    files = _files(plan, folder, budget)
    if folder.exists():
        manifest = folder / MANIFEST_NAME
        if manifest.is_file() and manifest.read_text(encoding="utf-8") == files[MANIFEST_NAME]:
            return
        holds = "another plan" if manifest.is_file() else "other things"
        raise InputError(f"--out {out}: exists and holds {holds}; name a new folder")
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, text in files.items():
            storage.write_bytes(str(temporary / name), text.encode())
        temporary.rename(folder)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written: {e.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files(plan: Plan, folder: Path, budget: float | None) -> dict[str, str]:
    everything = [*plan.runs, plan.target]
    names = " ".join(shlex.quote(run.name) for run in plan.runs)
    words = {
        "@FROM@": shlex.quote(os.getcwd()),
        "@HERE@": shlex.quote(str(folder.absolute())),
        "@NAMES@": names,
        "@LAST@": str(len(plan.runs) - 1),
        "@TARGET@": str(len(plan.runs)),
    }
    manifest: dict[str, Any] = {
        "format_version": 1,
        "ladder": plan.name,
        "budget": budget,
        "runs": [
            run_facts(run)
            | {"folder": run.name, "recipe": f"{run.name}.yaml", "is_target": run.is_target}
            for run in everything
        ],
    }
    return {
        **{f"{run.name}.yaml": run.recipe for run in everything},
        "run.sh": _filled(_RUN, words),
        "array.sbatch": _filled(_ARRAY, words),
        MANIFEST_NAME: json.dumps(manifest, indent=2) + "\n",
    }


def _filled(template: str, words: dict[str, str]) -> str:
    for mark, word in words.items():
        template = template.replace(mark, word)
    return template
