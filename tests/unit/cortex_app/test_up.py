"""`cortex up` before anything is started: what is served, on which ports, by which settings."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from helexa.core.catalogue import load_catalogue
from helexa.core.config import find_catalogue, load_cortex, load_neuron
from helexa.core.lifecycle import LoadRequest
from helexa.cortex.client import CommandFailed
from helexa.cortex.up import Choice, Ports, Wanted, choose, choose_ports, how_to_go_on, write_settings


def wanted(
    model: str | None = None, *, listen: str = "127.0.0.1:0", neuron_port: int = 0, context: int | None = None
) -> Wanted:
    return Wanted(model, listen, neuron_port, context, verbose=False)


def make(folder: Path, *names: str) -> None:
    for size, name in enumerate(names, start=1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def test_nothing_means_the_small_model_of_its_package() -> None:
    choice = choose(None)
    assert choice.model_id == "smollm2"
    assert Path(choice.source).name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_file_is_served_under_its_name(tmp_path: Path) -> None:
    make(tmp_path, "Qwen3-8B-Q4_K_M.gguf", "big-00001-of-00003.gguf")
    assert choose(str(tmp_path / "Qwen3-8B-Q4_K_M.gguf")) == Choice(
        "Qwen3-8B-Q4_K_M", f"{tmp_path}/Qwen3-8B-Q4_K_M.gguf"
    )
    assert choose(str(tmp_path / "big-00001-of-00003.gguf")).model_id == "big"


def test_of_a_folder_the_smallest_model_is_loaded_and_all_are_served(tmp_path: Path) -> None:
    make(tmp_path, "mmproj-a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "sub/c.gguf")
    assert choose(str(tmp_path)) == Choice("b", f"{tmp_path}/b-00001-of-00002.gguf", models_dir=tmp_path)


def test_a_folder_in_the_hubs_form_is_one_model(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "model.safetensors")
    assert choose(str(tmp_path)) == Choice(tmp_path.name, str(tmp_path))


@pytest.mark.parametrize("reference", ["unsloth/Qwen3-8B-GGUF", "unsloth/Qwen3-8B-GGUF:Q4_K_M"])
def test_a_reference_goes_to_the_hub(reference: str) -> None:
    assert choose(reference) == Choice(reference, reference)


@pytest.mark.parametrize("model", ["nowhere.gguf", "./owner/repo", "/a/b", "a/b/c", "", "owner/repo:"])
def test_what_is_nothing_of_these_is_refused(model: str) -> None:
    with pytest.raises(CommandFailed, match="neither a file nor a folder") as caught:
        choose(model)
    assert caught.value.code == 2


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="no model in it"):
        choose(str(tmp_path))


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(CommandFailed, match=f"port {port} on 127.0.0.1 is taken.*--listen"):
            choose_ports(wanted(listen=f"127.0.0.1:{port}"))
        with pytest.raises(CommandFailed, match=f"port {port} on 127.0.0.1 is taken.*--neuron-port"):
            choose_ports(wanted(neuron_port=port))


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:31313", "http://127.0.0.1:31313"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("[::]:80", "http://[::1]:80"),
        ("beast.internal:80", "http://beast.internal:80"),
    ],
)
def test_this_machine_reaches_it_whatever_it_listens_on(listen: str, url: str) -> None:
    assert Ports(listen, "127.0.0.1:1", 2).url == url


@pytest.mark.parametrize("source", ["/models/plain.gguf", '/mo dels/"quoted" \\ back\tÜ.gguf'])
def test_the_settings_it_writes_are_read_by_both_programs(tmp_path: Path, source: str) -> None:
    choice = Choice("m", source, models_dir=Path("/mo dels"))
    ports = Ports("127.0.0.1:1001", "127.0.0.1:1002", 1003)
    neuron_toml, cortex_toml = write_settings(tmp_path, wanted(context=4096), choice, ports)
    neuron = load_neuron(neuron_toml, {})
    assert neuron.default_models == [LoadRequest(model_id="m", source=source, context=4096)]
    assert (neuron.host, neuron.port, neuron.models_dir) == ("127.0.0.1", 1003, "/mo dels")
    cortex = load_cortex(cortex_toml, {})
    assert (cortex.gateway.listen, cortex.gateway.metrics_listen) == ("127.0.0.1:1001", "127.0.0.1:1002")
    assert [n.endpoint for n in cortex.neurons] == ["http://127.0.0.1:1003"]
    path = find_catalogue(cortex, cortex_toml)
    assert path is not None
    (profile,) = load_catalogue(path).models
    assert profile.load_request().spec_hash() == neuron.default_models[0].spec_hash()  # a reload is no other model


def test_commands_are_printed_as_a_shell_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / ".venv" / "bin" / "cortex"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert " .venv/bin/cortex chat m --gateway http://h" in how_to_go_on("m", "http://h")
    monkeypatch.setenv("PATH", str(program.parent))
    assert " cortex chat m --gateway http://h" in how_to_go_on("m", "http://h")
