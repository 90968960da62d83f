"""What a browser would find on a report page: tags, attributes, ids, links, scripts and the text a reader sees."""

from html.parser import HTMLParser
from importlib.resources import files


class Reader(HTMLParser):
    """Collects them on the way through; text holds no script and no style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}
        if tag == "dd":
            self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.text += data


def own_script() -> str:
    """The one script that a page may have."""
    return files("moe_ref.report").joinpath("templates/page.js").read_text(encoding="utf-8")
