#!/usr/bin/env bash
# The whole path on two CPU cores: text -> shards -> trained model -> Hugging Face -> text.
# `make quickstart` installs what it needs into .venv and runs this. A second run finds everything
# done and only shows it; `rm -r runs` starts anew.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 # a thread per process

say() { # the command, such that it can be pasted, and what it says
    printf '\n$'
    for word; do
        case $word in *[!A-Za-z0-9_./:=-]*) word=${word@Q} ;; esac
        printf ' %s' "$word"
    done
    echo
    "$@"
}

[ -f runs/stdlib.jsonl ] || say python examples/stdlib_corpus.py runs/stdlib.jsonl
say openlm prepare runs/stdlib.jsonl --out runs/quickstart-data \
    --train-tokenizer 2048 --val-fraction 0.03 --block-tokens 8192
say torchrun --standalone --nproc-per-node 2 train.py recipes/quickstart.yaml
say openlm plot runs/quickstart
[ -d runs/quickstart/hf ] || say openlm export runs/quickstart runs/quickstart/hf
say python examples/generate_with_transformers.py runs/quickstart/hf 'def __init__(self, name):
    """'
python examples/quickstart_summary.py runs/quickstart
