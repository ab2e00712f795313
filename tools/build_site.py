"""Build the site from the committed outputs, or show it: called by make.

python tools/build_site.py [--strict]      --strict: from nothing, and warnings are errors
python tools/build_site.py --serve PORT
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import vendor

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build/html"

# The builder's own redirect has neither a title nor a language.
REDIRECT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Bits per Weight</title>
<link rel="icon" href="data:,">
<meta http-equiv="refresh" content="0; url=book/index.html"></head>
<body><main><h1>Bits per Weight</h1><p><a href="book/index.html">Open the book</a></p></main></body>
</html>
"""


def build(strict: bool) -> int:
    vendor.main()
    if strict:
        shutil.rmtree(SITE, ignore_errors=True)
    command = [Path(sys.executable).parent / "jupyter-book", "build", "-q", str(ROOT)]
    status = subprocess.call([*command, *(["-W", "-n", "--keep-going", "--all"] if strict else [])])
    if status == 0:
        (SITE / "index.html").write_text(REDIRECT, encoding="utf-8")
        print(f"The site is at {SITE / 'index.html'}; `make serve` opens it.")
    return status


def serve(port: int) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"The site is at {address}; Ctrl-C stops.", flush=True)
        webbrowser.open(address)
        server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--serve", type=int, metavar="PORT")
    options = parser.parse_args()
    if options.serve is None:
        return build(options.strict)
    try:
        serve(options.serve)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
