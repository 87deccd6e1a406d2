// 3 x 3 convolutions by Winograd's filtering, with a kernel that may change at every call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Memory of a thread for a transformed kernel.
inline const std::shared_ptr<Floats>& kernel_memory() {
    static thread_local const auto memory = std::make_shared<Floats>();
    return memory;
}

// out = ending(convolution + bias + condition) for all rows of a call, contiguous; the bias may be null.
inline void convolution(const Kernel& kernel, const float* bias, Ending ending, const Inputs& in,
                        const Call& call, float* out) {
    const TileRows<2> rows(call.maps);
    if (rows.count == 0) return;
    const int width = Panels::best_width(), threads = call.threads;
    // Kernels that are kept go by the size of a map alone. One that is new has to pay for its transform, in
    // all maps together.
    const TileRows<4> large(call.maps);
    constexpr std::int64_t fewest_large = 256;  // tiles worth 36 points instead of 16
    if (large.count * large.tiles >= fewest_large && Filters::large_tiles_pay(kernel, call.maps))
        return apply(Winograd<4>(kernel, bias, threads, kernel_memory()), ending, in, call, out);
    if (threads > 1 && kernel.outputs >= 2 * threads * width && rows.count * rows.tiles <= kernel.outputs) {
        // Few tiles: each thread computes some outputs of all tiles, and transforms only their kernels.
        const std::int64_t panels = (kernel.outputs + width - 1) / width;
        team_for(threads, threads, [&](std::int64_t group) {
            const int first = static_cast<int>(panels * group / threads) * width;
            const int last =
                std::min(static_cast<int>(panels * (group + 1) / threads) * width, kernel.outputs);
            Kernel own = kernel;
            own.data += first * kernel.output, own.outputs = last - first;
            const Winograd<2> winograd(own, bias ? bias + first : nullptr, 1, kernel_memory());
            const Stretch all = rows.stretch(call, 0, rows.count);
            const float* const* const beside = call.conditions ? rows_of_condition(0, all) : nullptr;
            if (beside)
                for (const float*& row : all.scratch.condition) row += first;
            find_tiles<2>(kernel.inputs, kernel.outputs, in, all, out + first, beside);
            convolve(all.scratch.tiles, winograd, ending, all.scratch.points[0], all.scratch.points[1]);
        });
        return;
    }
    apply(Winograd<2>(kernel, bias, threads, kernel_memory()), ending, in, call, out);
}

}  // namespace usf
#endif
