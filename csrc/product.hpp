// Matrix products of rows that are in the cache, and convolutions of maps whose pixels are rows. The
// operations after them are done in registers: a bias, a condition's share, ReLU, or an addition to existing
// rows.
//
// The registers hold a tile of a few rows times two vectors of outputs. Its weights lie one after the other
// in a panel that stays in the caches while all rows pass, so nothing is written in between and every output
// is written once (the inner loops of K. Goto, R. van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", ACM TOMS 34(3), 2008). A convolution is the same with pointers to the rows around each row
// (M. Dukhan, "The Indirect Convolution Algorithm", arXiv:1907.02129).
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>

#include "finish.hpp"
#include "panels.hpp"
#include "tile_product.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Rows to be multiplied. Of each, the first columns are used, as many as the weights have inputs.
struct Inputs {
    const float* data;
    std::ptrdiff_t stride;
    bool pairs = false;  // whether the rows are words

    static constexpr int taps() { return 1; }
    static constexpr int step() { return 1; }  // from one input to the next
    USF_INLINE const float* row(int, int r) const { return data + r * stride; }
};

// Columns to be multiplied, in panels of as many as a tile has rows, input after input.
struct Columns {
    const float* data;
    int width;
    std::ptrdiff_t depth = 0;  // inputs of the panels in memory, of which these may be a part

    static constexpr int taps() { return 1; }
    USF_INLINE int step() const { return width; }
    USF_INLINE const float* row(int, int r) const { return data + r / width * width * depth + r % width; }
    // The columns and inputs from these on; `column` must be the first of a panel.
    Columns from(std::ptrdiff_t column, std::ptrdiff_t input) const {
        return {data + column * depth + input * width, width, depth};
    }
};

// Rows around rows: `count` pointers for each tap of a kernel. The weights' inputs are those of one tap after
// the other.
struct Neighbours {
    const float* const* rows;
    int count;
    int kernel;  // taps

    int taps() const { return kernel; }
    static constexpr int step() { return 1; }
    USF_INLINE const float* row(int tap, int r) const {
        return rows[static_cast<std::ptrdiff_t>(tap) * count + r];
    }
};

// Adds the products of some inputs of some taps to a tile, in registers; returns the rest of the panel. With
// one vector, for the last few outputs, the panel's second one is not read.
template <class Arithmetic, int vectors, class V, int count, class Source>
USF_INLINE const float* add_products(V (&sums)[count][2], const Source& in, int row, int tap, int last_tap,
                                     std::ptrdiff_t first, std::ptrdiff_t last, const float* panel,
                                     std::ptrdiff_t ahead) {
    constexpr int lanes = sizeof(V) / sizeof(float);
    using U = typename Vector<lanes>::unaligned;
    for (; tap < last_tap; ++tap) {
        const float* from[count];
        for (int i = 0; i < count; ++i) from[i] = in.row(tap, row + i);
        for (std::ptrdiff_t k = first; k < last; ++k, panel += 2 * lanes) {
            __builtin_prefetch(panel + ahead, 0, 2);
            if constexpr (lanes == 16) __builtin_prefetch(panel + ahead + lanes, 0, 2);
            const V left = *reinterpret_cast<const U*>(panel);
            const V right = vectors == 2 ? V(*reinterpret_cast<const U*>(panel + lanes)) : V{};
#pragma GCC unroll 12
            for (int i = 0; i < count; ++i)
                Arithmetic::template add<vectors>(sums[i], from[i] + k * in.step(), left, right);
        }
    }
    return panel;
}

template <class Arithmetic, int vectors, class V, int count, bool several, class Source, class Finish>
USF_INLINE void multiply_tile(const Source& in, const Panels& weights, int row, int column,
                              const Finish& finish) {
    constexpr int lanes = sizeof(V) / sizeof(float);
    const float* panel = weights.panel(column);
    const std::ptrdiff_t ahead = std::ptrdiff_t{2} * lanes * weights.depth;  // the next panel
    const std::ptrdiff_t inputs = weights.inputs / in.taps(), chain = weights.chain;
    V total[count][2] = {};
    if constexpr (several) {
        const int taps_each = static_cast<int>(std::max<std::ptrdiff_t>(chain / inputs, 1));
        for (int tap = 0; tap < in.taps(); tap += taps_each)
            for (std::ptrdiff_t k = 0; k < inputs; k += chain) {
                V sums[count][2] = {};
                panel = add_products<Arithmetic, vectors, V, count>(
                    sums, in, row, tap, std::min(tap + taps_each, in.taps()), k, std::min(k + chain, inputs),
                    panel, ahead);
                for (int i = 0; i < count; ++i)
                    for (int half = 0; half < 2; ++half) total[i][half] += sums[i][half];
            }
    } else {
        add_products<Arithmetic, vectors, V, count>(total, in, row, 0, in.taps(), 0, inputs, panel, ahead);
    }
    finish(total, row, column, std::min(2 * lanes, weights.outputs - column));
}

