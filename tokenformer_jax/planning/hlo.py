"""What a compiled program does on one device: contractions, memory traffic and collectives, loop bodies × trip count.

Reads the text of XLA's optimized module, since its own cost analysis counts the body of a loop once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ITEM_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no data, or only names what another operation moves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "custom-call-done"}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type."""

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    rest: str  # attributes, as they stand
    is_root: bool

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one instruction costs in a step of the whole program; a fusion is one."""

    name: str  # where in the source it comes from
    count: int  # executions
    flops: float  # of contractions, in one execution
    bytes: float  # read from and written to the device's main memory, in one execution


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, that it goes over
    shape: str  # of what is exchanged, whole
    bytes: int  # of it
    received: float  # bytes that reach a device over the network, in one execution, as a ring does it
    count: int  # executions in a step


@dataclasses.dataclass(frozen=True)
class Program:
    operations: list[Operation]
    collectives: list[Collective]
    kernels: dict[str, int]  # hand-written kernels, whose FLOPs cannot be read -> executions


def read_program(text: str, mesh_shape: dict[str, int]) -> Program:
    """Reads the text of a compiled program for a mesh, given as axis -> size, slowest first."""
    computations, entry = _parse(text)
    operations: list[Operation] = []
    kernels: dict[str, int] = {}
    collectives: dict[str, Collective] = {}
    for name, count in _executions(computations, entry):
        for instruction in computations[name].values():
            kind = _kind(instruction, name)
            if kind:
                channel = instruction.attribute("channel_id") or instruction.name
                found = _collective(instruction, computations[name], kind, mesh_shape, count)
                collectives.setdefault(f"{channel} {kind}", found)
    for name, count in _executions(computations, entry, into_fusions=False):
        computation = computations[name]
        for instruction in computation.values():
            if instruction.opcode in FREE or instruction.opcode.endswith("-done") or _kind(instruction, name):
                continue
            called = computations.get(instruction.attribute("calls"), {}) if instruction.opcode == "fusion" else {}
            flops = sum(_contraction_flops(i, called) for i in called.values()) + _contraction_flops(
                instruction, computation
            )
            where = re.search(r'op_name="([^"]*)"', instruction.rest)
            label = where[1] if where else instruction.name
            operations.append(Operation(label, count, flops, _traffic(instruction, computation, computations)))
            if 'custom_call_target="tpu_custom_call"' in instruction.rest or "__cudnn$" in instruction.rest:
                kernel = re.sub(r"[.\d]+$", "", instruction.name)
                kernels[kernel] = kernels.get(kernel, 0) + count
    return Program(operations, [c for c in collectives.values() if c.received], kernels)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        if found:
            inside = _up_to_closing(line, found.end())
            operands = tuple(re.findall(r"%([\w.\-#]+)", line[found.end() : inside]))
            for operand in operands:  # `%while.17#1` is what newer versions write for an element of a tuple
                whole, _, index = operand.partition("#")
                if index and whole in current and operand not in current:
                    element = current[whole].arrays[int(index) : int(index) + 1]
                    current[operand] = Instruction(operand, "get-tuple-element", element, (whole,), "", False)
            if found[4] in ("constant", "parameter"):
                operands = (line[found.end() : inside],)
            current[found[2]] = Instruction(
                found[2], found[4], _arrays(found[3]), operands, line[inside:], bool(found[1])
            )
    return computations, entry


def _up_to_closing(line: str, start: int) -> int:
    depth = 1
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if not depth:
            return position
    return len(line)


def _arrays(text: str) -> tuple[Array, ...]:
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", text)
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout) for dtype, dims, layout in found
    )


def _executions(
    computations: dict[str, Computation], name: str, count: int = 1, into_fusions: bool = True
) -> Iterator[tuple[str, int]]:
    """The computations that run, and how often: bodies of loops, branches, and what is called."""
    yield name, count
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            trips = _trips(instruction, computations)
            yield from _executions(computations, instruction.attribute("body"), count * trips, into_fusions)
        elif instruction.opcode == "conditional":
            for branch in re.findall(
                r"%([\w.\-]+)", "".join(re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest))
            ):
                yield from _executions(computations, branch, count, into_fusions)
        elif instruction.opcode in ("call", "async-start") or (instruction.opcode == "fusion" and into_fusions):
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            yield from _executions(computations, called, count, into_fusions)


def _trips(loop: Instruction, computations: dict[str, Computation]) -> int:
    """The turns of a loop that counts up from 0, which is what a scan becomes."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = computations[loop.attribute("condition")]
    for instruction in condition.values():
        if instruction.opcode == "compare" or (instruction.opcode == "fusion" and instruction.is_root):
            for operand in instruction.operands:
                constant = condition.get(operand)
                if constant and constant.opcode == "constant" and constant.operands[0].isdecimal():
                    return int(constant.operands[0])
    raise ValueError(f"{loop.name}: a loop whose turns are not in the program's text")


