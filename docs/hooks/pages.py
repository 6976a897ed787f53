"""Pages of the documentation site that lie outside docs/: README as the first one, CONTRIBUTING, CHANGELOG."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""By their place in the repository."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links as they are from inside docs/."""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = (root / source).read_text(encoding="utf-8")
        for other, place in PAGES.items():
            text = text.replace(f"]({other})", f"]({place})")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files
