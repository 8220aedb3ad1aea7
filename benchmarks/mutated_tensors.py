"""Hostile versions of the files that hold tensors: torch's, numpy's, safetensors; and pickles that run code.

:data:`CANARY` is an environment variable: a payload that is run makes the file that it names.
"""

import io
import json
import pickle
import random
import struct
import zipfile

__all__ = ["CANARY", "Exploit", "exploit", "npz_array", "npz_bomb", "npz_header", "packed_metadata", "safetensors_header",
           "torch_bomb", "torch_payload", "torch_value"]

CANARY = "GRANQ_CANARY"

# -- pickles


class Exploit:
    """Unpickled without protection, it makes the canary's file."""

    def __reduce__(self):
        return (exec, (f"import os; open(os.environ['{CANARY}'], 'w').close()", ))


def exploit() -> bytes:
    return pickle.dumps(Exploit())


def _torch_bytes(value) -> bytes:
    import torch
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def torch_value(data: bytes, rng: random.Random) -> bytes:
    """Another value at a random place of a torch file: payloads, wrong types and shapes, NaN, tensors without memory."""
    import torch
    value = torch.load(io.BytesIO(data), weights_only=True)
    place, path = value, []
    while isinstance(place, (dict, list)) and len(place) and (not path or rng.random() < 0.8):
        path.append((place, rng.choice(list(place) if isinstance(place, dict) else range(len(place)))))
        place = path[-1][0][path[-1][1]]
    like = place if isinstance(place, torch.Tensor) else torch.ones(2)
    new = rng.choice((
        lambda: Exploit(), lambda: None, lambda: "text", lambda: 10**30, lambda: -1, lambda: float("nan"), lambda: [], lambda: {},
        lambda: torch.full_like(like, float("nan")) if like.is_floating_point() else like.float(),
        lambda: like.to(torch.complex64), lambda: like.double(), lambda: like.to(torch.int8), lambda: torch.zeros(0),
        lambda: torch.zeros(1).expand(10**11),
        lambda: torch.zeros(1).expand(10**6, 10**5), lambda: torch.empty(like.shape, device="meta"),
        lambda: like.reshape(-1)[None].to_sparse() if like.numel() else like, lambda: torch.zeros(3, 1).expand(3, 2**36)))()
    parent, key = path[-1]
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = new
    return _torch_bytes(value)


def torch_bomb(data: bytes, rng: random.Random) -> bytes:
    """The archive's records compressed, one of them a gigabyte of zeros."""
    return _rezipped(data, rng, 2**30, lambda name: name.split("/")[-2:-1] == ["data"])


def torch_payload(data: bytes, rng: random.Random) -> bytes:
    """The archive's own pickle becomes a payload."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, exploit() if info.filename.endswith("data.pkl") else old.read(info))
    return out.getvalue()


def _rezipped(data: bytes, rng: random.Random, size: int, chosen) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        names = [i.filename for i in old.infolist()]
        bomb = rng.choice([n for n in names if chosen(n)] or names)
        for name in names:
            with new.open(name, "w", force_zip64=True) as entry:
                entry.write(old.read(name))
                for _ in range(size // 2**24 if name == bomb else 0):
                    entry.write(bytes(2**24))
    return out.getvalue()


# -- arrays


def npz_array(data: bytes, rng: random.Random) -> bytes:
    """Other arrays: dtypes, shapes, labels, pickled objects, names that leave the folder."""
    import numpy as np
    with np.load(io.BytesIO(data)) as arrays:
        stored = dict(arrays)
    x, y = stored["x"], stored["y"]
    hostile = np.array([Exploit()], dtype=object)
    stored |= rng.choice((
        dict(x=hostile), dict(y=hostile), dict(x=x.astype(np.float32) * np.nan), dict(x=x.astype(np.complex64)), dict(x=x[0]),
        dict(x=x[:0], y=y[:0]), dict(x=x[:, :0]), dict(x=x[:, :, :, :2]), dict(y=y.astype(float)), dict(y=y - 100), dict(y=y + 100),
        dict(y=y.astype(np.uint64) + np.uint64(2**63)), dict(y=y[:-1]), dict(x=np.zeros((), np.uint8)), dict(y=np.zeros((), int)),
        dict(x=np.zeros(4, dtype=[("a", "u1")])), {"../escaped": x}, {"/escaped": x}, dict(x=np.zeros((0, 8, 8, 3), np.uint8)),
        dict(x=np.array(["text"])), dict(y=y.astype("datetime64[s]")), dict(x=x.transpose(0, 3, 1, 2)), dict(extra=hostile)))
    for name in [n for n in ("x", "y") if rng.random() < 0.05]:
        del stored[name]
    out = io.BytesIO()
    np.savez(out, **stored)
    return out.getvalue()


def npz_header(data: bytes, rng: random.Random) -> bytes:
    """An array's own header declares another shape, dtype or order, or is no literal."""
    import numpy as np
    with np.load(io.BytesIO(data)) as arrays:
        stored = dict(arrays)
    out, name = io.BytesIO(), rng.choice(("x", "y"))
    header = rng.choice((
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rng.choice((10**6, 10**10, 2**60, -1))}, 8, 8, 3), }}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 0, 8, 3), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (40,), }", "{'descr': '<i8', 'fortran_order': True, 'shape': (40,), }",
        "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (40,), }",
        "__import__('os').mkdir('escaped')", "(" * 5000, "{" + "'a':" * 2000, "{'descr': '|V0', 'fortran_order': 0, 'shape': ()}"))
    text = header.encode() + b"\n"
    with zipfile.ZipFile(out, "w") as new:
        for key, value in stored.items():
            raw = io.BytesIO()
            np.save(raw, value)
            if key == name:
                raw = io.BytesIO(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + value.tobytes())
            new.writestr(f"{key}.npy", raw.getvalue())
    return out.getvalue()


