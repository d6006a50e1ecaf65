"""`fedllm simulate` without Flower: what is checked before a run, how a run is followed, how its end is judged."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from fedllm import flower, registry, simulate, watch
from fedllm.app_config import read_app, stage
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, RegistryError
from fedllm.events import EventBus, JsonlSink
from fedllm.flower import RunStatus, SuperLinkError, tail
from fedllm.history import RunHistory
from fedllm.processes import alive, clean_up, of_home
from fedllm.simulate import federation_config, placement, prepare
from fedllm.superlink import PrivateSuperLink
from fedllm.watch import Display, Outcome, last_traceback
from tests.tiny_app import write_app

CONFIG = """
rounds = 3
simulation.clients = 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write_app(tmp_path / "demo", CONFIG)


# -- before the run --------------------------------------------------------------------------------------------------


def test_options_win_over_overrides_and_these_over_the_app(folder, tmp_path):
    job = prepare(folder, ["rounds=5 seed=9 simulation.clients=6"], clients=7, rounds=8, name="first")
    config = job.config
    assert (config.rounds, config.simulation.clients, config.seed, config.server.min_nodes) == (8, 7, 9, 7)
    assert job.run_dir == tmp_path / "runs" / "first"


def test_a_run_without_a_name_gets_the_apps_name_and_the_time(folder):
    assert prepare(folder).config.run.name.startswith("tiny-20")


def test_min_nodes_of_the_user_is_kept(folder):
    assert prepare(folder, ["server.min-nodes=3"]).config.server.min_nodes == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=5", "did you mean 'rounds'"),
        ("lora.rank=0", "lora.rank"),
        ("server.min-nodes=5", "never come"),
        ("simulation.cpus-per-client=9999", "9999"),
        ('run.name="../x"', "run.name"),
        ("fedavg.nonsense=1", "nonsense"),
        ('defence="vert" vert.keep="50"', r"vert\.keep is 50, but a round has 4 clients"),
        ('defence="vert-paper" vert-paper.keep=5', r"vert-paper\.keep is 5, but a round has 4 clients"),
        (
            'simulation.clients=20 server.fraction-train=0.5 defence="vert" vert.keep="11"',
            "a round has 10 clients",
        ),
    ],
)
def test_bad_configuration_is_rejected_before_work_starts(folder, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        prepare(folder, [override])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("keep", ['"auto"', '"4"', '"0.9"', "4", "0.9", "1.0"])
def test_a_defence_may_keep_as_many_as_a_round_has(folder, keep, tmp_path):
    job = prepare(folder, [f'defence="vert" vert.keep={keep}'])
    assert job.config.plugins["vert"] == {"keep": json.loads(keep)}
    staged = read_app(stage(read_app(folder), job.config, tmp_path / "staged"))
    assert repr(staged.config["vert.keep"]) == repr(json.loads(keep))


def test_a_round_has_as_many_clients_as_the_strategy_asks_at_least(folder):
    asked = "simulation.clients=20 server.fraction-train=0.1 fedavg.min-train-nodes=5"
    prepare(folder, [f'{asked} defence="vert" vert.keep="5"'])
    with pytest.raises(ConfigError, match="a round has 5 clients"):
        prepare(folder, [f'{asked} defence="vert" vert.keep="6"'])


def test_more_of_a_gpu_than_there_is_is_rejected(folder, monkeypatch):
    monkeypatch.setattr(simulate, "_gpus", lambda: 1)
    assert prepare(folder, ["simulation.gpus-per-client=0.5"])
    with pytest.raises(ConfigError, match="1 CUDA devices"):
        prepare(folder, ["simulation.gpus-per-client=2.0"])


def test_an_unknown_strategy_is_rejected(folder):
    with pytest.raises(RegistryError, match="did you mean 'fedadam'"):
        prepare(folder, ['strategy="fedadm"'])


def test_a_strategy_in_the_apps_own_folder_is_found(folder):
    (folder / "own_strategy_of_test.py").write_text(
        "class Mine:\n    def __init__(self, knob: int = 1) -> None: ...\n"
    )
    job = prepare(folder, ['strategy="own_strategy_of_test:Mine" mine.knob=3'])
    assert job.config.plugins == {"mine": {"knob": 3}}


def saved_run(folder, **changes):
    """A run folder as a server leaves it."""
    job = prepare(folder, name="first")
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "config.json").write_text(json.dumps(job.config.to_flat() | changes))
    (job.run_dir / "events.jsonl").touch()
    return job


