"""Vectors of sixteen numbers inside numba, written with operators.

Numba hopes that LLVM finds the vectors in a loop. A product with packed weights needs one thing
that LLVM does not find, the table lookup, so here is a type that says what is meant: `load` and
`load_bytes` make sixteen numbers, `+ - * & >>` work on all of them, and `lookup` picks sixteen
entries of a table at once, which is a single instruction with AVX-512. LLVM makes two or four
instructions of every operation where registers are narrower.

Each operation is a function that emits LLVM's instructions while numba compiles its caller. `load`,
for instance, becomes `load <16 x float>, <16 x float>* %address, align 4`. A shift to the right
brings in zeros.
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
            # Memory is read as it lies: any other array is an error of the compiler.
            if not isinstance(array, types.Array) or array.layout != "C":
                return None
            if array.dtype != (types.float32 if element is FLOAT else types.uint8):
                return None

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
    zeros = ir.Constant(pointer.type.pointee, [0] * LANES)
    arguments = [pointer, ir.IntType(32)(1), _lanes_before(builder, count), zeros]
    name = f"llvm.masked.load.v{LANES}i8.p0"
    return builder.zext(_call(builder, name, zeros.type, *arguments), INTS.llvm)


@_memory(INTS, ir.IntType(8))
def load_codes(builder, pointer, bits):
    """Sixteen codes of 1 to 7 bits from bytes[index] on, lowest bit first.

    Eight codes are one word, and the second word begins `bits` bytes after the first: memory is
    read up to and without bytes[index + bits + 8].
    """
    word = ir.IntType(64)
    place = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    shifts = builder.mul(
        _splat(builder, bits, 8), ir.Constant(ir.VectorType(word, 8), list(range(8)))
    )
    halves = []
    for start in (place, builder.gep(place, [bits])):
        eight = builder.load(builder.bitcast(start, word.as_pointer()), align=1)
        shifted = builder.lshr(_splat(builder, eight, 8), shifts)
        halves.append(builder.bitcast(shifted, INTS.llvm))
    # The low half of every word: one permutation, where two truncations are four.
    low = ir.Constant(INTS.llvm, list(range(0, 2 * LANES, 2)))
    codes = builder.shuffle_vector(*halves, low)
    mask = builder.sub(builder.shl(word(1), bits), word(1))
    return builder.and_(codes, _splat(builder, builder.trunc(mask, INT)))


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


@_operation(FLOATS, FLOATS, types.int64)
def first_lanes(builder, vector, count):
    """The first `count` of the sixteen numbers, and zeros."""
    zeros = ir.Constant(FLOATS.llvm, [0.0] * LANES)
    return builder.select(_lanes_before(builder, count), vector, zeros)


@_operation(types.float32, types.uint16)
def half(builder, bits):
    """The float16 of these bits, a type that numba does not know."""
    return builder.fpext(builder.bitcast(bits, ir.HalfType()), FLOAT)


@_operation(types.uint16, types.float32)
def half_bits(builder, number):
    """The bits of the nearest float16."""
    return builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))


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
    """The sum of the sixteen numbers, in an order that LLVM chooses."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    return _call(builder, name, FLOAT, FLOAT(0.0), vector, fastmath=("reassoc",))


@_operation(FLOATS, INTS)
def floats(builder, vector):
    """The same numbers as float32."""
    return builder.sitofp(vector, FLOATS.llvm)


@_operation(FLOATS, INTS, types.int64, types.int64)
def minifloat(builder, codes, bits, exponent):
    """Codes of a sign, `exponent` <= 5 bits and a mantissa, of `bits` <= 8 in all, as float16 reads
    them: with its bias 15, subnormals too. A code of 7 ones behind the sign is NaN."""

    def all_lanes(number):
        return _splat(builder, builder.trunc(number, INT))

    word = ir.IntType(64)
    top = builder.shl(codes, all_lanes(builder.sub(word(16), bits)))
    size = builder.and_(top, all_lanes(word(0x7FFF)))
    size = builder.lshr(size, all_lanes(builder.sub(word(5), exponent)))
    halves = builder.or_(size, builder.and_(top, all_lanes(word(0x8000))))
    halves = builder.trunc(halves, ir.VectorType(ir.IntType(16), LANES))
    read = builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES))
    ones = all_lanes(word(127))
    special = builder.icmp_signed("==", builder.and_(codes, ones), ones)
    nan = ir.Constant(FLOATS.llvm, [float("nan")] * LANES)
    return builder.select(special, nan, builder.fpext(read, FLOATS.llvm))


@_operation(FLOATS, FLOATS, INTS)
def lookup(builder, table, index):
    """table[index % 16]."""
    if WIDE:
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS.llvm, table, index)
    return _of_halves(builder, table, index)


@_operation(FLOATS, FLOATS, FLOATS, INTS)
def lookup_two(builder, first, second, index):
    """Entry index % 32 of two tables, one behind the other."""
    if WIDE:
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        return _call(builder, name, FLOATS.llvm, first, index, second)
    found = [_of_halves(builder, table, index) for table in (first, second)]
    return builder.select(_has(builder, index, 16), found[1], found[0])


def _lanes_before(builder, count):
    lanes = ir.VectorType(ir.IntType(64), LANES)
    return builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), _splat(builder, count))


def _of_halves(builder, table, index):
    """A lookup for registers of eight floats: two tables of eight entries, for eight lanes."""
    low, high = _half(builder, table, 0), _half(builder, table, 8)
    lanes = []
    for first in (0, 8):
        some = _half(builder, index, first)
        found = [_pick(builder, half, some) for half in (low, high)]
        lanes.append(builder.select(_has(builder, some, 8), found[1], found[0]))
    return builder.shuffle_vector(*lanes, ir.Constant(INTS.llvm, list(range(LANES))))


def _half(builder, vector, first):
    lanes = ir.Constant(ir.VectorType(INT, 8), list(range(first, first + 8)))
    return builder.shuffle_vector(vector, vector, lanes)


def _has(builder, vector, bit):
    bits = ir.Constant(vector.type, [bit] * vector.type.count)
    return builder.icmp_signed("==", builder.and_(vector, bits), bits)


def _pick(builder, table, index):
    """One by one in the code; LLVM knows the pattern and makes one permutation of it."""
    index = builder.and_(index, ir.Constant(index.type, [7] * 8))
    result = ir.Constant(table.type, ir.Undefined)
    for lane in map(INT, range(8)):
        entry = builder.extract_element(table, builder.extract_element(index, lane))
        result = builder.insert_element(result, entry, lane)
    return result


def _splat(builder, number, lanes=LANES):
    vector = ir.VectorType(number.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


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
