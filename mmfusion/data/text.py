"""Text: tokenizers trained on the training split or read from a file, and token ids with their mask.

B batch · T positions
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.data.regular_files import read_text
from mmfusion.data.tokenizer_files import CHARACTERS, id_count, open_tokenizer
from mmfusion.errors import UserError, one_line

PAD, OOV = 0, 1
TEXT_CHARACTERS = 1 << 20  # of one text
SPECIAL = ["[PAD]", "[OOV]"]
FILES = (".json", ".txt")  # suffixes of a tokenizer's file
OPTIONS = {
    "tokenizer": "word",  # or "bpe"; or a file: `tokenizer.json`, or `vocab.txt` of a published BERT
    "vocabulary_size": 5000,  # maximum number of ids, including padding and out-of-vocabulary
    "length": 32,  # tokens; longer texts are truncated, shorter ones padded at the end
    "augment": {"drop": 0.0},  # rate at which tokens of training texts become out-of-vocabulary, sampled in each step
}


def as_string(value: Any) -> str:
    """Returns a text value as `str`; None and NaN are the empty text. Raises UserError for lists and arrays."""
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):  # NaN is missing in pandas
        return ""
    if isinstance(value, np.ndarray):
        raise UserError(f"a text or group must be one string, got an array {value.dtype}{list(value.shape)}")
    if isinstance(value, (list, tuple, Mapping)):
        raise UserError(f"a text or group must be one string, got a {type(value).__name__} of {len(value)}")
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def train_tokenizer(texts: Iterable[str], name: str, vocabulary_size: int) -> Tokenizer:
    """Returns a tokenizer trained on the texts, independently of their order.

    `word` lower-cases, splits at white space and punctuation, and keeps the most frequent words, ties in code-point
    order; other words become [OOV]. `bpe` is byte-level byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909),
    which has no unknown words. Id 0 is [PAD], id 1 [OOV]; these strings have no special meaning in a text. A file is
    read instead of trained, for encoders with published weights, and has its own ids.

    Args:
      texts: the training split's texts.
      name: `word`, `bpe`, or a file, see `from_file`.
      vocabulary_size: maximum number of ids, including the two special ones.

    Raises:
      UserError: unknown name, a file that is not a tokenizer, or a vocabulary too small for its required ids.
    """
    if name.endswith(FILES):
        return from_file(name)
    if name not in TOKENIZERS:
        raise UserError("unknown name", path="tokenizer", value=name, choices=TOKENIZERS)
    train, smallest = TOKENIZERS[name]
    if vocabulary_size < smallest:
        raise UserError(
            f"too small: a {name} tokenizer needs at least {smallest} ids",
            path="vocabulary_size",
            value=vocabulary_size,
        )
    return train(texts, vocabulary_size)


def _train_word(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=SPECIAL[OOV]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    counts = Counter()
    for text in texts:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    words = SPECIAL + ranked[: vocabulary_size - len(SPECIAL)]
    tokenizer.model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[OOV])
    return tokenizer


def _train_bpe(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Removes the registered special tokens, as they match in raw text, where "[PAD]" would become padding.
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))


# Training function and minimum number of ids; byte-level BPE starts from all 256 bytes.
TOKENIZERS = {"word": (_train_word, len(SPECIAL) + 1), "bpe": (_train_bpe, len(SPECIAL) + 256)}


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, *, special: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids `[n, T]` int32 and their mask `[n, T]` bool, truncated or padded with 0 at the end.

    A text without tokens has an all-False mask and counts as absent.

    Args:
      tokenizer: from `train_tokenizer`, `from_file` or `from_json`.
      texts: n strings.
      length: T.
      special: whether to add the tokenizer's start and end tokens, if it has any.
    """
    ids = np.full((len(texts), length), PAD, np.int32)  # [n, T]
    mask = np.zeros((len(texts), length), bool)  # [n, T]
    stripped = [text.strip() for text in texts]  # byte-level BPE has tokens for white space
    special = special and tokenizer.post_processor is not None
    for row, encoding in enumerate(_encodings(tokenizer, stripped, special)):
        if not stripped[row]:  # a published tokenizer returns its special tokens for an empty text
            continue
        tokens = encoding.ids[:length]
        if special and length < len(encoding.ids) and encoding.special_tokens_mask[-1]:
            tokens[-1] = encoding.ids[-1]  # a truncated text keeps its end token
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def _encodings(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[Encoding]:
    """Returns the library's encodings; raises ValueError for a text that is too long or that the tokenizer refuses."""
    longest = max(map(len, texts), default=0)
    if longest > TEXT_CHARACTERS:
        raise ValueError(f"a text of {longest:,} characters, more than {TEXT_CHARACTERS:,}")
    try:
        return tokenizer.encode_batch_fast(texts, add_special_tokens=special)
    except Exception as error:  # the Rust library raises a bare Exception
        raise ValueError(f"the tokenizer refuses it: {one_line(error)}") from error


def from_file(path: str) -> Tokenizer:
    """Returns a published tokenizer.

    Args:
      path: a `tokenizer.json` of the tokenizers library, or a BERT's `vocab.txt` with one token per line; texts are
        lower-cased if no token has a capital letter.

    Raises:
      UserError: the file cannot be read, or has another format.
    """
    try:
        content = read_text(os.path.expanduser(path), CHARACTERS)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the tokenizer cannot be read: {reason}", path=path) from error
    if path.endswith(".json"):
        return from_json(content, path)
    tokens = content.removesuffix("\n").split("\n")  # other line separators may be tokens
    ids = {token: i for i, token in enumerate(tokens)}
    if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - set(ids):
        raise UserError(f"no token {min(missing)}: it must be a BERT's vocab.txt with one token per line", path=path)
    lowercase = all(token == token.lower() for token in tokens if not token.startswith("["))
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def augment(ids: jax.Array, keys: jax.Array, options: Mapping[str, float]) -> jax.Array:
    """Returns ids `[B, T]`, each replaced by [OOV] with probability `options["drop"]`; inside jit."""
    if not options["drop"]:
        return ids
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, options["drop"], ids.shape[1:]))(keys)
    return jnp.where(dropped, OOV, ids)


