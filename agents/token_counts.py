"""How many tokens a text has, by the tokenizer that the settings name.

    tokens = token_counts.load(settings)
    tokens.count("Ada prefers trains to planes.")     # 6

Counted are the tokens of the text alone, without those that a model adds around its input.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from memory_system.carriers import CARRIERS, HUB_DEFAULT_OWNER, short_name
from memory_system.errors import ConfigError
from memory_system.settings import PROJECT, Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL: Final = "model"
CHARACTERS: Final = "characters"
CHARS_PER_TOKEN: Final = 4
_FILE: Final = "tokenizer.json"
# Counting a turn of a conversation costs 60 µs, and the same turns come again with every question.
_CACHED: Final = 20_000
_CACHED_CHARS: Final = 1_000


class TokenCounter(Protocol):
    """Safe to use from several threads."""

    def count(self, text: str) -> int:
        """Tokens of the text; 0 for an empty one."""
        ...


class CharacterCounts:
    """A quarter of the characters, rounded up: near enough for English where there is no tokenizer."""

    def count(self, text: str) -> int:
        return -(-len(text) // CHARS_PER_TOKEN)

    def __repr__(self) -> str:
        return "CharacterCounts()"


class TokenizerCounts:
    """Counts by a tokenizer of the library `tokenizers`; text of any length, never cut."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._name = name
        self._known = lru_cache(_CACHED)(self._counted)

    def count(self, text: str) -> int:
        return self._known(text) if len(text) <= _CACHED_CHARS else self._counted(text)

    def _counted(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __repr__(self) -> str:
        return f"TokenizerCounts({self._name})"


def load(settings: Settings) -> TokenCounter:
    """The counter that `agents.tokenizer` names. Raises ConfigError when there is none, with what to do."""
    wanted = settings.agents.tokenizer
    if wanted == CHARACTERS:
        return CharacterCounts()
    file = _file_of_model(settings.embedding.model) if wanted == MODEL else PROJECT / Path(wanted).expanduser()
    if file is None or not file.is_file():
        reason = f"there is no {_FILE} of {settings.embedding.model!r} here" if wanted == MODEL else f"no file {file}"
        raise ConfigError(f"agents.tokenizer: {reason}; expected the path of one, or {CHARACTERS}")
    try:
        from tokenizers import Tokenizer
    except ImportError:  # a host that has the client alone
        raise ConfigError(
            f"agents.tokenizer: install the package tokenizers, or set it to {CHARACTERS}, a quarter of the characters"
        ) from None
    try:
        return TokenizerCounts(Tokenizer.from_file(str(file)), file.parent.name)
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for a file it cannot read
        raise ConfigError(f"agents.tokenizer: {file} is not a tokenizer: {str(error)[:200]}") from None


def _file_of_model(model: str) -> Path | None:
    """Where the tokenizer of `embedding.model` is on this disk: that of the weights that the service loads."""
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return directory / _FILE
    carrier = CARRIERS.get(short_name(model))
    carried = None if carrier is None else carrier.directory()
    return carried / _FILE if carried is not None else _downloaded(model)


def _downloaded(model: str) -> Path | None:
    """What a hub gave before; nothing is downloaded here."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model if "/" in model else f"{HUB_DEFAULT_OWNER}/{model}", _FILE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
