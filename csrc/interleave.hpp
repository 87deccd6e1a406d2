// Conversion of maps, one channel after the other, to rows with the channels of a position side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "buffer.hpp"
#include "half.hpp"
#include "team.hpp"

namespace usf {

constexpr int tile = 16;

// to[p * to_stride + c] = from[c * from_stride + p] for c < channels and p < positions, both at most `tile`.
template <class From, class To>
void transpose_plain(const From* from, std::int64_t from_stride, int channels, int positions, To* to,
                     std::int64_t to_stride) {
    for (int p = 0; p < positions; ++p)
        for (int c = 0; c < channels; ++c) narrow(widen(from[c * from_stride + p]), to[p * to_stride + c]);
}

#ifdef USF_AVX512
// The same with registers of channels, load(c): interleaves pairs of channels, then pairs of pairs, then
// quarters of registers.
template <class Load, class To>
USF_AVX512 void transpose_registers(const Load& load, int channels, int positions, To* to,
                                    std::int64_t to_stride) {
    const auto first = [](int n) { return static_cast<__mmask16>((1u << n) - 1); };
    __m512 a[tile], b[tile];
    if (channels == tile)
        for (int c = 0; c < tile; ++c) a[c] = load(c);
    else
        for (int c = 0; c < tile; ++c) a[c] = c < channels ? load(c) : _mm512_setzero_ps();
    for (int c = 0; c < tile; c += 2) {
        b[c] = _mm512_unpacklo_ps(a[c], a[c + 1]);
        b[c + 1] = _mm512_unpackhi_ps(a[c], a[c + 1]);
    }
    const auto low = [](__m512 x, __m512 y) USF_AVX512 {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto high = [](__m512 x, __m512 y) USF_AVX512 {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    for (int c = 0; c < tile; c += 4) {  // quarter l of a[c + k] is then position 4 l + k of four channels
        a[c] = low(b[c], b[c + 2]);
        a[c + 1] = high(b[c], b[c + 2]);
        a[c + 2] = low(b[c + 1], b[c + 3]);
        a[c + 3] = high(b[c + 1], b[c + 3]);
    }
    for (int k = 0; k < 4; ++k) {
        const __m512 even = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xdd);
        const __m512 even_next = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x88);
        const __m512 odd_next = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xdd);
        b[k] = _mm512_shuffle_f32x4(even, even_next, 0x88);
        b[4 + k] = _mm512_shuffle_f32x4(odd, odd_next, 0x88);
        b[8 + k] = _mm512_shuffle_f32x4(even, even_next, 0xdd);
        b[12 + k] = _mm512_shuffle_f32x4(odd, odd_next, 0xdd);
    }
    if (channels == tile)
        for (int p = 0; p < positions; ++p) store16(to + p * to_stride, b[p]);
    else
        for (int p = 0; p < positions; ++p) store16(to + p * to_stride, first(channels), b[p]);
}
template <class From, class To>
USF_AVX512 void transpose_wide(const From* from, std::int64_t from_stride, int channels, int positions,
                               To* to, std::int64_t to_stride) {
    if (positions == tile) {
        const auto whole = [&](int c) USF_AVX512 { return load16(from + c * from_stride); };
        return transpose_registers(whole, channels, positions, to, to_stride);
    }
    const auto lanes = static_cast<__mmask16>((1u << positions) - 1);
    const auto some = [&](int c) USF_AVX512 { return load16(from + c * from_stride, lanes); };
    transpose_registers(some, channels, positions, to, to_stride);
}
#endif

#ifdef USF_AVX2
// Transposes 8 x 8 floats in registers: interleaves pairs of channels, then pairs of pairs, then halves.
USF_AVX2 inline void transpose_eight(const float* from, std::int64_t from_stride, float* to,
                                     std::int64_t to_stride) {
    __m256 a[8], b[8];
    for (int c = 0; c < 8; ++c) a[c] = _mm256_loadu_ps(from + c * from_stride);
    for (int c = 0; c < 8; c += 2) {
        b[c] = _mm256_unpacklo_ps(a[c], a[c + 1]);
        b[c + 1] = _mm256_unpackhi_ps(a[c], a[c + 1]);
    }
    for (int c = 0; c < 8; c += 4)  // half l of a[c + k] is then position 4 l + k of four channels
        for (int k = 0; k < 2; ++k) {
            a[c + 2 * k] = _mm256_shuffle_ps(b[c + k], b[c + 2 + k], 0x44);
            a[c + 2 * k + 1] = _mm256_shuffle_ps(b[c + k], b[c + 2 + k], 0xee);
        }
    for (int k = 0; k < 4; ++k) {
        _mm256_storeu_ps(to + k * to_stride, _mm256_permute2f128_ps(a[k], a[4 + k], 0x20));
        _mm256_storeu_ps(to + (4 + k) * to_stride, _mm256_permute2f128_ps(a[k], a[4 + k], 0x31));
    }
}
USF_AVX2 inline void transpose_eights(const float* from, std::int64_t from_stride, int channels,
                                      int positions, float* to, std::int64_t to_stride) {
    const int whole = channels / 8 * 8, length = positions / 8 * 8;
    for (int c = 0; c < whole; c += 8)
        for (int p = 0; p < length; p += 8)
            transpose_eight(from + c * from_stride + p, from_stride, to + p * to_stride + c, to_stride);
    transpose_plain(from + length, from_stride, whole, positions - length, to + length * to_stride,
                    to_stride);
    transpose_plain(from + whole * from_stride, from_stride, channels - whole, positions, to + whole,
                    to_stride);
}
#endif

// The fastest transposition on this processor.
template <class From, class To>
auto transposition() {
    auto transpose = transpose_plain<From, To>;
#ifdef USF_AVX2
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) transpose = transpose_eights;
#endif
#ifdef USF_AVX512
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        transpose = transpose_wide<From, To>;
#endif
    return transpose;
}

// rows[b, p, c] = maps[b, c, p], one image every `apart` numbers.
template <class From, class To>
void interleave(const From* maps, std::int64_t apart, std::int64_t images, std::int64_t channels,
                std::int64_t positions, To* rows, int threads) {
    const auto transpose = transposition<From, To>();
    constexpr std::int64_t together = 4 * tile;  // positions at a time: some cache lines of every channel
    const std::int64_t stretches = (positions + together - 1) / together;
    team_for(images * stretches, threads, [&](std::int64_t i) {
        const std::int64_t image = i / stretches, begin = i % stretches * together;
        const std::int64_t end = std::min(begin + together, positions);
        for (std::int64_t c = 0; c < channels; c += tile) {
            const int width = static_cast<int>(std::min<std::int64_t>(tile, channels - c));
            for (std::int64_t p = begin; p < end; p += tile) {
                const int length = static_cast<int>(std::min<std::int64_t>(tile, end - p));
                for (std::int64_t next = c + tile; next < std::min(c + 2 * tile, channels); ++next)
                    prefetch(maps + image * apart + next * positions + p);
                transpose(maps + image * apart + c * positions + p, positions, width, length,
                          rows + (image * positions + p) * channels + c, channels);
            }
        }
    });
}

}  // namespace usf
