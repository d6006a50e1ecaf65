"""The server's side of a run: from the configuration to the run folder with adapter, metrics and report."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm import __version__, logs, metrics, registry
from fedllm.checkpoint import CheckpointStore
from fedllm.config import RunConfig, Scalar
from fedllm.data import label_names, test_examples
from fedllm.errors import ConfigError, FedLLMError
from fedllm.events import EventBus, EventSink, JsonlSink, LogSink
from fedllm.exchange import LoopOptions
from fedllm.generation import check_generation, generation_metrics
from fedllm.hostile import HostileClients, LoneAttack
from fedllm.model_version import model_version
from fedllm.models import ModelBundle, load_bundle
from fedllm.outcomes import HEADLINE_METRICS
from fedllm.prometheus_sink import PrometheusSink
from fedllm.records import (
    CLIENT,
    CLIENT_PARAMETERS,
    NUM_EXAMPLES,
    SEED,
    UPLOAD_CODEC,
    decode,
    encode,
    wire_bytes,
)
from fedllm.report import write_report
from fedllm.rounds import run_rounds
from fedllm.sinks import PlanSink
from fedllm.strategy import BaseStrategy
from fedllm.tasks import get_task
from fedllm.wrapper import StrategyWrapper

logger = logging.getLogger(__name__)


def run(grid: Grid, flat: Mapping[str, Scalar]) -> Result:
    """Run a federated fine-tuning from Flower's flat configuration.

    Leaves ``<run.root>/<run.name>/`` with ``config.json``, ``events.jsonl``, ``checkpoints/``, ``adapter/``, ``best/``,
    ``metrics.csv``, ``curves.png`` and ``report.html``; and with ``plan.json`` where the strategy plans.

    Raises:
        FedLLMError: bad configuration or data before work starts; later, a run that cannot go on.
    """
    # Flower sets up a handler for its own logger only: a plain `flwr run --stream` would show no progress.
    logs.set_up()
    config = registry.config_from_flat(flat)
    registry.check(config)
    check_generation(config)
    folder = run_folder(config)
    _claim(folder, config)
    logger.info("run folder: %s", folder)
    with logs.bound(run=folder.name), EventBus(_sinks(config, folder)) as events:
        started = time.monotonic()
        try:
            result = _Run(grid, config, folder, events).execute()
        except BaseException as error:
            events.emit("run-failed", reason=f"{type(error).__name__}: {error}")
            _report_what_there_is(folder)
            raise
        metrics = _last_metrics(result)
        events.emit("run-finished", rounds=config.rounds, seconds=time.monotonic() - started, metrics=metrics)
    write_report([folder], folder / "report.html")
    return result


def _report_what_there_is(folder: Path) -> None:
    """Report on a failed run; if that fails too, the first failure is the one to be told."""
    try:
        write_report([folder], folder / "report.html")
    except Exception:
        logger.exception("no report of the failed run could be written")


def run_folder(config: RunConfig) -> Path:
    """Absolute folder of a run; a run without a name gets the date and time."""
    name = config.run.name or time.strftime("run-%Y%m%d-%H%M%S")
    return (Path(config.run.root).expanduser() / name).resolve()


def _claim(folder: Path, config: RunConfig) -> None:
    """Create the run folder, or check that an existing one is to be resumed and belongs to this configuration."""
    if config.run.resume and not config.run.name:
        raise ConfigError("run.resume is true, but run.name is empty: name the run to go on with")
    if not config.run.resume and (folder / "events.jsonl").exists():
        raise ConfigError(
            f"run.name: {folder} already holds a run; choose another name, or set run.resume=true to go on with it"
        )
    if config.run.resume:
        _checkpoints(folder, config).latest()  # refuses another configuration before config.json is replaced
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_flat(), indent=1) + "\n", encoding="utf-8")


def _checkpoints(folder: Path, config: RunConfig) -> CheckpointStore:
    fingerprint = config.fingerprint(without=registry.sink_tables(config))
    return CheckpointStore(folder / "checkpoints", fingerprint, config.run.keep_checkpoints)


def _sinks(config: RunConfig, folder: Path) -> list[EventSink]:
    sinks: list[EventSink] = [JsonlSink(folder / "events.jsonl"), LogSink(), PlanSink(folder)]
    for ref in config.run.sinks:
        parameters = config.plugins.get(registry.parameter_table(ref), {})
        sinks.append(registry.build("sinks", ref, parameters, folder))
    return sinks + _operators_sinks(config, folder)


def _operators_sinks(config: RunConfig, folder: Path) -> list[EventSink]:
    """Metrics that the operator of this machine wants of every run; a run does not fail for want of them."""
    if (port := metrics.wanted_port()) is None or "prometheus" in config.run.sinks:
        return []
    try:
        return [PrometheusSink(folder, port=port)]
    except FedLLMError as error:
        logger.warning("%s asks for metrics, but the run goes on without: %s", metrics.PORT_VARIABLE, error)
        return []


def build_strategy(config: RunConfig) -> Strategy:
    """The strategy of a run, with its defence around it and its hostile clients around both.

    Raises:
        ConfigError: one of them is not what it should be.
        RegistryError: one of them cannot be found.
    """
    strategy = registry.build(
        "strategies",
        config.strategy,
        config.plugins.get(registry.parameter_table(config.strategy), {}),
        fraction_train=config.server.fraction_train,
        fraction_evaluate=config.server.fraction_evaluate,
        min_available_nodes=config.server.min_nodes,
        seed=config.seed,
        download_codec=config.wire.download_codec,
        aggregation=config.lora.aggregation,
        client_ranks=config.lora.client_ranks,
        accumulator_rank=config.lora.accumulator_rank,
    )
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"strategy: {config.strategy!r} is a {type(strategy).__name__}, expected a "
            "flwr.serverapp.strategy.Strategy"
        )
    return _attacked(config, _defended(config, strategy))


def _defended(config: RunConfig, strategy: Strategy) -> Strategy:
    if config.defence == "none":
        return strategy
    parameters = config.plugins.get(registry.parameter_table(config.defence), {})
    guarded = registry.build("defences", config.defence, parameters, strategy, seed=config.seed)
    if not isinstance(guarded, StrategyWrapper):
        raise ConfigError(
            f"defence: {config.defence!r} is a {type(guarded).__name__}, expected a StrategyWrapper"
        )
    return guarded


def _attacked(config: RunConfig, strategy: Strategy) -> Strategy:
    """The strategy as hostile clients leave it; without an attack it is the strategy itself."""
    if config.attack == "none":
        return strategy
    parameters = config.plugins.get(registry.parameter_table(config.attack), {})
    who = {
        "fraction": config.attack_fraction,
        "from_round": config.attack_from_round,
        "seed": config.seed,
    }
    if issubclass(registry.load("attacks", config.attack), HostileClients):
        colluders: Strategy = registry.build("attacks", config.attack, parameters, strategy, **who)
        return colluders
    return LoneAttack(strategy, attack=config.attack, parameters=json.dumps(parameters), **who)


class _Run:
    """The pieces of one run."""

    def __init__(self, grid: Grid, config: RunConfig, folder: Path, events: EventBus) -> None:
        self.grid = grid
        self.config = config
        self.folder = folder
        self.events = events
        self.task = get_task(config.task)
        labels = label_names(config) if config.task == "sequence-classification" else ()
        self.bundle: ModelBundle = load_bundle(config, labels)
        self.test = test_examples(config, self.bundle.tokenizer) if config.server.evaluate_every else None

    def execute(self) -> Result:
        strategy = build_strategy(self.config)
        ours = strategy if isinstance(strategy, BaseStrategy | StrategyWrapper) else None
        try:
            if ours is not None:
                ours.prepare(self.config, self.bundle, self.events)
            return self._train(strategy)
        finally:
            if ours is not None:
                ours.close()

    def _train(self, strategy: Strategy) -> Result:
        config = self.config
        initial = encode(self.bundle.initial_state)
        self.events.emit(
            "run-started",
            run=self.folder.name,
            strategy=config.strategy,
            client=config.client,
            task=config.task,
            rounds=config.rounds,
            first_round=self._first_round(),
            config=config.to_flat(),
            version=__version__,
            parameters=sum(parameter.numel() for parameter in self.bundle.trainable().values()),
            adapter_bytes=wire_bytes(initial),
        )
        result = run_rounds(
            strategy,
            self.grid,
            initial,
            config.rounds,
            train_config=self._train_config(),
            evaluate_fn=self._evaluate if self.test is not None else None,
            options=self._options(),
            events=self.events,
            checkpoints=_checkpoints(self.folder, config),
            resume=config.run.resume,
            after_round=self._after_round,
        )
        self.bundle.save_adapter(self.folder / "adapter", decode(result.arrays))
        return result

    def _first_round(self) -> int:
        found = _checkpoints(self.folder, self.config).latest() if self.config.run.resume else None
        return 1 if found is None else found[0].round + 1

    def _train_config(self) -> ConfigRecord:
        config = self.config
        parameters = config.plugins.get(registry.parameter_table(config.client), {})
        return ConfigRecord(
            {
                CLIENT: config.client,
                CLIENT_PARAMETERS: json.dumps(parameters),
                SEED: config.seed,
                UPLOAD_CODEC: config.wire.upload_codec,
            }
        )

    def _options(self) -> LoopOptions:
        server = self.config.server
        return LoopOptions(
            min_nodes=server.min_nodes,
            node_timeout=server.node_timeout,
            quorum=server.quorum,
            deadline=server.deadline,
            round_timeout=server.round_timeout,
            max_failed_rounds=server.max_failed_rounds,
            spool_bytes=int(server.spool_megabytes * 2**20),
            poll_interval=server.poll_interval,
            model_version=model_version(self.config.model.name, self.config.model.revision),
        )

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Metrics of the global adapter on the server's test rows, when they are due."""
        last = server_round == self.config.rounds
        if server_round % self.config.server.evaluate_every and not last:
            return None
        assert self.test is not None
        self.bundle.load_adapter_state(decode(arrays), any_ranks=True)
        metrics = self.task.evaluate(
            self.bundle.model,
            self.test,
            self.config.server.evaluate_batch_size,
            self.bundle.tokenizer.pad_token_id,
            self.bundle.device,
        )
        if self.config.evaluation.generate:
            metrics |= generation_metrics(
                self.bundle.model,
                self.bundle.tokenizer,
                self.test,
                self.config,
                self.bundle.tokenizer.pad_token_id,
                self.bundle.device,
            )
        return MetricRecord({name: value for name, value in metrics.items() if name != NUM_EXAMPLES})

    def _after_round(self, server_round: int, arrays: ArrayRecord, result: Result) -> None:
        """Save the adapter of this round; in ``best/`` too if no evaluation so far was better."""
        state = decode(arrays)
        self.bundle.save_adapter(self.folder / "adapter", state)
        scores = self._scores(result)
        if server_round in scores and scores[server_round] >= max(scores.values()):
            self.bundle.save_adapter(self.folder / "best", state)

    def _scores(self, result: Result) -> dict[int, float]:
        """By round, how good the adapter was: one metric of one place for the whole run, larger is better."""
        history = (
            result.evaluate_metrics_clientapp if self.test is None else result.evaluate_metrics_serverapp
        )
        best = self.config.evaluation.best
        candidates = list(HEADLINE_METRICS) if best == "auto" else [best]
        names = [name for name in candidates if any(name in metrics for metrics in history.values())]
        if not names:
            return {}
        sign = 1.0 if HEADLINE_METRICS[names[0]] else -1.0
        values = {r: sign * float(m[names[0]]) for r, m in history.items() if r > 0 and names[0] in m}  # type: ignore[arg-type]
        return {r: value for r, value in values.items() if math.isfinite(value)}


def _last_metrics(result: Result) -> dict[str, Any]:
    """The newest evaluation: the server's where there is one, else the clients'."""
    history = result.evaluate_metrics_serverapp or result.evaluate_metrics_clientapp
    return dict(history[max(history)]) if history else {}