def test_an_existing_run_is_not_started_again(folder):
    saved_run(folder)
    with pytest.raises(ConfigError, match="--resume first"):
        prepare(folder, name="first")


def test_resume_takes_the_saved_configuration_and_overrides(folder, tmp_path):
    saved_run(folder, seed=77, rounds=6)
    write_app(folder, CONFIG.replace("rounds = 3", "rounds = 99"))
    config = prepare(folder, ["server.quorum=0.75"], resume="first").config
    assert (config.seed, config.rounds, config.server.quorum) == (77, 6, 0.75)
    assert config.run.resume
    assert config.run.root == str(tmp_path / "runs")
    assert prepare(folder, resume="first", rounds=9).config.rounds == 9


def test_what_cannot_be_resumed_says_why(folder):
    with pytest.raises(ConfigError, match=r"cannot resume .*none"):
        prepare(folder, resume="none")
    saved_run(folder)
    with pytest.raises(ConfigError, match="has 4 clients"):
        prepare(folder, resume="first", clients=5)


def test_flower_learns_of_clients_and_their_resources():
    flat = {"simulation.clients": 7, "simulation.cpus-per-client": 2, "simulation.gpus-per-client": 0.25}
    assert federation_config(RunConfig.from_flat(flat)) == {
        "num-supernodes": 7,
        "client-resources-num-cpus": 2,
        "client-resources-num-gpus": 0.25,
    }


@pytest.mark.parametrize(
    ("cpus_per_client", "gpus_per_client", "cpus", "gpus", "expected"),
    [(1, 0.0, 4, 0, 4), (2, 0.0, 5, 0, 2), (1, 0.0, 64, 0, 10), (1, 0.25, 64, 1, 4), (1, 0.4, 64, 2, 4),
     (1, 2.0, 64, 4, 2), (1, 0.1, 64, 1, 10)],
)  # fmt: skip
def test_how_many_clients_fit_at_a_time(cpus_per_client, gpus_per_client, cpus, gpus, expected):
    flat = {"simulation.cpus-per-client": cpus_per_client, "simulation.gpus-per-client": gpus_per_client}
    assert placement(RunConfig.from_flat(flat), cpus, gpus).startswith(f"{expected} of 10 clients at a time")


def test_clients_that_train_with_each_other_all_get_a_worker(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    flat = {"strategy": "hsplitlora", "simulation.clients": 10, "server.fraction-train": 0.5}
    config = registry.config_from_flat(flat)
    assert federation_config(config)["init-args-num-cpus"] == 5
    assert placement(config, 2, 0) == "5 of 10 clients at a time, 0.4 of 2 CPUs each"
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert "init-args-num-cpus" not in federation_config(config)
    assert placement(config, 8, 0).startswith("8 of 10")


def test_a_gpu_without_room_for_clients_that_train_with_each_other_is_refused(folder, monkeypatch):
    monkeypatch.setattr("fedllm.simulate._gpus", lambda: 1)
    together = ['strategy="hsplitlora"', "simulation.clients=5"]
    with pytest.raises(ConfigError, match=r"trains 5 clients .* only 4 run at a time; set it to 1/5 or less"):
        prepare(folder, [*together, "simulation.gpus-per-client=0.25"])
    prepare(folder, [*together, "simulation.gpus-per-client=0.2"])


# -- while it runs ---------------------------------------------------------------------------------------------------

STARTED = {
    "run": "r", "strategy": "fedavg", "client": "backprop", "task": "t", "rounds": 1, "first_round": 1, "config": {},
    "version": "0", "parameters": 1, "adapter_bytes": 4,
}  # fmt: skip


class Link:
    """A SuperLink that answers from a list; what it has run out of it repeats."""

    def __init__(self, *statuses):
        self._statuses = list(statuses)

    def status(self, run_id):
        return self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]


def follow(monkeypatch, run_dir, *statuses, quiet=False):
    monkeypatch.setattr(watch, "_STATUS_INTERVAL", 0.05)
    out = io.StringIO()
    outcome = watch.watch(Link(*statuses), "1", run_dir, Display(Console(file=out, width=200), quiet))
    return outcome, out.getvalue()


COMPLETED = RunStatus("finished:completed", "")


