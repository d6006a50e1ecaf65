import threading
import time

import pytest
from rich.console import Console

from fedllm.errors import FedLLMError
from fedllm.events import JsonlSink
from fedllm.progress import RunView, follow_events
from tests.sample_run import START, Script, finished_run


def view_of(script, now=None):
    view = RunView(clock=lambda: script.now if now is None else now)
    for event in script.events:
        view.update(event)
    return view


def text_of(view, height=24, width=100):
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(view.render(height))
    return capture.get()


def running(clients, done=0, dropped=0):
    """Round 1 with ``clients`` asked, of which the first reply and the next are dropped."""
    script, names = Script(), [f"node-{index}" for index in range(clients)]
    script.start()
    script.join([*names, "idle"])
    script.add("round-started", round=1, nodes=names)
    for name in names[:done]:
        script.reply(1, name, loss=0.25)
    for name in names[done : done + dropped]:
        script.drop(1, name, "NaN in lora_A")
    return script


def test_states_of_clients():
    rows = {row.node: row.state for row in view_of(running(4, done=1, dropped=1)).rows()}
    assert rows == {
        "node-0": "done",
        "node-1": "dropped",
        "node-2": "training",
        "node-3": "training",
        "idle": "waiting",
    }


def test_everything_is_on_the_screen():
    text = text_of(view_of(running(4, done=1, dropped=1)))
    for expected in ("sample", "fedavg", "round 1/3", "up 2.0 MB", "down 1.0 MB", "0.250", "1.5 s",
                     "round 1: client node-1 dropped: NaN in lora_A"):  # fmt: skip
        assert expected in text
    assert "more" not in text


@pytest.mark.parametrize("height", [12, 24, 50])
def test_a_hundred_clients_fit_the_terminal(height):
    text = text_of(view_of(running(100, done=60, dropped=2)), height)
    lines = text.splitlines()
    assert len(lines) <= height
    shown = [line for line in lines if line.startswith(("node-", "idle"))]
    more = next(line for line in lines if line.startswith("…"))
    assert more.startswith(f"… {101 - len(shown)} more (")
    assert any(line.startswith("node-60 ") and "dropped" in line for line in lines)


def test_metrics_of_the_last_evaluated_round_stay_visible():
    script = finished_run(accuracies=(0.5, 0.8))
    script.events.pop()
    script.add("round-started", round=3, nodes=["node-0"])
    text = text_of(view_of(script))
    assert "round 3/3" in text
    assert "accuracy 0.800" in text
    assert "(round 2)" in text


def test_elapsed_runs_on_between_events_and_stops_at_the_end():
    script = finished_run()
    last = script.events.pop()
    assert view_of(script, now=START + 100).elapsed() == 100
    script.events.append(last)
    assert view_of(script, now=START + 100).elapsed() == pytest.approx(30)
    assert "finished 3 rounds" in text_of(view_of(script))


def test_eta_is_pace_times_rounds_left_less_what_the_open_round_has_taken():
    script = Script()
    script.start(rounds=10)
    assert view_of(script).eta() is None
    script.round(1, ["a"], seconds=100.0)
    for number in range(2, 7):
        script.round(number, ["a"], seconds=10.0)
    assert view_of(script).eta() == pytest.approx(40.0)
    script.add("round-started", round=7, nodes=["a"])
    assert view_of(script, now=script.now + 4).eta() == pytest.approx(36.0)
    assert view_of(script, now=script.now + 400).eta() == 0.0


def test_eta_after_resume_counts_only_rounds_left():
    script = Script()
    script.start(rounds=4)
    for number in (1, 2, 3):
        script.round(number, ["a"], seconds=10.0)
    script.start(rounds=4, first_round=2)
    script.add("run-resumed", round=1, path="x")
    assert view_of(script).eta() == pytest.approx(30.0)


def test_waiting_and_failure_are_told():
    script = Script()
    script.add("waiting-for-nodes", have=1, need=5)
    assert "waiting for nodes: 1 of 5 connected" in text_of(view_of(script))
    script.start()
    script.add("round-started", round=1, nodes=["a"])
    script.add("run-failed", reason="every client failed")
    assert "failed: every client failed" in text_of(view_of(script))


def test_before_any_event():
    assert "starting" in text_of(RunView())


def test_names_are_neither_markup_nor_escape_codes():
    script = Script()
    script.start()
    script.add("round-started", round=1, nodes=["[red]evil\x1b[2J"])
    script.add("warning", message="[bold]x\x1b]0;t\x07")
    text = text_of(view_of(script))
    assert "[red]evil�[2J" in text
    assert "[bold]x" in text
    assert "\x1b" not in text


def test_update_and_render_from_two_threads():
    view, script = RunView(), running(200, done=150)
    failures = []

    def render():
        try:
            while thread.is_alive():
                view.render(30)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=lambda: [view.update(event) for event in script.events])
    thread.start()
    render()
    thread.join()
    assert not failures


# ---- following a file


def test_follow_waits_for_the_file_and_yields_all_events(tmp_path):
    path, done = tmp_path / "run" / "events.jsonl", threading.Event()

    def write():
        time.sleep(0.05)
        sink = JsonlSink(path)
        for number in range(20):
            sink.emit({"event": "round-finished", "time": float(number), "round": number})
        sink.close()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    events = list(follow_events(path, done.is_set, poll_interval=0.005))
    thread.join()
    assert [event["round"] for event in events] == list(range(20))


def test_follow_without_a_file_ends_when_told(tmp_path):
    assert list(follow_events(tmp_path / "none.jsonl", lambda: True)) == []


def test_follow_waits_for_the_rest_of_a_line_and_survives_a_cut(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a", "time": 1}\n{"event": "b"')
    looks = iter([False, False, False, True])

    def stop():
        look = next(looks)
        if seen == ["a"] and look:
            pytest.fail("the second event was not seen")
        return look

    seen = []
    for event in follow_events(path, stop, poll_interval=0.001):
        seen.append(event["event"])
        if event["event"] == "a":
            sink = JsonlSink(path)  # cuts the torn line off
            sink.emit({"event": "c", "time": 2})
            sink.close()
    assert seen == ["a", "c"]


def test_follow_names_a_damaged_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a", "time": 1}\nnonsense\n')
    with pytest.raises(FedLLMError, match="line 2"):
        list(follow_events(path, lambda: True))
