// A coupling, then a scale, a shift and a permutation of the channels, in one pass, in either direction.
#pragma once

#include <vector>

#include "coupling_loops.hpp"

namespace usf {

// out[:, to[j]] = scale[j] * coupled[:, j] + bias[j]
struct Exit {
    std::vector<std::int64_t> to;  // empty for none
    const float *scale = nullptr, *bias = nullptr;

    std::int64_t channel(std::int64_t j) const { return to.empty() ? j : to[j]; }
    bool nothing() const { return to.empty() && !scale; }
    // Undoes the permutation of a row.
    USF_INLINE void take(const float* __restrict from, std::int64_t channels, float* __restrict out) const {
        if (to.empty()) {
            std::copy_n(from, channels, out);
        } else {
            const std::int64_t* __restrict const place = to.data();
            for (std::int64_t j = 0; j < channels; ++j) out[j] = from[place[j]];
        }
    }
};

// The inverse of a permutation; nothing if `index` is not a permutation.
inline std::optional<std::vector<std::int64_t>> inverse_of(const std::int64_t* index, std::int64_t n) {
    std::vector<std::int64_t> inverse(n, -1);
    for (std::int64_t i = 0; i < n; ++i) {
        if (index[i] < 0 || index[i] >= n || inverse[index[i]] >= 0) return std::nullopt;
        inverse[index[i]] = i;
    }
    return inverse;
}

USF_CLONES inline double couple_plane(const Coupling& coupling, const float* x, const float* params,
                                      std::int64_t apart, std::int64_t n, const float* scale,
                                      const float* bias, float* __restrict out) {
    if (!scale) return couple_run(coupling, x, params, apart, n, out);
    const float factor = *scale, offset = *bias;
    double total = 0;
    for (std::int64_t first = 0; first < n; first += piece) {
        const int count = static_cast<int>(std::min<std::int64_t>(piece, n - first));
        total += couple_run(coupling, x + first, params + first, apart, count, out + first);
        for (int j = 0; j < count; ++j) out[first + j] = factor * out[first + j] + offset;
    }
    return total;
}

USF_CLONES inline void pass_plane(const float* __restrict x, std::int64_t n, const float* scale,
                                  const float* bias, float* __restrict out) {
    if (!scale) {
        std::copy_n(x, n, out);
        return;
    }
    const float factor = *scale, offset = *bias;
    for (std::int64_t j = 0; j < n; ++j) out[j] = factor * x[j] + offset;
}

// Couples the channels [begin, end) of an image. Returns the sum of their log scales.
inline double couple_planes(const Coupling& coupling, std::int64_t split, const Exit& exit, const Input& x,
                            const Input& params, std::int64_t apart, std::int64_t positions,
                            std::int64_t image, std::int64_t begin, std::int64_t end, const Output& out) {
    const bool dense = x.channel == positions && params.channel == positions && out.channel == positions;
    double total = 0;
    for (std::int64_t j = begin; j < end;) {
        const bool passes = j < split;
        // Without an exit, neighbouring planes are treated as a single long one.
        const std::int64_t planes = dense && exit.nothing() ? (passes ? std::min(end, split) : end) - j : 1;
        const std::int64_t to = exit.channel(j), n = planes * positions;
        const float *scale = exit.scale ? exit.scale + j : nullptr,
                    *bias = exit.scale ? exit.bias + j : nullptr;
        if (passes)
            pass_plane(x.at(image, j, 0), n, scale, bias, out.at(image, to, 0));
        else
            total += couple_plane(coupling, x.at(image, j, 0), params.at(image, j - split, 0), apart, n,
                                  scale, bias, out.at(image, to, 0));
        j += planes;
    }
    return total;
}

// Couples rows of neighbouring channels. Adds the sum of the log scales of row r to totals[r * step].
USF_CLONES inline void couple_rows(const Coupling& coupling, std::int64_t split, std::int64_t channels,
                                   const Exit& exit, const float* x, std::int64_t x_row, const float* params,
                                   std::int64_t params_row, std::int64_t apart, std::int64_t rows,
                                   float* __restrict out, std::int64_t out_row, double* totals,
                                   std::int64_t step, float* __restrict scratch) {
    const std::int64_t* const to = exit.to.data();
    const bool gathers = !exit.to.empty();
    for (std::int64_t r = 0; r < rows; ++r, x += x_row, params += params_row, out += out_row) {
        float* const row = gathers ? scratch : out;
        std::copy_n(x, split, row);
        const double total = couple_run(coupling, x + split, params, apart, channels - split, row + split);
        if (totals) totals[r * step] += total;
        if (exit.scale) {
            const float* __restrict scale = exit.scale;
            const float* __restrict bias = exit.bias;
            float* __restrict values = row;
            for (std::int64_t j = 0; j < channels; ++j) values[j] = scale[j] * values[j] + bias[j];
        }
        if (gathers)
            for (std::int64_t j = 0; j < channels; ++j) out[to[j]] = row[j];
    }
}

// Couples x [batch, channels, positions] with params of channels - split channels, or twice as many for an
// affine coupling, whose log-determinant goes to log_det [batch]. Returns false, without writing anything,
// for layouts without a loop here.
inline bool couple(const Coupling& coupling, std::int64_t split, const Exit& exit, const Input& x,
                   const Input& params, const Extent& extent, const Output& out, float* log_det,
                   int threads) {
    const auto [batch, channels, positions] = extent;
    const Layout layout = common_layout(positions, x, params, out);
    if (layout == Layout::other) return false;
    const std::int64_t apart = (channels - split) * params.channel;
    std::vector<double> totals;  // sums of log scales: `each` stretches per image, image after image
    std::int64_t each = 1;
    if (layout == Layout::maps) {
        const Stretches planes(channels, positions);
        each = planes.count;
        totals.resize(batch * each);
        team_for(batch * each, threads, [&, positions = positions](std::int64_t i) {
            const std::int64_t s = i % planes.count;
            totals[i] = couple_planes(coupling, split, exit, x, params, apart, positions, i / planes.count,
                                      planes.begin(s), planes.end(s), out);
        });
    } else {
        const RowCount count(extent);
        const RowsOf<const float> x_rows(x, positions), params_rows(params, positions);
        const RowsOf<float> out_rows(out, positions);
        const Stretches rows(count.rows, channels);
        const bool own = positions == 1;  // every row is an image
        each = own ? 1 : rows.count;
        totals.resize(batch * each);
        team_for(count.images * rows.count, threads, [&, channels = channels](std::int64_t i) {
            const std::int64_t image = i / rows.count, begin = rows.begin(i % rows.count);
            std::vector<float> scratch(exit.to.size());
            couple_rows(coupling, split, channels, exit, x_rows.at(image, begin), x_rows.row,
                        params_rows.at(image, begin), params_rows.row, apart,
                        rows.end(i % rows.count) - begin, out_rows.at(image, begin), out_rows.row,
                        totals.data() + (own ? begin : i), own, scratch.data());
        });
    }
    if (log_det) {
        for (std::int64_t b = 0; b < batch; ++b) {
            double total = 0;
            for (std::int64_t i = 0; i < each; ++i) total += totals[b * each + i];
            log_det[b] = static_cast<float>(coupling.inverse ? -total : total);
        }
    }
    return true;
}

}  // namespace usf
