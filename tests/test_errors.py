from __future__ import annotations

import copy
from pathlib import Path

import pytest

from qlib.errors import FormatError


def test_message_names_file_field_and_offset():
    error = FormatError(Path("a/model.gguf"), "n_tensors", "is -1; need 0 or more", 8)
    assert str(error) == "a/model.gguf: field 'n_tensors' at byte 8: is -1; need 0 or more"
    assert (error.field, error.offset) == ("n_tensors", 8)


def test_message_without_an_offset():
    assert str(FormatError("config.json", "head_dim", "is missing")) == (
        "config.json: field 'head_dim': is missing"
    )


def test_field_from_a_hostile_file_is_escaped_and_cut():
    text = str(FormatError("x", "\x1b[2J" + "a" * 10_000, "is bad"))
    assert len(text) < 200
    assert "\x1b" not in text


def test_is_a_value_error_and_can_be_copied():
    with pytest.raises(ValueError, match="field 'f' at byte 1: no"):
        raise FormatError("x", "f", "no", 1)
    assert str(copy.copy(FormatError("x", "f", "no", 1))) == "x: field 'f' at byte 1: no"
