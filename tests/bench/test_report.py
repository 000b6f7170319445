"""Tables in the terminal and in markdown, and plots as whole files."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("matplotlib")

from lowrank_fast.bench import plots, report
from rich.console import Console

from .samples import case, model_records

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def records():
    everything = model_records()
    for dtype in ("float32", "bfloat16"):
        for rank in (8, 16, 32):
            everything += case({"ours": 1e-3, "addmm": 2e-3, "mm_add": 3e-3, "floor": 9e-4}, dtype=dtype, r=rank)
            everything += case(
                {"ours": 1e-3, "mm4": 2e-3, "floor": 9e-4}, dtype=dtype, r=rank, direction="backward_out"
            )
        token = {"op": "routed_projection", "routing": "token", "E": 4, "direction": "forward", "dtype": dtype}
        everything += case({"ours": 1e-3, "concat": 5e-4, "hydra": None, "floor": 9e-4}, **token)
        for tokens in (1024, 4096):
            everything += case(
                {"ours": 1e-3, "addmm": 2e-3, "floor": 9e-4}, suite="sweep", dtype=dtype, T=tokens, d_in=1024
            )
    return everything


def test_every_plot_is_a_whole_png_and_nothing_else_is_left(records, tmp_path):
    written = plots.draw(records, tmp_path)
    assert {path.name for path in written} == {
        "speedup-residual_add.png",
        "speedup-routed_projection-token.png",
        "floor-by-rank.png",
        "sweep.png",
        "model-loss.png",
        "model-steps.png",
    }
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert content.endswith(b"IEND\xaeB`\x82")


def test_a_plot_that_fails_to_render_keeps_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "sweep.png"
    path.write_bytes(b"old")

    def fails(self, target, **options):
        target.write_bytes(PNG)
        raise RuntimeError("no fonts")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(RuntimeError, match="no fonts"):
        plots.save(plots.plt.figure(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert plots.plt.get_fignums() == []


def test_no_records_make_no_plots(tmp_path):
    assert plots.draw([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_ratios_in_the_tables_are_baseline_over_ours(records):
    (table,) = [t for t in report.ops_tables(records) if "token" in t.title]
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["x concat"] == "0.50 (0.50)"
    assert cells["x hydra"] == "refused"
    assert cells["of floor"] == "0.90"
    assert cells["ours ms"] == "1 (1.1)"


def test_directions_have_tables_of_their_own(records):
    titles = [table.title for table in report.ops_tables(records)]
    assert len(titles) == len(set(titles)) == 3


def test_refusals_are_listed_with_their_reason(records):
    table = report.refusals_table(records)
    assert [row[0] for row in table.rows] == ["hydra", "hydra"]
    assert all("off by" in row[3] for row in table.rows)
    assert report.refusals_table(model_records()) is None


def test_markdown_tables_are_rectangular_and_name_machine_and_command(records):
    text = report.markdown(records, report.all_tables(records), "lowrank-fast bench")
    assert "A processor, 2 threads, kernels: avx512; load 0.3 to 0.3" in text
    assert "`lowrank-fast bench`" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 6
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_tables_print_on_a_plain_console(records):
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    for table in report.all_tables(records):
        table.print(console)
    assert "MiniLM on review snippets: 3 steps of 1536 tokens" in console.file.getvalue()
