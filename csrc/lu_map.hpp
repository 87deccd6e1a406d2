// Folds the parameters of an ActNorm and an LU map into one matrix, bias and log-determinant, and computes
// the gradients: y = L U (scale * x + offset) + bias, with scale = exp(log_scale), ones on L's diagonal and
// signs * exp(log_diagonal) on U's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "map_product.hpp"
#include "triangle.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Only the strict triangles of the matrices are read; rows are `stride` numbers apart.
struct LuParameters {
    int channels;
    const float* lower;
    std::int64_t lower_stride;
    const float* upper;
    std::int64_t upper_stride;
    const float *signs, *log_diagonal;  // log_diagonal may be null for zeros
    const float *log_scale, *offset;    // both null without an ActNorm

    std::int64_t size() const { return std::int64_t{channels} * channels; }
    std::vector<float> diagonal() const {
        std::vector<float> values(signs, signs + channels);
        for (int c = 0; c < channels && log_diagonal; ++c) values[c] *= std::exp(log_diagonal[c]);
        return values;
    }
    std::vector<float> scale() const {
        std::vector<float> values(channels);
        for (int c = 0; c < channels; ++c) values[c] = std::exp(log_scale[c]);
        return values;
    }
    // Writes the factors as contiguous matrices, with their diagonals and zeros.
    void form(const std::vector<float>& diagonal, float* l, float* u, int threads) const {
        const std::vector<float> ones(channels, 1.0f);
        copy_triangle(lower, lower_stride, channels, channels, false, ones.data(), l, threads);
        copy_triangle(upper, upper_stride, channels, channels, true, diagonal.data(), u, threads);
    }
};

inline double sum_of_logs(const float* values, int count) {
    double total = 0;
    for (int c = 0; c < count && values; ++c) total += values[c];
    return total;
}

USF_CLONES inline float image_of_row(const float* row, const float* x, int count) {
    return dot(row, x, count);
}

USF_CLONES inline void multiply_by(const float* factors, int count, float* __restrict row) {
    for (int c = 0; c < count; ++c) row[c] *= factors[c];
}

// Computes matrix [C, C] and, with an ActNorm, moved [C]: its offset mapped by L U, plus `bias` if that is
// not null. Returns the log-determinant. `memory` holds two matrices.
inline float lu_map(const LuParameters& given, const float* bias, float* matrix, float* moved, float* memory,
                    int threads) {
    const int channels = given.channels;
    float *const l = memory, *const u = memory + given.size();
    given.form(given.diagonal(), l, u, threads);
    map_product({l, channels, false}, Triangle::lower, channels, channels, {u, 0, channels}, 1, channels,
                nullptr, Ending::plain, nullptr, matrix, threads);
    if (given.log_scale) {
        const std::vector<float> scale = given.scale();
        constexpr int some = 32;  // rows
        team_for((channels + some - 1) / some, threads, [&](std::int64_t block) {
            const int first = static_cast<int>(block) * some;
            for (int o = first; o < std::min(first + some, channels); ++o) {
                float* const row = matrix + std::int64_t{o} * channels;
                moved[o] = image_of_row(row, given.offset, channels) + (bias ? bias[o] : 0.0f);
                multiply_by(scale.data(), channels, row);
            }
        });
    }
    return static_cast<float>(sum_of_logs(given.log_diagonal, channels) +
                              sum_of_logs(given.log_scale, channels));
}

// Gradients of the results, and memory for those of the parameters; null for parameters that do not exist.
struct LuGradients {
    const float *of_matrix, *of_moved;
    float of_log_det;
    float *lower, *upper, *log_diagonal, *log_scale, *offset;
};

// Computes some columns of a row of L U's gradient, and adds the row's terms to sums over rows per column.
USF_CLONES inline void through_scale(const float* grad, const float* matrix, float grad_moved,
                                     const float* scale, const float* offset, int count,
                                     float* __restrict of_product, float* __restrict of_log_scale,
                                     float* __restrict pulled) {
    for (int c = 0; c < count; ++c) {
        of_product[c] = grad[c] * scale[c] + grad_moved * offset[c];
        of_log_scale[c] += grad[c] * matrix[c];
        pulled[c] += grad_moved * matrix[c];
    }
}

// `matrix` is the result of `lu_map`; all matrices are contiguous; `memory` holds three matrices.
inline void lu_map_gradients(const LuParameters& given, const float* matrix, const LuGradients& grads,
                             float* memory, int threads) {
    const int channels = given.channels;
    float *const l = memory, *const u = l + given.size(), *const mine = u + given.size();
    const std::vector<float> diagonal = given.diagonal();
    given.form(diagonal, l, u, threads);
    const float* of_product = grads.of_matrix;
    if (given.log_scale) {
        of_product = mine;
        const std::vector<float> scale = given.scale();
        constexpr int some = 64;  // columns
        std::fill_n(grads.log_scale, channels, 0.0f);
        std::fill_n(grads.offset, channels, 0.0f);
        team_for((channels + some - 1) / some, threads, [&](std::int64_t block) {
            const int first = static_cast<int>(block) * some, count = std::min(some, channels - first);
            for (int o = 0; o < channels; ++o) {
                const std::int64_t at = std::int64_t{o} * channels + first;
                through_scale(grads.of_matrix + at, matrix + at, grads.of_moved[o], scale.data() + first,
                              given.offset + first, count, mine + at, grads.log_scale + first,
                              grads.offset + first);
            }
        });
        for (int c = 0; c < channels; ++c) {
            grads.log_scale[c] += grads.of_log_det;
            grads.offset[c] /= scale[c];  // undo the scale in `matrix`
        }
    }
    outer_product({{of_product, 0, channels}, {u, 0, channels}, Triangle::lower, channels, channels}, 1,
                  channels, grads.lower, threads);
    map_product({l, channels, true}, Triangle::upper, channels, channels, {of_product, 0, channels}, 1,
                channels, nullptr, Ending::plain, nullptr, grads.upper, threads);
    if (grads.log_diagonal)
        for (int c = 0; c < channels; ++c)
            grads.log_diagonal[c] =
                grads.upper[std::int64_t{c} * channels + c] * diagonal[c] + grads.of_log_det;
    const std::vector<float> zeros(channels, 0.0f);
    copy_triangle(grads.lower, channels, channels, channels, false, zeros.data(), grads.lower, threads);
    copy_triangle(grads.upper, channels, channels, channels, true, zeros.data(), grads.upper, threads);
}

}  // namespace usf
#endif
