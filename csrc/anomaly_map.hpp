// Anomaly maps of latents at several scales, resized and averaged in one pass over the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "coupling_loops.hpp"

namespace usf {

// A scale of latents, by small maps [batch, height, width] of inner products: of every pixel with itself,
// which is its squared norm, and for latents that are to be resized after it with its right and its lower
// neighbour, and half the sum of those along the diagonals between the four; of pixels at the end of an axis,
// of no meaning.
struct Scale {
    float* maps;
    std::int64_t channels, height, width;
};

// Of every output along a resized axis, its two sources and their weights (align_corners=False).
struct Resize {
    std::vector<std::int32_t> first, second;
    std::vector<float> of_first, of_second;

    Resize(std::int64_t from, std::int64_t to) : first(to), second(to), of_first(to), of_second(to) {
        const double ratio = static_cast<double>(from) / static_cast<double>(to);
        for (std::int64_t i = 0; i < to; ++i) {
            const double place = std::clamp((i + 0.5) * ratio - 0.5, 0.0, static_cast<double>(from - 1));
            first[i] = static_cast<std::int32_t>(place);
            // Where nothing is resized, likelihoods that are not finite stay where they are.
            second[i] = from == to ? first[i] : std::min(first[i] + 1, static_cast<std::int32_t>(from - 1));
            of_second[i] = static_cast<float>(place - first[i]);
            of_first[i] = 1 - of_second[i];
        }
    }
};

// Inner products of a row of `width` pixels, [width, channels], with the same row and the next one (the same
// again if it is the last). Writes own, right, down and diagonals, `apart` numbers from each other.
USF_CLONES inline void products_of_row(const float* row, const float* next, std::int64_t width,
                                       std::int64_t channels, std::int64_t apart, float* out) {
    for (std::int64_t x = 0; x < width; ++x, row += channels, next += channels, ++out) {
        const std::int64_t step = x + 1 < width ? channels : 0;
        out[0] = dot(row, row, channels);
        out[apart] = dot(row, row + step, channels);
        out[2 * apart] = dot(row, next, channels);
        out[3 * apart] = 0.5f * (dot(row, next + step, channels) + dot(row + step, next, channels));
    }
}

// Writes the four maps of latents [batch, height, width, channels].
inline void pixel_products(const float* z, std::int64_t batch, std::int64_t height, std::int64_t width,
                           std::int64_t channels, float* out, int threads) {
    const std::int64_t line = width * channels;
    team_for(batch * height, threads, [&](std::int64_t i) {
        const float* const row = z + i * line;
        products_of_row(row, i % height + 1 < height ? row + line : row, width, channels,
                        batch * height * width, out + i * width);
    });
}

// 1 - exp(-u / 2C) of squared norms u, in their place.
USF_CLONES inline void to_anomalies(float* norms, std::int64_t n, std::int64_t channels) {
    const float factor = -0.5f / static_cast<float>(channels);
    for (std::int64_t i = 0; i < n; ++i) norms[i] = -fast_expm1(factor * norms[i]);
}

// out = of_first * a + of_second * b
USF_CLONES inline void blend(const float* a, const float* b, float of_first, float of_second, std::int64_t n,
                             float* __restrict out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = of_first * a[i] + of_second * b[i];
}
// The squared norm of of_first * a + of_second * b, from the squared norms of a and b and their product.
USF_CLONES inline void blend_norms(const float* a, const float* b, const float* product, float of_first,
                                   float of_second, std::int64_t n, float* __restrict out) {
    for (std::int64_t i = 0; i < n; ++i)
        out[i] =
            of_first * of_first * a[i] + of_second * of_second * b[i] + 2 * of_first * of_second * product[i];
}

USF_CLONES inline void add_resized(const float* row, const Resize& to, float* __restrict out) {
    const std::int32_t *const first = to.first.data(), *const second = to.second.data();
    const float *const of_first = to.of_first.data(), *const of_second = to.of_second.data();
    const std::int64_t n = std::ssize(to.first);
    for (std::int64_t i = 0; i < n; ++i)
        out[i] += of_first[i] * row[first[i]] + of_second[i] * row[second[i]];
}
// Adds 1 - exp(-u / 2C) for the resized squared norms u.
USF_CLONES inline void add_resized_norms(const float* norms, const float* products, std::int64_t channels,
                                         const Resize& to, float* __restrict out) {
    const std::int32_t *const first = to.first.data(), *const second = to.second.data();
    const float *const of_first = to.of_first.data(), *const of_second = to.of_second.data();
    const std::int64_t n = std::ssize(to.first);
    const float factor = -0.5f / static_cast<float>(channels);
    for (std::int64_t i = 0; i < n; ++i) {
        const float a = of_first[i], b = of_second[i];
        const float norm =
            a * a * norms[first[i]] + b * b * norms[second[i]] + 2 * a * b * products[first[i]];
        // Where the corners cancel, rounding may leave a negative number.
        out[i] -= fast_expm1(factor * (norm < 0 ? 0 : norm));
    }
}
USF_CLONES inline void divide(float by, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] /= by;
}

// Adds row y of a resized scale to `out`. Rows are blended first, then columns. Squared norms of resized
// latents are quadratic in these, hence the products with neighbours; otherwise maps hold anomalies already.
inline void add_row(const Scale& scale, bool latent, std::int64_t batch, std::int64_t image,
                    const Resize& rows, const Resize& columns, std::int64_t y, float* scratch, float* out) {
    const std::int64_t width = scale.width, apart = batch * scale.height * width;
    const float* const map = scale.maps + image * scale.height * width;
    const float *a = map + rows.first[y] * width, *b = map + rows.second[y] * width;
    const float of_first = rows.of_first[y], of_second = rows.of_second[y];
    if (!latent) {
        blend(a, b, of_first, of_second, width, scratch);
        return add_resized(scratch, columns, out);
    }
    float* const products = scratch + width;
    blend_norms(a, b, a + 2 * apart, of_first, of_second, width, scratch);
    blend_norms(a + apart, b + apart, a + 3 * apart, of_first, of_second, width, products);
    add_resized_norms(scratch, products, scale.channels, columns, out);
}

// Writes the average over the scales, [batch, height, width]. Resizes latents or their anomalies, which then
// overwrite the squared norms.
inline void anomaly_map(const std::vector<Scale>& scales, bool latent, std::int64_t batch,
                        std::int64_t height, std::int64_t width, float* out, int threads) {
    std::vector<Resize> rows, columns;
    std::int64_t widest = 0;
    for (const Scale& scale : scales) {
        rows.emplace_back(scale.height, height);
        columns.emplace_back(scale.width, width);
        widest = std::max(widest, scale.width);
        // Bilinear weights sum to one: 1 - exp(.) may be resized in place of exp(.).
        if (!latent) to_anomalies(scale.maps, batch * scale.height * scale.width, scale.channels);
    }
    const std::int64_t each = std::max<std::int64_t>(1, stretch_elements / width);  // rows per task
    const std::int64_t tasks = (height + each - 1) / each;
    team_for(batch * tasks, threads, [&](std::int64_t task) {
        std::vector<float> scratch(2 * widest);
        const std::int64_t image = task / tasks, first = task % tasks * each;
        for (std::int64_t y = first; y < std::min(first + each, height); ++y) {
            float* const row = out + (image * height + y) * width;
            std::fill_n(row, width, 0.0f);
            for (std::size_t i = 0; i < scales.size(); ++i)
                add_row(scales[i], latent, batch, image, rows[i], columns[i], y, scratch.data(), row);
            divide(static_cast<float>(scales.size()), width, row);
        }
    });
}

}  // namespace usf
