"""Split training against whole training: exactness, memory, bytes on the wire, speed, and the channel's cost.

One client and the split server, each in a process of its own, with a real gRPC channel on loopback between them. The
model is cut after a quarter, half and three quarters of its blocks.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from statistics import median
from typing import Any

import grpc
import torch
from fedllm.strategies.hsplitlora.server_part import loss_of
from harness import arguments, console, report
from torch import Tensor

from fedllm import registry
from fedllm.config import RunConfig
from fedllm.models import ModelBundle, load_bundle
from fedllm.split.codec import ACTIVATION_CODECS, num_bytes
from fedllm.split.endpoint import OPTIONS
from fedllm.split.frames import CHUNK_BYTES, Packet
from fedllm.split.model import SplitModel
from fedllm.split.server import SplitServer
from fedllm.split.session import Session, Ticket
from fedllm.split.stream import SplitStream
from fedllm.split.trainer import GRADIENT, STEP, SplitTrainer
from fedllm.tasks import get_task

ECHO_BYTES = 8 << 20
BATCH, LENGTH = 4, 64
PATIENCE = 600.0
"""Seconds that a process may take for anything, loading the model included."""


def configuration(model: str, blocks: int, seed: int) -> RunConfig:
    """A causal-lm run, of which only the model is used."""
    return registry.config_from_flat(
        {"model.name": model, "model.blocks": blocks, "task": "causal-lm", "lora.rank": 8, "seed": seed}
    )


def example(vocabulary: int, seed: int) -> dict[str, Tensor]:
    """One batch of random tokens."""
    ids = torch.randint(5, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# ------------------------------------------------------------------- processes


def fresh_processes() -> ForkServerContext:
    """Processes without anything of this one; the libraries are imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "peft", "transformers.models.llama.modeling_llama"])
    return context


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a fresh process, so that its peak memory is its own; returns what it returns."""
    context = fresh_processes()
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, args))
    process.start()
    there.close()
    try:
        kind, value = here.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} died with exit code {process.exitcode}") from None
    finally:
        process.join()
    if kind == "error":
        raise RuntimeError(f"{function.__name__}: {value}")
    return value


def _answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        connection.send(("value", function(*args)))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


def split_server(connection: Connection, model: str, seed: int, cut: int, codec: str) -> None:
    """Serve one client until it has finished; tells its port first, the gradients of its first step at the end."""
    torch.set_num_threads(1)
    config = configuration(model, 0, seed)
    bundle = load_bundle(config)
    set_adapter(bundle)
    split = SplitModel(bundle.model.get_base_model())
    session = Session([Ticket("0", "token", cut)], join_timeout=PATIENCE, step_timeout=PATIENCE)
    parameters = [p for name, p in bundle.trainable().items() if (split.block_of(name) or 0) >= cut]
    gradients: list[dict[str, Tensor]] = []

    def keep() -> None:
        if not gradients:
            gradients.append({n: p.grad.clone() for n, p in bundle.trainable().items() if p.grad is not None})

    trainer = SplitTrainer(
        split,
        session,
        torch.optim.SGD(parameters, lr=0.0),
        loss_of(get_task("causal-lm")),
        max_grad_norm=0.0,
        after_backward=keep,
    )
    server = SplitServer("127.0.0.1:0", codec=codec)  # type: ignore[arg-type]
    server.open(session)
    connection.send(server.port)
    trainer.run()
    server.close()
    connection.send({name: value.numpy() for name, value in gradients[0].items()})


@dataclass(frozen=True)
class ClientFigures:
    """What one client measured."""

    peak_bytes: int
    parameters: int
    loss: float
    seconds: float
    bytes_up: int
    bytes_down: int
    gradients: dict[str, Any]


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def loaded(model: str, blocks: int, seed: int) -> tuple[ModelBundle, int]:
    """A model, and the memory that the process had taken before it."""
    before = peak_memory()
    return load_bundle(configuration(model, blocks, seed)), before


def split_client(port: int, model: str, seed: int, cut: int, codec: str, steps: int) -> ClientFigures:
    """Train the first blocks for some steps; the first one is not timed."""
    bundle, before = loaded(model, cut, seed)
    set_adapter(bundle)
    split = SplitModel(bundle.model.get_base_model())
    batch = example(len(bundle.tokenizer), seed)
    seconds, gradients, loss = [], {}, 0.0
    with SplitStream(f"127.0.0.1:{port}", "token", codec=codec) as stream:  # type: ignore[arg-type]
        started_bytes = stream.bytes_up, stream.bytes_down
        for step in range(1, steps + 1):
            started = time.perf_counter()
            sent = split.front(batch["input_ids"], batch["attention_mask"], cut)
            mask = batch["attention_mask"] > 0
            stream.send(Packet(STEP, step, {"hidden": sent, "mask": mask, "labels": batch["labels"]}))
            answer = stream.receive(GRADIENT)
            sent.backward(answer.tensors["hidden"])  # type: ignore[no-untyped-call]
            seconds.append(time.perf_counter() - started)
            if step == 1:
                gradients = gradients_of(bundle)
                loss = answer.numbers["loss"]
            bundle.model.zero_grad(set_to_none=True)
        up, down = stream.bytes_up - started_bytes[0], stream.bytes_down - started_bytes[1]
        stream.finish()
    return ClientFigures(
        peak_memory() - before,
        sum(p.numel() for p in bundle.model.parameters()),
        loss,
        median(seconds[1:]),
        up // steps,
        down // steps,
        gradients,
    )


def whole_client(model: str, seed: int, steps: int) -> ClientFigures:
    """The same steps with the whole model in one process."""
    bundle, before = loaded(model, 0, seed)
    set_adapter(bundle)
    task, batch = get_task("causal-lm"), example(len(bundle.tokenizer), seed)
    seconds, gradients, first = [], {}, 0.0
    for step in range(1, steps + 1):
        started = time.perf_counter()
        loss = task.loss(bundle.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - started)
        if step == 1:
            gradients, first = gradients_of(bundle), loss.item()
        bundle.model.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in bundle.model.parameters())
    return ClientFigures(peak_memory() - before, parameters, first, median(seconds[1:]), 0, 0, gradients)


def set_adapter(bundle: ModelBundle) -> None:
    """Factors that depend on their name only, so that parts of a model agree with the whole."""
    with torch.no_grad():
        for name, parameter in bundle.trainable().items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def gradients_of(bundle: ModelBundle) -> dict[str, Any]:
    """Gradients as arrays, which travel between processes."""
    return {name: p.grad.numpy().copy() for name, p in bundle.trainable().items() if p.grad is not None}


def beside_server(
    model: str, seed: int, cut: int, codec: str, client: Callable[[int], Any]
) -> tuple[Any, dict[str, Any]]:
    """What ``client``, given the port of a split server in a process of its own, finds; and the server's gradients."""
    context = fresh_processes()
    here, there = context.Pipe()
    server = context.Process(target=split_server, args=(there, model, seed, cut, codec))
    server.start()
    there.close()  # so that the end of the server's process ends the wait for what it says
    try:
        return client(here.recv()), here.recv()
    finally:
        server.join(30)
        if server.is_alive():
            server.kill()


