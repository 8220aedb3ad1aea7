"""A GPU's programs on numpy: runs the PTX that Triton compiles, on CPU tensors, all threads of a program side by side.

For what the interpreter of Triton does not see: how tensors are laid out over threads, what threads tell each other, shared memory,
loads that go on beside other work. Of threads that have parted, those that are furthest behind go on. A copy to shared memory is
there as late as it may be, and shared memory begins as NaN, so that a missing wait is likely to show. Programs run one after the
other, their threads abreast; or all at a time, and warps apart from barrier to barrier, so that a missing barrier and an order in
memory that nothing makes certain are likely to show. Only instructions that our kernels have are known; any other raises a
NotImplementedError.
"""

import copy
import ctypes
import operator
import random
import re
from collections.abc import Iterator

import numpy as np
import torch

_BITS = {"%p": bool, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}  # of registers
_TYPES = {f"{kind}{bits}": np.dtype(f"{name}{bits}") for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
          for bits in (8, 16, 32, 64)} | {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": "bf16"}
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_FUNCTIONS = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor, "min": np.minimum,
    "max": np.maximum, "neg": operator.neg, "abs": np.abs, "not": operator.invert, "sqrt": np.sqrt}
_COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


def execute(launch, tensors: tuple[torch.Tensor, ...], turns: random.Random | None = None) -> None:
    """What ``launch(*tensors)`` of granq_plugin.kernels.triton_launch does on a GPU; after it has compiled its kernel. With turns,
    all programs run at a time, warps apart, and it draws which one goes on, and how far."""
    compiled = launch.compiled(tensors)
    values = dict(zip(launch.kernel.arg_names, (*tensors, *launch.arguments)))
    kinds = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}
    arguments = [np.uint64(values[name].data_ptr()) if kind.startswith("*") else kinds[kind](values[name])
                 for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    machine = Machine(compiled.asm["ptx"], arguments, compiled.metadata.shared, tensors)
    programs = [copy.copy(machine).run(x, y, turns) for y in range(launch.grid[1]) for x in range(launch.grid[0])]
    while programs:
        program = turns.choice(programs) if turns else programs[0]
        for _ in range(turns.choice((1, 100, 10000)) if turns else 10000):
            done = next(program, "end")
            if done == "end":
                programs.remove(program)
            if done == "end" or (turns and done in ("atom", "red") and turns.random() < 0.5):
                break


class Machine:
    """One kernel: its PTX, its arguments in order, bytes of shared memory, and the tensors that it may reach."""

    def __init__(self, ptx: str, arguments: list, shared: int, tensors: tuple[torch.Tensor, ...]) -> None:
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self.arguments, self.shared_bytes = arguments, shared
        self.code, self.labels = _parsed(ptx)
        self.memory = []
        for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values():
            start, size = storage.data_ptr(), storage.nbytes()
            self.memory.append((start, np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)))

    def run(self, x: int, y: int, turns: random.Random | None) -> Iterator[str]:
        """The program (x, y) of the grid, an instruction at a time. With turns, they draw the warp that goes on, and how far."""
        n = self.threads
        self.lane, self.warp = np.arange(n) % 32, np.arange(n) // 32 * 32
        self.registers = {"%tid.x": np.arange(n, dtype=np.uint32), "global_smem": np.zeros(n, np.uint64)} | {
            f"%ctaid.{axis}": np.full(n, i, np.uint32) for axis, i in (("x", x), ("y", y))}
        self.shared = np.full(self.shared_bytes, 0xFF, np.uint8)
        place, end = np.zeros(n, np.int64), len(self.code)
        abreast = [self.warp == warp for warp in range(0, n, 32)] if turns else [np.full(n, True)]
        copies, waiting = [([], []) for _ in abreast], {}
        with np.errstate(all="ignore"):
            while (place < end).any():
                ready = [i for i, who in enumerate(abreast) if i not in waiting and (place[who] < end).any()]
                if not ready:  # all at a barrier
                    assert len(waiting) == len(abreast) and len(set(waiting.values())) == 1, "a barrier that not all threads reach"
                    waiting.clear()
                    continue
                chosen = turns.choice(ready) if turns else 0
                who, (self.copies, self.groups) = abreast[chosen], copies[chosen]
                for _ in range(turns.choice((1, 10, 500)) if turns else 1):
                    here = int(place[who].min())
                    if here == end:
                        break
                    together = who & (place == here)
                    negated, predicate, words, operands = self.code[here]
                    mask = together & (self.registers[predicate] ^ bool(negated)) if predicate else together
                    place[together] += 1
                    if words[0] == "bra":
                        place[mask] = self.labels[operands[0]]
                    elif words[0] == "ret":
                        place[mask] = end
                    elif words[0] == "bar":
                        assert (together == who).all(), "a barrier that not all threads reach"
                        waiting[chosen] = here
                    elif mask.any():
                        self._execute(words, operands, mask)
                    yield words[0]
                    if words[0] == "bar":
                        break
                copies[chosen] = self.copies, self.groups

    def read(self, name: str, kind: str) -> list[np.ndarray]:
        """Values of a register or a constant: of one number, or of a packed pair."""
        pair = kind.endswith("x2")
        kind = kind.removesuffix("x2")
        bits = np.dtype(_RAW[4 if pair else 2 if kind == "bf16" else _TYPES[kind].itemsize])
        if name in self.registers:
            raw = self.registers[name]
        elif name[0] == "%":  # of no thread so far
            raw = np.zeros(self.threads, bits)
        else:
            number = int(name[2:], 16) if name.startswith("0f") else int(name.rstrip("U"), 0)
            raw = np.full(self.threads, number % 2**(8 * bits.itemsize), bits)
        parts = [raw & np.uint32(0xFFFF), raw >> np.uint32(16)] if pair else [raw]
        return [_decoded(p, kind) for p in parts]

    def write(self, name: str, values: list[np.ndarray], kind: str, mask: np.ndarray) -> None:
        parts = [_encoded(v, kind.removesuffix("x2")) for v in values]
        raw = parts[0] if len(parts) == 1 else parts[0].astype(np.uint32) | parts[1].astype(np.uint32) << np.uint32(16)
        bits = _BITS[re.match(r"%[a-z]+", name)[0]]
        if raw.dtype != bits:  # numbers with a sign keep it
            raw = raw.astype(bits)
        raw = raw if raw.dtype == bool else raw.view(_RAW[raw.dtype.itemsize])
        self.registers[name] = np.where(mask, raw, self.registers.get(name, np.zeros_like(raw)))

    def _at(self, operand: str) -> np.ndarray:
        name, offset = re.match(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        return self.registers[name].astype(np.int64) + int(offset or "0", 0)

    def _bytes(self, address: np.ndarray, size: int, shared: bool) -> tuple[np.ndarray, np.ndarray]:
        """Memory, and the places ``[thread, byte]`` in it."""
        for start, memory in [(0, self.shared)] if shared else self.memory:
            if start <= address[0] < start + len(memory):
                places = (address - start)[:, None] + np.arange(size)
                assert (places >= 0).all() and (places < len(memory)).all(), "beyond the memory"
                return memory, places
        raise AssertionError(f"no memory at {address[0]:#x}")

    def _execute(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        name, kind = words[0], words[-1]
        if words[:2] == ["ld", "param"]:
            value = self.arguments[int(re.search(r"param_(\d+)", operands[1])[1])]
            raw = np.full(self.threads, value).view(_RAW[value.itemsize])
            self.write(operands[0], [_decoded(raw, kind)], kind, mask)
        elif hasattr(self, f"_{name}"):
            getattr(self, f"_{name}")(words, operands, mask, kind)
        elif name in _FUNCTIONS and (kind in _TYPES or kind == "pred" or kind.removesuffix("x2") in _TYPES):
            if kind == "pred":
                given = [[self.registers[o]] for o in operands[1:]]
            else:
                given = [self.read(o, kind) for o in operands[1:]]
            self.write(operands[0], [_FUNCTIONS[name](*parts) for parts in zip(*given)], kind, mask)
        else:
            raise NotImplementedError(".".join(words))

    # --- memory

    def _ld(self, words, operands, mask, kind) -> None:
        self._move(words, operands[1], operands[0], mask, kind, False)

    def _st(self, words, operands, mask, kind) -> None:
        self._move(words, operands[0], operands[1], mask, kind, True)

    def _move(self, words, address, registers, mask, kind, stores) -> None:
        size, names, who = _TYPES[kind].itemsize, re.findall(r"[%\w]+", registers), np.flatnonzero(mask)
        for i, name in enumerate(names):
            memory, places = self._bytes(self._at(address)[who] + i * size, size, any(w.startswith("shared") for w in words))
            if stores:
                memory[places] = np.ascontiguousarray(self.read(name, kind)[0][who])[:, None].view(np.uint8).reshape(len(who), size)
            else:
                values = np.zeros(self.threads, _TYPES[kind])
                values[who] = memory[places].view(_TYPES[kind])[:, 0]
                self.write(name, [values], kind, mask)

    def _ldmatrix(self, words, operands, mask, kind) -> None:
        self._matrices(words, operands[1], operands[0], mask, False)

    def _stmatrix(self, words, operands, mask, kind) -> None:
        self._matrices(words, operands[0], operands[1], mask, True)

    def _matrices(self, words, address, registers, mask, stores) -> None:
        """8x8 values of 16 bits: eight lanes have the addresses of the rows of each, every lane gets two values of each."""
        if "trans" in words:
            raise NotImplementedError("transposed matrices")
        who = np.flatnonzero(mask)
        for i, name in enumerate(re.findall(r"%\w+", registers)):
            at = self._at(address)[self.warp + 8 * i + self.lane // 4] + self.lane % 4 * 4
            memory, places = self._bytes(at[who], 4, True)
            if stores:
                memory[places] = np.ascontiguousarray(self.read(name, "b32")[0][who])[:, None].view(np.uint8).reshape(-1, 4)
            else:
                found = np.zeros(self.threads, np.uint32)
                found[who] = memory[places].view(np.uint32)[:, 0]
                self.write(name, [found], "b32", mask)

    def _cp(self, words, operands, mask, kind) -> None:
        """Copies to shared memory, of all bytes or of zeros; a group of them is there when it has been waited for."""
        if words[2] == "commit_group":
            self.groups.append(self.copies)
            self.copies = []
        elif words[2] == "wait_group":
            while len(self.groups) > int(operands[0], 0):
                for to, size, found in self.groups.pop(0):
                    memory, places = self._bytes(to, size, True)
                    memory[places] = found
        else:
            size, who = int(operands[2], 0), np.flatnonzero(mask)
            given = self.read(operands[3], "s32")[0][who] if len(operands) > 3 else np.full(len(who), size)
            found, there = np.zeros((len(who), size), np.uint8), given > 0
            if there.any():
                memory, places = self._bytes(self._at(operands[1])[who[there]], size, False)
                found[there] = memory[places]
            self.copies.append((self._at(operands[0])[who], size, found))

    def _atom(self, words, operands, mask, kind) -> None:
        old, given = np.zeros(self.threads, _TYPES[kind]), self.read(operands[-1], kind)[0]
        for i in np.flatnonzero(mask):
            memory, places = self._bytes(self._at(operands[-2])[i:i + 1], 4, False)
            old[i] = memory[places].view(_TYPES[kind])[0, 0]
            memory[places] = np.array([_FUNCTIONS[words[-2]](old[i], given[i])], _TYPES[kind])[:, None].view(np.uint8)
        if words[0] == "atom":
            self.write(operands[0], [old], kind, mask)

    _red = _atom  # nobody wants to know what was there

    # --- between threads

    def _shfl(self, words, operands, mask, kind) -> None:
        other = self.read(operands[2], "s32")[0]
        source = self.warp + (self.lane ^ other if words[2] == "bfly" else other & 31)
        assert mask[source[mask]].all(), "told by a thread that is elsewhere"
        self.write(operands[0].split("|")[0], [self.read(operands[1], kind)[0][source]], kind, mask)

    def _redux(self, words, operands, mask, kind) -> None:
        of_warp = {"min": np.min, "max": np.max}[words[2]](self.read(operands[1], kind)[0].reshape(-1, 32), 1)
        self.write(operands[0], [np.repeat(of_warp, 32)], kind, mask)

    # --- of one thread

    def _mov(self, words, operands, mask, kind) -> None:
        to, given = (re.findall(r"[%\w]+", o) if o[0] == "{" else [o] for o in operands)
        bits = 8 * _TYPES[kind].itemsize // 2 if kind in _TYPES else 0
        if len(to) == 2:  # the halves of a number
            whole = self.read(given[0], f"u{2 * bits}")[0]
            for name, part in zip(to, (whole, whole >> np.array(bits, whole.dtype))):
                if name != "_":
                    self.write(name, [part.astype(f"u{bits // 8}")], f"u{bits}", mask)
        elif len(given) == 2:
            low, high = (self.read(name, f"u{bits}")[0].astype(f"u{bits // 4}") for name in given)
            self.write(operands[0], [low | high << np.array(bits, high.dtype)], f"u{2 * bits}", mask)
        elif kind == "pred":
            value = self.registers.get(operands[1])
            self.write(operands[0], [np.full(self.threads, operands[1] != "0") if value is None else value], kind, mask)
        else:
            self.write(operands[0], self.read(operands[1], kind), kind, mask)

    def _cvt(self, words, operands, mask, kind) -> None:
        values = [self.read(o, kind)[0] for o in reversed(operands[1:])]
        to = words[-2].removesuffix("x2")
        self.write(operands[0], [v if to == "bf16" else v.astype(_TYPES[to]) for v in values], words[-2], mask)

    def _setp(self, words, operands, mask, kind) -> None:
        for name, a, b in zip(operands[0].split("|"), self.read(operands[1], kind), self.read(operands[2], kind)):
            ordered = (a == a) & (b == b)
            if words[1] in ("num", "nan"):
                value = ordered == (words[1] == "num")
            elif words[1] in _COMPARISONS:
                value = _COMPARISONS[words[1]](a, b) & ordered
            else:  # ltu and such: or not ordered
                value = _COMPARISONS[words[1][:-1]](a, b) | ~ordered
            self.write(name, [value], "pred", mask)

    def _selp(self, words, operands, mask, kind) -> None:
        a, b = (self.read(o, kind)[0] for o in operands[1:3])
        self.write(operands[0], [np.where(self.registers[operands[3]], a, b)], kind, mask)

    def _mul(self, words, operands, mask, kind) -> None:
        self._product(words, operands, mask, kind)

    def _mad(self, words, operands, mask, kind) -> None:
        self._product(words, operands, mask, kind)

    def _product(self, words, operands, mask, kind) -> None:
        wide = kind if not {"wide", "hi"} & set(words) else kind[0] + str(2 * int(kind[1:]))
        factors = [self.read(o, kind) for o in operands[1:3]]
        values = [a * b if wide == kind else a.astype(_TYPES[wide]) * b.astype(_TYPES[wide]) for a, b in zip(*factors)]
        if "hi" in words:
            values, wide = [(v >> np.array(8 * _TYPES[kind].itemsize, v.dtype)).astype(_TYPES[kind]) for v in values], kind
        if words[0] == "mad":
            values = [v + self.read(operands[3], wide)[0] for v in values]
        self.write(operands[0], values, wide, mask)

    def _fma(self, words, operands, mask, kind) -> None:
        a, b, c = (self.read(o, "f32")[0] for o in operands[1:4])  # a product is exact in the wide type
        self.write(operands[0], [(a.astype(np.longdouble) * b + c).astype(np.float32)], kind, mask)

    def _div(self, words, operands, mask, kind) -> None:
        a, b = (self.read(o, kind)[0] for o in operands[1:3])
        self.write(operands[0], [a / b if kind == "f32" else (a.astype(np.int64) // b).astype(_TYPES[kind])], kind, mask)

    def _rem(self, words, operands, mask, kind) -> None:
        a, b = (self.read(o, kind)[0] for o in operands[1:3])  # neither is negative
        self.write(operands[0], [a % b], kind, mask)

    def _bfe(self, words, operands, mask, kind) -> None:
        start, length = int(operands[2]), int(operands[3])
        top = 32 - start - length  # a shift right keeps the sign
        self.write(operands[0], [self.read(operands[1], "u32")[0] << np.uint32(top)], "u32", mask)
        value = self.read(operands[0], kind.replace("b", "u"))[0]
        self.write(operands[0], [value >> np.array(32 - length, value.dtype)], kind, mask)

    def _shl(self, words, operands, mask, kind) -> None:
        self._shift(operator.lshift, operands, mask, kind)

    def _shr(self, words, operands, mask, kind) -> None:
        self._shift(operator.rshift, operands, mask, kind)

    def _shift(self, function, operands, mask, kind) -> None:
        a = self.read(operands[1], kind)[0]
        self.write(operands[0], [function(a, self.read(operands[2], "u32")[0].astype(a.dtype))], kind, mask)

    def _prmt(self, words, operands, mask, kind) -> None:
        a, b, choice = (self.read(o, "u32")[0].astype(np.uint64) for o in operands[1:4])
        both, value = a | b << np.uint64(32), np.zeros(self.threads, np.uint64)
        for i in range(4):
            which = choice >> np.uint64(4 * i) & np.uint64(7)
            value |= (both >> which * np.uint64(8) & np.uint64(0xFF)) << np.uint64(8 * i)
        self.write(operands[0], [value.astype(np.uint32)], kind, mask)


def _decoded(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    dtype = _TYPES[kind]
    return raw.astype(_RAW[dtype.itemsize]).view(dtype)


def _encoded(value: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return torch.from_numpy(value.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return value.view(_RAW[value.dtype.itemsize]) if value.dtype.kind == "f" else value


def _parsed(ptx: str) -> tuple[list[tuple], dict[str, int]]:
    """Statements ``(negated, predicate, words, operands)``, and where labels stand."""
    code, labels = [], {}
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".entry")):])
    for statement in re.split(r"[;\n]", body):
        statement = statement.strip()
        while label := re.match(r"(\$L\w+):\s*", statement):
            labels[label[1]] = len(code)
            statement = statement[label.end():]
        statement = re.sub(r"^[{}]\s*|\s*}$", "", statement) if statement in "{}" or statement[:1] in "{}" else statement
        if statement and statement[0] not in ".)":
            negated, predicate, words, rest = _STATEMENT.match(statement).groups()
            operands = [o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest)]
            code.append((negated, predicate, words.split("."), [o for o in operands if o]))
    return code, labels
