// Joining the trees of the tiles.
//
// Inside a tile's own tree, a component that does not touch a cut is settled: whatever lies outside cannot
// change it, nor what it hangs from. Only the others ("open") have to be ordered again together with those of
// the neighbours. `ForestMerge` does that: it sorts the open components of all tiles and runs union-find over
// the links of the old trees and the pixel pairs across the cuts. It works in the sorted order, where a
// component and what hangs from it are close to each other, so that memory is read almost in sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "parallel.hpp"
#include "radix_sort.hpp"

namespace usf {

// A component, by one of the pixels on its level.
template <class Key>
struct OpenComponent {
    Key key;
    std::int32_t pixel;
};

// Use: fill `components`, sort, then add_seam, then join, then read from the lowest level up.
template <class Key>
class ForestMerge {
public:
    using Component = OpenComponent<Key>;

    // Where the caller puts the open components of the tiles, those of each one from its lowest level up.
    Component* components(std::size_t most) { return components_[0].reserve(most); }

    // Tile t has put size[t] components from begin[t] on; their keys lie in `range`. parent_of[pixel]: the
    // pixel of the component that the one of `pixel` hangs from in its tile's tree, its own at a root; freed.
    // rank_of[pixel] is set to the place in the sorted order, and read by `add_seam`. `others`: how many
    // parents the caller is going to add behind those of `parents`.
    void sort(const std::vector<std::size_t>& begin, const std::vector<std::size_t>& size,
              KeyRange<Key> range, Buffer<std::int32_t>& parent_of, std::int32_t* rank_of,
              std::int64_t others, int threads) {
        size_ = static_cast<std::int32_t>(std::accumulate(size.begin(), size.end(), std::size_t{0}));
        rank_of_ = rank_of;
        Component* components = components_[0].data();
        sorted_ = parallel_radix_sort(
            components, components_[1].reserve(size_, Access::at_random), begin, size, range,
            [](const Component& c) { return c.key; }, threads);
        components_[sorted_ == components ? 1 : 0].free();
        for_each(size_, threads, [&](std::int32_t i) { rank_of[sorted_[i].pixel] = i; });
        up_.reserve(size_, Access::at_random);
        for_each(size_, threads, [&](std::int32_t i) { up_[i] = rank_of[parent_of[sorted_[i].pixel]]; });
        parent_of.free();
        cell_.reserve(size_ + others, Access::at_random);
        for_each(size_, threads, [&](std::int32_t i) { cell_[i] = none; });
        seam_target_.clear();
        seam_next_.clear();
    }

    // Neighbouring pixels of different tiles belong to the components of these two pixels.
    void add_seam(std::int32_t pixel_a, std::int32_t pixel_b) {
        const auto [low, high] = std::minmax({rank_of_[pixel_a], rank_of_[pixel_b]});
        seam_target_.push_back(high);
        seam_next_.push_back(cell_[low]);
        cell_[low] = size_ + static_cast<std::int32_t>(seam_target_.size()) - 1;
    }

    // Union-find from the highest component down. A cell changes its meaning when its turn comes: before, it
    // is the head of the list of what joins there (components of the old tree that came before, chained
    // through `up_`, which they no longer need, and seams); afterwards it is the parent in the joined tree.
    void join() {
        link_.reserve(size_, Access::at_random);
        for (std::int32_t p = size_ - 1; p >= 0; --p) {
            std::int32_t set = p;
            link_[p] = ~p;
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
        up_.free();
    }

    std::int32_t size() const { return size_; }
    std::int32_t pixel(std::int32_t i) const { return sorted_[i].pixel; }
    Key key(std::int32_t i) const { return sorted_[i].key; }
    std::int32_t parent(std::int32_t i) const { return cell_[i]; }
    // Whether i is a component of its own, rather than a part of its parent on the same level.
    bool opens_component(std::int32_t i) const { return i == 0 || key(i) != key(parent(i)); }
    // A number per component for the caller's use, once joined.
    std::int32_t& name(std::int32_t i) { return link_[i]; }
    // The parents, once joined. The caller may take them, and write over those that it has read: a second
    // array of this size would be the most memory that building a tree needs.
    Buffer<std::int32_t>& parents() { return cell_; }

    void free() {
        components_[0].free();
        components_[1].free();
        cell_.free();
        link_.free();
    }

private:
    static constexpr std::int32_t none = 0x7fffffff;

    std::int32_t find(std::int32_t p) {
        while (link_[p] >= 0) {
            const std::int32_t next = link_[p];
            if (link_[next] >= 0) link_[p] = link_[next];
            p = next;
        }
        return p;
    }

    std::int32_t size_ = 0;
    std::int32_t* rank_of_ = nullptr;
    Component* sorted_ = nullptr;
    Buffer<Component> components_[2];
    Buffer<std::int32_t> up_, cell_, link_;
    std::vector<std::int32_t> seam_target_, seam_next_;
};

}  // namespace usf
