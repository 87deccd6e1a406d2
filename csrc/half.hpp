// Some channels of rows: gathered next to each other, and scattered back.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define USF_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define USF_AVX2 __attribute__((target("avx2,fma")))
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
// Rounds to the nearest, ties to even; NaN stays NaN.
inline void narrow(float value, BFloat16& out) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    out.bits = static_cast<std::uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}

#ifdef USF_AVX512
// Loads and stores of 16 numbers, or of those of some lanes. Masked stores take longer than whole ones on
// some processors, whatever the mask.
USF_AVX512 inline __m512 load16(const float* from) {
    return _mm512_loadu_ps(from);
}
USF_AVX512 inline __m512 load16(const float* from, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, from);
}
USF_AVX512 inline __m512 widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
USF_AVX512 inline __m512 load16(const BFloat16* from) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
USF_AVX512 inline __m512 load16(const BFloat16* from, __mmask16 lanes) {
    return widened(_mm256_maskz_loadu_epi16(lanes, from));
}
USF_AVX512 inline __m256i narrowed(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i out = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    out = _mm512_mask_or_epi32(out, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
}
USF_AVX512 inline void store16(float* to, __m512 values) {
    _mm512_storeu_ps(to, values);
}
USF_AVX512 inline void store16(float* to, __mmask16 lanes, __m512 values) {
    _mm512_mask_storeu_ps(to, lanes, values);
}
USF_AVX512 inline void store16(BFloat16* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(values));
}
USF_AVX512 inline void store16(BFloat16* to, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(to, lanes, narrowed(values));
}
#endif

// The channels that a half has among 16 neighbouring ones, for AVX-512.
struct Sixteen {
    int channel, first, count;  // the first of the 16, and the range of the half's
    std::uint16_t mask;
    bool whole;  // whether neither the row nor the half ends within 16 lanes
};

// How AVX2 gathers and scatters the channels that a half has among 8 neighbouring ones.
struct alignas(32) Octet {
    std::int32_t together[8] = {}, apart[8] = {}, keep[8] = {};  // `keep` is -1 in lanes of the half, else 0
    int first = 0, count = 0;                                    // range of the half's channels
    bool whole = false;  // whether neither the row nor the half ends within these 8 lanes
};

// A choice of channels. If they are in ascending order, AVX-512 compresses and expands 16 channels at a time
// by a bit mask, and AVX2 shuffles 8 at a time (float32 only); otherwise they are moved one by one. Rows are
// contiguous in the state, and `stride` elements apart outside of it.
class Half {
public:
    // Throws std::invalid_argument unless `index` [size] has distinct values in [0, channels): indices come
    // from files, and memory is written through them.
    Half(const std::int64_t* index, int size, int channels)
        : index_(index, index + size), channels_(channels) {
        masks_.assign((channels + 15) / 16, 0);
        for (const std::int64_t i : index_) {
            if (i < 0 || i >= channels || (masks_[i / 16] >> (i % 16) & 1))
                throw std::invalid_argument("index: expected different channels of the state");
            masks_[i / 16] |= static_cast<std::uint16_t>(1u << (i % 16));
        }
#ifdef USF_AVX512
        const bool ascending = std::is_sorted(index_.begin(), index_.end());
        const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        const bool shuffles = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (ascending && wide)
            divide_by_sixteen();
        else if (ascending && shuffles && size > 0)
            divide();
#endif
    }
    int size() const { return static_cast<int>(index_.size()); }
    int channels() const { return channels_; }

    // to[r, j] = state[r, index[j]]. What is between the rows of `to` may be overwritten.
    template <class From, class To>
    void take(const From* state, std::int64_t rows, To* to, std::ptrdiff_t stride) const {
#ifdef USF_AVX512
        if (!sixteens_.empty()) return take_wide(state, rows, to, stride);
        if constexpr (both_float<From, To>)
            if (!octets_.empty()) return take_shuffled(state, rows, to, stride);
#endif
        for (std::int64_t r = 0; r < rows; ++r, state += channels_, to += stride)
            for (int j = 0; j < size(); ++j) narrow(widen(state[index_[j]]), to[j]);
    }
    // state[r, index[j]] = from[r, j]. Here and below, other channels of the rows may be written with what
    // they are: no other thread may change them meanwhile.
    template <class From, class To>
    void put(const From* from, std::ptrdiff_t stride, std::int64_t rows, To* state) const {
        update<false>(from, stride, 1, rows, state);
    }
    // state[r, index[j]] += factor * from[r, j]
    template <class From, class To>
    void add(const From* from, std::ptrdiff_t stride, float factor, std::int64_t rows, To* state) const {
        update<true>(from, stride, factor, rows, state);
    }

private:
    template <bool adds, class From, class To>
    void update(const From* from, std::ptrdiff_t stride, float factor, std::int64_t rows, To* state) const {
#ifdef USF_AVX512
        if (!sixteens_.empty()) return update_wide<adds>(from, stride, factor, rows, state);
        if constexpr (both_float<From, To>)
            if (!octets_.empty()) return update_shuffled<adds>(from, stride, factor, rows, state);
#endif
        for (std::int64_t r = 0; r < rows; ++r, from += stride, state += channels_) {
            for (int j = 0; j < size(); ++j) {
                To& to = state[index_[j]];
                narrow(adds ? widen(to) + factor * widen(from[j]) : widen(from[j]), to);
            }
        }
    }

#ifdef USF_AVX512
    template <class From, class To>
    static constexpr bool both_float = std::is_same_v<From, float> && std::is_same_v<To, float>;

    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

