"""Vectors of sixteen numbers inside numba, written with operators.

Numba hopes that LLVM finds the vectors in a loop. A product with packed weights needs one thing
that LLVM does not find, the table lookup, so here is a type that says what is meant: `load` and
`load_bytes` make sixteen numbers, `+ - * & >>` work on all of them, and `lookup` picks sixteen
entries of a table at once, which is a single instruction with AVX-512. LLVM makes two or four
instructions of every operation where registers are narrower.
"""

from __future__ import annotations

import inspect
import operator

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
# A processor with registers of 16 floats looks up 16 entries at once; others have 8 at most.
WIDE = "+avx512f" in (config.CPU_FEATURES or binding.get_host_cpu_features().flatten())


class Vector(types.Type):
    """Sixteen lanes of float32 or int32."""

    def __init__(self, element: str, llvm: ir.Type):
        self.llvm = ir.VectorType(llvm, LANES)
        super().__init__(f"{element}x{LANES}")


INT, FLOAT = ir.IntType(32), ir.FloatType()
NOTHING = ir.Constant(ir.IntType(8).as_pointer(), None)  # numba's None
INTS, FLOATS = Vector("int32", INT), Vector("float32", FLOAT)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


def _operation(result: types.Type, *takes: types.Type):
    """Makes an intrinsic of a function (builder, *values) that emits LLVM instructions."""

    def decorate(emit):
        def typing(context, *given):
            if len(given) == len(takes):
                return result(*takes), lambda _, builder, __, values: emit(builder, *values)

        return _intrinsic(typing, emit, ["context", *(f"value{i}" for i in range(len(takes)))])

    return decorate


def _memory(result: Vector, element: ir.Type):
    """Makes an intrinsic (array, index) of a function (builder, pointer to sixteen elements)."""

    def decorate(emit):
        def typing(context, array, index, *rest):
            def address(context, builder, signature, values):
                data = context.make_array(signature.args[0])(context, builder, values[0]).data
                pointer = builder.gep(data, [values[1]])
                sixteen = ir.VectorType(element, LANES).as_pointer()
                return emit(builder, builder.bitcast(pointer, sixteen), *values[2:])

            return result(array, types.intp, *rest), address

        rest = list(inspect.signature(emit).parameters)[2:]
        return _intrinsic(typing, emit, ["context", "array", "index", *rest])

    return decorate


def _intrinsic(typing, emit, names):
    """`typing` under the name of `emit`; numba matches arguments by the names in a signature."""
    typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typing.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return intrinsic(typing)


@_memory(FLOATS, FLOAT)
def load(builder, pointer):
    """array[index : index + 16] of a contiguous float32 array."""
    return builder.load(pointer, align=4)


@_memory(INTS, ir.IntType(8))
def load_bytes(builder, pointer):
    """bytes[index : index + 16] as integers 0..255."""
    return builder.zext(builder.load(pointer, align=1), INTS.llvm)


@_memory(INTS, ir.IntType(8))
def load_some_bytes(builder, pointer, count):
    """bytes[index : index + count], count < 16, and zeros: what lies behind is not touched."""
    lanes = ir.VectorType(ir.IntType(64), LANES)
    inside = builder.icmp_signed(
        "<", ir.Constant(lanes, list(range(LANES))), _splat(builder, count)
    )
    zeros = ir.Constant(pointer.type.pointee, [0] * LANES)
    arguments = [pointer, ir.IntType(32)(1), inside, zeros]
    name = f"llvm.masked.load.v{LANES}i8.p0"
    return builder.zext(_call(builder, name, zeros.type, *arguments), INTS.llvm)


@_memory(types.none, ir.IntType(8))
def prefetch(builder, pointer):
    """Ask for the cache line of bytes[index]; an address outside the array does no harm."""
    numbers = [ir.IntType(32)(n) for n in (0, 3, 1)]  # to read, to keep, data
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *numbers)
    return NOTHING


@_memory(types.none, FLOAT)
def store(builder, pointer, vector):
    """array[index : index + 16] = vector."""
    builder.store(vector, pointer, align=4)
    return NOTHING


