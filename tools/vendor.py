"""Collect, from Python packages, the browser assets that the site would otherwise fetch elsewhere.

Writes site_static/vendor/ (MathJax and its fonts) and site_static/scripts/fontawesome.js: the icon
script under the name by which the theme's templates load it, with only the icons that the pages
use. The theme's own is a third of a page's weight.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "site_static"

# Icons of the themes' templates, the launch buttons and the folded cells.
ICONS = """angle-left angle-right arrow-up bars circle-half-stroke circle-question code download
expand file file-lines file-pdf home lightbulb list magnifying-glass moon outdent pencil pencil-alt
play print rocket sun xmark github""".split()

SCRIPT = """// Font Awesome icons (CC BY 4.0, Fonticons, Inc.), cut out by tools/vendor.py.
const ICONS = %s;
document.addEventListener("DOMContentLoaded", () => {
  for (const old of document.querySelectorAll("i[class*='fa-']")) {
    const name = [...old.classList].find(word => word.startsWith("fa-") && word.slice(3) in ICONS);
    if (!name) continue;
    const [width, height, path] = ICONS[name.slice(3)];
    const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const { name, value } of old.attributes) icon.setAttribute(name, value);
    // Words that select a font are for <i>: the theme's rules for them do not fit a drawing.
    const words = old.className.replace(/\\bfa(-solid|-brands|s|b)(?= )/g, "");
    icon.setAttribute("class", `svg-inline--fa ${words}`);
    icon.setAttribute("viewBox", `0 0 ${width} ${height}`);
    icon.setAttribute("aria-hidden", "true");
    icon.innerHTML = `<path fill="currentColor" d="${path}"/>`;
    old.replaceWith(icon);
  }
});
"""


def installed(package: str, path: str) -> Path:
    """A file or folder inside an installed distribution, named from site-packages."""
    found = Path(distribution(package).locate_file(path))
    if not found.exists():
        raise SystemExit(f"tools/vendor.py: {package} no longer contains {path}")
    return found


def icon_script(bundle: str) -> str:
    """Cut the used icons out of the theme's script.

    There each is `name:[width,height,[aliases],"code","path"]`.
    """
    icons = {}
    for name, width, height, aliases, path in re.findall(
        r'"?([\w-]+)"?:\[(\d+),(\d+),\[([^\]]*)\],"\w+","([^"]+)"\]', bundle
    ):
        # The solid set comes last and so replaces an outline of the same name.
        for each in [name, *re.findall(r'"([\w-]+)"', aliases)]:
            icons[each] = [int(width), int(height), path]
    missing = [name for name in ICONS if name not in icons]
    if missing:
        raise SystemExit(f"tools/vendor.py: the theme's icon script has no {', '.join(missing)}")
    return SCRIPT % json.dumps({name: icons[name] for name in ICONS}, separators=(",", ":"))


def vendor_icons() -> None:
    theme = "pydata_sphinx_theme/theme/pydata_sphinx_theme/static/scripts/fontawesome.js"
    bundle = installed("pydata-sphinx-theme", theme).read_text(encoding="utf-8")
    (STATIC / "scripts").mkdir(exist_ok=True)
    (STATIC / "scripts/fontawesome.js").write_text(icon_script(bundle), encoding="utf-8")


def vendor_mathjax() -> None:
    source = installed("sphinx-mathjax-offline", "sphinx-mathjax-offline/static/mathjax")
    target = STATIC / "vendor/mathjax"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / "output/chtml", target / "output/chtml")
    shutil.copytree(source / "input/tex", target / "input/tex")
    shutil.copy(source / "tex-chtml.js", target)


def main() -> None:
    vendor_icons()
    vendor_mathjax()


if __name__ == "__main__":
    main()