def _contraction_flops(instruction: Instruction, computation: Computation) -> float:
    """Multiplications and additions of a dot or convolution, as which a TPU's compiler writes dots too."""
    if instruction.opcode not in ("dot", "convolution") or not instruction.arrays:
        return 0.0
    left, right = (computation[name].arrays[0] for name in instruction.operands[:2])
    out = instruction.arrays[0]
    if instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracted = math.prod(left.shape[int(n)] for n in dims[1].split(",") if n) if dims else 1
        return 2.0 * math.prod(out.shape) * contracted
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels
    window = _window(instruction.rest, sum(c.isdigit() for c in labels[3]))
    flops = 2.0 * right.shape[labels[2].index("i")] * out.shape[labels[3].index("b")] * out.shape[labels[3].index("f")]
    for axis, (size, stride, low, left_step, right_step) in enumerate(window):
        here, there = left.shape[labels[1].index(str(axis))], out.shape[labels[3].index(str(axis))]
        position = np.arange(there)[:, None] * stride - low + np.arange(size) * right_step
        inside = (position >= 0) & (position <= (here - 1) * left_step) & (position % left_step == 0)
        flops *= int(inside.sum())  # pairs of an output and a weight that meet an input, not padding
    return flops


def _window(text: str, axes: int) -> list[tuple[int, int, int, int, int]]:
    """Of each spatial axis: size, stride, padding in front, dilation of the input and of the weights."""
    window = re.search(r"window=\{([^}]*)\}", text)
    parts = dict(part.split("=") for part in window[1].split()) if window else {}

    def each(name: str, default: str) -> list[str]:
        return parts[name].split("x") if name in parts else [default] * axes

    pads = [int(pad.split("_")[0]) for pad in each("pad", "0_0")]
    numbers = [[int(n) for n in each(name, "1")] for name in ("size", "stride", "lhs_dilate", "rhs_dilate")]
    return [(size, stride, pad, a, b) for size, stride, a, b, pad in zip(*numbers, pads, strict=True)]


