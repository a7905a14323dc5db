"""What every text must be before it is tokenized."""

from collections.abc import Mapping
from typing import Any

from flax_encoder.data.sources.records import DataError


def check_texts(texts: Any, first: int = 0) -> list[str]:
    """An iterable of texts as a list, if each of them is a text.

    A byte order mark inside a str is a character like any other, as it is to other tools; the readers of files take
    off the one that a file begins with.

    Args:
      first: the number of the first text, where these are some of a stream.

    Raises:
      DataError: one text where many are asked for, something that is no str, or a lone surrogate, which no encoding
        of Unicode can hold; it names the text's number, from `first`, and a way out.
    """
    if isinstance(texts, (str, bytes)):
        raise DataError(f"texts must come in a list: got one {type(texts).__name__}, {texts!r:.60}. Put it in [ ].")
    try:
        if isinstance(texts, Mapping):
            raise TypeError
        texts = list(texts)
    except TypeError:
        raise DataError(f"texts must come in a list: got a {type(texts).__name__}, {texts!r:.60}.") from None
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            way_out = ": .decode('utf-8') makes it one" if isinstance(text, bytes) else ""
            raise DataError(
                f"each text must be a str{way_out}: text {number} is a {type(text).__name__}, {text!r:.60}."
            )
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text must be whole Unicode characters: text {number} has half of a surrogate pair, "
                f"{text[error.start]!a}, at character {error.start}. "
                f"text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs and replaces halves."
            ) from None
    return texts
