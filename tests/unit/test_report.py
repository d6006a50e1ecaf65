import csv
import re
from html.parser import HTMLParser

import pytest

from fedllm.errors import FedLLMError
from fedllm.history import RunHistory
from fedllm.plots import comparison_panels, run_panels, spread, svg, write_png
from fedllm.report import load_run, write_metrics_csv, write_report
from tests.sample_run import CONFIG, Script, finished_run, save


class Page(HTMLParser):
    """Collects the text of every table cell, all tags, and every attribute that could load something."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.links, self.text, self.open_cell = [], set(), [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        loading = ("src", "href", "xlink:href", "srcset", "action")
        self.links += [v for k, v in attrs if k in loading and v and not v.startswith("#")]
        self.links += [k for k, _ in attrs if k.startswith("on")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.open_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open_cell = False

    def handle_data(self, data):
        self.text.append(data)
        if self.open_cell:
            self.tables[-1][-1][-1] += data.strip()

    def table(self, first_header):
        return next(table for table in self.tables if table[0][0] == first_header)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = save(finished_run().events, tmp_path_factory.mktemp("runs") / "sample", CONFIG)
    write_report([folder])
    return folder


@pytest.fixture(scope="module")
def page(run_folder):
    return Page((run_folder / "report.html").read_text(encoding="utf-8"))


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- loading


def test_configuration_file_wins_over_the_event(tmp_path):
    folder = save(finished_run().events, tmp_path / "a", {"strategy": "vert", "rounds": 7})
    assert load_run(folder).config == {"strategy": "vert", "rounds": 7}
    (folder / "config.json").unlink()
    assert load_run(folder).config == CONFIG


def test_folder_without_a_run_and_broken_configuration_are_named(tmp_path):
    with pytest.raises(FedLLMError, match=r"nothing holds no run: expected a file events\.jsonl"):
        load_run(tmp_path / "nothing")
    folder = save(finished_run().events, tmp_path / "a")
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(FedLLMError, match=r"config\.json"):
            load_run(folder)


def test_run_that_has_not_started_yet_has_its_folders_name(tmp_path):
    script = Script()
    script.add("waiting-for-nodes", have=0, need=2)
    folder = save(script.events, tmp_path / "early")
    assert load_run(folder).name == "early"
    assert "No round was finished" in write_report([folder]).read_text(encoding="utf-8")
    assert not (folder / "curves.png").exists()


# ---- the table of metrics


def test_csv_has_one_row_a_round(tmp_path):
    script = finished_run()
    script.add("evaluated", round=3, where="clients", metrics={"accuracy": None, "loss": 0.25}, seconds=1.0)
    write_metrics_csv(RunHistory.of(script.events), tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert [float(row["server-accuracy"]) for row in rows] == [0.5, 0.8, 0.7]
    assert [row["clients-loss"] for row in rows] == ["", "", "0.25"]
    assert [row["clients-accuracy"] for row in rows] == ["", "", ""]
    second = rows[1]
    fixed = ["outcome", "asked", "replied", "dropped", "num-examples", "train-loss", "seconds", "bytes-up"]
    assert [second[key] for key in fixed] == ["finished", "3", "2", "1", "200", "0.5", "10.0", "4000000"]


# ---- the page of one run


def test_files_of_one_run(run_folder):
    assert {"metrics.csv", "curves.png", "report.html"} <= {path.name for path in run_folder.iterdir()}
    assert is_png(run_folder / "curves.png")


def test_page_needs_no_other_file_and_no_script(run_folder, page):
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    assert page.links == []
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert "url(http" not in html
    assert "@import" not in html


def test_page_is_made_for_phones_and_dark_rooms(run_folder):
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    for before in html.split("<table>")[:-1]:
        assert before.endswith('<div class="scroll">')


def test_tables_of_rounds_clients_and_drops(page):
    rounds = page.table("round")
    assert [row[:5] for row in rounds[1:]] == [
        ["1", "finished", "3 of 3", "300", "1.000"],
        ["2", "finished", "2 of 3", "200", "0.500"],
        ["3", "finished", "3 of 3", "300", "0.333"],
    ]
    clients = page.table("client")
    assert clients[3] == ["node-2", "cpu", "100", "2 of 3", "0.333", "3.0 s", "4.0 MB", "2.0 MB", "1"]
    drops = next(table for table in page.tables if table[0][-1] == "reason")
    assert drops[1:] == [["2", "train", "node-2", "loss is NaN"]]


def test_settings_that_differ_from_the_default_come_first(page):
    rows = page.table("key")[1:]
    assert [row[0] for row in rows] == ["rounds", "lora.rank", "run.name", "fedadam.eta", "strategy"]
    assert rows[0] == ["rounds", "3", "10"]
    assert rows[-1] == ["strategy", "fedavg", ""]


def test_headline_figures(page):
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "accuracy (server) 0.700 after round 3; best 0.800 in round 2",
        "rounds 3 of 3",
        "16 MB up 8.0 MB down",
        "1 reply dropped",
        "30.0 s 10.0 s a round",
    ):
        assert expected in text


def test_names_from_elsewhere_are_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'$\\alpha$ {{ 7*7 }}"
    script = Script()
    script.start(run=evil, strategy=evil, version=evil, config={evil: evil})
    script.join([evil])
    script.round(1, [evil, "b"], metrics={"accuracy": 0.5, evil: 1.0}, dropped={"b": evil})
    script.add("warning", message=evil)
    script.add("run-failed", reason=evil)
    folder = save(script.events, tmp_path / "a & <b>")
    page = Page(write_report([folder]).read_text(encoding="utf-8"))
    assert page.links == []
    assert not page.tags & {"img", "script"}
    assert evil in page.table("client")[1]
    other = save(finished_run().events, tmp_path / "<script>")
    page = Page(write_report([folder, other]).read_text(encoding="utf-8"))
    assert page.links == []
    assert not page.tags & {"img", "script"}


def test_failed_run_says_why_and_skipped_rounds_are_told(tmp_path):
    script = Script()
    script.start()
    script.add("round-started", round=1, nodes=["a", "b"])
    script.drop(1, "a", "no reply within 60 s")
    script.add("round-skipped", round=1, reason="0 of 2 replies, the quorum is 1")
    script.add("round-finished", round=1, seconds=60.0)
    script.add("run-failed", reason="every client failed")
    page = Page(write_report([save(script.events, tmp_path / "failed")]).read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "failed – every client failed" in text
    assert "Round 1 skipped: 0 of 2 replies, the quorum is 1" in text
    assert page.table("round")[1][1] == "skipped"


def test_output_file_can_be_chosen(tmp_path):
    folder = save(finished_run().events, tmp_path / "a")
    assert write_report([folder], tmp_path / "new" / "x.html") == tmp_path / "new" / "x.html"
    assert (tmp_path / "new" / "x.html").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(FedLLMError, match="cannot write the report"):
        write_report([folder], tmp_path / "file" / "x.html")
    with pytest.raises(FedLLMError, match="at least one run"):
        write_report([])


# ---- the page of several runs


def test_comparison(tmp_path):
    one = save(finished_run().events, tmp_path / "x" / "run", CONFIG)
    other = finished_run(accuracies=(0.6, 0.9))
    two = save(other.events, tmp_path / "y" / "run", {**CONFIG, "lora.rank": 4, "run.name": "other"})
    before = sorted(one.iterdir())
    path = write_report([one, two], tmp_path / "out" / "both.html")
    assert is_png(tmp_path / "out" / "both.png")
    assert sorted(one.iterdir()) == before
    page = Page(path.read_text(encoding="utf-8"))
    rows = {row[0]: row for row in page.table("run")[1:]}
    header = page.table("run")[0]
    accuracy = header.index("accuracy (server)")
    assert rows["x/run"][accuracy : accuracy + 2] == ["0.700", "0.800in 2"]
    assert rows["y/run"][accuracy : accuracy + 2] == ["0.900", "0.900in 2"]
    assert page.table("key") == [["key", "x/run", "y/run"], ["lora.rank", "16", "4"]]
    with pytest.raises(FedLLMError, match="given twice"):
        write_report([one, one])


def test_comparison_of_runs_without_evaluation(tmp_path):
    folders = []
    for name in ("a", "b"):
        script = Script()
        script.start()
        script.round(1, ["n"])
        folders.append(save(script.events, tmp_path / name))
    assert write_report(folders) == tmp_path / "comparison.html"
    assert is_png(tmp_path / "comparison.png")


# ---- pictures


def panels_by_title(script):
    return {panel.title: panel for panel in run_panels(RunHistory.of(script.events))}


def test_panels_hold_the_numbers_of_the_run():
    panels = panels_by_title(finished_run())
    assert list(panels) == ["Accuracy", "Loss", "Traffic per round (MB)", "Time per round (seconds)"]
    assert panels["Accuracy"].series[0].points == ((1, 0.5), (2, 0.8), (3, 0.7))
    assert [series.label for series in panels["Loss"].series] == ["train", "test (server)"]
    up, down = panels["Traffic per round (MB)"].series
    assert up.points == ((1, 6.0), (2, 4.0), (3, 6.0))
    assert down.points == ((1, 3.0), (2, 2.0), (3, 3.0))
    assert "accuracy ends at 0.7" in panels["Accuracy"].alt


def test_panels_of_runs_without_evaluation_or_of_causal_models():
    script = Script()
    script.start()
    script.round(1, ["a"])
    assert list(panels_by_title(script)) == ["Loss", "Traffic per round (MB)", "Time per round (seconds)"]
    script.round(2, ["a"], metrics={"loss": 2.0, "perplexity": 7.4, "bleu": 3.0})
    assert list(panels_by_title(script))[:3] == ["Perplexity", "BLEU", "Loss"]


def test_comparison_by_traffic_counts_all_rounds_up_to_a_point():
    first, second = finished_run(), Script()
    second.start()
    second.round(1, ["a"])
    panels = {
        p.title: p
        for p in comparison_panels({"a": RunHistory.of(first.events), "b": RunHistory.of(second.events)})
    }
    assert panels["Accuracy by traffic"].series[0].points == ((9.0, 0.5), (15.0, 0.8), (24.0, 0.7))
    assert panels["Accuracy by time"].series[0].points == ((10.0, 0.5), (20.0, 0.8), (30.0, 0.7))
    assert [series.colour for series in panels["Train loss"].series] == [0, 1]


@pytest.mark.parametrize("rounds", [1, 2, 80])
def test_pictures_of_short_and_long_runs(tmp_path, rounds):
    script = Script()
    script.start(rounds=rounds)
    for number in range(1, rounds + 1):
        script.round(
            number, ["a"], metrics={"accuracy": 0.5, "macro-f1": 0.5, "perplexity": 10.0 ** (number % 7)}
        )
    panels = run_panels(RunHistory.of(script.events))
    write_png(panels, tmp_path / "curves.png", "$\\frac{$")
    assert is_png(tmp_path / "curves.png")
    drawing = svg(panels[0])
    assert re.match(r"<svg [^>]*viewBox=", drawing)
    assert not re.search(r"<svg[^>]* width=", drawing)
    assert "macro-F1 0.500" in drawing


def test_pictures_are_the_same_every_time():
    panel = run_panels(RunHistory.of(finished_run().events))[0]
    assert svg(panel) == svg(panel)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.5, 0.6]),
        ([1.0, 0.99], [1.0, 0.9]),
        ([0.0, 0.0, 0.05], [0.0, 0.1, 0.2]),
    ],
)
def test_labels_keep_their_distance(heights, expected):
    assert spread(heights, gap=0.1) == pytest.approx(expected)
