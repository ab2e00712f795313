"""The messages with which `make` stops when the machine lacks something, word for word."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple

import pytest
import setup_env


def message(call) -> str:
    with pytest.raises(SystemExit) as stopped:
        call()
    return str(stopped.value)


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    assert message(setup_env.check_python) == (
        "make: Python 3.8 is too old, 3.10 or newer is needed; "
        "install one and say make PYTHON=python3.12 (the one you have)"
    )
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    setup_env.check_python()


def test_full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9e9, 7e9, 2e9))
    assert message(setup_env.check_disk) == (
        "make: only 2.0 GB are free here, 6 GB are needed; "
        "make room or move the checkout to another disk"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9e9, 1e9, 8e9))
    setup_env.check_disk()


def test_no_index(monkeypatch):
    monkeypatch.setattr(setup_env, "PIP", ["false"])
    assert message(setup_env.check_index) == (
        "make: pip cannot reach a package index; "
        "check the network, or set PIP_INDEX_URL to a mirror that you can reach"
    )
    monkeypatch.setattr(setup_env, "PIP", ["true"])
    setup_env.check_index()


def test_no_venv_module(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, "VENV", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert message(setup_env.make_venv) == (
        "make: this Python cannot make virtual environments; "
        "on Debian and Ubuntu: apt-get install python3-venv"
    )


def test_torch_is_pinned_alone_and_first():
    pins = setup_env.lines("requirements.txt")
    assert pins[0] == "torch==2.13.0"
    assert all("==" in pin for pin in pins)
