// The tree of connected components of the upper level sets of a 2D map.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.hpp"

namespace usf {

// Nodes are in topological order, the root first: parent[0] == 0 and parent[i] < i. So a loop from the
// last node to the first visits children before parents.
template <class T>
struct ComponentTree {
    std::int64_t height = 0, width = 0;
    std::int32_t size = 0;        // number of nodes
    Buffer<std::int32_t> parent;  // [size]
    Buffer<T> level;              // [size] grey level; above the root level[parent[i]] < level[i]
    Buffer<std::int32_t> node;    // [height * width] the smallest component that holds each pixel
};

// Number of pixels of every component, [size].
template <class T>
void node_areas(const ComponentTree<T>& tree, std::int32_t* area) {
    std::fill(area, area + tree.size, 0);
    for (std::int64_t p = 0; p < tree.height * tree.width; ++p) ++area[tree.node[p]];
    for (std::int32_t i = tree.size - 1; i > 0; --i) area[tree.parent[i]] += area[i];
}

}  // namespace usf
