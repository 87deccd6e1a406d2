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

// Number of pixels of every component, [size]; `node` has one entry per pixel.
inline void node_areas(const std::int32_t* parent, std::int64_t size, const std::int32_t* node,
                       std::int64_t pixels, std::int32_t* area) {
    std::fill(area, area + size, 0);
    for (std::int64_t p = 0; p < pixels; ++p) ++area[node[p]];
    for (std::int64_t i = size - 1; i > 0; --i) area[parent[i]] += area[i];
}

template <class T>
void node_areas(const ComponentTree<T>& tree, std::int32_t* area) {
    node_areas(tree.parent.data(), tree.size, tree.node.data(), tree.height * tree.width, area);
}

}  // namespace usf
