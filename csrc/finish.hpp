// Processing of a tile of a product's sums while it is in registers. A tile is a few rows times two vectors
// of outputs, of which only the first `width` belong to the product. Its loops are unrolled and take no
// address of the sums: with an index that is not constant, GCC would keep the sums in memory from the start.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "pairs.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// How outputs end: plain as they are, relu with 0 where they are negative, masked with 0 where the value
// beside them is not positive.
enum class Ending { plain, relu, masked };

// Finishes a tile: out = ending(sums + bias + the rows beside). Ending::masked compares the rows beside
// instead of adding them. Rows of BFloat16 are padded to whole words.
template <class T>
struct StoreAs {
    T* out;
    std::ptrdiff_t stride;
    const float* bias;
    Ending ending;
    const float* const* beside;  // a row for each row, or null

    template <class V, int count>
    USF_INLINE void operator()(V (&sums)[count][2], int row, int column, int width) const {
        constexpr int lanes = sizeof(V) / sizeof(float);
        using U = typename Vector<lanes>::unaligned;
        const V left = *reinterpret_cast<const U*>(bias + column);
        const V right = *reinterpret_cast<const U*>(bias + column + lanes);
        T* const to = out + row * stride + column;
        constexpr bool in_words = sizeof(T) < sizeof(float);
        const bool both = in_words ? column + lanes < stride : width > lanes;
#pragma GCC unroll 12
        for (int i = 0; i < count; ++i) {
            V first = sums[i][0] + left, second = sums[i][1] + right;
            if (beside) stand_beside<V>(beside[row + i] + column, width, first, second);
            if (ending == Ending::relu) {  // in this order NaN stays NaN
                first = first < 0 ? V{} : first;
                second = second < 0 ? V{} : second;
            }
            if (in_words || width % lanes == 0) {
                store<lanes>(first, to + i * stride);
                if (both) store<lanes>(second, to + i * stride + lanes);
            } else {
                T values[2 * lanes];
                store<lanes>(first, values);
                store<lanes>(second, values + lanes);
                std::copy_n(values, width, to + i * stride);
            }
        }
    }

private:
    template <class V>
    USF_INLINE void stand_beside(const float* from, int width, V& first, V& second) const {
        constexpr int lanes = sizeof(V) / sizeof(float);
        using U = typename Vector<lanes>::unaligned;
        float padded[2 * lanes];
        if (width < 2 * lanes) {  // memory after the last panel must not be read
            std::fill_n(std::copy_n(from, width, padded), 2 * lanes - width, 0.0f);
            from = padded;
        }
        const V left = *reinterpret_cast<const U*>(from);
        const V right = *reinterpret_cast<const U*>(from + lanes);
        if (ending == Ending::masked) {
            first = left <= 0 ? V{} : first;
            second = right <= 0 ? V{} : second;
        } else {
            first += left, second += right;
        }
    }
};
using Store = StoreAs<float>;

// Finishes a tile whose rows are channels: out = ending(sums + row's bias). `mask` has the strides of `out`.
struct StoreMaps {
    float* out;
    std::int64_t stride;
    const float* bias;  // or null
    Ending ending;
    const float* mask;

    template <class V, int count>
    USF_INLINE void operator()(V (&sums)[count][2], int row, int column, int width) const {
        constexpr int lanes = sizeof(V) / sizeof(float);
        using U = typename Vector<lanes>::unaligned;
#pragma GCC unroll 12
        for (int i = 0; i < count; ++i) {
            const std::int64_t at = (row + i) * stride + column;
            const float shift = bias ? bias[row + i] : 0.0f;
            V value[2] = {sums[i][0] + shift, sums[i][1] + shift};
            if (ending == Ending::relu)  // in this order NaN stays NaN
                for (V& half : value) half = half < 0 ? V{} : half;
            // The next panel's place: channels are too far apart for the processor to foresee it.
            __builtin_prefetch(out + at + 2 * lanes, 1);
            if (ending == Ending::masked) __builtin_prefetch(mask + at + 2 * lanes);
            if (width % lanes == 0) {
                for (int half = 0; half < width / lanes; ++half) {
                    if (ending == Ending::masked)
                        value[half] =
                            *reinterpret_cast<const U*>(mask + at + half * lanes) <= 0 ? V{} : value[half];
                    *reinterpret_cast<U*>(out + at + half * lanes) = value[half];
                }
            } else {
                float values[2 * lanes];
                std::memcpy(values, value, sizeof(values));
                for (int j = 0; j < width; ++j)
                    out[at + j] = ending == Ending::masked && mask[at + j] <= 0 ? 0.0f : values[j];
            }
        }
    }
};

// row(i) += factor * sums[i] from a column on, for rows that are not null.
template <class V, int count, class Rows>
USF_INLINE void add_tile(V (&sums)[count][2], float factor, int column, int width, const Rows& row) {
    constexpr int lanes = sizeof(V) / sizeof(float);
    using U = typename Vector<lanes>::unaligned;
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i) {
        float* to = row(i);
        if (!to) continue;
        to += column;
        if (width % lanes == 0) {
            *reinterpret_cast<U*>(to) += factor * sums[i][0];
            if (width > lanes) *reinterpret_cast<U*>(to + lanes) += factor * sums[i][1];
        } else {
            float values[2 * lanes];  // vector by vector, or GCC would put all sums into memory
            *reinterpret_cast<U*>(values) = sums[i][0];
            *reinterpret_cast<U*>(values + lanes) = sums[i][1];
            for (int j = 0; j < width; ++j) to[j] += factor * values[j];
        }
    }
}

// Finishes a tile: out += factor * sums.
struct Add {
    float* out;
    std::ptrdiff_t stride;
    float factor;

    template <class V, int count>
    USF_INLINE void operator()(V (&sums)[count][2], int row, int column, int width) const {
        add_tile(sums, factor, column, width, [&](int i) USF_LAMBDA { return out + (row + i) * stride; });
    }
};
// Does the same for rows at any addresses; null rows are skipped.
struct AddToRows {
    float* const* rows;
    float factor;

    template <class V, int count>
    USF_INLINE void operator()(V (&sums)[count][2], int row, int column, int width) const {
        add_tile(sums, factor, column, width, [&](int i) USF_LAMBDA { return rows[row + i]; });
    }
};

}  // namespace usf
#endif
