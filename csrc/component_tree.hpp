// Max-tree (tree of connected components of the upper level sets) of a 2D map.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

namespace usf {

enum class Connectivity : int { four = 4, eight = 8 };

// Uninitialised storage that only grows: a tree that is rebuilt for every map of a batch allocates once.
template <class T>
class Buffer {
public:
    T* reserve(std::size_t n) {
        if (n > capacity_) {
            data_.reset();  // free first: the old contents are not wanted
            data_.reset(new T[n]);
            capacity_ = n;
        }
        return data_.get();
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }
    T* release() {
        capacity_ = 0;
        return data_.release();
    }

private:
    std::unique_ptr<T[]> data_;
    std::size_t capacity_ = 0;
};

// Nodes are in topological order, the root first: parent[0] == 0 and parent[i] < i. So a loop from the
// last node to the first visits children before parents.
template <class T>
struct ComponentTree {
    std::int64_t height = 0, width = 0;
    std::int32_t size = 0;            // number of nodes
    Buffer<std::int32_t> parent;      // [size]
    Buffer<T> level;                  // [size] grey level of the node, level[parent[i]] < level[i]
    Buffer<std::int32_t> node;        // [height * width] the smallest component that holds each pixel
};

// Number of pixels of every component, [size].
template <class T>
void node_areas(const ComponentTree<T>& tree, std::int32_t* area) {
    std::fill(area, area + tree.size, 0);
    for (std::int64_t p = 0; p < tree.height * tree.width; ++p) ++area[tree.node[p]];
    for (std::int32_t i = tree.size - 1; i > 0; --i) area[tree.parent[i]] += area[i];
}

template <class T>
class MaxTreeBuilder {
public:
    // `image` is (height, width), C-contiguous, finite. Fills `tree`, whose buffers are reused.
    void build(const T* image, std::int64_t height, std::int64_t width, Connectivity connectivity, int threads,
               ComponentTree<T>& tree) {
        (void)threads;
        const std::int64_t n = height * width;
        tree.height = height, tree.width = width;
        std::int32_t* order = order_.reserve(n);
        std::int32_t* parent = parent_.reserve(n);
        std::int32_t* root = root_.reserve(n);
        std::iota(order, order + n, 0);
        std::stable_sort(order, order + n, [&](std::int32_t a, std::int32_t b) { return image[a] > image[b]; });
        std::fill(root, root + n, -1);
        const int directions = connectivity == Connectivity::four ? 4 : 8;
        static constexpr int dy[] = {-1, 1, 0, 0, -1, -1, 1, 1}, dx[] = {0, 0, -1, 1, -1, 1, -1, 1};
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int32_t p = order[i];
            const std::int64_t y = p / width, x = p % width;
            root[p] = parent[p] = p;
            for (int d = 0; d < directions; ++d) {
                const std::int64_t qy = y + dy[d], qx = x + dx[d];
                if (qy < 0 || qy >= height || qx < 0 || qx >= width) continue;
                std::int32_t q = static_cast<std::int32_t>(qy * width + qx);
                if (root[q] < 0) continue;
                while (root[q] != q) q = root[q] = root[root[q]];
                if (q != p) root[q] = parent[q] = p;
            }
        }
        tree.parent.reserve(n), tree.level.reserve(n), tree.node.reserve(n);
        tree.size = 0;
        for (std::int64_t i = n - 1; i >= 0; --i) {
            const std::int32_t p = order[i], q = parent[p];
            if (i < n - 1 && image[p] == image[q]) {
                tree.node[p] = tree.node[q];
                continue;
            }
            tree.parent[tree.size] = i == n - 1 ? 0 : tree.node[q];
            tree.level[tree.size] = image[p];
            tree.node[p] = tree.size++;
        }
    }

private:
    Buffer<std::int32_t> order_, parent_, root_;
};

}  // namespace usf
