// The quantizers on CPU, compiled on first use (native.py), for one type of values: -DGRANQ_TYPE=float, double, bf16 or _Float16.
//
// A tensor is [samples, outer, channels, inner] in memory: outer == 1 is the contiguous layout, inner == 1 channels_last.
// Every value goes through the operations of functional.py in their order, so that results are equal bit for bit. To be compiled
// without contraction and without fast-math.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

struct bf16 { uint16_t bits; };

using T = GRANQ_TYPE;
template <class U> struct Wide { using type = float; };  // what is computed in: float32, as ranges and scales are
template <> struct Wide<double> { using type = double; };
using W = Wide<T>::type;
constexpr bool HALF = sizeof(T) == 2;

inline W widen(W v) { return v; }
inline float widen(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
template <class U> inline U narrow_to(W v) { return U(v); }
template <> inline bf16 narrow_to<bf16>(W w) {  // to nearest even
    const float v = float(w);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(v != v ? 0x7fc0 : rounded)};
}
inline T narrow(W v) { return narrow_to<T>(v); }
template <class U> struct Largest { static constexpr double value = 65504; };  // of float16
template <> struct Largest<bf16> { static constexpr double value = 3.3895313892515355e38; };

// Vectors of 16 values, of GCC's and clang's own kind: loops over arrays of running minima are not kept in registers.
constexpr int L = 16;
typedef W V __attribute__((vector_size(L * sizeof(W))));
template <class U> struct Lane { using type = int32_t; };
template <> struct Lane<double> { using type = int64_t; };
typedef Lane<W>::type I;
typedef I VI __attribute__((vector_size(L * sizeof(W))));

