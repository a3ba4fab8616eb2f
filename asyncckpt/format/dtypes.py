"""Every element type that can be stored, under torch's names without `torch.`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """`safetensors`: its name there, or None: stored as a flat tensor of U8. `planes`: gains from byte planes."""

    element_bytes: int
    safetensors: str | None
    planes: bool = False


DTYPES: dict[str, DType] = {
    "bool": DType(1, "BOOL"),
    "uint8": DType(1, "U8"),
    "int8": DType(1, "I8"),
    "uint16": DType(2, "U16"),
    "int16": DType(2, "I16"),
    "uint32": DType(4, "U32"),
    "int32": DType(4, "I32"),
    "uint64": DType(8, "U64"),
    "int64": DType(8, "I64"),
    "float16": DType(2, "F16", planes=True),
    "bfloat16": DType(2, "BF16", planes=True),
    "float32": DType(4, "F32", planes=True),
    "float64": DType(8, "F64", planes=True),
    "float8_e4m3fn": DType(1, "F8_E4M3"),
    "float8_e5m2": DType(1, "F8_E5M2"),
    # the rest has no name in safetensors 0.5, the oldest version that must open a shard
    "float8_e4m3fnuz": DType(1, None),
    "float8_e5m2fnuz": DType(1, None),
    "float8_e8m0fnu": DType(1, None),
    "float4_e2m1fn_x2": DType(1, None),  # one element of torch: a byte that holds two
    "complex32": DType(4, None),
    "complex64": DType(8, None),
    "complex128": DType(16, None),
}
"""Types of torch that are missing here (quantized, bit and sub-byte integer types) cannot be stored."""
