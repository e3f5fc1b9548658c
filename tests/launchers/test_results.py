"""What a sweep leaves: rows in their order, sweep.csv, the table, the page; sweep.json there and back."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megabridge.config.schema import Config
from megabridge.errors import ConfigError, MegabridgeError, plain
from megabridge.launchers import job_files, results, sweep
from megabridge.launchers.html_report import render
from megabridge.launchers.prepare import write_config
from megabridge.launchers.processes.outcome import Failure, first
from megabridge.launchers.sweep import DONE, FAILED, REFUSED, SweepFailure, SweepRun
from recipes import collect, report
from tests.support.compose import compose
from tests.support.limits import largest_file


def points(tmp_path: Path) -> list[SweepRun]:
    made = []
    for number, (rate, loss) in enumerate((("1e-3", 2.5), ("2e-3", 2.25), ("<b>", None), ("4e-3", float("nan")))):
        overrides = ["model=tiny_llama", f"optimizer.lr={rate}", r"+recipe.options.word=a\:b"]
        point = SweepRun(number, overrides, str(tmp_path / str(number)), state=DONE if loss else FAILED, objective=loss)
        made.append(point)
    made[2].error, made[2].status = "rank 1: <no>", 3
    for number, best in ((0, 2.0), (1, 2.25)):
        lines = [
            {"step": 0, "validation/loss": 3.0},
            {"step": 1, "train/tokens_per_second": 1.0, "train/mfu": 0.1, "train/memory_gib": 4.0},
            {"step": 2, "train/tokens_per_second": 100.0, "train/mfu": 0.4, "train/memory_gib": 5.0, "validation/loss": best},
            {
                "step": 3,
                "train/tokens_per_second": 102.0,
                "train/mfu": 0.5,
                "train/memory_gib": 4.5,
                "parity/logits_max_abs_diff": 0.5,
            },
            {"step": 3, "validation/loss": 2.5, "parity/logits_max_abs_diff": 0.25},
        ]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def test_rows_are_ranked_and_measured(tmp_path: Path) -> None:
    said = results.write(tmp_path, points(tmp_path))
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["point"] for row in rows] == ["1", "0", "2", "3"]
    assert "model" not in rows[0] and "recipe.options.word" not in rows[0], "what all share is left out"
    first_row = {name: rows[1][name] for name in ("optimizer.lr", *results.MEASURES)}
    assert first_row == {
        "optimizer.lr": "1e-3",
        "objective": "2.5",
        "best_validation_loss": "2.0",
        "tokens_per_second": "101.0",
        "mfu": "0.45",
        "memory_gib": "5.0",
        "parity": "0.25",
    }
    assert rows[2]["error"] == "rank 1: <no>" and rows[2]["best_validation_loss"] == ""
    table = said.splitlines()
    assert table[0].split() == ["rank", "point", "optimizer.lr", "state", *results.MEASURES]
    assert table[1].split()[:5] == ["1", "1", "2e-3", "done", "2.25"]


def test_the_page_is_whole_and_escapes(tmp_path: Path) -> None:
    text = render("Sweep <1>", results.rows(points(tmp_path)))
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}, "needs another file"

    Reader().feed(text)
    assert seen.count("tr") == 5 and seen.count("polyline") == 2 and "b" not in seen and "no" not in seen


HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(1)>',
    "'/><a href=javascript:alert(1)>",
    "]]><svg onload=alert(1)>&lt;b&gt;",
    "\x00\x1b[2J\r\u202e",
    "\ud800",
    "<b>" * 20_000,
)


class Strict(HTMLParser):
    """Notes tags and attributes; nothing on the page may come from the data but text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_of_a_foreign_sweep_is_nothing_but_text(tmp_path: Path, text: str) -> None:
    """Every text of sweep.json, of any letters; and numbers of any size in metrics.jsonl."""
    plain_page = Strict()
    plain_page.feed(render("t", results.rows(points(tmp_path))))
    hostile = [
        SweepRun(number, [f"{text}={text}{number}", text], text, text, DONE, loss, text, 1, text)
        for number, loss in enumerate((float("nan"), float("inf"), 1e308, -1e308, None))
    ]
    (tmp_path / "4").mkdir()
    lines = [{"step": 1 << 60, "validation/loss": 1}, {"step": 1, "validation/loss": 1e308}, {"step": 2, "validation/loss": -1e308}]
    odd: list[object] = [
        [],
        3,
        {"step": "<b>", "validation/loss": "<b>", "train/mfu": {"a": []}},
        {"validation/loss": float("nan")},
    ]
    content = "".join(json.dumps(line) + "\n" for line in (*odd, *lines)) + '{"step": 1' + "0" * 5000 + "}\n" + "[" * 100_000
    (tmp_path / "4" / "metrics.jsonl").write_text(content)
    hostile[4].run_dir = str(tmp_path / "4")
    found = results.rows(hostile)
    assert [row.losses for row in found if row.losses] == [[(0, 1), (1, 1e308), (2, -1e308)]]
    seen, html = Strict(), render(text, found)
    seen.feed(html)
    seen.close()
    assert seen.tags <= plain_page.tags | {"li"} and seen.names <= plain_page.names
    assert html.encode() and not {letter for letter in html if not letter.isprintable() and letter not in "\n\t"}
    assert text not in html and seen.text.count(plain(text)[:40]) >= 11 and "nan,nan" not in html
    for row in csv.reader(results.as_csv(found).encode().decode().splitlines()):
        assert not [cell for cell in row if cell.startswith(("=", "@", "+"))]
    assert len(results.as_table(found).encode().splitlines()) == 6, "a line a point, whatever is in it"