#if defined(__clang__) || __GNUC__ >= 12
inline V even(V a, V b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline V odd(V a, V b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
#else
inline V even(V a, V b) { return __builtin_shuffle(a, b, VI{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}); }
inline V odd(V a, V b) { return __builtin_shuffle(a, b, VI{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}); }
#endif
inline V least(V a, V b) { return b < a ? b : a; }  // a NaN in b is passed over
inline V greatest(V a, V b) { return b > a ? b : a; }

inline V load(const W* x) {
    V v;
    std::memcpy(&v, x, sizeof(v));
    return v;
}
template <class U> inline V load(const U* x) {
    W lanes[L];
    #pragma omp simd
    for (int j = 0; j < L; j++) lanes[j] = widen(x[j]);
    return load(lanes);
}
inline void store(W* y, V v) { std::memcpy(y, &v, sizeof(v)); }
template <class U> inline void store(U* y, V v) {
    W lanes[L];
    store(lanes, v);
    #pragma omp simd
    for (int j = 0; j < L; j++) y[j] = narrow_to<U>(lanes[j]);
}
inline V all(W v) { return v - V{}; }

// What a value goes through before it is quantized, and which gradients pass back.
enum Before { NOTHING, CLAMP, AFFINE_CLAMP };

struct Limits {
    double low, high;     // clamp, ReLU among it
    double above, below;  // the gradient passes strictly between these; NaN: no limit;
    int nan;              // and for NaN if this is set
};

inline W affine(W v, W alpha, W beta) {  // BatchNorm in evaluation mode, as torch's vectorised kernels compute it
    v = std::fma(v, alpha, beta);
    return HALF ? widen(narrow(v)) : v;
}

struct Affine {
    V alpha, beta;
    inline V operator()(V v) const {
        W lanes[L], a[L], b[L];
        store(lanes, v), store(a, alpha), store(b, beta);
        #pragma omp simd
        for (int j = 0; j < L; j++) lanes[j] = affine(lanes[j], a[j], b[j]);
        return load(lanes);
    }
};

struct Steps {  // of one vector on its way to the range and to the grid
    Affine bn;
    V low, high, above, below;
    VI nan;
    explicit Steps(const Limits& l)
        : bn{}, low(all(W(l.low))), high(all(W(l.high))), above(all(W(l.above))),
          below(all(W(l.below))), nan(VI{} - I(l.nan)) {}
    template <int B> inline V value(V v) const {
        if (B == AFFINE_CLAMP) v = bn(v);
        return clamp<B>(v);
    }
    template <int B> inline V clamp(V v) const {
        if (B == NOTHING) return v;
        v = v < low ? low : v;  // NaN stays
        return v > high ? high : v;
    }
    inline VI passes(V v) const { return ~((v <= above) | (v >= below)) & ((v == v) | nan); }
};

inline V rint(V v) {
    W lanes[L];
    store(lanes, v);
    #pragma omp simd
    for (int j = 0; j < L; j++) lanes[j] = std::rint(lanes[j]);
    return load(lanes);
}

struct Grid { V inv_scale, offset; };

inline V saturate(V v) {  // half precision: the last level may lie beyond the largest value
    if (!HALF) return v;
    const V limit = all(W(Largest<T>::value));
    v = v < -limit ? -limit : v;
    return v > limit ? limit : v;
}

inline V on_grid(V v, Grid g) { return saturate((rint(v * g.inv_scale - g.offset) + g.offset) / g.inv_scale); }

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

struct Shape { int64_t samples, outer, channels, inner; };

// --- contiguous: one row per (sample, channel)

struct Row {
    const T* x;
    T padded[L];
    int64_t n, last;  // the last vector overlaps the one before: neither a range nor a store minds
    Row(const T* row, int64_t length) : x(row), n(length), last(length < L ? 0 : length - L) {
        if (n < L) {
            for (int j = 0; j < L; j++) padded[j] = row[j < n ? j : 0];
            x = padded;
        }
    }
    template <class F> inline void store_at(T* y, int64_t at, F value) const {
        if (n >= L) return store(y + at, value(load(x + at)));
        T out[L];
        store(out, value(load(x)));
        for (int64_t j = 0; j < n; j++) y[j] = out[j];
    }
    template <class F> inline void map(T* y, F value) const {
        for (int64_t i = 0; i < last; i += L) store_at(y, i, value);
        store_at(y, last, value);
    }
};

inline int64_t mask_row(int64_t n) { return (n + 8 * L - 1) / (8 * L) * L; }

inline void store_bits(uint8_t* mask, VI bits) {
    I lanes[L];
    std::memcpy(lanes, &bits, sizeof(bits));
    #pragma omp simd
    for (int j = 0; j < L; j++) mask[j] = uint8_t(lanes[j]);
}

// f(index of the vector) for every vector of a row; 8 vectors share 16 bytes of mask, a bit for each value
template <class F> inline void write_mask(uint8_t* mask, int64_t n, F passes) {
    for (int64_t i = 0; i < n; i += 8 * L, mask += L) {
        VI bits{};
        for (int v = 0; v < 8 && i + v * L < n; v++) bits |= passes(i + v * L) & I(1 << v);
        store_bits(mask, bits);
    }
}

template <int B, bool MASK>
void rows(const T* x, T* y, W* scale, W* zero_point, uint8_t* mask, const W* alpha, const W* beta, Shape s, double levels,
          Limits limits, int threads) {
    const int64_t n = s.inner, count = s.samples * s.channels;
    const int64_t fitting = 24576 / int64_t(n * sizeof(T));  // rows of a group stay in the first cache between the two passes
    const int64_t size = fitting < 1 ? 1 : fitting > L ? L : fitting;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t first = 0; first < count; first += size) {
        const int64_t group = count - first < size ? count - first : size;
        Steps steps(limits);
        V lo[L], hi[L], sum{};
        const auto at_row = [&](int64_t r) {
            if (B == AFFINE_CLAMP) steps.bn = {all(alpha[r % s.channels]), all(beta[r % s.channels])};
            return Row(x + r * n, n);
        };
        for (int64_t g = 0; g < L; g++) {
            if (g >= group) {
                lo[g] = hi[g] = V{};
                continue;
            }
            const Row row = at_row(first + g);
            V l = steps.template value<B>(load(row.x + row.last)), h = l;
            sum += l;
            for (int64_t i = 0; i < row.last; i += L) {
                const V v = steps.template value<B>(load(row.x + i));
                l = least(l, v), h = greatest(h, v), sum += v;
            }
            lo[g] = l, hi[g] = h;
            if (MASK)
                write_mask(mask + (first + g) * mask_row(n), n, [&](int64_t i) {
                    const V v = load(row.x + (i < row.last ? i : row.last));
                    return steps.passes(B == AFFINE_CLAMP ? steps.bn(v) : v);
                });
        }
        // 16 vectors of minima become one with the minimum of each row; all 16 grids are then computed together
        for (int half = L / 2; half; half /= 2)
            for (int g = 0; g < half; g++) {
                lo[g] = least(even(lo[2 * g], lo[2 * g + 1]), odd(lo[2 * g], lo[2 * g + 1]));
                hi[g] = greatest(even(hi[2 * g], hi[2 * g + 1]), odd(hi[2 * g], hi[2 * g + 1]));
            }
        W lows[L], sums = 0;
        store(lows, lo[0]);
        for (int j = 0; j < L; j++) sums += sum[j];
        if (sums != sums)  // a NaN, or infinities: minima and maxima pass over NaN, so look for it row by row
            for (int64_t g = 0; g < group; g++) {
                const Row row = at_row(first + g);
                for (int64_t i = 0; i < n; i++) {
                    const W v = B == AFFINE_CLAMP ? affine(widen(row.x[i]), alpha[(first + g) % s.channels],
                                                           beta[(first + g) % s.channels]) : widen(row.x[i]);
                    if (v != v) lows[g] = v;
                }
            }
        const V low = load(lows);
        const Grid grid = grid_of(low, low != low ? low : hi[0], levels);
        W inv_scales[L], offsets[L], scales[L], zero_points[L];
        store(inv_scales, grid.inv_scale), store(offsets, grid.offset);
        store(scales, 1 / grid.inv_scale), store(zero_points, 0 - grid.offset);
        std::memcpy(scale + first, scales, group * sizeof(W));
        std::memcpy(zero_point + first, zero_points, group * sizeof(W));
        for (int64_t g = 0; g < group; g++) {
            const Grid own{all(inv_scales[g]), all(offsets[g])};
            const Row row = at_row(first + g);
            row.map(y + (first + g) * n, [&](V v) { return on_grid(steps.template value<B>(v), own); });
        }
    }
}

// --- channels_last: 16 channels side by side

struct Columns {  // of one vector: the last one overlaps the one before, and of fewer than 16 channels the rest is padded
    int64_t at, width;
    Columns(int64_t c, int64_t channels) : at(c + L <= channels || channels < L ? c : channels - L), width(channels < L ? channels : L) {}
    template <class U> inline V read(const U* x) const {
        if (width == L) return load(x + at);
        U padded[L];
        for (int j = 0; j < L; j++) padded[j] = x[at + (j < width ? j : 0)];
        return load(padded);
    }
    template <class U> inline void write(U* y, V v) const {
        if (width == L) return store(y + at, v);
        U out[L];
        store(out, v);
        for (int j = 0; j < width; j++) y[at + j] = out[j];
    }
    inline void write_bits(uint8_t* mask, VI bits) const {
        uint8_t out[L];
        store_bits(out, bits);
        std::memcpy(mask + at, out, width);
    }
    inline VI read_bits(const uint8_t* mask) const {
        I lanes[L];
        for (int j = 0; j < L; j++) lanes[j] = mask[at + (j < width ? j : 0)];
        VI v;
        std::memcpy(&v, lanes, sizeof(v));
        return v;
    }
};

constexpr int BLOCK = 4;  // vectors of 16 channels that are read together: whole cache lines, also of half precision

template <int B, bool MASK>
void columns(const T* x, T* y, W* scale, W* zero_point, uint8_t* mask, const W* alpha, const W* beta, Shape s, double levels,
             Limits limits, int threads) {
    const int64_t vectors = (s.channels + L - 1) / L, blocks = (vectors + BLOCK - 1) / BLOCK, n = s.outer;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < s.samples * blocks; task++) {
        const int64_t sample = task / blocks, from = task % blocks * BLOCK;
        const int count = int(vectors - from < BLOCK ? vectors - from : BLOCK);
        const T* in = x + sample * n * s.channels;
        T* out = y + sample * n * s.channels;
        uint8_t* bits_out = MASK ? mask + sample * ((n + 7) / 8) * s.channels : nullptr;
        Steps steps(limits);
        V lo[BLOCK], hi[BLOCK];
        VI nan[BLOCK], bits[BLOCK];
        Affine bn[BLOCK] = {};
        for (int b = 0; b < count; b++) {
            const Columns c((from + b) * L, s.channels);
            if (B == AFFINE_CLAMP) bn[b] = {c.read(alpha), c.read(beta)};
            lo[b] = all(std::numeric_limits<W>::infinity()), hi[b] = -lo[b], nan[b] = bits[b] = VI{};
        }
        for (int64_t i = 0; i < n; i++) {
            for (int b = 0; b < count; b++) {
                const Columns c((from + b) * L, s.channels);
                V v = c.read(in + i * s.channels);
                if (B == AFFINE_CLAMP) v = bn[b](v);
                if (MASK) {
                    bits[b] |= steps.passes(v) & I(1 << (i & 7));
                    if ((i & 7) == 7 || i == n - 1) c.write_bits(bits_out + i / 8 * s.channels, bits[b]), bits[b] = VI{};
                }
                v = steps.template clamp<B>(v);
                lo[b] = least(lo[b], v), hi[b] = greatest(hi[b], v), nan[b] |= v != v;
            }
        }
        Grid grids[BLOCK];
        for (int b = 0; b < count; b++) {
            const Columns c((from + b) * L, s.channels);
            const V none = all(std::numeric_limits<W>::quiet_NaN());
            grids[b] = grid_of(nan[b] ? none : lo[b], nan[b] ? none : hi[b], levels);
            c.write(scale + sample * s.channels, 1 / grids[b].inv_scale);
            c.write(zero_point + sample * s.channels, 0 - grids[b].offset);
        }
        for (int64_t i = 0; i < n; i++)
            for (int b = 0; b < count; b++) {
                const Columns c((from + b) * L, s.channels);
                V v = c.read(in + i * s.channels);
                if (B == AFFINE_CLAMP) v = bn[b](v);
                c.write(out + i * s.channels, on_grid(steps.template clamp<B>(v), grids[b]));
            }
    }
}

