// Vectors of values, and what a value goes through before it is quantized.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// Of fewer than 16 values; the rest of the vector repeats the first. Apart, so that loops over whole vectors keep their registers.
template <class U> [[gnu::noinline]] void pad(const U* x, int64_t n, U* padded) {
    for (int j = 0; j < L; j++) padded[j] = x[j < n ? j : 0];
}
template <class U> [[gnu::noinline]] V load_part(const U* x, int64_t n) {
    U padded[L];
    pad(x, n, padded);
    return load(padded);
}
template <class U> [[gnu::noinline]] void store_part(U* y, int64_t n, V v) {
    U out[L];
    store(out, v);
    for (int64_t j = 0; j < n; j++) y[j] = out[j];
}

// A bit for each lane of a comparison, and back.
inline uint16_t bits_of(VI lanes) {
#if defined(__AVX512DQ__)
    if (sizeof(W) == 4) {
        __m512i v;
        std::memcpy(&v, &lanes, sizeof(v));
        return _mm512_movepi32_mask(v);
    }
#elif defined(__AVX2__)
    if (sizeof(W) == 4) {
        __m256 half[2];
        std::memcpy(half, &lanes, sizeof(half));
        return uint16_t(_mm256_movemask_ps(half[0]) | _mm256_movemask_ps(half[1]) << 8);
    }
#endif
    uint16_t bits = 0;
    for (int j = 0; j < L; j++) bits |= uint16_t((lanes[j] & 1) << j);
    return bits;
}
// Of the lanes that are not below low and not above high (STRICT: nor equal to them). NaN is neither.
template <bool STRICT> inline uint16_t bits_between(V v, V low, V high) {
#ifdef __AVX512F__
    if (sizeof(W) == 4) {
        __m512 x, l, h;
        std::memcpy(&x, &v, sizeof(x)), std::memcpy(&l, &low, sizeof(x)), std::memcpy(&h, &high, sizeof(x));
        const __mmask16 above = _mm512_cmp_ps_mask(x, l, STRICT ? _CMP_NLE_UQ : _CMP_NLT_UQ);
        return _mm512_mask_cmp_ps_mask(above, x, h, STRICT ? _CMP_NGE_UQ : _CMP_NGT_UQ);
    }
#endif
    return bits_of(STRICT ? ~((v <= low) | (v >= high)) : ~((v < low) | (v > high)));
}
inline VI lanes_of(uint16_t bits) {
    const VI own{1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7,
                 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    return (own & (VI{} + I(bits))) != 0;
}

inline V rint(V v) {
    W lanes[L];
    store(lanes, v);
    #pragma omp simd
    for (int j = 0; j < L; j++) lanes[j] = std::rint(lanes[j]);
    return load(lanes);
}

inline V fma(V a, V b, V c) {
    W x[L], y[L], z[L];
    store(x, a), store(y, b), store(z, c);
    #pragma omp simd
    for (int j = 0; j < L; j++) x[j] = std::fma(x[j], y[j], z[j]);
    return load(x);
}
inline V rounded(V v) {  // to the type of the tensors
    if (!HALF) return v;
    T lanes[L];
    store(lanes, v);
    return load(lanes);
}

// What a value goes through before it is quantized: a clamp (ReLU among it), before that BatchNorm in evaluation mode, and between
// them the addition of another tensor, if there is one. And which gradients pass back.
enum Before { NOTHING, CLAMP, NORM };

struct Limits {
    double low, high;     // clamp, ReLU among it
    double above, below;  // the gradient passes strictly between these; NaN: no limit;
    int nan;              // and for NaN if this is set
};

struct Steps {  // of one vector on its way to the range and to the grid
    V low, high, above, below;
    bool nan;
    explicit Steps(const Limits& l)
        : low(all(W(l.low))), high(all(W(l.high))), above(all(W(l.above))), below(all(W(l.below))), nan(l.nan) {}
    template <int B> inline V clamp(V v) const {
        if (B == NOTHING) return v;
        v = v < low ? low : v;  // NaN stays
        return v > high ? high : v;
    }
    inline uint16_t passes(V v) const { return bits_between<true>(v, above, below) & (nan ? 0xffff : bits_of(v == v)); }
};

struct Ahead {  // of the clamp: x * alpha + beta for each channel, + residual. Null where there is none
    const W *alpha, *beta;
    const T* residual;
};

template <int B> struct Norm {  // of one vector; what torch's kernels compute, in one rounding
    V alpha, beta;
    inline V operator()(V v) const { return B == NORM ? rounded(fma(v, alpha, beta)) : v; }
};

struct Shape { int64_t samples, outer, channels, inner; };
inline bool is_rows(Shape s) { return s.outer == 1 && s.inner != 1; }

inline int64_t vectors_in(int64_t n) { return (n + L - 1) / L; }

// The vectors of a row: f(where it begins, its number). The last overlaps the one before, which neither a range nor a store minds.
template <class F> inline void each_vector(int64_t n, F f) {
    const int64_t last = vectors_in(n) - 1;
    for (int64_t k = 0; k < last; k++) f(k * L, k);
    f(n < L ? 0 : n - L, last);
}

template <int B> struct Row {  // of n values, to be read in whole vectors as they are when they are clamped
    T padded[L], padded_residual[L];
    const T *x, *residual;
    Norm<B> norm;
    Row(const T* values, Ahead ahead, int64_t row, int64_t channels, int64_t n) : x(values + row * n), residual(ahead.residual) {
        if (n < L) pad(x, n, padded), x = padded;
        if (B != NORM) return;
        norm = {all(ahead.alpha[row % channels]), all(ahead.beta[row % channels])};
        if (!residual) return;
        residual += row * n;
        if (n < L) pad(residual, n, padded_residual), residual = padded_residual;
    }
    inline V operator()(int64_t i) const {
        const V v = norm(load(x + i));
        return B == NORM && residual ? rounded(v + load(residual + i)) : v;
    }
};

// A result that fills half of the last cache will not be there when it is read again: it is written past it, which saves reading
// its lines first; where vectors are whole lines.
constexpr int64_t HALF_OF_CACHE = 1 << 24;  // of 32 MB, which the system may tell wrong
#ifdef __AVX2__
constexpr bool CAN_STREAM = sizeof(T) == 4;
#else
constexpr bool CAN_STREAM = false;
#endif

struct Out {
    T* y;
    bool past_cache;
    Out(T* to, Shape s) : y(to), past_cache(
        s.samples * s.outer * s.channels * s.inner * int64_t(sizeof(T)) >= HALF_OF_CACHE
        && (is_rows(s) ? s.inner : s.channels) % L == 0 && uintptr_t(to) % 64 == 0) {}
    template <class F> inline void with(F f) const {  // f(past_cache, a constant), so that loops do not ask
        CAN_STREAM && past_cache ? f(std::bool_constant<CAN_STREAM>()) : f(std::false_type());
    }
    template <bool PAST> inline void write(int64_t at, V v) const {
#if defined(__AVX512F__)
        if (PAST) {
            __m512 line;  // whole, so that none is written in parts
            std::memcpy(&line, &v, sizeof(line));
            return _mm512_stream_ps((float*)(y + at), line);
        }
#elif defined(__AVX2__)
        if (PAST) {
            __m256 halves[2];
            std::memcpy(halves, &v, sizeof(halves));
            return _mm256_stream_ps((float*)(y + at), halves[0]), _mm256_stream_ps((float*)(y + at) + 8, halves[1]);
        }
#endif
        store(y + at, v);
    }
};

template <class F> inline void in_parallel(int64_t count, int threads, F f) {  // f(0) to f(count - 1)
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i++) f(i);
#ifdef __AVX2__
        _mm_sfence();  // what went past the cache is there before another thread reads
#endif
    }
}

