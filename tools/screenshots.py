"""Photograph every page of the built site, on a desktop and a phone, in light and in dark.

python tools/screenshots.py FOLDER [PAGE ...]      for example: shots book/index.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from browser import SITE, chromium, pages, published_prefix, serve, visit

WIDTHS = {1280: 800, 390: 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*")
    parser.add_argument(
        "--site", type=Path, default=SITE, help="a built site other than _build/html"
    )
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with serve(options.site, published_prefix()) as address, chromium() as browser:
        for scheme in ("light", "dark"):
            for width, height in WIDTHS.items():
                view = {"width": width, "height": height}
                context = browser.new_context(viewport=view, color_scheme=scheme)
                page = context.new_page()
                for name in options.pages or pages(options.site):
                    visit(page, f"{address}/{name}")
                    shot = f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                    page.screenshot(path=options.folder / shot, full_page=True)
                    print(options.folder / shot)
                context.close()


if __name__ == "__main__":
    main()