// --- frozen ranges: Brevitas's IntQuant, and the gradient of its path

struct Frozen {
    V scale, zero_point;
    W low, high;  // of the integers
    inline V integers(V v) const { return rint(v / scale + zero_point); }
    inline V value(V q) const {
        q = q > high ? all(high) : q;
        q = q < low ? all(low) : q;
        return (q - zero_point) * scale;
    }
    inline VI passes(V q) const { return ~((q > high) | (q < low)); }
};

template <int B, bool MASK>
void frozen_rows(const T* x, T* y, uint8_t* mask, const W* scale, const W* zero_point, Shape s, W lowest, W highest, Limits limits,
                 int threads) {
    const int64_t n = s.inner;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < s.samples * s.channels; r++) {
        const Steps steps(limits);
        const Frozen frozen{all(scale[r % s.channels]), all(zero_point[r % s.channels]), lowest, highest};
        const Row row(x + r * n, n);
        if (MASK)
            write_mask(mask + r * mask_row(n), n, [&](int64_t i) {
                const V v = load(row.x + (i < row.last ? i : row.last));
                const VI q = frozen.passes(frozen.integers(steps.template clamp<B>(v)));
                return B == CLAMP ? q & steps.passes(v) : q;
            });
        row.map(y + r * n, [&](V v) { return frozen.value(frozen.integers(steps.template clamp<B>(v))); });
    }
}

