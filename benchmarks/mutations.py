"""Damaged and hostile versions of a file: mutations of its bytes, and of what its format says.

A mutation is a function ``(bytes, random.Random) -> bytes``; those of tensors and pickles: :mod:`benchmarks.mutated_tensors`.
"""

import io
import random
import struct
from collections.abc import Callable

from benchmarks.mutated_tensors import (
    exploit,
    npz_array,
    npz_bomb,
    npz_header,
    packed_metadata,
    safetensors_header,
    torch_bomb,
    torch_payload,
    torch_value,
)

__all__ = ["BOMBS", "MUTATIONS", "Mutation"]

Mutation = Callable[[bytes, random.Random], bytes]

# -- bytes of any format


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    """A bit of the first 256 bytes, where most formats declare sizes."""
    out = bytearray(data)
    out[rng.randrange(min(256, len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[:rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 8, 100))) + data[at:]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two chunks of equal length change places."""
    length = rng.randint(1, max(1, len(data) // 4))
    a, b = sorted(rng.randrange(len(data) - length + 1) for _ in range(2))
    if b < a + length:
        return data[a:] + data[:a]
    return data[:a] + data[b:b + length] + data[a + length:b] + data[a:a + length] + data[b + length:]


def huge_number(data: bytes, rng: random.Random) -> bytes:
    """Four or eight bytes become a large integer: a declared length."""
    value = rng.choice((b"\xff" * 8, struct.pack("<q", 2**62), struct.pack("<q", 10**11), b"\xff\xff\xff\x7f", b"\xff" * 4))
    at = rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))))
    return data[:at] + value + data[at + len(value):]


def blank(data: bytes, rng: random.Random) -> bytes:
    """A part becomes zeros."""
    at, length = rng.randrange(len(data)), rng.randint(1, 4096)
    return data[:at] + bytes(len(data[at:at + length])) + data[at + length:]


def doubled(data: bytes, rng: random.Random) -> bytes:
    return data + data


def other(data: bytes, rng: random.Random) -> bytes:
    """Another kind of file altogether."""
    return rng.choice((
        b"", b"\0", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02.", b"[" * 100_000, b"\xff\xfe", b"{}", b"null",
        rng.randbytes(4096), b"a = " + b"[" * 50_000, b'{"a":' * 50_000, exploit(), b"\x93NUMPY\x01\x00" + bytes(100)))


BYTES: tuple[Mutation, ...] = (flip, flip_header, truncate, insert, swap, huge_number, blank, doubled, other)

# -- text

_VALUES = ("0", "-1", "1e400", "nan", "-inf", "9" * 5000, "99999999999", "true", '""', '"os:abort"', '"builtins:exec"', "[]", "{}",
           "[[[[1]]]]", "2024-01-01", "1.5", '"' + "x" * 50_000 + '"', '"\\u0000"', '"../../../etc/passwd"', '"../x.toml"',
           "[" * 2000 + "]" * 2000, "null", "1_000", '"zoo.models.cifar_resnet:resnet8"', '"torch.hub:load"',
           '"antigravity:geohash"', "2147483648", "9223372036854775808", "1e-320", "1e300", "[1e300, 1]", "12345678", "0.1",
           "3", "1000003")


def text_value(data: bytes, rng: random.Random) -> bytes:
    """One value of a TOML or JSON file becomes another, of any type and size."""
    lines = data.decode().splitlines()
    separator = ":" if lines[0].startswith("{") else "="
    at = rng.choice([i for i, line in enumerate(lines) if separator in line])
    key, comma = lines[at].split(separator)[0], "," if lines[at].endswith(",") else ""
    lines[at] = f"{key}{separator} {rng.choice(_VALUES)}{comma}"
    return "\n".join(lines).encode()


def text_line(data: bytes, rng: random.Random) -> bytes:
    """A line is dropped, doubled, or a hostile one comes in."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at:at + 1] = rng.choice((
        [], lines[at:at + 1] * 2, ["[preprocessing]"], ["[a.b.c]", *lines[at:at + 1]], ["epochs" + ".a" * 9000 + " = 1"],
        ["[" * 9000],
        ["a" + ".a" * 900 + " = 1"], ["seed" + ".a" * 300 + " = 1"], ['"\\ud800" = 1'], ["'''"], ["[[x]]"], ["\u2028"]))
    return "\n".join(lines).encode()


# -- ONNX


