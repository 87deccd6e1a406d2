// 3 x 3 convolutions with fewer products than a sum over taps takes: Winograd's minimal filtering (A. Lavin
// and S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section 4). Maps are
// covered by tiles of 2 x 2 outputs, each of which sees 4 x 4 inputs, or of 4 x 4 outputs, which see 6 x 6.
// The inputs are transformed to as many points, 16 or 36, and so is the kernel. At each point the tiles are
// rows of a matrix product. So 4 outputs take 16 products instead of 36, or 16 outputs 36 instead of 144.
#pragma once

#include <array>
#include <vector>

#include "product.hpp"
#include "winograd_kernel.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A tile's inputs, places for its outputs, and rows beside these, which are added, or compared for
// Ending::masked. Null for outputs outside of the map, and for no rows.
template <int side>
struct WinogradTile {
    std::array<const float*, TileSizes<side>::points> from;
    std::array<float*, TileSizes<side>::outputs> to;
    std::array<const float*, TileSizes<side>::outputs> beside;
};

// Transforms every `step`-th value in place: 4 or 6 inputs to as many points.
template <int side, class V>
USF_INLINE void to_points(V* d, int step) {
    if constexpr (side == 2) {
        const V first = d[0] - d[2 * step], second = d[step] + d[2 * step], third = d[2 * step] - d[step];
        d[3 * step] = d[step] - d[3 * step];
        d[0] = first, d[step] = second, d[2 * step] = third;
    } else {
        using namespace points_of_four;
        const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
        const V even_inner = d4 - outer2 * d2, odd_inner = inner * (d3 - outer2 * d1);
        const V even_outer = d4 - inner2 * d2, odd_outer = outer * (d3 - inner2 * d1);
        d[0] = d4 - (inner2 + outer2) * d2 + (inner2 * outer2) * d0;
        d[step] = even_inner + odd_inner, d[2 * step] = even_inner - odd_inner;
        d[3 * step] = even_outer + odd_outer, d[4 * step] = even_outer - odd_outer;
        d[5 * step] = d[5 * step] - (inner2 + outer2) * d3 + (inner2 * outer2) * d1;
    }
}
// The same for points to outputs, of which there are two less.
template <int side, class V>
USF_INLINE void from_points(V* m, int step) {
    if constexpr (side == 2) {
        const V both = m[step] + m[2 * step], apart = m[step] - m[2 * step];
        m[0] += both;
        m[step] = apart - m[3 * step];
    } else {
        using namespace points_of_four;
        const V even_inner = m[step] + m[2 * step], odd_inner = inner * (m[step] - m[2 * step]);
        const V even_outer = m[3 * step] + m[4 * step], odd_outer = outer * (m[3 * step] - m[4 * step]);
        m[0] += even_inner + even_outer;
        m[step] = odd_inner + odd_outer;
        m[2 * step] = inner2 * even_inner + outer2 * even_outer;
        m[3 * step] = inner2 * odd_inner + outer2 * odd_outer + m[5 * step];
    }
}

template <int lanes, int side, class T>
USF_INLINE void enter_channels(const WinogradTile<side>& tile, std::ptrdiff_t apart, int channel, T* to) {
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    constexpr int patch = TileSizes<side>::patch;
    V d[patch * patch];
#pragma GCC unroll 6
    for (int x = 0; x < patch; ++x) {
#pragma GCC unroll 6
        for (int y = 0; y < patch; ++y)
            d[y * patch + x] = *reinterpret_cast<const U*>(tile.from[y * patch + x] + channel);
        to_points<side>(d + x, patch);
    }
#pragma GCC unroll 6
    for (int y = 0; y < patch; ++y) {
        to_points<side>(d + y * patch, 1);
#pragma GCC unroll 6
        for (int x = 0; x < patch; ++x) store<lanes>(d[y * patch + x], to + (y * patch + x) * apart);
    }
}

