// Products of pairs in AMX's tile registers: 32 rows times 32 outputs at a time. Panels of pairs have the
// layout that the registers need: each row holds a word of two inputs for each output.
#pragma once

#include <algorithm>
#include <cstddef>

#include "amx.hpp"
#include "panels.hpp"

#if defined(USF_PRODUCTS) && defined(USF_AMX)

namespace usf {

// Multiplies two tiles of rows, or one unless `both`, with two of outputs: [2 * tile_rows, 2 * tile_words].
template <bool both, class Source>
USF_INLINE void multiply_tiles(const Source& in, int row, const Panels& weights, int column, float* sums) {
    constexpr std::ptrdiff_t width = 2 * tile_words;
    const float* panel = weights.panel(column);
    const std::ptrdiff_t words = weights.inputs / in.taps();
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (both) {
        clear_tile<2>();
        clear_tile<3>();
    }
    for (int tap = 0; tap < in.taps(); ++tap) {
        const float* const first = in.row(tap, row);
        for (std::ptrdiff_t k = 0; k < words; k += tile_words, panel += width * tile_words) {
            load_tile<4>(first + k, in.stride);
            load_tile<6>(panel, width);
            load_tile<7>(panel + tile_words, width);
            add_product_of_tiles<0, 4, 6>();
            add_product_of_tiles<1, 4, 7>();
            if constexpr (both) {
                load_tile<5>(first + tile_rows * in.stride + k, in.stride);
                add_product_of_tiles<2, 5, 6>();
                add_product_of_tiles<3, 5, 7>();
            }
        }
    }
    store_tile<0>(sums, width);
    store_tile<1>(sums + tile_words, width);
    if constexpr (both) {
        store_tile<2>(sums + tile_rows * width, width);
        store_tile<3>(sums + tile_rows * width + tile_words, width);
    }
}

// Passes `count` rows of sums to `finish`, some at a time.
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

// Computes all outputs of rows of words, which `finish` takes. Tiles are whole: rows after the last one are
// read and multiplied too, and their results dropped.
template <class Source, class Finish>
void multiply_in_tiles(const Source& in, int rows, const Panels& weights, const Finish& finish) {
    with_avx512([&]<int lanes>() USF_LAMBDA {
        using V = typename Vector<lanes>::type;
        alignas(64) float sums[4 * tile_rows * tile_words];
        const TileShapes shapes;
        for (int column = 0; column < weights.outputs; column += weights.width)
            for (int row = 0; row < rows; row += 2 * tile_rows) {
                const int count = std::min(rows - row, 2 * tile_rows);
                if (count > tile_rows)
                    multiply_tiles<true>(in, row, weights, column, sums);
                else
                    multiply_tiles<false>(in, row, weights, column, sums);
                finish_rows<V>(sums, count, row, column, std::min(2 * lanes, weights.outputs - column),
                               finish);
            }
    });
}

}  // namespace usf
#endif
