// Application of triangular factors of LU maps to channels. Only a strict triangle of a matrix is read, the
// diagonal is stored separately, and most of the zeros are not multiplied.
#pragma once

#include <algorithm>
#include <cstdint>

#include "map_product.hpp"

#ifdef USF_PRODUCTS

namespace usf {

struct Factor {
    MatrixView matrix;  // the view may be transposed, so that the other triangle of the memory is read
    bool upper;
    const float* diagonal;  // null for ones
    int channels;

    Triangle part() const { return upper ? Triangle::upper : Triangle::lower; }

    // Fills the panels of `count` outputs from `first` on, with the inputs that any of them depends on.
    void fill(int first, int count, int width, int depth, float* panels) const {
        const Reach reach(part(), first, count, channels);
        for (int o = first; o < first + count; o += width) {
            const int some = std::min(width, first + count - o);
            float* const panel = panels + std::int64_t{o - first} * depth;
            fill_panels({matrix.at(o, reach.first), matrix.stride, matrix.transposed}, some,
                        reach.last - reach.first, width, panel);
            for (int row = o; row < o + some; ++row)
                for (int c = first; c < first + count; ++c) {
                    float& value = panel[std::int64_t{c - reach.first} * width + (row - o)];
                    if (c == row)
                        value = diagonal ? diagonal[row] : 1.0f;
                    else if ((c > row) != upper)
                        value = 0;
                }
        }
    }
};

// out = factor x + bias for maps x; `out` is contiguous, the bias may be null.
inline void factor_maps(const Factor& factor, const float* bias, const MapView& x, std::int64_t images,
                        std::int64_t positions, float* out, int threads) {
    static thread_local Floats memory;
    const int channels = factor.channels, width = rows_of_tile(best_lanes());
    static_assert(rows_together % 12 == 0 && rows_together % 8 == 0);  // whole groups of a tile's rows
    float* const columns = memory.at_least(std::int64_t{Panels::padded(channels, rows_together)} * channels);
    team_for((channels + rows_together - 1) / rows_together, threads, [&](std::int64_t i) {
        const int first = static_cast<int>(i) * rows_together;
        factor.fill(first, std::min(rows_together, channels - first), width, channels,
                    columns + std::int64_t{first} * channels);
    });
    const Columns whole{columns, width, channels};
    multiply_maps(factor.part(), channels, channels, x, images, positions, bias, Ending::plain, nullptr, out,
                  threads, [&](int o, int rows, int, const Panels& weights, const StoreMaps& store) {
                      multiply(whole.from(o, 0), rows, weights, store);
                  });
}

// out = factor x + bias for rows x.
inline void factor_rows(const Factor& factor, const float* bias, const Inputs& x, std::int64_t rows,
                        float* out, int threads) {
    const int channels = factor.channels, width = Panels::best_width();
    const std::int64_t most =
        std::max<std::int64_t>(2 * cache_numbers / std::max<std::int64_t>(x.stride, 1), least_rows);
    for (std::int64_t row = 0; row < rows; row += most) {  // they stay in the cache for all panels
        const int some = static_cast<int>(std::min(most, rows - row));
        team_for((channels + width - 1) / width, threads, [&](std::int64_t p) {
            const int first = static_cast<int>(p) * width, count = std::min(width, channels - first);
            const Reach reach(factor.part(), first, count, channels);
            const int inputs = reach.last - reach.first;
            float* const panel = scratch_of_thread().points[0].at_least(std::int64_t{width} * (inputs + 1));
            float* const shift = panel + std::int64_t{width} * inputs;
            factor.fill(first, count, width, inputs, panel);
            std::fill_n(shift, width, 0.0f);
            if (bias) std::copy_n(bias + first, count, shift);
            multiply(Inputs{x.data + row * x.stride + reach.first, x.stride}, some,
                     Panels{panel, shift, count, inputs, width},
                     Store{out + row * channels + first, channels, shift, Ending::plain, nullptr});
        });
    }
}

}  // namespace usf
#endif
