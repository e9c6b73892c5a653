"""A CSV table of images: how a consortium lists what its hospitals hold."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from flpriv.clients.sites.files import SPLITS, FileSites
from flpriv.clients.sites.labelling import DROP, Rule, sex, years
from flpriv.errors import DataError, ScenarioError, near
from flpriv.site import Entry, Site

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the table calls its columns. Those after ``label`` may be missing; name one to require it, ``""`` to ignore it.

    Args:
        path: image file, or folder with a DICOM series, below the root.
        patient_id: patient; ``""`` makes every image a patient of its own.
        label: what the class is read from.
        site: hospital.
        age: years, or as DICOM writes it (``"058Y"``).
        sex: ``"F"`` or ``"M"``.
        split: ``"train"``, ``"test"``, ``"val"`` or ``"public"`` (both for the adversary), or empty to draw it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: str = "path"
    patient_id: str = "patient_id"
    label: str = "label"
    site: str | None = None
    age: str | None = None
    sex: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class ManifestSites(FileSites):
    """Images listed in a CSV table with their hospital, patient, label, age and sex.

    Hospitals are those of the site column. Where it names fewer than two, or ``partition`` is given, virtual sites are made.
    Rows are counted as in a spreadsheet: the header is row 1.

    Args:
        root: folder that paths in the table start from.
        file: the table, below the root.
        columns: what the table calls its columns, ``[sites.columns]``.
        where: rows to use, column to value or values, ``[sites.where]``.
        attributes: further columns to keep with each image, for attribute inference.
        modality: ``"xray"``, ``"ct"``, ``"mri"`` or another word; ``"ct"`` reads NIfTI as HU.
        classes: class names in label order; the label column's own values by name where not given.
        label_map: label text to class, ``[sites.label_map]``; the class ``"drop"`` leaves rows out, here and below.
        label_contains: one finding among several (``"A|B"``) to class, ``[sites.label_contains]``.
        label_threshold: labels whose last number is at least this are the second class, others the first.
        label_other: class of labels that nothing else says anything about.
        label_empty: class of empty labels.
        size: pixels along each axis, one number or one per axis, ``(H, W)`` or ``(D, H, W)``.
        dimensions: 2 for images, 3 for volumes.
        channels: 1 for gray, 3 for RGB.
        window: values shown black and white, HU for CT.
        fit: ``"stretch"``, ``"crop"`` or ``"pad"`` for images of another aspect ratio.
        sites: number of virtual sites.
        partition: ``"natural"``, or virtual sites by ``"iid"`` or ``"dirichlet"``.
        alpha: concentration of the Dirichlet draw, > 0.
        seed: of the partition.
        resplit: forget the split column, and let ``[sites.split]`` draw splits.
    """

    name: ClassVar[str] = "manifest"
    file: str = "metadata.csv"
    columns: Columns = Columns()
    where: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    label_map: Mapping[str, str] = field(default_factory=dict)
    label_contains: Mapping[str, str] = field(default_factory=dict)
    label_threshold: float | None = None
    label_other: str = ""
    label_empty: str = ""
    partition: Literal["natural", "iid", "dirichlet"] = "natural"

    def __post_init__(self) -> None:
        FileSites.__post_init__(self)
        named = {**self.label_map, **self.label_contains, "label_other": self.label_other, "label_empty": self.label_empty}
        if not self.classes:
            rules = [name for name in named.values() if name and name != DROP]
            if rules or self.label_threshold is not None:
                raise ScenarioError("sites.classes: name the classes that the label rules refer to, in label order")
            texts = {row[self.columns.label].strip() for _, row in self._rows()} - {""}
            object.__setattr__(self, "classes", tuple(sorted(texts)))
        for text, name in named.items():
            if name and name != DROP and name not in self.classes:
                raise ScenarioError(f"sites: the rule for {text!r} names an unknown class {name!r}{near(name, self.classes)}")
        if len(self.classes) < 2:
            raise DataError(f"{self.table}: column {self.columns.label!r} holds fewer than two labels")

    @property
    def table(self) -> Path:
        """The CSV file."""
        return Path(self.root) / self.file

    def list(self) -> tuple[Site, ...]:
        """The sites by name; an entry's id is its path in the table.

        Raises:
            DataError: naming the table and the row with a missing file, an unknown label, a second row for the same image, or a
                patient at two sites or in two splits.
        """
        root, found = self.folder(), self._entries()
        if not found:
            raise DataError(f"{self.table}: no row left to use; check sites.where and the label rules")
        if self.partition != "natural" or len(found) < 2:
            entries = [entry for part in found.values() for entry in part]
            how: Literal["iid", "dirichlet"] = "iid" if self.partition == "natural" else self.partition
            return self.virtual(entries, lambda entry: self.image(root / entry.id), how=how)
        return tuple(
            Site(name=name, entries=tuple(entries), read=lambda entry: self.image(root / entry.id))
            for name, entries in sorted(found.items())
        )

    def _entries(self) -> Mapping[str, Sequence[Entry]]:
        """Entries by the site column, each row checked against those before it."""
        found: dict[str, list[Entry]] = {}
        seen: dict[str, tuple[int, str, str]] = {}
        paths: dict[str, int] = {}
        for number, site, entry in self._labelled():
            if (first := paths.setdefault(entry.id, number)) != number:
                raise self._wrong(number, f"image {entry.id!r} is in row {first} already")
            first, known_site, known_split = seen.setdefault(entry.patient, (number, site, entry.split))
            if known_site != site:
                raise self._wrong(number, f"patient {entry.patient!r} is at site {site!r}, but at {known_site!r} in row {first}")
            if known_split != entry.split:
                splits = f"in split {entry.split or 'empty'!r}, but in {known_split or 'empty'!r} in row {first}"
                raise self._wrong(
                    number, f"patient {entry.patient!r} is {splits}; give a patient one split, or set resplit = true"
                )
            found.setdefault(site, []).append(entry)
        return found

    def _labelled(self) -> Iterator[tuple[int, str, Entry]]:
        """Row number, site and entry of every row that the label rules keep."""
        rule = Rule(
            classes=self.classes,
            map=self.label_map,
            contains=self.label_contains,
            threshold=self.label_threshold,
            other=self.label_other,
            empty=self.label_empty,
        )
        for number, row in self._rows():
            try:
                label = rule(row[self.columns.label])
                if label != DROP:
                    yield number, self._site(row), self._entry(row, label)
            except ValueError as error:
                raise self._wrong(number, str(error)) from None

    def _site(self, row: Row) -> str:
        name = _value(row, self.columns.site, "site") if self.partition == "natural" else ""
        if self.columns.site and self.partition == "natural" and not name:
            raise ValueError(f"column {self.columns.site!r} is empty; every image needs a site")
        return name

    def _entry(self, row: Row, label: str) -> Entry:
        """One row's image.

        Raises:
            ValueError: saying what is wrong with it.
        """
        columns = self.columns
        path = row[columns.path].strip()
        patient = row[columns.patient_id].strip() if columns.patient_id else path
        if not path:
            raise ValueError(f"column {columns.path!r} is empty; every row needs an image")
        if not patient:
            raise ValueError(f"column {columns.patient_id!r} is empty; fill it in, or leave the row out with label_map or where")
        if not (Path(self.root) / path).exists():
            raise ValueError(f"no such image: {Path(self.root) / path}")
        split = "" if self.resplit else _value(row, columns.split, "split").lower()
        if split and split not in SPLITS:
            raise ValueError(f"unknown split {split!r}{near(split, SPLITS)}")
        return Entry(
            id=path,
            patient=patient,
            label=self.classes.index(label),
            split=SPLITS[split] if split else "",
            attributes={
                "age": years(_value(row, columns.age, "age")),
                "sex": sex(_value(row, columns.sex, "sex")),
                **{name: row[name].strip() for name in self.attributes},
            },
        )

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """The rows that ``where`` keeps, numbered from 2.

        Raises:
            DataError: if the table or a column is missing, or a row has too few or too many fields.
        """
        wanted = {name: {values} if isinstance(values, str) else set(values) for name, values in self.where.items()}
        try:
            with self.table.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                self._check_columns(reader.fieldnames or ())
                for number, row in enumerate(reader, start=2):
                    if None in row or None in row.values():
                        raise self._wrong(number, f"has {'more' if None in row else 'fewer'} fields than the header")
                    if all(row[name].strip() in values for name, values in wanted.items()):
                        yield number, row
        except FileNotFoundError:
            raise DataError(f"{self.table}: no such table; set sites.root and sites.file, or --set sites.root=PATH") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.table}: cannot be read as CSV: {error}") from error

    def _check_columns(self, header: Sequence[str]) -> None:
        named = {f"sites.columns.{f.name}": getattr(self.columns, f.name) for f in fields(self.columns)}
        named |= {f"sites.where.{name}": name for name in self.where}
        named |= {f"sites.attributes[{place}]": name for place, name in enumerate(self.attributes)}
        for option, name in named.items():
            if name and name not in header:
                raise DataError(f"{self.table}: row 1: no column {name!r}{near(name, header)}; set {option}")

    def _wrong(self, row: int, what: str) -> DataError:
        return DataError(f"{self.table}: row {row}: {what}")


def _value(row: Row, column: str | None, usual: str) -> str:
    """A column's text: the named one, the usual one where none is named, ``""`` where there is none."""
    return row.get(usual if column is None else column, "").strip()
