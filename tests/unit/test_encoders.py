"""Which library runs which model, and what CTranslate2 refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memory_system.embedding import bert, encoders, model
from memory_system.embedding.encoders import Threads
from memory_system.embedding.model import Source
from memory_system.errors import ConfigError

OFFICIAL = model.resolve("all-MiniLM-L6-v2")
ONE = Threads(1, 1)


class Loaded:
    """Stands for an encoder: which library was asked, and for what."""

    precision = ""

    def __init__(self, *asked: object) -> None:
        self.asked = asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The default model's description without its weights."""
    assert OFFICIAL.directory is not None
    ignored = shutil.ignore_patterns("model.safetensors", "vocab.txt", "README.md")
    copied = Path(shutil.copytree(OFFICIAL.directory, tmp_path / "model", ignore=ignored))
    (copied / "model.safetensors").touch()
    return copied


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Which encoder a backend would load, on a machine with or without a GPU."""

    def choose(backend: str, source: Source = OFFICIAL, *, gpu: bool = False, driver: bool = False) -> str:
        monkeypatch.setattr(encoders, "TorchEncoder", lambda _, device, precision, threads: Loaded(device, precision))
        monkeypatch.setattr(bert, "BertEncoder", lambda directory, threads: Loaded("ctranslate2", ""))
        monkeypatch.setattr(encoders, "_gpu", lambda: gpu)
        monkeypatch.setattr(encoders, "_GPU_DEVICES", (Path("/dev/null" if driver else "/dev/absent"),))
        loaded: Any = encoders._choose(source, backend, ONE)
        return "-".join(filter(None, loaded.asked))

    return choose


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_default_model_runs_on_ctranslate2(chosen: Callable[..., str]) -> None:
    assert chosen("auto") == "ctranslate2"
    assert chosen("ctranslate2") == "ctranslate2"


def test_a_gpu_is_used_only_where_pytorch_can(chosen: Callable[..., str]) -> None:
    assert chosen("auto", driver=True, gpu=True) == "cuda"
    assert chosen("auto", driver=True, gpu=False) == "ctranslate2"
    # Without a driver PyTorch is not even asked: importing it takes seconds.
    assert chosen("auto", driver=False, gpu=True) == "ctranslate2"
    assert chosen("cuda", gpu=True) == "cuda"
    with pytest.raises(ConfigError, match="finds no GPU"):
        chosen("cuda", gpu=False)


def test_a_backend_that_is_named_holds(chosen: Callable[..., str]) -> None:
    assert chosen("torch", driver=True, gpu=True) == "cpu"
    assert chosen("torch-bf16") == "cpu-bf16"
    with pytest.raises(ConfigError, match="unknown"):
        chosen("abacus")


def test_what_ctranslate2_does_not_take_runs_on_torch(
    folder: Path, chosen: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "config.json", model_type="mpnet")
    source = Source("other", folder, "00" * 32)
    assert chosen("auto", source) == "cpu"
    with pytest.raises(ConfigError, match="is no BERT model"):
        chosen("ctranslate2", source)
    assert chosen("auto", Source("owner/of-a-hub", None, None)) == "cpu"
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    assert chosen("auto") == "cpu"


def test_the_id_says_the_precision_unless_it_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Loaded()
    monkeypatch.setattr(encoders, "_choose", lambda *_: encoder)
    assert encoders.load(OFFICIAL, "auto", ONE)[1] == "all-MiniLM-L6-v2:53aa5117"
    monkeypatch.setattr(encoder, "precision", encoders.BF16, raising=False)
    assert encoders.load(OFFICIAL, "auto", ONE)[1] == "all-MiniLM-L6-v2:53aa5117:bf16"


def test_the_shape_is_read_from_the_description(folder: Path) -> None:
    assert bert.read_shape(folder) == bert.Shape(layers=6, heads=12, epsilon=1e-12, max_tokens=256)
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    assert bert.read_shape(folder).max_tokens == 512


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("config.json", {"model_type": "roberta"}, "no BERT"),
        ("config.json", {"hidden_act": "relu"}, "activation"),
        ("config.json", {"position_embedding_type": "relative_key"}, "absolute"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "changes texts"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pools otherwise"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "pools"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "prompt"),
    ],
)
def test_a_model_that_would_give_other_vectors_is_refused(
    folder: Path, file: str, values: dict[str, Any], reason: str
) -> None:
    change(folder / file, **values)
    with pytest.raises(ValueError, match=reason):
        bert.read_shape(folder)


@pytest.mark.parametrize(
    "file", ["config.json", "modules.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"]
)
def test_a_model_without_its_description_is_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ValueError, match="has no"):
        bert.read_shape(folder)


def test_a_further_module_is_refused(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Dense"):
        bert.read_shape(folder)


def test_broken_weights_are_a_clear_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no model that can be loaded"):
        encoders.load(Source("broken", folder, "00" * 32), "ctranslate2", ONE)


def test_without_room_for_its_files_torch_runs_the_model(
    chosen: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen("auto") == "ctranslate2"

    def full(directory: Path, threads: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bert, "BertEncoder", full)
    loaded: Any = encoders._choose(OFFICIAL, "auto", ONE)
    assert loaded.asked == ("cpu", "")
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="No space left"):
        encoders._choose(OFFICIAL, "ctranslate2", ONE)


@pytest.mark.parametrize(("texts", "threads", "size"), [(1, 2, 1), (3, 2, 2), (32, 2, 16), (200, 2, 16), (5, 8, 1)])
def test_every_thread_has_a_group_where_there_are_enough_texts(texts: int, threads: int, size: int) -> None:
    assert bert.group_size(texts, threads) == size
