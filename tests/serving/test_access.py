"""Who reaches which folder, through vLLM's own resolver and doors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from doors import Doors
from fastapi import FastAPI
from small_adapters import write
from vllm.entrypoints.serve.middleware import authenticate
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from ia3rt.serving.settings import ALLOW_ADAPTERS
from ia3rt.serving.vllm import doors as our_doors
from ia3rt.serving.vllm import register

BASE = "some/model"


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture
def doors(own_store, tmp_path) -> Doors:
    made = Doors(BASE)
    made.models.lora_resolvers = [FilesystemResolver(str(tmp_path / "mine"))]
    return made


@pytest.fixture
def folders(tmp_path) -> Path:
    """An adapter within the resolver's folder, one beside it, and links from the one to the other."""
    mine = tmp_path / "mine"
    for name in ("a", "inner/b", "c"):
        write(mine / name, base_model_name_or_path=BASE)
    other = write(tmp_path / "other", 3.0, base_model_name_or_path=BASE)
    (mine / "link").symlink_to(other)
    (mine / "half").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (mine / "half" / name).symlink_to(other / name)
    (mine / "within").symlink_to(mine / "c")
    return mine


@pytest.mark.parametrize("name", ["a", "inner/b", "within", "a*c"])
def test_a_name_within_the_folder_is_resolved(doors, folders, name) -> None:
    assert doors.check(name) == (200, "")
    assert len(doors.engine.loaded) == name.count("*") + 1


@pytest.mark.parametrize(
    "name",
    [
        "../other",
        "a/../../other",
        "{tmp}/other",
        "link",
        "half",
        "./a",
        "a/",
        "inner//b",
        "a/../a",
        ".",
        "..",
        "/",
        "a\0",
        "a\n",
        "A" * 5000,
        "é" * 128,
    ],
)
def test_a_name_that_leads_elsewhere_finds_nothing(doors, folders, tmp_path, name) -> None:
    name = name.format(tmp=tmp_path)
    assert doors.check(name)[0] == 404
    assert doors.check(f"mix:a*0.5+{name}*0.5")[0] in (400, 404) or name.strip() == "a"  # white space is no name's
    assert {request.lora_name for request in doors.engine.asked} <= {"a"}


def test_a_lora_that_leads_elsewhere_is_not_found_either(doors, folders, tmp_path) -> None:
    config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": BASE}
    for folder in (tmp_path / "lora", folders / "lora"):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
    assert doors.check("../lora")[0] == 404 and doors.engine.asked == []
    assert doors.check("lora")[0] == 200 and len(doors.engine.asked) == 1


@pytest.mark.parametrize("trained_on", ["another/model", None])
def test_an_adapter_of_another_model_is_not_resolved(doors, folders, trained_on) -> None:
    more = {} if trained_on is None else {"base_model_name_or_path": trained_on}
    write(folders / "foreign", **more)
    assert doors.check("foreign")[0] == 404 and doors.engine.asked == []


@pytest.mark.parametrize("text", [b"{", b"[" * 200_000, b'{"peft_type": "LORA"}', b"\xef\xbb\xbf{}", b"7"])
def test_a_damaged_adapter_found_by_name_is_no_500(doors, folders, text) -> None:
    (folders / "bad").mkdir()
    (folders / "bad" / "adapter_config.json").write_bytes(text)
    status, told = doors.check("bad")
    assert status in (400, 404) and "\n" not in told
    assert doors.check("a") == (200, "")


def test_clients_load_from_the_allowed_folder_only(doors, folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(ALLOW_ADAPTERS, str(folders))
    assert doors.load("a", folders / "a").status_code == 200
    assert doors.load("within", folders / "within").status_code == 200
    monkeypatch.chdir(tmp_path)
    for path in (
        tmp_path / "other",
        f"{folders}/../other",
        "other",
        folders / "link",
        folders / "half",
        "someone/else",
    ):
        response = doors.load("x", path)
        assert response.status_code == 403 and "'x'" in response.json()["error"]["message"], path
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert doors.load("lora", lora).status_code == 403
    assert len(doors.engine.asked) == 2


def test_what_the_operator_named_is_loaded_from_anywhere(doors, folders, tmp_path, monkeypatch) -> None:
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    monkeypatch.setenv(ALLOW_ADAPTERS, str(folders))
    doors.models.static_lora_modules = [LoRAModulePath(name="other", path=str(tmp_path / "other"))]
    asyncio.run(doors.models.init_static_loras())
    assert set(doors.models.lora_requests) == {"other"}


def test_the_key_is_asked_for_at_every_door(monkeypatch) -> None:
    monkeypatch.setattr(authenticate, "GUARDED_PREFIX", authenticate.GUARDED_PREFIX)
    monkeypatch.setattr(
        authenticate.AuthenticationMiddleware, "__call__", authenticate.AuthenticationMiddleware.__call__
    )
    our_doors.install()
    app = FastAPI()
    for path in ("/v1/models", "/invocations", "/adapters", "/tokenize", "/new", "/health", "/metrics", "/healthy"):
        app.add_api_route(path, lambda: "served")
    app.add_middleware(authenticate.AuthenticationMiddleware, tokens=["secret"])

    async def ask(path: str, **headers: str) -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get(path, headers=headers)).status_code

    for path in ("/v1/models", "/invocations", "/adapters", "/tokenize", "/new", "/healthy"):
        assert asyncio.run(ask(path)) == 401
        assert asyncio.run(ask(path, Authorization="Bearer wrong")) == 401
        assert asyncio.run(ask(path, Authorization="Bearer secret")) == 200
    for path in ("/health", "/metrics"):
        assert asyncio.run(ask(path)) == 200
