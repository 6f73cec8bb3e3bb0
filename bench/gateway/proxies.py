"""The gateways that are compared, each at the settings its makers would choose for this: one upstream, no request log
(cortex writes its own), one worker. A `Proxy` says how to start one on a port, in front of the stub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.measure import CACHE, free_port, need

PEERS = CACHE / "peers"  # a venv of their own: their dependencies are not ours
PINS = ["vllm-router==0.1.17", "sglang-router==0.3.2", "litellm[proxy]==1.108.7"]


@dataclass(frozen=True, slots=True)
class Proxy:
    """load: how much of the full load it gets, so that a slow one does not take the hour."""

    name: str
    command: Callable[[int, int, Path], list[str]]
    version: Callable[[], str]
    load: float = 1.0
    model: str = "stub"


def peers() -> Path:
    """The venv with the peers, made where it is not there yet."""
    if not (PEERS / "done").exists():
        print("installing the peers into a venv of their own ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([PEERS / "bin/pip", "install", "-q", *PINS], check=True)
        (PEERS / "done").touch()
    return PEERS / "bin"


def _cortex(port: int, stub: int, folder: Path) -> list[str]:
    config = folder / "cortex.toml"
    config.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\n'
        f'[[neurons]]\nname = "stub"\nendpoint = "http://127.0.0.1:{stub}"\n'
    )
    return [str(Path(sys.executable).parent / "cortex"), "serve", "--config", str(config)]


def _nginx(port: int, stub: int, folder: Path) -> list[str]:
    config = folder / "nginx.conf"
    temp = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log error;\n"
        "events { worker_connections 8192; }\n"
        "http { access_log off; keepalive_requests 100000000; client_max_body_size 64m; client_body_buffer_size 1m;\n"
        f"{temp}\n"
        f"upstream node {{ server 127.0.0.1:{stub}; keepalive 2048; keepalive_requests 100000000; }}\n"
        f"server {{ listen 127.0.0.1:{port} backlog=4096;\n"
        "location / { proxy_pass http://node; proxy_http_version 1.1; proxy_buffering off;\n"
        'proxy_set_header Connection ""; } } }\n'
    )
    return [need("nginx", "nginx"), "-c", str(config), "-p", str(folder)]


def _vllm_router(port: int, stub: int, folder: Path) -> list[str]:
    return [
        str(peers() / "vllm-router"),
        *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{stub}"),
        *("--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())),
        *("--max-concurrent-requests", "4096"),
    ]


def _sglang_router(port: int, stub: int, folder: Path) -> list[str]:
    return [
        str(peers() / "sglang-router"),
        *("launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{stub}"),
        *("--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())),
        *("--max-concurrent-requests", "4096"),
    ]


def _litellm(port: int, stub: int, folder: Path) -> list[str]:
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n- model_name: stub\n  litellm_params:\n    model: openai/stub\n"
        f"    api_base: http://127.0.0.1:{stub}/v1\n    api_key: none\n"
        "    use_chat_completions_api: true\n"  # what it translates Responses to, in place of passing them on
        "litellm_settings:\n  telemetry: false\n  set_verbose: false\n"
    )
    return [str(peers() / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


def _nginx_version() -> str:
    said = subprocess.run([need("nginx", "nginx"), "-v"], capture_output=True, text=True, check=True).stderr
    return said.strip().rpartition("/")[2]


def _peer_version(package: str) -> Callable[[], str]:
    def ask() -> str:
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return subprocess.run(
            [peers() / "python", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()

    return ask


PROXIES: dict[str, Proxy] = {
    p.name: p
    for p in (
        Proxy("nginx", _nginx, _nginx_version),
        Proxy("cortex", _cortex, lambda: version("helexa")),
        Proxy("vllm-router", _vllm_router, _peer_version("vllm-router")),
        Proxy("sglang-router", _sglang_router, _peer_version("sglang-router")),
        Proxy("litellm", _litellm, _peer_version("litellm"), load=0.02),
    )
}