def write(run_dir, *names):
    fields = {
        "run-started": STARTED,
        "run-finished": {"rounds": 1, "seconds": 2.0, "metrics": {"accuracy": 0.5}},
        "run-failed": {"reason": "RoundError: nobody"},
    }
    with EventBus([JsonlSink(run_dir / "events.jsonl")]) as events:
        for name in names:
            events.emit(name, **fields[name])


def test_a_run_is_good_only_if_flower_and_the_run_say_so(monkeypatch, tmp_path):
    future = time.time() + 60
    monkeypatch.setattr("fedllm.events.time.time", lambda: future)
    write(tmp_path, "run-started")
    assert not follow(monkeypatch, tmp_path, RunStatus("running", ""), COMPLETED)[0].good
    write(tmp_path, "run-finished")
    outcome, out = follow(monkeypatch, tmp_path, RunStatus("running", ""), COMPLETED)
    assert outcome.good
    assert "accuracy 0.500" in out
    assert not follow(monkeypatch, tmp_path, RunStatus("finished:failed", "Ray died"))[0].good
    write(tmp_path, "run-started", "run-failed")
    outcome, _ = follow(monkeypatch, tmp_path, COMPLETED)
    assert not outcome.good
    assert outcome.history.failure == "RoundError: nobody"


def test_the_end_of_an_earlier_part_does_not_count(monkeypatch, tmp_path):
    write(tmp_path, "run-started", "run-finished")
    time.sleep(0.01)
    outcome, out = follow(monkeypatch, tmp_path, COMPLETED)
    assert outcome.history.status == "finished"
    assert not outcome.good
    assert "accuracy" not in out


def test_quiet_prints_nothing(monkeypatch, tmp_path):
    write(tmp_path, "run-started")
    assert follow(monkeypatch, tmp_path, COMPLETED, quiet=True)[1] == ""


def test_a_superlink_that_does_not_answer_ends_the_watch(monkeypatch, tmp_path):
    class Gone(Link):
        def status(self, run_id):
            raise SuperLinkError("connection refused")

    monkeypatch.setattr(watch, "_STATUS_INTERVAL", 0.05)
    outcome = watch.watch(Gone(COMPLETED), "1", tmp_path, Display(Console(file=io.StringIO()), True))
    assert not outcome.good
    assert "connection refused" in outcome.status.details


