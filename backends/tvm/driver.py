"""The native function that calls a program's kernels one after the other, and how Python calls that.

Everything it needs to know lies in memory that the runtime prepares (`mlec.runtime.executable`); of the program it holds nothing but the
addresses of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlec.backends.tvm.assembly import object_of
from mlec.runtime.executable import DRIVER
from mlec.runtime.ffi import ENTRY, FROM_PYTHON


def driver(kernels: Sequence[str], triple: str) -> bytes:
    """An object file with the function `DRIVER`, which has the calling convention of tvm-ffi as kernels do.

    Its arguments are integers: the address of a *frame*, the first call to make, the first not to make, and then the addresses of array
    objects (arena, inputs, outputs). All words are of 64 bits. The frame begins with the mask of address bits that must be zero in every
    array, where in an array object the pointer to its elements stands, the address of the patches, their number, the address of the
    calls, and a word for the number of the call under way. A patch is the address of a word, and the number of the array and the offset
    in it whose address is written there. A call is the number of the kernel, its arguments and how many they are.

    It returns nothing; or, having done nothing, the number of an array that is not aligned. A kernel's failure is its failure.

    For x86-64, there is a second function that Python can call by itself (`mlec.runtime.ffi.Interface.native`), with the same arguments
    and result: the extension module of tvm-ffi, which would do that, takes longer to load than a small model, and 0.2 us more for each
    call. Other processors have the linker of LLVM, which finds functions of tvm-ffi only.

    Args:
        kernels: symbols, numbered in this order; one may have several numbers.
        triple: of the machine that it runs on.
    """
    names = [ENTRY.format(name) for name in kernels]
    declarations = "".join(f"declare i32 @{name}(ptr, ptr, i32, ptr)\n" for name in dict.fromkeys(names))
    table = ", ".join(f"ptr @{name}" for name in names)
    return object_of(
        f"{declarations}@kernels = internal constant [{len(names)} x ptr] [{table}]\n"
        f"define i32 @{ENTRY.format(DRIVER)}(ptr %self, ptr %arguments, i32 %count, ptr %result) {{\n{_BODY}}}\n"
        + (_FROM_PYTHON if triple.startswith("x86_64") else ""),
        triple,
    )


_BODY = """
entry:
  %frame.at = getelementptr i8, ptr %arguments, i64 8
  %first.at = getelementptr i8, ptr %arguments, i64 24
  %end.at = getelementptr i8, ptr %arguments, i64 40
  %arrays = getelementptr i8, ptr %arguments, i64 56
  %frame = load ptr, ptr %frame.at
  %first = load i64, ptr %first.at
  %end = load i64, ptr %end.at
  %mask = load i64, ptr %frame
  %pointer.at = getelementptr i64, ptr %frame, i64 1
  %pointer = load i64, ptr %pointer.at
  %patches.at = getelementptr i64, ptr %frame, i64 2
  %patches = load ptr, ptr %patches.at
  %patched.at = getelementptr i64, ptr %frame, i64 3
  %patched = load i64, ptr %patched.at
  %calls.at = getelementptr i64, ptr %frame, i64 4
  %calls = load ptr, ptr %calls.at
  %current.at = getelementptr i64, ptr %frame, i64 5
  %given = zext i32 %count to i64
  %all = sub i64 %given, 3
  %returned = alloca [2 x i64], align 8
  br label %aligned.head

aligned.head:
  %a = phi i64 [ 0, %entry ], [ %a.next, %aligned.next ]
  %a.more = icmp slt i64 %a, %all
  br i1 %a.more, label %aligned.body, label %patch.head

aligned.body:
  %a.slot = shl i64 %a, 4
  %a.at = getelementptr i8, ptr %arrays, i64 %a.slot
  %a.array = load ptr, ptr %a.at
  %a.place = getelementptr i8, ptr %a.array, i64 %pointer
  %a.data = load i64, ptr %a.place
  %a.low = and i64 %a.data, %mask
  %a.fit = icmp eq i64 %a.low, 0
  br i1 %a.fit, label %aligned.next, label %misaligned

aligned.next:
  %a.next = add i64 %a, 1
  br label %aligned.head

misaligned:
  %value.at = getelementptr i8, ptr %result, i64 8
  store i64 1, ptr %result
  store i64 %a, ptr %value.at
  ret i32 0

