"""The soak's hostile clients and mishaps: each does what has once spoilt others' answers or ended the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch
from soak_traffic import ADAPTERS, SWAPPED, UNREADABLE, Traffic, Version, http_client
from soak_truth import LAYERS, LORA, WIDTHS, Reference, Worn

LONG = "A" * 5000


class Faults:
    """What may happen to a server.

    Args:
        traffic: whose server it is, and what has to know of what happens.
        reference: writes adapters.
        originals: the folder of the adapters' folders, which are named by their numbers, and of `lora`.
        hostile: a folder for what nobody should load, which clients may load from; and its parent, from which not.
        store: the server's store.
    """

    def __init__(self, traffic: Traffic, reference: Reference, originals: Path, hostile: Path, store: Path) -> None:
        self._traffic, self._reference, self._chance = traffic, reference, traffic.chance
        self._originals, self._hostile, self._store = originals, hostile, store
        self._made = 0
        self._busy: set[str] = set()

    async def one(self, http: httpx.AsyncClient) -> None:
        """Does one of them."""
        name = self._chance.choice(KINDS)
        await getattr(self, f"_{name}")(http)
        self._traffic.counts[name] += 1

    async def _ask(self, http: httpx.AsyncClient, model: str, expected: tuple[int, ...], **more: object) -> None:
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 2, **more}
        await self._post(http, "/v1/completions", expected, body)

    async def _load(self, http: httpx.AsyncClient, name: str, path: Path | str, *expected: int, **more: object) -> None:
        body = {"lora_name": name, "lora_path": str(path), **more}
        await self._post(http, "/v1/load_lora_adapter", expected, body)

    async def _is_loaded(self, http: httpx.AsyncClient, name: str, path: Path, **more: object) -> bool:
        """Loads what nobody could object to, unless its original is away now."""
        body = {"lora_name": name, "lora_path": str(path), **more}
        response = await http.post(f"{self._traffic.url}/v1/load_lora_adapter", json=body)
        if response.status_code != 200 and not self._is_troubled():
            self._traffic.wrong_statuses.append(f"{path} as {name}: {response.status_code} {response.text[:300]}")
        return response.status_code == 200

    async def _post(self, http: httpx.AsyncClient, door: str, expected: tuple[int, ...], body: dict) -> None:
        response = await http.post(f"{self._traffic.url}{door}", json=body)
        if response.status_code in UNREADABLE and self._is_troubled():
            return
        if response.status_code not in expected or response.text.count("A") > 200:
            told = f"{door} {str(body)[:200]}: {response.status_code} {response.text[:300]}"
            self._traffic.wrong_statuses.append(told)

    # Poison: what overflows, or could.

    async def _weights_that_overflow(self, http: httpx.AsyncClient) -> None:
        a, b = self._traffic.adapters(2)
        for name in (f"mix:{a}*1e38+{b}*0.3", f"delta:{a}*-1e300", f"mix:{a}*1e5", f"mix:{a}*nan", f"mix:{a}*1e999"):
            await self._ask(http, name, (400,))

    async def _large_scales(self, http: httpx.AsyncClient) -> None:
        """As large as is allowed; what comes of it is nobody else's."""
        a, b = self._traffic.adapters(2)
        names = (f"mix:{a}*300+{b}*-300", f"delta:{a}*-350", "*".join([str(a)] * 9))
        await asyncio.gather(*(self._ask(http, name, (200, 400), max_tokens=40) for name in names))

    async def _hostile_vectors(self, http: httpx.AsyncClient) -> None:
        value = self._chance.choice([3e38, -3e38, 1e20, float("nan"), float("inf")])
        vectors = {
            f"model.layers.{layer}.{name}": torch.full((width,), value)
            for layer in range(LAYERS)
            for name, width in WIDTHS.items()
        }
        folder = self._reference.write(self._new_folder(), vectors)
        await self._load(http, "hostile", folder, 400)
        shutil.rmtree(folder)

    # Numbers and names.

    async def _unknown_names(self, http: httpx.AsyncClient) -> None:
        stem = f"nobody{self._chance.randrange(10**9)}"
        await self._ask(http, "*".join(f"{stem}{number}" for number in range(64)), (404,))
        for number in range(8):
            await self._ask(http, f"{stem}-{number}", (404,))
        await self._ask(http, LONG, (404,))
        await self._ask(http, f"mix:{LONG}*{LONG}", (400,))

    async def _names_that_lead_out(self, http: httpx.AsyncClient) -> None:
        inside = self._originals / "0"
        for name in ("../../x", str(inside), f"../{self._originals.name}/0", "..", "0/../1", "./0", "x\0y", "~"):
            await self._ask(http, name, (400, 404))
        await self._ask(http, "../hostile/1", (404,))

    async def _names_like_our_own(self, http: httpx.AsyncClient) -> None:
        name = self._chance.choice(["x#1", "x@ia3:51", "a#7#8", "chat#3", f"{self._chance.randrange(ADAPTERS)}#1"])
        if name in self._busy:
            return
        self._busy.add(name)
        if await self._is_loaded(http, name, self._originals / str(self._traffic.adapter())):
            await self._ask(http, name, (200,))
            await self._post(http, "/v1/unload_lora_adapter", (200,), {"lora_name": name})
            await self._ask(http, name, (404,))
        self._busy.remove(name)

    async def _names_that_mean_mixes(self, http: httpx.AsyncClient) -> None:
        for name in ("0*1", "mix:0", "delta:1*2"):
            await self._load(http, name, self._originals / "0", 400)
        await self._load(http, "inner", 'ia3rt-mix:{"adapters": ["0"]}', 400)

    async def _another_kind(self, http: httpx.AsyncClient) -> None:
        """A name gets to mean something else, in place or after having been unloaded, while requests wear it."""
        name = self._chance.choice(SWAPPED)
        if name in self._busy:
            return
        self._busy.add(name)
        number = self._chance.choice([None, self._traffic.adapter(), self._traffic.adapter()])
        worn, folder = (LORA, "lora") if number is None else (Worn((number,)), str(number))
        versions = self._traffic.versions[name]
        versions.append(Version(worn, time.monotonic()))
        if await self._is_loaded(http, name, self._originals / folder, load_inplace=True):
            versions[-1].answered = time.monotonic()
        else:
            versions.pop()
        self._busy.remove(name)

    # The store and the originals.

    async def _store_is_removed(self, http: httpx.AsyncClient) -> None:
        with self._trouble():
            shutil.rmtree(self._store, ignore_errors=True)

    async def _copies_are_damaged(self, http: httpx.AsyncClient) -> None:
        with self._trouble():
            copies = self._copies()
            for folder in self._chance.sample(copies, min(5, len(copies))):
                with contextlib.suppress(OSError):
                    self._damage(folder / "adapter_model.safetensors")

    def _copies(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):  # somebody removes the store now
            return [folder for folder in self._store.iterdir() if folder.is_dir()]
        return []

    def _damage(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        if not content:
            return  # it is damaged already
        if self._chance.random() < 0.5:
            content = content[: self._chance.randrange(len(content))]
        else:  # another number, in a file that is one
            content[-self._chance.randint(1, min(199, len(content)))] ^= 0x40
        file.write_bytes(content)

    async def _original_is_away(self, http: httpx.AsyncClient) -> None:
        """And a while later there again."""
        folder = self._originals / str(self._traffic.adapter())
        if folder.name in self._busy:
            return
        self._busy.add(folder.name)
        with self._trouble():
            away = folder.rename(folder.with_name(f"{folder.name}-away"))
            copies = self._copies()
            for copy in self._chance.sample(copies, len(copies) // 4):
                shutil.rmtree(copy, ignore_errors=True)
            await asyncio.sleep(0.5)
            away.rename(folder)
        self._busy.remove(folder.name)

    # Files that are none.

    async def _odd_files(self, http: httpx.AsyncClient) -> None:
        folder = self._new_folder()
        shutil.copytree(self._originals / "lora", folder)
        config, kind = folder / "adapter_config.json", self._chance.randrange(6)
        if kind == 0:
            config.unlink()
            os.mkfifo(config)
        elif kind == 1:
            config.write_text('{"peft_type": "IA3", "target_modules": ["k_proj"]}')
            with (folder / "adapter_model.safetensors").open("wb") as file:
                file.truncate(3 << 30)
        elif kind == 2:
            config.write_text('{"peft_type": "IA3", "x": ' + "[" * 100_000)
        elif kind == 3:
            config.write_bytes(b"\xff\xfe\x00{" + os.urandom(100))
        elif kind == 4:
            with config.open("wb") as file:
                file.truncate(200 << 20)
        else:
            config.write_text('{"peft_type": "IA3", "peft_type": 7}')
        await self._load(http, "odd", folder, 400)
        shutil.rmtree(folder)

    async def _paths_that_are_none(self, http: httpx.AsyncClient) -> None:
        paths = ("/nowhere", "/" + LONG, "\0", "a\nb", "/proc/self/fd/0", str(self._hostile.parent), "/etc", "~root")
        for path in paths:
            await self._load(http, "odd", path, 400, 403, 404)

    async def _bodies_that_are_none(self, http: httpx.AsyncClient) -> None:
        for body in (LONG, [LONG], {LONG: 1}, {"ids": LONG}, {"ids": ["0*1"]}, {"ids": ["0"], "weights": [LONG]}, {}):
            await self._ask(http, "base", (400,), merged_adapters=body)
        deep = '{"model": "base", "prompt": "x", "merged_adapters": ' + "[" * 5000 + "]" * 5000 + "}"
        headers = {"Content-Type": "application/json"}
        response = await http.post(f"{self._traffic.url}/v1/completions", content=deep, headers=headers)
        if response.status_code not in (400, 422):
            self._traffic.wrong_statuses.append(f"a deep body: {response.status_code} {response.text[:300]}")

    # Clients that go.

    async def _clients_that_go(self, http: httpx.AsyncClient) -> None:
        """In the middle of their answers, in the middle of a load."""
        names = ["base", *map(str, self._traffic.adapters(3)), "*".join(map(str, self._traffic.adapters(5)))]
        work = [asyncio.create_task(self._ask(http, name, (200,), max_tokens=60)) for name in names]
        work.append(asyncio.create_task(self._load(http, "gone", self._originals / "1", 200, 400, load_inplace=True)))
        await asyncio.sleep(self._chance.uniform(0, 0.1))
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def _new_folder(self) -> Path:
        self._made += 1
        return self._hostile / str(self._made)

    def _is_troubled(self) -> bool:
        return any(end > time.monotonic() - 5 for _, end in self._traffic.troubles[-20:])

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        """Requests that wait meanwhile may fail, as their adapters cannot be read."""
        trouble = [time.monotonic(), float("inf")]
        self._traffic.troubles.append(trouble)
        try:
            yield
        finally:
            trouble[1] = time.monotonic()


KINDS = [name[1:] for name, made in vars(Faults).items() if asyncio.iscoroutinefunction(made) and name[0] == "_"]
KINDS = [name for name in KINDS if name not in ("ask", "load", "is_loaded", "post")]


async def happen(faults: Faults, until: asyncio.Task, pause: float) -> None:
    """Lets faults happen, with pauses, until a task is done."""
    async with http_client() as http:
        while not until.done():
            await faults.one(http)
            await asyncio.sleep(pause)
