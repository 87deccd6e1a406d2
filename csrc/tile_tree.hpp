// Max-tree of a window small enough for 16-bit positions and the first-level caches.
//
// Pixels are taken from the highest level down (sorted once). Each one joins the components of the neighbours
// that came before it (union-find). Positions are counted in a frame one pixel wider than the window on every
// side, so no neighbour needs a bounds check.
#pragma once

#include <cstdint>
#include <vector>

#include "grid.hpp"
#include "neighbours.hpp"
#include "radix_sort.hpp"

namespace usf {

template <class T>
class TileTree {
public:
    using Key = OrderedKey<T>;
    static constexpr int largest_frame = 32767;  // positions are 15-bit: the sign tells roots from links

    static bool fits(std::int64_t height, std::int64_t width) {
        return height < largest_frame && width < largest_frame && (height + 2) * (width + 2) <= largest_frame;
    }

    void build(const T* image, std::int64_t row_stride, int height, int width, Connectivity connectivity) {
        height_ = height, width_ = width, stride_ = width + 2;
        range_ = load(image, row_stride);
        order_ = radix_sort(
            positions_[0].data(), positions_[1].data(), size(), range_,
            [key = key_.data()](std::int16_t p) { return key[p]; }, histogram_);
        compare();
        flood(connectivity);
    }

    KeyRange<Key> range() const { return range_; }
    int size() const { return height_ * width_; }
    int stride() const { return stride_; }
    int frame() const { return (height_ + 2) * stride_; }
    int position(int y, int x) const { return (y + 1) * stride_ + x + 1; }

    // Positions from the lowest level up; the first one is the root of the tree.
    const std::int16_t* order() const { return order_; }
    // The parent of a position, on the same level or below; the root is its own parent.
    int parent(int p) const { return parent_[p]; }
    Key key(int p) const { return key_[p]; }
    // Whether p opens a component of its own, rather than being one more pixel of its parent's.
    bool opens_component(int p) const { return key_[p] != key_[parent_[p]]; }

    // Marks every component that touches one of the given sides of the window.
    void mark_open(bool top, bool bottom, bool left, bool right) {
        open_.assign(frame(), 0);
        for (int x = 0; x < width_; ++x) {
            open_[position(0, x)] |= top;
            open_[position(height_ - 1, x)] |= bottom;
        }
        for (int y = 0; y < height_; ++y) {
            open_[position(y, 0)] |= left;
            open_[position(y, width_ - 1)] |= right;
        }
        for (int i = size() - 1; i > 0; --i) open_[parent_[order_[i]]] |= open_[order_[i]];
    }
    bool is_open(int p) const { return open_[p]; }

private:
    KeyRange<Key> load(const T* image, std::int64_t row_stride) {
        key_.resize(frame());
        positions_[0].resize(size());
        positions_[1].resize(size());
        std::int16_t* next = positions_[0].data();
        KeyRange<Key> range;
        for (int y = 0; y < height_; ++y) {
            const T* row = image + y * row_stride;
            const int first = position(y, 0);
            Key* key = key_.data() + first;
            for (int x = 0; x < width_; ++x) {
                key[x] = ordered_key(row[x]);
                range.include(key[x]);
            }
            for (int x = 0; x < width_; ++x) *next++ = static_cast<std::int16_t>(first + x);
        }
        return range;
    }

    // Bit d of before_[p]: the neighbour in direction d of the ring comes before p.
    void compare() {
        before_.resize(frame());
        // All rows are walked as one; the results for the frame between them are not used.
        const int first = position(0, 0), count = position(height_ - 1, width_ - 1) + 1 - first;
        const Key *here = key_.data() + first, *above = here - stride_, *below = here + stride_;
        std::uint8_t* before = before_.data() + first;
        // Among equal levels, the later one in the window comes first (the sort is stable).
        for (int x = 0; x < count; ++x) {
            const Key k = here[x];
            before[x] = static_cast<std::uint8_t>((above[x] > k) | (above[x + 1] > k) << 1 |
                                                  (here[x + 1] >= k) << 2 | (below[x + 1] >= k) << 3 |
                                                  (below[x] >= k) << 4 | (below[x - 1] >= k) << 5 |
                                                  (here[x - 1] > k) << 6 | (above[x - 1] > k) << 7);
        }
        for (int y = 0; y < height_; ++y) {  // the frame holds no pixels
            before_[position(y, 0)] &= 0b00011111;
            before_[position(y, width_ - 1)] &= 0b11110001;
        }
        for (int x = 0; x < width_; ++x) {
            before_[position(0, x)] &= 0b01111100;
            before_[position(height_ - 1, x)] &= 0b11000111;
        }
    }

    // link_[p] is the next position on the way to the representative of p's set, or, at a representative,
    // the complement of the position that is the current root of that component.
    void flood(Connectivity connectivity) {
        link_.resize(frame());
        parent_.resize(frame());
        const RingTable& table = ring_table(connectivity);
        int offset[8];
        for (int d = 0; d < 8; ++d) offset[d] = ring_dy[d] * stride_ + ring_dx[d];
        std::int16_t *link = link_.data(), *parent = parent_.data();
        for (int i = size() - 1; i >= 0; --i) {
            const int p = order_[i];
            const RingEntry& entry = table[before_[p]];
            int set = p;
            for (int c = 0; c < entry.count; ++c) {
                const int other = find(p + offset[entry.direction[c]]);
                if (other == set) continue;
                parent[~link[other]] = static_cast<std::int16_t>(p);
                link[set] = static_cast<std::int16_t>(other);
                set = other;
            }
            link[set] = static_cast<std::int16_t>(~p);
        }
        parent[order_[0]] = order_[0];
    }

    int find(int p) {
        std::int16_t* link = link_.data();
        while (link[p] >= 0) {
            const int next = link[p];
            if (link[next] >= 0) link[p] = link[next];
            p = next;
        }
        return p;
    }

    int height_ = 0, width_ = 0, stride_ = 0;
    KeyRange<Key> range_;
    std::vector<Key> key_;
    std::vector<std::int16_t> positions_[2], parent_, link_;
    std::int16_t* order_ = nullptr;
    std::vector<std::uint8_t> before_, open_;
    std::vector<std::uint32_t> histogram_;
};

}  // namespace usf
