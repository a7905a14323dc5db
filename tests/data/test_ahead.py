"""Items made ahead are the same items, with the same end."""

import threading

import pytest

from flax_encoder.data.rows.ahead import read_ahead


def test_items_keep_their_order():
    assert list(read_ahead(range(500), 3)) == list(range(500))


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield from (1, 2)
        raise KeyError("three")

    seen = []
    with pytest.raises(KeyError, match="three"):
        for item in read_ahead(items(), 8):
            seen.append(item)
    assert seen == [1, 2]


def test_whoever_stops_reading_ends_the_thread():
    made, before = [], threading.active_count()

    def items():
        for i in range(10**9):
            made.append(i)
            yield i

    stream = read_ahead(items(), 4)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    stream.close()
    assert threading.active_count() == before and len(made) <= 3 + 4 + 2