template <int B, bool MASK>
void frozen_columns(const T* x, T* y, uint8_t* mask, const W* scale, const W* zero_point, Shape s, W lowest, W highest,
                    Limits limits, int threads) {
    const int64_t groups = (s.outer + 7) / 8;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < s.samples * groups; task++) {
        const int64_t sample = task / groups, from = task % groups * 8, to = from + 8 < s.outer ? from + 8 : s.outer;
        const Steps steps(limits);
        for (int64_t at = 0; at < s.channels; at += L) {
            const Columns c(at, s.channels);
            const Frozen frozen{c.read(scale), c.read(zero_point), lowest, highest};
            VI bits{};
            for (int64_t i = from; i < to; i++) {
                const int64_t offset = (sample * s.outer + i) * s.channels;
                const V v = c.read(x + offset), q = frozen.integers(steps.template clamp<B>(v));
                if (MASK) bits |= frozen.passes(q) & (B == CLAMP ? steps.passes(v) : VI{} - 1) & I(1 << (i & 7));
                c.write(y + offset, frozen.value(q));
            }
            if (MASK) c.write_bits(mask + task * s.channels, bits);
        }
    }
}

// --- backward: the gradient where it passes, zero elsewhere; of frozen ranges also times and through the scale, as autograd does

template <bool SCALED> inline V back(V grad, VI passes, V scale) { return passes ? (SCALED ? grad * scale / scale : grad) : V{}; }

template <bool SCALED>
void backward_rows(const T* grad, const uint8_t* mask, T* out, const W* scale, Shape s, int threads) {
    const int64_t n = s.inner;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < s.samples * s.channels; r++) {
        const Row row(grad + r * n, n);
        const V by = SCALED ? all(scale[r % s.channels]) : V{};
        const uint8_t* bits = mask + r * mask_row(n);
        for (int64_t i = 0; i < n; i += 8 * L, bits += L) {
            I lanes[L];
            #pragma omp simd
            for (int j = 0; j < L; j++) lanes[j] = bits[j];
            VI passes;
            std::memcpy(&passes, lanes, sizeof(passes));
            for (int v = 0; v < 8 && i + v * L < n; v++)
                row.store_at(out + r * n, i + v * L < row.last ? i + v * L : row.last,
                             [&](V g) { return back<SCALED>(g, (passes & I(1 << v)) != 0, by); });
        }
    }
}

