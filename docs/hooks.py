"""Makes pages of the site out of files of the repository."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/prefetch-embeddings/prefetch-embeddings"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave the documents to the repository; make the README the first page."""
    if page.file.src_uri == "index.md":
        readme = (ROOT / "README.md").read_text("utf-8")
        pages = re.escape(f"{REPOSITORY}/blob/main/docs/")
        readme = re.sub(rf"{pages}([\w/-]+\.md)", r"\1", readme)
        return readme.replace(f"{REPOSITORY}/raw/main/docs/", "").replace(
            f"{REPOSITORY}/tree/main/docs/decisions", "decisions/01-threads-of-our-own.md"
        )
    depth = page.file.src_uri.count("/")
    outside = r"\]\((?:\.\./){" + str(depth + 1) + r"}([^)]*)\)"
    return re.sub(outside, rf"]({REPOSITORY}/blob/main/\1)", markdown)
