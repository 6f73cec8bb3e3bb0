"""The `cortex` program. Results on stdout, all else on stderr; 2 for a mistake in the call or a file, 1 for a failure.

What a command needs is imported in it: `cortex --help` waits for nothing but the command line itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from helexa.core.catalogue import Catalogue
    from helexa.core.config import CortexSettings
    from helexa.cortex.reload import Files, Read

app = typer.Typer(
    name="cortex",
    help="The gateway of a fleet of neurons: one API for every model on every node.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _complete_model(incomplete: str) -> list[str]:
    from helexa.cortex.operate import model_names

    return [name for name in model_names(os.environ.get("CORTEX_URL")) if name.startswith(incomplete)]


GatewayOption = Annotated[
    str | None, typer.Option("--gateway", "-g", envvar="CORTEX_URL", help="The gateway; default 127.0.0.1:31313.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="CORTEX_CONFIG", help="cortex.toml; none: the defaults.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelArgument = Annotated[
    str, typer.Argument(help="An id or alias that `cortex models` lists.", autocompletion=_complete_model)
]

NodeArgument = Annotated[str, typer.Argument(help="The name of a node, as `cortex status` shows it.")]


def main() -> NoReturn:
    from helexa.cortex.client import CommandFailed

    try:
        app()
    except CommandFailed as failed:
        fail(str(failed), failed.code)
    sys.exit(0)


def fail(message: str, code: int) -> NoReturn:
    print(f"cortex: {message}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from helexa.core import version

        known = version.describe()
        commit = f" ({known['commit'][:12]})" if known["commit"] else ""
        print(f"cortex {known['version']}{commit}")
        raise typer.Exit


@app.callback()
def cortex(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """The gateway of a fleet of neurons: one API for every model on every node."""


@app.command()
def serve(
    config: ConfigOption = None,
    listen: Annotated[str | None, typer.Option(help="host:port, in place of the configured one.")] = None,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C."""
    import msgspec
    import uvloop

    from helexa.core import logs

    logs.configure()
    if listen is not None:
        _checked_listen(listen)
    from helexa.cortex.app import CannotListen, Cortex
    from helexa.cortex.reload import Files
    from helexa.cortex.response_store import CannotKeep
    from helexa.cortex.trace_recorder import CannotRecord

    def override(settings: CortexSettings) -> CortexSettings:
        if listen is None:
            return settings
        return msgspec.structs.replace(settings, gateway=msgspec.structs.replace(settings.gateway, listen=listen))

    files = Files(config, os.environ, override=override)
    try:
        uvloop.run(Cortex(_read(files), files).serve())
    except (CannotListen, CannotKeep, CannotRecord) as err:
        fail(str(err), 2)


@app.command()
def up(
    model: Annotated[
        str | None,
        typer.Argument(help="A GGUF file, a folder, or owner/repo:QUANT of the Hub; none: a small model to try."),
    ] = None,
    listen: Annotated[str, typer.Option(help="Where the gateway listens, host:port.")] = "127.0.0.1:31313",
    neuron_port: Annotated[int, typer.Option(help="Port of the node, on loopback; 0: any free one.")] = 13131,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens one request may have.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of both programs.")] = False,
) -> None:
    """Serve a model on this machine, with nothing to configure. A node and a gateway, until Ctrl-C."""
    from helexa.cortex.up import Wanted, run

    sys.exit(run(Wanted(model, _checked_listen(listen), neuron_port, context, verbose)))


@app.command()
def status(
    gateway: GatewayOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second, until Ctrl-C.")] = False,
) -> None:
    """Show the fleet: nodes, devices, models, requests in flight."""
    from helexa.cortex import status as command

    _run(command.watch(gateway, as_json=as_json) if watch else command.show(gateway, as_json=as_json))


@app.command()
def models(gateway: GatewayOption = None, as_json: JsonOption = False) -> None:
    """List what can be asked."""
    from helexa.cortex import status as command

    _run(command.show_models(gateway, as_json=as_json))


@app.command()
def chat(
    model: ModelArgument,
    gateway: GatewayOption = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of one answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Default: the model's own.")] = None,
) -> None:
    """Talk to a model. /exit or Ctrl-D ends it, Ctrl-C ends an answer; a text on stdin is asked once."""
    from helexa.cortex.chat import Chat, converse

    sys.exit(converse(Chat(gateway, model, system=system, max_tokens=max_tokens, temperature=temperature)))


