"""torch's dtypes by the names that stand in a checkpoint, and which tensors can be stored exactly."""

import torch

from asyncckpt.format.dtypes import DTYPES

BY_NAME: dict[str, torch.dtype] = {
    name: found for name in DTYPES if isinstance(found := getattr(torch, name, None), torch.dtype)
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in BY_NAME.items()}

PLAIN_KINDS = (torch.Tensor, torch.nn.Parameter)


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's own name without the module: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def complaint(tensor: torch.Tensor) -> str | None:  # noqa: PLR0911 - a reason for each kind, in the order to ask
    """Why this tensor of a plain kind cannot be stored exactly, with the way out; None: it can."""
    if tensor.is_meta:
        return "a meta tensor has no values; materialise it first (`module.to_empty(device=...)` and initialise)"
    if tensor.is_nested:
        return "nested tensors are not stored; store `tensor.values()` and `tensor.offsets()`"
    if tensor.is_quantized:
        return "quantized tensors are not stored; store `tensor.int_repr()` with its scale and zero point"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout} is not stored; use `tensor.to_dense()`, or store indices and values"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor inside a torch.func transform has no storage of its own; save outside the transform"
    if tensor.dtype not in NAMES:
        return f"dtype {tensor.dtype} is not stored; view it as torch.uint8"
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return "its storage was freed (resized to 0 bytes); gather the full parameters before saving"
    return None


def kind_complaint(kind: type) -> str:
    """Why tensors of this subclass are refused, with the way out."""
    name = kind.__name__
    if name in ("UninitializedParameter", "UninitializedBuffer"):
        return f"{name} of a lazy module has no values yet; run one forward pass before saving"
    if name == "DTensor":
        return "DTensor is not stored yet; store `tensor.full_tensor()`, or replicate the state (DDP)"
    if name == "FakeTensor":
        return "a FakeTensor has no values; save outside FakeTensorMode"
    return f"tensor subclass {kind.__module__}.{kind.__qualname__} is not stored; store the plain tensors it is made of"
