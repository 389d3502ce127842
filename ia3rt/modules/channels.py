"""Layers that are no linear ones and wear vectors all the same: what goes over the channels of a convolution, and what
an embedding gives.
"""

from __future__ import annotations

from torch import Tensor, nn

from ia3rt.modules.wearer import original_class

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def channel_widths(module: nn.Module) -> tuple[int | None, int] | None:
    """The lengths (in, out) of the vectors that a convolution or an embedding can wear; None for any other module.

    An embedding's input are indices, which nothing scales: None there. A lazy convolution has no widths before its
    first forward.
    """
    if isinstance(module, CONVOLUTIONS) and module.in_channels:
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding):
        return None, module.embedding_dim
    return None


def spatial_dims(module: nn.Module) -> int:
    """How many dimensions of what a module scales come after the one that a vector goes over: 2 for a Conv2d."""
    return len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0


def channel_weight(path: str, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a convolution or an embedding, where scaling them is scaling its output or input.

    Args:
        path: the layer's, for the error.
        layer: of which `channel_widths` are known.

    Raises:
        ValueError: its weight is no parameter of its own but computed for each forward, or of another kind, or has
            a max_norm, or the layer's class computes in a way of its own: with a standardised weight, say, a scale in
            it is lost.
    """
    kind = original_class(type(layer))
    torchs = next(base for base in (*CONVOLUTIONS, nn.Embedding) if issubclass(kind, base))
    computing = ("forward",) if torchs is nn.Embedding else ("forward", "_conv_forward")
    own = [name for name in computing if getattr(kind, name) is not getattr(torchs, name)]
    weight = layer._parameters.get("weight")
    if own:
        raise ValueError(
            f"cannot merge into {path!r}: a {kind.__name__} has a {own[0]} of its own, by which a scale in its weight "
            f"may be none of its output; only {torchs.__name__}'s own is known to be"
        )
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"cannot merge into {path!r}: its {kind.__name__} has max_norm={layer.max_norm}, which shortens a row "
            "of its weight when it is looked up: a scale in it is lost"
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        seen = "no parameter" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        raise ValueError(f"cannot merge into {path!r}: its weight is {seen}, and not a plain one of floating point")
    return weight, layer._parameters.get("bias")


def scaled_channels(layer: nn.Module, weight: Tensor, s_in: Tensor | None, s_out: Tensor | None) -> Tensor:
    """W ← diag(s_out) W diag(s_in) over channels.

    Args:
        layer: a convolution or an embedding.
        weight: of a convolution [out, in / groups, *kernel], of an embedding [indices, width].
        s_in: [in]; None where nothing scales the input. Each group of outputs reads its own part of it.
        s_out: [out] or [width]; None where nothing scales the output.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return weight if s_out is None else weight * s_out
    kernel = (1,) * (weight.dim() - 2)
    if s_in is not None:
        by_group = s_in.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)
        weight = weight * by_group.view(*by_group.shape, *kernel)
    return weight if s_out is None else weight * s_out.view(-1, 1, *kernel)
