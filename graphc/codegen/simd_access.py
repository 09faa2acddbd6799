"""Emission of loads and stores: the addresses of a tile's elements and the access to each.

AVX2 and NEON have no fast masked store, so the tails of vectors are moved in blocks of 1, 2, 4, ...
elements by the bits of their number: log2(lanes) branches, shared by all elements of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

from graphc.codegen.simd_values import (
    BYTES,
    ELEMENT,
    I8,
    I32,
    I64,
    SUFFIX,
    Emitter,
    Value,
    llvm_type,
    shuffle,
    splat,
)


def i64(number: int) -> ir.Constant:
    return ir.Constant(I64, number)


def lane_numbers(lanes: int, width=I32) -> ir.Constant:
    """The vector 0, 1, ..., lanes-1."""
    return ir.Constant(ir.VectorType(width, lanes), list(range(lanes)))


def tail_mask(builder, n, lanes: int):
    """Mask of the lanes below n (int64), which is clamped and then compared as int32."""
    limit = builder.select(builder.icmp_signed("<", n, i64(lanes)), n, i64(lanes))
    limit = builder.select(builder.icmp_signed(">", limit, i64(0)), limit, i64(0))
    limit = splat(builder, builder.trunc(limit, I32), lanes)
    return builder.icmp_signed("<", lane_numbers(lanes), limit)


class Access:
    """One statement's accesses: the dtype, the lanes and the builder they share."""

    def __init__(self, builder: ir.IRBuilder, dtype: str, lanes: int):
        self.builder = builder
        self.dtype = dtype
        self.lanes = lanes
        self.align = BYTES[dtype]
        self.memory_element = I8 if dtype == "bool" else ELEMENT[dtype]
        self.vector = llvm_type(dtype, lanes)
        # AVX's masked moves know elements of 4 and 8 bytes; stores of them are fast from AVX-512
        # on.
        self.masked_load = self.align >= 4 and lanes >= 8
        self.masked_store = self.align >= 4 and lanes >= 16

    def _from_memory(self, ll):
        if self.dtype != "bool":
            return ll
        return self.builder.icmp_unsigned("!=", ll, ir.Constant(ll.type, None))

    def _to_memory(self, ll):
        if self.dtype != "bool":
            return ll
        is_vector = isinstance(ll.type, ir.VectorType)
        return self.builder.zext(ll, ir.VectorType(I8, ll.type.count) if is_vector else I8)

    def load(self, pointer, count: int | None):
        """`count` consecutive elements as a vector, one as a scalar where count is None."""
        builder = self.builder
        if count is not None:
            pointer = builder.bitcast(
                pointer, ir.VectorType(self.memory_element, count).as_pointer()
            )
        return self._from_memory(builder.load(pointer, align=self.align))

    def store(self, ll, pointer):
        """A vector or a scalar to consecutive memory."""
        ll = self._to_memory(ll)
        pointer = self.builder.bitcast(pointer, ll.type.as_pointer())
        self.builder.store(ll, pointer, align=self.align)

    def offset(self, pointer, index):
        """The pointer moved by `index` elements (an LLVM value or a Python int)."""
        if isinstance(index, int):
            if index == 0:
                return pointer
            index = i64(index)
        return self.builder.gep(pointer, [index])

    def masked(self, name: str, result, operands, mask):
        """Call llvm.masked.load or llvm.masked.store."""
        arguments = [*operands, ir.Constant(I32, self.align), mask]
        if result is not None:
            arguments.append(ir.Constant(result, None))
        signature = ir.FunctionType(result or ir.VoidType(), [one.type for one in arguments])
        function = cgutils.get_or_insert_function(
            self.builder.module,
            signature,
            f"llvm.masked.{name}.v{self.lanes}{SUFFIX[self.dtype]}.p0",
        )
        return self.builder.call(function, arguments)

    def vector_pointer(self, pointer):
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    # -- loads: each takes the element addresses and gives as many LLVM values

    def load_vector(self, pointers):
        return [self.load(pointer, self.lanes) for pointer in pointers]

    def load_scalar(self, pointers):
        return [self.load(pointer, None) for pointer in pointers]

    def load_splat(self, pointers):
        return [splat(self.builder, self.load(pointer, None), self.lanes) for pointer in pointers]

    def load_strided(self, pointers, lane_stride):
        offsets = [self.builder.mul(lane_stride, i64(lane)) for lane in range(self.lanes)]
        return [self._gather(pointer, offsets) for pointer in pointers]

    def _gather(self, pointer, offsets):
        result = ir.Constant(self.vector, ir.Undefined)
        for lane, offset in enumerate(offsets):
            element = self.load(self.offset(pointer, offset), None)
            result = self.builder.insert_element(result, element, ir.Constant(I32, lane))
        return result

    def _branch(self, condition, then, otherwise):
        """The values of `then()` or `otherwise()`, by a branch."""
        builder = self.builder
        with builder.if_else(condition) as (if_true, if_false):
            with if_true:
                left = then()
                left_block = builder.block
            with if_false:
                right = otherwise()
                right_block = builder.block
        results = []
        for one, other in zip(left, right):
            phi = builder.phi(one.type)
            phi.add_incoming(one, left_block)
            phi.add_incoming(other, right_block)
            results.append(phi)
        return results

    def load_vector_tail(self, pointers, n):
        full = self.builder.icmp_signed(">=", n, i64(self.lanes))
        partial = self._load_masked if self.masked_load else self._load_by_bits
        return self._branch(full, lambda: self.load_vector(pointers), lambda: partial(pointers, n))

    def _load_masked(self, pointers, n):
        mask = tail_mask(self.builder, n, self.lanes)
        return [
            self.masked("load", self.vector, [self.vector_pointer(pointer)], mask)
            for pointer in pointers
        ]

    def _clamped(self, n):
        """n, or 0 where it is negative."""
        return self.builder.select(self.builder.icmp_signed(">", n, i64(0)), n, i64(0))

    def _load_by_bits(self, pointers, n):
        """n < lanes elements in log2(lanes) steps, lowest bit of n first.

        The last elements are loaded first and move up to make room for a block twice as long.
        """
        builder, n = self.builder, self._clamped(n)
        zero = ir.Constant(self.vector, None)
        values = [zero] * len(pointers)
        size = 1
        while size < self.lanes:
            start = builder.and_(n, i64(-2 * size))

            def step(values=values, size=size, start=start):
                emitter = Emitter(builder, self.dtype, self.lanes)
                results = []
                for pointer, value in zip(pointers, values):
                    block = self.load(self.offset(pointer, start), size)
                    widened = [lane % size for lane in range(self.lanes)]
                    wide = shuffle(Value(emitter, block), Value(emitter, block), widened)
                    order = [
                        lane if lane < size else self.lanes + lane - size
                        for lane in range(self.lanes)
                    ]
                    results.append(shuffle(Value(emitter, wide), Value(emitter, value), order))
                return results

            has_bit = builder.icmp_signed("!=", builder.and_(n, i64(size)), i64(0))
            values = self._branch(has_bit, step, lambda values=values: values)
            size *= 2
        return values

    def load_strided_tail(self, pointers, lane_stride, n):
        """Lanes from n on read lane n-1 instead and are cleared: no branch a lane."""
        builder = self.builder
        zero = ir.Constant(self.vector, None)

        def partial():
            last = builder.sub(n, i64(1))
            offsets = []
            for lane in range(self.lanes):
                inside = builder.icmp_signed("<", i64(lane), last)
                offsets.append(builder.mul(lane_stride, builder.select(inside, i64(lane), last)))
            mask = tail_mask(builder, n, self.lanes)
            return [
                builder.select(mask, self._gather(pointer, offsets), zero) for pointer in pointers
            ]

        def not_full():
            some = builder.icmp_signed(">", n, i64(0))
            return self._branch(some, partial, lambda: [zero] * len(pointers))

        full = builder.icmp_signed(">=", n, i64(self.lanes))
        return self._branch(full, lambda: self.load_strided(pointers, lane_stride), not_full)

    # -- stores: each takes the element addresses and as many LLVM values

    def store_vector(self, pointers, values):
        for pointer, value in zip(pointers, values):
            self.store(value, pointer)

    store_scalar = store_vector

    def _store_lane(self, pointers, values, lane, offset):
        for pointer, value in zip(pointers, values):
            element = self.builder.extract_element(value, ir.Constant(I32, lane))
            self.store(element, self.offset(pointer, offset))

    def store_strided(self, pointers, values, lane_stride):
        for lane in range(self.lanes):
            self._store_lane(pointers, values, lane, self.builder.mul(lane_stride, i64(lane)))

    def store_vector_tail(self, pointers, values, n):
        builder = self.builder
        full = builder.icmp_signed(">=", n, i64(self.lanes))
        with builder.if_else(full) as (if_full, if_partial):
            with if_full:
                self.store_vector(pointers, values)
            with if_partial:
                if self.masked_store:
                    mask = tail_mask(builder, n, self.lanes)
                    for pointer, value in zip(pointers, values):
                        self.masked("store", None, [value, self.vector_pointer(pointer)], mask)
                else:
                    self._store_by_bits(pointers, values, n)

    def _store_by_bits(self, pointers, values, n):
        """n < lanes elements in log2(lanes) steps, highest bit of n first.

        A stored block is shifted out.
        """
        builder, n = self.builder, self._clamped(n)
        size = self.lanes // 2
        while size:
            start = builder.and_(n, i64(-2 * size))
            has_bit = builder.icmp_signed("!=", builder.and_(n, i64(size)), i64(0))

            def step(values=values, size=size, start=start):
                rest = []
                for pointer, ll in zip(pointers, values):
                    value = Value(Emitter(builder, self.dtype, ll.type.count), ll)
                    self.store(
                        shuffle(value, value, list(range(size))), self.offset(pointer, start)
                    )
                    rest.append(shuffle(value, value, list(range(size, 2 * size))))
                return rest

            def keep(values=values, size=size):
                kept = []
                for ll in values:
                    value = Value(Emitter(builder, self.dtype, ll.type.count), ll)
                    kept.append(shuffle(value, value, list(range(size))))
                return kept

            values = self._branch(has_bit, step, keep)
            size //= 2

    def store_strided_tail(self, pointers, values, lane_stride, n):
        """A branch a lane, shared by the tile; the first lane from n on leaves."""
        builder = self.builder
        done = builder.append_basic_block("stored")
        for lane in range(self.lanes):
            more = builder.append_basic_block("lane")
            builder.cbranch(builder.icmp_signed("<", i64(lane), n), more, done)
            builder.position_at_end(more)
            self._store_lane(pointers, values, lane, builder.mul(lane_stride, i64(lane)))
        builder.branch(done)
        builder.position_at_end(done)

    # -- addresses

    def addresses(self, base, counts: Sequence[int], strides: list):
        """The address of each element of a tile, row-major: base + sum k_j s_j.

        Constant parts come last, where they become displacements of the instructions.
        """
        dynamic: dict[tuple, ir.Value] = {}
        pointers = []
        for position in itertools.product(*(range(count) for count in counts)):
            constant, pointer = 0, base
            key: tuple = ()
            for axis, (k, stride) in enumerate(zip(position, strides)):
                if isinstance(stride, int):
                    constant += k * stride
                elif k:
                    key += ((axis, k),)
                    if key not in dynamic:
                        step = stride if k == 1 else self.builder.mul(stride, i64(k))
                        dynamic[key] = self.offset(pointer, step)
                    pointer = dynamic[key]
            pointers.append(self.offset(pointer, constant))
        return pointers
