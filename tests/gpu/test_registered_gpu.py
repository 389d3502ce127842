"""Registered adapters on a GPU: threads with streams of their own bring adapters in while others' kernels read rows."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import patched, tiny_model, token_ids

import ia3rt

NAMES = "abcdefgh"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runtime = patched(tiny_model(), NAMES)
    for name in NAMES:
        runtime.save_adapter(name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("own_streams", [False, True])
def test_no_row_is_written_while_a_kernel_reads_it(folder, backend, own_streams) -> None:
    model, ids = tiny_model("llama", torch.bfloat16).cuda(), token_ids(3).cuda()
    right = {}
    roomy = ia3rt.patch(tiny_model("llama", torch.bfloat16).cuda(), backend=backend)
    with torch.no_grad():
        for name in NAMES:
            roomy.load_adapter(folder / name)
            with roomy.route([name] * 3):
                right[name] = roomy.model(ids, use_cache=False).logits
    torch.cuda.synchronize()
    runtime = ia3rt.patch(model, backend=backend, capacity=4, grow=False)
    runtime.register(folder)
    end, wrong, done = time.monotonic() + 3, [], []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
        try:
            with torch.cuda.stream(stream), torch.no_grad():
                while time.monotonic() < end and not wrong:
                    rows = chance.sample(NAMES, 2)
                    rows.append(rows[0])
                    if chance.random() < 0.3:
                        runtime.prefetch(chance.choice(NAMES))
                    try:
                        with runtime.route(rows):
                            given = model(ids, use_cache=False).logits
                    except ValueError as error:
                        if "wanted" not in str(error):
                            raise
                        continue
                    torch.cuda._sleep(chance.randrange(10**6))
                    done.append(rows)
                    stream.synchronize()
                    wrong.extend(
                        (name, row) for row, name in enumerate(rows) if not torch.equal(given[row], right[name][row])
                    )
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) > 20 and runtime.stats().evictions > 5
