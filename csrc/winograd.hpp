// 3 x 3 convolutions with 16 products for 4 outputs, where a sum over taps takes 36: Winograd's minimal
// filtering F(2 x 2, 3 x 3) (A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks",
// arXiv:1509.09308, section 4.1). Maps are covered by tiles of 2 x 2 outputs; each sees 4 x 4 inputs, which
// become 16 points, as the kernel does once and for all. At each point the tiles are rows of a matrix
// product.
#pragma once

#include <array>
#include <vector>

#include "product.hpp"

#ifdef USF_PRODUCTS

namespace usf {

class Winograd {
public:
    static constexpr int side = 2, patch = 4, points = patch * patch;

    // From a matrix [outputs, 9 * inputs], tap after tap, and a bias.
    Winograd(const float* matrix, const float* bias, int outputs, int inputs) : bias_(bias, bias + outputs) {
        constexpr double g[patch][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
        std::vector<float> at_point(static_cast<std::size_t>(outputs) * inputs);
        weights_.reserve(points);
        for (int point = 0; point < points; ++point) {
            std::size_t place = 0;
            for (int o = 0; o < outputs; ++o) {
                const float* const kernel = matrix + std::size_t{9} * o * inputs;
                for (int i = 0; i < inputs; ++i) {
                    double sum = 0;
                    for (int tap = 0; tap < 9; ++tap)
                        sum += g[point / patch][tap / 3] * g[point % patch][tap % 3] *
                               kernel[static_cast<std::size_t>(tap) * inputs + i];
                    at_point[place++] = static_cast<float>(sum);
                }
            }
            weights_.emplace_back(at_point.data(), nullptr, outputs, inputs);
        }
    }
    int outputs() const { return weights_[0].outputs(); }
    int inputs() const { return weights_[0].inputs(); }
    int width() const { return weights_[0].width(); }
    const Weights& at(int point) const { return weights_[point]; }
    const float* bias() const { return bias_.data(); }

private:
    std::vector<Weights> weights_;
    std::vector<float> bias_;
};

// A tile's inputs, and where its outputs go: null for those outside of the map.
struct WinogradTile {
    std::array<const float*, Winograd::points> from;
    std::array<float*, 4> to;
    std::array<const float*, 4> condition;  // rows to be added, or null
};

// In one direction: 4 inputs to 4 points, 4 points to 2 outputs; every `step`-th value of an array.
template <class V>
USF_INLINE void to_points(V* d, int step) {
    const V first = d[0] - d[2 * step], second = d[step] + d[2 * step], third = d[2 * step] - d[step];
    d[3 * step] = d[step] - d[3 * step];
    d[0] = first, d[step] = second, d[2 * step] = third;
}
template <class V>
USF_INLINE void from_points(V* m, int step) {
    const V both = m[step] + m[2 * step], apart = m[step] - m[2 * step];
    m[0] += both;
    m[step] = apart - m[3 * step];
}

template <int lanes>
USF_INLINE void enter_channels(const WinogradTile& tile, std::ptrdiff_t apart, int channel, float* to) {
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    V d[Winograd::points];
#pragma GCC unroll 16
    for (int i = 0; i < Winograd::points; ++i) d[i] = *reinterpret_cast<const U*>(tile.from[i] + channel);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) to_points(d + i, 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) to_points(d + 4 * i, 1);
#pragma GCC unroll 16
    for (int i = 0; i < Winograd::points; ++i) *reinterpret_cast<U*>(to + i * apart + channel) = d[i];
}

template <int lanes>
USF_INLINE void leave_channels(const float* from, std::ptrdiff_t apart, const float* bias, bool relu,
                               int channel, const WinogradTile& tile) {
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    V m[Winograd::points];
#pragma GCC unroll 16
    for (int i = 0; i < Winograd::points; ++i) m[i] = *reinterpret_cast<const U*>(from + i * apart + channel);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) from_points(m + i, 4);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) from_points(m + 4 * i, 1);
    const V shift = *reinterpret_cast<const U*>(bias + channel);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        if (!tile.to[i]) continue;
        V value = m[i / 2 * 4 + i % 2] + shift;
        if (tile.condition[i]) value += *reinterpret_cast<const U*>(tile.condition[i] + channel);
        if (relu) value = value < 0 ? V{} : value;  // in this order NaN stays NaN
        *reinterpret_cast<U*>(tile.to[i] + channel) = value;
    }
}

