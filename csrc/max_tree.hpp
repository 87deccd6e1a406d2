// Builds the component tree of a map.
//
// A map that fits one tile takes one stage: sort, union-find, number the nodes (tile_tree.hpp). A larger one
// is cut (grid.hpp); the trees of its tiles are joined into bands and those into the whole (forest.hpp). A
// pixel is settled at the first stage at which its component touches no cut, and is not looked at again until
// it gets its number. The cut depends on the map's size alone, so the result has the same bits for any number
// of threads.
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
        std::int16_t position, parent;
    };
    struct Region {  // what is settled inside a tile or a band
        std::int32_t settled = 0, components = 0;
    };
    struct Worker {
        TileTree<T> tile;
        ForestMerge<Key> merge;
        std::vector<std::int32_t> node;  // of the positions of a tile
        std::vector<T> level;            // likewise
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
        tile_links_.reserve(n);
        parent_of_.reserve(n, Access::at_random);
        rank_of_.reserve(n, Access::at_random);
        tiles_.assign(grid.tile_rows * grid.tile_columns, {});
        bands_.assign(grid.bands, {});
        settled_.resize(grid.bands);
        open_.resize(grid.bands);
        parallel_for(grid.bands, threads,
                     [&](int w, std::int64_t band) { build_band(grid, band, workers_[w]); });
        if (grid.bands > 1) join_bands(grid, workers_[0].merge, threads);
        number_settled(grid, threads);
    }

    // The trees of the band's tiles, joined.
    void build_band(const Grid& grid, std::int64_t band, Worker& worker) {
        const Range rows = grid.rows_of_band(band), tile_rows = grid.tile_rows_of_band(band);
        ForestMerge<Key>& merge = worker.merge;
        OpenComponent<Key>* open = merge.components(rows.size() * grid.width);
        std::int32_t size = 0;
        for (std::int64_t r = tile_rows.begin; r < tile_rows.end; ++r)
            for (std::int64_t c = 0; c < grid.tile_columns; ++c)
                size += build_tile(grid, r, c, worker, open + size);

        merge.sort(size, parent_of_.data(), rank_of_.data(), 1);
        const auto pair = [&](std::int32_t a, std::int32_t b) { merge.add_seam(a, b); };
        for (std::int64_t r = tile_rows.begin; r < tile_rows.end; ++r) {
            for (std::int64_t c = 0; c + 1 < grid.tile_columns; ++c)
                seams_.across_column(c, grid.rows_of_tile(r), pair);
            if (r + 1 < tile_rows.end) seams_.across_row(r, pair);
        }
        std::vector<std::int32_t*> borders;
        if (tile_rows.begin > 0) borders.push_back(seams_.row(tile_rows.begin - 1, 1));
        if (tile_rows.end < grid.tile_rows) borders.push_back(seams_.row(tile_rows.end - 1, 0));
        for (const std::int32_t* border : borders)
            for (std::int64_t x = 0; x < grid.width; ++x) merge.mark_open(border[x]);
        merge.join();
        if (grid.bands == 1) return number_joined(merge, 1);
        settle(merge, band);
        for (std::int32_t* border : borders)
            for (std::int64_t x = 0; x < grid.width; ++x) border[x] = merge.name(rank_of_[border[x]]);
    }

    // Appends the open components of a tile and keeps the other pixels as links of 16-bit positions.
    std::int32_t build_tile(const Grid& grid, std::int64_t r, std::int64_t c, Worker& worker,
                            OpenComponent<Key>* open) {
        const Range rows = grid.rows_of_tile(r), columns = grid.columns_of_tile(c);
        const int height = static_cast<int>(rows.size()), width = static_cast<int>(columns.size());
        const std::int64_t origin = rows.begin * grid.width + columns.begin;
        TileTree<T>& tile = worker.tile;
        tile.build(image_ + origin, grid.width, height, width, connectivity_);
        tile.mark_open(r > 0, r + 1 < grid.tile_rows, c > 0, c + 1 < grid.tile_columns);
        worker.node.resize(tile.frame());
        std::int32_t* component = worker.node.data();  // of every open position, by pixel
        TileLink* links = links_of_tile(grid, r, c);
        Region region;
        std::int32_t size = 0;
        for (int i = 0; i < tile.size(); ++i) {
            const int p = tile.order()[i], q = tile.parent(p);
            const bool opens = i == 0 || tile.opens_component(p);
            if (opens && tile.is_open(p)) {
                const int y = p / tile.stride(), x = p - y * tile.stride();
                const auto pixel = static_cast<std::int32_t>(origin + (y - 1) * grid.width + x - 1);
                component[p] = pixel;
                parent_of_[pixel] = component[q];
                open[size++] = {tile.key(p), pixel};
            } else {
                component[p] = component[q];
                links[region.settled++] = {static_cast<std::int16_t>(p), static_cast<std::int16_t>(q)};
                region.components += opens;
            }
        }
        tiles_[r * grid.tile_columns + c] = region;
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
        return size;
    }

    // Keeps what the merge has settled as links of the band, and the rest as the band's open components.
    void settle(ForestMerge<Key>& merge, std::int64_t band) {
        Region& region = bands_[band];
        SettledLink* links = settled_[band].reserve(merge.size());
        OpenComponent<Key>* open = open_[band].components.reserve(merge.size());
        std::int32_t size = 0;
        for (std::int32_t i = 0; i < merge.size(); ++i) {
            const std::int32_t p = merge.pixel(i), q = merge.parent(i);
            const bool opens = merge.opens_component(i);
            if (opens && merge.is_open(i)) {
                merge.name(i) = p;
                parent_of_[p] = merge.name(q);
                open[size++] = {merge.key(i), p};
            } else {
                merge.name(i) = merge.name(q);
                links[region.settled++] = {p, opens ? merge.pixel(q) : ~merge.pixel(q)};
                region.components += opens;
            }
        }
        open_[band].size = size;
    }

    void join_bands(const Grid& grid, ForestMerge<Key>& merge, int threads) {
        std::int32_t size = 0;
        for (const OpenComponents& open : open_) size += open.size;
        OpenComponent<Key>* components = merge.components(size);
        for (OpenComponents& open : open_) {
            components = std::copy_n(open.components.data(), open.size, components);
            open.components.free();
        }
        merge.sort(size, parent_of_.data(), rank_of_.data(), threads);
        for (std::int64_t band = 0; band + 1 < grid.bands; ++band)
            seams_.across_row(grid.tile_rows_of_band(band).end - 1,
                              [&](std::int32_t a, std::int32_t b) { merge.add_seam(a, b); });
        merge.join();
        number_joined(merge, threads);
    }

    // Numbers for what was joined last. Those of the bands and tiles follow: parents precede their children.
    void number_joined(ForestMerge<Key>& merge, int threads) {
        parent_of_.free();
        rank_of_.free();
        std::int64_t most = merge.size();
        for (const Region& region : bands_) most += region.components;
        for (const Region& region : tiles_) most += region.components;
        std::int32_t* parent = tree_->parent.reserve(most);
        T* level = tree_->level.reserve(most);
        std::int32_t* node = tree_->node.reserve(tree_->height * tree_->width, Access::at_random);
        std::int32_t next = 0;
        for (std::int32_t i = 0; i < merge.size(); ++i) {
            const std::int32_t q = merge.parent(i);
            if (merge.opens_component(i)) {
                merge.name(i) = next;
                parent[next] = merge.name(q);
                level[next++] = from_ordered_key<T>(merge.key(i));
            } else {
                merge.name(i) = merge.name(q);
            }
        }
        for_each(merge.size(), threads, [&](std::int32_t i) { node[merge.pixel(i)] = merge.name(i); });
        merge.free();
        tree_->size = next;
    }

    void number_settled(const Grid& grid, int threads) {
        const std::int64_t tiles = grid.tile_rows * grid.tile_columns;
        std::vector<std::int32_t> first_of_band(grid.bands), first_of_tile(tiles);
        for (std::int64_t band = 0; band < grid.bands; ++band) {
            first_of_band[band] = tree_->size;
            tree_->size += bands_[band].components;
        }
        for (std::int64_t t = 0; t < tiles; ++t) {
            first_of_tile[t] = tree_->size;
            tree_->size += tiles_[t].components;
        }
        parallel_for(grid.bands, threads, [&](int w, std::int64_t band) {
            number_band(band, first_of_band[band]);
            const Range tile_rows = grid.tile_rows_of_band(band);
            for (std::int64_t r = tile_rows.begin; r < tile_rows.end; ++r)
                for (std::int64_t c = 0; c < grid.tile_columns; ++c)
                    number_tile(grid, r, c, first_of_tile[r * grid.tile_columns + c], workers_[w]);
        });
    }

    void number_band(std::int64_t band, std::int32_t next) {
        const SettledLink* links = settled_[band].data();
        std::int32_t* node = tree_->node.data();
        for (std::int32_t i = 0; i < bands_[band].settled; ++i) {
            const auto [p, q] = links[i];
            if (q >= 0) {
                node[p] = next;
                tree_->parent[next] = node[q];
                tree_->level[next++] = image_[p];
            } else {
                node[p] = node[~q];
            }
        }
        settled_[band].free();
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
        const TileLink* links = links_of_tile(grid, r, c);
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

    TileLink* links_of_tile(const Grid& grid, std::int64_t r, std::int64_t c) {
        const Range rows = grid.rows_of_tile(r);
        return &tile_links_[rows.begin * grid.width + rows.size() * grid.columns_of_tile(c).begin];
    }

    struct SettledLink {
        std::int32_t pixel,
            parent;  // the complement of the parent where the pixel is in its parent's component
    };

    struct OpenComponents {
        std::int32_t size = 0;
        Buffer<OpenComponent<Key>> components;
    };

    const T* image_ = nullptr;
    Connectivity connectivity_ = Connectivity::four;
    ComponentTree<T>* tree_ = nullptr;
    std::vector<Worker> workers_;
    Seams seams_;
    Buffer<TileLink> tile_links_;
    std::vector<Region> tiles_, bands_;
    std::vector<Buffer<SettledLink>> settled_;
    std::vector<OpenComponents> open_;          // of the bands
    Buffer<std::int32_t> parent_of_, rank_of_;  // of open components, by pixel
};

}  // namespace usf