def to_json(tokenizer: Tokenizer) -> str:
    """Returns the tokenizer as a JSON string."""
    return tokenizer.to_str()


def from_json(text: str, path: str = "") -> Tokenizer:
    """Returns the tokenizer of a JSON string, which was read from `path`; for errors see `open_tokenizer`."""
    return open_tokenizer(text, path)


def _shape(options: Options, _: Tokenizer) -> tuple[tuple[int, ...], Any, int]:
    return (options["length"],), np.int32, options["length"]


def _strict(value: Any) -> str:
    """Returns a text value as `str`; raises ValueError for bytes that are not UTF-8, such as those of an image."""
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"not text in UTF-8: {value[:12]!r}...") from error
    return as_string(value)


def _decode(value: Any, options: Options, tokenizer: Tokenizer) -> Decoded:
    ids, mask = encode(tokenizer, [_strict(value)], options["length"])
    return (ids[0], mask[0]) if mask.any() else None


def _fit(values: Sequence[Any], options: Options) -> str:
    texts = [as_string(value) for value in values]
    return to_json(train_tokenizer(texts, options["tokenizer"], options["vocabulary_size"]))


def _unknown(inputs: np.ndarray, mask: np.ndarray, options: Options, _: Tokenizer) -> dict[str, tuple[int, int]]:
    """Returns the number of out-of-vocabulary words, and of words; nothing for tokenizers without unknown words."""
    return {"words": (int((inputs[mask] == OOV).sum()), int(mask.sum()))} if options["tokenizer"] == "word" else {}


def _encoder_kwargs(options: Options, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"vocabulary": id_count(tokenizer)}


TYPE = ModalityType(
    OPTIONS,
    _shape,
    _decode,
    fit=_fit,
    load=from_json,
    encoder_kwargs=_encoder_kwargs,
    augment=augment,
    unknown=_unknown,
    takes=("text", "bytes"),
)
