"""`python -m svam.serving`: a trained policy as a websocket server."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import typer

from svam.console import one_line_errors
from svam.serving.protocol import ServingError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def serve(
    model: Annotated[Path, typer.Argument(help="The S-VAM folder that train_policy wrote, such as data/svam.")],
    host: Annotated[str, typer.Option(help="Address to listen on. Any but this computer's own needs --key-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one, which is printed.")] = 8000,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the key that clients must send.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of every batch: how many clients are answered at once.")] = 1,
    max_clients: Annotated[int, typer.Option(min=1, help="Most clients connected at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait; one more is refused with a sentence.")] = 16,
    max_message_mb: Annotated[float, typer.Option(min=0.001, help="MiB; a larger message ends its connection.")] = 8.0,
    gather_ms: Annotated[float, typer.Option(min=0.0, help="How long a batch waits for clients to fill it.")] = 5.0,
    ping_seconds: Annotated[float, typer.Option(min=0.1, help="A client that is silent for twice as long is dropped.")] = 20.0,
    acting_as: Annotated[str | None, typer.Option(help="Of a policy of several sets: whose camera and actions it has.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="What computes.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="On a GPU: compile first, for a minute or two; needs a C compiler.")
    ] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a CPU; without it: all cores.")] = None,
) -> None:
    """Serve the policy MODEL on openpi's websocket protocol until SIGTERM or Ctrl-C."""
    from svam.device import prepare_torch
    from svam.files import sha256
    from svam.models.control import for_control
    from svam.models.manifest import MANIFEST
    from svam.models.svam import SVAM
    from svam.serving.inference import Inference
    from svam.serving.server import PolicyServer, Settings

    settings = Settings(
        host, port, _key(key_env), max_clients, queue, int(max_message_mb * 2**20), gather_ms / 1000.0, ping_seconds
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    def ready() -> Inference:
        chosen = prepare_torch(device, threads or os.cpu_count() or 1, seed=0)
        svam = SVAM.load(model) if acting_as is None else SVAM.load(model).acting_as(acting_as)
        inference = Inference(for_control(svam, chosen, batch, compiled), batch)
        inference.warm_up()
        if inference.batch != batch:  # what a GPU has ready is for the whole batch
            for_control(svam, chosen, inference.batch, compiled)
        return inference

    async def run(server: PolicyServer) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await server.run(stop, lambda port: typer.echo(f"serving {model} on ws://{host}:{port}"))

    # Torch is used in one thread only, from the beginning. Each that uses it keeps a team of OpenMP's threads, and where teams
    # have more threads than there are cores, OpenMP's sleep wherever they wait, which slows each of thousands of operations.
    with ThreadPoolExecutor(1, "policy") as thread:
        inference = thread.submit(ready).result()
        asyncio.run(run(PolicyServer(inference, thread, sha256(model / MANIFEST), settings)))


def _key(variable: str | None) -> str | None:
    """The key that an environment variable holds; on the command line every user of the computer could read it."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key.isascii() or not key.strip() or len(key) < 8:
        raise ServingError(f"--key-env {variable}: that environment variable holds no key of at least 8 ASCII characters")
    return key


if __name__ == "__main__":
    app(prog_name="python -m svam.serving")
