"""The same texts through CTranslate2 and through PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
# In processes of their own, as the worker is one: the libraries bring threads that they share with nobody.
ENCODE = """
import sys, numpy as np
from memory_system.embedding import encoders, model
texts = ["", "\\x00", "a", "ünïcödé 🙂 текст 東京", "word " * 3000]
texts += ["the cat sat on mat %d " % n * n for n in range(40)]
encoder, model_id = encoders.load(model.resolve("all-MiniLM-L6-v2"), sys.argv[1], encoders.Threads(1, 2))
np.save(sys.argv[2], encoder.encode(texts))
print(model_id, encoder.name, "torch" in sys.modules)
"""


def encode(backend: str, folder: Path) -> tuple[np.ndarray, list[str]]:
    path = folder / f"{backend}.npy"
    ended = subprocess.run(
        [sys.executable, "-c", ENCODE, backend, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=140
    )
    assert ended.returncode == 0, ended.stderr
    vectors = np.load(path)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), ended.stdout.split()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_give_the_same_vectors_and_id_and_one_needs_no_pytorch(tmp_path: Path) -> None:
    ours, (our_id, name, torch_imported) = encode("auto", tmp_path)
    theirs, (their_id, _, _) = encode("torch", tmp_path)
    assert (name, torch_imported) == ("ctranslate2", "False")
    assert our_id == their_id
    assert (ours * theirs).sum(axis=1).min() > 0.99999
    # Neighbours in the list are told apart: rows in another order would not pass the line above.
    assert (ours * np.roll(theirs, 1, axis=0)).sum(axis=1).min() < 0.99
