// Ranges that follow the data: functional.granq.
#pragma once

#include "vectors.h"

namespace {

struct Grid { V inv_scale, offset; };

inline V saturate(V v) {  // half precision: the last level may lie beyond the largest value
    if (!HALF) return v;
    const V limit = all(W(Largest<T>::value));
    v = v < -limit ? -limit : v;
    return v > limit ? limit : v;
}

inline V integers(V v, Grid g) { return rint(v * g.inv_scale - g.offset); }
inline V level(V integers, Grid g) { return saturate((integers + g.offset) / g.inv_scale); }

// functional.inverse_scale of 16 ranges; NaN where a range is
inline Grid grid_of(V lo, V hi, double levels) {
    V half = hi * W(0.5) - lo * W(0.5);
    const V smallest = all(W(0.5e-8));
    half = half < smallest ? smallest : half;
    const V magnitude = greatest(hi, -lo) * W(levels / double(std::numeric_limits<W>::max()));
    const V divisor = magnitude > half ? magnitude : half;
    Grid g;
    g.inv_scale = 1 / divisor * W(levels / 2);
    g.offset = rint(g.inv_scale * lo);
    return g;
}

// The levels of one row: up to 32 of them are looked up, which costs less than the division behind each value. The integers of a
// row begin at 0 and grow with its values, so that the integer of the maximum bounds them.
#ifdef __AVX512F__
struct Table {
    static constexpr bool EXISTS = sizeof(W) == 4;
    __m512 low, high, inv_scale, offset;
    Table(Grid g, W highest) {
        const V first{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const V a = level(first, g), b = highest < L ? a : level(first + L, g);
        std::memcpy(&low, &a, sizeof(low)), std::memcpy(&high, &b, sizeof(high));
        std::memcpy(&inv_scale, &g.inv_scale, sizeof(low)), std::memcpy(&offset, &g.offset, sizeof(low));
    }
    static bool serves(int64_t n, W highest, W offset) {  // of -0, the sign of a zero depends on the value
        return EXISTS && n > L && highest < 2 * L && !(offset == 0 && std::signbit(offset));
    }
    inline V operator()(V v) const {
        __m512 x;
        std::memcpy(&x, &v, sizeof(x));
        const __m512i integers = _mm512_cvtps_epi32(_mm512_sub_ps(_mm512_mul_ps(x, inv_scale), offset));
        x = _mm512_permutex2var_ps(low, integers, high);
        std::memcpy(&v, &x, sizeof(x));
        return v;
    }
};
#else
struct Table {
    Table(Grid, W) {}
    static bool serves(int64_t, W, W) { return false; }
    inline V operator()(V v) const { return v; }
};
#endif

// --- contiguous: one row per (sample, channel)

template <int B, bool MASK>
void rows(const T* x, T* y, W* scale, W* zero_point, uint16_t* mask, Ahead ahead, Shape s, double levels, Limits limits,
          int threads) {
    const int64_t n = s.inner, count = s.samples * s.channels;
    const Out out(y, s);
    const int64_t fitting = 16384 / int64_t(n * sizeof(T));  // rows of a group stay in the first cache between the two passes
    const int64_t size = fitting < 1 ? 1 : fitting > L ? L : fitting;
    in_parallel((count + size - 1) / size, threads, [&](int64_t task) {
        const int64_t first = task * size, group = count - first < size ? count - first : size;
        const Steps steps(limits);
        V lo[L], hi[L], sums{};
        for (int64_t g = 0; g < L; g++) {
            if (g >= group) {
                lo[g] = hi[g] = V{};
                continue;
            }
            const Row<B> row(x, ahead, first + g, s.channels, n);
            uint16_t* bits = MASK ? mask + (first + g) * vectors_in(n) : nullptr;
            V l = all(std::numeric_limits<W>::infinity()), h = -l, sum{};
            each_vector(n, [&](int64_t i, int64_t k) {
                const V v = row(i);
                if (MASK) bits[k] = steps.passes(v);
                l = least(l, v), h = greatest(h, v), sum += v;
            });
            lo[g] = steps.template clamp<B>(l), hi[g] = steps.template clamp<B>(h), sums += sum;  // clamping keeps the order
        }
        // 16 vectors of minima become one with the minimum of each row; all 16 grids are then computed together
        for (int half = L / 2; half; half /= 2)
            for (int g = 0; g < half; g++) {
                lo[g] = least(even(lo[2 * g], lo[2 * g + 1]), odd(lo[2 * g], lo[2 * g + 1]));
                hi[g] = greatest(even(hi[2 * g], hi[2 * g + 1]), odd(hi[2 * g], hi[2 * g + 1]));
            }
        W lows[L];
        store(lows, lo[0]);
        if (bits_of(sums != sums))  // a NaN, or infinities: minima and maxima pass over NaN, so look for it row by row
            for (int64_t g = 0; g < group; g++) {
                const Row<B> row(x, ahead, first + g, s.channels, n);
                VI nan{};
                each_vector(n, [&](int64_t i, int64_t) { nan |= row(i) != row(i); });
                if (bits_of(nan)) lows[g] = std::numeric_limits<W>::quiet_NaN();
            }
        const V low = load(lows), high = low != low ? low : hi[0];
        const Grid grid = grid_of(low, high, levels);
        W inv_scales[L], offsets[L], scales[L], zero_points[L], highest[L];
        store(inv_scales, grid.inv_scale), store(offsets, grid.offset), store(highest, integers(high, grid));
        store(scales, 1 / grid.inv_scale), store(zero_points, 0 - grid.offset);
        std::memcpy(scale + first, scales, group * sizeof(W));
        std::memcpy(zero_point + first, zero_points, group * sizeof(W));
        for (int64_t g = 0; g < group; g++) {
            const Grid own{all(inv_scales[g]), all(offsets[g])};
            const Row<B> row(x, ahead, first + g, s.channels, n);
            const auto quantize = [&](auto on_grid) {
                write_row(out, first + g, n, [&](int64_t i, int64_t, auto past) {
                    if (past.value) fetch<B>(x, ahead, (first + group + g) * n + i);  // the same place in the next group
                    return on_grid(steps.template clamp<B>(row(i)));
                });
            };
            if (Table::serves(n, highest[g], offsets[g])) quantize(Table(own, highest[g]));
            else quantize([&](V v) { return level(integers(v, own), own); });
        }
    });
}

// --- channels_last: 16 channels side by side

constexpr int BLOCK = 4;  // vectors of 16 channels that are read together: whole cache lines, also of half precision

template <int B, bool MASK, int N>  // N vectors of channels, from one on, of one sample
void column_block(const T* x, const Out& y, int64_t at, W* scale, W* zero_point, uint16_t* mask, Ahead ahead, int64_t from, int64_t n, int64_t channels,
                  double levels, const Steps& steps) {
    const int64_t next = from + N < vectors_in(channels) ? N * L : n * channels - from * L;  // block of channels, or sample
    V lo[N], hi[N], sum[N];
    Norm<B> norm[N];
    const auto span = [&](int b) { return Columns<(N > 1)>((from + b) * L, channels); };
    for (int b = 0; b < N; b++) {
        lo[b] = all(std::numeric_limits<W>::infinity()), hi[b] = -lo[b], sum[b] = V{};
        norm[b] = span(b).template norm<B>(ahead);
    }
    for (int64_t i = 0; i < n; i++)
        #pragma GCC unroll 4
        for (int b = 0; b < N; b++) {
            const V v = span(b).template read<B>(x, ahead, i * channels, norm[b]);
            if (MASK) mask[i * vectors_in(channels) + from + b] = steps.passes(v);
            lo[b] = least(lo[b], v), hi[b] = greatest(hi[b], v), sum[b] += v;
        }
    Grid grids[N];
    for (int b = 0; b < N; b++) {
        lo[b] = steps.template clamp<B>(lo[b]), hi[b] = steps.template clamp<B>(hi[b]);
        VI nan{};
        if (bits_of(sum[b] != sum[b]))  // as in rows
            for (int64_t i = 0; i < n; i++) {
                const V v = span(b).template read<B>(x, ahead, i * channels, norm[b]);
                nan |= v != v;
            }
        const V none = all(std::numeric_limits<W>::quiet_NaN());
        grids[b] = grid_of(nan ? none : lo[b], nan ? none : hi[b], levels);
        span(b).write(scale, 1 / grids[b].inv_scale);
        span(b).write(zero_point, 0 - grids[b].offset);
    }
    y.with([&](auto past) {
        for (int64_t i = 0; i < n; i++)
            #pragma GCC unroll 4
            for (int b = 0; b < N; b++) {
                if (past.value) fetch<B>(x, ahead, i * channels + (from + b) * L + next);
                const V v = steps.template clamp<B>(span(b).template read<B>(x, ahead, i * channels, norm[b]));
                span(b).template write<past.value>(y, at + i * channels, level(integers(v, grids[b]), grids[b]));
            }
    });
}

template <int B, bool MASK>
void columns(const T* x, T* y, W* scale, W* zero_point, uint16_t* mask, Ahead ahead, Shape s, double levels, Limits limits,
             int threads) {
    const int64_t vectors = vectors_in(s.channels), blocks = (vectors + BLOCK - 1) / BLOCK, n = s.outer;
    const Out out(y, s);
    in_parallel(s.samples * blocks, threads, [&](int64_t task) {
        const int64_t sample = task / blocks, from = task % blocks * BLOCK, at = sample * n;
        const Steps steps(limits);
        const Ahead of_sample{ahead.alpha, ahead.beta, ahead.residual ? ahead.residual + at * s.channels : nullptr};
        const auto run = [&](auto block) {
            block(x + at * s.channels, out, at * s.channels, scale + sample * s.channels, zero_point + sample * s.channels,
                  MASK ? mask + at * vectors : nullptr, of_sample, from, n, s.channels, levels, steps);
        };
        switch (vectors - from) {
            case 1: run(column_block<B, MASK, 1>); break;
            case 2: run(column_block<B, MASK, 2>); break;
            case 3: run(column_block<B, MASK, 3>); break;
            default: run(column_block<B, MASK, BLOCK>);
        }
    });
}

}  // namespace