def split_pair(
    model: str, seed: int, cut: int, codec: str, steps: int
) -> tuple[ClientFigures, dict[str, Any]]:
    """A client and a server in two processes; also the gradients on the server."""
    return beside_server(
        model, seed, cut, codec, lambda port: in_process(split_client, port, model, seed, cut, codec, steps)
    )


# --------------------------------------------------------------------- channel


def bare_server(connection: Connection) -> None:
    """An echo of frames by grpcio alone."""

    def echo(frames: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from frames

    server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bare", {"Echo": grpc.stream_stream_rpc_method_handler(echo)})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(port)
    connection.recv()
    server.stop(1).wait()


def our_server(connection: Connection) -> None:
    """A split server whose trainer sends back what it got."""
    session = Session([Ticket("0", "token", 1)], join_timeout=PATIENCE, step_timeout=PATIENCE)
    server = SplitServer("127.0.0.1:0")
    server.open(session)

    def answer() -> None:
        while arrived := session.gather(STEP):
            for seat, packet in arrived:
                session.answer(seat, Packet(GRADIENT, packet.step, packet.tensors))

    thread = threading.Thread(target=answer)
    thread.start()
    connection.send(server.port)
    connection.recv()
    session.close("done")
    thread.join()
    server.close()


def bare_seconds(port: int, rounds: int) -> list[float]:
    """Seconds for 8 MiB there and back, bytes to bytes, in chunks as large as ours."""
    frames = [bytes(CHUNK_BYTES)] * (ECHO_BYTES // CHUNK_BYTES)
    seconds = []
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        method: Any = channel.stream_stream("/bare/Echo")
        for _ in range(rounds):
            started = time.perf_counter()
            received = sum(len(frame) for frame in method(iter(frames)))
            seconds.append(time.perf_counter() - started)
            assert received == ECHO_BYTES
    return seconds


def our_seconds(port: int, rounds: int) -> list[float]:
    """Seconds for the same bytes as fp32 activations, tensor to tensor, with all checks."""
    hidden = torch.randn(8, 512, 512)
    assert hidden.nbytes == ECHO_BYTES
    seconds = []
    with SplitStream(f"127.0.0.1:{port}", "token") as stream:
        for step in range(rounds):
            started = time.perf_counter()
            stream.send(Packet(STEP, step, {"hidden": hidden}))
            found = stream.receive(GRADIENT)
            seconds.append(time.perf_counter() - started)
            assert torch.equal(found.tensors["hidden"], hidden)
        stream.finish()
    return seconds


def channel(rounds: int) -> tuple[float, float]:
    """MiB a second, there and back, of grpcio alone and of ours; interleaved, best of each."""
    context = fresh_processes()
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for name, serve, measure in (("bare", bare_server, bare_seconds), ("ours", our_server, our_seconds)) * 2:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there,))
        process.start()
        there.close()
        try:
            seconds = in_process(measure, here.recv(), rounds)
            here.send("done")
        finally:
            process.join(30)
        rates[name] += [2 * ECHO_BYTES / 2**20 / value for value in seconds[2:]]
    return median(rates["bare"]), median(rates["ours"])


