// Builds the component tree of a map.
//
// A map that fits one tile takes one stage: sort, union-find, number the nodes (tile_tree.hpp). A larger one
// is cut (grid.hpp) and the trees of its tiles are joined (forest.hpp). A pixel whose component touches no
// cut is settled in its tile, and is not touched again until it gets its number. The cut depends on the
// map's size alone, so the result has the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
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
        std::int16_t position;
        std::int16_t parent;  // position of its parent; the complement if it opens a component
    };
    static_assert(sizeof(TileLink) == sizeof(std::int32_t));
    struct Tile {
        std::int32_t place = 0;       // first place of its open components, which touch a cut, in the forest
        std::int32_t open = 0;        // number of open components
        std::int32_t components = 0;  // number of settled components
        KeyRange<Key> range;
    };
    struct Worker {
        TileTree<T> tile;
        std::vector<std::int32_t> node;  // by position in a tile
        std::vector<T> level;
        std::vector<TileLink> links;  // links of a row of tiles
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
        const auto workers = static_cast<std::size_t>(workers_for(grid.tile_rows, threads));
        if (workers_.size() < workers) workers_.resize(workers);
        seams_.reset(grid, connectivity_);
        tree_->node.reserve(n);
        merge_.reserve(n);
        tiles_.assign(grid.tile_rows * grid.tile_columns, {});
        parallel_for(grid.tile_rows, threads, [&](int w, std::int64_t r) {
            std::int64_t place = grid.first_place(r, 0);
            for (std::int64_t c = 0; c < grid.tile_columns; ++c)
                place += build_tile(grid, r, c, static_cast<std::int32_t>(place), workers_[w]);
        });
        join_tiles(grid, threads);
        number_tiles(grid, threads);
        merge_.free();
    }

    // Until the pixels get their numbers, the memory for these holds the links of the tiles: a tile's settled
    // pixels from the front, lowest level first, and its open components from the back.
    TileLink* links(const Grid& grid, std::int64_t r, std::int64_t c) {
        return reinterpret_cast<TileLink*>(tree_->node.data() + grid.first_place(r, c));
    }

    // Writes the open components of a tile to the places from `place` on, and the links; returns the number
    // of open components.
    std::int32_t build_tile(const Grid& grid, std::int64_t r, std::int64_t c, std::int32_t place,
                            Worker& worker) {
        const Range rows = grid.rows_of_tile(r), columns = grid.columns_of_tile(c);
        const int height = static_cast<int>(rows.size()), width = static_cast<int>(columns.size());
        TileTree<T>& tile = worker.tile;
        tile.build(image_ + rows.begin * grid.width + columns.begin, grid.width, height, width,
                   connectivity_);
        tile.mark_open(r > 0, r + 1 < grid.tile_rows, c > 0, c + 1 < grid.tile_columns);
        worker.node.resize(tile.frame());
        std::int32_t* component = worker.node.data();
        Key* keys = merge_.keys();
        std::uint16_t* steps = merge_.steps();
        TileLink *settled = links(grid, r, c), *open = settled + tile.size();
        Tile& out = tiles_[r * grid.tile_columns + c];
        out.range = tile.range();
        out.place = place;
        for (int i = 0; i < tile.size(); ++i) {
            const int p = tile.order()[i], q = tile.parent(p);
            const bool opens = i == 0 || tile.opens_component(p);
            if (opens && tile.is_open(p)) {
                component[p] = place;
                keys[place] = tile.key(p);
                steps[place] = static_cast<std::uint16_t>(i == 0 ? 0 : place - component[q]);
                ++place;
                *--open = {static_cast<std::int16_t>(p), 0};
            } else {
                component[p] = component[q];
                *settled++ = {static_cast<std::int16_t>(p), static_cast<std::int16_t>(opens ? ~q : q)};
                out.components += opens;
            }
        }
        out.open = place - out.place;
        const auto row = [&](int y, std::int32_t* seam) {
            std::copy_n(component + tile.position(y, 0), width, seam);
        };
        const auto column = [&](int x, std::int32_t* seam) {
            for (int y = 0; y < height; ++y) seam[y] = component[tile.position(y, x)];
        };
        if (r > 0) row(0, seams_.row(r - 1, 1) + columns.begin);
        if (r + 1 < grid.tile_rows) row(height - 1, seams_.row(r, 0) + columns.begin);
        if (c > 0) column(0, seams_.column(c - 1, 1) + rows.begin);
        if (c + 1 < grid.tile_columns) column(width - 1, seams_.column(c, 0) + rows.begin);
        return out.open;
    }

    void join_tiles(const Grid& grid, int threads) {
        std::vector<Run> runs;
        std::int64_t settled = 0;
        KeyRange<Key> range;
        for (const Tile& tile : tiles_) {
            runs.push_back({static_cast<std::size_t>(tile.place), static_cast<std::size_t>(tile.open)});
            settled += tile.components;
            range.include(tile.range.low);
            range.include(tile.range.high);
        }
        merge_.sort(runs, range, threads);
        seams_.rename(threads, [&](std::int32_t place) { return merge_.rank(place); });
        merge_.begin_join(settled, seams_.pairs(), threads, *tree_);
        const auto pair = [&](std::int32_t a, std::int32_t b) { merge_.add_seam(a, b); };
        for (std::int64_t r = 0; r < grid.tile_rows; ++r) {
            for (std::int64_t c = 0; c + 1 < grid.tile_columns; ++c)
                seams_.across_column(c, grid.rows_of_tile(r), pair);
            if (r + 1 < grid.tile_rows) seams_.across_row(r, pair);
        }
        merge_.join();
        merge_.number(threads, *tree_);
    }

    // Numbers the settled components after the joined ones, so that parents precede their children.
    void number_tiles(const Grid& grid, int threads) {
        std::vector<std::int32_t> first(tiles_.size());
        for (std::size_t t = 0; t < tiles_.size(); ++t) {
            first[t] = tree_->size;
            tree_->size += tiles_[t].components;
        }
        parallel_for(grid.tile_rows, threads, [&](int w, std::int64_t r) {
            const std::int64_t begin = grid.first_place(r, 0);
            std::vector<TileLink>& links_of_row = workers_[w].links;
            links_of_row.resize(grid.rows_of_tile(r).size() * grid.width);
            std::copy_n(links(grid, r, 0), links_of_row.size(), links_of_row.data());
            for (std::int64_t c = 0; c < grid.tile_columns; ++c)
                number_tile(grid, r, c, links_of_row.data() + (grid.first_place(r, c) - begin),
                            first[r * grid.tile_columns + c], workers_[w]);
        });
    }

    void number_tile(const Grid& grid, std::int64_t r, std::int64_t c, const TileLink* links,
                     std::int32_t next, Worker& worker) {
        const Range rows = grid.rows_of_tile(r), columns = grid.columns_of_tile(c);
        const std::int64_t origin = rows.begin * grid.width + columns.begin;
        const int height = static_cast<int>(rows.size()), width = static_cast<int>(columns.size());
        const int stride = width + 2, size = height * width;
        const Tile& tile = tiles_[r * grid.tile_columns + c];
        worker.node.resize((height + 2) * stride);
        worker.level.resize((height + 2) * stride);
        std::int32_t *node = worker.node.data(), *parents = tree_->parent.data();
        T *level = worker.level.data(), *levels = tree_->level.data();
        if (tile.components > 0)
            for (int y = 0; y < height; ++y)
                std::copy_n(image_ + origin + y * grid.width, width, level + (y + 1) * stride + 1);
        const std::int32_t* open = merge_.nodes() + tile.place;
        for (std::int32_t i = 0; i < tile.open; ++i) node[links[size - 1 - i].position] = open[i];
        for (std::int32_t i = 0; i < size - tile.open; ++i) {
            const auto [p, q] = links[i];
            if (q < 0) {
                parents[next] = node[~q];
                levels[next] = level[p];
                node[p] = next++;
            } else {
                node[p] = node[q];
            }
        }
        for (int y = 0; y < height; ++y)
            std::copy_n(node + (y + 1) * stride + 1, width, tree_->node.data() + origin + y * grid.width);
    }

    const T* image_ = nullptr;
    Connectivity connectivity_ = Connectivity::four;
    ComponentTree<T>* tree_ = nullptr;
    std::vector<Worker> workers_;
    ForestMerge<T> merge_;
    Seams seams_;
    std::vector<Tile> tiles_;
};

}  // namespace usf
