"""The small decisions around a download. The downloads themselves are in tests/integration/store."""

from __future__ import annotations

from email.message import Message
from pathlib import Path

import pytest

from helexa.core.errors import HelexaError, LoadFailed, ModelNotFound, PermissionDenied
from helexa.core.lifecycle import Progress
from helexa.neuron.store.cache import cache_root
from helexa.neuron.store.download import Meter, starts_at
from helexa.neuron.store.hub import Hub, find_token, is_offline, retry_delay


@pytest.mark.parametrize(
    ("env", "root"),
    [
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(env: dict[str, str], root: str) -> None:
    assert cache_root(None, env, None) == Path(root)


def test_the_cache_is_below_home_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    assert cache_root(None, {}, None) == Path("/home/u/.cache/huggingface/hub")


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"TRANSFORMERS_OFFLINE": "yes"}, "TRANSFORMERS_OFFLINE"),
        ({"HF_HUB_OFFLINE": "0"}, None),
        ({}, None),
    ],
)
def test_offline_is_what_huggingface_hub_takes_for_it(env: dict[str, str], name: str | None) -> None:
    assert is_offline(env) == name


def test_the_token_is_the_variable_s_or_the_login_s(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    assert find_token({"HF_TOKEN": " hf_env ", "HF_HOME": str(tmp_path)}) == "hf_env"
    assert find_token({"HF_HOME": str(tmp_path)}) == "hf_file"
    assert find_token({"HF_TOKEN_PATH": str(tmp_path / "none"), "HF_HOME": str(tmp_path)}) is None


def test_pauses_double_up_to_half_a_minute_unless_the_server_says_how_long() -> None:
    assert [retry_delay(n, 0.5, None) for n in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert retry_delay(0, 0.5, "7") == 7
    assert retry_delay(0, 0.5, "3600") == 30
    assert retry_delay(0, 0.5, "Wed, 21 Oct 2026 07:28:00 GMT") == 0.5


@pytest.mark.parametrize(
    ("header", "start", "ok"),
    [("bytes 5-9/10", 5, True), ("bytes 50-99/100", 5, False), ("bytes 0-9/10", 5, False), (None, 0, False)],
)
def test_a_range_must_begin_where_it_was_asked_to(header: str | None, start: int, ok: bool) -> None:
    assert starts_at(header, start) is ok


@pytest.mark.parametrize(
    ("status", "code", "token", "error", "words"),
    [
        (403, "GatedRepo", None, PermissionDenied, "accept its terms"),
        (403, "GatedRepo", "t", PermissionDenied, "this HF_TOKEN has no access"),
        (401, "RepoNotFound", None, ModelNotFound, "or is private"),
        (401, "", None, ModelNotFound, "or is private"),
        (401, "", "t", PermissionDenied, "does not accept this HF_TOKEN"),
        (404, "RepoNotFound", "t", ModelNotFound, "there is no repository a/b at https://hub; check the name"),
        (404, "EntryNotFound", None, ModelNotFound, "no longer"),
        (418, "", None, LoadFailed, "418"),
    ],
)
def test_a_refusal_names_the_way_out(
    status: int, code: str, token: str | None, error: type[HelexaError], words: str
) -> None:
    headers = Message()
    headers["X-Error-Code"] = code
    refused = Hub("https://hub", token).refused("a/b", status, headers)
    assert type(refused) is error
    assert words in str(refused)


@pytest.mark.parametrize("status", [200, 206, 408, 429, 500, 502, 503, 504])
def test_answers_and_passing_trouble_are_no_refusal(status: int) -> None:
    assert Hub("https://hub", None).refused("a/b", status, Message()) is None


def test_the_rate_is_of_what_was_received_and_not_of_what_was_there() -> None:
    told: list[Progress] = []
    now = 0.0
    meter = Meter(1000, told.append, clock=lambda: now)
    meter.resumed(600)
    assert told[-1] == Progress(phase="downloading", fraction=0.6, bytes_done=600, bytes_total=1000)
    now = 10.0
    meter.at(700)
    assert told[-1].eta_seconds == 30  # 100 bytes in ten seconds, 300 to go
    meter.at(701)
    assert len(told) == 2  # not a word for every chunk
    meter.finish()
    assert told[-1] == Progress(phase="downloading", fraction=1.0, bytes_done=1000, bytes_total=1000)


def test_an_empty_download_has_no_fraction() -> None:
    told: list[Progress] = []
    Meter(0, told.append).finish()
    assert told[-1].fraction is None
