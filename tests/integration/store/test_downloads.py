"""Downloads against a Hub that breaks off, lies, refuses and is gone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_hub import API, BreakOff, FakeHub, Garble, Hold, IgnoreRange, Status, git_sha1, sha256

from helexa.core.errors import LoadFailed, ModelNotFound, NeverLoads, PermissionDenied
from helexa.core.lifecycle import LoadRequest, Progress
from helexa.neuron.store import Store

REPO = "acme/tiny-GGUF"


def gguf(size: int, seed: int = 0) -> bytes:
    """Bytes that no two tests share by accident; not a model that an engine could load."""
    block = hashlib.sha256(bytes([seed])).digest()
    return (b"GGUF" + block * (size // len(block) + 1))[:size]


Q4 = gguf(3_000_000, 4)
Q8 = gguf(500_000, 8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.add(REPO, {"tiny-Q4_K_M.gguf": Q4, "tiny-Q8_0.gguf": Q8, "README.md": b"hello"})
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    with fake.running():
        yield fake


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def make_store(home: Path, **options: object) -> Store:
    settings: dict[str, object] = {
        "models_dir": None,
        "allowed_roots": [],
        "allow_downloads": True,
        "gguf_owners": ["maker"],
        "hf_home": home,
        "backoff_s": 0.01,
    }
    return Store(**(settings | options))  # type: ignore[arg-type]


def resolve(store: Store, progress: object = None, **profile: object) -> Path:
    request = LoadRequest(**profile)  # type: ignore[arg-type]
    return run(store.resolve(request, progress or (lambda p: None))).files[0]  # type: ignore[arg-type]


def blobs(home: Path, repo: str = REPO) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}" / "blobs"


def test_a_reference_is_downloaded_into_the_usual_cache(hub: FakeHub, home: Path) -> None:
    path = resolve(make_store(home), source=f"{REPO}:q8_0")
    assert path.name == "tiny-Q8_0.gguf"
    assert path.read_bytes() == Q8
    assert path.resolve() == blobs(home) / sha256(Q8)
    assert (blobs(home).parent / "refs" / "main").read_text() == hub.repos[REPO].commit


def test_without_a_quant_q4_k_m_is_taken(hub: FakeHub, home: Path) -> None:
    assert resolve(make_store(home), source=REPO).name == "tiny-Q4_K_M.gguf"


def test_the_canonical_id_names_repository_and_quant(hub: FakeHub, home: Path) -> None:
    store = make_store(home)
    files = run(store.resolve(LoadRequest(source=f"{REPO}:q4_k_m"), lambda p: None))
    assert files.model_id == f"{REPO}:Q4_K_M"
    assert [m.id for m in store.on_disk()] == [f"{REPO}:Q4_K_M"]


def test_the_catalogue_s_name_is_kept(hub: FakeHub, home: Path) -> None:
    files = run(make_store(home).resolve(LoadRequest(model_id="small", source=REPO), lambda p: None))
    assert files.model_id == "small"


def test_a_second_time_nothing_is_asked(hub: FakeHub, home: Path) -> None:
    resolve(make_store(home), source=REPO)
    hub.seen.clear()
    resolve(make_store(home), source=REPO)
    assert hub.seen == []


def test_progress_ends_at_the_whole(hub: FakeHub, home: Path) -> None:
    told: list[Progress] = []
    resolve(make_store(home), told.append, source=REPO)
    assert told[-1].fraction == 1
    assert told[-1].bytes_done == told[-1].bytes_total == len(Q4)
    assert {p.phase for p in told} == {"downloading"}
    assert [p.bytes_done for p in told] == sorted(p.bytes_done or 0 for p in told)


def test_a_broken_connection_is_resumed_where_it_broke(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", BreakOff(1_000_000), BreakOff(500_000))
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4
    starts = [s.range for s in hub.downloads("tiny-Q4_K_M.gguf")]
    assert starts == [f"bytes={n}-{len(Q4) - 1}" for n in (0, 1_000_000, 1_500_000)]


def test_a_busy_hub_is_asked_again(hub: FakeHub, home: Path) -> None:
    hub.fail(API, Status(503), Status(429, retry_after="0"))
    hub.fail("tiny-Q4_K_M.gguf", Status(503), Status(500))
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_a_download_that_gets_nowhere_ends_and_keeps_what_came(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", BreakOff(700_000), *[BreakOff(0)] * 20)
    with pytest.raises(LoadFailed, match="broke off at 700000 of 3000000 bytes"):
        resolve(make_store(home), source=REPO)
    assert (blobs(home) / f"{sha256(Q4)}.incomplete").stat().st_size == 700_000
    hub.faults.clear()
    hub.seen.clear()
    told: list[Progress] = []
    assert resolve(make_store(home), told.append, source=REPO).read_bytes() == Q4
    assert told[0].bytes_done == 700_000
    assert [s.range for s in hub.downloads("tiny-Q4_K_M.gguf")] == [f"bytes=700000-{len(Q4) - 1}"]


def test_a_server_without_ranges_starts_again_from_the_beginning(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", BreakOff(1_000_000), IgnoreRange())
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_a_file_that_arrives_damaged_is_fetched_again(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", Garble())
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_a_file_that_arrives_damaged_twice_is_refused_and_not_kept(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", Garble(), Garble())
    with pytest.raises(LoadFailed, match="arrives damaged, twice"):
        resolve(make_store(home), source=REPO)
    assert list(blobs(home).iterdir()) == []


def test_a_partial_file_of_wrong_content_is_found_out(hub: FakeHub, home: Path) -> None:
    blobs(home).mkdir(parents=True)
    (blobs(home) / f"{sha256(Q4)}.incomplete").write_bytes(b"x" * 1000)
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_a_partial_file_that_is_too_long_is_thrown_away(hub: FakeHub, home: Path) -> None:
    blobs(home).mkdir(parents=True)
    (blobs(home) / f"{sha256(Q4)}.incomplete").write_bytes(Q4 + b"x")
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


@pytest.mark.parametrize("rest", [b"", Q4[:-1]])
def test_a_truncated_file_in_the_cache_is_fetched_again(hub: FakeHub, home: Path, rest: bytes) -> None:
    path = resolve(make_store(home), source=REPO)
    path.resolve().write_bytes(rest)
    why = f"damaged: it has {len(rest)} bytes and should have {len(Q4)}"
    assert why in (make_store(home).on_disk()[0].error or "")
    assert make_store(home).find_local(LoadRequest(source=REPO)) is None
    with pytest.raises(PermissionDenied, match=f"{why}.*allow_downloads = false"):
        resolve(make_store(home, allow_downloads=False), source=REPO)
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_an_overwritten_file_in_the_cache_is_fetched_again(hub: FakeHub, home: Path) -> None:
    path = resolve(make_store(home), source=REPO)
    path.resolve().write_bytes(b"<htm" + Q4[4:])
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_a_blob_that_is_gone_is_fetched_again(hub: FakeHub, home: Path) -> None:
    resolve(make_store(home), source=REPO).resolve().unlink()
    assert make_store(home).on_disk() == []
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4


def test_all_parts_of_a_split_model_come_in_order(hub: FakeHub, home: Path) -> None:
    parts = {f"Q4_K_M/big-Q4_K_M-{n:05}-of-00003.gguf": gguf(100_000 + n, n) for n in (1, 2, 3)}
    hub.add("acme/big", {**parts, "big-Q8_0.gguf": Q8})
    store = make_store(home)
    files = run(store.resolve(LoadRequest(source="acme/big"), lambda p: None)).files
    assert [f.read_bytes() for f in files] == list(parts.values())
    assert [f.name for f in files] == [n.rpartition("/")[2] for n in parts]
    assert [m.id for m in store.on_disk()] == ["acme/big:Q4_K_M"]


def test_a_projector_comes_with_its_model(hub: FakeHub, home: Path) -> None:
    hub.add("acme/eyes", {"eyes-Q4_0.gguf": Q8, "mmproj-F32.gguf": gguf(9000, 1), "mmproj-F16.gguf": gguf(8000, 2)})
    files = run(make_store(home).resolve(LoadRequest(source="acme/eyes"), lambda p: None))
    assert files.projector is not None
    assert files.projector.name == "mmproj-F16.gguf"
    assert [f.name for f in files.files] == ["eyes-Q4_0.gguf"]


def test_a_draft_model_comes_too(hub: FakeHub, home: Path) -> None:
    hub.add("acme/draft", {"draft-Q4_0.gguf": gguf(5000, 3)})
    request = LoadRequest(source=REPO, draft="acme/draft:Q4_0")
    resolve(make_store(home), source=REPO)
    assert make_store(home).find_local(request) is None  # the draft is still to come
    files = run(make_store(home).resolve(request, lambda p: None))
    assert files.draft is not None
    assert files.draft.name == "draft-Q4_0.gguf"


@pytest.mark.parametrize("where", ["acme/tiny-GGUF", "maker/tiny-GGUF", "maker/acme_tiny-GGUF"])
def test_a_quant_is_looked_for_where_the_gguf_files_are(hub: FakeHub, home: Path, where: str) -> None:
    hub.repos.clear()
    hub.add("acme/tiny", {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.add(where, {"tiny-Q8_0.gguf": Q8})
    store = make_store(home)
    files = run(store.resolve(LoadRequest(model_id="acme/tiny", quant="Q8_0"), lambda p: None))
    assert files.model_id == "acme/tiny"
    assert [m.id for m in store.on_disk()] == [f"{where}:Q8_0"]
    # and again without the network
    assert store.find_local(LoadRequest(model_id="acme/tiny", quant="Q8_0")) == files


def test_a_gated_original_does_not_hide_its_open_gguf_files(hub: FakeHub, home: Path) -> None:
    hub.add("acme/tiny", {"model.safetensors": b"weights"}, gated=True)
    assert resolve(make_store(home), model_id="acme/tiny", quant="Q8_0").read_bytes() == Q8


def test_weights_that_nothing_here_can_serve_are_not_downloaded(hub: FakeHub, home: Path) -> None:
    hub.add("acme/plain", {"config.json": b"{}", "model.safetensors": b"weights"})
    with pytest.raises(ModelNotFound, match="acme/plain has no file that this node can serve"):
        resolve(make_store(home), source="acme/plain")
    assert hub.downloads("model.safetensors") == []


def test_a_model_folder_comes_with_its_tokenizer(hub: FakeHub, home: Path) -> None:
    names = {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
        "chat_template.jinja": b"t",
        "model.safetensors": b"weights",
    }
    others = {"consolidated.safetensors": b"again", "pic.png": b"x", "onnx/model.json": b"x"}
    hub.add("acme/plain", {**names, **others, "1_Pooling/config.json": b"{}"})
    path = resolve(make_store(home, formats=("gguf", "safetensors")), source="acme/plain")
    assert sorted(f.name for f in path.parent.iterdir()) == sorted([*names, "1_Pooling"])
    assert (path.parent / "tokenizer.json").resolve().name == git_sha1(b"[]")
    assert (path.parent / "1_Pooling" / "config.json").read_bytes() == b"{}"


def test_a_named_harness_decides_what_is_fetched_of_a_repository_that_has_both(hub: FakeHub, home: Path) -> None:
    weights = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.add("acme/both", {**weights, "both-Q8_0.gguf": Q8})
    store = make_store(home, formats=("gguf", "safetensors"))
    assert resolve(store, source="acme/both", harness="torch", quant="bf16").read_bytes() == b"weights"
    assert hub.downloads("both-Q8_0.gguf") == []
    assert resolve(store, source="acme/both", harness="llama").read_bytes() == Q8


def test_a_quant_that_is_not_there_lists_those_that_are(hub: FakeHub, home: Path) -> None:
    with pytest.raises(ModelNotFound, match="has no Q5_K_M; it has Q4_K_M, Q8_0"):
        resolve(make_store(home), source=f"{REPO}:Q5_K_M")


def test_an_unknown_repository_is_told_as_such(hub: FakeHub, home: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no repository acme/nix-GGUF at .*HF_TOKEN"):
        resolve(make_store(home), source="acme/nix-GGUF")


def test_a_gated_repository_names_the_way_in(hub: FakeHub, home: Path) -> None:
    hub.repos[REPO].gated = True
    with pytest.raises(PermissionDenied, match=f"gated: accept its terms at {hub.endpoint}/{REPO}, then set HF_TOKEN"):
        resolve(make_store(home), source=REPO)
    assert hub.downloads("tiny-Q4_K_M.gguf") == []


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(
    hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO].gated = True
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4
    assert {s.server: "authorization" in s.headers for s in hub.seen} == {"hub": True, "cdn": False}


def test_a_refused_token_is_told_as_such(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(PermissionDenied, match="does not accept this HF_TOKEN"):
        resolve(make_store(home), source=REPO)


def test_too_little_disk_is_refused_with_both_figures_before_a_byte(hub: FakeHub, home: Path) -> None:
    hub.repos[REPO].announced["tiny-Q4_K_M.gguf"] = 1 << 60
    with pytest.raises(NeverLoads, match=f"needs {1 << 40} MB of disk and .* has [0-9]+ MB free") as refused:
        resolve(make_store(home), source=REPO)
    assert refused.value.code == "insufficient_disk"
    assert refused.value.details["need_mb"] == 1 << 40
    assert hub.downloads("tiny-Q4_K_M.gguf") == []


def test_downloads_can_be_forbidden(hub: FakeHub, home: Path) -> None:
    with pytest.raises(PermissionDenied, match="allow_downloads = false"):
        resolve(make_store(home, allow_downloads=False), source=REPO)
    assert hub.seen == []


def test_offline_says_so_at_once_and_uses_what_is_there(
    hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(make_store(home), source=f"{REPO}:Q8_0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.seen.clear()
    assert resolve(make_store(home), source=REPO).read_bytes() == Q8
    with pytest.raises(PermissionDenied, match="HF_HUB_OFFLINE is set"):
        resolve(make_store(home), source=f"{REPO}:Q4_K_M")
    assert hub.seen == []


def test_no_network_says_so_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    store = make_store(home, backoff_s=60)
    with pytest.raises(LoadFailed, match=r"not on this node's disk, and the Hub cannot be reached \(127.0.0.1:1: "):
        resolve(store, source=REPO)


async def _held(store: Store, hub: FakeHub, request: LoadRequest) -> asyncio.Task[object]:
    """A resolve that has received some bytes and gets no more."""
    task: asyncio.Task[object] = asyncio.ensure_future(store.resolve(request, lambda p: None))
    await asyncio.to_thread(hub.holding.wait, 10)
    return task


def test_a_cancel_ends_the_download_at_once_and_keeps_what_came(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", Hold(2_000_000))

    async def body() -> None:
        task = await _held(make_store(home), hub, LoadRequest(source=REPO))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body(), timeout_s=8)
    have = (blobs(home) / f"{sha256(Q4)}.incomplete").stat().st_size
    assert 0 < have <= 2_000_000
    hub.seen.clear()
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4
    assert [s.range for s in hub.downloads("tiny-Q4_K_M.gguf")] == [f"bytes={have}-{len(Q4) - 1}"]
    assert not [t for t in threading.enumerate() if t.name == "helexa-store"]


def test_two_who_want_the_same_share_one_download(hub: FakeHub, home: Path) -> None:
    hub.fail("tiny-Q4_K_M.gguf", Hold(1_000_000))
    told: list[Progress] = []

    async def body() -> None:
        store = make_store(home)
        first = await _held(store, hub, LoadRequest(source=REPO))
        joined = asyncio.Event()

        def second_hears(progress: Progress) -> None:
            told.append(progress)
            joined.set()

        second = asyncio.ensure_future(store.resolve(LoadRequest(model_id="mine", source=REPO), second_hears))
        await joined.wait()
        first.cancel()  # the second still wants it
        with pytest.raises(asyncio.CancelledError):
            await first
        hub.release()
        assert (await second).files[0].read_bytes() == Q4

    run(body())
    assert len(hub.downloads("tiny-Q4_K_M.gguf")) == 1
    assert told[-1].fraction == 1


def test_two_programs_do_not_write_one_file(hub: FakeHub, home: Path) -> None:
    """Two stores, as the daemon and `neuron pull` are: the second waits for the first one's lock, then has the file."""
    hub.fail("tiny-Q4_K_M.gguf", Hold(1_000_000))

    async def body() -> None:
        first = await _held(make_store(home), hub, LoadRequest(source=REPO))
        waiting = asyncio.Event()

        def second_hears(progress: Progress) -> None:
            if progress.bytes_done:  # it sees how far the other is
                waiting.set()

        second = asyncio.ensure_future(make_store(home).resolve(LoadRequest(source=REPO), second_hears))
        await waiting.wait()
        hub.release()
        assert await first == await second

    run(body())
    assert len(hub.downloads("tiny-Q4_K_M.gguf")) == 1


