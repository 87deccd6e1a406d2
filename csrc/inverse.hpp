// Inverses of matrices in float64, by blocks and without exchanging rows, for matrices that are known to have
// factors L U of moderate size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rows.hpp"
#include "team.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

template <int lanes>
struct DoubleVector {
    typedef double type __attribute__((vector_size(8 * lanes)));
    typedef double unaligned __attribute__((vector_size(8 * lanes), aligned(8), may_alias));
};

// A part of a matrix; its rows are `stride` numbers apart.
struct Block {
    double* data;
    std::int64_t stride;
    std::int64_t rows, columns;

    double* row(std::int64_t r) const { return data + r * stride; }
    Block part(std::int64_t row, std::int64_t column, std::int64_t some_rows,
               std::int64_t some_columns) const {
        return {data + row * stride + column, stride, some_rows, some_columns};
    }
};

// Memory for doubles that grows, kept from call to call.
inline double* doubles(Floats& memory, std::int64_t size) {
    return reinterpret_cast<double*>(memory.at_least(2 * size));
}

// to = factor * a b for `count` rows from `first` on, or to += factor * a b. The panel holds two vectors of
// each row of b, one row after the other.
template <int lanes, int count>
USF_INLINE void multiply_block_tile(const Block& a, std::int64_t first, const double* panel, double factor,
                                    bool add, std::int64_t column, const Block& to) {
    using V = typename DoubleVector<lanes>::type;
    using U = typename DoubleVector<lanes>::unaligned;
    V sums[count][2] = {};
    const double* rows[count];
    for (int i = 0; i < count; ++i) rows[i] = a.row(first + i);
    for (std::int64_t k = 0; k < a.columns; ++k, panel += 2 * lanes) {
        const V left = *reinterpret_cast<const U*>(panel), right = *reinterpret_cast<const U*>(panel + lanes);
#pragma GCC unroll 12
        for (int i = 0; i < count; ++i) sums[i][0] += rows[i][k] * left, sums[i][1] += rows[i][k] * right;
    }
    const std::int64_t width = std::min<std::int64_t>(2 * lanes, to.columns - column);
    for (int i = 0; i < count; ++i) {
        double* const out = to.row(first + i) + column;
        if (width == 2 * lanes) {
            for (int half = 0; half < 2; ++half) {
                U* const place = reinterpret_cast<U*>(out + half * lanes);
                *place = add ? V(*place) + factor * sums[i][half] : factor * sums[i][half];
            }
        } else {
            for (std::int64_t j = 0; j < width; ++j) {
                const double value = factor * sums[i][j / lanes][j % lanes];
                out[j] = add ? out[j] + value : value;
            }
        }
    }
}

// The same for all rows of a, and some columns of b: two vectors, or as many as there are.
inline void multiply_columns(const Block& a, const Block& b, double factor, bool add, std::int64_t column,
                             const Block& to) {
    static thread_local Floats memory;
    with_lanes(best_lanes(), [&]<int floats>() USF_LAMBDA {
        constexpr int lanes = floats / 2, count = rows_of_tile(floats), width = 2 * lanes;
        double* const panel = doubles(memory, a.columns * width);
        const std::int64_t some = std::min<std::int64_t>(width, b.columns - column);
        for (std::int64_t k = 0; k < a.columns; ++k) {
            const double* const from = b.row(k) + column;
            for (std::int64_t j = 0; j < width; ++j) panel[k * width + j] = j < some ? from[j] : 0.0;
        }
        std::int64_t row = 0;
        for (; row + count <= a.rows; row += count)
            multiply_block_tile<lanes, count>(a, row, panel, factor, add, column, to);
        for (; row + 4 <= a.rows; row += 4)
            multiply_block_tile<lanes, 4>(a, row, panel, factor, add, column, to);
        for (; row < a.rows; ++row) multiply_block_tile<lanes, 1>(a, row, panel, factor, add, column, to);
    });
}

