"""Documents to train on: sources, tokenizers and the loader that decides what a step trains on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from meshloom import _runtime
from meshloom._errors import DataError, IoError, NotSupported

if TYPE_CHECKING:
    from meshloom import _core
else:
    _core = _runtime.core

Document = _core.Document
DocumentRef = _core.DocumentRef
Loader = _core.Loader
Source = _core.Source
StepMembership = _core.StepMembership
Tokenizer = _core.Tokenizer
cached = _core.cached
concatenate = _core.concatenate
load_sentencepiece = _core.load_sentencepiece
train_sentencepiece = _core.train_sentencepiece

AnyTokenizer: TypeAlias = "Tokenizer | str | os.PathLike[str]"
"""A tokenizer, or the path of one."""

def _paths(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    if isinstance(paths, (str, os.PathLike)):
        return [os.fspath(paths)]
    return [os.fspath(path) for path in paths]


def _tokenizer(tokenizer: AnyTokenizer) -> Tokenizer:
    return load_tokenizer(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer file: `tokenizer.json`, a SentencePiece model, or a folder that holds one.

    Raises IoError or DataError that names the file.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        for candidate in ("tokenizer.json", "tokenizer.model"):
            if os.path.isfile(os.path.join(name, candidate)):
                return load_tokenizer(os.path.join(name, candidate))
        raise IoError(f"[data.tokenizer] {name} holds neither tokenizer.json nor tokenizer.model")
    return _load_json(name) if name.endswith(".json") else load_sentencepiece(name)


def _load_json(path: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise NotSupported(
            f"[data.tokenizer] {path} needs the package `tokenizers`: pip install tokenizers"
        ) from error
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise IoError(f"[data.tokenizer] cannot read {path}: {error.strerror}") from error
    try:
        inner = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"[data.tokenizer] {path} is no tokenizer.json: {error}") from error
    inner.no_padding()
    inner.no_truncation()
    return _core.callback_tokenizer(
        lambda text: inner.encode(text, add_special_tokens=False).ids,
        lambda ids: inner.decode([int(i) for i in ids], skip_special_tokens=False),
        vocab_size=inner.get_vocab_size(),
        bos=_special(inner, ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")),
        eos=_special(inner, ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")),
        fingerprint=hashlib.sha256(content).hexdigest(),
    )


def _special(inner: Any, names: Sequence[str]) -> int:
    """Id of the first special token with one of these names; -1 where there is none."""
    special = {
        token.content: number
        for number, token in inner.get_added_tokens_decoder().items()
        if token.special
    }
    return next((special[name] for name in names if name in special), -1)


def documents(values: Iterable[Any], *, name: str = "documents", max_tokens: int = 1_000_000_000) -> Source:
    """Documents of any Python iterable.

    Each is a Document, a mapping with `tokens` and an optional `loss_mask`, or a sequence of tokens.
    A sequence (`len` and `[i]`) is read when its documents are needed, from any thread, and must give
    the same document every time; any other iterable is read to its end at once.
    """
    if isinstance(values, Sequence) or (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        return _core.documents_of_sequence(values, name)
    return _core.documents_of_iterable(values, name, max_tokens)


def text_folder(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: AnyTokenizer,
    *,
    extensions: Iterable[str] = (),
    add_bos: bool = False,
    add_eos: bool = True,
    invalid_utf8: str = "error",
) -> Source:
    """A document per text file of folders, found recursively. `tokenizer`: one, or its path."""
    return _core.text_folder(
        _paths(paths), _tokenizer(tokenizer), extensions=list(extensions), add_bos=add_bos,
        add_eos=add_eos, invalid_utf8=invalid_utf8,
    )


def jsonl(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: AnyTokenizer | None = None,
    *,
    add_bos: bool = False,
    add_eos: bool = True,
    invalid_utf8: str = "error",
) -> Source:
    """A document per line: `{"text": ...}`, or `{"tokens": [...], "loss_mask": [...]}`."""
    return _core.jsonl(
        _paths(paths), *([] if tokenizer is None else [_tokenizer(tokenizer)]), add_bos=add_bos,
        add_eos=add_eos, invalid_utf8=invalid_utf8,
    )
