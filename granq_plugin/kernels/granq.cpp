// The quantizers on CPU, compiled on first use (native.py), for one type of values: -DGRANQ_TYPE=float, double, bf16 or _Float16.
//
// A tensor is [samples, outer, channels, inner] in memory: outer == 1 is the contiguous layout, inner == 1 channels_last.
// Every value goes through the operations of functional.py in their order, so that results are equal bit for bit. To be compiled
// without contraction and without fast-math.

#include "dynamic.h"
#include "frozen.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Memory that is written for the first time costs a fault for each 4 KB, more than the work on it; ask for pages of 2 MB.
inline void use_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t PAGE = 4096, LARGE = 4 << 20;
    const uintptr_t begin = (uintptr_t(memory) + PAGE - 1) / PAGE * PAGE, end = (uintptr_t(memory) + bytes) / PAGE * PAGE;
    if (end >= begin + LARGE) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

template <int B, bool MASK, class... A> void forward(Shape s, A... a) {
    is_rows(s) ? rows<B, MASK>(a...) : columns<B, MASK>(a...);
}

template <int B, bool MASK, class... A> void frozen_forward(Shape s, A... a) {
    is_rows(s) ? frozen_rows<B, MASK>(a...) : frozen_columns<B, MASK>(a...);
}

inline int64_t bytes_of(Shape s) { return s.samples * s.outer * s.channels * s.inner * int64_t(sizeof(T)); }

}  // namespace

extern "C" {

// BatchNorm in evaluation mode as x * alpha + beta; weight and bias may be null.
void batch_norm_affine(const W* mean, const W* var, const W* weight, const W* bias, double eps, int64_t channels, W* alpha, W* beta) {
    for (int64_t c = 0; c < channels; c++) {
        alpha[c] = 1 / std::sqrt(var[c] + W(eps)) * (weight ? weight[c] : W(1));
        beta[c] = std::fma(-mean[c], alpha[c], bias ? bias[c] : W(0));
    }
}

// Ranges, scales and fake quantization. mask (a bit for each value of a vector), alpha and beta may be null.
void granq_forward(const T* x, T* y, W* scale, W* zero_point, uint16_t* mask, const W* alpha, const W* beta, int64_t samples,
                   int64_t outer, int64_t channels, int64_t inner, double levels, int clamp, double low, double high, double above,
                   double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    use_huge_pages(y, bytes_of(s));
    const auto run = [&](auto function) { function(s, x, y, scale, zero_point, mask, alpha, beta, s, levels, l, threads); };
    if (alpha) mask ? run([](auto... a) { forward<AFFINE_CLAMP, true>(a...); }) : run([](auto... a) { forward<AFFINE_CLAMP, false>(a...); });
    else if (clamp) mask ? run([](auto... a) { forward<CLAMP, true>(a...); }) : run([](auto... a) { forward<CLAMP, false>(a...); });
    else run([](auto... a) { forward<NOTHING, false>(a...); });
}

// With the scale and zero point of each channel, integers clamped to [lowest, highest]. mask may be null.
void frozen_forward(const T* x, T* y, uint16_t* mask, const W* scale, const W* zero_point, int64_t samples, int64_t outer,
                    int64_t channels, int64_t inner, double lowest, double highest, int clamp, double low, double high,
                    double above, double below, int nan, int threads) {
    const Shape s{samples, outer, channels, inner};
    const Limits l{low, high, above, below, nan};
    use_huge_pages(y, bytes_of(s));
    const auto run = [&](auto function) { function(s, x, y, mask, scale, zero_point, s, W(lowest), W(highest), l, threads); };
    if (clamp) mask ? run([](auto... a) { frozen_forward<CLAMP, true>(a...); }) : run([](auto... a) { frozen_forward<CLAMP, false>(a...); });
    else mask ? run([](auto... a) { frozen_forward<NOTHING, true>(a...); }) : run([](auto... a) { frozen_forward<NOTHING, false>(a...); });
}

// The gradient of either, from its mask; with the scale of frozen ranges.
void masked_backward(const T* grad, const uint16_t* mask, T* out, const W* scale, int64_t samples, int64_t outer, int64_t channels,
                     int64_t inner, int threads) {
    const Shape s{samples, outer, channels, inner};
    use_huge_pages(out, bytes_of(s));
    if (scale) is_rows(s) ? backward_rows<true>(grad, mask, out, scale, s, threads) : backward_columns<true>(grad, mask, out, scale, s, threads);
    else is_rows(s) ? backward_rows<false>(grad, mask, out, scale, s, threads) : backward_columns<false>(grad, mask, out, scale, s, threads);
}

}  // extern "C"
