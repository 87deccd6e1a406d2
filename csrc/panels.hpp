// Matrices in panels, the order in which products read them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "interleave.hpp"
#include "pairs.hpp"
#include "team.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Number of terms that are added up one by one before their sum is added to the total: the rounding errors of
// a sum grow as the square root of the length of such chains.
constexpr int long_chain = 256;

// A matrix [outputs, inputs] in panels of two vectors of outputs, input after input, and a bias. Both are
// padded to whole panels; the padding takes part in the computation, and its results are dropped.
struct Panels {
    const float* data;
    const float* bias;
    int outputs, inputs, width;
    int depth = inputs;  // inputs of the panels in memory, of which these may be a part
    bool pairs = false;  // whether they hold pairs of bfloat16 numbers; `inputs` and `depth` are then words
    int chain = long_chain;  // terms that are added up one by one, but in AMX's tiles

    const float* panel(int first_output) const {
        return data + static_cast<std::ptrdiff_t>(first_output) * depth;
    }
    // Some inputs of all outputs, without the bias.
    Panels of_inputs(int first, int last) const {
        return {
            data + static_cast<std::ptrdiff_t>(first) * width, nullptr, outputs, last - first, width, depth};
    }
    static int best_width() { return 2 * best_lanes(); }
    static int padded(int outputs, int width) { return (outputs + width - 1) / width * width; }
};

// A matrix in memory, its rows `stride` apart: [outputs, inputs], or [inputs, outputs] if `transposed`.
struct MatrixView {
    const float* data;
    std::int64_t stride;
    bool transposed;

    const float* at(std::int64_t output, std::int64_t input) const {
        return data + (transposed ? input * stride + output : output * stride + input);
    }
    MatrixView from(std::int64_t output) const { return {at(output, 0), stride, transposed}; }
};

constexpr int rows_ahead = 3, numbers_of_line = 16;  // floats in a line of the cache

// Fills all panels from a matrix whose outputs lie side by side. A row is copied to several panels at a time,
// so that neighbouring numbers are read together and written to few places. Rows are too far apart for the
// processor to foresee the next one, so it is told `rows_ahead` before.
inline void copy_panels(const float* from, std::int64_t stride, int outputs, int inputs, int width,
                        float* panels) {
    const auto copy = [&](int first, int last, auto count) USF_LAMBDA {
        for (std::int64_t i = 0; i < inputs; ++i) {
            const float* const row = from + i * stride;
            const float* const later = from + std::min<std::int64_t>(i + rows_ahead, inputs - 1) * stride;
            for (int o = first; o < last; o += width) {
                for (int k = 0; k < count; k += numbers_of_line) __builtin_prefetch(later + o + k);
                std::memcpy(panels + (std::int64_t{o} * inputs + i * width), row + o, count * sizeof(float));
            }
        }
    };
    const int whole = outputs / width * width, some = 8 * width;
    with_lanes(best_lanes(), [&]<int lanes>() USF_LAMBDA {
        for (int first = 0; first < whole; first += some) {
            const int last = std::min(first + some, whole);
            if (width == 2 * lanes)
                copy(first, last, std::integral_constant<int, 2 * lanes>());
            else if (width == rows_of_tile(lanes))
                copy(first, last, std::integral_constant<int, rows_of_tile(lanes)>());
            else
                copy(first, last, width);
        }
    });
    if (whole == outputs) return;
    std::fill_n(panels + std::int64_t{whole} * inputs, std::int64_t{width} * inputs, 0.0f);
    copy(whole, outputs, outputs - whole);
}

// Fills one panel from `count` outputs of a matrix whose inputs lie side by side; the other outputs are zero.
inline void transpose_panel(const float* from, std::int64_t stride, int count, int inputs, int width,
                            float* panel) {
    if (count < width) std::fill_n(panel, std::int64_t{width} * inputs, 0.0f);
    const auto transpose = transposition<float, float>();
    const int some = std::min(tile, width);  // outputs
    for (int o = 0; o < count; o += some)
        for (int i = 0; i < inputs; i += tile)
            transpose(from + o * stride + i, stride, std::min(some, count - o), std::min(tile, inputs - i),
                      panel + std::int64_t{i} * width + o, width);
}

// Fills all panels of a matrix, padded with zeros.
inline void fill_panels(const MatrixView& matrix, int outputs, int inputs, int width, float* panels) {
    if (matrix.transposed) return copy_panels(matrix.data, matrix.stride, outputs, inputs, width, panels);
    for (int first = 0; first < outputs; first += width)
        transpose_panel(matrix.data + first * matrix.stride, matrix.stride, std::min(width, outputs - first),
                        inputs, width, panels + std::int64_t{first} * inputs);
}

// The same by a team, some panels at a time.
inline void fill_panels(const MatrixView& matrix, int outputs, int inputs, int width, float* panels,
                        int threads) {
    const int some = std::max(48 / width, 1) * width;  // outputs
    team_for((outputs + some - 1) / some, threads, [&](std::int64_t i) {
        const int first = static_cast<int>(i) * some;
        fill_panels(matrix.from(first), std::min(some, outputs - first), inputs, width,
                    panels + std::int64_t{first} * inputs);
    });
}

// A matrix as panels, of pairs or not, padded with zeros, and a bias, which may be null. The inputs are those
// of `taps` taps, one after the other. Copies of this share the memory.
class Weights {
public:
    Weights(const float* matrix, const float* bias, int outputs, int inputs, bool pairs = false, int taps = 1)
        : outputs_(outputs), inputs_(inputs), taps_(taps), width_(Panels::best_width()), pairs_(pairs) {
        const std::size_t columns = padded(), numbers = columns * depth();
        auto memory = std::make_shared<Floats>();
        float* const panels = memory->at_least(numbers + columns);
        const MatrixView view{matrix, inputs, false};
        if (pairs) {
            Floats floats;
            fill_panels(view, outputs, inputs, width_, floats.at_least(columns * inputs));
            pair_panels(floats.data(), columns / width_ * taps, inputs / taps, width_, panels);
        } else {
            fill_panels(view, outputs, inputs, width_, panels);
        }
        std::fill_n(panels + numbers, columns, 0.0f);
        if (bias) std::copy_n(bias, outputs, panels + numbers);
        memory_ = std::move(memory);
    }
    int outputs() const { return outputs_; }
    int inputs() const { return inputs_; }
    bool pairs() const { return pairs_; }
    const float* bias() const { return memory_->data() + static_cast<std::size_t>(padded()) * depth(); }
    operator Panels() const { return {memory_->data(), bias(), outputs_, depth(), width_, depth(), pairs_}; }

private:
    int padded() const { return Panels::padded(outputs_, width_); }
    int depth() const { return pairs_ ? taps_ * words_of(inputs_ / taps_) : inputs_; }

    int outputs_, inputs_, taps_, width_;
    bool pairs_;
    std::shared_ptr<const Floats> memory_;
};

}  // namespace usf
#endif
