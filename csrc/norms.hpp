// Sums of squares over channels, and their gradient, in one pass.
#pragma once

#include "features.hpp"
#include "rows.hpp"

namespace usf {

// out[j] += sum of squares of `channels` values, at most 8
USF_CLONES inline void add_squares(const float* __restrict z, std::int64_t stride, int channels, int n,
                                   float* __restrict out) {
    if (channels == 8) {
        for (int j = 0; j < n; ++j) {
            float total = 0;
            for (int c = 0; c < 8; ++c) total += z[c * stride + j] * z[c * stride + j];
            out[j] += total;
        }
    } else {
        for (int c = 0; c < channels; ++c)
            for (int j = 0; j < n; ++j) out[j] += z[c * stride + j] * z[c * stride + j];
    }
}

USF_CLONES inline void add_to(const float* __restrict values, int n, float* __restrict out) {
    for (int j = 0; j < n; ++j) out[j] += values[j];
}

// Squared norms of `n` positions side by side. Sums of sums of eights are as accurate as pairwise summation.
inline void norms_of_maps(const float* z, std::int64_t stride, std::int64_t channels, int n, float* out) {
    constexpr std::int64_t together = 64;
    float part[1024];
    std::fill_n(out, n, 0.0f);
    for (std::int64_t first = 0; first < channels; first += together) {
        const std::int64_t end = std::min(first + together, channels);
        const bool whole = channels <= together;
        float* const to = whole ? out : part;
        if (!whole) std::fill_n(part, n, 0.0f);
        for (std::int64_t c = first; c < end; c += 8)
            add_squares(z + c * stride, stride, static_cast<int>(std::min<std::int64_t>(8, end - c)), n, to);
        if (!whole) add_to(part, n, out);
    }
}

// Squared norms of one row after the other.
USF_CLONES inline void norms_of_rows(const float* z, std::int64_t stride, std::int64_t rows,
                                     std::int64_t channels, float* out) {
    for (std::int64_t r = 0; r < rows; ++r, z += stride) out[r] = dot(z, z, channels);
}

// Writes the squared norms to out [batch, positions]; returns false for a layout without a loop here.
inline bool squared_norm(const Input& z, const Extent& extent, float* out, int threads) {
    const auto [batch, channels, positions] = extent;
    const Layout layout = common_layout(positions, z);
    if (layout == Layout::other) return false;
    if (layout == Layout::maps) {
        constexpr std::int64_t tile = 1024;
        const std::int64_t tiles = (positions + tile - 1) / tile;
        team_for(batch * tiles, threads, [&, channels = channels, positions = positions](std::int64_t i) {
            const std::int64_t image = i / tiles, p = i % tiles * tile;
            const int n = static_cast<int>(std::min(tile, positions - p));
            norms_of_maps(z.at(image, 0, p), z.channel, channels, n, out + image * positions + p);
        });
        return true;
    }
    const RowCount count(extent);
    const RowsOf<const float> from(z, positions);
    const Stretches stretches(count.rows, channels);
    team_for(count.images * stretches.count, threads, [&, channels = channels](std::int64_t i) {
        const std::int64_t image = i / stretches.count, s = i % stretches.count;
        const std::int64_t begin = stretches.begin(s);
        norms_of_rows(from.at(image, begin), from.row, stretches.end(s) - begin, channels,
                      out + image * count.rows + begin);
    });
    return true;
}

USF_CLONES inline void double_product(const float* __restrict z, const float* __restrict grad, int n,
                                      float* __restrict out) {
    for (int j = 0; j < n; ++j) out[j] = 2 * grad[j] * z[j];
}
USF_CLONES inline void scale_rows(const float* z, std::int64_t stride, const float* grad, std::int64_t rows,
                                  std::int64_t channels, float* __restrict out, std::int64_t out_stride) {
    for (std::int64_t r = 0; r < rows; ++r, z += stride, out += out_stride) {
        const float factor = 2 * grad[r];
        for (std::int64_t c = 0; c < channels; ++c) out[c] = factor * z[c];
    }
}

// out = 2 grad z, for `grad` [batch, positions]; returns false for layouts without a loop here.
inline bool squared_norm_gradient(const float* grad, const Input& z, const Extent& extent, const Output& out,
                                  int threads) {
    const auto [batch, channels, positions] = extent;
    const Layout layout = common_layout(positions, z, out);
    if (layout == Layout::other) return false;
    if (layout == Layout::maps) {
        const Stretches planes(channels, positions);
        team_for(batch * planes.count, threads, [&, positions = positions](std::int64_t i) {
            const std::int64_t image = i / planes.count, s = i % planes.count;
            for (std::int64_t p = 0; p < positions; p += 4096) {  // the gradient stays in the cache
                const int n = static_cast<int>(std::min<std::int64_t>(4096, positions - p));
                for (std::int64_t c = planes.begin(s); c < planes.end(s); ++c)
                    double_product(z.at(image, c, p), grad + image * positions + p, n, out.at(image, c, p));
            }
        });
        return true;
    }
    const RowCount count(extent);
    const RowsOf<const float> from(z, positions);
    const RowsOf<float> to(out, positions);
    const Stretches stretches(count.rows, channels);
    team_for(count.images * stretches.count, threads, [&, channels = channels](std::int64_t i) {
        const std::int64_t image = i / stretches.count, s = i % stretches.count;
        const std::int64_t begin = stretches.begin(s);
        scale_rows(from.at(image, begin), from.row, grad + image * count.rows + begin,
                   stretches.end(s) - begin, channels, to.at(image, begin), to.row);
    });
    return true;
}

}  // namespace usf