@_operation(FLOATS, types.float32, types.float32)
def two_halves(builder, first, second):
    """Eight times one number, then eight times another."""
    lanes = ir.Constant(INTS.llvm, [0] * 8 + [LANES] * 8)
    return builder.shuffle_vector(_splat(builder, first), _splat(builder, second), lanes)


@_operation(FLOATS, types.float32)
def splat(builder, number):
    """Sixteen times the same number."""
    return _splat(builder, number)


@_operation(types.float32, FLOATS)
def total(builder, vector):
    """The sum of the sixteen numbers, pairwise."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    return _call(builder, name, FLOAT, FLOAT(0.0), vector, fastmath=("reassoc",))


@_operation(FLOATS, INTS)
def floats(builder, vector):
    """The same numbers as float32."""
    return builder.sitofp(vector, FLOATS.llvm)


@_operation(FLOATS, FLOATS, INTS)
def lookup(builder, table, index):
    """table[index], each index 0..15."""
    if WIDE:
        return _pick(builder, table, index)
    halves = [_half(builder, table, 0), _half(builder, table, 8)]
    chosen = [_lookup_half(builder, halves, _half(builder, index, first)) for first in (0, 8)]
    return builder.shuffle_vector(*chosen, ir.Constant(INTS.llvm, list(range(LANES))))


def _lookup_half(builder, halves, index):
    low, high = (_pick(builder, half, index, 7) for half in halves)
    return builder.select(builder.icmp_signed(">", index, index.type([7] * 8)), high, low)


def _half(builder, vector, first):
    lanes = ir.Constant(ir.VectorType(INT, 8), list(range(first, first + 8)))
    return builder.shuffle_vector(vector, vector, lanes)


def _pick(builder, table, index, mask=None):
    """One by one in the code; LLVM knows the pattern and makes one permutation of it."""
    index = index if mask is None else builder.and_(index, index.type([mask] * index.type.count))
    result = ir.Constant(table.type, ir.Undefined)
    for lane in map(INT, range(table.type.count)):
        entry = builder.extract_element(table, builder.extract_element(index, lane))
        result = builder.insert_element(result, entry, lane)
    return result


def _splat(builder, number):
    vector = ir.VectorType(number.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS.llvm, [0] * LANES))


def _call(builder, name, result, *arguments, fastmath=()):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=fastmath)


def _operator(name, left, right, emit):
    """Teach numba the operator of that name, and its form that assigns, for `left` and `right`."""
    instruction = _operation(left, left, right)(emit)

    def implement(a, b):
        if a is left and (b is right or (right is INTEGER and isinstance(b, types.Integer))):
            return lambda a, b: instruction(a, b)

    for symbol in (name, f"i{name.rstrip('_')}"):
        overload(getattr(operator, symbol))(implement)


def _with_constant(emit):
    """An operation on integers whose right side is one number for all lanes."""
    return lambda builder, x, number: emit(builder)(x, _splat(builder, builder.trunc(number, INT)))


INTEGER = types.int64
# A product that is only added to something becomes one fused instruction.
FUSED = ("contract",)
_operator("add", FLOATS, FLOATS, lambda b, x, y: b.fadd(x, y, flags=FUSED))
_operator("sub", FLOATS, FLOATS, lambda b, x, y: b.fsub(x, y, flags=FUSED))
_operator("mul", FLOATS, FLOATS, lambda b, x, y: b.fmul(x, y, flags=FUSED))
_operator("add", INTS, INTS, lambda b, x, y: b.add(x, y))
_operator("add", INTS, INTEGER, _with_constant(lambda b: b.add))
_operator("sub", INTS, INTS, lambda b, x, y: b.sub(x, y))
_operator("and_", INTS, INTEGER, _with_constant(lambda b: b.and_))
_operator("rshift", INTS, INTEGER, _with_constant(lambda b: b.lshr))
_operator("mul", INTS, INTEGER, _with_constant(lambda b: b.mul))
