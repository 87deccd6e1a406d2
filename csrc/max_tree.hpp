// Builds the component tree of a map.
//
// A map that fits one tile takes one stage: sort, union-find, number the nodes (tile_tree.hpp). A larger one
// is cut (grid.hpp) and the trees of its tiles are joined (forest.hpp). A pixel whose component touches no
// cut is settled in its tile, and is not looked at again until it gets its number. The cut depends on the
// map's size alone, so the result has the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "component_tree.hpp"
#include "forest.hpp"
#include "grid.hpp"
#include "parallel.hpp"
#include "seams.hpp"
#include "tile_tree.hpp"

namespace usf {

template <class T>
class MaxTreeBuilder {
public:
    static constexpr std::int64_t largest_map = std::int64_t{1} << 30;  // pixels: indices have 32 bits

    // `image` is (height, width), C-contiguous, finite, not empty. Fills `tree`, whose buffers are reused.
    void build(const T* image, std::int64_t height, std::int64_t width, Connectivity connectivity,
               int threads, ComponentTree<T>& tree) {
        image_ = image, connectivity_ = connectivity, tree_ = &tree;
        tree.height = height, tree.width = width;
        if (workers_.empty()) workers_.resize(1);
        if (TileTree<T>::fits(height, width))
            build_small();
        else
            build_large(Grid(height, width), threads);
    }

private:
    using Key = OrderedKey<T>;

    struct TileLink {
        std::int16_t position, parent;
    };
    struct Tile {
        std::int32_t open = 0;        // components that touch a cut
        std::int32_t settled = 0;     // other pixels
        std::int32_t components = 0;  // that those open
        KeyRange<Key> range;
    };
    struct Worker {
        TileTree<T> tile;
        std::vector<std::int32_t> node;    // of the positions of a tile
        std::vector<std::int32_t> offset;  // of their pixels from the tile's first one
        std::vector<T> level;
    };

    void build_small() {
        const int height = static_cast<int>(tree_->height), width = static_cast<int>(tree_->width);
        TileTree<T>& tile = workers_[0].tile;
        tile.build(image_, width, height, width, connectivity_);
        workers_[0].node.resize(tile.frame());
        std::int32_t* node = workers_[0].node.data();
        std::int32_t* parent = tree_->parent.reserve(tile.size());
        T* level = tree_->level.reserve(tile.size());
        const int root = tile.order()[0];
        parent[0] = node[root] = 0;
        level[0] = from_ordered_key<T>(tile.key(root));
        std::int32_t size = 1;
        for (int i = 1; i < tile.size(); ++i) {
            const int p = tile.order()[i], q = tile.parent(p);
            if (tile.opens_component(p)) {
                parent[size] = node[q];
                level[size] = from_ordered_key<T>(tile.key(p));
                node[p] = size++;
            } else {
                node[p] = node[q];
            }
        }
        tree_->size = size;
        std::int32_t* out = tree_->node.reserve(tile.size());
        for (int y = 0; y < height; ++y) std::copy_n(node + tile.position(y, 0), width, out + y * width);
    }

    void build_large(const Grid& grid, int threads) {
        const std::int64_t n = grid.height * grid.width;
        threads = std::max(threads, 1);
        if (workers_.size() < static_cast<std::size_t>(threads)) workers_.resize(threads);
        seams_.reset(grid, connectivity_);
        links_.reserve(n);
        parent_of_.reserve(n, Access::at_random);
        tiles_.assign(grid.tile_rows * grid.tile_columns, {});
        OpenComponent<Key>* open = merge_.components(n);
        parallel_for(grid.tile_rows, threads, [&](int w, std::int64_t r) {
            for (std::int64_t c = 0; c < grid.tile_columns; ++c)
                build_tile(grid, r, c, workers_[w], open + grid.first_place(r, c));
        });
        join_tiles(grid, threads);
        number_joined(threads);
        number_settled(grid, threads);
    }

    // Writes the open components of a tile, and the other pixels as links of 16-bit positions.
    void build_tile(const Grid& grid, std::int64_t r, std::int64_t c, Worker& worker,
                    OpenComponent<Key>* open) {
        const Range rows = grid.rows_of_tile(r), columns = grid.columns_of_tile(c);
        const int height = static_cast<int>(rows.size()), width = static_cast<int>(columns.size());
        const auto origin = static_cast<std::int32_t>(rows.begin * grid.width + columns.begin);
        TileTree<T>& tile = worker.tile;
        tile.build(image_ + origin, grid.width, height, width, connectivity_);
        tile.mark_open(r > 0, r + 1 < grid.tile_rows, c > 0, c + 1 < grid.tile_columns);
        worker.node.resize(tile.frame());
        worker.offset.resize(tile.frame());
        std::int32_t *component = worker.node.data(), *offset = worker.offset.data();
        for (int y = 0; y < height; ++y)
            for (int x = 0; x < width; ++x)
                offset[tile.position(y, x)] = static_cast<std::int32_t>(y * grid.width + x);
        TileLink* links = &links_[grid.first_place(r, c)];
        Tile count;
        count.range = tile.range();
        for (int i = 0; i < tile.size(); ++i) {
            const int p = tile.order()[i], q = tile.parent(p);
            const bool opens = i == 0 || tile.opens_component(p);
            if (opens && tile.is_open(p)) {
                const std::int32_t pixel = origin + offset[p];
                component[p] = pixel;  // what is open is known by a pixel of its own
                parent_of_[pixel] = component[q];
                open[count.open++] = {tile.key(p), pixel};
            } else {
                component[p] = component[q];
                links[count.settled++] = {static_cast<std::int16_t>(p), static_cast<std::int16_t>(q)};
                count.components += opens;
            }
        }
        tiles_[r * grid.tile_columns + c] = count;
        const auto row = [&](int y, std::int32_t* out) {
            std::copy_n(component + tile.position(y, 0), width, out);
        };
        const auto column = [&](int x, std::int32_t* out) {
            for (int y = 0; y < height; ++y) out[y] = component[tile.position(y, x)];
        };
        if (r > 0) row(0, seams_.row(r - 1, 1) + columns.begin);
        if (r + 1 < grid.tile_rows) row(height - 1, seams_.row(r, 0) + columns.begin);
        if (c > 0) column(0, seams_.column(c - 1, 1) + rows.begin);
        if (c + 1 < grid.tile_columns) column(width - 1, seams_.column(c, 0) + rows.begin);
    }