# ------------------------------------------------------------------------ main


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest absolute difference of gradients over the names of the first."""
    return max(float(abs(value - second[name]).max()) for name, value in first.items())


def main() -> None:
    args = arguments(__doc__ or "", model="packaged:smollm2", steps=6)
    steps = 3 if args.quick else args.steps
    console.print("channel …")
    bare, ours = channel(12 if args.quick else 40)
    console.print("whole model …")
    whole = in_process(whole_client, args.model, args.seed, steps)
    blocks = in_process(count_blocks, args.model, args.seed)
    cuts = sorted({max(1, blocks * quarter // 4) for quarter in (1, 2, 3)} & set(range(1, blocks)))
    split, errors = {}, []
    for cut in cuts:
        console.print(f"cut after block {cut} of {blocks} …")
        split[cut], on_server = split_pair(args.model, args.seed, cut, "fp32", steps)
        errors += [
            largest_difference(split[cut].gradients, whole.gradients),
            largest_difference(on_server, whole.gradients),
            abs(split[cut].loss - whole.loss),
        ]
    width = in_process(hidden_width, args.model, args.seed)
    tokens = BATCH * LENGTH
    up, predicted = {}, {}
    for codec in ACTIVATION_CODECS:
        console.print(f"bytes with {codec} …")
        figures = (
            split[cuts[0]] if codec == "fp32" else split_pair(args.model, args.seed, cuts[0], codec, 2)[0]
        )
        up[codec] = figures.bytes_up / tokens
        # The mask is a byte for each token, a label is four.
        predicted[codec] = (num_bytes((BATCH, LENGTH, width), codec) + 5 * tokens) / tokens
    bytes_error = max(abs(up[codec] / predicted[codec] - 1) for codec in up)
    figures_out = {
        "gradient_max_abs_error": max(errors),
        "gradient_max_abs": max(float(abs(value).max()) for value in whole.gradients.values()),
        "bytes_error": bytes_error,
        "channel_over_bare_grpc": ours / bare,
        "channel_mib_per_second": ours,
        "bare_grpc_mib_per_second": bare,
        "client_peak_over_full_model": split[cuts[0]].peak_bytes / whole.peak_bytes,
        "tokens_per_second": tokens / split[cuts[0]].seconds,
        "whole_tokens_per_second": tokens / whole.seconds,
        "whole_peak_bytes": whole.peak_bytes,
        "whole_parameters": whole.parameters,
        **{f"bytes_per_token_{codec}": value for codec, value in up.items()},
        **{f"predicted_bytes_per_token_{codec}": value for codec, value in predicted.items()},
        **{f"cut_{cut}_peak_bytes": f.peak_bytes for cut, f in split.items()},
        **{f"cut_{cut}_parameters": f.parameters for cut, f in split.items()},
        **{f"cut_{cut}_tokens_per_second": tokens / f.seconds for cut, f in split.items()},
    }
    rows: list[tuple[object, ...]] = [("", "parameters", "figure", "ratio to the reference", "tokens/s")]
    rows += [
        (
            f"client with blocks 1…{cut}: peak MB, to the whole model's",
            f.parameters,
            f.peak_bytes / 1e6,
            f.peak_bytes / whole.peak_bytes,
            tokens / f.seconds,
        )
        for cut, f in split.items()
    ]
    rows += [("whole model: peak MB", whole.parameters, whole.peak_bytes / 1e6, 1.0, tokens / whole.seconds)]
    rows += [
        (f"bytes per token up, {codec}, to the predicted", "", up[codec], up[codec] / predicted[codec], "")
        for codec in up
    ]
    rows += [
        ("largest gradient error", "", max(errors), "", ""),
        ("channel MiB/s, to bare grpcio", "", ours, ours / bare, ""),
    ]
    report(args, figures_out, rows, f"Split training of {args.model}, batch {BATCH}×{LENGTH}")


def count_blocks(model: str, seed: int) -> int:
    """Blocks of a model."""
    return SplitModel(load_bundle(configuration(model, 0, seed)).model.get_base_model()).num_blocks


def hidden_width(model: str, seed: int) -> int:
    """Width of a model's hidden states."""
    return SplitModel(load_bundle(configuration(model, 1, seed)).model.get_base_model()).width


if __name__ == "__main__":
    main()
