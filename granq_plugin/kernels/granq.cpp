// The quantizers on CPU, compiled on first use (native.py), for one type of values: -DGRANQ_TYPE=float, double, bf16 or _Float16.
//
// A tensor is [samples, outer, channels, inner] in memory: outer == 1 is the contiguous layout, inner == 1 channels_last.
// Every value goes through the operations of functional.py in their order, so that results are equal bit for bit. To be compiled
// without contraction and without fast-math.

#include "dynamic.h"
#include "frozen.h"

namespace {

template <bool CLAMP, bool MASK, class... A> void forward(Shape s, A... a) {
    is_rows(s) ? rows<CLAMP, MASK>(a...) : columns<CLAMP, MASK>(a...);
}

template <bool CLAMP, bool MASK, class... A> void frozen_forward(Shape s, A... a) {
    is_rows(s) ? frozen_rows<CLAMP, MASK>(a...) : frozen_columns<CLAMP, MASK>(a...);
}

}  // namespace

extern "C" {

// Ranges, scales and fake quantization. mask (a bit for each value of a vector) may be null.
void granq_forward(const T* x, T* y, W* scale, W* zero_point, uint16_t* mask, int64_t samples, int64_t outer,
                   int64_t channels, int64_t inner, double levels, int clamp, double low, double high, double above, double below,
                   int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    const auto run = [&](auto function) { function(s, x, y, scale, zero_point, mask, s, levels, l, threads); };
    if (clamp) mask ? run([](auto... a) { forward<true, true>(a...); }) : run([](auto... a) { forward<true, false>(a...); });
    else run([](auto... a) { forward<false, false>(a...); });
}

// With the scale and zero point of each channel, integers clamped to [lowest, highest]. mask may be null.
void frozen_forward(const T* x, T* y, uint16_t* mask, const W* scale, const W* zero_point, int64_t samples, int64_t outer,
                    int64_t channels, int64_t inner, double lowest, double highest, int clamp, double low, double high,
                    double above, double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    const auto run = [&](auto function) { function(s, x, y, mask, scale, zero_point, s, W(lowest), W(highest), l, threads); };
    if (clamp) mask ? run([](auto... a) { frozen_forward<true, true>(a...); }) : run([](auto... a) { frozen_forward<true, false>(a...); });
    else mask ? run([](auto... a) { frozen_forward<false, true>(a...); }) : run([](auto... a) { frozen_forward<false, false>(a...); });
}

// The gradient of either, from its mask; with the scale of frozen ranges.
void masked_backward(const T* grad, const uint16_t* mask, T* out, const W* scale, int64_t samples, int64_t outer, int64_t channels,
                     int64_t inner, int threads) {
    const Shape s{samples, outer, channels, inner};
    if (scale) is_rows(s) ? backward_rows<true>(grad, mask, out, scale, s, threads) : backward_columns<true>(grad, mask, out, scale, s, threads);
    else is_rows(s) ? backward_rows<false>(grad, mask, out, scale, s, threads) : backward_columns<false>(grad, mask, out, scale, s, threads);
}

}  // extern "C"