def test_pull_brings_a_changed_repository_up_to_date(hub: FakeHub, home: Path) -> None:
    store = make_store(home)
    assert run(store.pull(REPO, lambda p: None)).fetched
    assert run(store.pull(REPO, lambda p: None)).note == "up to date"
    hub.repos[REPO].files["tiny-Q4_K_M.gguf"] = newer = gguf(10_000, 9)
    pulled = run(store.pull(REPO, lambda p: None))
    assert pulled.fetched
    assert pulled.files.files[0].read_bytes() == newer
    found = store.find_local(LoadRequest(source=REPO))
    assert found is not None
    assert found.files == pulled.files.files


def test_pull_without_network_says_that_the_disk_has_it(
    hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(home)
    run(store.pull(REPO, lambda p: None))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    pulled = run(store.pull(REPO, lambda p: None))
    assert not pulled.fetched
    assert "cannot be reached" in (pulled.note or "")


def test_a_name_that_leads_out_of_the_cache_is_not_taken(hub: FakeHub, home: Path) -> None:
    hub.add("acme/evil", {"../../../evil-Q4_0.gguf": Q8, "ok-Q8_0.gguf": Q8})
    assert resolve(make_store(home), source="acme/evil").name == "ok-Q8_0.gguf"
    with pytest.raises(ModelNotFound):
        resolve(make_store(home), source="acme/evil:Q4_0")


def test_a_proxy_is_used_unless_the_host_is_excepted(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub stands in for a proxy: it is asked for whole addresses of a host that nobody can resolve."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.endpoint)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the CDN
    assert resolve(make_store(home), source=REPO).read_bytes() == Q4
    assert {s.path.startswith("http://hub.invalid/") for s in hub.seen if s.server == "hub"} == {True}
    assert {s.path.startswith("/cdn/") for s in hub.seen if s.server == "cdn"} == {True}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_a_certificate_that_is_not_trusted_is_told_at_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -days 2"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"https://localhost:{listener.getsockname()[1]}")

        def shake_hands() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

        server = threading.Thread(target=shake_hands)
        server.start()
        with pytest.raises(LoadFailed, match="the certificate of localhost is not trusted"):
            resolve(make_store(home, backoff_s=60), source=REPO)
        server.join()