def _traffic(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes between a device and its main memory; of slices and of updates in place, what they touch."""
    if instruction.opcode == "slice-start":
        return float(instruction.arrays[1].bytes)
    if instruction.opcode.endswith("-start") and instruction.opcode != "copy-start":
        return 0.0  # of collectives, or of what is called and counted there
    alone = {instruction.name: instruction}
    read = 0.0
    for name in dict.fromkeys(instruction.operands):
        operand = computation.get(name)
        if operand and len(operand.arrays) == 1 and operand.arrays[0].in_main_memory:
            read += min(_read(name, alone, computations), operand.arrays[0].bytes)
    results = instruction.arrays[:1] if instruction.opcode == "copy-start" else instruction.arrays
    written = sum(array.bytes for array in results if array.in_main_memory)
    return read + max(written - _not_written(alone, computation, computations), 0)


def _read(name: str, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that are read of an array in a computation, and in those that are fused into it; infinite for all of it."""
    total, users = 0.0, [i for i in computation.values() if name in i.operands and i.opcode != "parameter"]
    for user in users:
        if user.opcode == "fusion":
            inner = computations[user.attribute("calls")]
            total += sum(_read(each.name, inner, computations) for each in _given(user, name, inner))
        elif user.opcode == "bitcast" and not user.is_root:
            total += _read(user.name, computation, computations)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.arrays[0].bytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return math.inf
    return total if users else math.inf


def _given(fusion: Instruction, name: str, inner: Computation) -> list[Instruction]:
    """The parameters of a fused computation as which it gets an array."""
    parameters = [i for i in inner.values() if i.opcode == "parameter"]
    return [p for p in parameters if fusion.operands[int(p.operands[0]) :][:1] == (name,)]


def _not_written(fused: Computation, computation: Computation, computations: dict[str, Computation]) -> int:
    """Bytes of results that stay as they are, since a part of them is updated in place."""
    total = 0
    for inner in fused.values():
        if inner.opcode == "fusion":
            total += _not_written(computations[inner.attribute("calls")], fused, computations)
        elif inner.opcode == "dynamic-update-slice" and len(inner.operands) > 1:
            update = fused.get(inner.operands[1]) or computation.get(inner.operands[1])
            total += inner.arrays[0].bytes - (update.arrays[0].bytes if update and update.arrays else 0)
    return total


def _kind(instruction: Instruction, computation: str) -> str:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return ""
    return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind


def _collective(
    instruction: Instruction, computation: Computation, kind: str, mesh_shape: dict[str, int], count: int
) -> Collective:
    groups = device_groups(instruction.rest, math.prod(mesh_shape.values()))
    size = groups.shape[1]
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, moves in zip(mesh_shape, varies, strict=True) if moves)
    operands = [a for name in instruction.operands if name in computation for a in computation[name].arrays]
    sent, results = sum(a.bytes for a in operands), sum(a.bytes for a in instruction.arrays)
    if instruction.opcode.endswith("-start"):  # whose result repeats its operands
        results -= sent
    whole = max(sent, results) if kind in ("all-gather", "reduce-scatter") else sent
    largest = max(operands, key=lambda a: a.bytes)
    if kind == "all-gather":
        largest = max(instruction.arrays, key=lambda a: a.bytes)
    part = (size - 1) / size
    received = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(kind, part) * whole if size > 1 else 0.0
    shape = f"{largest.dtype}[{','.join(map(str, largest.shape))}]"
    return Collective(kind, axes, shape, whole, received, count)


@functools.lru_cache(maxsize=256)
def device_groups(text: str, devices: int) -> np.ndarray:
    """The devices that a collective joins, by their place in the mesh: [groups, devices], from all ways to write it."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text)]

    def iota(shape: str, order: str | None) -> np.ndarray:
        array = np.arange(devices).reshape(numbers(shape))
        return array.transpose(numbers(order)) if order else array

    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        pairs = [numbers(pair) for pair in re.findall(r"\{(.*?)\}", match[1])]
        return np.array([pair for pair in pairs if pair[0] != pair[1]] or [[0]])
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array([numbers(group) for group in re.findall(r"\{(.*?)\}", match[1])])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return iota(match[2], match[3]).reshape(numbers(match[1]))
    named = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{('\w+'(?:,'\w+')*)\}"
    if match := re.search(named, text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        array = iota(match[2] or str(devices), match[3]).reshape(list(sizes.values()))
        joined = [list(sizes).index(name) for name in re.findall(r"\w+", match[4])]
        count = math.prod(array.shape[i] for i in joined)
        return np.moveaxis(array, joined, range(-len(joined), 0)).reshape(-1, count)
    return np.arange(devices)[None]