def npz_bomb(data: bytes, rng: random.Random) -> bytes:
    """A file of a few megabytes that unpacks to a gigabyte, with a header that says so."""
    import numpy as np
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, shape, kind in (("x", (2**30 // 192, 8, 8, 3), "|u1"), ("y", (2**30 // 192, ), "<i8")):
            with new.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, dict(descr=kind, fortran_order=False, shape=shape))
                for _ in range(64 if name == "x" else 3):
                    entry.write(bytes(2**24))
    return out.getvalue()


# -- safetensors


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON header declares other offsets, shapes and dtypes, another length, or its metadata is something else."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    names = [k for k in header if k != "__metadata__"]
    entry = header[rng.choice(names)]
    choice = rng.randrange(9)
    if choice == 0:
        entry["data_offsets"] = rng.choice((
            [0, 2**62], [-1, 4], [8, 0], [0, 0], header[names[0]]["data_offsets"], [0, 2**70], "0"))
    elif choice == 1:
        entry["shape"] = rng.choice((
            [2**40], [2**32, 2**32], [-1], [], [0], [1.5], "8", entry["shape"] + [1], entry["shape"][::-1]))
    elif choice == 2:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", 5, None, "I32", "U64"))
    elif choice == 3:
        header["__metadata__"] = rng.choice((
            dict(granq="{"), dict(granq="[]"), dict(granq="1"), dict(granq='{"format": 2}'), [], "x", dict(granq="[" * 50_000),
            dict(granq='{"format": 1, "packed": []}')))
    elif choice == 4:
        header[rng.choice(names) + rng.choice(("x", "/../../x", "\0", "\n" * 3))] = header.pop(rng.choice(names))
    elif choice == 5:
        return rng.choice((2**63, 2**40, 10**8 + 1, 0, length + 1, length - 1)).to_bytes(8, "little") + data[8:]
    elif choice == 6:
        return _safetensors(dict(header, x="[" * 100_000), body).replace(b'"[', b"[").replace(b'["', b"[")
    elif choice == 7:
        header.pop(rng.choice(names))
    else:
        start, end = entry["data_offsets"]
        body = body[:start] + b"\x00\x00\xc0\x7f" * ((end - start) // 4) + bytes((end - start) % 4) + body[end:]  # NaN
    return _safetensors(header, body)


def packed_metadata(data: bytes, rng: random.Random) -> bytes:
    """What packed weights say of themselves: bits, lowest integers, shapes, names."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    said = json.loads(header["__metadata__"]["granq"])
    name = rng.choice(list(said["packed"]))
    entry = said["packed"][name]
    key = rng.choice((*entry, "name", "delete"))
    if key == "name":
        said["packed"][rng.choice(("x", "", "../x", f"{name}.packed"))] = said["packed"].pop(name)
    elif key == "delete":
        entry.pop(rng.choice(list(entry)))
    else:
        entry[key] = rng.choice((
            0, -1, 10**6, 10**30, 1.5, "3", None, [], {}, [10**6, 10**6], [2**62, 4], [-1], [True], 64, 1e308, [[3]]))
    header["__metadata__"]["granq"] = json.dumps(said)
    return _safetensors(header, body)


def _safetensors(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body
