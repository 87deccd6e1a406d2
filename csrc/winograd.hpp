// 3 x 3 convolutions with 16 products for 4 outputs, where a sum over taps takes 36: Winograd's minimal
// filtering F(2 x 2, 3 x 3) (A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks",
// arXiv:1509.09308, section 4.1). Maps are covered by tiles of 2 x 2 outputs. Each sees 4 x 4 inputs, which
// are transformed to 16 points, and so is the kernel. At each point the tiles are rows of a matrix product.
#pragma once

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "product.hpp"
#include "team.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A kernel [outputs, inputs, 3, 3] in memory, with the strides of outputs, inputs and taps.
struct Kernel {
    const float* data;
    int outputs, inputs;
    std::ptrdiff_t output, input, tap;

    // The kernel of the convolution that maps the gradient of the outputs to that of the inputs.
    Kernel adjoint() const { return {data + 8 * tap, inputs, outputs, input, output, -tap}; }
};

// Transforms one input's kernels for `count` outputs to all points, with `width` outputs at each.
USF_CLONES inline void kernel_to_points(const Kernel& kernel, int input, int first_output, int count,
                                        int width, float* __restrict to, std::size_t apart) {
    constexpr int widest = 32;
    float g[9][widest] = {}, rows[4][3][widest];
    for (int o = 0; o < count; ++o)
        for (int tap = 0; tap < 9; ++tap)
            g[tap][o] =
                kernel.data[(first_output + o) * kernel.output + input * kernel.input + tap * kernel.tap];
    for (int x = 0; x < 3; ++x)
        for (int o = 0; o < width; ++o) {
            const float sum = 0.5f * (g[x][o] + g[6 + x][o]), middle = 0.5f * g[3 + x][o];
            rows[0][x][o] = g[x][o], rows[3][x][o] = g[6 + x][o];
            rows[1][x][o] = sum + middle, rows[2][x][o] = sum - middle;
        }
    for (int y = 0; y < 4; ++y, to += 4 * apart)
        for (int o = 0; o < width; ++o) {
            const float sum = 0.5f * (rows[y][0][o] + rows[y][2][o]), middle = 0.5f * rows[y][1][o];
            to[o] = rows[y][0][o], to[3 * apart + o] = rows[y][2][o];
            to[apart + o] = sum + middle, to[2 * apart + o] = sum - middle;
        }
}

// A kernel at all points, and a bias, which may be null.
class Winograd {
public:
    static constexpr int side = 2, patch = 4, points = patch * patch;
    static constexpr int fewest = 16;  // channels: with fewer, the transforms take longer than they save

    // `memory`, if given, must not be used by others during the lifetime of this and its copies.
    Winograd(const Kernel& kernel, const float* bias, int threads = 1,
             std::shared_ptr<Floats> memory = std::make_shared<Floats>())
        : outputs_(kernel.outputs), inputs_(kernel.inputs), width_(Panels::best_width()) {
        const std::size_t all = points * apart();
        float* const to = memory->at_least(all + 2 * padded());
        constexpr int together = 8;
        team_for((inputs_ + together - 1) / together, threads, [&](std::int64_t some) {
            const int begin = static_cast<int>(some) * together, end = std::min(begin + together, inputs_);
            for (int first = 0; first < outputs_; first += width_)
                for (int i = begin; i < end; ++i)
                    kernel_to_points(kernel, i, first, std::min(width_, outputs_ - first), width_,
                                     to + static_cast<std::size_t>(first) * inputs_ + i * width_, apart());
        });
        std::fill_n(to + all, 2 * padded(), 0.0f);  // bias of the points, always 0, and of the outputs
        if (bias) std::copy_n(bias, outputs_, to + all + padded());
        memory_ = std::move(memory);
    }
    // A copy in pairs of bfloat16 numbers, for a processor that multiplies them.
    Winograd in_pairs() const {
        Winograd rounded = *this;
        rounded.pairs_ = true;
        auto memory = std::make_shared<Floats>();
        const std::size_t all = points * rounded.apart();
        float* const to = memory->at_least(all + 2 * padded());
        pair_panels(memory_->data(), points * padded() / width_, inputs_, width_, to);
        std::copy_n(memory_->data() + points * apart(), 2 * padded(), to + all);
        rounded.memory_ = std::move(memory);
        return rounded;
    }
    int outputs() const { return outputs_; }
    int inputs() const { return inputs_; }
    int lanes() const { return width_ / 2; }
    int whole_outputs() const { return Panels::padded(outputs_, lanes()); }  // padded to whole vectors
    bool pairs() const { return pairs_; }
    int depth() const { return pairs_ ? words_of(inputs_) : inputs_; }  // words per point of a tile
    Panels at(int point) const {
        const float* const data = memory_->data();
        return {data + point * apart(),
                data + points * apart(),
                whole_outputs(),
                depth(),
                width_,
                depth(),
                pairs_};
    }
    const float* bias() const { return memory_->data() + points * apart() + padded(); }

private:
    std::size_t padded() const { return Panels::padded(outputs_, width_); }
    std::size_t apart() const { return padded() * depth(); }

