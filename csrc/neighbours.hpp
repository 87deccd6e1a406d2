// Which neighbours of a pixel a union-find has to look at.
//
// The eight neighbours form a ring. Two of them that were processed before the pixel and touch each other are
// already in one component, so one find per run of such neighbours is enough: on white noise 1.3 instead of 2
// per pixel.
#pragma once

#include <array>
#include <cstdint>

#include "grid.hpp"

namespace usf {

// Offsets around the ring, clockwise from the pixel above.
inline constexpr int ring_dy[8] = {-1, -1, 0, 1, 1, 1, 0, -1};
inline constexpr int ring_dx[8] = {0, 1, 1, 1, 0, -1, -1, -1};

struct RingEntry {
    std::uint8_t count = 0;
    std::uint8_t direction[4] = {};  // one per run of touching neighbours
};
using RingTable = std::array<RingEntry, 256>;

constexpr RingTable make_ring_table(Connectivity connectivity) {
    const int reach = connectivity == Connectivity::four ? 1 : 2;  // squared distance of two adjacent pixels
    RingTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        int run[8] = {0, 1, 2, 3, 4, 5, 6, 7};  // smallest direction in the run of each neighbour
        for (int sweep = 0; sweep < 8; ++sweep)
            for (int a = 0; a < 8; ++a)
                for (int b = 0; b < 8; ++b) {
                    const int dy = ring_dy[a] - ring_dy[b], dx = ring_dx[a] - ring_dx[b];
                    const bool touch = (mask >> a & 1) && (mask >> b & 1) && dy * dy + dx * dx <= reach;
                    if (touch && run[b] < run[a]) run[a] = run[b];
                }
        for (int a = 0; a < 8; ++a) {
            const bool adjacent = ring_dy[a] * ring_dy[a] + ring_dx[a] * ring_dx[a] <= reach;
            bool first = (mask >> a & 1) && adjacent;
            for (int b = 0; b < a; ++b)
                if (run[b] == run[a] && (mask >> b & 1) &&
                    ring_dy[b] * ring_dy[b] + ring_dx[b] * ring_dx[b] <= reach)
                    first = false;
            if (first) table[mask].direction[table[mask].count++] = static_cast<std::uint8_t>(a);
        }
    }
    return table;
}

inline constexpr RingTable ring_table_four = make_ring_table(Connectivity::four);
inline constexpr RingTable ring_table_eight = make_ring_table(Connectivity::eight);

inline const RingTable& ring_table(Connectivity connectivity) {
    return connectivity == Connectivity::four ? ring_table_four : ring_table_eight;
}

}  // namespace usf
