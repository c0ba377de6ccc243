"""BERT models with mean pooling (all-MiniLM and its kin) on CTranslate2: the same weights in fp32, without PyTorch.

The model's own files are read and laid out for CTranslate2 at every start, so nothing derived is kept on disk.
Only the worker process imports this module.
"""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memory_system.embedding.interface import Vectors

_WEIGHTS: Final = "model.safetensors"
# Texts of one call of the library; more gain nothing and are padded further, see docs/decisions.md.
_GROUP_TEXTS: Final = 16
_MODULES: Final = ("Transformer", "Pooling", "Normalize")

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the configuration files of a model say of it."""

    layers: int
    heads: int
    epsilon: float
    max_tokens: int


def read_shape(directory: Path) -> Shape:
    """Read the shape of the model in `directory`. Raises ValueError, with the reason, when it is of another kind."""
    bert = _json(directory / "config.json")
    _require(bert.get("model_type") == "bert", "is no BERT model")
    _require(bert.get("hidden_act") == "gelu", "has another activation than gelu")
    _require(bert.get("position_embedding_type", "absolute") == "absolute", "has no absolute positions")
    _require((directory / _WEIGHTS).is_file(), f"has no {_WEIGHTS}")
    _require((directory / "tokenizer.json").is_file(), "has no tokenizer.json")
    _check_modules(directory)
    sentence = _json(directory / "sentence_bert_config.json")
    _require(not sentence.get("do_lower_case"), "changes texts before its tokenizer")
    longest = bert["max_position_embeddings"]
    return Shape(
        layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        epsilon=bert["layer_norm_eps"],
        max_tokens=min(sentence.get("max_seq_length") or longest, longest),
    )


class BertEncoder:
    """A loaded model. `encode` is called by one thread at a time."""

    name = "ctranslate2"
    device = "cpu"
    # Equal to PyTorch's fp32 in all but the last digits, so the vectors may be compared with those.
    precision = ""

    def __init__(self, directory: Path, threads: int) -> None:
        """Load the model. Raises ImportError without the library, ValueError for what `read_shape` refuses, and
        whatever the libraries raise for files that are broken."""
        shape = read_shape(directory)
        self.max_tokens: int | None = shape.max_tokens
        self._tokenizer = _tokenizer(directory, shape.max_tokens)
        self._encoder = _load(directory, shape, threads)
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bert")

    def encode(self, texts: list[str]) -> Vectors:
        """Return the mean of the token vectors of each text: (len(texts), dimension), not of unit length."""
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        # The longest first: the threads then end at about the same time.
        by_length = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
        size = group_size(len(tokens), self.threads)
        groups = [by_length[start : start + size] for start in range(0, len(tokens), size)]
        means = self._pool.map(self._means, [[tokens[row] for row in group] for group in groups])
        vectors = np.concatenate(list(means))
        result = np.empty_like(vectors)
        result[by_length] = vectors
        return result

    def _means(self, tokens: list[list[int]]) -> Vectors:
        hidden = np.array(self._encoder.forward_batch(tokens).last_hidden_state, dtype=np.float32)
        return np.stack([rows[: len(ids)].mean(axis=0) for rows, ids in zip(hidden, tokens, strict=True)])


def group_size(texts: int, threads: int) -> int:
    """Texts of one call, so that every thread has one where there are enough texts."""
    return max(1, min(_GROUP_TEXTS, -(-texts // threads)))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"has no readable {path.name}") from error
    _require(isinstance(content, dict), f"has an odd {path.name}")
    found: dict[str, Any] = content
    return found


def _require(fulfilled: bool, otherwise: str) -> None:
    if not fulfilled:
        raise ValueError(otherwise)


def _check_modules(directory: Path) -> None:
    """Refuse what does more between text and vector than transformer, mean of the tokens, unit length."""
    try:
        modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
        kinds = tuple(module["type"].rsplit(".", 1)[-1] for module in modules)
        pooling = _json(directory / modules[1]["path"] / "config.json")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError("has no readable list of modules with a pooling") from error
    _require(kinds in (_MODULES, _MODULES[:2]), f"is made of {', '.join(kinds)}")
    modes = {name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True}
    modes.discard("include_prompt")
    _require(modes == {"mean_tokens"} or pooling.get("pooling_mode") == "mean", "pools otherwise than by the mean")
    whole = directory / "config_sentence_transformers.json"
    prompt = _json(whole).get("default_prompt_name") if whole.is_file() else None
    _require(prompt is None, "puts a prompt before texts")


def _tokenizer(directory: Path, max_tokens: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _load(directory: Path, shape: Shape, threads: int) -> Any:
    """Load the weights; each thread runs calls of its own, which share the weights."""
    import ctranslate2

    # The library reads its own format from a folder only; the files may go as soon as it has read them.
    with tempfile.TemporaryDirectory(prefix="embedding-") as folder:
        _convert(directory, shape, folder)
        return ctranslate2.Encoder(folder, device="cpu", compute_type="float32", inter_threads=threads, intra_threads=1)


def _convert(directory: Path, shape: Shape, folder: str) -> None:
    from safetensors.numpy import load_file

    weights = {name.removeprefix("bert."): value for name, value in load_file(directory / _WEIGHTS).items()}
    spec = _empty_spec(shape)
    encoder = spec.encoder
    encoder.scale_embeddings = False
    encoder.embeddings[0].weight = _fp32(weights, "embeddings.word_embeddings.weight")
    encoder.embeddings[1].weight = _fp32(weights, "embeddings.token_type_embeddings.weight")
    encoder.position_encodings.encodings = _fp32(weights, "embeddings.position_embeddings.weight")
    _set_norm(encoder.layernorm_embedding, weights, "embeddings.LayerNorm")
    for index, layer in enumerate(encoder.layer):
        _set_layer(layer, weights, f"encoder.layer.{index}")
    # The library wants names of the tokens, and reads none: texts come as numbers.
    spec.register_vocabulary([str(number) for number in range(len(encoder.embeddings[0].weight))])
    spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = shape.epsilon
    spec.validate()
    spec.save(folder)


def _empty_spec(shape: Shape) -> Any:
    # The specifications import PyTorch where they can, for seconds, and use nothing of it here.
    absent = object()
    known = sys.modules.get("torch", absent)
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from ctranslate2.specs import common_spec, transformer_spec
    finally:
        if known is absent:
            del sys.modules["torch"]
        else:
            sys.modules["torch"] = known  # type: ignore[assignment]
    encoder = transformer_spec.TransformerEncoderSpec(
        shape.layers,
        shape.heads,
        pre_norm=False,
        activation=common_spec.Activation.GELU,
        layernorm_embedding=True,
        num_source_embeddings=2,
        embeddings_merge=common_spec.EmbeddingsMerge.ADD,
    )
    return transformer_spec.TransformerEncoderModelSpec(encoder)


def _set_layer(layer: Any, weights: dict[str, Any], name: str) -> None:
    attention = f"{name}.attention"
    asked = [f"{attention}.self.{part}" for part in ("query", "key", "value")]
    # One product for the three, as the library expects them.
    layer.self_attention.linear[0].weight = np.concatenate([_fp32(weights, f"{part}.weight") for part in asked])
    layer.self_attention.linear[0].bias = np.concatenate([_fp32(weights, f"{part}.bias") for part in asked])
    _set_linear(layer.self_attention.linear[1], weights, f"{attention}.output.dense")
    _set_norm(layer.self_attention.layer_norm, weights, f"{attention}.output.LayerNorm")
    _set_linear(layer.ffn.linear_0, weights, f"{name}.intermediate.dense")
    _set_linear(layer.ffn.linear_1, weights, f"{name}.output.dense")
    _set_norm(layer.ffn.layer_norm, weights, f"{name}.output.LayerNorm")


def _set_linear(spec: Any, weights: dict[str, Any], name: str) -> None:
    spec.weight = _fp32(weights, f"{name}.weight")
    spec.bias = _fp32(weights, f"{name}.bias")


def _set_norm(spec: Any, weights: dict[str, Any], name: str) -> None:
    spec.gamma = _fp32(weights, f"{name}.weight")
    spec.beta = _fp32(weights, f"{name}.bias")


def _fp32(weights: dict[str, Any], name: str) -> Array:
    try:
        return np.ascontiguousarray(weights[name], dtype=np.float32)
    except KeyError:
        raise ValueError(f"has no weights {name}") from None
