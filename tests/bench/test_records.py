"""The record's schema, and files that are whole or not there."""

from __future__ import annotations

import json

import pytest
from lowrank_fast.bench import records
from lowrank_fast.bench.records import FIELDS, read_jsonl, validate, write_atomically, write_jsonl

from .samples import record


def test_schema_holds_every_field_that_the_results_promise():
    promised = {"op", "direction", "provider", "dtype", "T", "d_in", "d_out", "r", "E", "routing", "median_s", "p20_s",
                "p80_s", "min_s", "floor_min_s", "peak_bytes", "versions", "cpu", "isa", "threads", "load", "date",
                "commit"}  # fmt: skip
    assert promised <= set(FIELDS)


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_record_without_a_field_is_refused_by_name(field):
    incomplete = record()
    del incomplete[field]
    with pytest.raises(ValueError, match=f"'{field}' is missing"):
        validate(incomplete)


@pytest.mark.parametrize(
    ("field", "value"),
    [("T", "4096"), ("min_s", "fast"), ("load", None), ("versions", []), ("dtype", None), ("r", True)],
)
def test_a_field_of_the_wrong_type_is_refused(field, value):
    with pytest.raises(ValueError, match=f"'{field}' must be"):
        validate(record() | {field: value})


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="status must be one of"):
        validate(record() | {"status": "fine"})


def test_a_refused_provider_cannot_carry_times():
    with pytest.raises(ValueError, match="no times"):
        validate(record() | {"status": "refused", "reason": "wrong"})


def test_a_refused_provider_must_say_why():
    with pytest.raises(ValueError, match="needs a reason"):
        validate(record(minimum=None) | {"reason": None})


def test_an_ok_record_needs_all_its_times():
    with pytest.raises(ValueError, match="must have all of"):
        validate(record() | {"p80_s": None})


def test_records_come_back_from_the_file_as_they_were(tmp_path):
    written = [record("ours", 1e-3), record("addmm", None), record("floor", 5e-4, extra=[1, 2])]
    path = write_jsonl(tmp_path / "deep" / "results.jsonl", written)
    assert read_jsonl(path) == written
    assert len(path.read_text().splitlines()) == 3
    assert json.loads(path.read_text().splitlines()[0])["provider"] == "ours"


def test_an_invalid_record_leaves_the_old_file_alone(tmp_path):
    path = write_jsonl(tmp_path / "results.jsonl", [record()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must be"):
        write_jsonl(path, [record(), record() | {"T": None}])
    assert path.read_bytes() == before


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def fails(temporary):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    seen = []

    def write(temporary):
        temporary.write_text("first half")
        seen.append(path.exists())
        temporary.write_text("whole")

    records.write_atomically(path, write)
    assert seen == [False]
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
