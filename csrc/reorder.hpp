// Reorders, scales and shifts the channels of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "interleave.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// row[j] = scale[j] * row[index[j]] + bias[j]
class Reorder {
public:
    // Throws std::invalid_argument unless the vectors are of one length and `index` lies within it.
    Reorder(std::vector<std::int32_t> index, std::vector<float> scale, std::vector<float> bias)
        : index_(std::move(index)), scale_(std::move(scale)), bias_(std::move(bias)) {
        const auto channels = static_cast<std::int64_t>(index_.size());
        for (const std::int32_t i : index_)
            if (i < 0 || i >= channels) throw std::invalid_argument("index: expected channels of the state");
        if (scale_.size() != index_.size() || bias_.size() != index_.size())
            throw std::invalid_argument("scale, bias: expected a value for each channel");
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

private:
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