// to = factor * a b, or to += factor * a b; `to` must be neither a nor b.
inline void multiply_blocks(const Block& a, const Block& b, double factor, bool add, const Block& to,
                            int threads) {
    // Below, handing the blocks from core to core takes longer than threads save.
    const bool little = a.rows * a.columns * b.columns < std::int64_t{1} << 22;
    const std::int64_t width = best_lanes();  // two vectors of doubles
    team_for((b.columns + width - 1) / width, little ? 1 : threads,
             [&](std::int64_t p) { multiply_columns(a, b, factor, add, p * width, to); });
}

constexpr std::int64_t smallest_block = 16;  // rows and columns

// Gauss-Jordan elimination in place.
USF_CLONES inline void invert_small(double* m, std::int64_t stride, std::int64_t n) {
    for (std::int64_t k = 0; k < n; ++k) {
        double* __restrict const pivot = m + k * stride;
        const double inverse = 1 / pivot[k];
        pivot[k] = 1;
        for (std::int64_t j = 0; j < n; ++j) pivot[j] *= inverse;
        for (std::int64_t i = 0; i < n; ++i) {
            if (i == k) continue;
            double* __restrict const row = m + i * stride;
            const double factor = row[k];
            row[k] = 0;
            for (std::int64_t j = 0; j < n; ++j) row[j] -= factor * pivot[j];
        }
    }
}

// Inverts [A B; C D] in place. With S = D - C A^-1 B, the inverse is
// [A^-1 + A^-1 B S^-1 C A^-1, -A^-1 B S^-1; -S^-1 C A^-1, S^-1]. Needs n * n / 2 numbers of `scratch`.
inline void invert_block(const Block& m, double* scratch, int threads) {
    if (m.rows <= smallest_block) return invert_small(m.data, m.stride, m.rows);
    const std::int64_t n = m.rows, whole = (n / 2 + smallest_block - 1) / smallest_block * smallest_block;
    const std::int64_t h = std::min(whole, n - 1), rest = n - h;
    const Block a = m.part(0, 0, h, h), b = m.part(0, h, h, rest);
    const Block c = m.part(h, 0, rest, h), d = m.part(h, h, rest, rest);
    // Inner calls are done with their scratch memory when this one writes to it, or have what lies behind.
    invert_block(a, scratch, threads);
    const Block ca{scratch, h, rest, h}, ab{scratch + rest * h, rest, h, rest};
    multiply_blocks(c, a, 1, false, ca, threads);
    multiply_blocks(ca, b, -1, true, d, threads);
    invert_block(d, scratch + rest * h, threads);
    multiply_blocks(a, b, 1, false, ab, threads);
    multiply_blocks(ab, d, -1, false, b, threads);
    multiply_blocks(d, ca, -1, false, c, threads);
    multiply_blocks(b, ca, -1, true, a, threads);
}

// Largest entry of M X v - v, which tells how far X is from the inverse of M, [n, n] both. Needs n numbers of
// `image`.
USF_CLONES inline double inverse_error(const float* m, const double* x, const double* v, std::int64_t n,
                                       double* image) {
    for (std::int64_t i = 0; i < n; ++i) image[i] = dot(x + i * n, v, n);
    double worst = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const double error = std::abs(dot(m + i * n, image, n) - v[i]);
        if (!(error <= worst)) worst = error;  // NaN too
    }
    return worst;
}

// Writes the inverse of a contiguous matrix [n, n], computed in float64 and rounded once. Returns false,
// without having written anything, if it is not exact to 1e-9, as when a pivot is nearly zero.
inline bool invert(const float* matrix, std::int64_t n, float* out, int threads) {
    constexpr double tolerance = 1e-9;
    static thread_local Floats memory;
    double* const m = doubles(memory, n * n + n * n / 2 + 2 * n);
    double* const scratch = m + n * n;
    std::copy_n(matrix, n * n, m);
    invert_block({m, n, n, n}, scratch, threads);
    double* const probe = scratch + n;
    for (std::int64_t i = 0; i < n; ++i) probe[i] = i * 0x9e3779b9 >> 16 & 1 ? 1 : -1;
    if (!(inverse_error(matrix, m, probe, n, scratch) <= tolerance)) return false;
    std::copy_n(m, n * n, out);
    return true;
}

}  // namespace usf
#endif
