// The quantizers on CPU, compiled on first use (native.py), for one type of values: -DGRANQ_TYPE=float, double, bf16 or _Float16.
//
// A tensor is [samples, outer, channels, inner] in memory: outer == 1 is the contiguous layout, inner == 1 channels_last.
// Every value goes through the operations of functional.py in their order, so that results are equal bit for bit. To be compiled
// without contraction and without fast-math.

#include "dynamic.h"
#include "frozen.h"

namespace {

// f(what comes before, whether a mask is written), as constants
template <class F> void with_constants(const Ahead& ahead, bool clamp, bool mask, F f) {
    const auto with_mask = [&](auto b) { mask ? f(b, std::true_type()) : f(b, std::false_type()); };
    constexpr int norm = sizeof(W) == 4 ? NORM : CLAMP;  // of float64 there is none
    if (ahead.alpha) with_mask(std::integral_constant<int, norm>());
    else if (clamp) with_mask(std::integral_constant<int, CLAMP>());
    else with_mask(std::integral_constant<int, NOTHING>());
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

// Ranges, scales and fake quantization. mask (a bit for each value of a vector), alpha and beta, and residual may be null.
void granq_forward(const T* x, T* y, W* scale, W* zero_point, uint16_t* mask, const W* alpha, const W* beta, const T* residual,
                   int64_t samples, int64_t outer, int64_t channels, int64_t inner, double levels, int clamp, double low,
                   double high, double above, double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    const Ahead ahead{alpha, beta, residual};
    with_constants(ahead, clamp, mask, [&](auto b, auto masked) {
        constexpr auto function = rows<b.value, masked.value>, otherwise = columns<b.value, masked.value>;
        (is_rows(s) ? function : otherwise)(x, y, scale, zero_point, mask, ahead, s, levels, l, threads);
    });
}

// With the scale and zero point of each channel, integers clamped to [lowest, highest]. Null as above.
void frozen_forward(const T* x, T* y, uint16_t* mask, const W* scale, const W* zero_point, const W* alpha, const W* beta,
                    const T* residual, int64_t samples, int64_t outer, int64_t channels, int64_t inner, double lowest, double highest,
                    int clamp, double low, double high, double above, double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    const Ahead ahead{alpha, beta, residual};
    with_constants(ahead, clamp, mask, [&](auto b, auto masked) {
        constexpr auto function = frozen_rows<b.value, masked.value>, otherwise = frozen_columns<b.value, masked.value>;
        (is_rows(s) ? function : otherwise)(x, y, mask, scale, zero_point, ahead, s, W(lowest), W(highest), l, threads);
    });
}

// The gradient of either, from its mask; with the scale of frozen ranges.
void masked_backward(const T* grad, const uint16_t* mask, T* out, const W* scale, int64_t samples, int64_t outer, int64_t channels,
                     int64_t inner, int threads) {
    const Shape s{samples, outer, channels, inner};
    if (scale) is_rows(s) ? backward_rows<true>(grad, mask, out, scale, s, threads) : backward_columns<true>(grad, mask, out, scale, s, threads);
    else is_rows(s) ? backward_rows<false>(grad, mask, out, scale, s, threads) : backward_columns<false>(grad, mask, out, scale, s, threads);
}

}  // extern "C"