def test_cells_of_a_table_are_no_formulas() -> None:
    text = '=HYPERLINK("http://x")'
    made = [SweepRun(0, ["a=-1", f"b={text}", "c=+1e-3", "d=-x", "e=1"], "@run", error="\t=1"), SweepRun(1, [], "r")]
    (row, _) = csv.DictReader(results.as_csv(results.rows(made)).splitlines())
    assert [row[name] for name in "abcde"] == ["-1", f"'{text}", "+1e-3", "'-x", "1"]
    assert row["run_dir"] == "'@run" and row["error"] == "'\t=1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", "<b>"),
        ("number", True),
        ("number", 10**40),
        ("number", -1),
        ("overrides", "abc"),
        ("overrides", [1]),
        ("run_dir", None),
        ("label", 3),
        ("state", ["done"]),
        ("state", "<b>"),
        ("objective", "1"),
        ("objective", [1.0]),
        ("objective", 10**400),
        ("error", {"a": 1}),
        ("status", 1.5),
        ("job", 4),
        ("world_size", "2"),
    ],
)
def test_a_foreign_sweep_is_refused_where_a_value_is_of_another_kind(tmp_path: Path, name: str, value: object) -> None:
    sweep.write(tmp_path, points(tmp_path)[:1])
    rows = json.loads((tmp_path / sweep.RECORD).read_text())
    (tmp_path / sweep.RECORD).write_text(json.dumps([rows[0] | {name: value}]))
    with pytest.raises(MegabridgeError, match=r"must be the directory of a sweep .*sweep\.json"):
        sweep.read(tmp_path)


def test_sweep_json_there_and_back(tmp_path: Path) -> None:
    before = points(tmp_path)[:3]
    sweep.write(tmp_path, before)
    assert sweep.read(tmp_path) == before
    for content in (None, "", "{}", "3", "[3]", "[[]]", "[" * 100_000, '[{"number": 1' + "0" * 5000 + "}]", "\xff"):
        if content is not None:
            (tmp_path / "0" / sweep.RECORD).write_text(content, encoding="latin-1")
        with pytest.raises(MegabridgeError, match=r"must be the directory of a sweep .*sweep\.json"):
            sweep.read(tmp_path / "0")


def test_a_full_disk_costs_no_point_and_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = points(tmp_path)
    sweep.write(tmp_path, found[:1])
    results.write(tmp_path, found[:1])
    before = {file: file.read_bytes() for file in (tmp_path / sweep.RECORD, tmp_path / results.CSV)}
    with largest_file(100):
        with pytest.raises(MegabridgeError, match=r"sweep\.json can't be written \(File too large\); free space there"):
            sweep.write(tmp_path, found)
        sweep._save(tmp_path, found)
        table = results.write(tmp_path, found)
        for write in (
            lambda: job_files.leave_text(tmp_path / "queue" / "a", "x" * 200),
            lambda: write_config(compose(), {"run_dir": str(tmp_path), "seed": "1" * 200}),
        ):
            with pytest.raises(MegabridgeError, match="File too large"):
                write()
    assert "sweep.json can't be written (File too large); free space there. The sweep goes on." in capsys.readouterr().err
    assert table.startswith("rank") and "sweep.csv can't be written (File too large); free space there, and recipe=collect" in table
    assert {file: file.read_bytes() for file in before} == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["sweep.csv", "sweep.json"]


def test_the_status_is_that_of_a_run_before_that_of_a_refusal() -> None:
    done, refused = SweepRun(0, [], "", state=DONE), SweepRun(1, [], "", state=REFUSED, status=2)
    failed = SweepRun(2, [], "", state=FAILED, status=137)
    assert SweepFailure([done, refused, failed]).status == 137
    assert str(SweepFailure([done, refused])) == "1 of 2 points are not done: 1 refused."
    assert SweepFailure([done, refused]).status == 2
    assert SweepFailure([SweepRun(0, [], "", state=FAILED, status=0)]).status == 1, "as others may have written it"


def test_the_cause_is_who_left_no_report_else_the_earliest() -> None:
    late = Failure(0, 1, "connection closed", "Traceback", time=5.0)
    early = Failure(1, 1, "the cause", "Traceback", time=4.0)
    killed = Failure(2, -9, "was ended by SIGKILL", is_silent=True, time=9.0)
    assert first([late, early]) is early and first([late, killed, early]) is killed


def test_the_recipes_write_the_page_and_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As recipe=report and recipe=collect call them; without the queue, as all points have ended."""
    sweep.write(tmp_path, points(tmp_path))
    (tmp_path / "mine").write_text("kept")
    for name in ("report.html", ".report.html"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    report.main(Config(sweep=str(tmp_path)))
    assert "<polyline" in (tmp_path / "report.html").read_text() and (tmp_path / "mine").read_text() == "kept"
    assert not (tmp_path / "report.html").is_symlink()
    with pytest.raises(SweepFailure, match="1 of 4 points are not done: 1 failed"):
        collect.main(Config(sweep=str(tmp_path)))
    assert (tmp_path / "sweep.csv").is_file() and "rank  point" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give sweep="):
        report.main(Config())