    void join_tiles(const Grid& grid, int threads) {
        std::vector<std::size_t> begin, size;
        std::int64_t settled = 0;
        KeyRange<Key> range;
        for (std::int64_t r = 0; r < grid.tile_rows; ++r)
            for (std::int64_t c = 0; c < grid.tile_columns; ++c) {
                const Tile& tile = tiles_[r * grid.tile_columns + c];
                begin.push_back(grid.first_place(r, c));
                size.push_back(tile.open);
                settled += tile.components;
                range.include(tile.range.low);
                range.include(tile.range.high);
            }
        rank_of_.reserve(grid.height * grid.width, Access::at_random);
        merge_.sort(begin, size, range, parent_of_, rank_of_.data(), settled, threads);
        const auto pair = [&](std::int32_t a, std::int32_t b) { merge_.add_seam(a, b); };
        for (std::int64_t r = 0; r < grid.tile_rows; ++r) {
            for (std::int64_t c = 0; c + 1 < grid.tile_columns; ++c)
                seams_.across_column(c, grid.rows_of_tile(r), pair);
            if (r + 1 < grid.tile_rows) seams_.across_row(r, pair);
        }
        rank_of_.free();
        merge_.join();
    }

    // Numbers for what has been joined. Those of the tiles follow: parents precede their children.
    void number_joined(int threads) {
        std::int64_t most = merge_.size();
        for (const Tile& tile : tiles_) most += tile.components;
        T* level = tree_->level.reserve(most, Access::at_random);
        std::int32_t* node = tree_->node.reserve(tree_->height * tree_->width, Access::at_random);
        std::int32_t* parent = merge_.parents().data();  // in place: next <= i
        std::int32_t next = 0;
        for (std::int32_t i = 0; i < merge_.size(); ++i) {
            const std::int32_t q = merge_.parent(i);
            if (merge_.opens_component(i)) {
                merge_.name(i) = next;
                parent[next] = merge_.name(q);
                level[next++] = from_ordered_key<T>(merge_.key(i));
            } else {
                merge_.name(i) = merge_.name(q);
            }
        }
        for_each(merge_.size(), threads, [&](std::int32_t i) { node[merge_.pixel(i)] = merge_.name(i); });
        std::swap(tree_->parent, merge_.parents());
        merge_.free();
        tree_->size = next;
    }

    void number_settled(const Grid& grid, int threads) {
        std::vector<std::int32_t> first(tiles_.size());
        for (std::size_t t = 0; t < tiles_.size(); ++t) {
            first[t] = tree_->size;
            tree_->size += tiles_[t].components;
        }
        parallel_for(grid.tile_rows, threads, [&](int w, std::int64_t r) {
            for (std::int64_t c = 0; c < grid.tile_columns; ++c)
                number_tile(grid, r, c, first[r * grid.tile_columns + c], workers_[w]);
        });
    }

    void number_tile(const Grid& grid, std::int64_t r, std::int64_t c, std::int32_t next, Worker& worker) {
        const Range rows = grid.rows_of_tile(r), columns = grid.columns_of_tile(c);
        const std::int64_t origin = rows.begin * grid.width + columns.begin, width = columns.size();
        const std::int64_t stride = width + 2;
        worker.node.resize((rows.size() + 2) * stride);
        worker.level.resize((rows.size() + 2) * stride);
        std::int32_t* node = worker.node.data();
        T* level = worker.level.data();
        for (std::int64_t y = 0; y < rows.size(); ++y) {
            std::copy_n(tree_->node.data() + origin + y * grid.width, width, node + (y + 1) * stride + 1);
            std::copy_n(image_ + origin + y * grid.width, width, level + (y + 1) * stride + 1);
        }
        const TileLink* links = &links_[grid.first_place(r, c)];
        const std::int32_t settled = tiles_[r * grid.tile_columns + c].settled;
        for (std::int32_t i = 0; i < settled; ++i) {
            const auto [p, q] = links[i];
            if (level[p] != level[q]) {
                tree_->parent[next] = node[q];
                tree_->level[next] = level[p];
                node[p] = next++;
            } else {
                node[p] = node[q];
            }
        }
        for (std::int64_t y = 0; y < rows.size(); ++y)
            std::copy_n(node + (y + 1) * stride + 1, width, tree_->node.data() + origin + y * grid.width);
    }

    const T* image_ = nullptr;
    Connectivity connectivity_ = Connectivity::four;
    ComponentTree<T>* tree_ = nullptr;
    std::vector<Worker> workers_;
    ForestMerge<Key> merge_;
    Seams seams_;
    std::vector<Tile> tiles_;
    Buffer<TileLink> links_;                    // of the settled pixels of every tile
    Buffer<std::int32_t> parent_of_, rank_of_;  // of open components, by pixel
};

}  // namespace usf
