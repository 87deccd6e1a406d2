// Sums over everything but the channels, in one pass: gradients of values that are added to every position.
#pragma once

#include <algorithm>
#include <vector>

#include "features.hpp"
#include "instructions.hpp"
#include "rows.hpp"

namespace usf {

// Sum of neighbouring values, in double over partial sums, so that rounding errors do not grow with n.
USF_CLONES inline double sum_of(const float* values, std::int64_t n) {
    constexpr std::int64_t together = 4096;
    double total = 0;
    for (std::int64_t first = 0; first < n; first += together)
        total += sum<32>(values + first, std::min(together, n - first));
    return total;
}

// out[c] = sum of some rows.
USF_CLONES inline void sum_of_rows(const float* row, std::int64_t stride, std::int64_t rows,
                                   std::int64_t channels, float* __restrict out) {
    std::fill_n(out, channels, 0.0f);
    for (std::int64_t r = 0; r < rows; ++r, row += stride)
        for (std::int64_t c = 0; c < channels; ++c) out[c] += row[c];
}

// Writes the sums to out [channels], the same bits for any number of threads; returns false for a layout
// without a loop here.
inline bool channel_sums(const Input& z, const Extent& extent, float* out, int threads) {
    const auto [batch, channels, positions] = extent;
    const Layout layout = common_layout(positions, z);
    if (layout == Layout::other) return false;
    if (layout == Layout::maps) {
        const Stretches stretches(channels, batch * positions);
        team_for(stretches.count, threads, [&, batch = batch, positions = positions](std::int64_t s) {
            for (std::int64_t c = stretches.begin(s); c < stretches.end(s); ++c) {
                double total = 0;
                for (std::int64_t image = 0; image < batch; ++image)
                    total += sum_of(z.at(image, c, 0), positions);
                out[c] = static_cast<float>(total);
            }
        });
        return true;
    }
    const RowCount count(extent);
    const RowsOf<const float> from(z, positions);
    const Stretches stretches(count.rows, channels, rows_of_a_sum, least_rows_of_a_sum);
    const std::int64_t parts = count.images * stretches.count;
    static thread_local std::vector<float> memory;
    memory.resize(std::max(memory.size(), static_cast<std::size_t>(parts * channels)));
    float* const sums = memory.data();
    team_for(parts, threads, [&, channels = channels](std::int64_t i) {
        const std::int64_t image = i / stretches.count, s = i % stretches.count, begin = stretches.begin(s);
        sum_of_rows(from.at(image, begin), from.row, stretches.end(s) - begin, channels, sums + i * channels);
    });
    for (std::int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (std::int64_t i = 0; i < parts; ++i) total += sums[i * channels + c];
        out[c] = static_cast<float>(total);
    }
    return true;
}

}  // namespace usf