def test_the_live_view_shows_the_spinner_and_then_the_run(monkeypatch, tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with Display(console, quiet=False) as display:
        assert "starting Flower" in rendered(display)
        display.update({"event": "run-started", "time": 1.0, **STARTED}, fresh=False)
        assert "starting Flower" in rendered(display)
        display.update({"event": "run-started", "time": 2.0, **STARTED}, fresh=True)
        assert "fedavg" in rendered(display)


def rendered(display):
    console = Console(file=io.StringIO(), width=100)
    console.print(display._render())
    return console.file.getvalue()


# -- at the end ------------------------------------------------------------------------------------------------------

LOG = """INFO :      Starting
Traceback (most recent call last):
  File "a.py", line 1, in f
    old()
KeyError: 'old'

ERROR :     Simulation raised an exception
Traceback (most recent call last):
  File "b.py", line 2, in g
    raise ValueError("two\\nlines")
ValueError: two
lines
ERROR :     Exit Code: 700
"""


def test_the_last_traceback_is_cut_out_of_the_log():
    assert last_traceback(LOG).splitlines()[0] == "Traceback (most recent call last):"
    assert last_traceback(LOG).splitlines()[-2:] == ["ValueError: two", "lines"]
    assert "old" not in last_traceback(LOG)
    assert last_traceback("INFO: fine") == ""
    assert last_traceback("Traceback (most recent call last):") == "Traceback (most recent call last):"


def test_the_tail_of_a_log():
    assert tail("a\nb\nc\n\n", 2) == "b\nc"


def judge(folder, capsys, status, history=None, ended=False, log=LOG):
    job = prepare(folder, name="first")
    outcome = Outcome(status, history or RunHistory(), ended)
    assert not outcome.good
    simulate.print_failure(job, outcome, log)
    return job, capsys.readouterr().err


def test_a_failure_is_told_in_the_runs_own_words_where_it_has_some(folder, capsys):
    history = RunHistory.of([{"event": "run-failed", "time": 1.0, "reason": "RoundError: nobody replied"}])
    _, err = judge(folder, capsys, RunStatus("finished:failed", "Simulation failed"), history, ended=True)
    assert "the run failed: RoundError: nobody replied" in err
    assert "Traceback" not in err
    assert "flower.log" in err
    assert "nothing to go on with" in err


def test_a_failure_without_words_shows_the_traceback_and_how_to_resume(folder, capsys):
    checkpoints = folder.parent / "runs" / "first" / "checkpoints" / "round-1"
    checkpoints.mkdir(parents=True)
    _, err = judge(folder, capsys, RunStatus("finished:failed", "Simulation failed with exception: two"))
    assert "Simulation failed with exception: two" in err
    assert "ValueError: two" in err
    assert f"fedllm simulate {folder} --resume first" in err


# -- the SuperLink ---------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Replace `flwr` and `flower-superlink` by scripts."""

    def install(**scripts):
        for name, body in scripts.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!{sys.executable}\n{body}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(flower, "executable", lambda name: str(tmp_path / name))

    return install


SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_commands_are_found_beside_the_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert os.path.isfile(flower.executable("flower-superlink"))
    with pytest.raises(SuperLinkError, match=r"flwr\[simulation\]"):
        flower.executable("no-such-command")


def test_a_superlink_that_dies_is_told_with_its_log(commands):
    commands(flower_superlink="import sys; print('\\x1b[31mno port\\x1b[0m'); sys.exit(3)")
    link = PrivateSuperLink()
    with pytest.raises(SuperLinkError, match=r"exited with code 3.*\nno port"), link:
        pass
    assert not link.home.exists()


def test_a_superlink_that_never_answers_is_given_up(commands):
    commands(flower_superlink="import time; time.sleep(60)")
    link = PrivateSuperLink(startup_timeout=0.5)
    with pytest.raises(SuperLinkError, match=r"within 0\.5 s"), link:
        pass
    assert of_home(link.home) == []


def test_the_connection_and_environment_of_flower_are_private(commands, monkeypatch):
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    monkeypatch.setenv("FLWR_HOME", "/the/users/own")
    reply = (
        "import json, os; print('Using SuperLink: private')\n"
        "print(json.dumps({'success': True, 'run-id': '7', 'env': dict(os.environ)}))"
    )
    commands(flower_superlink=SERVE, flwr=reply)
    with PrivateSuperLink() as link:
        assert link.start_run(link.home, {"num-supernodes": 2}) == "7"
        environment = link.call("list")["env"]
        assert environment["FLWR_HOME"] == str(link.home)
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert f"127.0.0.1:{link.port}" in (link.home / "config.toml").read_text()
        assert of_home(link.home)
    assert of_home(link.home) == []
    assert not link.home.exists()


def test_a_refusal_of_flower_is_an_error_though_it_exits_with_0(commands):
    refusal = "import json; print(json.dumps({'success': False, 'error-message': 'no such app'}))"
    commands(flower_superlink=SERVE, flwr=refusal)
    with PrivateSuperLink() as link, pytest.raises(SuperLinkError, match="`flwr run` failed: no such app"):
        link.start_run(link.home, {})


def test_a_running_run_without_its_process_has_failed(commands):
    listing = (
        "import json\n"
        "print(json.dumps({'success': True, 'runs': [{'status': 'running', 'status-details': 'N/A'}]}))"
    )
    commands(flower_superlink=SERVE, flwr=listing)
    with PrivateSuperLink() as link:
        status = link.status("1")
        assert status.finished
        assert "killed" in status.details


def test_a_signal_cleans_up(commands, tmp_path):
    commands(flower_superlink=SERVE)
    code = (
        "import sys, time\n"
        "from fedllm import flower, superlink\n"
        f"flower.executable = lambda name: {str(tmp_path)!r} + '/' + name\n"
        "with superlink.PrivateSuperLink() as link:\n"
        "    print(link.home, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    home = process.stdout.readline().strip()
    assert os.path.isdir(home)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not os.path.exists(home)


def test_clean_up_finds_helpers_that_have_lost_their_parent(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    starter = (
        "import subprocess, sys\n"
        "sleeper = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(sleeper, stdout=subprocess.DEVNULL, start_new_session=True).pid)"
    )
    result = subprocess.run(
        [sys.executable, "-c", starter],
        env={**os.environ, "FLWR_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    orphan = psutil.Process(int(result.stdout))
    assert of_home(home) == [orphan]
    clean_up(home)
    assert not home.exists()
    assert not alive(orphan)