@app.command()
def load(
    model: ModelArgument,
    node: Annotated[str | None, typer.Option(help="The node to load it on; none: the gateway chooses.")] = None,
    gateway: GatewayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load a model, and wait until it is there."""
    from helexa.cortex import operate

    _run(operate.load(gateway, model, node, as_json=as_json))


@app.command()
def unload(
    model: ModelArgument,
    node: Annotated[str | None, typer.Option(help="Only on this node; none: wherever it is loaded.")] = None,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that running requests get to finish.")] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Cut the requests that it works on.")] = False,
    gateway: GatewayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Unload a model."""
    from helexa.cortex import operate

    _run(operate.unload(gateway, model, node, drain_s=drain, force=force, as_json=as_json))


@app.command()
def drain(
    node: NodeArgument,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Until nothing runs there any more.")] = False,
    gateway: GatewayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a node no new requests and no loads; what runs there finishes."""
    from helexa.cortex import operate

    _run(operate.drain(gateway, node, wait=wait, as_json=as_json))


@app.command()
def resume(node: NodeArgument, gateway: GatewayOption = None, as_json: JsonOption = False) -> None:
    """Give a drained node requests and loads again."""
    from helexa.cortex import operate

    _run(operate.resume(gateway, node, as_json=as_json))


@app.command()
def plan(model: ModelArgument, gateway: GatewayOption = None, as_json: JsonOption = False) -> None:
    """Show what would happen now to a request for a model, and why. Nothing is done."""
    from helexa.cortex import reports

    _run(reports.plan(gateway, model, as_json=as_json))


@app.command()
def decisions(
    model: Annotated[
        str | None, typer.Argument(help="Only what concerns this model.", autocompletion=_complete_model)
    ] = None,
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="The most lines.")] = 200,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also what else was weighed: each node's price, or its reason.")
    ] = False,
    gateway: GatewayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the gateway decided lately: loads, evictions, refusals, and why."""
    from helexa.cortex import reports

    _run(reports.decisions(gateway, model, last=last, everything=everything, as_json=as_json))


@app.command()
def check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check the files, and whether each node can be reached."""
    from helexa.cortex import check as command

    settings, catalogue, catalogue_path = _settings(config)
    ok = _run(command.check(settings, catalogue, config, catalogue_path, as_json=as_json))
    sys.exit(0 if ok else 1)


@app.command()
def simulate(
    fleet: Annotated[
        Path | None,
        typer.Option("--fleet", envvar="CORTEX_CONFIG", help="cortex.toml; its nodes are asked what they have."),
    ] = None,
    models: Annotated[Path | None, typer.Option(help="models.toml; none: the one that cortex.toml names.")] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="Describe a node, or add one: beast=24GB+24GB@2 (GB/s of load).")
    ] = None,
    add_node: Annotated[
        list[str] | None, typer.Option(help="A further row with this node as well: 24GB, or as in --node.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="JSON lines: t, model, prompt_tokens, output_tokens.")] = None,
    rate: Annotated[float, typer.Option(min=1e-4, max=1e4, help="Without a trace: requests a second.")] = 0.2,
    hours: Annotated[float, typer.Option(min=0.01, max=1e4, help="Without a trace: for how long.")] = 24.0,
    zipf: Annotated[float, typer.Option(min=0.0, max=5.0, help="How uneven models are asked for; 0: evenly.")] = 1.0,
    bursts: Annotated[bool, typer.Option("--bursts", help="Conversations with a daily cycle.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Other policies beside the configured one, and a bound.")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw waiting and memory into this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a trace, or a generated load, over a fleet that is described, with the gateway's own rules."""
    from helexa.cortex.client import CommandFailed
    from helexa.cortex.simulate.command import Load
    from helexa.cortex.simulate.command import simulate as run

    settings, catalogue, _ = _settings(fleet, models)
    load = Load(trace, rate, hours, zipf, bursts, seed)
    try:
        run(
            settings,
            catalogue,
            load,
            described=node or (),
            added=add_node or (),
            compare=compare,
            picture=svg,
            as_json=as_json,
        )
    except OSError as err:
        raise CommandFailed(str(err), 2) from err


def _settings(path: Path | None, models: Path | None = None) -> tuple[CortexSettings, Catalogue, Path | None]:
    from helexa.cortex.reload import Files

    read = _read(Files(path, os.environ, models=models))
    return read.settings, read.catalogue, read.catalogue_path


def _read(files: Files) -> Read:
    from helexa.core.config import ConfigError

    try:
        return files.read(lambda text: print(f"cortex: {text}", file=sys.stderr))
    except ConfigError as err:
        fail(str(err), 2)


def _checked_listen(listen: str) -> str:
    from helexa.core.config import split_listen

    try:
        split_listen(listen)
    except ValueError as err:
        fail(f'--listen "{listen}" {err}', 2)
    return listen


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    import asyncio

    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        sys.exit(130)
