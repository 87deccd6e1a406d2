// Products of rows with a matrix that may change at every call, and the operations after them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Copies a matrix to panels in `memory`, followed by a bias (null for zeros).
inline Panels to_panels(const MatrixView& matrix, const float* bias, int outputs, int inputs, int threads,
                        Floats& memory) {
    const int width = Panels::best_width();
    const std::int64_t columns = Panels::padded(outputs, width), size = columns * inputs;
    float* const panels = memory.at_least(size + columns);
    std::fill_n(panels + size, columns, 0.0f);
    if (bias) std::copy_n(bias, outputs, panels + size);
    fill_panels(matrix, outputs, inputs, width, panels, threads);
    return {panels, panels + size, outputs, inputs, width};
}

// out = ending(matrix x + bias + condition) for all rows x of a call, contiguous.
inline void row_product(const MatrixView& matrix, const float* bias, int outputs, int inputs, Ending ending,
                        const Inputs& in, const Call& call, float* out) {
    // Computes some outputs of some rows; `first` is the first output that the weights have.
    const auto multiply_by = [&](const Panels& weights, int first, const Stretch& on) {
        const float* const* const beside = call.conditions ? rows_of_condition(0, on) : nullptr;
        if (beside)
            for (const float*& row : on.scratch.condition) row += first;
        multiply(Inputs{in.data + on.first * in.stride, in.stride}, on.rows, weights,
                 Store{out + on.first * outputs + first, outputs, weights.bias, ending, beside});
    };
    const std::int64_t rows = call.maps.rows(), width = Panels::best_width();
    if (rows * in.stride <= 2 * cache_numbers && outputs >= 2 * call.threads * width) {
        // Few rows: they stay in the cache, and each thread fills panels that only it reads.
        team_for((outputs + width - 1) / width, call.threads, [&](std::int64_t p) {
            const int first = static_cast<int>(p * width);
            const int count = std::min(static_cast<int>(width), outputs - first);
            const Stretch all{call, 0, static_cast<int>(rows), scratch_of_thread()};
            multiply_by(to_panels(matrix.from(first), bias ? bias + first : nullptr, count, inputs, 1,
                                  all.scratch.points[0]),
                        first, all);
        });
        return;
    }
    static thread_local Floats memory;
    const Panels weights = to_panels(matrix, bias, outputs, inputs, call.threads, memory);
    for_stretches(call, in.stride + outputs, [&](const Stretch& on) { multiply_by(weights, 0, on); });
}

}  // namespace usf
#endif
