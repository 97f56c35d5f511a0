"""What the site has beside the files of docs/: README.md as its first page, and benchmarks/README.md as benchmarks.md.

Links are written for readers of the repository, where docs/ is one folder of several; here they are changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts pages that mkdocs.yml does not place at the end of the navigation, under "More"."""
    placed = set(leaves(config.nav))
    here = sorted(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md"))
    if rest := [page for page in here if page not in placed]:
        config.nav = [*(config.nav or []), {"More": rest}]
    return config


def leaves(item: object) -> Iterator[str]:
    """The pages that a part of the navigation names."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict | list):
        for part in item.values() if isinstance(item, dict) else item:
            yield from leaves(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the two pages that are not in docs/."""
    root = Path(config.docs_dir).parent
    for source, target in (("README.md", "index.md"), ("benchmarks/README.md", "benchmarks.md")):
        text = (root / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=relinked(text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page with the links that the site has."""
    return relinked(markdown)


def relinked(text: str) -> str:
    """`text` with its links to README.md, benchmarks/README.md and docs/ changed to the pages of the site."""
    text = re.sub(r"\]\((?:\.\./)?benchmarks/README\.md", "](benchmarks.md", text)
    text = re.sub(r"\]\(\.\./README\.md", "](index.md", text)
    return re.sub(r"\]\((?:\.\./)?docs/", "](", text)
