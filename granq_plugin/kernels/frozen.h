// Frozen ranges: Brevitas's IntQuant, and the gradients.
#pragma once

#include "vectors.h"

namespace {

struct Frozen {
    V scale, zero_point;
    W low, high;  // of the integers
    inline V integers(V v) const { return rint(v / scale + zero_point); }
    inline V value(V q) const {
        q = q > high ? all(high) : q;
        q = q < low ? all(low) : q;
        return (q - zero_point) * scale;
    }
    inline uint16_t passes(V q) const { return bits_between<false>(q, all(low), all(high)); }
};

// One vector: its value on the grid, and its bits
template <int B, bool MASK> inline V frozen_value(V v, const Frozen& frozen, const Steps& steps, uint16_t* bits) {
    const V q = frozen.integers(steps.template clamp<B>(v));
    if (MASK) *bits = B != NOTHING ? frozen.passes(q) & steps.passes(v) : frozen.passes(q);
    return frozen.value(q);
}

template <int B, bool MASK>
void frozen_rows(const T* x, T* y, uint16_t* mask, const W* scale, const W* zero_point, Ahead ahead, Shape s, W lowest, W highest,
                 Limits limits, int threads) {
    const int64_t n = s.inner;
    const Out out(y, s);
    in_parallel(s.samples * s.channels, threads, [&](int64_t r) {
        const Steps steps(limits);
        const Frozen frozen{all(scale[r % s.channels]), all(zero_point[r % s.channels]), lowest, highest};
        uint16_t* bits = MASK ? mask + r * vectors_in(n) : nullptr;
        const Row<B> row(x, ahead, r, s.channels, n);
        write_row(out, r, n, [&](int64_t i, int64_t k, auto) { return frozen_value<B, MASK>(row(i), frozen, steps, bits + k); });
    });
}

constexpr int PIXELS = 8;  // that share what is loaded for their channels

// f(a vector of channels, its number, the first pixel, the one behind the last)
template <class F> inline void each_column_block(Shape s, int threads, F f) {
    const int64_t pixels = s.samples * s.outer;
    in_parallel((pixels + PIXELS - 1) / PIXELS, threads, [&](int64_t block) {
        const int64_t from = block * PIXELS, to = from + PIXELS < pixels ? from + PIXELS : pixels;
        for (int64_t at = 0; at < s.channels; at += L) f(Columns<false>(at, s.channels), at / L, from, to);
    });
}

template <int B, bool MASK>
void frozen_columns(const T* x, T* y, uint16_t* mask, const W* scale, const W* zero_point, Ahead ahead, Shape s, W lowest,
                    W highest, Limits limits, int threads) {
    const int64_t vectors = vectors_in(s.channels);
    const Out out(y, s);
    const Steps steps(limits);
    each_column_block(s, threads, [&](Columns<false> columns, int64_t number, int64_t from, int64_t to) {
        const Frozen frozen{columns.read(scale), columns.read(zero_point), lowest, highest};
        const Norm<B> norm = columns.template norm<B>(ahead);
        out.with([&](auto past) {
            for (int64_t i = from; i < to; i++)
                columns.write<past.value>(out, i * s.channels, frozen_value<B, MASK>(
                    columns.template read<B>(x, ahead, i * s.channels, norm), frozen, steps,
                    MASK ? mask + i * vectors + number : nullptr));
        });
    });
}

// --- backward: the gradient where it passes, zero elsewhere; of frozen ranges also times and through the scale, as autograd does

template <bool SCALED> inline V back(V grad, uint16_t bits, V scale) {
    return lanes_of(bits) ? (SCALED ? grad * scale / scale : grad) : V{};
}

template <bool SCALED>
void backward_rows(const T* grad, const uint16_t* mask, T* result, const W* scale, Shape s, int threads) {
    const int64_t n = s.inner;
    const Out out(result, s);
    in_parallel(s.samples * s.channels, threads, [&](int64_t r) {
        const V by = SCALED ? all(scale[r % s.channels]) : V{};
        const uint16_t* bits = mask + r * vectors_in(n);
        const Row<NOTHING> row(grad, {}, r, s.channels, n);
        write_row(out, r, n, [&](int64_t i, int64_t k, auto) { return back<SCALED>(row(i), bits[k], by); });
    });
}

template <bool SCALED>
void backward_columns(const T* grad, const uint16_t* mask, T* result, const W* scale, Shape s, int threads) {
    const int64_t vectors = vectors_in(s.channels);
    const Out out(result, s);
    each_column_block(s, threads, [&](Columns<false> columns, int64_t number, int64_t from, int64_t to) {
        const V by = SCALED ? columns.read(scale) : V{};
        out.with([&](auto past) {
            for (int64_t i = from; i < to; i++)
                columns.write<past.value>(
                    out, i * s.channels, back<SCALED>(columns.read(grad + i * s.channels), mask[i * vectors + number], by));
        });
    });
}

}  // namespace
