from __future__ import annotations

import pytest

from qlib.errors import FormatError
from qlib.texts import NAMES, texts


@pytest.mark.parametrize("name", NAMES)
def test_shipped_texts_are_long_and_plain(name):
    text = texts(name)
    assert len(text.encode()) >= 60_000
    assert "\r" not in text
    assert not text.startswith("\ufeff")


def test_shipped_texts_share_no_paragraph():
    def paragraphs(name):
        return {p.strip() for p in texts(name).split("\n\n") if len(p.strip()) > 40}

    assert not paragraphs("calibration") & paragraphs("evaluation")


def test_user_file_is_returned_unchanged(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("größer\r\nals 1 €\n".encode())
    assert texts(path) == texts(str(path)) == "größer\r\nals 1 €\n"


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ValueError, match="unknown text") as caught:
        texts("calibraton")
    assert str(caught.value) == (
        "unknown text 'calibraton': did you mean 'calibration'? "
        "known are 'calibration' and 'evaluation', or the path of a file"
    )


def test_missing_file_and_folder(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "no.txt")):
        with pytest.raises(ValueError, match="unknown text") as caught:
            texts(name)
        assert str(caught.value) == (
            f"unknown text {name!r}: known are 'calibration' and 'evaluation', "
            "or the path of a file"
        )


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(FormatError) as caught:
        texts(path)
    assert str(caught.value) == (
        f"{path}: field 'text' at byte 3: is not valid UTF-8; save the file as UTF-8"
    )


def test_empty(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(FormatError) as caught:
        texts(path)
    assert str(caught.value) == f"{path}: field 'text': is empty"
