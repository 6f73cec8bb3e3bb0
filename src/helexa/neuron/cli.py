"""The `neuron` program. Results on stdout, all else on stderr; 2 for a mistake in the call or a file, 1 for a failure.

What a command needs is imported in it: `neuron --help` must not wait for engines, and a host process (`neuron host`,
`neuron --worker`, which only the daemon starts) not for a command line.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from helexa.core.config import NeuronSettings
    from helexa.core.errors import HelexaError
    from helexa.neuron.store import Pulled, Store

app = typer.Typer(
    name="neuron",
    help="Serve the models of this host.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="NEURON_CONFIG", help="neuron.toml; none: the defaults.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> NoReturn:
    match sys.argv[1:2]:
        case ["host"]:
            from helexa.neuron import host

            sys.exit(host.main())
        case ["--worker"]:
            from helexa.neuron.tp import worker

            code = worker.main()
            sys.stderr.flush()
            os._exit(code)  # threads of torch and Gloo may hang at exit, and nothing here needs them
        case _:
            app()
            sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        from helexa.core import version

        known = version.describe()
        commit = f" ({known['commit'][:12]})" if known["commit"] else ""
        print(f"neuron {known['version']}{commit}")
        raise typer.Exit


@app.callback()
def neuron(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Serve the models of this host."""


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, in place of the configured one.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port, in place of the configured one; 0: any free one.")
    ] = None,
) -> None:
    """Run the daemon until SIGTERM or Ctrl-C."""
    import msgspec

    from helexa.core import logs
    from helexa.core.config import ConfigError

    logs.configure()
    settings = _settings(config)
    given: dict[str, Any] = {"host": host, "port": port}
    settings = msgspec.structs.replace(settings, **{k: v for k, v in given.items() if v is not None})
    from helexa.neuron.serve import CannotListen, run

    try:
        run(settings)
    except CannotListen as err:
        fail(_way_out(err.cause, settings), 2)
    except ConfigError as err:  # found only now: a folder that cannot be made
        fail(str(err), 2)


