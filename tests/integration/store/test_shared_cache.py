"""The cache belongs to every tool: each finds what the other wrote, and removing takes exactly one model."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from tests.helpers.aio import run
from tests.helpers.fake_hub import FakeHub, sha256

from helexa.core.errors import BadRequest, Conflict, ModelNotFound
from helexa.core.lifecycle import LoadRequest
from helexa.neuron.store import Store

REPO = "acme/tiny-GGUF"
Q4 = b"GGUF" + b"four" * 5000
Q8 = b"GGUF" + b"eight" * 5000
EYES = b"GGUF" + b"eyes" * 100


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.add(REPO, {"tiny-Q4_K_M.gguf": Q4, "tiny-Q8_0.gguf": Q8, "mmproj-F16.gguf": EYES, "README.md": b"hello"})
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    with fake.running():
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path)


def make_store(home: Path, models_dir: Path | None = None) -> Store:
    return Store(models_dir=models_dir, allowed_roots=[], allow_downloads=True, gguf_owners=[], hf_home=home)


def pull(store: Store, ref: str) -> Path:
    return run(store.pull(ref, lambda p: None)).files.files[0]


def fetch_with_their_client(hub: FakeHub, home: Path, name: str) -> Path:
    return Path(huggingface_hub.hf_hub_download(REPO, name, cache_dir=home / "hub", endpoint=hub.endpoint, token=False))


def test_huggingface_hub_finds_what_we_downloaded(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    path = pull(store, f"{REPO}:Q8_0")
    assert huggingface_hub.try_to_load_from_cache(REPO, "tiny-Q8_0.gguf", cache_dir=tmp_path / "hub") == str(path)
    info = huggingface_hub.scan_cache_dir(tmp_path / "hub")
    assert info.warnings == []
    (repo,) = info.repos
    assert (repo.repo_id, repo.size_on_disk) == (REPO, len(Q8) + len(EYES))
    assert repo.refs["main"].commit_hash == hub.repos[REPO].commit


def test_huggingface_hub_fetches_nothing_that_we_downloaded(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    path = pull(store, f"{REPO}:Q8_0")
    hub.seen.clear()
    assert fetch_with_their_client(hub, tmp_path, "tiny-Q8_0.gguf") == path
    assert hub.downloads("tiny-Q8_0.gguf") == []


def test_what_huggingface_hub_downloaded_is_served_without_asking(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    path = fetch_with_their_client(hub, tmp_path, "tiny-Q8_0.gguf")
    hub.seen.clear()
    assert [m.id for m in store.on_disk()] == [f"{REPO}:Q8_0"]
    assert run(store.resolve(LoadRequest(source=f"{REPO}:Q8_0"), lambda p: None)).files == (path,)
    assert hub.seen == []


def test_removing_takes_the_blob_and_leaves_the_other_quant(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    q4, q8 = pull(store, f"{REPO}:Q4_K_M"), pull(store, f"{REPO}:Q8_0")
    blob = q4.resolve()
    gone = store.remove(f"{REPO}:q4_k_m", in_use=[])
    assert set(gone) == {q4, blob}
    assert not blob.exists()
    assert q8.read_bytes() == Q8
    assert (q8.parent / "mmproj-F16.gguf").read_bytes() == EYES
    assert [m.id for m in store.on_disk()] == [f"{REPO}:Q8_0"]


def test_removing_the_last_model_takes_projector_and_folder(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    pull(store, f"{REPO}:Q8_0")
    gone = store.remove(REPO, in_use=[])
    assert tmp_path / "hub" / "models--acme--tiny-GGUF" in gone
    assert list((tmp_path / "hub").glob("models--*")) == []
    assert store.on_disk() == []


def test_removing_leaves_what_another_tool_fetched_from_the_repository(
    hub: FakeHub, store: Store, tmp_path: Path
) -> None:
    readme = fetch_with_their_client(hub, tmp_path, "README.md")
    pull(store, f"{REPO}:Q8_0")
    store.remove(REPO, in_use=[])
    assert readme.read_bytes() == b"hello"


def test_a_file_of_an_older_commit_goes_too(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    old = pull(store, f"{REPO}:Q8_0")
    hub.repos[REPO].files["README.md"] = b"a new commit, the same weights"
    new = pull(store, f"{REPO}:Q8_0")
    assert old != new
    assert old.resolve() == new.resolve()
    assert {old, new, new.resolve()} <= set(store.remove(f"{REPO}:Q8_0", in_use=[]))


def test_a_loaded_model_s_files_are_not_removed_under_it(hub: FakeHub, store: Store) -> None:
    path = pull(store, f"{REPO}:Q8_0")
    for used in (path, path.resolve()):
        with pytest.raises(Conflict, match="is loaded: unload it first") as refused:
            store.remove(f"{REPO}:Q8_0", in_use=[used])
        assert refused.value.code == "model_in_use"
    assert path.read_bytes() == Q8


def test_a_name_that_means_several_is_not_guessed_at(hub: FakeHub, store: Store) -> None:
    pull(store, f"{REPO}:Q4_K_M")
    pull(store, f"{REPO}:Q8_0")
    with pytest.raises(BadRequest, match=f"{REPO}:Q4_K_M, {REPO}:Q8_0: name one"):
        store.remove(REPO, in_use=[])


def test_an_unknown_name_gets_the_nearest_ones(hub: FakeHub, store: Store) -> None:
    pull(store, f"{REPO}:Q8_0")
    with pytest.raises(ModelNotFound, match=f"did you mean {REPO}:Q8_0"):
        store.remove("acme/tinny-GGUF:Q8_0", in_use=[])


def test_an_interrupted_download_can_be_removed_unless_it_still_runs(store: Store, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--acme--tiny-GGUF"
    (repo / "blobs").mkdir(parents=True)
    partial = repo / "blobs" / f"{sha256(Q4)}.incomplete"
    partial.write_bytes(Q4[:100])
    locks = tmp_path / "hub" / ".locks" / repo.name
    locks.mkdir(parents=True)
    with (locks / f"{sha256(Q4)}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="is being downloaded"):
            store.remove(REPO, in_use=[])
    assert store.remove(REPO, in_use=[]) == [partial, repo]


def test_the_store_that_huggingface_hub_shares_between_repositories_is_emptied_too(
    hub: FakeHub, store: Store, tmp_path: Path
) -> None:
    """Its 2.x may make a blob a link to <cache>/blobs/<xx>/<hash>; another repository may link there as well."""
    path = pull(store, f"{REPO}:Q8_0")
    blob = path.resolve()
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    other = tmp_path / "hub" / "models--other--repo" / "blobs" / blob.name
    other.parent.mkdir(parents=True)
    other.symlink_to(Path("../../blobs/ab") / shared.name)

    store.remove(f"{REPO}:Q8_0", in_use=[])
    assert other.read_bytes() == Q8

    pull(store, f"{REPO}:Q8_0").resolve().unlink()
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    other.unlink()
    assert shared in store.remove(f"{REPO}:Q8_0", in_use=[])
    assert not shared.exists()
