"""The cells of :mod:`poisoning`: which there are, what code decides them, and the file that keeps them.

A row of the file counts only while the code, the digits and torch are those that it came from: each has an identity. A
change of VERT recomputes VERT's cells and no rival's. Rows of another identity move to a file beside it.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from poisoning_arena import Outcome
from poisoning_defences import ORACLE, OURS

ANY = "any"
"""Attack of an oracle's cell: the mean of the honest clients does not depend on what the others send."""
GAME = (
    "poisoning_arena", "poisoning_defences", "mnist", "fedllm.seeding", "fedllm.partition",
    "fedllm.strategies.attacks.colluding", "fedllm.strategies.robust.rules",
)  # fmt: skip
VERT = tuple(
    f"fedllm.strategies.vert.{name}"
    for name in ("course", "detector", "evidence", "history", "predict", "rule", "select", "sketch")
)
_TEMPORAL = ("fedllm.strategies.robust.temporal",)
OWN: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(OURS, VERT),
    "vert-paper": ("fedllm.strategies.vert.paper",),
    **dict.fromkeys(("temporal-cosine", "flanders", "fldetector"), _TEMPORAL),
}
"""Modules that decide a defence's cells besides the game's."""


class Cell(NamedTuple):
    """One run: its settings."""

    clients: int
    alpha: float
    share: float
    onset: int
    rounds: int
    attack: str
    defence: str
    seed: int


FIELDS = (*Cell._fields, *Outcome.__dataclass_fields__, "seconds", "identity")
Row = dict[str, Any]
Setting = tuple[int, float, int]
"""Clients, α, seed."""


def table(
    setting: Setting,
    shares: Iterable[float],
    attacks: Sequence[str],
    defences: Sequence[str],
    onset: int,
    rounds: int,
) -> Iterator[Cell]:
    """Every attack × every defence, each cell once: nobody attacks at share 0, and an oracle sees no attack."""
    clients, alpha, seed = setting
    for share in shares:
        for attack in attacks if share > 0 else ("none",):
            for defence in defences:
                yield Cell(clients, alpha, share, onset, rounds, attack, defence, seed)
        yield Cell(clients, alpha, share, onset, rounds, ANY, ORACLE, seed)


def identity(defence: str, digits: str) -> str:
    """Digest of all that decides a defence's cells: the modules' code without comments, torch, and the digits."""
    return code_digest((*GAME, *OWN.get(defence, ())), digits)


def code_digest(modules: Iterable[str], data: str = "") -> str:
    """Digest of the modules' code without comments, of torch's version, and of what else is given."""
    digest = hashlib.sha256(f"{torch.__version__} {data}".encode())
    for name in modules:
        digest.update(f"{name}\n{_code(Path(str(importlib.import_module(name).__file__)))}".encode())
    return digest.hexdigest()[:16]


def _code(path: Path) -> str:
    """A file's syntax tree without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return ast.dump(tree)


class Cells:
    """The file of finished cells.

    Args:
        path: CSV file; its folder is made.
        digits: name of the data.
    """

    def __init__(self, path: Path, digits: str) -> None:
        self.path, self._digits = path, digits
        self._identities: dict[str, str] = {}
        self.rows: dict[Cell, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        _put_away_older_form(path)
        stale = []
        for row in _read(path):
            if row["identity"] == self.identity(row["defence"]):
                self.rows[cell_of(row)] = row
            else:
                stale.append(row)
        if stale:
            _append(path.with_suffix(".stale.csv"), stale)
        self.stale = len(stale)
        kept = path.with_suffix(".new")
        kept.unlink(missing_ok=True)
        _append(kept, self.rows.values())  # without what was cut off or stale
        kept.replace(path)

    def identity(self, defence: str) -> str:
        """See :func:`identity`."""
        if defence not in self._identities:
            self._identities[defence] = identity(defence, self._digits)
        return self._identities[defence]

    def put(self, cell: Cell, outcome: Outcome, seconds: float) -> None:
        """Keep what came of a cell."""
        row = {
            **cell._asdict(),
            **vars(outcome),
            "seconds": round(seconds, 2),
            "identity": self.identity(cell.defence),
        }
        self.rows[cell] = row
        _append(self.path, [row])


def cell_of(row: Row) -> Cell:
    """The settings in a row."""
    return Cell(*(row[name] for name in Cell._fields))


def _put_away_older_form(path: Path) -> None:
    """Rename a file with other columns: its rows say nothing of the code that they came from."""
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            head = next(csv.reader(file), list(FIELDS))
        if tuple(head) != FIELDS:
            path.replace(path.with_suffix(".old.csv"))


def _append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows, the head first in a new file."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {**row, "hostile_by_round": " ".join(f"{x:.4g}" for x in row["hostile_by_round"])}
            )


def _read(path: Path) -> Iterator[Row]:
    """The whole rows of a file; heads and a line that was cut are left out."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for values in csv.reader(file):
            if len(values) == len(FIELDS) and tuple(values) != FIELDS:
                try:
                    yield {name: _typed(name, value) for name, value in zip(FIELDS, values, strict=True)}
                except ValueError:
                    continue


def _typed(name: str, value: str) -> Any:
    if name in ("attack", "defence", "identity"):
        return value
    if name == "hostile_by_round":
        return tuple(float(x) for x in value.split())
    return (
        int(value)
        if name in ("clients", "onset", "rounds", "seed", "queries", "candidates")
        else float(value)
    )
