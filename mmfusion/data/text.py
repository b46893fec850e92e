"""Text: vocabularies trained on the training split or read from a file, and ids with their mask.

B batch · T positions.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from mmfusion.errors import UserError

PAD, OOV = 0, 1
SPECIAL = ["[PAD]", "[OOV]"]
FILES = (".json", ".txt")  # what a tokenizer's file is called


def train_tokenizer(texts: Iterable[str], kind: str, vocabulary_size: int) -> Tokenizer:
    """Returns a tokenizer trained on the texts, the same for the same texts in any order.

    `word` lower-cases, splits at white space and punctuation, and keeps the most frequent words, ties in code-point
    order; other words become [OOV]. `bpe` is byte-level byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909),
    which has no unknown words. Id 0 is [PAD], id 1 [OOV]; text that spells them is ordinary text. A file is read and
    not trained, for encoders with published weights: their ids are its own.

    Args:
      texts: the training split's texts.
      kind: `word`, `bpe`, or a file, see `from_file`.
      vocabulary_size: the most ids there may be, the two special ones included.

    Raises:
      UserError: if the kind is unknown, the file is no tokenizer, or the vocabulary too small to hold what it must.
    """
    if kind.endswith(FILES):
        return from_file(kind)
    if kind not in TOKENIZERS:
        raise UserError(f"tokenizer {kind!r} is unknown; choose one of {', '.join(TOKENIZERS)}")
    train, smallest = TOKENIZERS[kind]
    if vocabulary_size < smallest:
        raise UserError(f"a {kind} vocabulary of {vocabulary_size} is too small; it needs at least {smallest} ids")
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
    # Registered special tokens are matched in raw text, where "[PAD]" would become padding: keep only their ids.
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))


# A kind's function, and the fewest ids it can do with: byte-level BPE starts from all 256 bytes.
TOKENIZERS = {"word": (_train_word, len(SPECIAL) + 1), "bpe": (_train_bpe, len(SPECIAL) + 256)}


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, *, special: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids `[n, T]` int32 and their mask `[n, T]` bool, truncated, and padded with 0 at the end.

    A text without a word has a mask of False, by which the pipeline knows it as absent.

    Args:
      tokenizer: what `train_tokenizer`, `from_file` or `from_json` returned.
      texts: n strings.
      length: T.
      special: add the tokens that begin and end a text, where the tokenizer has some.
    """
    ids = np.full((len(texts), length), PAD, np.int32)  # [n, T]
    mask = np.zeros((len(texts), length), bool)  # [n, T]
    stripped = [text.strip() for text in texts]  # byte-level BPE makes tokens of white space
    special = special and tokenizer.post_processor is not None
    for row, encoding in enumerate(tokenizer.encode_batch_fast(stripped, add_special_tokens=special)):
        if not stripped[row]:  # of which a published tokenizer makes its special tokens
            continue
        tokens = encoding.ids[:length]
        if special and length < len(encoding.ids) and encoding.special_tokens_mask[-1]:
            tokens[-1] = encoding.ids[-1]  # what ends a text ends a cut one, too
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def from_file(path: str) -> Tokenizer:
    """Returns a published tokenizer.

    Args:
      path: a `tokenizer.json` of the tokenizers library, or a BERT's `vocab.txt`, a token a line; letters are made
        small where no token has a capital one.

    Raises:
      UserError: the file cannot be read or is neither.
    """
    try:
        content = epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error}") from error
    if path.endswith(".json"):
        tokenizer = from_json(content)
        tokenizer.no_padding()  # lengths and masks are made here
        tokenizer.no_truncation()
        return tokenizer
    tokens = content.removesuffix("\n").split("\n")  # other ends of lines may be tokens
    ids = {token: i for i, token in enumerate(tokens)}
    if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - set(ids):
        raise UserError(f"the vocabulary {path} has no {min(missing)}: it must be a BERT's vocab.txt, a token a line")
    small = all(token == token.lower() for token in tokens if not token.startswith("["))
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=small)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def augment(ids: jax.Array, keys: jax.Array, options: Mapping[str, float]) -> jax.Array:
    """Returns ids `[B, T]` of which each becomes [OOV] with chance `options["drop"]`, by its row's key; inside jit."""
    if not options["drop"]:
        return ids
    lost = jax.vmap(lambda key: jax.random.bernoulli(key, options["drop"], ids.shape[1:]))(keys)
    return jnp.where(lost, OOV, ids)


def id_count(tokenizer: Tokenizer) -> int:
    """Returns how many ids a table of embeddings needs: one more than the highest."""
    return max(tokenizer.get_vocab().values()) + 1


def to_json(tokenizer: Tokenizer) -> str:
    """Returns the tokenizer as a JSON string, to be saved with the run."""
    return tokenizer.to_str()


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer that `to_json` wrote; raises UserError if the string is none."""
    try:
        return Tokenizer.from_str(text)
    # The Rust side raises a bare Exception.
    except Exception as error:
        raise UserError(
            f"the tokenizer cannot be read ({error}); it must be JSON as the tokenizers library writes it"
        ) from error