// Multiplies the remaining rows, fewer than a full tile: `count` of them if there are as many, then half as
// many, and so on. A tile for every number of rows would take long to compile.
template <class Arithmetic, int vectors, class V, int count, bool several, class Source, class Finish>
USF_INLINE void multiply_rest(const Source& in, const Panels& weights, int row, int left, int column,
                              const Finish& finish) {
    if (left >= count) {
        multiply_tile<Arithmetic, vectors, V, count, several>(in, weights, row, column, finish);
        row += count, left -= count;
    }
    if constexpr (count > 1)
        multiply_rest<Arithmetic, vectors, V, count / 2, several>(in, weights, row, left, column, finish);
}

template <class Arithmetic, int vectors, class V, int count, bool several, class Source, class Finish>
USF_INLINE void multiply_panel(const Source& in, int rows, const Panels& weights, int column,
                               const Finish& finish) {
    constexpr int rest = std::bit_floor(count - 1u);
    int row = 0;
    for (; row + count <= rows; row += count)
        multiply_tile<Arithmetic, vectors, V, count, several>(in, weights, row, column, finish);
    multiply_rest<Arithmetic, vectors, V, rest, several>(in, weights, row, rows - row, column, finish);
}

template <class Arithmetic, class V, int count, bool several, class Source, class Finish>
USF_INLINE void multiply_rows(const Source& in, int rows, const Panels& weights, const Finish& finish) {
    constexpr int lanes = sizeof(V) / sizeof(float);
    int column = 0;
    for (; column + lanes < weights.outputs; column += weights.width)
        multiply_panel<Arithmetic, 2, V, count, several>(in, rows, weights, column, finish);
    if (column < weights.outputs)
        multiply_panel<Arithmetic, 1, V, count, several>(in, rows, weights, column, finish);
}

// One chain and several are separate functions: in a function with both, GCC puts the sums into memory.
template <class Arithmetic, bool several, class Source, class Finish>
void multiply_in(const Source& in, int rows, const Panels& weights, const Finish& finish) {
    const auto body = [&]<int lanes>() USF_LAMBDA {
        using V = typename Vector<lanes>::type;
        multiply_rows<Arithmetic, V, rows_of_tile(lanes), several>(in, rows, weights, finish);
    };
    if constexpr (std::same_as<Arithmetic, Pairs>)
        with_pairs(body);
    else
        with_lanes(weights.width / 2, body);
}

template <class Arithmetic, class Source, class Finish>
void multiply_with(const Source& in, int rows, const Panels& weights, const Finish& finish) {
    if (weights.inputs <= weights.chain)
        multiply_in<Arithmetic, false>(in, rows, weights, finish);
    else
        multiply_in<Arithmetic, true>(in, rows, weights, finish);
}

// Computes all outputs of `rows` rows (Inputs, Columns, Neighbours), which `finish` (Store, Add) takes tile
// by tile. If the weights are pairs, the rows must be Inputs of words.
template <class Source, class Finish>
void multiply(const Source& in, int rows, const Panels& weights, const Finish& finish) {
    if constexpr (std::same_as<Source, Inputs>) {
#ifdef USF_AMX
        if (weights.pairs && has_amx()) return multiply_in_tiles(in, rows, weights, finish);
#endif
        if (weights.pairs) return multiply_with<Pairs>(in, rows, weights, finish);
    }
    multiply_with<Singles>(in, rows, weights, finish);
}

// The same for rows of floats, which are rounded into the memory `rounded` if the weights are pairs; `finish`
// may then overwrite the rows.
template <class Finish>
void multiply(const Inputs& in, int rows, const Weights& weights, const Finish& finish, Floats& rounded) {
    if (in.pairs || !weights.pairs()) return multiply(in, rows, weights, finish);
    const int words = words_of(weights.inputs());
    float* const to = rows_of_words(rounded, rows, words);
    round_rows(in.data, in.stride, rows, weights.inputs(), to);
    multiply(Inputs{to, words, true}, rows, weights, finish);
}

}  // namespace usf
#endif
