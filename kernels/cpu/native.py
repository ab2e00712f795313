"""Compiled functions as machine code that any thread can run, since none of it is Python's.

A thread that needs the interpreter has to wait for it, and to hand a dozen arrays to a compiled
function takes Python longer than a small product. So a function gets an address once, for the types
of its arguments, and one array of 64-bit words has all that a call needs:

    rows, failures, address of the machine code, first argument, second argument, ...

An argument lies there as numba has it inside: None or a number is one word; a tensor of n
dimensions is five (owner and parent, both nobody; elements, bytes of one, address), and its sizes
and strides are n each. Thread i of n takes the rows from rows * i / n to rows * (i + 1) / n.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.core.codegen import CodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from torch import Tensor

Argument = Tensor | np.number | int | None
# What lies where.
ROWS, FAILURES, CODE, ARGUMENTS = range(4)
# Machine code as ctypes calls it: (address of the words, which thread, how many).
CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

_VOID, _INT, _WORD = ir.VoidType(), ir.IntType(32), ir.IntType(64)
_WORDS = _WORD.as_pointer()
# Machine code lives as long as its library.
_libraries: list[CodeLibrary] = []


def kind_of(argument: Argument) -> types.Type:
    """What numba calls the type of an argument."""
    return typeof(argument.numpy() if isinstance(argument, Tensor) else argument)


def words(*arguments: Argument) -> list[int]:
    """The arguments as machine code reads them; the tensors must live until it has run."""
    found = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_cpu:
                raise ValueError(f"machine code reads the CPU's memory, not {argument.device}'s")
            size = argument.element_size()
            found += [0, 0, argument.numel(), size, argument.data_ptr(), *argument.shape]
            found += [step * size for step in argument.stride()]
        else:
            number = b"" if argument is None else np.asarray(argument).tobytes()
            found.append(int.from_bytes(number, "little", signed=True))
    return found


@cache
@global_compiler_lock
def machine_code(function: Callable, kinds: tuple[types.Type, ...]) -> int:
    """The address of a `CALL` for the compiled `function(*arguments, start, stop)`.

    Args:
        function: returns nothing; if it raises an exception, that counts as a failure.
        kinds: types of the arguments but the last two.
    """
    signature = (*kinds, types.intp, types.intp)
    function.compile(signature)
    compiled = function.overloads[signature]
    context = compiled.target_context

    def emit(builder, block, thread, threads):
        values, at = [], ARGUMENTS
        for kind in kinds:
            place = builder.gep(block, [_WORD(at)])
            pointer = context.get_value_type(kind).as_pointer()
            values.append(builder.load(builder.bitcast(place, pointer)))
            at += 5 + 2 * kind.ndim if isinstance(kind, types.Array) else 1
        rows = _read(builder, block, ROWS)
        for i in (thread, builder.add(thread, _WORD(1))):
            values.append(builder.sdiv(builder.mul(rows, i), threads))
        callee = context.declare_function(builder.module, compiled.fndesc)
        call = context.call_conv.call_function
        status, _ = call(builder, callee, types.none, signature, values)
        with builder.if_then(status.is_error):
            builder.store(_WORD(1), builder.gep(block, [_WORD(FAILURES)]))

    return _emitted(emit, _WORD, _WORD)


@cache
@global_compiler_lock
def team_code(*numbers: int) -> int:
    """The address of a function (words) that calls their machine code for one thread of a team.

    Args:
        numbers: addresses of functions that know which thread it is, and of how many.
    """

    def emit(builder, block):
        getter = ir.FunctionType(_INT, []).as_pointer()
        asked = [builder.call(builder.inttoptr(_WORD(n), getter), []) for n in numbers]
        kind = ir.FunctionType(_VOID, [_WORDS, _WORD, _WORD]).as_pointer()
        code = builder.inttoptr(_read(builder, block, CODE), kind)
        builder.call(code, [block, *(builder.sext(n, _WORD) for n in asked)])

    return _emitted(emit)


def _read(builder, block, at):
    return builder.load(builder.gep(block, [_WORD(at)]))


def _emitted(emit: Callable, *more: ir.Type) -> int:
    """The address of a function (words, *more) with the instructions that `emit` emits."""
    name = f"qlib.rows.{len(_libraries)}"
    library = cpu_target.target_context.codegen().create_library(name)
    module = library.create_ir_module(name)
    function = ir.Function(module, ir.FunctionType(_VOID, [_WORDS, *more]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, *function.args)
    builder.ret_void()
    library.add_ir_module(module)
    library.finalize()
    _libraries.append(library)
    return library.get_pointer_to_function(name)
