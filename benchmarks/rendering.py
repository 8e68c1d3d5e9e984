"""Formats of a report: Markdown with its pictures beside it, or one HTML page that holds everything."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from mmace_props.files import write_whole
from mmace_props.plot import save_figure

from .analyse import MISS
from .errors import BenchmarkError
from .report import HEAD, LEGEND, Report, Section

TITLE = "Benchmark against DFT and experiment"
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def check_format(path: Path) -> None:
    """Refuse a format that is none of ours.

    Raises
    ------
    BenchmarkError : unknown suffix.
    """
    if path.suffix not in FORMATS:
        known = " or ".join(FORMATS)
        raise BenchmarkError(f"a report cannot be written as '{path}'; name a file ending in {known}")


def write_report(report: Report, path: Path) -> None:
    """Write a report in the format of the file's suffix; Markdown has its pictures in ``images`` beside it.

    Raises
    ------
    BenchmarkError : unknown suffix.
    OutputError : the place cannot be written.
    """
    check_format(path)
    content = FORMATS[path.suffix](report)
    if path.suffix == ".md":
        images = path.parent / "images"
        images.mkdir(exist_ok=True)
        for picture in (p for section in report.sections for p in section.pictures):
            save_figure(picture.figure, images / f"{picture.name}.png")
    write_whole(path, lambda temporary: Path(temporary).write_text(content, encoding="utf-8"))


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    text = [f"# {TITLE}", "", report.introduction, "", *(f"- *{k}*: {v}" for k, v in LEGEND.items()), ""]
    for section in report.sections:
        text += [f"## {section.name}", "", *_table(section), "", _tally(section), ""]
        text += [*(f"- {note}" for note in section.notes), *([""] if section.notes else [])]
        for picture in section.pictures:
            text += [f"![{picture.caption}](images/{picture.name}.png)", "", f"*{picture.caption}*", ""]
        text += ["### Sources and tolerances", "", *(f"- {source}" for source in section.sources), ""]
    return "\n".join(text).rstrip() + "\n"


def _table(section: Section) -> list[str]:
    marked = [(*e.cells[:-1], f"**{e.cells[-1]}**" if e.verdict == MISS else e.cells[-1]) for e in section.entries]
    return markdown_table(HEAD, marked).splitlines()


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _tally(section: Section) -> str:
    return ", ".join(f"{number} {name}" for name, number in section.tally.items()) + "."


def html(report: Report) -> str:
    """Return the report as one HTML page, its pictures inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"embedded": _embedded, "slug": lambda text: text.replace(" ", "-")}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=TITLE, report=report, head=HEAD, legend=LEGEND)


def _embedded(figure: Figure) -> str:
    """Address that holds the picture itself."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


FORMATS: dict[str, Callable[[Report], str]] = {".md": markdown, ".html": html}
