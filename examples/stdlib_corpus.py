"""A corpus that every machine with Python has: the standard library's own sources.

    python examples/stdlib_corpus.py corpus.jsonl

Writes one JSON line {"text": …, "source": …} per file (tests and code tables left out) and per
topic of `help()`: about 10 MB. Any such file of yours trains in the same way.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

# tests, tables of character codes, and what is installed beside the library
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "__pycache__"}
SKIPPED_FILES = {"entities.py", "stringprep.py", "locale.py"}  # tables too


def main(out: str) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        skipped = name.name in SKIPPED_FILES or name.name.startswith("_sysconfigdata")
        if not skipped and SKIPPED_FOLDERS.isdisjoint(name.parts):
            documents[str(name)] = path.read_text(encoding="utf-8", errors="ignore")
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions pack it apart
        topics = {}
    documents |= {f"help({name!r})": text for name, text in topics.items()}

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as f:
        for source, text in documents.items():
            f.write(json.dumps({"text": text, "source": source}) + "\n")
    print(f"{out}: {len(documents)} documents, {sum(map(len, documents.values())) / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
