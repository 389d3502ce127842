"""FullyShardedDataParallel averages gradients of what it was given, in forwards that it begins: else it is refused.

That of the whole model, put around it after `train_adapter`, is compared with one process in
test_models_split_over_processes.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tiny import logits, patched, tiny_model, token_ids
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

IDS = token_ids()


@pytest.fixture(autouse=True)
def a_group_of_one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def around(model: nn.Module, blocks: bool) -> FullyShardedDataParallel:
    policy = ModuleWrapPolicy({type(model.model.layers[0])}) if blocks else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("blocks", [True, False], ids=["around blocks", "around the model"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before patch", "after patch"])
def test_it_is_refused_where_the_model_is_in_it(is_first: bool, blocks: bool) -> None:
    model = tiny_model()
    if is_first:
        around(model, blocks)
    runtime = patched(model)
    if not is_first:
        around(model, blocks)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(
        ValueError, match=r"adapter 'a' cannot .* FullyShardedDataParallel .*fully_shard \(FSDP2\) or D"
    ):
        runtime.train_adapter(["a", "b"])
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_refused_where_blocks_are_put_in_it_meanwhile() -> None:
    runtime = patched(tiny_model())
    runtime.train_adapter("a")
    whole = around(runtime.model, blocks=True)
    with pytest.raises(RuntimeError, match=r"adapter 'a' is trained, and its vector at .* FullyShardedDataParallel"):
        whole(IDS)


def test_what_is_not_trained_is_worn() -> None:
    runtime = patched(tiny_model())
    runtime.set_adapter("a")
    before = logits(runtime.model, IDS)
    with torch.no_grad():
        assert torch.equal(around(runtime.model, blocks=True)(IDS).logits, before)
