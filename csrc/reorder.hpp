// Reorders, scales and shifts the channels of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
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
#ifdef USF_VECTOR_ASSEMBLY
        if (channels % register_of_numbers == 0 && channels <= most_permuted) plan_permutation();
#endif
    }

    // Works on contiguous rows, in place.
    void apply(float* state, int rows, Floats& memory) const {
#ifdef USF_AVX512
        if (best_lanes() == 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            return apply_wide(state, rows, memory.at_least(tile * (index_.size() + tile)));
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
        if (!lanes_.empty() && best_lanes() == 16) {
            const int registers = static_cast<int>(index_.size()) / register_of_numbers;
            if (registers == 1) return permute<1>(state, rows, to);
            if (registers == 2) return permute<2>(state, rows, to);
            if (registers <= 4) return permute<4>(state, rows, to);
            return permute<8>(state, rows, to);
        }
#endif
        apply(state, rows, memory);
        round_to(state, static_cast<std::int64_t>(index_.size()) * rows, to);
    }

private:
#ifdef USF_VECTOR_ASSEMBLY
    // A row of up to this many rounded numbers is in registers of 32.
    static constexpr int register_of_numbers = 32, most_permuted = 256;

    // Lanes of 32 channels in two neighbouring registers; the mask says which channels are in these.
    struct Lanes {
        std::uint16_t lane[register_of_numbers] = {};
        std::uint32_t mask = 0;
    };
    void plan_permutation() {
        const std::size_t channels = index_.size(), registers = channels / register_of_numbers;
        const std::size_t pairs = (registers + 1) / 2;
        lanes_.resize(registers * pairs);
        for (std::size_t j = 0; j < channels; ++j) {
            const std::size_t from = index_[j];
            Lanes& lanes = lanes_[j / register_of_numbers * pairs + from / (2 * register_of_numbers)];
            lanes.lane[j % register_of_numbers] =
                static_cast<std::uint16_t>(from % (2 * register_of_numbers));
            lanes.mask |= 1u << j % register_of_numbers;
        }
        scale_before_.resize(channels), bias_before_.resize(channels);
        for (std::size_t j = 0; j < channels; ++j)
            scale_before_[index_[j]] = scale_[j], bias_before_[index_[j]] = bias_[j];
    }
    // Scales, shifts and rounds a row before its channels move: half as many numbers fill a register.
    template <int most>
    USF_AVX512 void permute(const float* state, int rows, BFloat16* to) const {
        constexpr int most_pairs = (most + 1) / 2;
        const int channels = static_cast<int>(index_.size()), registers = channels / register_of_numbers;
        for (; rows > 0; --rows, state += channels, to += channels) {
            const auto scaled = [&](int at) USF_AVX512 {
                return _mm512_fmadd_ps(load16(scale_before_.data() + at), load16(state + at),
                                       load16(bias_before_.data() + at));
            };
            __m512i row[2 * most_pairs];
            for (int i = 0; i < 2 * most_pairs; ++i) {
                const int at = std::min(i, registers - 1) * register_of_numbers;
                asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(row[i]) : "v"(scaled(at)), "v"(scaled(at + tile)));
            }
            const Lanes* lanes = lanes_.data();
            for (int i = 0; i < registers; ++i) {
                __m512i moved = _mm512_setzero_si512();
                for (int pair = 0; pair < most_pairs && 2 * pair < registers; ++pair, ++lanes) {
                    const __m512i lane = _mm512_loadu_si512(lanes->lane);
                    const __m512i some = _mm512_permutex2var_epi16(row[2 * pair], lane, row[2 * pair + 1]);
                    moved = pair ? _mm512_mask_mov_epi16(moved, lanes->mask, some) : some;
                }
                _mm512_storeu_si512(to + i * register_of_numbers, moved);
            }
        }
    }
    std::vector<Lanes> lanes_;  // empty if rows do not fill registers, or too many of them
    std::vector<float> scale_before_, bias_before_;  // in the order of the channels before they move
#endif
#ifdef USF_AVX512
    // Transposes some rows at a time, so that each channel of all of them is one register.
    USF_AVX512 void apply_wide(float* state, int rows, float* memory) const {
        const int channels = static_cast<int>(index_.size());
        float* const block = memory + static_cast<std::ptrdiff_t>(tile) * channels;
        for (int first = 0; first < rows; first += tile) {
            const int count = std::min(tile, rows - first);
            float* const row = state + static_cast<std::ptrdiff_t>(first) * channels;
            for (int j = 0; j < channels; j += tile)
                transpose_wide(row + j, channels, count, std::min(tile, channels - j), memory + j * tile,
                               tile);
            for (int j = 0; j < channels; j += tile) {
                const int width = std::min(tile, channels - j);
                for (int k = 0; k < width; ++k) {
                    const __m512 channel = _mm512_load_ps(memory + index_[j + k] * tile);
                    const __m512 scale = _mm512_set1_ps(scale_[j + k]), bias = _mm512_set1_ps(bias_[j + k]);
                    _mm512_store_ps(block + k * tile, _mm512_fmadd_ps(scale, channel, bias));
                }
                transpose_wide(block, tile, width, count, row + j, channels);
            }
        }
    }
#endif

    std::vector<std::int32_t> index_;
    std::vector<float> scale_, bias_;
};

}  // namespace usf
#endif
