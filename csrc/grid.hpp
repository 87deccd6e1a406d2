// How a large map is cut: into tiles that fit the first-level cache, and bands (rows of tiles) that fit the
// last. The cut depends on the size of the map alone, never on the number of threads.
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
    static constexpr std::int64_t band_pixels = std::int64_t{1} << 21;

    Grid(std::int64_t map_height, std::int64_t map_width) : height(map_height), width(map_width) {
        // A map narrower than a tile is cut into longer ones of the same number of pixels.
        const std::int64_t narrow = std::min(width, tile_side);
        tile_height = std::min(height, tile_pixels / narrow);
        tile_width = std::min(width, tile_pixels / std::min(tile_height, tile_side));
        tile_rows = (height + tile_height - 1) / tile_height;
        tile_columns = (width + tile_width - 1) / tile_width;
        rows_per_band = std::max<std::int64_t>(1, band_pixels / (tile_height * width));
        bands = (tile_rows + rows_per_band - 1) / rows_per_band;
    }

    Range tile_rows_of_band(std::int64_t band) const {
        return {band * rows_per_band, std::min(tile_rows, (band + 1) * rows_per_band)};
    }
    Range rows_of_tile(std::int64_t tile_row) const {
        return {tile_row * tile_height, std::min(height, (tile_row + 1) * tile_height)};
    }
    Range columns_of_tile(std::int64_t tile_column) const {
        return {tile_column * tile_width, std::min(width, (tile_column + 1) * tile_width)};
    }
    Range rows_of_band(std::int64_t band) const {
        const Range tiles = tile_rows_of_band(band);
        return {rows_of_tile(tiles.begin).begin, rows_of_tile(tiles.end - 1).end};
    }

    std::int64_t height, width;
    std::int64_t tile_height, tile_width, tile_rows, tile_columns, rows_per_band, bands;
};

}  // namespace usf
