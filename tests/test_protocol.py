"""Which token is predicted from which past: the windows of a protocol, by hand and by rule."""

from __future__ import annotations

import re

import pytest
import torch

from qlib.metrics import Protocol

VOCAB, BOS = 61, 1


def windows(protocol: Protocol) -> list[tuple[list[int], int]]:
    return [(window.tolist(), score) for window, score in protocol.windows()]


def test_windows_with_bos_by_hand():
    protocol = Protocol("t", torch.arange(10, 20), context=4, stride=4, bos=BOS)
    assert windows(protocol) == [
        ([1, 10, 11, 12, 13], 4),
        ([1, 14, 15, 16, 17], 4),
        # The last window reaches back, so that its two new tokens have a full past too.
        ([1, 16, 17, 18, 19], 2),
    ]
    assert protocol.scored == 10


def test_windows_without_bos_by_hand():
    protocol = Protocol("t", torch.arange(10, 20), context=4, stride=4)
    assert windows(protocol) == [
        ([10, 11, 12, 13, 14], 4),
        ([14, 15, 16, 17, 18], 4),
        ([15, 16, 17, 18, 19], 1),
    ]
    assert protocol.scored == 9


def test_overlapping_windows_by_hand():
    protocol = Protocol("t", torch.arange(10, 18), context=4, stride=2, bos=BOS)
    assert windows(protocol) == [
        ([1, 10, 11, 12, 13], 4),
        ([1, 12, 13, 14, 15], 2),
        ([1, 14, 15, 16, 17], 2),
    ]


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (2, 2), (5, 3), (8, 8), (64, 7)])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 40])
def test_every_token_is_scored_once(n, context, stride, bos):
    protocol = Protocol("t", torch.arange(100, 100 + n), context, stride, bos)
    scored = [token for window, score in windows(protocol) for token in window[-score:]]
    assert scored == list(range(100 if bos else 101, 100 + n))
    for window, score in windows(protocol):
        assert score < len(window) <= context + 1
        assert (window[0] == BOS) == (bos is not None)


def test_label_names_everything():
    protocol = Protocol("story", torch.arange(1000, 3000), 512, 256, BOS)
    assert str(protocol) == "story, 2,000 tokens, context 512, stride 256, BOS"
    assert str(Protocol("t", torch.arange(9), 4, 4)) == ("t, 8 tokens, context 4, stride 4, no BOS")


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_impossible_windows(context, stride):
    message = f"need 2 <= context and 1 <= stride <= context, got {context}, {stride}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Protocol("t", torch.arange(50), context, stride)


@pytest.mark.parametrize("shape", [(1,), (0,), (2, 8)])
def test_too_few_tokens_or_a_wrong_shape(shape):
    message = f"a protocol needs 2 or more tokens, got {list(shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Protocol("t", torch.zeros(shape, dtype=torch.long))


class Letters:
    """A tokenizer whose tokens are the characters."""

    bos_id = 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]


def test_protocol_of_a_text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a" * 100)
    protocol = Protocol.of(Letters(), path, tokens=40, context=8)
    assert (len(protocol.tokens), protocol.stride, protocol.bos) == (40, 8, 2)
    assert Protocol.of(Letters(), path, tokens=None, bos=False).bos is None
    assert Protocol.of(Letters(), path, tokens=None).scored == 100


def test_text_is_too_short(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a" * 1000)
    message = f"text {str(path)!r} has 1,000 tokens, 1,001 were asked for"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Protocol.of(Letters(), str(path), tokens=1001)
