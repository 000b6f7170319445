"""The record: one measurement of one provider in one case, one JSON line.

Times are seconds per call, sizes are bytes. A record whose `status` is not "ok" carries no time: "refused" means that
the provider's numbers were wrong, "failed" that it raised, "unavailable" that this machine lacks something it needs;
`reason` says what.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

STATUSES = ("ok", "refused", "failed", "unavailable")

_NUMBER = (int, float)
# field -> the types it may have; None among them where the field does not apply to every record
FIELDS: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "op": (str,),
    "direction": (str,),
    "provider": (str,),
    "status": (str,),
    "reason": (str, type(None)),
    "dtype": (str,),
    "T": (int,),
    "d_in": (int,),
    "d_out": (int,),
    "r": (int, type(None)),
    "E": (int, type(None)),
    "routing": (str, type(None)),
    "median_s": (*_NUMBER, type(None)),
    "p20_s": (*_NUMBER, type(None)),
    "p80_s": (*_NUMBER, type(None)),
    "min_s": (*_NUMBER, type(None)),
    "rounds": (int,),
    "calls_per_sample": (int,),
    "floor_min_s": (*_NUMBER, type(None)),
    "floor_median_s": (*_NUMBER, type(None)),
    "peak_bytes": (int, type(None)),
    "error": (*_NUMBER, type(None)),
    "versions": (dict,),
    "cpu": (str,),
    "isa": (str,),
    "threads": (int,),
    "load": (float,),
    "date": (str,),
    "commit": (str, type(None)),
}
_TIMES = ("median_s", "p20_s", "p80_s", "min_s")


def validate(record: Record) -> Record:
    """Return `record` if it has every field of `FIELDS` with an allowed type; further fields are free.

    Raises ValueError that names the field, what it was and what it must be.
    """
    for name, types in FIELDS.items():
        if name not in record:
            raise ValueError(f"record: field {name!r} is missing; got {sorted(record)}")
        if not isinstance(record[name], types) or (isinstance(record[name], bool)):
            allowed = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"record: field {name!r} must be {allowed}; got {record[name]!r}")
    if record["status"] not in STATUSES:
        raise ValueError(f"record: status must be one of {STATUSES}; got {record['status']!r}")
    timed = [name for name in _TIMES if record[name] is not None]
    if record["status"] == "ok" and len(timed) != len(_TIMES):
        raise ValueError(f"record: a record with status 'ok' must have all of {_TIMES}; got {timed}")
    if record["status"] != "ok" and (timed or not record["reason"]):
        raise ValueError(
            f"record: status {record['status']!r} needs a reason and no times; got {record['reason']!r}, {timed}"
        )
    return record


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def write_jsonl(path: Path, records: Iterable[Record]) -> Path:
    """Write records as JSON lines, atomically; each is validated first."""
    return write_text(path, "".join(json.dumps(validate(record)) + "\n" for record in records))


def read_jsonl(path: Path) -> list[Record]:
    """The validated records of a results file."""
    with path.open(encoding="utf-8") as lines:
        return [validate(json.loads(line)) for line in lines if line.strip()]
