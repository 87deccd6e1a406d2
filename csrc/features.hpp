// Strided views of tensors (batch, channels, *spatial) by image, channel and position.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "team.hpp"

namespace usf {

// Strides in elements. The stride of channels or positions is 1 if there is only one.
template <class T>
struct Features {
    T* data = nullptr;
    std::int64_t batch = 0, channel = 1, position = 1;

    T* at(std::int64_t image, std::int64_t c, std::int64_t p) const {
        return data + image * batch + c * channel + p * position;
    }
    Features from_channel(std::int64_t c) const { return {data + c * channel, batch, channel, position}; }
};
using Input = Features<const float>;
using Output = Features<float>;

struct Extent {
    std::int64_t batch, channels, positions;
};

inline Extent extent_of(std::span<const std::int64_t> sizes) {
    Extent extent{sizes[0], sizes[1], 1};
    for (const std::int64_t size : sizes.subspan(2)) extent.positions *= size;
    return extent;
}

// A view of a tensor; nothing if its spatial dimensions cannot be walked with one stride.
template <class T>
std::optional<Features<T>> flatten(T* data, std::span<const std::int64_t> sizes,
                                   std::span<const std::int64_t> strides) {
    if (std::ranges::find(sizes, 0) != sizes.end()) return Features<T>{data};
    std::int64_t position = 0, expected = 0;
    for (std::size_t i = sizes.size(); i-- > 2;) {
        if (sizes[i] == 1) continue;
        if (expected == 0)
            position = strides[i];
        else if (strides[i] != expected)
            return std::nullopt;
        expected = strides[i] * sizes[i];
        if (expected == 0 && sizes[i] > 1) return std::nullopt;  // expanded
    }
    return Features<T>{data, sizes[0] > 1 ? strides[0] : 0, sizes[1] > 1 ? strides[1] : 1,
                       position == 0 ? 1 : position};
}

// maps: the positions of a channel are neighbours in memory; rows: the channels of a position are.
enum class Layout { maps, rows, other };

template <class... T>
Layout common_layout(std::int64_t positions, const Features<T>&... features) {
    const bool maps = ((features.position == 1) && ...), rows = ((features.channel == 1) && ...);
    if (rows && (positions == 1 || !maps)) return Layout::rows;
    return maps ? Layout::maps : Layout::other;
}

// Rows of neighbouring channels, by image. If every image has one position, all images are rows of one image.
template <class T>
struct RowsOf {
    T* data;
    std::int64_t image, row;

    RowsOf(const Features<T>& f, std::int64_t positions)
        : data(f.data), image(positions == 1 ? 0 : f.batch), row(positions == 1 ? f.batch : f.position) {}
    T* at(std::int64_t i, std::int64_t r) const { return data + i * image + r * row; }
};
struct RowCount {
    std::int64_t images, rows;
    explicit RowCount(const Extent& e)
        : images(e.positions == 1 ? 1 : e.batch), rows(e.positions == 1 ? e.batch : e.positions) {}
};

constexpr std::int64_t stretch_elements = 1 << 14;  // far more work than handing a stretch to a thread
// Rows summed one by one: more would add up rounding errors, fewer would leave nearly as many sums as inputs.
constexpr std::int64_t rows_of_a_sum = 256, least_rows_of_a_sum = 64;

// Divides the indices [0, total) of things with `elements` elements each into stretches. They do not depend
// on the threads, so neither do the sums over them.
struct Stretches {
    std::int64_t total, each, count;

    Stretches(std::int64_t total, std::int64_t elements, std::int64_t most = stretch_elements,
              std::int64_t least = 1)
        : total(total),
          each(std::clamp<std::int64_t>(stretch_elements / std::max<std::int64_t>(elements, 1), least, most)),
          count((total + each - 1) / each) {}
    std::int64_t begin(std::int64_t i) const { return i * each; }
    std::int64_t end(std::int64_t i) const { return std::min((i + 1) * each, total); }
};

}  // namespace usf