    void divide_by_sixteen() {
        int taken = 0;
        for (int c = 0; c < channels_; c += 16) {
            const std::uint16_t mask = masks_[c / 16];
            const int count = std::popcount(mask);
            if (!mask) continue;
            sixteens_.push_back({c, taken, count, mask, c + 16 <= channels_ && taken + 16 <= size()});
            taken += count;
        }
    }
    // Whole vectors reach beyond a row, into rows that are written later. The last rows, as many as a vector
    // could span, must not be written so.
    static constexpr std::int64_t beyond_wide = 16;  // rows
    template <class From, class To>
    USF_AVX512 void take_wide(const From* state, std::int64_t rows, To* to, std::ptrdiff_t stride) const {
        for (std::int64_t r = 0; r < rows; ++r, state += channels_, to += stride) {
            for (const Sixteen& some : sixteens_) {
                const From* const from = state + some.channel;
                To* const at = to + some.first;
                if (some.whole || rows - r > beyond_wide)
                    store16(at, _mm512_maskz_compress_ps(some.mask, load16(from)));
                else
                    store16(at, first(some.count),
                            _mm512_maskz_compress_ps(some.mask, load16(from, some.mask)));
            }
        }
    }
    template <bool adds, class From, class To>
    USF_AVX512 void update_wide(const From* from, std::ptrdiff_t stride, float factor, std::int64_t rows,
                                To* state) const {
        const __m512 factors = _mm512_set1_ps(factor);
        for (std::int64_t r = 0; r < rows; ++r, from += stride, state += channels_) {
            for (const Sixteen& some : sixteens_) {
                const From* const at = from + some.first;
                To* const row = state + some.channel;
                const __mmask16 mask = some.mask;
                if (some.whole || rows - r > beyond_wide) {
                    const __m512 before = load16(row), values = _mm512_maskz_expand_ps(mask, load16(at));
                    if constexpr (adds)
                        store16(row, _mm512_mask3_fmadd_ps(values, factors, before, mask));
                    else
                        store16(row, _mm512_mask_mov_ps(before, mask, values));
                } else {
                    __m512 values = _mm512_maskz_expand_ps(mask, load16(at, first(some.count)));
                    if constexpr (adds) values = _mm512_fmadd_ps(values, factors, load16(row, mask));
                    store16(row, mask, values);
                }
            }
        }
    }

    void divide() {
        int taken = 0;
        for (int c = 0; c < channels_; c += 8) {
            Octet& octet = octets_.emplace_back();
            octet.first = taken;
            octet.whole = c + 8 <= channels_ && taken + 8 <= size();
            for (int lane = 0; lane < 8; ++lane) {
                if (c + lane >= channels_ || !(masks_[c / 16] >> (c % 16 + lane) & 1)) continue;
                octet.together[octet.count] = lane;
                octet.apart[lane] = octet.count++;
                octet.keep[lane] = -1;
            }
            taken += octet.count;
        }
    }
    USF_AVX2 static __m256i lanes(const std::int32_t* eight) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(eight));
    }
    static constexpr std::int64_t beyond = 8;  // rows, as above
    USF_AVX2 void take_shuffled(const float* state, std::int64_t rows, float* to,
                                std::ptrdiff_t stride) const {
        for (std::int64_t r = 0; r < rows; ++r, state += channels_, to += stride) {
            const float* from = state;
            for (const Octet& octet : octets_) {
                if (octet.whole || rows - r > beyond) {
                    const __m256 values =
                        _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), lanes(octet.together));
                    _mm256_storeu_ps(to + octet.first, values);
                } else {
                    for (int j = 0; j < octet.count; ++j) to[octet.first + j] = from[octet.together[j]];
                }
                from += 8;
            }
        }
    }
    template <bool adds>
    USF_AVX2 void update_shuffled(const float* from, std::ptrdiff_t stride, float factor, std::int64_t rows,
                                  float* state) const {
        const __m256 factors = _mm256_set1_ps(factor);
        for (std::int64_t r = 0; r < rows; ++r, from += stride, state += channels_) {
            float* row = state;
            for (const Octet& octet : octets_) {
                const float* const at = from + octet.first;
                if (octet.whole || rows - r > beyond) {
                    const __m256 before = _mm256_loadu_ps(row);
                    __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at), lanes(octet.apart));
                    if constexpr (adds) values = _mm256_fmadd_ps(values, factors, before);
                    const __m256 keep = _mm256_castsi256_ps(lanes(octet.keep));
                    _mm256_storeu_ps(row, _mm256_blendv_ps(before, values, keep));
                } else {
                    for (int j = 0; j < octet.count; ++j) {
                        float& to = row[octet.together[j]];
                        to = adds ? to + factor * at[j] : at[j];
                    }
                }
                row += 8;
            }
        }
    }
    std::vector<Octet> octets_;
    std::vector<Sixteen> sixteens_;
#endif

    std::vector<std::int64_t> index_;
    std::vector<std::uint16_t> masks_;
    int channels_;
};

}  // namespace usf
