"""Where the words of a text are, for texts that come without."""

import functools
import re
import sys
import unicodedata

Word = tuple[int, int]
"""Where a word's characters begin and end in its text."""


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """A run of letters and digits with their combining marks, or any other single character that is no blank."""
    marks = "".join(chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M"))
    return re.compile(rf"[^\W_][^\W_{re.escape(marks)}]*(?:[{re.escape(marks)}]+[^\W_]*)*|\S")


def words_of_text(text: str) -> list[Word]:
    """The words of a text by `word_pattern`, in order."""
    return [match.span() for match in word_pattern().finditer(text)]
