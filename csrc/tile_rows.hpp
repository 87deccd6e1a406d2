// How tiles of outputs cover maps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Rows of tiles: some rows of each map, of which the last ones may be fewer.
template <int side>
struct TileRows {
    Maps maps;
    std::int64_t each = (maps.height + side - 1) / side;  // rows per map
    std::int64_t tiles = (maps.width + side - 1) / side;  // per row
    std::int64_t count = maps.rows() == 0 ? 0 : maps.images * each;

    explicit TileRows(const Maps& maps) : maps(maps) {}
    std::int64_t tiles_of_map() const { return each * tiles; }
    std::int64_t holding(std::int64_t some_tiles) const {
        return std::max<std::int64_t>(1, some_tiles / std::max<std::int64_t>(tiles, 1));
    }
    std::int64_t first_row(std::int64_t i) const {
        return i / each * maps.positions() + i % each * side * maps.width;
    }
    // The calling thread's scratch, where a single row has many times as many tiles as should be together.
    void free_if_much(std::int64_t some_tiles) const {
        if (tiles > 16 * some_tiles) scratch_of_thread() = {};
    }
    Stretch stretch(const Call& call, std::int64_t begin, std::int64_t end) const {
        const std::int64_t first = first_row(begin);
        return {call, first, static_cast<int>(first_row(end) - first), scratch_of_thread()};
    }
};

}  // namespace usf
#endif
