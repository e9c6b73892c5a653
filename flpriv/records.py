"""Labelled images in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Records:
    """A stack of N labelled images with what is known of each.

    Args:
        images: ``(N, C, H, W)`` or ``(N, C, D, H, W)``, float32 in [0, 1].
        labels: ``(N,)`` int64 class indices.
        ids: one string per record that names it within the federation; empty where an adversary must not know.
        patients: one patient id per record; empty where an adversary must not know.
        attributes: further columns (``"site"``, ``"sex"``, ``"age"``), each N strings, ``""`` where unknown; ages in years.
    """

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Sequence[int] | Tensor) -> Records:
        """The records at ``index``, in that order."""
        where = torch.as_tensor(index, dtype=torch.long)
        rows = where.tolist()
        return Records(
            images=self.images[where],
            labels=self.labels[where],
            ids=tuple(self.ids[i] for i in rows) if self.ids else (),
            patients=tuple(self.patients[i] for i in rows) if self.patients else (),
            attributes={key: tuple(column[i] for i in rows) for key, column in self.attributes.items()},
        )

    def anonymous(self, *, keep: Sequence[str] = ()) -> Records:
        """The same images and labels without ids, patients and attributes, except the attributes named in ``keep``."""
        kept = {key: column for key, column in self.attributes.items() if key in keep}
        return replace(self, ids=(), patients=(), attributes=kept)

    @staticmethod
    def concat(parts: Sequence[Records]) -> Records:
        """All ``parts`` one after another; attributes that some part lacks are filled with ``""``.

        Raises:
            ValueError: for no parts.
        """
        if not parts:
            raise ValueError("nothing to concatenate")
        names = sorted({key for part in parts for key in part.attributes})
        return Records(
            images=torch.cat([part.images for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            ids=tuple(i for part in parts for i in part.ids),
            patients=tuple(i for part in parts for i in part.patients),
            attributes={key: tuple(v for part in parts for v in part.attributes.get(key, ("",) * len(part))) for key in names},
        )