    int outputs_, inputs_, width_;
    bool pairs_ = false;
    std::shared_ptr<const Floats> memory_;
};

// A tile's inputs, places for its outputs, and rows beside these, which are added, or compared for
// Ending::masked. Null for outputs outside of the map, and for no rows.
struct WinogradTile {
    std::array<const float*, Winograd::points> from;
    std::array<float*, 4> to;
    std::array<const float*, 4> beside;
};

// Transforms every `step`-th value in place: 4 inputs to 4 points, and 4 points to 2 outputs.
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

template <int lanes, class T>
USF_INLINE void enter_channels(const WinogradTile& tile, std::ptrdiff_t apart, int channel, T* to) {
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
    for (int i = 0; i < Winograd::points; ++i) store<lanes>(d[i], to + i * apart);
}

template <int lanes>
USF_INLINE void leave_channels(const float* from, std::ptrdiff_t apart, const float* bias, Ending ending,
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
template <class T>
void enter(const WinogradTile* tiles, int count, int channels, int width, int lanes, T* to) {
    with_lanes(lanes, [&]<int widest>() USF_LAMBDA {
        const std::ptrdiff_t apart = std::ptrdiff_t{count} * width;
        T* row = to;
        for (int t = 0; t < count; ++t, row += width) {
            for_channels<widest>(
                channels, [&]<int n>(int c) USF_LAMBDA { enter_channels<n>(tiles[t], apart, c, row + c); });
            if (channels < width)
                for (int i = 0; i < Winograd::points; ++i)
                    std::fill(row + i * apart + channels, row + i * apart + width, T{});
        }
    });
}
// Transforms the points back to the outputs of tiles.
inline void leave(const float* from, int count, const Winograd& layer, Ending ending,
                  const WinogradTile* tiles) {
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
inline void convolve(const std::vector<WinogradTile>& tiles, const Winograd& layer, Ending ending,
                     Floats& entered, Floats& left) {
    const int count = static_cast<int>(tiles.size());
    const int inputs = layer.inputs(), depth = layer.depth();
    const int outputs = layer.whole_outputs();
    const std::ptrdiff_t in = std::ptrdiff_t{count} * depth, out = std::ptrdiff_t{count} * outputs;
    float* const from = rows_of_words(entered, std::int64_t{Winograd::points} * count, depth);
    float* const to = left.at_least(Winograd::points * out);
    if (layer.pairs())
        enter(tiles.data(), count, inputs, 2 * depth, layer.lanes(), reinterpret_cast<BFloat16*>(from));
    else
        enter(tiles.data(), count, inputs, inputs, layer.lanes(), from);
    for (int point = 0; point < Winograd::points; ++point) {
        const Panels weights = layer.at(point);
        multiply(Inputs{from + point * in, depth}, count, weights,
                 Store{to + point * out, outputs, weights.bias, Ending::plain, nullptr});
    }
    leave(to, count, layer, ending, tiles.data());
}

}  // namespace usf
#endif
