// Joining the trees of the tiles.
//
// In a tile's own tree, a component that does not touch a cut is final: nothing outside the tile can change
// it or its parent. Only the others ("open") have to be ordered again together with those of the neighbours.
// `ForestMerge` does that: it sorts the open components of all tiles and runs union-find over the links of
// the old trees and the pairs across the cuts. It works in the sorted order, where a component and its
// children are close to each other, so that memory is read almost in sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "component_tree.hpp"
#include "parallel.hpp"
#include "radix_sort.hpp"

namespace usf {

// Use: fill `keys` and `steps`, sort, begin_join, add_seam, join, number; each step frees the memory that the
// later ones do not need.
template <class T>
class ForestMerge {
public:
    using Key = OrderedKey<T>;

    // Reserves room for the open components of the tiles: those of one tile are neighbours, from its lowest
    // level up. A component is identified by its place there.
    void reserve(std::size_t most) {
        keys_.reserve(most);
        steps_.reserve(most);
    }
    Key* keys() { return keys_.data(); }
    // Number of places from a component back to its parent in the tree of its tile; 0 at the root.
    std::uint16_t* steps() { return steps_.data(); }

    // Sorts the components. Each run holds those of one tile; all keys lie in `range`.
    void sort(const std::vector<Run>& runs, KeyRange<Key> range, int threads) {
        std::size_t end = 0, count = 0;
        for (const Run& run : runs) {
            end = std::max(end, run.begin + run.size);
            count += run.size;
        }
        size_ = static_cast<std::int32_t>(count);
        sorted_.reserve(count);
        rank_of_.reserve(end);
        sort_runs(keys_.data(), runs, range, sorted_.data(), threads,
                  [&](std::size_t i, const Placed<Key>& component) {
                      rank_of_[component.place] = static_cast<std::int32_t>(i);
                  });
        keys_.free();
        up_.reserve(end);
        for_each(size_, threads, [&](std::int32_t i) {
            const std::int32_t place = sorted_[i].place;
            up_[i] = rank_of_[place - steps_[place]];
        });
        steps_.free();
    }
    // Rank of a component in the sorted order; valid until `begin_join`.
    std::int32_t rank(std::int32_t place) const { return rank_of_[place]; }

    // Reserves room for about `seams` seams, and in the tree for `others` nodes beside those of the forest.
    void begin_join(std::int64_t others, std::int64_t seams, int threads, ComponentTree<T>& tree) {
        rank_of_.free();
        cell_ = tree.parent.reserve(size_ + others);
        tree.level.reserve(size_ + others);
        link_.reserve(size_);
        for_each(size_, threads, [&](std::int32_t i) {
            cell_[i] = none;
            link_[i] = ~i;
        });
        seam_target_.clear();
        seam_next_.clear();
        seam_target_.reserve(seams);
        seam_next_.reserve(seams);
    }
    // Adds a seam: the components of these two ranks, in neighbouring tiles, touch.
    void add_seam(std::int32_t a, std::int32_t b) {
        const auto [low, high] = std::minmax({a, b});
        seam_target_.push_back(high);
        seam_next_.push_back(cell_[low]);
        cell_[low] = size_ + static_cast<std::int32_t>(seam_target_.size()) - 1;
    }

    // Union-find from the highest component down. A cell changes its meaning when its component is reached:
    // before, it is the head of the list of what joins there (components of the old tree that were reached
    // earlier, chained through `up_`, which they no longer need, and seams); afterwards it is the parent in
    // the joined tree.
    void join() {
        for (std::int32_t p = size_ - 1; p >= 0; --p) {
            std::int32_t set = p;
            if (p >= ahead) {  // the list there may still change: a useless prefetch costs little
                if (const std::int32_t c = cell_[p - ahead]; c < size_) prefetch(&link_[c]);
                prefetch(&cell_[up_[p - ahead]]);
            }
            for (std::int32_t c = cell_[p]; c != none;) {
                const bool inside = c < size_;
                const std::int32_t other = find(inside ? c : seam_target_[c - size_]);
                c = inside ? up_[c] : seam_next_[c - size_];
                if (other == set) continue;
                cell_[~link_[other]] = p;
                link_[set] = other;
                set = other;
            }
            link_[set] = ~p;
            cell_[p] = p;
            if (const std::int32_t q = up_[p]; q != p) up_[p] = std::exchange(cell_[q], p);
        }
    }

    std::int32_t size() const { return size_; }
    // Makes the joined components the first nodes of the tree. Their parents lie in the tree's memory, and a
    // node's number is at most its rank. A component on the level of its parent is part of that, not a node.
    void number(int threads, ComponentTree<T>& tree) {
        std::int32_t *parent = cell_, *name = link_.data(), next = 0;
        T* level = tree.level.data();
        for (std::int32_t i = 0; i < size_; ++i) {
            const T own = from_ordered_key<T>(sorted_[i].key);
            const std::int32_t above = i == 0 ? 0 : name[parent[i]];
            if (i > 0 && level[above] == own) {
                name[i] = above;
            } else {
                parent[next] = above;
                level[next] = own;
                name[i] = next++;
            }
        }
        for_each(size_, threads, [&](std::int32_t i) { up_[sorted_[i].place] = name[i]; });
        tree.size = next;
    }
    // Nodes of the components by place, after `number`.
    const std::int32_t* nodes() const { return up_.data(); }

    void free() {
        sorted_.free();
        up_.free();
        link_.free();
    }

private:
    static constexpr std::int32_t none = 0x7fffffff, ahead = 12;

    std::int32_t find(std::int32_t p) {
        while (link_[p] >= 0) {
            const std::int32_t next = link_[p];
            if (link_[next] >= 0) link_[p] = link_[next];
            p = next;
        }
        return p;
    }

    std::int32_t size_ = 0;
    Buffer<Key> keys_;
    Buffer<std::uint16_t> steps_;
    Buffer<Placed<Key>> sorted_;
    Buffer<std::int32_t> rank_of_;  // by place
    Buffer<std::int32_t> up_;       // parent by rank; after `number`, node by place
    std::int32_t* cell_ = nullptr;  // lies in the parents of the tree
    Buffer<std::int32_t> link_;
    std::vector<std::int32_t> seam_target_, seam_next_;
};

}  // namespace usf
