"""vLLM's layers with weights in them and slots of vectors beside them."""

from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from ia3rt.serving.vllm import layers
from ia3rt.serving.vllm.slots import TokenSlots

IN, OUT, HEAD = 24, 16, 4
SLOTS = 3
ROWS = [1, SLOTS, 0, 1, 2]  # the last slot is left empty
LORA = SimpleNamespace(max_lora_rank=2, fully_sharded_loras=False, lora_dtype=torch.float32)


def layer_of(cls: type, base: torch.nn.Module) -> layers.IA3Layer:
    layer = cls(base)
    layer.create_lora_weights(SLOTS, LORA)
    layer.ia3_slots = TokenSlots(64, SLOTS, torch.device("cpu"))
    layer.ia3_slots.write(ROWS, lora=False)
    return layer


def load(base: torch.nn.Module, whole: dict[object, tuple[Tensor, Tensor]]) -> None:
    """Has vLLM's loaders cut the weights and biases; by shard, as its models do."""
    for shard, (weight, bias) in whole.items():
        more = () if shard is None else (shard,)
        base.weight.weight_loader(base.weight, weight, *more)
        base.bias.weight_loader(base.bias, bias, *more)
    # On a CPU vLLM packs the weight; it stays beside that, as on a GPU, where kernels read it.
    dispatch_cpu_unquantized_gemm(base, remove_weight=False)


def parts(sizes: dict[object, int]) -> dict[object, tuple[Tensor, Tensor]]:
    return {shard: (torch.randn(size, IN), torch.randn(size)) for shard, size in sizes.items()}


def worn(two: list[Tensor]) -> Tensor:
    """What the tokens wear: [len(ROWS), width]; slots 0 and 1 hold the two vectors."""
    ones = torch.ones_like(two[0])
    return torch.stack([two[row] if row < 2 else ones for row in ROWS])
