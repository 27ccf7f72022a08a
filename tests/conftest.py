"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.train_server import TrainServer

REFERENCE_DATA = Path(
    os.environ.get("OPENLM_LITE_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data")
)

# no deadline: machines are shared
settings.register_profile("untimed", deadline=None, max_examples=40)
settings.load_profile("untimed")


def pytest_collection() -> None:
    """Each of xdist's workers imports all tests; collecting garbage meanwhile takes a quarter."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()  # modules stay: no collection during a test looks at them again
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference numerics; a plain clone has none, and such tests skip."""
    if not REFERENCE_DATA.is_dir():
        pytest.skip(f"no reference data at {REFERENCE_DATA} (set OPENLM_LITE_REFERENCE_DATA)")
    return REFERENCE_DATA


@pytest.fixture(scope="session")
def train_server() -> Iterator[TrainServer]:
    """Starts ranks of `openlm train` quickly."""
    with TrainServer() as server:
        yield server


@pytest.fixture(scope="session")
def toy_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a very small model on a very small corpus; data lies beside it."""
    from openlm_lite.data.prepare import PrepareConfig, prepare

    root = tmp_path_factory.mktemp("toy")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    corpus = root / "corpus"
    corpus.mkdir()
    for i in range(40):
        text = " ".join(rng.choices(words, k=400))
        (corpus / f"{i:02}.txt").write_text(text)
    prepare(
        PrepareConfig(
            inputs=(str(corpus),),
            out=str(root / "data"),
            train_tokenizer=300,
            val_fraction=0.2,
            block_tokens=512,
            blocks_per_shard=8,
            workers=1,
        )
    )
    recipe = root / "toy.yaml"
    recipe.write_text(
        f"""
run: {{dir: {root}/run}}
model: {{vocab_size: 300, d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, head_dim: 8,
        d_ff: 64, max_seq_len: 64, qk_norm: per_head, tie_embeddings: true}}
data: {{train: {root}/data/train, val: {{toy: {root}/data/val}}, seq_len: 32}}
global_batch_tokens: 256
micro_batch_size: 4
total_steps: 12
optim: {{lr: 5e-3}}
schedule: {{name: cosine_cooldown, warmup_steps: 3, end_lr: 1e-4, cooldown_steps: 4}}
loss: {{z_loss: 1e-4}}
parallel: {{precision: fp32}}
checkpoint: {{every_steps: 4}}
eval: {{every_steps: 5, tokens: 1024}}
log: {{every_steps: 4}}
"""
    )
    return recipe


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB; `mount -o remount,size=…` makes it larger."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)])
    if done.returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
