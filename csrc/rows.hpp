// Couplings on some channels of rows [n, channels], in place and in one pass, for channels-last memory, where
// the channels of a half may be scattered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "exponential.hpp"
#include "half.hpp"
#include "instructions.hpp"
#include "team.hpp"

namespace usf {

USF_CLONES inline void widen_to(const BFloat16* from, std::int64_t n, float* to) {
    for (std::int64_t j = 0; j < n; ++j) to[j] = widen(from[j]);
}
inline void widen_to(const float* from, std::int64_t n, float* to) {
    std::copy_n(from, n, to);
}

// row[j] += shift[j]
USF_CLONES inline void shift_rows(float* state, std::int64_t rows, int channels, const float* shift) {
    for (float* row = state; row != state + rows * channels; row += channels)
        for (int j = 0; j < channels; ++j) row[j] += shift[j];
}

#ifdef USF_PRODUCTS
// Adds up the lanes of a vector by halves.
template <int lanes>
USF_INLINE float sum_of_lanes(typename Vector<lanes>::type vector) {
    if constexpr (lanes == 1) {
        return vector[0];
    } else {
        struct Halves {
            typename Vector<lanes / 2>::type low, high;
        };
        const auto halves = __builtin_bit_cast(Halves, vector);
        return sum_of_lanes<lanes / 2>(halves.low + halves.high);
    }
}
#endif

// Adds up partial sums by halves.
template <class T, int lanes>
USF_INLINE T fold(T (&part)[lanes]) {
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    return part[0];
}

// Adds up values in many short sums, which is both faster and more accurate than one long sum.
template <int lanes = 16>
USF_INLINE float sum(const float* values, std::int64_t n) {
    float part[lanes] = {};
    std::int64_t j = 0;
    for (; j + lanes <= n; j += lanes)
        for (int lane = 0; lane < lanes; ++lane) part[lane] += values[j + lane];
    for (int lane = 0; j < n; ++j, ++lane) part[lane] += values[j];
    return fold(part);
}

// Inner product, in many short sums.
template <int lanes = 32, class A, class B>
USF_INLINE B dot(const A* a, const B* b, std::int64_t n) {
    B part[lanes] = {};
    std::int64_t j = 0;
    for (; j + lanes <= n; j += lanes)
        for (int lane = 0; lane < lanes; ++lane) part[lane] += a[j + lane] * b[j + lane];
    for (int lane = 0; j < n; ++j, ++lane) part[lane] += a[j] * b[j];
    return fold(part);
}

// Calls body(begin, end) for stretches of rows; a thread takes one at a time.
template <class Body>
void for_rows(std::int64_t rows, int channels, int threads, Body&& body) {
    constexpr std::int64_t elements = 1 << 14;  // per stretch: far more work than handing it to a thread
    const std::int64_t stretch = std::max<std::int64_t>(1, elements / std::max(channels, 1));
    team_for((rows + stretch - 1) / stretch, threads,
             [&](std::int64_t i) { body(i * stretch, std::min((i + 1) * stretch, rows)); });
}

// out[:, j] = state[:, index[j]]
template <class T>
void select_rows(const T* state, std::int64_t rows, const Half& half, T* out, int threads) {
    for_rows(rows, half.channels(), threads, [&](std::int64_t begin, std::int64_t end) {
        half.take(state + begin * half.channels(), end - begin, out + begin * half.size(), half.size());
    });
}

// state[:, index[j]] += factor * values[:, j]
template <class T>
void add_rows(T* state, std::int64_t rows, const Half& half, const T* values, float factor, int threads) {
    for_rows(rows, half.channels(), threads, [&](std::int64_t begin, std::int64_t end) {
        half.add(values + begin * half.size(), half.size(), factor, end - begin,
                 state + begin * half.channels());
    });
}

// value = (value + shift) * exp(s) + translation with s = clamp * tanh(raw), or the inverse of that, where
// `exponent` is log2(e) * clamp, or minus that. Returns tanh(raw). The relative error of exp(s) is a few
// times that of s times |s|, as with any exponential.
template <bool inverse, class V>
USF_INLINE V affine(V& value, V raw, V translation, V shift, float exponent) {
    const V t = fast_tanh(raw), power = power_of_two(exponent * t, std::numeric_limits<float>::max());
    value = inverse ? (value - translation) * power - shift : (value + shift) * power + translation;
    return t;
}

// Applies `affine` to a row of n values, whose translations are `translation`. Returns the sum of tanh(raw).
template <int lanes, bool inverse>
USF_INLINE float affine_row(float* values, const float* raw, const float* translation, const float* shift,
                            int n, float exponent) {
    float total = 0;
    int j = 0;
#ifdef USF_PRODUCTS
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    const auto at = [](const float* from) USF_LAMBDA { return V(*reinterpret_cast<const U*>(from)); };
    V totals{};
    for (; j + lanes <= n; j += lanes) {
        V value = at(values + j);
        totals += affine<inverse, V>(value, at(raw + j), at(translation + j), at(shift + j), exponent);
        *reinterpret_cast<U*>(values + j) = value;
    }
    total = sum_of_lanes<lanes>(totals);
    if constexpr (lanes > 4)  // what is left, in smaller vectors
        return total + affine_row<lanes / 2, inverse>(values + j, raw + j, translation + j, shift + j, n - j,
                                                      exponent);
#endif
    for (; j < n; ++j) total += affine<inverse>(values[j], raw[j], translation[j], shift[j], exponent);
    return total;
}

// Applies `affine` to a half of some rows. Rows of `outputs`, `stride` elements apart, hold raw log scales,
// then translations. Writes the log-det of every row, the sum of its log scales or minus that, to log_det.
// Each thread has its own `scratch`.
template <class T>
void affine_stretch(T* state, std::int64_t rows, const Half& half, const T* outputs, std::ptrdiff_t stride,
                    const float* shift, float clamp, bool inverse, float* log_det, Floats& scratch) {
    const int n = half.size();
    const std::int64_t together = std::max(1, 2048 / std::max(n, 1));
    float *const values = scratch.at_least((together + 2) * n), *const widened = values + together * n;
    for (std::int64_t first = 0; first < rows; first += together) {
        const std::int64_t count = std::min(together, rows - first);
        half.take(state + first * half.channels(), count, values, n);
        const auto transform = [&]<int lanes>() USF_LAMBDA {
            for (std::int64_t r = 0; r < count; ++r) {
                const T* const from = outputs + (first + r) * stride;
                const float* raw = widened;
                if constexpr (std::is_same_v<T, float>)
                    raw = from;
                else
                    widen_to(from, 2 * n, widened);
                float* const row = values + r * n;
                log_det[first + r] =
                    inverse ? -clamp * affine_row<lanes, true>(row, raw, raw + n, shift, n, -log2_e * clamp)
                            : clamp * affine_row<lanes, false>(row, raw, raw + n, shift, n, log2_e * clamp);
            }
        };
#ifdef USF_PRODUCTS
        with_lanes(best_lanes(), transform);
#else
        transform.template operator()<1>();
#endif
        half.put(values, n, count, state + first * half.channels());
    }
}

// The same for all rows; `outputs` [rows, 2 * size] is contiguous.
template <class T>
void affine_rows(T* state, std::int64_t rows, const Half& half, const T* outputs, const float* shift,
                 float clamp, bool inverse, float* log_det, int threads) {
    const int n = half.size();
    for_rows(rows, half.channels(), threads, [&](std::int64_t begin, std::int64_t end) {
        Floats scratch;
        affine_stretch(state + begin * half.channels(), end - begin, half, outputs + begin * 2 * n, 2 * n,
                       shift, clamp, inverse, log_det + begin, scratch);
    });
}

}  // namespace usf