def onnx_node(data: bytes, rng: random.Random) -> bytes:
    """A valid message of a hostile network: huge shapes, loops, files outside, missing tensors, other operators."""
    import onnx
    from onnx import TensorProto, helper
    model = onnx.load_from_string(data)
    graph, choice = model.graph, rng.randrange(12)
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer) if graph.initializer else None
    if choice == 0 and tensor is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        place = rng.choice(("/etc/passwd", "../../../../../../etc/passwd", "model.onnx", "absent.bin", "/dev/zero"))
        for key, value in (("location", place), ("length", str(rng.choice((4, 10**12)))), ("offset", "0")):
            tensor.external_data.add(key=key, value=value)
    elif choice == 1 and tensor is not None:
        tensor.dims[:] = rng.choice(([2**40], [2**31, 2**31], [-1], [0], [10**9]))
    elif choice == 2:
        rng.choice(graph.input[0].type.tensor_type.shape.dim).dim_value = rng.choice((10**6, 10**12, 2**62, -1, 0))
    elif choice == 3:
        node.op_type = rng.choice((
            "Loop", "If", "Scan", "Expand", "Tile", "NoSuchOp", "Conv", "Quant", "Reshape", "Add", "Range"))
    elif choice == 4:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "absent", node.output[0])) if node.input else "absent"
    elif choice == 5:
        shape = rng.choice(([10**6, 10**6], [2**62], [10**10], [2**31]))
        graph.initializer.append(helper.make_tensor("hostile_shape", TensorProto.INT64, [len(shape)], shape))
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["hostile_shape"], ["hostile"]))
        graph.node.append(helper.make_node("ReduceSum", ["hostile"], ["hostile_sum"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info("hostile_sum", TensorProto.FLOAT, None))
    elif choice == 6:
        _endless_loop(graph)
    elif choice == 7:
        del node.attribute[:]
    elif choice == 8 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.ints[:] = [rng.choice((-1, 0, 2**31, 2**62)) for _ in attribute.ints]
        attribute.i = rng.choice((-1, 0, 2**40))
    elif choice == 9:
        del graph.output[:]
    elif choice == 10:
        for entry in model.metadata_props:
            entry.value = rng.choice((entry.value, "", "[" * 50_000, "null", "[1]", '[["a", "b"]]', "{}"))
    else:
        graph.node.extend([node] * rng.choice((1, 100)))
    if rng.random() < 0.8:  # the digest that our files carry is no secret: a hostile file has none, or its own
        kept = [p for p in model.metadata_props if not p.key.endswith("sha256")]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
    return model.SerializeToString()


def _endless_loop(graph) -> None:
    from onnx import TensorProto, helper
    kinds = dict(i=TensorProto.INT64, go=TensorProto.BOOL, go_on=TensorProto.BOOL, state=TensorProto.FLOAT, next=TensorProto.FLOAT)
    values = {name: helper.make_tensor_value_info(name, kind, []) for name, kind in kinds.items()}
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["state"], ["next"])], "body",
        [values["i"], values["go"], values["state"]], [values["go_on"], values["next"]])
    graph.initializer.append(helper.make_tensor("hostile_count", TensorProto.INT64, [], [2**62]))
    graph.initializer.append(helper.make_tensor("hostile_go", TensorProto.BOOL, [], [True]))
    graph.initializer.append(helper.make_tensor("hostile_state", TensorProto.FLOAT, [], [0.0]))
    graph.node.insert(0, helper.make_node("Loop", ["hostile_count", "hostile_go", "hostile_state"], ["hostile_end"], body=body))
    graph.output.append(helper.make_tensor_value_info("hostile_end", TensorProto.FLOAT, []))


# -- images


def image(data: bytes, rng: random.Random) -> bytes:
    """A valid image of an absurd size or mode."""
    from PIL import Image
    size, mode = rng.choice((
        ((1, 60_000), "L"), ((60_000, 1), "RGB"), ((14_000, 14_000), "1"), ((9_000, 9_000), "1"), ((1, 1), "RGB"),
        ((16, 16), "I;16"), ((16, 16), "P"), ((8, 8), "LA"), ((16, 16), "RGBA")))
    out = io.BytesIO()
    Image.new(mode, size).save(out, "png")
    return out.getvalue()


def png_size(data: bytes, rng: random.Random) -> bytes:
    """The header of a PNG declares another size."""
    import zlib
    if not data.startswith(b"\x89PNG"):
        return flip_header(data, rng)
    width, height = (rng.choice((0, 1, 7, 2**31 - 1, 50_000, 10**6)) for _ in range(2))
    chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "safetensors": (*BYTES, *[safetensors_header] * 6),
    "packed": (*BYTES, *[safetensors_header] * 3, *[packed_metadata] * 6),
    "torch": (*BYTES, *[torch_value] * 8, torch_payload),
    "torch legacy": BYTES,
    "npz": (*BYTES, *[npz_array] * 6, *[npz_header] * 4),
    "toml": (*BYTES, *[text_value] * 12, *[text_line] * 4),
    "json": (*BYTES, *[text_value] * 12, *[text_line] * 4),
    "csv": BYTES,
    "pickle": BYTES,
    "onnx": (*BYTES, *[onnx_node] * 12),
    "image": (*BYTES, *[image] * 2, *[png_size] * 2),
}
"""By kind of file; a mutation that stands there several times is drawn more often."""

BOMBS: dict[str, Mutation] = {"torch": torch_bomb, "npz": npz_bomb}
"""Files that unpack to a gigabyte: slow to make, so tried once each."""

