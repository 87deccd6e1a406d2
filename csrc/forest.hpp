// Joining the trees of neighbouring regions.
//
// Inside a region's own tree, a component that does not touch the region's border is settled: whatever lies
// outside cannot change it, nor what it hangs from. Only the others ("open" nodes) have to be ordered again
// together with those of the neighbours. `ForestMerge` does that: it sorts the open nodes of all regions and
// runs union-find over the links of the old trees and the pixel pairs across the seams. It works in the sorted
// order, where a node and what hangs from it are close to each other, so that memory is read almost in sequence.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "ordered_key.hpp"
#include "parallel.hpp"

namespace usf {

// Open nodes, one pixel for each. The nodes of one region are adjacent and run from its lowest level up;
// `parent` is the index of the node that each one hangs from (its own at the root).
template <class Key>
struct Forest {
    Buffer<std::int32_t> pixel, parent;
    Buffer<Key> key;

    void reserve(std::size_t n) {
        pixel.reserve(n);
        parent.reserve(n);
        key.reserve(n);
    }
    void free() {
        pixel.free();
        parent.free();
        key.free();
    }
};

// Use: sort, then rank / add_seam / mark_open, then join, then read the nodes from the lowest level up.
// Every buffer is freed as soon as its contents are used up: at most 24 bytes per node live at any time.
template <class Key>
class ForestMerge {
public:
    // Takes the nodes in `ranges` (pairs of first index and count) out of `forest`, which is left empty.
    void sort(Forest<Key>& forest, const std::vector<std::pair<std::int32_t, std::int32_t>>& ranges) {
        size_ = 0;
        for (const auto& [first, count] : ranges) size_ += count;
        const std::int32_t end = ranges.back().first + ranges.back().second;
        Item* items = items_[0].reserve(size_);
        KeyRange<Key> range;
        std::int32_t n = 0;
        for (const auto& [first, count] : ranges)
            for (std::int32_t i = first; i < first + count; ++i) {
                items[n++] = {forest.key[i], i};
                range.include(forest.key[i]);
            }
        forest.key.free();
        items = radix_sort(items, items_[1].reserve(size_), size_, range, [](const Item& item) { return item.key; },
                           histogram_);
        items_[items == items_[0].data() ? 1 : 0].free();

        rank_.reserve(end);
        pixel_.reserve(size_);
        for (std::int32_t i = 0; i < size_; ++i) {
            if (i + ahead < size_) prefetch(&forest.pixel[items[i + ahead].index]), prefetch(&rank_[items[i + ahead].index]);
            rank_[items[i].index] = i;
            pixel_[i] = forest.pixel[items[i].index];
        }
        forest.pixel.free();
        key_.reserve(size_);
        for (std::int32_t i = 0; i < size_; ++i) key_[i] = items[i].key;
        items_[0].free();
        items_[1].free();

        first_child_.reserve(size_);
        next_sibling_.reserve(size_);
        std::fill_n(first_child_.data(), size_, none);
        for (const auto& [first, count] : ranges)
            for (std::int32_t i = first; i < first + count; ++i)
                if (const std::int32_t q = forest.parent[i]; q != i) {
                    const std::int32_t child = rank_[i], p = rank_[q];
                    next_sibling_[child] = first_child_[p];
                    first_child_[p] = child;
                }
        forest.parent.free();
        parent_.reserve(size_);
        std::fill_n(parent_.data(), size_, 0);
        seam_target_.clear();
        seam_next_.clear();
    }

    // Where node `index` of the forest has gone.
    std::int32_t rank(std::int32_t index) const { return rank_[index]; }

    // Nodes a and b of the forest hold neighbouring pixels of different regions.
    void add_seam(std::int32_t a, std::int32_t b) {
        const auto [low, high] = std::minmax({rank_[a], rank_[b]});
        seam_target_.push_back(high);
        seam_next_.push_back(first_child_[low]);
        first_child_[low] = size_ + static_cast<std::int32_t>(seam_target_.size()) - 1;
    }

    // The component of the node of this rank, and all those below it, touch the border of the joined region.
    void mark_open(std::int32_t rank) { parent_[rank] = 1; }

    void join() {
        rank_.free();
        link_.reserve(size_);
        // Until a node hangs from something, its `parent_` tells whether it is open.
        for (std::int32_t p = size_ - 1; p >= 0; --p) {
            std::int32_t set = p;
            link_[p] = ~p;
            for (std::int32_t c = first_child_[p]; c != none;) {
                const bool inside = c < size_;
                const std::int32_t other = find(inside ? c : seam_target_[c - size_]);
                c = inside ? next_sibling_[c] : seam_next_[c - size_];
                if (other == set) continue;
                const std::int32_t root = ~link_[other], open = parent_[root];
                parent_[root] = p | open << 31;
                parent_[p] |= open;
                link_[set] = other;
                set = other;
            }
            link_[set] = ~p;
        }
        parent_[0] <<= 31;
        first_child_.free();
        next_sibling_.free();
    }

    std::int32_t size() const { return size_; }
    std::int32_t pixel(std::int32_t i) const { return pixel_[i]; }
    Key key(std::int32_t i) const { return key_[i]; }
    std::int32_t parent(std::int32_t i) const { return parent_[i] & 0x7fffffff; }
    bool is_open(std::int32_t i) const { return parent_[i] < 0; }
    // Whether i opens a component of its own, rather than being one more pixel of its parent's.
    bool opens_component(std::int32_t i) const { return i == 0 || key_[i] != key_[parent(i)]; }
    // A number per node for the caller's use, once joined.
    std::int32_t& name(std::int32_t i) { return link_[i]; }

    void free() {
        key_.free();
        pixel_.free();
        parent_.free();
        link_.free();
    }

private:
    struct Item {
        Key key;
        std::int32_t index;
    };
    static constexpr std::int32_t none = 0x7fffffff, ahead = 16;

    std::int32_t find(std::int32_t p) {
        while (link_[p] >= 0) {
            const std::int32_t next = link_[p];
            if (link_[next] >= 0) link_[p] = link_[next];
            p = next;
        }
        return p;
    }

    std::int32_t size_ = 0;
    Buffer<Item> items_[2];
    Buffer<Key> key_;
    Buffer<std::int32_t> pixel_, rank_, parent_, first_child_, next_sibling_, link_;
    std::vector<std::int32_t> seam_target_, seam_next_;
    std::vector<std::uint32_t> histogram_;
};

}  // namespace usf