template <int lanes, int side>
USF_INLINE void leave_channels(const float* from, std::ptrdiff_t apart, const float* bias, Ending ending,
                               int channel, const WinogradTile<side>& tile) {
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    constexpr int patch = TileSizes<side>::patch;
    V m[patch * patch];
#pragma GCC unroll 6
    for (int x = 0; x < patch; ++x) {
#pragma GCC unroll 6
        for (int y = 0; y < patch; ++y)
            m[y * patch + x] = *reinterpret_cast<const U*>(from + (y * patch + x) * apart + channel);
        from_points<side>(m + x, patch);
    }
    const V shift = *reinterpret_cast<const U*>(bias + channel);
#pragma GCC unroll 4
    for (int y = 0; y < side; ++y) {
        from_points<side>(m + y * patch, 1);
#pragma GCC unroll 4
        for (int x = 0; x < side; ++x) {
            const int i = y * side + x;
            if (!tile.to[i]) continue;
            V value = m[y * patch + x] + shift;
            if (tile.beside[i]) {
                const V beside = *reinterpret_cast<const U*>(tile.beside[i] + channel);
                if (ending == Ending::masked)
                    value = beside <= 0 ? V{} : value;
                else
                    value += beside;
            }
            if (ending == Ending::relu) value = value < 0 ? V{} : value;  // in this order NaN stays NaN
            *reinterpret_cast<U*>(tile.to[i] + channel) = value;
        }
    }
}

// Calls body.operator()<lanes>(first channel) for all channels, a vector at a time if one fits. The last
// vector overlaps the one before, so that it is whole.
template <int lanes, class Body>
USF_INLINE void for_channels(int channels, Body&& body) {
    int channel = 0;
    for (; channel + lanes <= channels; channel += lanes) body.template operator()<lanes>(channel);
    if (channel == channels) return;
    if (channels > lanes) return body.template operator()<lanes>(channels - lanes);
    for (; channel + 4 <= channels; channel += 4) body.template operator()<4>(channel);
    for (; channel < channels; ++channel) body.template operator()<1>(channel);
}

// Transforms the inputs of tiles to [points, tiles, channels], with tiles `width` numbers apart.
template <int side, class T>
void enter(const WinogradTile<side>* tiles, int count, int channels, int width, int lanes, T* to) {
    with_lanes(lanes, [&]<int widest>() USF_LAMBDA {
        const std::ptrdiff_t apart = std::ptrdiff_t{count} * width;
        T* row = to;
        for (int t = 0; t < count; ++t, row += width) {
            for_channels<widest>(
                channels, [&]<int n>(int c) USF_LAMBDA { enter_channels<n>(tiles[t], apart, c, row + c); });
            if (channels < width)
                for (int i = 0; i < TileSizes<side>::points; ++i)
                    std::fill(row + i * apart + channels, row + i * apart + width, T{});
        }
    });
}
// Transforms the points back to the outputs of tiles.
template <int side>
void leave(const float* from, int count, const Winograd<side>& layer, Ending ending,
           const WinogradTile<side>* tiles) {
    with_lanes(layer.lanes(), [&]<int widest>() USF_LAMBDA {
        const int width = layer.whole_outputs();
        const std::ptrdiff_t apart = std::ptrdiff_t{count} * width;
        const float* row = from;
        for (int t = 0; t < count; ++t, row += width)
            for_channels<widest>(layer.outputs(), [&]<int n>(int c) USF_LAMBDA {
                leave_channels<n>(row, apart, layer.bias(), ending, c, tiles[t]);
            });
    });
}

// Computes the outputs of some tiles; `entered` and `left` are scratch.
template <int side>
void convolve(const std::vector<WinogradTile<side>>& tiles, const Winograd<side>& layer, Ending ending,
              Floats& entered, Floats& left) {
    constexpr int points = TileSizes<side>::points;
    const int count = static_cast<int>(tiles.size());
    const int inputs = layer.inputs(), depth = layer.depth();
    const int outputs = layer.whole_outputs();
    const std::ptrdiff_t in = std::ptrdiff_t{count} * depth, out = std::ptrdiff_t{count} * outputs;
    float* const from = rows_of_words(entered, std::int64_t{points} * count, depth);
    float* const to = left.at_least(points * out);
    if (layer.pairs())
        enter(tiles.data(), count, inputs, 2 * depth, layer.lanes(), reinterpret_cast<BFloat16*>(from));
    else
        enter(tiles.data(), count, inputs, inputs, layer.lanes(), from);
    for (int point = 0; point < points; ++point) {
        const Panels weights = layer.at(point);
        multiply(Inputs{from + point * in, depth}, count, weights,
                 Store{to + point * out, outputs, weights.bias, Ending::plain, nullptr});
    }
    leave(to, count, layer, ending, tiles.data());
}

}  // namespace usf
#endif