// Calls body.operator()<lanes>(first channel) for all channels, a vector at a time while one fits.
template <int lanes, class Body>
USF_INLINE void for_channels(int channels, Body&& body) {
    int channel = 0;
    for (; channel + lanes <= channels; channel += lanes) body.template operator()<lanes>(channel);
    for (; channel + 4 <= channels; channel += 4) body.template operator()<4>(channel);
    for (; channel < channels; ++channel) body.template operator()<1>(channel);
}

// Inputs of all tiles to [points, tiles, channels], and back.
template <int lanes>
USF_INLINE void enter_tiles(const WinogradTile* tiles, int count, int channels, float* to) {
    const std::ptrdiff_t apart = std::ptrdiff_t{count} * channels;
    for (int t = 0; t < count; ++t, to += channels)
        for_channels<lanes>(channels, [&]<int n>(int channel)
                                          USF_LAMBDA { enter_channels<n>(tiles[t], apart, channel, to); });
}
template <int lanes>
USF_INLINE void leave_tiles(const float* from, int count, const Winograd& layer, bool relu,
                            const WinogradTile* tiles) {
    const std::ptrdiff_t apart = std::ptrdiff_t{count} * layer.outputs();
    for (int t = 0; t < count; ++t, from += layer.outputs())
        for_channels<lanes>(layer.outputs(), [&]<int n>(int channel) USF_LAMBDA {
            leave_channels<n>(from, apart, layer.bias(), relu, channel, tiles[t]);
        });
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline void enter_avx512(const WinogradTile* tiles, int count,
                                                            int channels, float* to) {
    enter_tiles<16>(tiles, count, channels, to);
}
__attribute__((target("avx512f"))) inline void leave_avx512(const float* from, int count,
                                                            const Winograd& layer, bool relu,
                                                            const WinogradTile* tiles) {
    leave_tiles<16>(from, count, layer, relu, tiles);
}
__attribute__((target("avx2,fma"))) inline void enter_avx2(const WinogradTile* tiles, int count, int channels,
                                                           float* to) {
    enter_tiles<8>(tiles, count, channels, to);
}
__attribute__((target("avx2,fma"))) inline void leave_avx2(const float* from, int count,
                                                           const Winograd& layer, bool relu,
                                                           const WinogradTile* tiles) {
    leave_tiles<8>(from, count, layer, relu, tiles);
}
#endif

inline void enter(const WinogradTile* tiles, int count, const Winograd& layer, float* to) {
#if defined(__x86_64__)
    if (layer.width() == 32) return enter_avx512(tiles, count, layer.inputs(), to);
    if (layer.width() == 16) return enter_avx2(tiles, count, layer.inputs(), to);
#endif
    enter_tiles<4>(tiles, count, layer.inputs(), to);
}
inline void leave(const float* from, int count, const Winograd& layer, bool relu, const WinogradTile* tiles) {
#if defined(__x86_64__)
    if (layer.width() == 32) return leave_avx512(from, count, layer, relu, tiles);
    if (layer.width() == 16) return leave_avx2(from, count, layer, relu, tiles);
#endif
    leave_tiles<4>(from, count, layer, relu, tiles);
}

// The outputs of some tiles; `entered` and `left` are scratch.
inline void convolve(const std::vector<WinogradTile>& tiles, const Winograd& layer, bool relu,
                     Floats& entered, Floats& left) {
    const int count = static_cast<int>(tiles.size());
    const std::ptrdiff_t in = std::ptrdiff_t{count} * layer.inputs(),
                         out = std::ptrdiff_t{count} * layer.outputs();
    float* const from = entered.at_least(Winograd::points * in);
    float* const to = left.at_least(Winograd::points * out);
    enter(tiles.data(), count, layer, from);
    for (int point = 0; point < Winograd::points; ++point) {
        const Weights& weights = layer.at(point);
        multiply(Inputs{from + point * in, layer.inputs()}, count, weights,
                 Store{to + point * out, layer.outputs(), weights.bias(), false, nullptr});
    }
    leave(to, count, layer, relu, tiles.data());
}

}  // namespace usf
#endif
