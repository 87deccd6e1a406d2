// Products of pairs in AMX's tile registers: 32 rows times 32 outputs at a time. Panels of pairs lie as they
// want them, a word of two inputs for each output in a row.
#pragma once

#include <algorithm>
#include <cstddef>

#include "amx.hpp"
#include "panels.hpp"

#if defined(USF_PRODUCTS) && defined(USF_AMX)

namespace usf {

// Sums of at most two tiles of rows (`both`: more than one) times two of outputs, into [2 * tile_rows, 2 *
// tile_words].
template <bool both>
USF_INLINE void multiply_tiles(const float* rows, std::ptrdiff_t stride, const float* panel, int words,
                               float* sums) {
    constexpr std::ptrdiff_t width = 2 * tile_words;
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (both) {
        clear_tile<2>();
        clear_tile<3>();
    }
    for (int k = 0; k < words; k += tile_words, panel += width * tile_words) {
        load_tile<4>(rows + k, stride);
        load_tile<6>(panel, width);
        load_tile<7>(panel + tile_words, width);
        add_product_of_tiles<0, 4, 6>();
        add_product_of_tiles<1, 4, 7>();
        if constexpr (both) {
            load_tile<5>(rows + tile_rows * stride + k, stride);
            add_product_of_tiles<2, 5, 6>();
            add_product_of_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(sums, width);
    store_tile<1>(sums + tile_words, width);
    if constexpr (both) {
        store_tile<2>(sums + tile_rows * width, width);
        store_tile<3>(sums + tile_rows * width + tile_words, width);
    }
}

// Finishes `count` rows of sums, some at a time.
template <class V, class Finish>
USF_INLINE void finish_rows(const float* sums, int count, int row, int column, int width,
                            const Finish& finish) {
    constexpr int lanes = sizeof(V) / sizeof(float), some = 4;
    const auto of = [&](int r, int half) USF_LAMBDA {
        return *reinterpret_cast<const typename Vector<lanes>::unaligned*>(sums + (2 * r + half) * lanes);
    };
    int r = 0;
    for (; r + some <= count; r += some) {
        V values[some][2];
#pragma GCC unroll 4
        for (int i = 0; i < some; ++i) values[i][0] = of(r + i, 0), values[i][1] = of(r + i, 1);
        finish(values, row + r, column, width);
    }
    for (; r < count; ++r) {
        V values[1][2] = {{of(r, 0), of(r, 1)}};
        finish(values, row + r, column, width);
    }
}

// All outputs of rows of words, which `finish` takes.
template <class Finish>
void multiply_in_tiles(const float* in, std::ptrdiff_t stride, int rows, const Panels& weights,
                       const Finish& finish) {
    with_lanes(tile_words, [&]<int lanes>() USF_LAMBDA {
        using V = typename Vector<lanes>::type;
        alignas(64) float sums[4 * tile_rows * tile_words];
        TileShapes shapes;
        for (int row = 0; row < rows;) {
            // Full tiles as long as there are rows for them, in one sweep through the panels each.
            const int left = rows - row, count = std::min(left, 2 * tile_rows);
            const int last = left >= 2 * tile_rows ? rows - left % (2 * tile_rows) : rows;
            shapes.load(std::min(count, tile_rows), count - std::min(count, tile_rows));
            for (int column = 0; column < weights.outputs; column += weights.width)
                for (int r = row; r < last; r += count) {
                    const float* const from = in + r * stride;
                    if (count > tile_rows)
                        multiply_tiles<true>(from, stride, weights.panel(column), weights.inputs, sums);
                    else
                        multiply_tiles<false>(from, stride, weights.panel(column), weights.inputs, sums);
                    finish_rows<V>(sums, count, r, column, std::min(2 * lanes, weights.outputs - column),
                                   finish);
                }
            row = last;
        }
    });
}

}  // namespace usf
#endif