patch.head:
  %p = phi i64 [ 0, %aligned.head ], [ %p.next, %patch.body ]
  %p.more = icmp slt i64 %p, %patched
  br i1 %p.more, label %patch.body, label %call.head

patch.body:
  %p.first = mul i64 %p, 3
  %p.at = getelementptr i64, ptr %patches, i64 %p.first
  %p.target = load ptr, ptr %p.at
  %p.number.at = getelementptr i64, ptr %p.at, i64 1
  %p.number = load i64, ptr %p.number.at
  %p.offset.at = getelementptr i64, ptr %p.at, i64 2
  %p.offset = load i64, ptr %p.offset.at
  %p.slot = shl i64 %p.number, 4
  %p.array.at = getelementptr i8, ptr %arrays, i64 %p.slot
  %p.array = load ptr, ptr %p.array.at
  %p.place = getelementptr i8, ptr %p.array, i64 %pointer
  %p.base = load i64, ptr %p.place
  %p.address = add i64 %p.base, %p.offset
  store i64 %p.address, ptr %p.target
  %p.next = add i64 %p, 1
  br label %patch.head

call.head:
  %c = phi i64 [ %first, %patch.head ], [ %c.next, %call.next ]
  %c.more = icmp slt i64 %c, %end
  br i1 %c.more, label %call.body, label %done

call.body:
  store i64 %c, ptr %current.at
  %c.first = mul i64 %c, 3
  %c.at = getelementptr i64, ptr %calls, i64 %c.first
  %c.kernel = load i64, ptr %c.at
  %c.arguments.at = getelementptr i64, ptr %c.at, i64 1
  %c.arguments = load ptr, ptr %c.arguments.at
  %c.count.at = getelementptr i64, ptr %c.at, i64 2
  %c.count.wide = load i64, ptr %c.count.at
  %c.count = trunc i64 %c.count.wide to i32
  %kernel.at = getelementptr ptr, ptr @kernels, i64 %c.kernel
  %kernel = load ptr, ptr %kernel.at
  store [2 x i64] zeroinitializer, ptr %returned
  %status = call i32 %kernel(ptr null, ptr %c.arguments, i32 %c.count, ptr %returned)
  %c.good = icmp eq i32 %status, 0
  br i1 %c.good, label %call.next, label %failed

call.next:
  %c.next = add i64 %c, 1
  br label %call.head

failed:
  ret i32 %status

done:
  ret i32 0
"""

_FROM_PYTHON = f"""
@_Py_NoneStruct = external global i8
declare i64 @PyLong_AsSsize_t(ptr)
declare ptr @PyLong_FromSsize_t(i64)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare ptr @PyObject_CallNoArgs(ptr)
declare void @Py_IncRef(ptr)

define ptr @{FROM_PYTHON.format(DRIVER)}(ptr %self, ptr %given, i64 %all) {{
entry:
  %arguments = alloca [2 x i64], i64 %all, align 8
  %result = alloca [2 x i64], align 8
  store [2 x i64] zeroinitializer, ptr %result
  br label %head

head:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %all
  br i1 %more, label %body, label %call

body:
  %object.at = getelementptr ptr, ptr %given, i64 %i
  %object = load ptr, ptr %object.at
  %bits = call i64 @PyLong_AsSsize_t(ptr %object)
  %kind.at = getelementptr [2 x i64], ptr %arguments, i64 %i
  store i64 1, ptr %kind.at
  %bits.at = getelementptr i64, ptr %kind.at, i64 1
  store i64 %bits, ptr %bits.at
  %next = add i64 %i, 1
  br label %head

call:
  %count = trunc i64 %all to i32
  %thread = call ptr @PyEval_SaveThread()
  %status = call i32 @{ENTRY.format(DRIVER)}(ptr null, ptr %arguments, i32 %count, ptr %result)
  call void @PyEval_RestoreThread(ptr %thread)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %done, label %failed

failed:
  %raised = call ptr @PyObject_CallNoArgs(ptr %self)
  ret ptr %raised

done:
  %returned = load i64, ptr %result
  %none = icmp eq i64 %returned, 0
  br i1 %none, label %nothing, label %number

nothing:
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct

number:
  %number.at = getelementptr i64, ptr %result, i64 1
  %number.bits = load i64, ptr %number.at
  %made = call ptr @PyLong_FromSsize_t(i64 %number.bits)
  ret ptr %made
}}
"""
"""``self`` raises the error that tvm-ffi keeps of a failure. Of Python's interface, all that is used here is stable from 3.10 on."""
