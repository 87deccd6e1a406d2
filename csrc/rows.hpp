// Couplings on some channels of rows [n, channels], in place and in one pass, for channels-last memory, where
// the channels of a half may be scattered.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "half.hpp"
#include "instructions.hpp"
#include "team.hpp"

namespace usf {

// e^x = power * (1 + rest) with a power of 2, for |x| <= 87, without branches, so that loops of it vectorise.
struct Exponential {
    float power, rest;
};
USF_INLINE Exponential exponential(float x) {
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
    const float n = (x * 1.44269504f + to_integer) - to_integer;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;                                   // minimax on [-ln 2 / 2, ln 2 / 2]
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23), p * r * r + r};
}

// e^x within 2 units in the last place for |x| <= 87.
inline float fast_exp(float x) {
    const auto [power, rest] = exponential(std::min(std::max(x, -87.0f), 87.0f));
    return (rest + 1.0f) * power;
}

// 2^x within 2 units in the last place for |x| <= 126, and as if x were 126 or -126 beyond. It takes two
// thirds of the time of `fast_exp`. NaN gives NaN.
USF_INLINE float power_of_two(float x) {
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
    const float within = std::min(std::max(x, -126.0f), 126.0f), shifted = within + to_integer;
    const float r = within - (shifted - to_integer);
    float p = 1.535336188e-4f;  // minimax on [-1/2, 1/2]
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return p * std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}
constexpr float log2_e = 1.44269504f;

// tanh x with an absolute error of at most 2^-22. NaN gives NaN.
USF_INLINE float fast_tanh(float x) {
    const float power = power_of_two(std::min(std::max(2 * log2_e * x, -43.0f), 43.0f));
    return (power - 1) / (power + 1);
}

// s = clamp * tanh(raw), then values = (values + shift) * exp(s) + translation, or the inverse of that. The
// relative error of exp(s) is a few times that of s times |s|, as with any exponential.
USF_CLONES inline void affine(float* values, const float* raw, const float* translation, const float* shift,
                              float* s, int n, float clamp, bool inverse) {
    for (int j = 0; j < n; ++j) s[j] = clamp * fast_tanh(raw[j]);
    if (inverse) {
        for (int j = 0; j < n; ++j)
            values[j] = (values[j] - translation[j]) * power_of_two(-log2_e * s[j]) - shift[j];
    } else {
        for (int j = 0; j < n; ++j)
            values[j] = (values[j] + shift[j]) * power_of_two(log2_e * s[j]) + translation[j];
    }
}

USF_CLONES inline void widen_to(const BFloat16* from, std::int64_t n, float* to) {
    for (std::int64_t j = 0; j < n; ++j) to[j] = widen(from[j]);
}
inline void widen_to(const float* from, std::int64_t n, float* to) {
    std::copy_n(from, n, to);
}

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

// Applies `affine` to a half of some rows. Rows of `outputs`, `stride` elements apart, hold raw log scales,
// then translations. Writes the log-det of every row, the sum of its log scales or minus that, to log_det.
// Each thread has its own `scratch`.
template <class T>
void affine_stretch(T* state, std::int64_t rows, const Half& half, const T* outputs, std::ptrdiff_t stride,
                    const float* shift, float clamp, bool inverse, float* log_det,
                    std::vector<float>& scratch) {
    const int n = half.size();
    // Take some rows together, so that the loop is long enough to hide the latency of its arithmetic.
    const std::int64_t together = std::max(1, 512 / std::max(n, 1));
    scratch.resize(std::max(scratch.size(), 5 * static_cast<std::size_t>(together * n)));
    float* const values = scratch.data();
    float *raw = values + together * n, *translation = raw + together * n;
    float *shifts = translation + together * n, *s = shifts + together * n;
    for (std::int64_t r = 0; r < together; ++r) std::copy_n(shift, n, shifts + r * n);
    for (std::int64_t first = 0; first < rows; first += together) {
        const std::int64_t count = std::min(together, rows - first);
        half.take(state + first * half.channels(), count, values, n);
        for (std::int64_t r = 0; r < count; ++r) {
            const T* from = outputs + (first + r) * stride;
            widen_to(from, n, raw + r * n);
            widen_to(from + n, n, translation + r * n);
        }
        affine(values, raw, translation, shifts, s, static_cast<int>(count) * n, clamp, inverse);
        for (std::int64_t r = 0; r < count; ++r) {
            const float total = sum(s + r * n, n);
            log_det[first + r] = inverse ? -total : total;
        }
        half.put(values, n, count, state + first * half.channels());
    }
}

// The same for all rows; `outputs` [rows, 2 * size] is contiguous.
template <class T>
void affine_rows(T* state, std::int64_t rows, const Half& half, const T* outputs, const float* shift,
                 float clamp, bool inverse, float* log_det, int threads) {
    const int n = half.size();
    for_rows(rows, half.channels(), threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> scratch;
        affine_stretch(state + begin * half.channels(), end - begin, half, outputs + begin * 2 * n, 2 * n,
                       shift, clamp, inverse, log_det + begin, scratch);
    });
}

}  // namespace usf
