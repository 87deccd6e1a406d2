// Kernels of 3 x 3 convolutions at the points of Winograd's filtering: see winograd.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

#include "panels.hpp"
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

// Sizes of a filtering with tiles of side x side outputs.
template <int side>
struct TileSizes {
    static constexpr int outputs = side * side, patch = side + 2, points = patch * patch;
};

// Tiles of 4 x 4 outputs take the polynomials of their rows and columns at 0, +-inner, +-outer and infinity.
// With 1 and 2, which are usual, rounding errors would be twice as large.
namespace points_of_four {
constexpr float inner = 0.625f, outer = 1.5f, inner2 = inner * inner, outer2 = outer * outer;
}

// Transforms three taps, `step` numbers apart, to points, for `count` outputs each.
template <int side>
USF_INLINE void taps_to_points(const float* __restrict taps, std::size_t step, int count,
                               float* __restrict to, std::size_t apart) {
    const float *const first = taps, *const second = taps + step, *const third = taps + 2 * step;
    if constexpr (side == 2) {
        for (int o = 0; o < count; ++o) {
            const float even = 0.5f * (first[o] + third[o]), odd = 0.5f * second[o];
            to[o] = first[o], to[3 * apart + o] = third[o];
            to[apart + o] = even + odd, to[2 * apart + o] = even - odd;
        }
    } else {
        using namespace points_of_four;
        constexpr float at_0 = 1 / (inner2 * outer2), at_inner = 1 / (2 * inner2 * (inner2 - outer2)),
                        at_outer = 1 / (2 * outer2 * (outer2 - inner2));
        for (int o = 0; o < count; ++o) {
            const float even_inner = at_inner * (first[o] + inner2 * third[o]),
                        even_outer = at_outer * (first[o] + outer2 * third[o]);
            const float odd_inner = at_inner * inner * second[o], odd_outer = at_outer * outer * second[o];
            to[o] = at_0 * first[o], to[5 * apart + o] = third[o];
            to[apart + o] = even_inner + odd_inner, to[2 * apart + o] = even_inner - odd_inner;
            to[3 * apart + o] = even_outer + odd_outer, to[4 * apart + o] = even_outer - odd_outer;
        }
    }
}

// Transforms one input's kernels for `count` outputs to all points, with `width` outputs at each.
template <int side>
USF_CLONES void kernel_to_points(const Kernel& kernel, int input, int first_output, int count, int width,
                                 float* to, std::size_t apart) {
    constexpr int widest = 32, patch = TileSizes<side>::patch;
    float g[3][3][widest] = {}, columns[3][patch][widest];
    for (int o = 0; o < count; ++o)
        for (int tap = 0; tap < 9; ++tap)
            g[tap % 3][tap / 3][o] =
                kernel.data[(first_output + o) * kernel.output + input * kernel.input + tap * kernel.tap];
    for (int x = 0; x < 3; ++x) taps_to_points<side>(g[x][0], widest, width, columns[x][0], widest);
    for (int y = 0; y < patch; ++y)
        taps_to_points<side>(columns[0][y], patch * widest, width, to + y * patch * apart, apart);
}

// Large tiles cancel more, and so add up fewer terms one by one. The root mean square of their errors is then
// three to four times that of sums over taps.
constexpr int short_chain = 64;

// Channels: with fewer, the transforms of small tiles, or of large ones, take longer than they save.
constexpr int fewest_channels = 16, fewest_of_large = 32;

// A kernel at all points, and a bias, which may be null.
template <int side_>
class Winograd {
public:
    static constexpr int points = TileSizes<side_>::points;

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
                    kernel_to_points<side_>(kernel, i, first, std::min(width_, outputs_ - first), width_,
                                            to + static_cast<std::size_t>(first) * inputs_ + i * width_,
                                            apart());
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
                pairs_,
                side_ == 2 ? long_chain : short_chain};
    }
    const float* bias() const { return memory_->data() + points * apart() + padded(); }

private:
    std::size_t padded() const { return Panels::padded(outputs_, width_); }
    std::size_t apart() const { return padded() * depth(); }

    int outputs_, inputs_, width_;
    bool pairs_ = false;
    std::shared_ptr<const Floats> memory_;
};

}  // namespace usf
#endif
