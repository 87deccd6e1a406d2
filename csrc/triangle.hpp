// Copies of triangles of matrices.
#pragma once

#include <algorithm>
#include <cstdint>

#include "team.hpp"

namespace usf {

// out = the strict lower or upper triangle of a matrix [rows, columns], with the given diagonal and zeros
// elsewhere. The matrix is at least as wide as high, its rows are `stride` numbers apart. `out` is contiguous
// and may be the matrix itself.
inline void copy_triangle(const float* matrix, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                          bool upper, const float* diagonal, float* out, int threads) {
    constexpr std::int64_t together = 32;  // rows
    team_for((rows + together - 1) / together, threads, [&](std::int64_t block) {
        for (std::int64_t i = block * together; i < std::min((block + 1) * together, rows); ++i) {
            const float* const from = matrix + i * stride;
            float* const to = out + i * columns;
            const std::int64_t first = upper ? i + 1 : 0, last = upper ? columns : i;
            if (to != from) std::copy(from + first, from + last, to + first);
            std::fill(to, to + first, 0.0f);
            std::fill(to + last, to + columns, 0.0f);
            to[i] = diagonal[i];
        }
    });
}

}  // namespace usf
