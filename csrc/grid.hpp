// Division of a large map into tiles that fit the first-level cache. It depends on the size of the map alone,
// never on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace usf {

enum class Connectivity : int { four = 4, eight = 8 };

struct Range {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
};

struct Grid {
    static constexpr std::int64_t tile_side = 64, tile_pixels = tile_side * tile_side;

    Grid(std::int64_t map_height, std::int64_t map_width) : height(map_height), width(map_width) {
        // A map narrower than a tile is cut into longer ones of the same number of pixels.
        const std::int64_t narrow = std::min(width, tile_side);
        tile_height = std::min(height, tile_pixels / narrow);
        tile_width = std::min(width, tile_pixels / std::min(tile_height, tile_side));
        tile_rows = (height + tile_height - 1) / tile_height;
        tile_columns = (width + tile_width - 1) / tile_width;
    }

    Range rows_of_tile(std::int64_t tile_row) const {
        return {tile_row * tile_height, std::min(height, (tile_row + 1) * tile_height)};
    }
    Range columns_of_tile(std::int64_t tile_column) const {
        return {tile_column * tile_width, std::min(width, (tile_column + 1) * tile_width)};
    }
    // Start of a tile's part in arrays with one place per pixel, tile after tile.
    std::int64_t first_place(std::int64_t tile_row, std::int64_t tile_column) const {
        const Range rows = rows_of_tile(tile_row);
        return rows.begin * width + rows.size() * columns_of_tile(tile_column).begin;
    }

    std::int64_t height, width;
    std::int64_t tile_height, tile_width, tile_rows, tile_columns;
};

}  // namespace usf
