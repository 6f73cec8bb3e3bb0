"""The `cortex` commands as processes against a real gateway: results on stdout, words on stderr, exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import resource
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import Gateway, cortex, environment, write_settings
from tests.helpers.serving_neuron import WORDS, ServingNeuron

CATALOGUE = '[[models]]\nid = "Qwen/Qwen3-8B"\ncontext = 4096\n[aliases]\n"small" = "Qwen/Qwen3-8B"\n'
MODEL = "Qwen/Qwen3-8B"
NOBODY = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def cortex_command(*arguments: str, stdin: str = "") -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "helexa.cortex", *arguments],
        input=stdin, capture_output=True, text=True, env=environment(), timeout=30,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


@asynccontextmanager
async def site(folder: Path, node: ServingNeuron, status: str = "loaded") -> AsyncIterator[Gateway]:
    node.put(MODEL, status, tell=False, capabilities=["chat"])
    async with neurons(node), cortex(folder, {"beast": node.url}, models=CATALOGUE) as gateway:
        await gateway.until_up("beast")
        yield gateway


async def ask(gateway: Gateway, *arguments: str, stdin: str = "") -> Done:
    return await asyncio.to_thread(cortex_command, *arguments, "--gateway", gateway.daemon.url, stdin=stdin)


# without a gateway


def test_help_is_there_at_once() -> None:
    cortex_command("--help")  # what Python compiles once is compiled
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cortex_command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.code == 0
    assert all(command in done.out for command in ("serve", "up", "status", "chat", "load", "unload", "check"))
    # Of the processor, which others' work lengthens less: the promise is 0.3 s on an idle machine.
    assert took_s < 0.9


def test_the_version_is_told() -> None:
    assert cortex_command("--version").out.startswith("cortex 0.")


def test_a_shell_can_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    # typer looks which shell it was started from; CI may be started from none
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = cortex_command("--show-completion", "bash")
    assert (done.code, "complete -o default" in done.out) == (0, True)


@pytest.mark.parametrize("command", [["status"], ["models"], ["load", "m"], ["unload", "m"], ["status", "--watch"]])
def test_a_gateway_that_is_not_there_is_told_in_one_line_with_the_way_out(command: list[str]) -> None:
    done = cortex_command(*command, "--gateway", NOBODY)
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert f"no gateway at {NOBODY} (connection refused)" in done.err
    assert "cortex up" in done.err


@pytest.mark.parametrize("arguments", [["fly"], ["load"], ["status", "--nope"], ["chat", "m", "--max-tokens", "0"]])
def test_a_mistake_in_the_call_is_2(arguments: list[str]) -> None:
    done = cortex_command(*arguments)
    assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "--gateway", "ftp://x"], "http://host:port"),
        (["serve", "--listen", "31313"], "host:port"),
        (["serve", "--config", "/nowhere/cortex.toml"], "/nowhere/cortex.toml"),
        (["up", "/nowhere.gguf"], "neither a file nor a folder"),
    ],
)
def test_a_wrong_value_is_2_and_says_what_is_right(arguments: list[str], words: str) -> None:
    done = cortex_command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    config = write_settings(tmp_path, {}, "[gateway]\nlistne = 'x:1'\n")
    for command in ("serve", "check"):
        done = cortex_command(command, "--config", str(config))
        assert (done.code, done.out) == (2, "")
        assert "listne" in done.err
        assert "listen" in done.err


# status and models


def test_status_shows_the_fleet_and_json_is_the_view_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, ServingNeuron()) as gateway:
            await gateway.until("/fleet", lambda fleet: "discovery" in fleet["nodes"][0])
            done = await ask(gateway, "status")
            assert (done.code, done.err) == (0, "")
            for words in ("beast", "up for", "CPU", "/ 9.8 GB", MODEL, "loaded", "small", "0 requests in flight"):
                assert words in done.out
            view = json.loads((await ask(gateway, "status", "--json")).out)
            assert view["nodes"][0]["name"] == "beast"
            listed = json.loads((await ask(gateway, "models", "--json")).out)
            assert [entry["id"] for entry in listed] == [MODEL]
            assert MODEL in (await ask(gateway, "models")).out

    run(scenario())


def test_watching_goes_on_until_ctrl_c(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, ServingNeuron()) as gateway:
            watching = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "helexa.cortex", "status", "--watch", "--json", "-g", gateway.daemon.url,
                stdout=asyncio.subprocess.PIPE, env=environment(),
            )  # fmt: skip
            assert watching.stdout is not None
            for _ in range(2):
                assert json.loads(await watching.stdout.readline())["nodes"]
            watching.send_signal(2)
            assert await watching.wait() == 130

    run(scenario())


# load and unload


def test_load_waits_and_unload_undoes_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = ServingNeuron()
        async with site(tmp_path, node, "unloaded") as gateway:
            done = await ask(gateway, "load", "small", "--node", "beast")
            assert (done.code, done.out) == (0, f"{MODEL} is loaded on beast\n")
            done = await ask(gateway, "unload", "small", "--json")
            assert (done.code, json.loads(done.out)) == (0, {"model": MODEL, "status": "unloaded"})
            assert node.models[MODEL].status == "unloaded"

    run(scenario())


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = ServingNeuron()
        node.load_failure = "the file is cut short"
        async with site(tmp_path, node, "unloaded") as gateway:
            done = await ask(gateway, "load", MODEL)
            assert (done.code, done.out) == (1, "")
            assert "the file is cut short" in done.err
            done = await ask(gateway, "load", MODEL, "--node", "best")
            assert (done.code, "there is beast" in done.err) == (1, True)

    run(scenario())


def test_unloading_what_is_in_use_names_the_options(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = ServingNeuron()
        async with site(tmp_path, node) as gateway:
            node.put(MODEL, "loaded", active_requests=1)
            done = await ask(gateway, "unload", MODEL)
            assert (done.code, "--drain SECONDS, or --force" in done.err) == (1, True)
            assert (await ask(gateway, "unload", MODEL, "--force")).code == 0

    run(scenario())


# check


def test_check_reaches_every_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = ServingNeuron()
        async with neurons(node):
            good = write_settings(tmp_path, {"beast": node.url}, models=CATALOGUE)
            done = await asyncio.to_thread(cortex_command, "check", "--config", str(good))
            assert done.code == 0
            assert "1 models, 1 aliases" in done.out
            assert f"ok    beast ({node.url}): neuron 0.1.0, 1 devices, 0 models" in done.out
            bad = write_settings(
                tmp_path,
                {"beast": node.url, "dead": NOBODY},
                models=CATALOGUE + '[[models]]\nid="x"\npinned_on=["best"]\n',
            )
            done = await asyncio.to_thread(cortex_command, "check", "--config", str(bad))
            assert done.code == 1
            assert f"wrong dead ({NOBODY}): connection refused" in done.out
            assert "x is pinned on best, which is no node of cortex.toml" in done.out
            told = json.loads((await asyncio.to_thread(cortex_command, "check", "-c", str(bad), "--json")).out)
            assert [node["error"] is None for node in told["nodes"]] == [True, False]

    run(scenario())


def test_check_tells_a_wrong_token_from_a_dead_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = ServingNeuron(token="right")
        async with neurons(node):
            config = write_settings(tmp_path, {"beast": node.url})
            done = await asyncio.to_thread(cortex_command, "check", "--config", str(config))
            assert (done.code, "no or bad token" in done.out) == (1, True)

    run(scenario())


# chat


def test_a_text_on_stdin_is_asked_once_and_only_the_answer_is_on_stdout(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = ServingNeuron()
        async with site(tmp_path, node) as gateway:
            done = await ask(gateway, "chat", "small", "--system", "Be brief.", "--max-tokens", "5", stdin="Hi there\n")
            assert (done.code, done.out) == (0, "".join(WORDS) + "\n")
            assert f"{len(WORDS)} tokens" in done.err
            (seen,) = node.seen
            assert seen.body["messages"] == [
                {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"},
            ]  # fmt: skip
            assert seen.body["max_tokens"] == 5

    run(scenario())


def test_nothing_on_stdin_asks_nothing() -> None:
    done = cortex_command("chat", "small", stdin="\n")
    assert (done.code, done.out) == (2, "")
    assert "stdin is empty" in done.err


def test_an_answer_that_cannot_be_had_is_one_line_and_1(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, ServingNeuron()) as gateway:
            done = await ask(gateway, "chat", "nobody", stdin="Hi")
            assert (done.code, done.out, "Traceback" in done.err) == (1, "", False)
            assert "no model is called 'nobody'" in done.err

    run(scenario())


def test_on_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with site(tmp_path, node) as gateway:
            node.plan.append(node.paused)
            await asyncio.to_thread(talk, gateway.daemon.url)
            await asyncio.wait_for(node.left.wait(), 5)

    def talk(url: str) -> None:
        with Terminal("chat", "small", "--gateway", url) as terminal:
            terminal.read_until("> ")
            terminal.type("first\n")
            terminal.read_until("Hello")
            terminal.type("\x03")
            terminal.read_until("stopped]")
            terminal.read_until("> ")
            terminal.type("second\n")
            terminal.read_until("tok")
            terminal.read_until("> ")
            terminal.type("/exit\n")
            assert terminal.process.wait(10) == 0

    run(scenario())
    _, second = node.seen
    assert [m["content"] for m in second.body["messages"]] == ["first", "Hello", "second"]


class Terminal:
    """The command on a pseudo-terminal, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self._own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helexa.cortex", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment() | {"TERM": "dumb"}, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # it becomes the controlling terminal
        )  # fmt: skip
        os.close(theirs)
        self._text = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._own)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def read_until(self, words: str, within_s: float = 15.0) -> None:
        """And what came with them is not read again."""
        deadline = time.monotonic() + within_s
        while words not in self._text:
            ready, _, _ = select.select([self._own], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {words!r} in {self._text!r}"
            self._text += os.read(self._own, 65536).decode("utf-8", "replace")
        self._text = self._text.partition(words)[2]


# what the gateway decided


def test_decisions_are_shown_with_their_reasons_and_as_json(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with site(tmp_path, node, "unloaded") as gateway:
            nothing = await ask(gateway, "decisions")
            assert (nothing.code, nothing.out) == (0, "")
            assert "nothing has been decided" in nothing.err
            assert (await gateway.chat("small", headers={"x-request-id": "mine"})).status == 200
            shown = await ask(gateway, "decisions", "small", "--all")
            assert (shown.code, shown.err) == (0, "")
            assert "beast" in shown.out
            assert "mine" in shown.out
            as_json = json.loads((await ask(gateway, "decisions", "--json")).out)
            assert [(d["what"], d["model"], d["requests"]) for d in as_json] == [("load", MODEL, ["mine"])]
            assert (await gateway.get("/fleet/decisions?last=1")).json() == {"decisions": as_json}
            for wrong in ("0", "201", "many", "-1"):
                assert (await gateway.get(f"/fleet/decisions?last={wrong}")).status == 400
            unknown = await ask(gateway, "decisions", "nobody")
            assert (unknown.code, "nobody" in unknown.err) == (1, True)

    run(scenario())


def test_a_plan_is_shown_for_an_alias_and_changes_nothing(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with site(tmp_path, node, "unloaded") as gateway:
            shown = await ask(gateway, "plan", "small")
            assert (shown.code, shown.err) == (0, "")
            assert shown.out.startswith(f"{MODEL} would be loaded on beast")
            as_json = json.loads((await ask(gateway, "plan", "small", "--json")).out)
            assert (as_json["model"], as_json["action"], as_json["node"]) == (MODEL, "load", "beast")
            assert node.loads == []
            unknown = await ask(gateway, "plan", "smal")
            assert (unknown.code, "did you mean 'small'" in unknown.err) == (1, True)
            assert (await gateway.get("/fleet/plan")).status == 400

    run(scenario())
