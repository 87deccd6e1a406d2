// The nodes of the pixels on both sides of every cut of a Grid, and the pixel pairs across it.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "grid.hpp"
#include "parallel.hpp"

namespace usf {

class Seams {
public:
    void reset(const Grid& grid, Connectivity connectivity) {
        width_ = grid.width, height_ = grid.height, connectivity_ = connectivity;
        rows_ = grid.tile_rows - 1, columns_ = grid.tile_columns - 1;
        row_.reserve(2 * width_ * rows_);
        column_.reserve(2 * height_ * columns_);
    }

    // Number of pixel pairs, about.
    std::int64_t pairs() const {
        return (connectivity_ == Connectivity::four ? 1 : 3) * (rows_ * width_ + columns_ * height_);
    }
    // Replaces every node by of(node).
    template <class Of>
    void rename(int threads, Of&& of) {
        for_each(2 * rows_ * width_, threads, [&](std::int64_t i) { row_[i] = of(row_[i]); });
        for_each(2 * columns_ * height_, threads, [&](std::int64_t i) { column_[i] = of(column_[i]); });
    }

    // The last row of tiles `r` (side 0) or the first one of tiles `r + 1` (side 1), [width].
    std::int32_t* row(std::int64_t r, int side) { return row_.data() + (2 * r + side) * width_; }
    // The last column of tiles `c` (side 0) or the first one of tiles `c + 1` (side 1), [height].
    std::int32_t* column(std::int64_t c, int side) { return column_.data() + (2 * c + side) * height_; }

    // Calls pair(a, b) for all neighbours across the cut below the tiles `r`.
    template <class Pair>
    void across_row(std::int64_t r, Pair&& pair) {
        across(row(r, 0), row(r, 1), width_, pair);
    }
    // The same for the cut to the right of the tiles `c`, in the rows of one row of tiles. Diagonals that
    // also cross a cut between rows of tiles are not pairs.
    template <class Pair>
    void across_column(std::int64_t c, Range rows, Pair&& pair) {
        across(column(c, 0) + rows.begin, column(c, 1) + rows.begin, rows.size(), pair);
    }

private:
    template <class Pair>
    void across(const std::int32_t* a, const std::int32_t* b, std::int64_t n, Pair& pair) const {
        for (std::int64_t i = 0; i < n; ++i) pair(a[i], b[i]);
        if (connectivity_ == Connectivity::four) return;
        for (std::int64_t i = 0; i + 1 < n; ++i) {
            pair(a[i], b[i + 1]);
            pair(a[i + 1], b[i]);
        }
    }

    std::int64_t width_ = 0, height_ = 0, rows_ = 0, columns_ = 0;
    Connectivity connectivity_ = Connectivity::four;
    Buffer<std::int32_t> row_, column_;
};

}  // namespace usf
