// Rows times a matrix that is new at every call, with what comes behind.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A matrix as panels in `memory`, a bias (null for none) behind them.
inline Panels to_panels(const MatrixView& matrix, const float* bias, int outputs, int inputs, int threads,
                        Floats& memory) {
    const int width = Panels::best_width();
    const std::int64_t columns = Panels::padded(outputs, width), size = columns * inputs;
    float* const panels = memory.at_least(size + columns);
    std::fill_n(panels + size, columns, 0.0f);
    if (bias) std::copy_n(bias, outputs, panels + size);
    team_for(columns / width, threads, [&](std::int64_t p) {
        const int first = static_cast<int>(p) * width;
        fill_panel(matrix, first, std::min(width, outputs - first), inputs, width,
                   panels + std::int64_t{first} * inputs);
    });
    return {panels, panels + size, outputs, inputs, width};
}

// out = ending(matrix x + bias + what stands beside) for all rows x of a call, dense.
inline void row_product(const MatrixView& matrix, const float* bias, int outputs, int inputs, Ending ending,
                        const Inputs& in, const Call& call, float* out) {
    static thread_local Floats memory;
    const Panels weights = to_panels(matrix, bias, outputs, inputs, call.threads, memory);
    for_stretches(call, in.stride + outputs, [&](const Stretch& on) {
        const float* const* const beside = call.conditions ? rows_of_condition(0, on) : nullptr;
        multiply(Inputs{in.data + on.first * in.stride, in.stride}, on.rows, weights,
                 Store{out + on.first * outputs, outputs, weights.bias, ending, beside});
    });
}

}  // namespace usf
#endif
