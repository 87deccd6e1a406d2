// Some channels of a row: taken together, and put back.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define USF_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

namespace usf {

struct BFloat16 {
    std::uint16_t bits;
};

inline float widen(float value) {
    return value;
}
inline float widen(BFloat16 value) {
    return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}

inline void narrow(float value, float& out) {
    out = value;
}
// To the nearest, ties to even; NaN stays NaN.
inline void narrow(float value, BFloat16& out) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    out.bits = static_cast<std::uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}

#ifdef USF_AVX512
USF_AVX512 inline __m512 load16(const float* from, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, from);
}
USF_AVX512 inline __m512 load16(const BFloat16* from, __mmask16 lanes) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
USF_AVX512 inline void store16(float* to, __mmask16 lanes, __m512 values) {
    _mm512_mask_storeu_ps(to, lanes, values);
}
USF_AVX512 inline void store16(BFloat16* to, __mmask16 lanes, __m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i out = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    out = _mm512_mask_or_epi32(out, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
}
#endif

// With AVX-512 and in ascending order, 16 channels at a time are compressed and expanded by a bit mask;
// otherwise one by one.
class Half {
public:
    // `index` [size] below `channels`, none twice. Masks say which, not in what order.
    Half(const std::int64_t* index, int size, int channels)
        : index_(index, index + size), channels_(channels) {
        masks_.assign((channels + 15) / 16, 0);
        for (const std::int64_t i : index_) masks_[i / 16] |= static_cast<std::uint16_t>(1u << (i % 16));
#ifdef USF_AVX512
        wide_ = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                std::is_sorted(index_.begin(), index_.end());
#endif
    }
    int size() const { return static_cast<int>(index_.size()); }
    int channels() const { return channels_; }

    // to[j] = row[index[j]]
    template <class From, class To>
    void take(const From* row, To* to) const {
#ifdef USF_AVX512
        if (wide_) return take_wide(row, to);
#endif
        for (int j = 0; j < size(); ++j) narrow(widen(row[index_[j]]), to[j]);
    }
    // row[index[j]] = from[j]
    template <class From, class To>
    void put(const From* from, To* row) const {
#ifdef USF_AVX512
        if (wide_) return update_wide<false>(from, 1, row);
#endif
        for (int j = 0; j < size(); ++j) narrow(widen(from[j]), row[index_[j]]);
    }
    // row[index[j]] += factor * from[j]
    template <class From, class To>
    void add(const From* from, float factor, To* row) const {
#ifdef USF_AVX512
        if (wide_) return update_wide<true>(from, factor, row);
#endif
        for (int j = 0; j < size(); ++j)
            narrow(widen(row[index_[j]]) + factor * widen(from[j]), row[index_[j]]);
    }

private:
#ifdef USF_AVX512
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

    template <class From, class To>
    USF_AVX512 void take_wide(const From* row, To* to) const {
        for (std::size_t g = 0; g < masks_.size(); ++g, row += 16) {
            const __mmask16 mask = masks_[g];
            const int count = std::popcount(masks_[g]);
            store16(to, first(count), _mm512_maskz_compress_ps(mask, load16(row, mask)));
            to += count;
        }
    }
    template <bool adds, class From, class To>
    USF_AVX512 void update_wide(const From* from, float factor, To* row) const {
        for (std::size_t g = 0; g < masks_.size(); ++g, row += 16) {
            const __mmask16 mask = masks_[g];
            const int count = std::popcount(masks_[g]);
            __m512 values = _mm512_maskz_expand_ps(mask, load16(from, first(count)));
            if constexpr (adds) values = _mm512_fmadd_ps(values, _mm512_set1_ps(factor), load16(row, mask));
            store16(row, mask, values);
            from += count;
        }
    }
#endif

    std::vector<std::int64_t> index_;
    std::vector<std::uint16_t> masks_;
    int channels_;
    bool wide_ = false;
};

}  // namespace usf