@app.command()
def pull(
    ref: Annotated[str, typer.Argument(help="owner/repo or owner/repo:QUANT.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model from the Hub, and print where it is. What is there already is not fetched again."""
    import asyncio

    from helexa.core.errors import HelexaError

    store = _store(_settings(config), allow_downloads=True)
    try:
        pulled = asyncio.run(_pull(store, ref))
    except HelexaError as err:
        fail_with(err)
    except KeyboardInterrupt:
        fail(f"interrupted; `neuron pull {ref}` goes on where it stopped", 1)
    if pulled.note:
        print(f"neuron: {pulled.note}", file=sys.stderr)
    files = pulled.files
    if as_json:
        paths = [str(path) for path in files.files]
        _print_json({"id": files.model_id, "files": paths, "size_bytes": files.size_bytes, "fetched": pulled.fetched})
    else:
        print(files.files[0])


@app.command()
def models(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the models on this host's disk. Beside each: what the running daemon does with it."""
    settings = _settings(config)
    running = {entry["id"]: entry for entry in _ask_daemon(settings) or []}
    rows = []
    for stored in _store(settings).on_disk():
        entry = running.pop(stored.id, {})
        rows.append(
            {
                "id": stored.id,
                "quant": stored.quant,
                "size_bytes": stored.size_bytes,
                "status": entry.get("status", "unloaded"),
                "files": [str(path) for path in stored.files],
            }
        )
    elsewhere = ("id", "quant", "size_bytes", "status")  # loaded from no folder of ours
    rows.extend({key: entry.get(key) for key in elsewhere} for entry in running.values())
    if as_json:
        _print_json(rows)
    elif not rows:
        print("no models here yet; fetch one with: neuron pull OWNER/REPO:QUANT", file=sys.stderr)
    else:
        _print_table(rows)


@app.command()
def rm(
    ref: Annotated[str, typer.Argument(help="A name that `neuron models` lists.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a model's files from disk, unless it is loaded, and the prompt caches that were saved of it."""
    from helexa.core.errors import HelexaError

    settings = _settings(config)
    store = _store(settings)
    try:
        removed = store.remove(ref, in_use=_files_in_use(settings, store))
    except HelexaError as err:
        fail_with(err)
    _forget_states(settings, removed)
    if as_json:
        _print_json({"removed": [str(path) for path in removed]})
    else:
        for path in removed:
            print(path)


def fail(message: str, code: int) -> NoReturn:
    print(f"neuron: {message}", file=sys.stderr)
    sys.exit(code)


def fail_with(err: HelexaError) -> NoReturn:
    from helexa.core.errors import BadRequest

    fail(err.message, 2 if isinstance(err, BadRequest) else 1)


def _settings(path: Path | None) -> NeuronSettings:
    from helexa.core.config import ConfigError, load_neuron

    try:
        return load_neuron(path, os.environ, lambda text: print(f"neuron: {text}", file=sys.stderr))
    except ConfigError as err:
        fail(str(err), 2)


def _store(settings: NeuronSettings, *, allow_downloads: bool = False) -> Store:
    from helexa.neuron.harness import KNOWN, formats_of, open_harness
    from helexa.neuron.store import Store

    return Store(
        models_dir=None if settings.models_dir is None else Path(settings.models_dir),
        allowed_roots=[Path(root) for root in settings.allowed_roots],
        allow_downloads=allow_downloads,
        gguf_owners=settings.gguf_owners,
        formats=formats_of(open_harness(name) for name in KNOWN),
    )


def _way_out(err: OSError, settings: NeuronSettings) -> str:
    where = f"{settings.host}:{settings.port}"
    match err.errno:
        case errno.EADDRINUSE:
            return (
                f"port {settings.port} on {settings.host} is taken, perhaps by another neuron. Stop that one, or give "
                f"this one another: neuron serve --port {settings.port + 1} (0: any free one)"
            )
        case errno.EACCES:
            return f"no permission to listen on {where}; use a port from 1024 up: neuron serve --port 13131"
        case errno.EADDRNOTAVAIL:
            return f"{settings.host} is no address of this host; use 127.0.0.1, 0.0.0.0 or one that `ip addr` shows"
        case _:
            return f"cannot listen on {where}: {err}"


async def _pull(store: Store, ref: str) -> Pulled:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    from helexa.core.lifecycle import Progress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks: list[TaskID] = []  # none until something comes

        def show(progress: Progress) -> None:
            tasks[:] = tasks or [bar.add_task(ref, total=None)]
            bar.update(tasks[0], total=progress.bytes_total, completed=progress.bytes_done or 0)

        return await store.pull(ref, show)


def _ask_daemon(settings: NeuronSettings) -> list[dict[str, Any]] | None:
    """GET /models of the daemon that these settings describe; None where none answers."""
    import asyncio

    from helexa.core.relay.upstream import Upstream

    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    headers = {} if settings.token is None else {"authorization": f"Bearer {settings.token}"}

    async def ask() -> list[dict[str, Any]] | None:
        daemon = Upstream("neuron", f"http://{host}:{settings.port}", headers=headers, connect_s=1.0)
        try:
            answer = await daemon.fetch("GET", "/models", timeout_s=3.0)
        finally:
            daemon.close()
        return answer.json(list[dict[str, Any]]) if answer.status == 200 else None

    try:
        return asyncio.run(ask())
    except (OSError, TimeoutError, ValueError):
        return None


def _forget_states(settings: NeuronSettings, removed: list[Path]) -> None:
    from helexa.neuron.kv.store import KvStore, folder_of

    folder = folder_of(settings, os.environ)
    if folder is None or not folder.is_dir():
        return
    try:
        kept = KvStore(folder, limit_mb=settings.kv_store_limit_mb, max_age_s=settings.kv_store_max_age_s)
        count = kept.forget(removed)
    except OSError as err:
        print(f"neuron: prompt caches that were saved of it stay in {folder}: {err.strerror}", file=sys.stderr)
        return
    if count:
        print(f"neuron: prompt caches that were saved of it are removed too: {count}", file=sys.stderr)


def _files_in_use(settings: NeuronSettings, store: Store) -> set[Path]:
    """What must stay: the files of every model that the daemon has not unloaded, and what any process has mapped
    (a daemon on another port, or a model loaded under another name)."""
    held = {
        entry["id"]: entry for entry in _ask_daemon(settings) or [] if entry["status"] not in ("unloaded", "failed")
    }
    sources = {entry["source"] for entry in held.values() if entry.get("source")}
    stored = store.on_disk()
    used = {path for model in stored if model.id in held or model.source in sources for path in model.files}
    used |= {Path(source) for source in sources if source.startswith("/")}
    return used | _mapped({path for model in stored for path in model.files})


def _mapped(paths: set[Path]) -> set[Path]:
    by_name = {os.path.realpath(path): path for path in paths}
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # another user's, or it has just ended
            continue
        for line in lines:
            at = line.find("/")
            if at >= 0 and line[at:] in by_name:
                found.add(by_name[line[at:]])
    return found


def _print_json(value: Any) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "quant", "size", "status", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for row in rows:
        size = row["size_bytes"]
        table.add_row(row["id"], row["quant"] or "", "" if size is None else _size(size), row["status"])
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
