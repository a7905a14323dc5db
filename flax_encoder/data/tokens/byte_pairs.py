"""Tokenizers for models that write: every text comes back from its tokens as it was."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.texts import check_texts
from flax_encoder.data.tokens.tokenizer import TextTokenizer

NUM_SENTINELS = 100  # as T5's tokenizers have
_SPECIAL = ("<pad>", "</s>", "<unk>")  # with T5's ids


def train_byte_pairs(texts: Iterable[str], vocab_size: int, more: Sequence[str] = ()) -> TextTokenizer:
    """Train byte-level BPE (Sennrich et al., arXiv 1508.07909, on the bytes of UTF-8): case, accents and blanks are
    kept, and no text is unknown.

    Ids are T5's: <pad> 0, </s> 1, which ends every text, <unk> 2; the last 100 are the sentinels, <extra_id_0> the very
    last. The same texts give the same vocabulary, in any order.

    Args:
      more: special tokens besides, before the sentinels.

    Raises:
      DataError: vocab_size cannot hold the special tokens, the sentinels and the 256 bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (needed := len(_SPECIAL) + len(alphabet) + len(more) + NUM_SENTINELS):
        raise DataError(
            f"a vocabulary must hold {len(_SPECIAL) + len(more)} special tokens, {len(alphabet)} bytes and "
            f"{NUM_SENTINELS} sentinels: got data.vocab_size {vocab_size}, at least {needed} is needed."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(more) - NUM_SENTINELS, special_tokens=list(_SPECIAL), initial_alphabet=alphabet,
        show_progress=False, min_frequency=2,
    )  # fmt: skip
    tokenizer.train_from_iterator(check_texts(texts), trainer)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(NUM_SENTINELS))]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (*more, *sentinels)])
    return TextTokenizer(tokenizer.to_str(pretty=True))