template <bool SCALED>
void backward_columns(const T* grad, const uint8_t* mask, T* out, const W* scale, Shape s, int threads) {
    const int64_t groups = (s.outer + 7) / 8;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < s.samples * groups; task++) {
        const int64_t sample = task / groups, from = task % groups * 8, to = from + 8 < s.outer ? from + 8 : s.outer;
        for (int64_t at = 0; at < s.channels; at += L) {
            const Columns c(at, s.channels);
            const V by = SCALED ? c.read(scale) : V{};
            const VI bits = c.read_bits(mask + task * s.channels);
            for (int64_t i = from; i < to; i++) {
                const int64_t offset = (sample * s.outer + i) * s.channels;
                c.write(out + offset, back<SCALED>(c.read(grad + offset), (bits & I(1 << (i & 7))) != 0, by));
            }
        }
    }
}

inline bool is_rows(Shape s) { return s.outer == 1 && s.inner != 1; }

template <int B, bool MASK, class... A> void forward(Shape s, A... a) {
    is_rows(s) ? rows<B, MASK>(a...) : columns<B, MASK>(a...);
}

template <int B, bool MASK, class... A> void frozen_forward(Shape s, A... a) {
    is_rows(s) ? frozen_rows<B, MASK>(a...) : frozen_columns<B, MASK>(a...);
}

}  // namespace

extern "C" {

// BatchNorm in evaluation mode as x * alpha + beta; weight and bias may be null.
void batch_norm_affine(const W* mean, const W* var, const W* weight, const W* bias, double eps, int64_t channels, W* alpha, W* beta) {
    for (int64_t c = 0; c < channels; c++) {
        alpha[c] = 1 / std::sqrt(var[c] + W(eps)) * (weight ? weight[c] : W(1));
        beta[c] = std::fma(-mean[c], alpha[c], bias ? bias[c] : W(0));
    }
}

// Ranges, scales and fake quantization. mask, alpha and beta may be null.
void granq_forward(const T* x, T* y, W* scale, W* zero_point, uint8_t* mask, const W* alpha, const W* beta, int64_t samples,
                   int64_t outer, int64_t channels, int64_t inner, double levels, int clamp, double low, double high, double above,
                   double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    const auto run = [&](auto function) { function(s, x, y, scale, zero_point, mask, alpha, beta, s, levels, l, threads); };
    if (alpha) mask ? run([](auto... a) { forward<AFFINE_CLAMP, true>(a...); }) : run([](auto... a) { forward<AFFINE_CLAMP, false>(a...); });
    else if (clamp) mask ? run([](auto... a) { forward<CLAMP, true>(a...); }) : run([](auto... a) { forward<CLAMP, false>(a...); });
    else run([](auto... a) { forward<NOTHING, false>(a...); });
}

// With the scale and zero point of each channel, integers clamped to [lowest, highest]. mask may be null.
void frozen_forward(const T* x, T* y, uint8_t* mask, const W* scale, const W* zero_point, int64_t samples, int64_t outer,
                    int64_t channels, int64_t inner, double lowest, double highest, int clamp, double low, double high,
                    double above, double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    const auto run = [&](auto function) { function(s, x, y, mask, scale, zero_point, s, W(lowest), W(highest), l, threads); };
    if (clamp) mask ? run([](auto... a) { frozen_forward<CLAMP, true>(a...); }) : run([](auto... a) { frozen_forward<CLAMP, false>(a...); });
    else mask ? run([](auto... a) { frozen_forward<NOTHING, true>(a...); }) : run([](auto... a) { frozen_forward<NOTHING, false>(a...); });
}

// The gradient of either, from its mask; with the scale of frozen ranges.
void masked_backward(const T* grad, const uint8_t* mask, T* out, const W* scale, int64_t samples, int64_t outer, int64_t channels,
                     int64_t inner, int threads) {
    const Shape s{samples, outer, channels, inner};
    if (scale) is_rows(s) ? backward_rows<true>(grad, mask, out, scale, s, threads) : backward_columns<true>(grad, mask, out, scale, s, threads);
    else is_rows(s) ? backward_rows<false>(grad, mask, out, scale, s, threads) : backward_columns<false>(grad, mask, out, scale, s, threads);
}

}  // extern "C"
