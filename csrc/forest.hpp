// Joining the trees of neighbouring regions.
//
// Inside a region's own tree, a component that does not touch the region's border is settled: whatever lies
// outside cannot change it, nor what it hangs from. Only the others ("open" nodes) have to be ordered again
// together with those of the neighbours. `ForestMerge` does that: it sorts the open nodes of all regions and
// runs union-find over the trees' own links and the pixel pairs across the seams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "ordered_key.hpp"
#include "parallel.hpp"

namespace usf {

// Open nodes, one per pixel. The nodes of one region are adjacent and run from its lowest level up; `parent`
// is the index of the node that each one hangs from (its own at the root).
template <class Key>
struct Forest {
    Buffer<std::int32_t> pixel, parent;
    Buffer<Key> key;

    void reserve(std::size_t n) {
        pixel.reserve(n);
        parent.reserve(n);
        key.reserve(n);
    }
};

template <class Key>
class ForestMerge {
public:
    // Nodes of `forest` may lie anywhere in [0, capacity): first their ranges are added, then the seams.
    void start(Forest<Key>& forest, std::size_t capacity) {
        forest_ = &forest;
        capacity_ = static_cast<std::int32_t>(capacity);
        size_ = 0;
        order_ = positions_[0].reserve(capacity);
        first_child_.reserve(capacity);
        next_sibling_.reserve(capacity);
        seam_target_.clear();
        seam_next_.clear();
    }

    void add_nodes(std::int32_t begin, std::int32_t end) {
        const std::int32_t* parent = forest_->parent.data();
        for (std::int32_t i = begin; i < end; ++i) {
            order_[size_++] = i;
            first_child_[i] = none;
            if (const std::int32_t p = parent[i]; p != i) {
                next_sibling_[i] = first_child_[p];
                first_child_[p] = i;
            }
        }
    }

    // a and b are neighbouring pixels of different regions. The pair joins once the lower one is reached.
    void add_seam(std::int32_t a, std::int32_t b) {
        const Key* key = forest_->key.data();
        if (key[b] < key[a] || (key[b] == key[a] && b < a)) std::swap(a, b);
        seam_target_.push_back(b);
        seam_next_.push_back(first_child_[a]);
        first_child_[a] = capacity_ + static_cast<std::int32_t>(seam_target_.size()) - 1;
    }

    // After the seams, before the marks. From here on until a node hangs from something, its `parent` tells
    // whether it is open.
    void prepare() {
        for (std::int32_t i = 0; i < size_; ++i) forest_->parent[order_[i]] = 0;
    }

    // The component of p, and all those below it, touch the border of the joined region.
    void mark_open(std::int32_t p) { forest_->parent[p] = 1; }

    // Replaces `parent` by that of the joined tree.
    void join() {
        order_ = radix_sort(forest_->key.data(), order_, positions_[1].reserve(size_), size_, histogram_);
        link_.reserve(capacity_);
        std::int32_t* parent = forest_->parent.data();
        for (std::int32_t i = size_ - 1; i >= 0; --i) {
            if (i >= far) prefetch(&first_child_[order_[i - far]]);
            if (i >= near) prefetch_child(first_child_[order_[i - near]]);
            const std::int32_t p = order_[i];
            std::int32_t set = p;
            link_[p] = ~p;
            for (std::int32_t c = first_child_[p]; c != none;) {
                const bool inside = c < capacity_;
                const std::int32_t other = find(inside ? c : seam_target_[c - capacity_]);
                c = inside ? next_sibling_[c] : seam_next_[c - capacity_];
                if (other == set) continue;
                const std::int32_t root = ~link_[other], open = parent[root];
                parent[root] = p | open << 31;
                parent[p] |= open;
                link_[set] = other;
                set = other;
            }
            link_[set] = ~p;
        }
        const std::int32_t root = order_[0];
        parent[root] = root | parent[root] << 31;
    }

    std::int32_t size() const { return size_; }
    std::int32_t node(std::int32_t i) const { return order_[i]; }  // from the lowest level up
    bool is_open(std::int32_t p) const { return forest_->parent[p] < 0; }
    std::int32_t parent(std::int32_t p) const { return forest_->parent[p] & 0x7fffffff; }

    // A number per node for the caller's use once the trees are joined.
    void rename(std::int32_t p, std::int32_t name) { link_[p] = name; }
    std::int32_t renamed(std::int32_t p) const { return link_[p]; }

private:
    static constexpr std::int32_t none = 0x7fffffff, far = 24, near = 12;

    void prefetch_child(std::int32_t c) const {
        if (c < capacity_) prefetch(&link_[c]), prefetch(&next_sibling_[c]);
    }

    std::int32_t find(std::int32_t p) {
        while (link_[p] >= 0) {
            const std::int32_t next = link_[p];
            if (link_[next] >= 0) link_[p] = link_[next];
            p = next;
        }
        return p;
    }

    Forest<Key>* forest_ = nullptr;
    std::int32_t capacity_ = 0, size_ = 0;
    std::int32_t* order_ = nullptr;
    Buffer<std::int32_t> positions_[2], first_child_, next_sibling_, link_;
    std::vector<std::int32_t> seam_target_, seam_next_;
    std::vector<std::uint32_t> histogram_;
};

}  // namespace usf