// Calls for the values at x + at, and for what is added to them, into the second cache: what is read next, while a result goes past
// the cache, so that memory is read and written at the same time. Addresses only, which may lie behind the end of a tensor.
template <int B> inline void fetch(const T* x, Ahead ahead, int64_t at) {
    __builtin_prefetch((const void*)(uintptr_t(x) + at * sizeof(T)), 0, 2);
    if (B == NORM && ahead.residual) __builtin_prefetch((const void*)(uintptr_t(ahead.residual) + at * sizeof(T)), 0, 2);
}

// y = f(where a vector begins, its number, whether it goes past the cache, a constant) for every vector of a row
template <class F> inline void write_row(const Out& y, int64_t row, int64_t n, F f) {
    if (n < L) return store_part(y.y + row * n, n, f(int64_t(0), int64_t(0), std::false_type()));
    y.with([&](auto past) { each_vector(n, [&](int64_t i, int64_t k) { y.write<past.value>(row * n + i, f(i, k, past)); }); });
}

// One vector of channels; the last, too, overlaps the one before. WIDE: there are 16 channels or more, as is known at compile time.
template <bool WIDE> struct Columns {
    int64_t at, channels;
    Columns(int64_t from, int64_t n) : at(from + L <= n || n < L ? from : n - L), channels(n) {}
    template <class U> inline V read(const U* x) const { return WIDE || __builtin_expect(channels >= L, 1) ? load(x + at) : load_part(x, channels); }
    template <class U> inline void write(U* y, V v) const {
        WIDE || __builtin_expect(channels >= L, 1) ? store(y + at, v) : store_part(y, channels, v);
    }
    template <bool PAST> inline void write(const Out& y, int64_t offset, V v) const {
        WIDE || __builtin_expect(channels >= L, 1) ? y.write<PAST>(offset + at, v) : store_part(y.y + offset, channels, v);
    }
    template <int B> inline Norm<B> norm(Ahead ahead) const {
        return B == NORM ? Norm<B>{read(ahead.alpha), read(ahead.beta)} : Norm<B>{};
    }
    // values, from offset on, as they are when they are clamped
    template <int B> inline V read(const T* x, Ahead ahead, int64_t offset, const Norm<B>& norm) const {
        const V v = norm(read(x + offset));
        return B == NORM && ahead.residual ? rounded(v + read(ahead.residual + offset)) : v;
    }
};

}  // namespace
