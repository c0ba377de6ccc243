"""Token counts: by the model's own tokenizer, by a file, by characters."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents import token_counts
from memory_system.carriers import CARRIERS
from memory_system.errors import ConfigError
from memory_system.settings import PROJECT, Settings, load_settings


def settings(**values: str) -> Settings:
    """Settings with these keys: agents__tokenizer="characters"."""
    environ = {f"MEMORY__{name.upper()}": value for name, value in values.items()}
    return load_settings(environ={**environ, "MEMORY_CONFIG": "/dev/null"})


@pytest.fixture(scope="module")
def model() -> token_counts.TokenCounter:
    return token_counts.load(settings())


def test_the_models_own_tokenizer_counts_without_what_it_adds_around_a_text(model: token_counts.TokenCounter) -> None:
    assert model.count("") == 0
    assert model.count("Ada prefers trains to planes.") == 6
    assert model.count("trains") == 1
    # A word that the vocabulary does not have is several tokens.
    assert model.count("Batangueño") > 1


def test_no_text_is_too_long(model: token_counts.TokenCounter) -> None:
    """The model itself reads 128 tokens, which its tokenizer's file says."""
    assert model.count("tea " * 5000) == 5000
    assert model.count("tea\n" * 129) == 129


def test_lines_add_up(model: token_counts.TokenCounter) -> None:
    lines = ["Ada: I prefer trains.\n", "\n8 May 2023\n", "Ben: So do I!\n"]
    assert model.count("".join(lines)) == sum(model.count(line) for line in lines)


def test_a_file_of_ones_own(model: token_counts.TokenCounter) -> None:
    directory = CARRIERS["all-MiniLM-L6-v2"].directory()
    assert directory is not None
    named = token_counts.load(settings(agents__tokenizer=str(directory / "tokenizer.json")))
    folder = token_counts.load(settings(embedding__model=str(directory)))
    for text in ("I took the night train.", "Kumusta ka?", ""):
        assert named.count(text) == folder.count(text) == model.count(text)


def test_characters() -> None:
    counter = token_counts.load(settings(agents__tokenizer="characters"))
    assert [counter.count("x" * length) for length in (0, 1, 4, 5, 400)] == [0, 1, 1, 2, 100]


@pytest.mark.parametrize("file", ["no_such_file.json", "torn.json"])
def test_what_is_no_tokenizer_is_a_clear_error(tmp_path: Path, file: str) -> None:
    (tmp_path / "torn.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigError, match=r"agents\.tokenizer: .*json"):
        token_counts.load(settings(agents__tokenizer=str(tmp_path / file)))


@pytest.mark.parametrize("name", ["no-such-model", "owner/no-such-model", "not a name at all/"])
def test_a_model_that_is_not_here(name: str) -> None:
    with pytest.raises(ConfigError, match=r"agents\.tokenizer: there is no tokenizer\.json .*or characters"):
        token_counts.load(settings(embedding__model=name))


def test_a_host_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="install the package tokenizers, or set it to characters"):
        token_counts.load(settings())


def test_counting_loads_no_model() -> None:
    code = (
        "import sys; from agents import token_counts; from memory_system.settings import load_settings;"
        "token_counts.load(load_settings()).count('tea');"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
