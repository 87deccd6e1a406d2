// Matrices as products read them: in panels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "interleave.hpp"
#include "pairs.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A matrix [outputs, inputs] in panels of two vectors of outputs, input after input; what stands behind the
// last output is computed with and dropped. And a bias of as many numbers as the panels have outputs.
struct Panels {
    const float* data;
    const float* bias;
    int outputs, inputs, width;
    int depth = inputs;  // of the panels as they lie, of which these may be a part
    bool pairs = false;  // of bfloat16 numbers; `inputs` and `depth` are then words

    const float* panel(int first_output) const {
        return data + static_cast<std::ptrdiff_t>(first_output) * depth;
    }
    // Of the same without a bias: some inputs of all outputs, or some outputs, of whole panels from the
    // first.
    Panels of_inputs(int first, int last) const {
        return {
            data + static_cast<std::ptrdiff_t>(first) * width, nullptr, outputs, last - first, width, depth};
    }
    Panels of_outputs(int first, int last) const {
        return {panel(first), nullptr, last - first, inputs, width, depth};
    }
    static int best_width() { return 2 * best_lanes(); }
    static int padded(int outputs, int width) { return (outputs + width - 1) / width * width; }
};

// A matrix as it lies, from one row to the next: [outputs, inputs], or [inputs, outputs] if `transposed`.
struct MatrixView {
    const float* data;
    std::int64_t stride;
    bool transposed;

    const float* at(std::int64_t output, std::int64_t input) const {
        return data + (transposed ? input * stride + output : output * stride + input);
    }
};

// One panel: that of `count` outputs from the first on, padded with zeros.
inline void fill_panel(const MatrixView& matrix, int first, int count, int inputs, int width, float* panel) {
    if (count < width) std::fill_n(panel, std::int64_t{width} * inputs, 0.0f);
    if (matrix.transposed) {
        for (std::int64_t i = 0; i < inputs; ++i)
            std::copy_n(matrix.data + i * matrix.stride + first, count, panel + i * width);
        return;
    }
    const auto transpose = transposition<float, float>();
    const int some = std::min(tile, width);  // outputs, of this panel
    for (int o = 0; o < count; o += some)
        for (int i = 0; i < inputs; i += tile)
            transpose(matrix.data + (first + o) * matrix.stride + i, matrix.stride, std::min(some, count - o),
                      std::min(tile, inputs - i), panel + std::int64_t{i} * width + o, width);
}

// All panels, in memory for as many outputs as they have.
inline void fill_panels(const MatrixView& matrix, int outputs, int inputs, int width, float* panels) {
    for (int first = 0; first < outputs; first += width)
        fill_panel(matrix, first, std::min(width, outputs - first), inputs, width,
                   panels + std::int64_t{first} * inputs);
}

// A matrix as panels, of pairs or not, padded with zeros, and a bias, which may be null. Its inputs are those
// of `taps` taps, one behind the other. Copies share both.
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
