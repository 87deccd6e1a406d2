// Reorders, scales and shifts the channels of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "interleave.hpp"
#include "pairs.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// row[j] = scale[j] * row[index[j]] + bias[j], with a permutation as the index
class Reorder {
public:
    // Throws std::invalid_argument unless the vectors are of one length and `index` permutes that many.
    Reorder(const std::vector<std::int64_t>& index, std::vector<float> scale, std::vector<float> bias)
        : index_(index.begin(), index.end()), scale_(std::move(scale)), bias_(std::move(bias)) {
        const auto channels = static_cast<std::int64_t>(index_.size());
        std::vector<bool> found(index_.size());
        for (const std::int64_t i : index) {
            if (i < 0 || i >= channels || found[i])
                throw std::invalid_argument("index: expected a permutation of the channels");
            found[i] = true;
        }
        if (scale_.size() != index_.size() || bias_.size() != index_.size())
            throw std::invalid_argument("scale, bias: expected a value for each channel");
#ifdef USF_AVX512
        lanes_ = plan<float>();
        scale_before_.resize(index_.size()), bias_before_.resize(index_.size());
        for (std::size_t j = 0; j < index_.size(); ++j)
            scale_before_[index_[j]] = scale_[j], bias_before_[index_[j]] = bias_[j];
#endif
#ifdef USF_VECTOR_ASSEMBLY
        lanes_of_rounded_ = plan<BFloat16>();
#endif
    }

    // Works on contiguous rows, in place.
    void apply(float* state, int rows, Floats& memory) const {
#ifdef USF_AVX512
        if (best_lanes() == 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
            if (!lanes_.empty()) return permute<2>(lanes_, state, rows, state);
            return apply_wide(state, rows, memory, state);
        }
#endif
        const std::size_t channels = index_.size();
        float* const moved = memory.at_least(channels);
        for (float* row = state; row != state + rows * channels; row += channels) {
            for (std::size_t j = 0; j < channels; ++j) moved[j] = row[index_[j]];
            for (std::size_t j = 0; j < channels; ++j) row[j] = scale_[j] * moved[j] + bias_[j];
        }
    }

    // Writes rounded rows to `to`, and anything to the state. The processor must be able to multiply pairs.
    void apply(float* state, int rows, Floats& memory, BFloat16* to) const {
#ifdef USF_VECTOR_ASSEMBLY
        if (best_lanes() == 16) {
            if (!lanes_of_rounded_.empty()) return permute<2>(lanes_of_rounded_, state, rows, to);
            return apply_wide(state, rows, memory, to);
        }
#endif
        apply(state, rows, memory);
        round_to(state, static_cast<std::int64_t>(index_.size()) * rows, to);
    }

private:
#ifdef USF_AVX512
    // Where a register of the result takes its numbers from, among two neighbouring registers of a row; the
    // mask says which of them are there.
    template <class Number>
    struct Lanes {
        static constexpr int count = 64 / sizeof(Number);
        std::conditional_t<count == 16, std::uint32_t, std::uint16_t> lane[count] = {};
        std::conditional_t<count == 16, __mmask16, __mmask32> mask = 0;
    };
    static constexpr int most_registers = 8;  // of a row: with more of them, transposing is faster

    // Empty if rows do not fill registers, or too many of them.
    template <class Number>
    std::vector<Lanes<Number>> plan() const {
        constexpr int count = Lanes<Number>::count;
        const std::size_t channels = index_.size(), registers = channels / count;
        if (channels % count || registers > most_registers) return {};
        const std::size_t pairs = (registers + 1) / 2;
        std::vector<Lanes<Number>> lanes(registers * pairs);
        for (std::size_t j = 0; j < channels; ++j) {
            const std::size_t from = index_[j];
            Lanes<Number>& some = lanes[j / count * pairs + from / (2 * count)];
            some.lane[j % count] = from % (2 * count);
            some.mask |= 1u << j % count;
        }
        return lanes;
    }
    // Scales and shifts the channels of a register, before they move, and rounds them if two fill one.
    USF_AVX512 __m512 scaled(const float* row, int channel) const {
        return _mm512_fmadd_ps(load16(scale_before_.data() + channel), load16(row + channel),
                               load16(bias_before_.data() + channel));
    }
    template <class Number>
    USF_AVX512 __m512i scaled_numbers(const float* row, int channel) const {
        const __m512 first = scaled(row, channel);
        if constexpr (std::is_same_v<Number, float>) {
            return _mm512_castps_si512(first);
        } else {
            __m512i both;
            asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(scaled(row, channel + tile)));
            return both;
        }
    }
    USF_AVX512 static __m512i move(__m512i to, const Lanes<float>& lanes, __m512i left, __m512i right) {
        const __m512i some = _mm512_permutex2var_epi32(left, _mm512_loadu_si512(lanes.lane), right);
        return _mm512_mask_mov_epi32(to, lanes.mask, some);
    }
    USF_AVX512 static __m512i move(__m512i to, const Lanes<BFloat16>& lanes, __m512i left, __m512i right) {
        const __m512i some = _mm512_permutex2var_epi16(left, _mm512_loadu_si512(lanes.lane), right);
        return _mm512_mask_mov_epi16(to, lanes.mask, some);
    }
    // Permutes rows of at most so many registers.
    template <int most, class Number>
    USF_AVX512 void permute(const std::vector<Lanes<Number>>& plan, const float* state, int rows,
                            Number* to) const {
        constexpr int count = Lanes<Number>::count;
        const int channels = static_cast<int>(index_.size()), registers = channels / count;
        if constexpr (most < most_registers)
            if (registers > most) return permute<2 * most>(plan, state, rows, to);
        for (; rows > 0; --rows, state += channels, to += channels) {
            __m512i row[most];
            for (int i = 0; i < most; ++i)
                row[i] = scaled_numbers<Number>(state, std::min(i, registers - 1) * count);
            const Lanes<Number>* lanes = plan.data();
            for (int i = 0; i < registers; ++i) {
                __m512i moved = _mm512_setzero_si512();
                for (int pair = 0; pair < most && pair < registers; pair += 2)
                    moved = move(moved, *lanes++, row[pair], row[pair + 1]);
                _mm512_storeu_si512(to + i * count, moved);
            }
        }
    }
    std::vector<Lanes<float>> lanes_;
    std::vector<Lanes<BFloat16>> lanes_of_rounded_;
    std::vector<float> scale_before_, bias_before_;  // in the order of the channels before they move

    // Transposes some rows at a time, so that each channel of all of them is one register.
    template <class To>
    USF_AVX512 void apply_wide(const float* state, int rows, Floats& scratch, To* to) const {
        const int channels = static_cast<int>(index_.size());
        float* const memory = scratch.at_least(tile * index_.size());
        for (int first = 0; first < rows; first += tile) {
            const int count = std::min(tile, rows - first);
            const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(first) * channels;
            for (int j = 0; j < channels; j += tile)
                transpose_wide(state + at + j, channels, count, std::min(tile, channels - j),
                               memory + j * tile, tile);
            for (int j = 0; j < channels; j += tile) {
                const auto channel = [&](int c) USF_AVX512 {
                    return _mm512_fmadd_ps(_mm512_set1_ps(scale_[j + c]),
                                           _mm512_load_ps(memory + index_[j + c] * tile),
                                           _mm512_set1_ps(bias_[j + c]));
                };
                transpose_registers(channel, std::min(tile, channels - j), count, to + at + j, channels);
            }
        }
    }
#endif

    std::vector<std::int32_t> index_;
    std::vector<float> scale_, bias_;
};

}  // namespace usf
#endif
