"""A report: a page to read, the same as Markdown, and the numbers for machines; all of it in one folder, or nothing."""

import base64
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from deepzero_core.errors import RequestError, WorkError
from tasks import plots
from tasks.records import Reported

_HTML, _MARKDOWN, _RESULT = "report.html", "report.md", "result.json"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawn file of the report's folder: `uri` holds its content, `width` is that of its inches in CSS pixels."""

    file: str
    title: str
    caption: str
    uri: str
    width: int
    table: Table | None = None


@dataclass
class Gallery:
    """The pictures of a report, drawn into its folder one after the other."""

    folder: Path
    pictures: list[Picture] = field(default_factory=list)

    def add(
        self, file: str, title: str, caption: str, draw: Callable[[Path], None], table: Table | None = None
    ) -> None:
        draw(self.folder / file)
        content = (self.folder / file).read_bytes()
        kind = Path(file).suffix.removeprefix(".")
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
        if kind == "gif":
            width = int.from_bytes(content[6:8], "little")  # width fields of the headers of GIF and PNG
        else:
            width = round(96 * int.from_bytes(content[16:20], "big") / plots.DPI)
        self.pictures.append(Picture(file, title, caption, uri, width, table))


@dataclass(frozen=True)
class Page:
    """What a report says.

    result:  the numbers for machines, with the keys schema_version, title, experiment_yaml, environment, mlflow_url,
             notes and data, which the page shows; data is None or has name, digest, train, test and, where they are no
             images, unit. `write_page` adds created, table and pictures.
    facts:   the few numbers to be read first, each with what it is.
    heading, table: the main one.
    draw:    adds the pictures.
    """

    result: Mapping[str, Any]
    facts: Sequence[tuple[str, str]]
    heading: str
    table: Table
    draw: Callable[[Gallery], None]


def write_page(folder: Path, page: Page) -> Reported:
    """Write report.html (self-contained), report.md, its pictures and result.json into `folder`, all of them or none.

    An earlier report in the same place is replaced.

    Raises:
        RequestError: something that is not a report lies in `folder`.
        WorkError: a file that a record names cannot be read, or the disk failed.
    """
    _refuse_foreign(folder)
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    try:
        staging.mkdir(parents=True)
        gallery = Gallery(staging)
        page.draw(gallery)
        result = dict(page.result) | {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "table": {"columns": page.table.columns, "rows": page.table.rows},
            "pictures": {Path(picture.file).stem: picture.file for picture in gallery.pictures},
        }
        (staging / _RESULT).write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (staging / _MARKDOWN).write_text(_markdown(result, page, gallery.pictures), encoding="utf-8")
        (staging / _HTML).write_text(_html(result, page, gallery.pictures), encoding="utf-8")
        _install(staging, folder)
    except OSError as error:
        raise WorkError(f"the report {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Reported(folder=folder, html=folder / _HTML, markdown=folder / _MARKDOWN, result=folder / _RESULT)


def _html(result: Mapping[str, Any], page: Page, pictures: Sequence[Picture]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    url = result["mlflow_url"]
    # Escaping does not make javascript: harmless.
    link = url if url and url.startswith(("http://", "https://")) else None
    return environment.get_template("report.html.j2").render(
        result=result,
        date=_date(result),
        counts=_counts(result["data"]) if result["data"] else "",
        page=page,
        pictures=pictures,
        mlflow_url=link,
    )


def _markdown(result: Mapping[str, Any], page: Page, pictures: Sequence[Picture]) -> str:
    data = result["data"]
    parts = [
        f"# {_plain(result['title'])}",
        _date(result)
        + (f" · {_plain(data['name'])}, {_counts(data)}" if data else "")
        + (f" · [MLflow run](<{result['mlflow_url']}>)" if result["mlflow_url"] else ""),
        " · ".join(f"**{value}** {label}" for value, label in page.facts),
        f"## {page.heading}",
        _markdown_table(page.table),
        page.table.caption,
    ]
    for picture in pictures:
        parts += [f"## {picture.title}", f"![{picture.title}]({picture.file})", _plain(picture.caption)]
        parts += [_markdown_table(picture.table)] if picture.table else []
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in result["notes"])]
    environment = [f"- {name}: {_plain(value)}" for name, value in result["environment"].items()]
    parts += ["## Configuration", f"````yaml\n{result['experiment_yaml'].strip()}\n````"]
    parts += ["## Environment", "\n".join(environment)]
    return "\n\n".join(parts) + "\n"


def _counts(data: Mapping[str, Any]) -> str:
    return f"{data['train']:,} training and {data['test']:,} test {data.get('unit', 'images')}"


def _date(result: Mapping[str, Any]) -> str:
    return f"{datetime.fromisoformat(result['created']):%d %B %Y, %H:%M} UTC".lstrip("0")


def _markdown_table(table: Table) -> str:
    rule = "|".join(("---", *("---:" for _ in table.columns[1:])))
    lines = [" | ".join(map(_plain, row)) for row in (table.columns, *table.rows)]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _plain(text: str) -> str:
    """Text on one line in which Markdown sees no table, link or tag."""
    escaped = "".join(f"\\{character}" if character in "\\|`*_<>[]" else character for character in text)
    return " ".join(escaped.split())


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RESULT).is_file():
        raise RequestError(f"{folder} holds files that are not a report's; move them or name another folder")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} must be a folder for the report, but is a file")


def _install(staging: Path, folder: Path) -> None:
    retired = staging.with_suffix(".old.tmp")
    if folder.exists():
        folder.rename(retired)
    try:
        staging.rename(folder)
    except OSError:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)
